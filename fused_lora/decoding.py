"""The same forward as reference.py where nothing is dropped, in one launch for everything."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .fused import on
from .kernels.decode_launch import DecodeAgain, decode, decode_again
from .kernels.decode_tiles import decode_tile
from .reference import Dropout


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: Dropout | None = None,
    enable_lora: Sequence[bool] = (True,),
    tiles_for_rows: int | None = None,
    keep_panel: bool = False,
) -> tuple[Tensor, Tensor | None, None]:
    """y [M, N] and, if kept, its panel xa [M, R], both in x.dtype.

    tiles_for_rows: of how many rows the tiles are; None is M.
    """
    assert dropout is None, "the decode kernel draws no masks"
    rows, in_features = x.shape
    with on(x):
        tile = decode_tile(x.device, x.dtype, tiles_for_rows or rows, in_features, weight.shape[0])
        y, xa = decode(x, weight, bias, lora_A, lora_B, scaling, tile, enable_lora, keep_panel=keep_panel)
    return y, xa, None


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
    tile = decode_tile(x.device, x.dtype, x.numel() // x.shape[-1], x.shape[-1], weight.shape[0])
    return decode_again(x, weight, bias, lora_A, lora_B, scaling, tile, enable_lora)
