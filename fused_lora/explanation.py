"""Which path a layer's forward would take, asked before it is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .dispatch import BATCH_INVARIANT, Choice, autocast_dtype, choose, requested_backend
from .linear_choice import INVARIANT, choose_forward


def explain(layer: nn.Module, x: Tensor) -> Choice:
    """Says which path `layer(x)` would take now, and why, without computing anything; its backward may take another.

    layer: a fused_lora layer. x: its input; only shape, device and dtype are read. A convolution itself is torch's
    in any case; the path is that of its effective weight.
    Raises TypeError if layer is no LoRA layer, and what the call itself would raise for a forced path.
    """
    r, merged, lora_A = (getattr(layer, name, None) for name in ("r", "merged", "lora_A"))
    if r is None or merged is None:
        raise TypeError(f"layer is a {type(layer).__name__}; expected a fused_lora layer.")
    if requested_backend() == BATCH_INVARIANT and isinstance(layer, nn.Linear):
        return INVARIANT
    if lora_A is None:
        return Choice("plain", "this layer has no adapter")
    if merged:
        return Choice("plain", "the adapter is merged into the weight")
    if not isinstance(layer, nn.Linear):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return choose(requested_backend(), weight.device, weight.dtype, lora_A.dtype)
    cast = None if x.dtype == torch.float64 else autocast_dtype(x.device.type)
    adapter_dtype = lora_A.dtype if cast is None or lora_A.dtype == torch.float32 else cast
    rows = x.numel() // max(1, layer.in_features)
    features = layer.in_features, layer.out_features
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *layer.parameters()))
    dropout = layer.lora_dropout
    # With a probability of 1 there is no term to mask.
    drops = isinstance(dropout, nn.Dropout) and dropout.training and 0 < dropout.p < 1
    dtypes = cast or x.dtype, adapter_dtype
    kind = {"ranks": len(lora_A), "drops": drops, "trains": wants_gradient}
    return choose_forward(requested_backend(), x.device, *dtypes, rows, *features, **kind)
