"""The dropout contract's keep mask, tile by tile: Philox-4x32-7 of (seed, row, column // 8).

A tile's bits depend on its global rows and columns alone, never on its shape, so every kernel that needs a part of
the mask draws the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_tile(
    seed_ptr,
    threshold,
    rows,  # [BLOCK_ROWS], global, int64
    first_column,  # global, int64; a multiple of 8 if ALIGNED
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """keep, bool [BLOCK_ROWS, BLOCK_COLUMNS]."""
    seed = tl.load(seed_ptr)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    if ALIGNED:
        blocks = first_column // 8 + tl.arange(0, BLOCK_COLUMNS // 8)
    else:
        blocks = columns // 8
    rows = rows[:, None]
    # The counter words must be uint32: tl.philox turns into Philox-4x64 when they are wider.
    zero = tl.zeros((BLOCK_ROWS, blocks.shape[0]), tl.uint32)
    block = blocks[None, :].to(tl.uint32) + zero
    w0, w1, w2, w3 = tl.philox(seed, block, rows.to(tl.uint32) + zero, (rows >> 32).to(tl.uint32) + zero, zero, 7)
    if ALIGNED:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        lanes = tl.join(words & 0xFFFF, words >> 16).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        lane = (columns % 8)[None, :]
        word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
        lanes = tl.where(lane % 2 == 0, word & 0xFFFF, word >> 16)
    return lanes >= threshold.to(tl.uint32)
