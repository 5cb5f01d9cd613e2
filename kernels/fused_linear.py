"""One GEMM with a low-rank term in the same kernel: out = left @ right + keep * (panel @ factor) + bias.

forward     y  = x @ w.T + xa @ b.T + bias              left x [M, K],  right w.T [K, N], panel xa,  factor b.T [R, N]
grad_input  dx = dy @ w  + keep * (dyb @ a)             left dy [M, N], right w [N, K],   panel dyb, factor a [R, K]

I is the contracted dimension and J the produced one. The panel already carries scaling and 1/q.

Where the copy engine reads and writes all operands, extended.py computes it. This kernel is for everything else. Its
main loop starts from the low-rank product, since beside it an accumulator of its own would not fit in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import extended
from ._accumulate import accumulate
from ._dropout import load_words, unpacked_in_pairs, word_of
from ._place import GROUP_M, place
from ._ranks import operands
from ._slices import enabled_among, slice_arguments
from .config import LinearTile, rank_block
from .launch import cdiv, describable, input_precision, launch, strides
from .lookup import tiles_for

# Ranks that are added at once.
RANK_STEP = 32


@triton.jit
def _finish(
    acc,
    bias_ptr, stride_bias,
    out_ptr, stride_om, stride_oj,
    tile_m, rows, first_column,
    M, J,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Adds the bias to acc [BLOCK_M, BLOCK_J], rounds once and stores."""
    columns = first_column + tl.arange(0, BLOCK_J)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns * stride_bias, mask=columns < J, other=0.0).to(tl.float32)[None, :]
    if DESCRIPTORS:
        out_ptr.store([tile_m * BLOCK_M, first_column.to(tl.int32)], acc.to(out_ptr.dtype))
    else:
        out_ptrs = out_ptr + rows[:, None] * stride_om + columns[None, :] * stride_oj
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < J))


