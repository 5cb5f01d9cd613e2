"""The same functions as reference.py, computed by the Triton kernels on their tensors' device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .kernels import adapter_grad, first_wave, fused_linear, low_rank_update, own_panel, panel
from .kernels.config import overlaps
from .kernels.launch import dropout_facts
from .kernels.lookup import tiles_for
from .kernels.narrow import narrow
from .kernels.replay import replayed
from .reference import Dropout

_HERE: AbstractContextManager[object] = nullcontext()


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch._C._cuda_getDevice():
        return _HERE
    return torch.cuda.device(tensor.device)


def _narrowed(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B, in x's dtype where the copy engine reads them, which converts nothing, else as they are."""
    if lora_A.dtype == x.dtype or min(lora_A.numel(), lora_B.numel()) == 0:
        return lora_A, lora_B
    reads = tiles_for(x.device, x.dtype, *weight.shape).linear.descriptors
    return narrow(lora_A, lora_B, x.dtype) if reads else (lora_A, lora_B)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: Dropout | None,
    enable_lora: Sequence[bool] = (True,),
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [M, N] and its panel xa [M, R], both in x.dtype, and the bits of the mask."""

    def launched() -> tuple[Tensor, Tensor, Tensor | None]:
        if dropout is None:
            tile = own_panel.tile_of(x.device, x.dtype, x.shape[0], x.shape[1], len(weight))
            if tile is not None and own_panel.takes(x, weight, lora_A):
                return *own_panel.forward(x, weight, bias, lora_A, lora_B, scaling, tile, enable_lora), None
        A, B = _narrowed(x, weight, lora_A, lora_B)
        if dropout is None and first_wave.takes(x, weight, A):
            return *first_wave.forward(x, weight, bias, A, B, scaling, enable_lora), None
        xa, bits = panel.panel(x, A.T, scaling, dropout)
        return fused_linear.forward(x, weight, bias, xa, B, enable_lora), xa, bits

    given = x, weight, bias, lora_A, lora_B, None if dropout is None else dropout.seed
    facts = "forward", scaling, *dropout_facts(dropout), *enable_lora
    with on(x):
        return replayed(given, facts, launched)  # type: ignore[return-value]


def grad_panels(
    dy: Tensor,
    lora_B: Tensor | None,
    xa: Tensor | None,
    *,
    scaling: float,
    dtype: torch.dtype,
    enable_lora: Sequence[bool] = (True,),
) -> tuple[Tensor | None, Tensor | None]:
    """dyb [M, R] in dy.dtype where lora_B is given, db [N, R] in `dtype` where xa is."""
    with on(dy):
        return adapter_grad.grad_panels(dy, lora_B, xa, scaling, dtype, enable_lora)


def grad_input(dy: Tensor, weight: Tensor, dyb: Tensor, lora_A: Tensor, *, bits: Tensor | None) -> Tensor:
    """dx [M, K] in dy.dtype."""
    with on(dy):
        return fused_linear.grad_input(dy, weight, dyb, lora_A, bits)


def grad_lora_A(dyb: Tensor, x: Tensor, *, bits: Tensor | None, dtype: torch.dtype) -> Tensor:
    """da [R, K] in `dtype`."""
    with on(x):
        return adapter_grad.grad_lora_A(dyb, x, bits, dtype)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    xa: Tensor | None,
    *,
    bits: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    enable_lora: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx where weight, lora_A and lora_B are given, da where x and lora_B are, db where xa is; scaling includes 1/q."""
    overlapping = overlaps(dy.device)

    def launched() -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        # A db that needs a read of dy by itself can wait until dx's GEMM runs.
        at_once = lora_B is None or lora_B.shape[1] <= adapter_grad.FUSED_RANK
        early_xa, later_xa = (xa, None) if at_once else (None, xa)
        A, B, held = lora_A, lora_B, list[Tensor]()
        if weight is not None and A is not None and B is not None:
            A, B = _narrowed(dy, weight, A, B)
        dyb, db = adapter_grad.grad_panels(dy, B, early_xa, scaling, dtype, enable_lora, overlaps=overlapping)
        if dyb is None or weight is None or A is None:
            dx, beside = None, False
        else:
            # An empty dx is not launched.
            beside = not (x is None and later_xa is None) and overlapping and dy.numel() * weight.numel() > 0
            dx = fused_linear.grad_input(dy, weight, dyb, A, bits, held=held if beside else None)
        da, later_db = adapter_grad.adapter_grads(dy, later_xa, dyb, x, bits, dtype, enable_lora, beside=beside)
        return dx, da, db if at_once else later_db

    given, facts = (dy, x, weight, lora_A, lora_B, xa, bits), ("backward", scaling, dtype, overlapping, *enable_lora)
    with on(dy):
        return replayed(given, facts, launched)  # type: ignore[return-value]


def effective_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float) -> Tensor:
    """weight + scaling * lora_B @ lora_A, summed in float32 and rounded once to weight.dtype.

    weight is [N, K], or contiguous with other dimensions, which the result has too.
    """
    with on(weight):
        return low_rank_update.effective_weight(weight, lora_A, lora_B, scaling)


def embedding(
    indices: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """y [M, D] and its panel xa [M, R], both in weight.dtype."""
    with on(weight):
        return low_rank_update.embedding(indices, weight, lora_A, lora_B, scaling)
