"""The same functions as reference.py for shapes where cuBLAS and a second pass over y and dx take less time.

Those are few rows, above all: what counts there is the number of launches, and the host's time for each. Panels are
made, masks drawn and applied by kernels, and few rows' da and db are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from .fused import drawn_panel, effective_weight, embedding, embedding_grad_lora_A, on, undrawn_panel
from .kernels import mask
from .kernels.config import scaled
from .kernels.few_rows_grad import few_rows_grad
from .reference import Dropout, in_dtype

__all__ = ["backward", "effective_weight", "embedding", "embedding_grad_lora_A", "forward", "grad_panels"]


# For at most so many, one launch for both of an adapter's gradients takes less time than cuBLAS twice, which reads a
# masked x that must be written first.
_FEW_ROWS, _FEW_MASKED_ROWS = 1024, 512


def _enabled(matrix: Tensor, enable_lora: Sequence[bool]) -> list[Tensor]:
    """The columns of each slice that has an adapter."""
    return list(compress(matrix.tensor_split(len(enable_lora), 1), enable_lora))


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in dtype, from float32 sums."""
    if left.dtype == dtype:
        return torch.mm(left, right)
    # Only cuBLAS gives half-precision products in float32.
    return torch.mm(left, right, out_dtype=dtype) if left.is_cuda else left.to(dtype) @ right.to(dtype)


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
    bits = None
    with on(x):
        if dropout is None:
            xa = undrawn_panel(x, lora_A.t(), scaling)
        else:
            xa, bits = drawn_panel(x, lora_A.t(), scaling, dropout)
        y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        lora_B = in_dtype(lora_B, x.dtype)
        if len(enable_lora) == 1:
            y.addmm_(xa, lora_B.t())
        else:
            columns, enabled = _enabled(y, enable_lora), sum(enable_lora)
            pieces = zip(columns, xa.tensor_split(enabled, 1), lora_B.tensor_split(enabled), strict=True)
            for piece, panel, factor in pieces:
                piece.addmm_(panel, factor.t())
    return y, xa, bits


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
    if len(enable_lora) > 1:
        return _grad_panels_of_slices(dy, lora_B, xa, scaling, dtype, enable_lora)
    dyb = None if lora_B is None else undrawn_panel(dy, lora_B, scaling, xa)
    if xa is None:
        return dyb, None
    if len(dy) <= scaled(_FEW_MASKED_ROWS, dy.device) and dy.dtype.itemsize == 2:
        # The first product of cuBLAS's on a thread takes the host several times as long as a launch.
        return dyb, few_rows_grad(dy, xa, None, xa, None, dtype)[1]
    return dyb, _product(dy.t(), xa, dtype)


def _grad_panels_of_slices(
    dy: Tensor,
    lora_B: Tensor | None,
    xa: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    enable_lora: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    dyb, db = None, None
    columns, enabled = _enabled(dy, enable_lora), sum(enable_lora)
    if lora_B is not None:
        factors = in_dtype(lora_B, dy.dtype).tensor_split(enabled)
        pieces = zip(columns, factors, strict=True)
        dyb = _joined([undrawn_panel(piece, factor, scaling) for piece, factor in pieces], 1)
    if xa is not None:
        panels = xa.tensor_split(enabled, 1)
        db = _joined([_product(piece.t(), panel, dtype) for piece, panel in zip(columns, panels, strict=True)], 0)
    return dyb, db


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
    dx, da, kept = None, None, x
    with on(dy):
        few = len(dy) <= scaled(_FEW_ROWS if bits is None else _FEW_MASKED_ROWS, dy.device)
        if lora_B is not None and few and len(enable_lora) == 1 and dy.dtype.itemsize == 2:
            return _few_rows_backward(dy, x, weight, lora_A, lora_B, xa, bits, scaling, dtype)
        dyb, db = grad_panels(dy, lora_B, xa, scaling=scaling, dtype=dtype, enable_lora=enable_lora)
        if dyb is None:
            return None, None, db
        if weight is not None and lora_A is not None:
            dx = torch.mm(dy, weight)
            if bits is None:
                dx.addmm_(dyb, in_dtype(lora_A, dy.dtype))
            else:
                kept = mask.add_kept_(dx, dyb, lora_A, bits, x)
        elif bits is not None and x is not None:
            kept = mask.drop_again(x, bits)
        if kept is not None:
            da = _product(dyb.t(), kept, dtype)
    return dx, da, db


def _few_rows_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor,
    xa: Tensor | None,
    bits: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx, dyb = None, undrawn_panel(dy, lora_B, scaling, xa)
    if weight is not None and lora_A is not None:
        dx = torch.mm(dy, weight)
        if bits is None:
            dx.addmm_(dyb, in_dtype(lora_A, dy.dtype))
        else:
            mask.add_kept_(dx, dyb, lora_A, bits, None)
    return dx, *few_rows_grad(dy, dyb, x, xa, bits, dtype)


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