@triton.jit(launch_metadata=extended.work, do_not_specialize=["M", "first_tile"])
def _fused_linear_kernel(
    left_ptr, stride_lm, stride_li,  # [M, I], a descriptor if DESCRIPTORS
    right_ptr, stride_ri, stride_rj,  # [I, J], a descriptor of it or of its transpose if DESCRIPTORS
    panel_ptr, stride_pm, stride_pr,  # [M, R]
    factor_ptr, stride_fr, stride_fj,  # [R, J]
    bias_ptr, stride_bias,  # [J]
    out_ptr, stride_om, stride_oj,  # [M, J], a descriptor if DESCRIPTORS
    bits_ptr, stride_bm, WORD: tl.constexpr,  # [M, cdiv(J, 8)], or None
    M, J, I, R,  # R ranks in each slice
    first_tile,
    WIDTH, SLICES: tl.constexpr, ENABLED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
    SLICE_STEPS: tl.constexpr, RANK_STEPS: tl.constexpr, GROUP_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr,
    EVEN_I: tl.constexpr, EVEN_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile_m, tile_j = place(first_tile + tl.program_id(0), M, J, BLOCK_M, BLOCK_J, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tile_j.to(tl.int64) * BLOCK_J
    acc = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    words = None
    if bits_ptr is not None:
        # Read before the low-rank product, so that one wait serves for both.
        words = load_words(bits_ptr, stride_bm, rows, first_column, M, J, BLOCK_J, WORD)
    columns = first_column + tl.arange(0, BLOCK_J)
    last_column = tl.minimum((tile_j + 1) * BLOCK_J, J) - 1
    first, last = enabled_among(tile_j * BLOCK_J, last_column, WIDTH, SLICES, ENABLED)
    for step in tl.static_range(SLICE_STEPS * RANK_STEPS):
        panel, factor = operands(
            step, first, last, rows, columns,
            panel_ptr, stride_pm, stride_pr,
            factor_ptr, stride_fr, stride_fj,
            M, R, WIDTH, SLICES, ENABLED, BLOCK_R, RANK_STEPS,
        )  # fmt: skip
        acc = accumulate(panel, factor, acc, PRECISION)
    if bits_ptr is not None:
        acc = tl.where(unpacked_in_pairs(words, BLOCK_M, BLOCK_J), acc, 0.0)
    if DESCRIPTORS:
        for start in range(0, I, BLOCK_I):
            left = left_ptr.load([tile_m * BLOCK_M, start])
            if TRANSPOSED:
                right = right_ptr.load([tile_j * BLOCK_J, start]).T
            else:
                right = right_ptr.load([start, tile_j * BLOCK_J])
            acc = accumulate(left, right, acc, PRECISION)
    else:
        columns = first_column + tl.arange(0, BLOCK_J)
        inner = tl.arange(0, BLOCK_I)
        # Rows past M read the last row again, which needs no mask; their results are not stored.
        left_row_ptrs = left_ptr + tl.minimum(rows, M - 1)[:, None] * stride_lm
        left_ptrs = left_row_ptrs + inner[None, :].to(tl.int64) * stride_li
        right_ptrs = right_ptr + inner[:, None].to(tl.int64) * stride_ri + columns[None, :] * stride_rj
        step = tl.full((), BLOCK_I, tl.int64)
        for start in range(0, I, BLOCK_I):
            if EVEN_I:
                left = tl.load(left_ptrs)
            else:
                left = tl.load(left_ptrs, mask=inner[None, :] < I - start, other=0.0)
            if EVEN_I and EVEN_J:
                right = tl.load(right_ptrs)
            else:
                right = tl.load(right_ptrs, mask=(inner[:, None] < I - start) & (columns[None, :] < J), other=0.0)
            acc = accumulate(left, right, acc, PRECISION)
            left_ptrs += step * stride_li
            right_ptrs += step * stride_ri

    HALF: tl.constexpr = BLOCK_J // 2
    QUARTER: tl.constexpr = BLOCK_J // 4
    halves = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
    for half in tl.static_range(2):
        quarters = halves[half].reshape(BLOCK_M, 2, QUARTER).permute(0, 2, 1).split()
        for quarter in tl.static_range(2):
            _finish(
                quarters[quarter],
                bias_ptr, stride_bias,
                out_ptr, stride_om, stride_oj,
                tile_m, rows, first_column + half * HALF + quarter * QUARTER,
                M, J,
                BLOCK_M, QUARTER, DESCRIPTORS,
            )  # fmt: skip


def _fused_linear(
    left: Tensor,
    right: Tensor,
    panel: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    bits: Tensor | None,
    enable_lora: Sequence[bool],
    out: Tensor,
    tile: LinearTile | None = None,
    first_tile: int = 0,
    followed: bool = False,
) -> Tensor:
    """out [M, J], computed from its first_tile on, in the order of `place`; followed: as for `grad_input`."""
    (M, I), J, R = left.shape, right.shape[1], len(factor)
    if out.numel() == 0:
        return out
    tile = tile or tiles_for(left.device, left.dtype, I, J).linear
    if extended.takes(left, right, out, len(enable_lora), bits, tile):
        extended.extended(left, right, panel, factor, bias, bits, enable_lora, out, tile, first_tile, followed)
        return out
    transposed = right.stride(1) != 1
    rows_of_right = right.T if transposed else right
    descriptors = tile.descriptors and I > 0 and all(map(describable, (left, rows_of_right, out)))
    described = {}
    if descriptors:
        described = {
            "left_ptr": (left, [tile.block_m, tile.block_i]),
            "right_ptr": (rows_of_right, extended.block_of_right(tile, transposed)),
            "out_ptr": (out, [tile.block_m, tile.block_j // 4]),
        }

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        width, block_r = J // len(enable_lora), min(rank_block(R), RANK_STEP)
        touched = 1 if width % tile.block_j == 0 else min(sum(enable_lora), (tile.block_j - 2) // width + 2)
        return (cdiv(M, tile.block_m) * cdiv(J, tile.block_j) - first_tile,), dict(
            **strides("lm li", left),
            **strides("ri rj", right),
            **strides("pm pr", panel),
            **strides("fr fj", factor),
            **strides("bias", bias),
            **strides("om oj", out),
            M=M, J=J, I=I, R=R, first_tile=first_tile, WIDTH=width, **slice_arguments(enable_lora),
            BLOCK_M=tile.block_m, BLOCK_J=tile.block_j, BLOCK_I=tile.block_i, BLOCK_R=block_r,
            SLICE_STEPS=touched, RANK_STEPS=cdiv(R, block_r), GROUP_M=GROUP_M,
            DESCRIPTORS=descriptors, TRANSPOSED=transposed,
            EVEN_I=I % tile.block_i == 0, EVEN_J=J % tile.block_j == 0, PRECISION=input_precision(left.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            **strides("bm", bits), WORD=word_of(bits, tile.block_j),
        )  # fmt: skip

    tensors = dict(left_ptr=left, right_ptr=right, panel_ptr=panel, factor_ptr=factor, bias_ptr=bias, bits_ptr=bits)
    facts = (tile, first_tile, input_precision(left.dtype), *enable_lora)
    launch(_fused_linear_kernel, tensors, facts, arguments, {"out_ptr": out}, described)
    return out


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, xa: Tensor, lora_B: Tensor, enable_lora: Sequence[bool] = (True,)
) -> Tensor:
    """y [M, N] of x [M, K], weight [N, K], bias [N], and the panel xa and lora_B of each enabled slice."""
    out = x.new_empty((len(x), len(weight)))
    return _fused_linear(x, weight.T, xa, lora_B.T, bias, None, enable_lora, out)


def later_tiles(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    xa: Tensor,
    lora_B: Tensor,
    enable_lora: Sequence[bool],
    out: Tensor,
    tile: LinearTile,
    first_tile: int,
) -> None:
    """`forward` into those tiles of out, one at least, that are not before first_tile in the order of `place`."""
    _fused_linear(x, weight.T, xa, lora_B.T, bias, None, enable_lora, out, tile, first_tile)


def grad_input(
    dy: Tensor,
    weight: Tensor,
    dyb: Tensor,
    lora_A: Tensor,
    bits: Tensor | None,
    *,
    followed: bool = False,
) -> Tensor:
    """dx [M, K] of dy [M, N], weight [N, K], the panel dyb [M, R] and lora_A [R, K].

    followed: the next launch may begin while this one runs. It must not read dx, nor end before it, and what it writes
    must have been allocated before: memory freed since may still be read.
    """
    dx = dy.new_empty((len(dy), weight.shape[1]))
    return _fused_linear(dy, weight, dyb, lora_A, None, bits, (True,), dx, followed=followed)
