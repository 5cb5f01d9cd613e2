"""A panel without a mask, brought by the copy engine: panel = scale * left @ factor, [M, R], for any rows and ranks.

Where its tiles would leave multiprocessors idle the contraction is divided, and the last program of a tile to arrive
adds the parts up in a fixed order. panel.py draws masks, and takes all that this cannot read.
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
from .config import capability, processors, rank_block
from .flags import flags_for
from .launch import cdiv, describable, launch, stated_work, strides
from .lookup import tiles_for


@dataclass(frozen=True)
class PlainPanelTile:
    """Rows and at most so many ranks of the panel that one program computes, and the step of the contraction.

    at_once: how many programs a multiprocessor has room for. step, step_of_rank: what a step takes, in microseconds.
    """

    block_m: int
    most_ranks: int
    block_i: int
    num_warps: int
    num_stages: int
    at_once: int
    step: float
    step_of_rank: float

    def block_r(self, ranks: int) -> int:
        return min(rank_block(ranks), self.most_ranks)


# Of many rows, and of few, which would leave the first to too few programs.
_TILES = (
    PlainPanelTile(64, 128, 64, num_warps=4, num_stages=6, at_once=1, step=0.14, step_of_rank=0.0002),
    PlainPanelTile(32, 64, 64, num_warps=4, num_stages=6, at_once=3, step=0.16, step_of_rank=0.0018),
)
_INTERPRETED = (PlainPanelTile(16, 64, 16, num_warps=4, num_stages=1, at_once=1, step=1.0, step_of_rank=0.0),)
_COMPILED_FOR = (90, 100)
# Rows are counted in 32 bits.
_MOST_ROWS = 2**31 - 64
# Into how many parts a contraction may be divided; each is a kernel of its own.
_SPLITS = (1, 2, 4, 8, 16)


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    left, factor = (getattr(args[name], "base", args[name]) for name in ("left_ptr", "factor_ptr"))
    panel = args["panel_ptr"]
    return stated_work("plain_panel", 2.0 * panel.numel() * args["I"], left, factor, panel, dtype=left.dtype)


@triton.jit(launch_metadata=_work, do_not_specialize=["M"])
def _plain_panel_kernel(
    left_ptr,  # a descriptor of [M, I]
    factor_ptr,  # a descriptor of [I, R], or of its transpose if TRANSPOSED
    panel_ptr, stride_pm, stride_pr,  # [M, R]
    parts_ptr,  # [tiles of the panel, SPLITS, BLOCK_M, BLOCK_R] float32, or None if SPLITS is 1
    arrived_ptr,  # how many parts of each tile are there, zero before and after; or None
    scale,
    M, I, R,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    tile_m, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    first_row, first_rank = tile_m * BLOCK_M, tl.program_id(1) * BLOCK_R
    steps = tl.cdiv(tl.cdiv(I, BLOCK_I), SPLITS)
    first = split * steps * BLOCK_I
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, tl.minimum(first + steps * BLOCK_I, I), BLOCK_I):
        left = left_ptr.load([first_row, start])
        if TRANSPOSED:
            factor = factor_ptr.load([first_rank, start]).T
        else:
            factor = factor_ptr.load([start, first_rank])
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
        rows, ranks = first_row.to(tl.int64) + tl.arange(0, BLOCK_M), first_rank + tl.arange(0, BLOCK_R)
        panel_ptrs = panel_ptr + rows[:, None] * stride_pm + ranks[None, :] * stride_pr
        in_panel = (rows[:, None] < M) & (ranks[None, :] < R)
        tl.store(panel_ptrs, (acc * scale).to(panel_ptr.dtype.element_ty), mask=in_panel)


def _tiles_for(device: torch.device) -> tuple[PlainPanelTile, ...]:
    return _TILES if device.type == "cuda" else _INTERPRETED


@lru_cache(maxsize=1024)
def layout_of(device: torch.device, M: int, I: int, R: int) -> tuple[PlainPanelTile, int]:
    """The tile and into how many parts the contraction is divided, of 16-bit numbers, for the least time.

    A model of an H200, fitted to 128 to 8192 rows, 4096 and 14336 columns, and ranks of 8 and 128: a step takes its
    latency, or what all programs of a wave read in it at nine terabytes a second; adding up parts depends on their size
    and their number.
    """

    def microseconds(layout: tuple[PlainPanelTile, int]) -> float:
        tile, splits = layout
        block_r = tile.block_r(R)
        programs = cdiv(M, tile.block_m) * cdiv(R, block_r) * splits
        waves = cdiv(programs, tile.at_once * processors(device))
        read = programs / waves * 2 * (tile.block_m + block_r) * tile.block_i / 9e6
        steps = waves * cdiv(cdiv(I, tile.block_i), splits) * max(tile.step + block_r * tile.step_of_rank, read)
        part = 4 * tile.block_m * block_r / 1024
        return steps if splits == 1 else steps + 0.6 + 0.044 * part + splits * (0.08 + 0.021 * part)

    return min(product(_tiles_for(device), _SPLITS), key=microseconds)


def takes(left: Tensor, factor: Tensor) -> bool:
    """Whether the copy engine can read both, left [M, I] and factor [I, R]."""
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


def plain_panel(left: Tensor, factor: Tensor, scale: float) -> Tensor:
    """The panel [M, R] in left's dtype, of left [M, I] and factor [I, R], for which `takes` holds."""
    (M, I), R = left.shape, factor.shape[1]
    tile, splits = layout_of(left.device, M, I, R)
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
            TRANSPOSED=transposed,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    described = {
        "left_ptr": (left, [tile.block_m, tile.block_i]),
        "factor_ptr": (stored, [block_r, tile.block_i] if transposed else [tile.block_i, block_r]),
    }
    made = {"panel_ptr": out, "parts_ptr": parts, "arrived_ptr": arrived}
    tensors: dict[str, Tensor | None] = {"left_ptr": left, "factor_ptr": stored}
    launch(_plain_panel_kernel, tensors, (tile, transposed, splits, scale), arguments, made, described)
    return out
