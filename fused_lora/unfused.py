"""The same functions as reference.py for shapes where cuBLAS and a second pass over y and dx take less time.

Those are few rows, above all: what counts there is the number of launches, and the host's time for each. Masks are
drawn and applied by kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .fused import effective_weight, embedding, on
from .kernels import mask
from .reference import Dropout, product

__all__ = ["backward", "effective_weight", "embedding", "forward", "grad_panels"]


def _enabled(matrix: Tensor, enable_lora: Sequence[bool]) -> Iterator[Tensor]:
    """The columns of each slice that has an adapter."""
    if len(enable_lora) == 1:
        return iter((matrix,))
    slices = matrix.tensor_split(len(enable_lora), 1)
    return (piece for piece, enabled in zip(slices, enable_lora, strict=True) if enabled)


def _pieces(matrix: Tensor, count: int, dim: int) -> Sequence[Tensor]:
    return (matrix,) if count == 1 else matrix.tensor_split(count, dim)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in dtype, from float32 sums."""
    if left.dtype == dtype:
        return left @ right
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
    dropped, bits, inverse_q = x, None, 1.0
    with on(x):
        if dropout is not None:
            dropped, bits = mask.drop(x, dropout)
            inverse_q = 1 / dropout.keep_probability
        xa = product(dropped, lora_A.to(x.dtype).T, scaling * inverse_q)
        y = torch.nn.functional.linear(x, weight, bias)
        enabled = sum(enable_lora)
        factors = _pieces(lora_B.to(x.dtype), enabled, 0)
        for piece, panel, factor in zip(_enabled(y, enable_lora), _pieces(xa, enabled, 1), factors, strict=True):
            piece.addmm_(panel, factor.T)
    return y, xa, bits


def differentiable(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """y [M, N] without dropout, which torch's own autograd differentiates: that costs the host less than a Function."""
    base = torch.nn.functional.linear(x, weight, bias)
    return torch.addmm(base, x @ lora_A.T, lora_B.T, alpha=scaling)


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
    dyb, db, enabled = None, None, sum(enable_lora)
    if lora_B is not None:
        factors = _pieces(lora_B.to(dy.dtype), enabled, 0)
        pieces = zip(_enabled(dy, enable_lora), factors, strict=True)
        dyb = _joined([product(piece, factor, scaling) for piece, factor in pieces], 1)
    if xa is not None:
        pieces = zip(_enabled(dy, enable_lora), _pieces(xa, enabled, 1), strict=True)
        db = _joined([_product(piece.T, panel, dtype) for piece, panel in pieces], 0)
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
    dx = da = None
    with on(dy):
        dyb, db = grad_panels(dy, lora_B, xa, scaling=scaling, dtype=dtype, enable_lora=enable_lora)
        if dyb is None:
            return None, None, db
        if weight is not None and lora_A is not None:
            dx, factor = dy @ weight, lora_A.to(dy.dtype)
            if bits is None:
                dx.addmm_(dyb, factor)
            else:
                mask.add_kept_(dx, dyb @ factor, bits)
        if x is not None:
            da = _product(dyb.T, x if bits is None else mask.drop_again(x, bits), dtype)
    return dx, da, db


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
