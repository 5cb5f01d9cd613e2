"""The op of a weight with its adapter added, as convolutions use it and merging: weight + scaling * lora_B @ lora_A.

Two-dimensional: weight [N, K], lora_A [R, K], lora_B [N, R], g [N, K] the gradient of the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import make_differentiable, path_of, register, without_autocast
from .reference import product


def _effective_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    path = path_of("effective_weight", backend, weight, lora_A.dtype)
    effective: Tensor = path.effective_weight(weight, lora_A, lora_B, scaling=scaling)
    return effective


def _fake(weight: Tensor, *arguments: Any) -> Tensor:
    return weight.new_empty(weight.shape)


class _EffectiveWeight(torch.autograd.Function):
    """Saves lora_A and lora_B, each only if the other's gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
        _, wants_da, wants_db = ctx.needs_input_grad[:3]
        ctx.save_for_backward(lora_A if wants_db else None, lora_B if wants_da else None)
        ctx.scaling = scaling
        ctx.set_materialize_grads(False)
        effective: Tensor = torch.ops.fused_lora.lora_effective_weight(weight, lora_A, lora_B, scaling, backend)
        return effective

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        lora_A, lora_B = ctx.saved_tensors
        da = db = None
        with without_autocast(g.device.type):
            if lora_B is not None:
                da = product(lora_B.T, g.to(lora_B.dtype), ctx.scaling)
            if lora_A is not None:
                db = product(g.to(lora_A.dtype), lora_A.T, ctx.scaling)
        return g if ctx.needs_input_grad[0] else None, da, db, None, None


register(
    "lora_effective_weight(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str backend) -> Tensor",
    _effective_weight,
    _fake,
)
make_differentiable("lora_effective_weight", _EffectiveWeight)
