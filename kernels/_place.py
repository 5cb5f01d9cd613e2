"""The order in which programs go through an output's tiles, so that those at work at once read the same operands."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP_M = 8


@triton.jit
def place(
    tile, M, J, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, GROUP_M: tl.constexpr, COLUMN_FIRST: tl.constexpr
):  # fmt: skip
    """A tile's row and column: by groups of rows, through all columns; before them down the first column, if asked."""
    tiles_m, columns, rest = tl.cdiv(M, BLOCK_M), tl.cdiv(J, BLOCK_J), tile
    if COLUMN_FIRST:
        columns, rest = tl.maximum(columns - 1, 1), tile - tiles_m
    group, in_group = rest // (GROUP_M * columns), rest % (GROUP_M * columns)
    group_size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m, tile_j = group * GROUP_M + in_group % group_size, in_group // group_size
    if COLUMN_FIRST:
        tile_m, tile_j = tl.where(rest < 0, tile, tile_m), tl.where(rest < 0, 0, tile_j + 1)
    return tile_m, tile_j
