"""The same functions as reference.py for few rows, each in as few launches as there can be.

Those are bound by reading the weight, and by what a launch costs. A forward is one launch, also of many rows if no
gradient is wanted; a backward is two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fused import on
from .kernels.decode_launch import DecodeAgain, decode, decode_again
from .kernels.decode_tiles import decode_tile
from .kernels.few_rows_grad import few_rows_grad
from .reference import Dropout


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
    tiles_for_rows: int | None = None,
    keep_panel: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N] and, if kept, its panel xa [M, R], both in x.dtype, and the bits of the mask.

    tiles_for_rows: of how many rows the tiles are; None is M.
    """
    rows, in_features = x.shape
    with on(x):
        sizes = tiles_for_rows or rows, in_features, len(weight), len(lora_A)
        tile = decode_tile(x.device, x.dtype, *sizes, dropout is not None)
        return decode(
            x, weight, bias, lora_A, lora_B, scaling, tile, enable_lora, dropout=dropout, keep_panel=keep_panel
        )


def again(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    enable_lora: Sequence[bool],
) -> DecodeAgain | None:
    """`forward` for other tensors of the same kind, if it was launched for such; x may have other dimensions."""
    tile = decode_tile(x.device, x.dtype, x.numel() // x.shape[-1], x.shape[-1], len(weight), len(lora_A))
    return decode_again(x, weight, bias, lora_A, lora_B, scaling, tile, enable_lora)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    xa: Tensor | None,
    *,
    bits: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    enable_lora: Sequence[bool] = (True,),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, of a plain layer; da where x is given, db where xa is; scaling includes 1/q."""
    with on(dy):
        tile = decode_tile(dy.device, dy.dtype, dy.shape[0], *weight.shape, len(lora_A))
        dx, dyb, _ = decode(dy, weight.t(), None, lora_B.t(), lora_A.t(), scaling, tile, bits=bits)
        assert dyb is not None
        return dx, *few_rows_grad(dy, dyb, x, xa, bits, dtype)
