"""`warmup`: compiles what unmerged LoRA layers will launch, before a timed loop or a graph capture begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .conv import ConvLoRA
from .embedding import Embedding
from .functional import lora_linear
from .linear import Linear, MergedLinear
from .merge import MergingLayer


def warmup(model: nn.Module, tokens: int | Sequence[int], *, dtype: torch.dtype | None = None) -> int:
    """Runs each kind of LoRA layer in model, forward and backward and forward alone; returns how many kinds there were.

    tokens: how many rows a layer gets at a time, all leading dimensions of its input together; several numbers where a
        run has several, since the path may depend on them. dtype: of the layers' input; None is the weights', or what
        autocast makes of it where warmup is called.
    Layers of one shape are one kind. Both with and without their dropout, with and without a gradient for their input.
    Nothing of the model changes: no parameter, gradient, buffer, hook, mode or random number. Merged layers and those
    without adapters have no kernels. The inputs and outputs of one layer at a time take their memory.

    Raises ValueError for a number of tokens below 1, or if model has no LoRA layer with an adapter.
    """
    counts = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    if not counts or min(counts) < 1:
        raise ValueError(f"tokens is {tokens}; expected one or more numbers of at least 1.")
    layers = [m for m in model.modules() if isinstance(m, MergingLayer) and m._has_adapter]
    if not layers:
        raise ValueError("model has no LoRA layer with an adapter; expected at least one.")
    kinds = {_kind(layer): layer for layer in layers if not layer.merged}
    devices = {layer.lora_A.device for layer in kinds.values() if layer.lora_A.is_cuda}
    with torch.random.fork_rng([device.index for device in devices]), torch.enable_grad():
        for layer in kinds.values():
            for rows in counts:
                for run in _runs(layer, rows, dtype):
                    _forward_and_backward(layer, run)
    return len(kinds)


def _kind(layer: MergingLayer) -> tuple[object, ...]:
    tensors = dict(layer.named_parameters())
    shapes = tuple((name, t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for name, t in tensors.items())
    slices = tuple(getattr(layer, "enable_lora", ()))
    return type(layer), shapes, slices, getattr(layer.lora_dropout, "p", 0.0)


def _runs(layer: MergingLayer, rows: int, dtype: torch.dtype | None) -> Iterator[Callable[[], tuple[Tensor, ...]]]:
    """Calls that return the layer's output and, after it, inputs that want a gradient."""
    weight = layer.base_weight
    if isinstance(layer, ConvLoRA):
        yield lambda: (layer._with_adapter(weight),)
    elif isinstance(layer, Embedding):
        indices = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        yield lambda: (layer.forward(indices),)
    elif isinstance(layer, Linear | MergedLinear):
        dropout_p = layer.lora_dropout.p if isinstance(layer.lora_dropout, nn.Dropout) else 0.0
        for p in {0.0, dropout_p}:
            for wants_dx in (True, False):
                x = torch.zeros(rows, layer.in_features, dtype=dtype or weight.dtype, device=weight.device)
                x.requires_grad_(wants_dx)
                yield lambda x=x, p=p: (_linear(layer, x, p), x)  # type: ignore[misc]
        yield torch.no_grad()(lambda: (_linear(layer, x.detach(), 0.0),))


def _linear(layer: Linear | MergedLinear, x: Tensor, dropout_p: float) -> Tensor:
    return lora_linear(
        x,
        layer.weight,
        layer.lora_A,
        layer.lora_B,
        bias=layer.bias,
        scaling=layer.scaling,
        dropout_p=dropout_p,
        training=dropout_p > 0,
        fan_in_fan_out=layer.fan_in_fan_out,
        enable_lora=layer._slices,
    )


def _forward_and_backward(layer: MergingLayer, run: Callable[[], tuple[Tensor, ...]]) -> None:
    y, *inputs = run()
    wanted = [t for t in (*inputs, *layer.parameters()) if t.requires_grad]
    if y.requires_grad and wanted:
        torch.autograd.grad(y, wanted, torch.zeros_like(y), allow_unused=True)
