"""The dropout contract's keep mask, tile by tile: Philox-4x32-7 of (seed, row, column // 8), and its stored bits.

A tile's bits depend on its global rows and columns alone, never on its shape. One kernel of the forward draws them
and stores one bit per element, [M, cdiv(K, 8)] bytes whose bit j of byte i is column 8 * i + j; the backward reads
them, which takes less time than drawing them again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

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
def _words(seed, rows, blocks):
    """The four uint32 words of each global row [ROWS, 1] and block of eight columns [1, BLOCKS], all [ROWS, BLOCKS].

    What depends on the row or on the block alone, as the first two rounds' products do, is computed for those alone.
    """
    seed = seed.to(tl.uint64)
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
def _kept_pair(word, threshold):
    """Whether a word's low half is at least the threshold, in bit 0, and whether its high half is, in bit 16.

    The threshold stands in both halves of its word. With its top bit set, no half borrows from the other, so that one
    subtraction compares the rest of both.
    """
    difference = (word | 0x80008000) - (threshold & 0x7FFF7FFF)
    inverse = threshold ^ 0xFFFFFFFF
    at_least = (word & inverse) | ((word | inverse) & difference)
    return (at_least & 0x80008000) >> 15


@triton.jit
def _draw_blocks(seed, threshold, rows, blocks):
    """Four uint32 [ROWS, BLOCKS]: bits 0 and 16 of each say which of two columns of a block of eight are kept."""
    w0, w1, w2, w3 = _words(seed, rows[:, None], blocks[None, :])
    threshold *= 0x10001
    return (
        _kept_pair(w0, threshold),
        _kept_pair(w1, threshold),
        _kept_pair(w2, threshold),
        _kept_pair(w3, threshold),
    )


@triton.jit
def _packed(pair0, pair1, pair2, pair3):
    """uint32: bit j says whether column j of a block of eight is kept."""
    pairs = ((pair3 * 4 + pair2) * 4 + pair1) * 4 + pair0
    # The first columns' bits, 0, 2, 4 and 6, move to 24, 26, ..., the second ones' from 16, 18, ... to 25, 27, ...
    return tl.mul(pairs, (1 << 24) | (1 << 9), sanitize_overflow=False) >> 24


@triton.jit
def _lanes(pair0, pair1, pair2, pair3):
    """uint16 [ROWS, BLOCKS, 8], all ones in the columns that bits 0 and 16 of the four pairs [ROWS, BLOCKS] keep.

    The lanes are chosen from the words by constants, at no cost: by tl.join and a reshape, the dot that follows would
    read its operands by single words.
    """
    lane = tl.arange(0, 8)[None, None, :]
    first = tl.where(lane < 2, (pair0 * 0xFFFF)[:, :, None], (pair1 * 0xFFFF)[:, :, None])
    second = tl.where(lane < 6, (pair2 * 0xFFFF)[:, :, None], (pair3 * 0xFFFF)[:, :, None])
    lanes = tl.where(lane < 4, first, second) >> (lane % 2 * 16).to(tl.uint32)
    return lanes.to(tl.uint16)


@triton.jit
def draw_tile(
    seed,
    threshold,
    rows,  # [BLOCK_ROWS], global, int64
    first_column,  # global, int64; a multiple of 8 if ALIGNED
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """keep [BLOCK_ROWS, BLOCK_COLUMNS], which `kept` takes, and its bits, uint8 [BLOCK_ROWS, BLOCK_COLUMNS // 8]."""
    threshold = threshold.to(tl.uint32)
    blocks = first_column // 8 + tl.arange(0, BLOCK_COLUMNS // 8)
    pair0, pair1, pair2, pair3 = _draw_blocks(seed, threshold, rows, blocks)
    bits = _packed(pair0, pair1, pair2, pair3)
    if ALIGNED:
        keep = _lanes(pair0, pair1, pair2, pair3).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        pair0, pair1, pair2, pair3 = _draw_blocks(seed, threshold, rows, blocks + 1)
        shift = (first_column % 8).to(tl.uint32)
        bits = ((bits >> shift) | (_packed(pair0, pair1, pair2, pair3) << (8 - shift))) & 255
        keep = unpacked(bits, BLOCK_ROWS, BLOCK_COLUMNS)
    return keep, bits.to(tl.uint8)


@triton.jit
def kept(keep, values):
    """values where keep, bool or uint16 of all ones, says so, else 0."""
    if keep.dtype == tl.uint16 and values.dtype.primitive_bitwidth == 16:
        # Two values at once.
        return (values.to(tl.uint16, bitcast=True) & keep).to(values.dtype, bitcast=True)
    else:
        return tl.where(keep != 0, values, tl.zeros_like(values))


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


@triton.jit
def kept_by_bits(bits, values):
    """values [ROWS, COLUMNS] where uint8 [ROWS, COLUMNS // 8] says so, else 0."""
    if values.dtype.primitive_bitwidth == 16:
        # Bits 2 * j and 2 * j + 1 of a byte at 2 * j and 2 * j + 16.
        pairs = bits.to(tl.uint32) * 0x8001
        pair0, pair1, pair2, pair3 = pairs, pairs >> 2, pairs >> 4, pairs >> 6
        lanes = _lanes(pair0 & 0x10001, pair1 & 0x10001, pair2 & 0x10001, pair3 & 0x10001)
        return kept(lanes.reshape(values.shape), values)
    else:
        return kept(unpacked(bits, values.shape[0], values.shape[1]), values)


def word_of(bits: Tensor | None, at_most: int) -> tl.dtype:
    """The widest word of at most so many bits that lies within a row of bits and is aligned wherever it lies."""
    for word in (tl.uint64, tl.uint32):
        width = word.primitive_bitwidth
        aligned = bits is not None and bits.stride(0) * 8 % width == 0 and bits.data_ptr() * 8 % width == 0
        if aligned and width <= at_most:
            return word
    return tl.uint8


@triton.jit
def load_words(
    bits_ptr, stride_bm, rows, first_column, M, COLUMNS, BLOCK_COLUMNS: tl.constexpr, WORD: tl.constexpr
):  # fmt: skip
    """The bits of these rows [BLOCK_ROWS] and of the columns from first_column, WORD [BLOCK_ROWS, words]."""
    WIDTH: tl.constexpr = WORD.primitive_bitwidth
    columns = first_column + tl.arange(0, BLOCK_COLUMNS // WIDTH) * WIDTH
    ptrs = (bits_ptr + rows[:, None] * stride_bm + columns[None, :] // 8).to(tl.pointer_type(WORD), bitcast=True)
    return tl.load(ptrs, mask=(rows < M)[:, None] & (columns < COLUMNS)[None, :], other=0)


@triton.jit
def unpacked_in_pairs(words, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """keep, bool [BLOCK_ROWS, BLOCK_COLUMNS], for a matrix instruction's result.

    Its threads have two neighbouring columns of every eight: they shift a word once and test constant bits of it.
    """
    lanes = tl.arange(0, 8)[None, None, None, :]
    places = tl.arange(0, words.dtype.primitive_bitwidth // 8)[None, None, :, None] * 8 + lanes % 2
    shifted = words[:, :, None, None] >> (lanes // 2 * 2).to(words.dtype)
    tested = shifted & (tl.full((), 1, words.dtype) << places.to(words.dtype))
    return (tested != 0).reshape(BLOCK_ROWS, BLOCK_COLUMNS)
