"""The dropout contract's keep mask, tile by tile: Philox-4x32-7 of (seed, row, column // 8), and its stored bits.

A tile's bits depend on its global rows and columns alone, never on its shape. One kernel of the forward draws them
and stores one bit per element, [M, cdiv(K, 8)] bytes whose bit j of byte i is column 8 * i + j; the backward reads
them, which takes less time than drawing them again.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
PHILOX_ROUND_A: tl.constexpr = tl.constexpr(0xD2511F53)
PHILOX_ROUND_B: tl.constexpr = tl.constexpr(0xCD9E8D57)
PHILOX_KEY_A: tl.constexpr = tl.constexpr(0x9E3779B9)
PHILOX_KEY_B: tl.constexpr = tl.constexpr(0xBB67AE85)


@triton.jit
def _wide_product(word, factor: tl.constexpr):
    """The high and the low half of word * factor, uint32 each, from one instruction; tl.umulhi would cost another."""
    product = word.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _words(seed_ptr, rows, blocks):
    """The four uint32 words of each global row [ROWS, 1] and block of eight columns [1, BLOCKS], all [ROWS, BLOCKS].

    What depends on the row or on the block alone, as the first two rounds' products do, is computed for those alone.
    """
    seed = tl.load(seed_ptr).to(tl.uint64)
    key_a, key_b = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2, c3 = blocks.to(tl.uint32), rows.to(tl.uint32), (rows >> 32).to(tl.uint32), tl.full((), 0, tl.uint32)
    for _ in tl.static_range(7):
        high_a, low_a = _wide_product(c0, PHILOX_ROUND_A)
        high_b, low_b = _wide_product(c2, PHILOX_ROUND_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a = tl.add(key_a, PHILOX_KEY_A, sanitize_overflow=False)
        key_b = tl.add(key_b, PHILOX_KEY_B, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _draw_blocks(seed_ptr, threshold, rows, blocks):
    """int32 [ROWS, BLOCKS]: bit j says whether column j of a block of eight is kept, in these rows [ROWS]."""
    w0, w1, w2, w3 = _words(seed_ptr, rows[:, None], blocks[None, :])
    # A word's high half is compared where it stands.
    high = threshold << 16
    bits = tl.where((w0 & 0xFFFF) >= threshold, 1, 0) | tl.where(w0 >= high, 2, 0)
    bits |= tl.where((w1 & 0xFFFF) >= threshold, 4, 0) | tl.where(w1 >= high, 8, 0)
    bits |= tl.where((w2 & 0xFFFF) >= threshold, 16, 0) | tl.where(w2 >= high, 32, 0)
    return bits | tl.where((w3 & 0xFFFF) >= threshold, 64, 0) | tl.where(w3 >= high, 128, 0)


@triton.jit
def draw_tile(
    seed_ptr,
    threshold,
    rows,  # [BLOCK_ROWS], global, int64
    first_column,  # global, int64; a multiple of 8 if ALIGNED
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """keep, bool [BLOCK_ROWS, BLOCK_COLUMNS], and the same packed, uint8 [BLOCK_ROWS, BLOCK_COLUMNS // 8]."""
    threshold = threshold.to(tl.uint32)
    blocks = first_column // 8 + tl.arange(0, BLOCK_COLUMNS // 8)
    bits = _draw_blocks(seed_ptr, threshold, rows, blocks)
    if not ALIGNED:
        shift = (first_column % 8).to(tl.int32)
        bits = ((bits >> shift) | (_draw_blocks(seed_ptr, threshold, rows, blocks + 1) << (8 - shift))) & 255
    # The lanes are taken from the byte again: by tl.join and a reshape, the dot that follows would read its operands by
    # single words.
    return unpacked(bits, BLOCK_ROWS, BLOCK_COLUMNS), bits.to(tl.uint8)


@triton.jit
def bit_ptrs(bits_ptr, stride_bm, rows, first_column, BLOCK_COLUMNS: tl.constexpr):
    """Pointers to the bytes of the given rows [BLOCK_ROWS] and columns from first_column, a multiple of 8; all local.

    A kernel that does not specialise on stride_bm, not knowing that rows are aligned, keeps bytes in the threads that
    draw or use them. One that draws must not: for wider accesses it would draw every bit twice (triton 3.6).
    """
    blocks = first_column // 8 + tl.arange(0, BLOCK_COLUMNS // 8)
    return bits_ptr + rows[:, None] * stride_bm + blocks[None, :]


@triton.jit
def in_bits(rows, first_column, M, COLUMNS, BLOCK_COLUMNS: tl.constexpr):
    """Which of these bytes exist."""
    blocks = first_column // 8 + tl.arange(0, BLOCK_COLUMNS // 8)
    return (rows < M)[:, None] & (blocks * 8 < COLUMNS)[None, :]


@triton.jit
def unpacked(bits, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """keep, bool [BLOCK_ROWS, BLOCK_COLUMNS], of uint8 [BLOCK_ROWS, BLOCK_COLUMNS // 8]."""
    lanes = (bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return lanes.reshape(BLOCK_ROWS, BLOCK_COLUMNS) != 0
