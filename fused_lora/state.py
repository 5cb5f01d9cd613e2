"""Which parameters of a model are the adapter's: to train only them, to save only them, or to save none of them."""

from __future__ import annotations

import warnings
from typing import Literal

from torch import Tensor, nn

from .base import LoRALayer
from .merge import MergingLayer

Bias = Literal["none", "all", "lora_only"]


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freezes every parameter of model but the adapters', and but the biases that `bias` names.

    An adapter's parameter is one with a path component that begins with "lora_", as in loralib.
    bias: "none"; "all", every parameter called bias; "lora_only", the biases of LoRA layers.
    Raises NotImplementedError, as loralib does, for any other value of bias.
    """
    _check_bias(bias)
    found = False
    for name, parameter in model.named_parameters():
        if _is_lora(name):
            found = True
        elif bias == "all" and _is_bias(name):
            parameter.requires_grad = True
        else:
            parameter.requires_grad = False
    if bias == "lora_only":
        for module in model.modules():
            if isinstance(module, LoRALayer) and isinstance(getattr(module, "bias", None), nn.Parameter):
                module.bias.requires_grad = True  # type: ignore[attr-defined]
    if not found:
        warnings.warn("mark_only_lora_as_trainable found no LoRA parameter; the model is now frozen.", stacklevel=2)


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The entries of model.state_dict() that belong to adapters, and the biases that `bias` names.

    Load it with `model.load_state_dict(adapter, strict=False)`. The scaling is not part of it, as in loralib.
    bias: "none"; "all", every entry called bias; "lora_only", the biases beside an adapter's entries.
    Raises NotImplementedError, as loralib does, for any other value of bias.
    """
    _check_bias(bias)
    state = model.state_dict()
    beside = {other for name in state if _is_lora(name) for other in _biases_beside(name)}
    return {
        name: tensor
        for name, tensor in state.items()
        if _is_lora(name) or (bias == "all" and _is_bias(name)) or (bias == "lora_only" and name in beside)
    }


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model that computes in inference what this one does, whatever its mode.

    Every LoRA layer's weight holds its adapter, as if merged; there are no lora_* entries; a convolution's weight and
    bias have the names that a plain convolution gives them. The model itself is not changed; the merged weights are
    new tensors, all others are the model's own.

    Raises RuntimeError for a layer whose weight, lora_A or lora_B is parametrized, pruned or in FSDP's flat parameter.
    """
    layers = {
        f"{name}." if name else "": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MergingLayer)
    }
    for layer in layers.values():
        if layer._has_adapter:
            layer._refuse_parametrized(to_merge=False)
    merged: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        prefix = f"{owner}." if owner else ""
        if prefix not in layers and prefix.removesuffix("conv.") in layers:
            prefix = prefix.removesuffix("conv.")
        if prefix not in layers:
            merged[key] = tensor
        elif leaf == "weight":
            merged[prefix + leaf] = layers[prefix].merged_weight()
        elif not leaf.startswith("lora_"):
            merged[prefix + leaf] = tensor
    return merged


def _check_bias(bias: str) -> None:
    if bias not in ("none", "all", "lora_only"):
        raise NotImplementedError(f"bias is {bias!r}; expected 'none', 'all' or 'lora_only'.")


def _is_lora(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def _biases_beside(lora_name: str) -> tuple[str, str]:
    """The bias of a layer that has this entry, and that of its convolution."""
    parts = lora_name.split(".")
    owner = parts[: next(i for i, part in enumerate(parts) if part.startswith("lora_"))]
    return ".".join([*owner, "bias"]), ".".join([*owner, "conv", "bias"])
