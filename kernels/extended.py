"""A GEMM of many rows whose contraction goes on over the ranks: out = [left, panel] @ [right; factor] + bias.

One program computes one tile after another in a single loop over the steps of them all, so that the copy engine brings
the next tile's operands while a tile is stored. The ranks are steps like all others, with operands of their own, whose
edge the engine fills with zeros. They come last. With a mask they come first: it is applied to what they alone summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from ._accumulate import accumulate
from ._dropout import load_words, unpacked_in_pairs, word_of
from ._place import GROUP_M, place
from ._slices import enabled_before, slice_arguments
from .config import LinearTile, processors
from .launch import cdiv, describable, input_precision, launch, new_describable, stated_work, strides


def work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """What a profiler is told of a GEMM's launch, or of that of its later tiles."""
    left, right, panel, factor, out = (
        getattr(args[name], "base", args[name])
        for name in ("left_ptr", "right_ptr", "panel_ptr", "factor_ptr", "out_ptr")
    )
    share = 1 - args["first_tile"] / (cdiv(args["M"], args["BLOCK_M"]) * cdiv(args["J"], args["BLOCK_J"]))
    tensors = (left, right, panel, factor, args["bias_ptr"], args["bits_ptr"], out[: round(share * len(out))])
    flops = 2.0 * share * args["M"] * args["J"] * (args["I"] + args["R"])
    return stated_work("fused_linear", flops, *tensors, dtype=left.dtype)


