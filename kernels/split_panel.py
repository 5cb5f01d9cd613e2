"""A panel brought by the copy engine: panel = scale * (keep * left) @ factor, [M, R], for any rows and ranks.

Where its tiles would leave multiprocessors idle the contraction is divided, and the last program of a tile to arrive
adds the parts up in a fixed order. With a mask, whose bits it draws and stores, programs are two warps of many elements
each, since a warp that draws waits for itself most of the time. panel.py is for all that this cannot read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accumulate import accumulate
from ._dropout import bit_ptrs, draw_tile, kept
from .config import capability, processors, rank_block
from .flags import flags_for
from .launch import Dropout, cdiv, describable, dropout_arguments, dropout_facts, launch, stated_work, strides
from .lookup import tiles_for


@dataclass(frozen=True)
class SplitPanelTile:
    """Rows and at most so many ranks of the panel that one program computes, and the step of the contraction.

    at_once: how many programs a multiprocessor has room for. step, step_of_rank: what a step takes, in microseconds.
    Both of tiles without a mask.
    """

    block_m: int
    most_ranks: int
    block_i: int
    num_warps: int
    num_stages: int
    at_once: int = 1
    step: float = 1.0
    step_of_rank: float = 0.0

    def block_r(self, ranks: int) -> int:
        return min(rank_block(ranks), self.most_ranks)


# Of many rows, and of few, which would leave the first to too few programs.
_TILES = (
    SplitPanelTile(64, 128, 64, num_warps=4, num_stages=6, at_once=1, step=0.14, step_of_rank=0.0002),
    SplitPanelTile(32, 64, 64, num_warps=4, num_stages=6, at_once=3, step=0.16, step_of_rank=0.0018),
)
_INTERPRETED = (SplitPanelTile(16, 64, 16, num_warps=4, num_stages=1),)
# With a mask: of few rows or many ranks, and of many rows, for at most so many ranks.
_DRAWN = SplitPanelTile(32, 128, 128, num_warps=4, num_stages=3)
_DRAWN_OF_MANY = {
    32: SplitPanelTile(32, 32, 128, num_warps=2, num_stages=3),
    64: SplitPanelTile(32, 64, 64, num_warps=2, num_stages=4),
}
_DRAWN_INTERPRETED = SplitPanelTile(16, 128, 32, num_warps=4, num_stages=1)
# More are more than one piece, of which each would draw the mask again.
_MOST_DRAWN_RANKS = 128
_COMPILED_FOR = (90, 100)
# Rows are counted in 32 bits.
_MOST_ROWS = 2**31 - 64
# Into how many parts a contraction may be divided; each is a kernel of its own.
_SPLITS = (1, 2, 4, 8, 16)


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    left, factor = (getattr(args[name], "base", args[name]) for name in ("left_ptr", "factor_ptr"))
    panel = args["panel_ptr"]
    flops = 2.0 * panel.numel() * args["I"]
    return stated_work("split_panel", flops, left, factor, panel, args["bits_ptr"], dtype=left.dtype)


@triton.jit(launch_metadata=_work, do_not_specialize=["M", "stride_bm", "threshold", "row_offset", "column_offset"])
def _split_panel_kernel(
    left_ptr,  # a descriptor of [M, I]
    factor_ptr,  # a descriptor of [I, R], or of its transpose if TRANSPOSED
    panel_ptr, stride_pm, stride_pr,  # [M, R]
    bits_ptr, stride_bm,  # [M, cdiv(I, 8)], or None
    seed_ptr, threshold, row_offset, column_offset,
    parts_ptr,  # [tiles of the panel, SPLITS, BLOCK_M, BLOCK_R] float32, or None if SPLITS is 1
    arrived_ptr,  # how many parts of each tile are there, zero before and after; or None
    scale,
    M, I, R,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
    TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    tile_m, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    first_row, first_rank = tile_m * BLOCK_M, tl.program_id(1) * BLOCK_R
    steps = tl.cdiv(tl.cdiv(I, BLOCK_I), SPLITS)
    first = split * steps * BLOCK_I
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    if seed_ptr is not None:
        # In the loop, it would be read in each step, and what follows from it alone computed.
        seed = tl.load(seed_ptr)
        # In 32 bits: every row of every step is compared.
        stored = tl.arange(0, BLOCK_M) < tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, tl.minimum(first + steps * BLOCK_I, I), BLOCK_I):
        left = left_ptr.load([first_row, start])
        if TRANSPOSED:
            factor = factor_ptr.load([first_rank, start]).T
        else:
            factor = factor_ptr.load([start, first_rank])
        if seed_ptr is not None:
            first_column = tl.full((), 0, tl.int64) + column_offset + start
            keep, bits = draw_tile(seed, threshold, rows + row_offset, first_column, BLOCK_M, BLOCK_I, ALIGNED)
            in_columns = start + 8 * tl.arange(0, BLOCK_I // 8) < I
            ptrs = bit_ptrs(bits_ptr, stride_bm, rows, start, BLOCK_I)
            tl.store(ptrs, bits, mask=stored[:, None] & in_columns[None, :])
            left = kept(keep, left)
        acc = accumulate(left, factor, acc, "ieee")
    arrivals = tl.full((), SPLITS - 1, tl.int32)
    if SPLITS > 1:
        tile = tl.program_id(1) * tl.cdiv(M, BLOCK_M) + tile_m
        places = tl.arange(0, BLOCK_M)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        part_ptrs = parts_ptr + tile.to(tl.int64) * (SPLITS * BLOCK_M * BLOCK_R) + places
        tl.store(part_ptrs + split * (BLOCK_M * BLOCK_R), acc)
        tl.debug_barrier()
        arrivals = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
        if arrivals == SPLITS - 1:
            acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for s in tl.static_range(SPLITS):
                acc += tl.load(part_ptrs + s * (BLOCK_M * BLOCK_R), cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
    if arrivals == SPLITS - 1:
        ranks = first_rank + tl.arange(0, BLOCK_R)
        panel_ptrs = panel_ptr + rows[:, None] * stride_pm + ranks[None, :] * stride_pr
        in_panel = (rows[:, None] < M) & (ranks[None, :] < R)
        tl.store(panel_ptrs, (acc * scale).to(panel_ptr.dtype.element_ty), mask=in_panel)


def _tiles_for(device: torch.device) -> tuple[SplitPanelTile, ...]:
    return _TILES if device.type == "cuda" else _INTERPRETED


@lru_cache(maxsize=1024)
def layout_of(device: torch.device, M: int, I: int, R: int) -> tuple[SplitPanelTile, int]:
    """The tile and into how many parts the contraction is divided, of 16-bit numbers, for the least time.

    A model of an H200, fitted to 128 to 8192 rows, 4096 and 14336 columns, and ranks of 8 and 128: a step takes its
    latency, or what all programs of a wave read in it at nine terabytes a second; adding up parts depends on their size
    and their number.
    """

    def microseconds(layout: tuple[SplitPanelTile, int]) -> float:
        tile, splits = layout
        block_r = tile.block_r(R)
        programs = cdiv(M, tile.block_m) * cdiv(R, block_r) * splits
        waves = cdiv(programs, tile.at_once * processors(device))
        read = programs / waves * 2 * (tile.block_m + block_r) * tile.block_i / 9e6
        steps = waves * cdiv(cdiv(I, tile.block_i), splits) * max(tile.step + block_r * tile.step_of_rank, read)
        part = 4 * tile.block_m * block_r / 1024
        return steps if splits == 1 else steps + 0.6 + 0.044 * part + splits * (0.08 + 0.021 * part)

    return min(product(_tiles_for(device), _SPLITS), key=microseconds)


@lru_cache(maxsize=1024)
def drawn_layout_of(device: torch.device, M: int, I: int, R: int) -> tuple[SplitPanelTile, int]:
    """The same of a panel with a mask: the tile, and parts for four programs on a multiprocessor, or two large ones.

    Measured on an H200 for 128 to 8192 rows, 4096 and 14336 columns, ranks of 16, 64 and 128.
    """
    tile = _DRAWN if device.type == "cuda" else _DRAWN_INTERPRETED
    if device.type == "cuda" and 2 * cdiv(M, tile.block_m) > processors(device):
        tile = next((of_many for most, of_many in _DRAWN_OF_MANY.items() if most >= R), tile)
    at_once, most = (4, 16) if R <= 32 or tile.num_warps == 2 else (2, 8)
    most = min(most, at_once * processors(device) // cdiv(M, tile.block_m), cdiv(I, tile.block_i))
    return tile, max(splits for splits in _SPLITS if splits <= max(1, most))


def takes(left: Tensor, factor: Tensor, dropout: Dropout | None = None) -> bool:
    """Whether the copy engine can read both, left [M, I] and factor [I, R], and a mask's bytes are drawn once."""
    if dropout is not None and (dropout.column_offset % 8 != 0 or factor.shape[1] > _MOST_DRAWN_RANKS):
        return False
    return (
        left.numel() * factor.numel() > 0
        and left.dtype == factor.dtype
        # The tables that a tuner makes say nothing of the shared memory that these tiles need.
        and (not left.is_cuda or capability(left.device) in _COMPILED_FOR)
        and len(left) <= _MOST_ROWS
        and left.dtype.itemsize == 2
        and left.shape[1] % 16 == 0
        and tiles_for(left.device, left.dtype, left.shape[1]).linear.descriptors
        and describable(left)
        and describable(factor if factor.stride(1) == 1 else factor.T)
    )


