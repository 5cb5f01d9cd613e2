"""The order in which programs go through an output's tiles, so that those at work at once read the same operands."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP_M = 8


@triton.jit
def place(tile, M, J, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, GROUP_M: tl.constexpr):
    """A tile's row and column: by groups of rows, through all columns."""
    tiles_m, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(J, BLOCK_J)
    group, in_group = tile // (GROUP_M * columns), tile % (GROUP_M * columns)
    group_size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + in_group % group_size, in_group // group_size