@triton.jit
def _store(acc, bias_ptr, stride_bias, out_ptr, first_row, first_column, J, PIECES: tl.constexpr):
    """Adds the bias to acc [rows, columns], rounds once and stores, in so many pieces."""
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    if PIECES == 1:
        if bias_ptr is not None:
            columns = first_column.to(tl.int64) + tl.arange(0, COLUMNS)
            acc += tl.load(bias_ptr + columns * stride_bias, mask=columns < J, other=0.0).to(tl.float32)[None, :]
        out_ptr.store([first_row, first_column], acc.to(out_ptr.dtype))
    else:
        first, second = acc.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        _store(first, bias_ptr, stride_bias, out_ptr, first_row, first_column, J, PIECES // 2)
        _store(second, bias_ptr, stride_bias, out_ptr, first_row, first_column + COLUMNS // 2, J, PIECES // 2)


@triton.jit
def _words_of(
    tile,
    bits_ptr, stride_bm, WORD: tl.constexpr,  # [M, cdiv(J, 8)]
    M, J, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The bits of a tile's mask; of the last tile's, past it."""
    last = tl.cdiv(M, BLOCK_M) * tl.cdiv(J, BLOCK_J) - 1
    tile_m, tile_j = place(tl.minimum(tile, last), M, J, BLOCK_M, BLOCK_J, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return load_words(bits_ptr, stride_bm, rows, tile_j.to(tl.int64) * BLOCK_J, M, J, BLOCK_J, WORD)


@triton.jit(launch_metadata=work, do_not_specialize=["M", "STEPS", "first_tile"])
def _extended_kernel(
    left_ptr,  # a descriptor of [M, I]; with slices, of [1, M, I]
    right_ptr,  # a descriptor of [I, J], or of its transpose if TRANSPOSED
    panel_ptr,  # a descriptor of [M, R]; with slices, of [enabled, M, R]
    factor_ptr,  # a descriptor of [R, enabled * WIDTH], or of its transpose if TRANSPOSED
    bias_ptr, stride_bias,  # [J]
    out_ptr,  # a descriptor of [M, J]
    bits_ptr, stride_bm, WORD: tl.constexpr,  # [M, cdiv(J, 8)], or None
    M, J, I, R,  # R ranks in each slice
    STEPS, RANK_STEPS,  # of a tile: all, and those over the ranks
    first_tile,
    WIDTH, SLICES: tl.constexpr, ENABLED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr, GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    FOLLOWED: tl.constexpr,
):  # fmt: skip
    if FOLLOWED:
        gdc_launch_dependents()
    programs = tl.num_programs(0)
    first_tile += tl.program_id(0)
    tile, tile_m, tile_j = first_tile - programs, 0, 0
    step = STEPS - 1
    acc = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    if bits_ptr is not None:
        words = _words_of(first_tile, bits_ptr, stride_bm, WORD, M, J, BLOCK_M, BLOCK_J, GROUP_M)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(J, BLOCK_J)
    for _ in range(0, tl.cdiv(tiles - first_tile, programs) * STEPS):
        step = tl.where(step == STEPS - 1, 0, step + 1)
        if step == 0:
            tile += programs
            tile_m, tile_j = place(tile, M, J, BLOCK_M, BLOCK_J, GROUP_M)
        if bits_ptr is None:
            rank_step, start = step - (STEPS - RANK_STEPS), step * BLOCK_I
            over_ranks = rank_step >= 0
        else:
            rank_step, start = step, (step - RANK_STEPS) * BLOCK_I
            over_ranks = start < 0
        column, slice = tile_j * BLOCK_J, 0
        left_side, right_side = left_ptr, right_ptr
        if over_ranks:
            left_side, right_side = panel_ptr, factor_ptr
            start = rank_step * BLOCK_I
            if SLICES > 1:
                of_tile = column // WIDTH
                slice = enabled_before(of_tile, SLICES, ENABLED)
                column += (slice - of_tile) * WIDTH
                # Past the ranks there are zeros, on both sides.
                start += tl.where((ENABLED >> of_tile) % 2 == 0, RANK_STEPS * BLOCK_I, 0)
        if SLICES > 1:
            left = left_side.load([slice, tile_m * BLOCK_M, start]).reshape(BLOCK_M, BLOCK_I)
        else:
            left = left_side.load([tile_m * BLOCK_M, start])
        if TRANSPOSED:
            right = right_side.load([column, start]).T
        else:
            right = right_side.load([start, column])
        acc = accumulate(left, right, acc, PRECISION)
        if bits_ptr is None:
            if step == STEPS - 1:
                _store(acc, bias_ptr, stride_bias, out_ptr, tile_m * BLOCK_M, tile_j * BLOCK_J, J, PIECES)
                acc = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
        else:
            # One branch or the other: if both were tests of their own, the second would read what matrix instructions
            # still write (triton 3.6 and 3.7), and ptxas would serialise them all.
            if step == RANK_STEPS - 1:
                acc = tl.where(unpacked_in_pairs(words, BLOCK_M, BLOCK_J), acc, 0.0)
                words = _words_of(tile + programs, bits_ptr, stride_bm, WORD, M, J, BLOCK_M, BLOCK_J, GROUP_M)
            elif step == STEPS - 1:
                _store(acc, bias_ptr, stride_bias, out_ptr, tile_m * BLOCK_M, tile_j * BLOCK_J, J, PIECES)
                acc = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)


def takes(left: Tensor, right: Tensor, out: Tensor, slices: int, bits: Tensor | None, tile: LinearTile) -> bool:
    """Whether the copy engine can read and write these, and no tile lies in two slices."""
    stored = right if right.stride(1) == 1 else right.T
    return (
        tile.descriptors
        and (bits is None or tile.extends_masked)
        and left.shape[1] > 0
        and describable(left)
        and describable(stored)
        and describable(out)
        and (slices == 1 or out.shape[1] // slices % tile.block_j == 0)
    )


def _readable(operand: Tensor, like: Tensor) -> Tensor:
    """The same [rows, columns], or [rows, slices, columns], where the copy engine can read them, in like's dtype."""
    matrices = [operand] if operand.dim() == 2 else [operand[0], operand[:, 0]]
    if operand.dtype == like.dtype and all(map(describable, matrices)):
        return operand
    return new_describable(operand.shape, like.dtype, like).copy_(operand)


def block_of_right(tile: LinearTile, transposed: bool) -> list[int]:
    """The piece of right [I, J], or of its transpose, that the copy engine reads at once."""
    return [tile.block_j, tile.block_i] if transposed else [tile.block_i, tile.block_j]


def extended(
    left: Tensor,
    right: Tensor,
    panel: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    bits: Tensor | None,
    enable_lora: Sequence[bool],
    out: Tensor,
    tile: LinearTile,
    first_tile: int,
    followed: bool,
) -> None:
    """Computes out [M, J] from its first_tile on, in the order of `place`, of what `takes` holds for.

    A panel or a factor [R, enabled * width] that the copy engine cannot read as it lies is copied first. followed: as
    for fused_linear.py's `grad_input`.
    """
    (M, I), J, R, slices = left.shape, right.shape[1], len(factor), len(enable_lora)
    transposed = right.stride(1) != 1
    if transposed:
        right, factor = right.T, factor.T
    left_block, left_view = [tile.block_m, tile.block_i], left
    if slices > 1:
        left_block, left_view, panel = [1, *left_block], left.unsqueeze(0), panel.unflatten(1, (-1, R))
    panel, factor = _readable(panel, left), _readable(factor, left)
    panel_view = panel.transpose(0, 1) if slices > 1 else panel
    right_block = block_of_right(tile, transposed)
    # Halves take less time; with a mask, quarters leave shared memory for the gradient that runs beside this.
    pieces = 2 if bits is None else 4
    described = {
        "left_ptr": (left_view, left_block),
        "right_ptr": (right, right_block),
        "panel_ptr": (panel_view, left_block),
        "factor_ptr": (factor, right_block),
        "out_ptr": (out, [tile.block_m, tile.block_j // pieces]),
    }

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        rank_steps = cdiv(R, tile.block_i)
        tiles = cdiv(M, tile.block_m) * cdiv(J, tile.block_j) - first_tile
        return (min(tiles, processors(left.device)),), dict(
            **strides("bias", bias),
            **strides("bm", bits), WORD=word_of(bits, tile.block_j),
            M=M, J=J, I=I, R=R, STEPS=cdiv(I, tile.block_i) + rank_steps, RANK_STEPS=rank_steps, first_tile=first_tile,
            WIDTH=J // slices, **slice_arguments(enable_lora),
            BLOCK_M=tile.block_m, BLOCK_J=tile.block_j, BLOCK_I=tile.block_i, GROUP_M=GROUP_M,
            TRANSPOSED=transposed, PIECES=pieces, PRECISION=input_precision(left.dtype),
            FOLLOWED=followed, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    tensors = dict(left_ptr=left, right_ptr=right, panel_ptr=panel, factor_ptr=factor, bias_ptr=bias, bits_ptr=bits)
    facts = (tile, transposed, first_tile, followed, input_precision(left.dtype), *enable_lora)
    launch(_extended_kernel, tensors, facts, arguments, {"out_ptr": out}, described)
