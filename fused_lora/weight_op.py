"""The op of a weight with its adapter added, as convolutions and merging use it: weight + scaling * lora_B @ lora_A.

lora_A [R, K], lora_B [N, R]; weight and g, the gradient of the sum, are [N, K], or a convolution's weight that has the
elements of such a matrix in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dispatch import choose
from .ops import (
    differentiates,
    direct,
    direct_apply,
    make_differentiable,
    module_of,
    once_differentiable,
    register,
    without_autocast,
)
from .reference import in_dtype, product


def _effective_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    path = module_of("effective_weight", choose(backend, weight.device, weight.dtype, lora_A.dtype))
    as_it_is = weight.is_contiguous() or weight.dim() == 2
    # A weight keeps its dtype and its precision under autocast; the layer's product is what autocast is about.
    with without_autocast(weight):
        effective: Tensor = path.effective_weight(
            weight if as_it_is else weight.contiguous(), lora_A, lora_B, scaling=scaling
        )
    # In weight's memory format, as an elementwise sum would be.
    return effective if as_it_is else _fake(weight).copy_(effective)


def _fake(weight: Tensor, *arguments: Any) -> Tensor:
    return weight.new_empty(weight.shape) if weight.dim() == 2 else torch.empty_like(weight)


class _EffectiveWeight(torch.autograd.Function):
    """Saves lora_A and lora_B, each only if the other's gradient is wanted.

    compute: what the op would do, where `direct` holds for all tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        backend: str,
        compute: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        _, wants_da, wants_db, *_ = ctx.needs_input_grad
        ctx.save_for_backward(lora_A if wants_db else None, lora_B if wants_da else None)
        ctx.arguments = scaling, (lora_B.shape[0], lora_A.shape[1]), lora_A.dtype
        ctx.set_materialize_grads(False)
        if compute is None:
            compute = torch.ops.fused_lora.lora_effective_weight
        return compute(weight, lora_A, lora_B, scaling, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        da = db = None
        if g is not None:
            lora_A, lora_B = ctx.saved_tensors
            scaling, matrix, dtype = ctx.arguments
            dw = in_dtype(g.reshape(matrix), dtype)
            if lora_B is not None:
                da = product(lora_B.t(), dw, scaling, lora_A)
            if lora_A is not None:
                db = product(dw, lora_A.t(), scaling, lora_B)
        # Torch drops gradients that nobody wants, and None for arguments that there are not.
        return g, da, db, None, None, None


_apply = direct_apply(_EffectiveWeight)


def lora_effective_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str) -> Tensor:
    """The op of the same name, or what it would do, called directly."""
    tensors = (weight, lora_A, lora_B)
    if not direct(*tensors):
        return torch.ops.fused_lora.lora_effective_weight(*tensors, scaling, backend)  # type: ignore[no-any-return]
    return computed(_effective_weight, *tensors, scaling, backend)


def computed(
    compute: Callable[..., Tensor], weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str
) -> Tensor:
    """What `compute` makes of the rest, differentiable, where `direct` holds for all tensors."""
    if differentiates(weight, lora_A, lora_B):
        return _apply(weight, lora_A, lora_B, scaling, backend, compute)  # type: ignore[no-any-return]
    return compute(weight, lora_A, lora_B, scaling, backend)


register(
    "lora_effective_weight(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, str backend) -> Tensor",
    _effective_weight,
    _fake,
)
make_differentiable("lora_effective_weight", _EffectiveWeight)
