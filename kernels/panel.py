"""A panel: panel = scale * (keep * left) @ factor, [M, R], from one read of left, which also draws the mask's bits.

xa   left x [M, K],  factor a.T [K, R], scale scaling / q, with the mask
dyb  left dy [M, N], factor b [N, R],   scale scaling,     without; for each enabled slice, from its columns of dy
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accumulate import accumulate
from ._dropout import bit_ptrs, draw_tile, kept
from ._slices import enabled_columns, enabled_slice, slice_arguments
from .config import rank_block
from .launch import (
    Dropout,
    cdiv,
    dropout_arguments,
    dropout_facts,
    input_precision,
    launch,
    stated_work,
    strides,
)
from .lookup import tiles_for


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    left, factor, panel = args["left_ptr"], args["factor_ptr"], args["panel_ptr"]
    flops = 2.0 * panel.numel() * args["I"]
    return stated_work("panel", flops, enabled_columns(left, args), factor, panel, args["bits_ptr"], dtype=left.dtype)


@triton.jit(launch_metadata=_work, do_not_specialize=["M", "stride_bm", "threshold", "row_offset", "column_offset"])
def _panel_kernel(
    left_ptr, stride_lm, stride_li,  # [M, SLICES * I]
    factor_ptr, stride_fi, stride_fr,  # [enabled * I, R]
    panel_ptr, stride_pm, stride_pr,  # [M, enabled * R]
    bits_ptr, stride_bm,  # [M, cdiv(I, 8)], or None
    seed_ptr, threshold, row_offset, column_offset,
    scale,
    M, I, R,
    SLICES: tl.constexpr, ENABLED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_I: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank_block = tl.program_id(1)
    if SLICES > 1:
        e = rank_block // tl.cdiv(R, BLOCK_R)
        rank_block = rank_block % tl.cdiv(R, BLOCK_R)
        left_ptr += enabled_slice(e, SLICES, ENABLED).to(tl.int64) * I * stride_li
        factor_ptr += e.to(tl.int64) * I * stride_fi
        panel_ptr += e * R * stride_pr
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    # Rows past M are the last row again, which needs no mask.
    real_rows = tl.minimum(rows, M - 1)
    left_row_ptrs = left_ptr + real_rows[:, None] * stride_lm
    factor_column_ptrs = factor_ptr + ranks[None, :].to(tl.int64) * stride_fr
    first_column = tl.full((), 0, tl.int64) + column_offset
    if seed_ptr is not None:
        # In the loop, it would be read in each step, and what follows from it alone computed.
        seed = tl.load(seed_ptr)
        # The first piece of the ranks stores the bits for all of them.
        stored = rows < tl.where(tl.program_id(1) == 0, M, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, I, BLOCK_I):
        inner = start + tl.arange(0, BLOCK_I).to(tl.int64)
        if EVEN_I:
            left = tl.load(left_row_ptrs + inner[None, :] * stride_li)
        else:
            left = tl.load(left_row_ptrs + inner[None, :] * stride_li, mask=inner[None, :] < I, other=0.0)
        in_factor = (inner[:, None] < I) & (ranks[None, :] < R)
        factor = tl.load(factor_column_ptrs + inner[:, None] * stride_fi, mask=in_factor, other=0.0)
        if seed_ptr is not None:
            keep, bits = draw_tile(
                seed, threshold, real_rows + row_offset, first_column + start, BLOCK_M, BLOCK_I, ALIGNED
            )  # fmt: skip
            in_columns = start + 8 * tl.arange(0, BLOCK_I // 8) < I
            ptrs = bit_ptrs(bits_ptr, stride_bm, rows, start, BLOCK_I)
            tl.store(ptrs, bits, mask=stored[:, None] & in_columns[None, :])
            left = kept(keep, left)
        acc = accumulate(left, factor.to(left.dtype), acc, PRECISION)
    panel_ptrs = panel_ptr + rows[:, None] * stride_pm + ranks[None, :] * stride_pr
    in_panel = (rows[:, None] < M) & (ranks[None, :] < R)
    tl.store(panel_ptrs, (acc * scale).to(panel_ptr.dtype.element_ty), mask=in_panel)


def panel(
    left: Tensor,
    factor: Tensor,
    scale: float,
    dropout: Dropout | None = None,
    enable_lora: Sequence[bool] = (True,),
) -> tuple[Tensor, Tensor | None]:
    """The panel [M, R] in left's dtype, of left [M, I] and factor [I, R], and the bits of the mask, [M, cdiv(I, 8)].

    With dropout, 1/q is applied beside scale; without, there are no bits. With slices: each enabled one's R columns,
    from its own columns of left and its own rows of factor.
    """
    M, I, R, enabled = len(left), left.shape[1] // len(enable_lora), factor.shape[1], sum(enable_lora)
    out = left.new_empty((M, enabled * R))
    bits = None if dropout is None else left.new_empty((M, cdiv(I, 8)), dtype=torch.uint8)
    if M == 0:
        return out, bits
    block_r, aligned = rank_block(R), dropout is None or dropout.column_offset % 8 == 0
    tiles = tiles_for(left.device, left.dtype, I, aligned=aligned)
    tile = (tiles.panel if dropout is None else tiles.drawn_panel)[block_r]
    precision, seed = input_precision(left.dtype), None if dropout is None else dropout.seed
    if dropout is not None:
        scale /= dropout.keep_probability

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        return (cdiv(M, tile.block_m), enabled * cdiv(R, block_r)), dict(
            **strides("lm li", left),
            **strides("fi fr", factor),
            **strides("pm pr", out),
            scale=scale,
            M=M, I=I, R=R, **slice_arguments(enable_lora),
            BLOCK_M=tile.block_m, BLOCK_I=tile.block_i, BLOCK_R=block_r,
            EVEN_I=I % tile.block_i == 0, PRECISION=precision,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            **strides("bm", bits), **dropout_arguments(dropout),
        )  # fmt: skip

    facts = (tile, precision, scale, *enable_lora, *dropout_facts(dropout))
    tensors = {"left_ptr": left, "factor_ptr": factor, "seed_ptr": seed}
    launch(_panel_kernel, tensors, facts, arguments, {"panel_ptr": out, "bits_ptr": bits})
    return out, bits
