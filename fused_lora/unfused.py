"""The same functions as reference.py for shapes where cuBLAS and a second pass over y and dx take less time.

Those are few rows, above all: what counts there is the number of launches, and the host's time for each. Masks are
drawn and applied by kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress

import torch
from torch import Tensor

from .fused import effective_weight, embedding, on
from .kernels import mask
from .reference import Dropout, in_dtype, product

__all__ = ["backward", "effective_weight", "embedding", "forward", "grad_panels"]


def _slices(matrix: Tensor, panels: Tensor, dim: int, enable_lora: Sequence[bool]) -> Iterable[tuple[Tensor, Tensor]]:
    """The columns of each slice that has an adapter, and its piece of the panels, which follow each other in dim."""
    if len(enable_lora) == 1:
        return ((matrix, panels),)
    columns = matrix.tensor_split(len(enable_lora), 1)
    return zip(compress(columns, enable_lora), panels.tensor_split(sum(enable_lora), dim), strict=True)


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
    dropped, bits = x, None
    with on(x):
        if dropout is not None:
            dropped, bits = mask.drop(x, dropout)
            scaling /= dropout.keep_probability
        xa = product(dropped, in_dtype(lora_A, x.dtype).t(), scaling)
        y = torch.nn.functional.linear(x, weight, bias)
        factors = in_dtype(lora_B, x.dtype)
        if len(enable_lora) == 1:
            y.addmm_(xa, factors.t())
        else:
            pieces = factors.tensor_split(sum(enable_lora))
            for (columns, panel), factor in zip(_slices(y, xa, 1, enable_lora), pieces, strict=True):
                columns.addmm_(panel, factor.t())
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
    dyb, db = None, None
    if lora_B is not None:
        slices = _slices(dy, in_dtype(lora_B, dy.dtype), 0, enable_lora)
        alike = xa if len(enable_lora) == 1 else None
        dyb = _joined([product(piece, factor, scaling, alike) for piece, factor in slices], 1)
    if xa is not None:
        db = _joined([_product(piece.t(), panel, dtype) for piece, panel in _slices(dy, xa, 1, enable_lora)], 0)
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
        dyb, db = grad_panels(dy, lora_B, xa, scaling=scaling, dtype=dtype, enable_lora=enable_lora)
        if dyb is None:
            return None, None, db
        if weight is not None and lora_A is not None:
            dx, factor = torch.mm(dy, weight), in_dtype(lora_A, dy.dtype)
            if bits is None:
                dx.addmm_(dyb, factor)
            else:
                kept = mask.add_kept_(dx, torch.mm(dyb, factor), bits, x)
        elif bits is not None and x is not None:
            kept = mask.drop_again(x, bits)
        if kept is not None:
            da = _product(dyb.t(), kept, dtype)
    return dx, da, db


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