def split_panel(
    left: Tensor, factor: Tensor, scale: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor | None]:
    """The panel [M, R] in left's dtype, of left [M, I] and factor [I, R], and the bits of the mask, [M, cdiv(I, 8)].

    For what `takes` holds for. With dropout, 1/q is applied beside scale; without, there are no bits.
    """
    (M, I), R = left.shape, factor.shape[1]
    tile, splits = (layout_of if dropout is None else drawn_layout_of)(left.device, M, I, R)
    bits = None if dropout is None else left.new_empty((M, cdiv(I, 8)), dtype=torch.uint8)
    if dropout is not None:
        scale /= dropout.keep_probability
    transposed = factor.stride(1) != 1
    stored = factor.T if transposed else factor
    block_r = tile.block_r(R)
    tiles = cdiv(M, tile.block_m) * cdiv(R, block_r)
    out, parts, arrived = left.new_empty((M, R)), None, None
    if splits > 1:
        parts = left.new_empty((tiles, splits, tile.block_m, block_r), dtype=torch.float32)
        arrived = flags_for(left, tiles)

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        return (cdiv(M, tile.block_m) * splits, cdiv(R, block_r)), dict(
            **strides("pm pr", out),
            scale=scale, M=M, I=I, R=R,
            SPLITS=splits, BLOCK_M=tile.block_m, BLOCK_I=tile.block_i, BLOCK_R=block_r,
            TRANSPOSED=transposed, **strides("bm", bits), **dropout_arguments(dropout),
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    described = {
        "left_ptr": (left, [tile.block_m, tile.block_i]),
        "factor_ptr": (stored, [block_r, tile.block_i] if transposed else [tile.block_i, block_r]),
    }
    made = {"panel_ptr": out, "bits_ptr": bits, "parts_ptr": parts, "arrived_ptr": arrived}
    seed = None if dropout is None else dropout.seed
    tensors: dict[str, Tensor | None] = {"left_ptr": left, "factor_ptr": stored, "seed_ptr": seed}
    facts = (tile, transposed, splits, scale, *dropout_facts(dropout))
    launch(_split_panel_kernel, tensors, facts, arguments, made, described)
    return out, bits
