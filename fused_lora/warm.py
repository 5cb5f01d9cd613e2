"""`warmup`: compiles what unmerged LoRA layers will launch, before a timed loop or a graph capture begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .base import as_count, dropout_probability
from .conv import ConvLoRA
from .embedding import Embedding
from .linear import Linear, MergedLinear
from .merge import MergingLayer

_TENSORS = ("weight", "bias", "lora_A", "lora_B")


def warmup(model: nn.Module, tokens: int | Sequence[int], *, dtype: torch.dtype | None = None) -> int:
    """Runs each kind of LoRA layer in model, forward and backward and forward alone; returns how many kinds there were.

    tokens: how many rows a layer gets at a time, all leading dimensions of its input together; several numbers where a
        run has several, since the path may depend on them. dtype: of the layers' input; None is the weights', or what
        autocast makes of it where warmup is called.
    Layers of one shape are one kind. Both with and without their dropout, with and without a gradient for their input.
    Nothing of the model changes: no parameter, gradient, buffer, hook, mode or random number. Merged layers and those
    without adapters have no kernels. The inputs and outputs of one layer at a time take their memory.

    Raises ValueError for what is no number of tokens of at least 1, or if model has no LoRA layer with an adapter.
    """
    counts = [as_count("tokens", count, 1) for count in (tokens if isinstance(tokens, Iterable) else (tokens,))]
    if not counts:
        raise ValueError(f"tokens is {tokens!r}; expected one or more integers.")
    layers = [m for m in model.modules() if isinstance(m, MergingLayer) and m._has_adapter]
    if not layers:
        raise ValueError("model has no LoRA layer with an adapter; expected at least one.")
    kinds = {_kind(layer): layer for layer in layers if not layer.merged}
    devices = {layer.lora_A.device for layer in kinds.values() if layer.lora_A.is_cuda}
    with torch.random.fork_rng([device.index for device in devices]), torch.enable_grad():
        for layer in kinds.values():
            for rows in counts:
                _run(layer, rows, dtype)
    return len(kinds)


def _kind(layer: MergingLayer) -> tuple[object, ...]:
    tensors = dict(layer.named_parameters())
    shapes = tuple((name, t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for name, t in tensors.items())
    slices = tuple(getattr(layer, "enable_lora", ()))
    return type(layer), shapes, slices, dropout_probability(layer.lora_dropout)


def _run(layer: MergingLayer, rows: int, dtype: torch.dtype | None) -> None:
    like = _stand_in(layer)
    if isinstance(like, ConvLoRA):
        # ConvLoRA's own `weight` is conv's.
        _backward(like._with_adapter(like.__dict__["weight"]), None, like)
    elif isinstance(like, Embedding):
        # What has no rows is not looked up.
        indices = torch.zeros(rows if like.num_embeddings else 0, dtype=torch.int64, device=like.weight.device)
        _backward(like.forward(indices), None, like)
    elif isinstance(like, Linear | MergedLinear):
        for p in {0.0, dropout_probability(layer.lora_dropout)}:
            like.__dict__["lora_dropout"] = nn.Dropout(p)
            for wants_dx in (True, False):
                x = torch.zeros(rows, like.in_features, dtype=dtype or like.weight.dtype, device=like.weight.device)
                x.requires_grad_(wants_dx)
                _backward(like.forward(x), x, like)
        like.__dict__["lora_dropout"] = nn.Identity()
        with torch.no_grad():
            like.forward(x)


def _stand_in(layer: MergingLayer) -> MergingLayer:
    """What computes as the layer does, over the same memory, but with tensors of its own: whose hooks are not run."""
    kind = next(kind for kind in (Linear, MergedLinear, Embedding, ConvLoRA) if isinstance(layer, kind))
    like: MergingLayer = kind.__new__(kind)
    # Found before the parameters and modules, which are the layer's. A lookup would renormalise the weight.
    tensors = {name: _detached(getattr(layer, name, None)) for name in _TENSORS}
    like.__dict__ = {**layer.__dict__, **tensors, "max_norm": None}
    return like


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)


def _backward(y: Tensor, x: Tensor | None, like: MergingLayer) -> None:
    wanted = [t for t in (x, *map(like.__dict__.get, _TENSORS)) if t is not None and t.requires_grad]
    if y.requires_grad and wanted:
        torch.autograd.grad(y, wanted, torch.zeros_like(y), allow_unused=True)
