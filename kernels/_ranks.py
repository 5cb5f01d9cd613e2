"""The operands of a low-rank product, BLOCK_R ranks at a time: panel [rows, R] and factor [R, columns]."""

from __future__ import annotations

import triton
import triton.language as tl

from ._slices import enabled_slice


@triton.jit
def operands(
    step, first, last, rows, columns,
    panel_ptr, stride_pm, stride_pr,  # [M, enabled * R]
    factor_ptr, stride_fr, stride_fj,  # [R, enabled * WIDTH]
    M, R,  # R ranks in each slice
    WIDTH, SLICES: tl.constexpr, ENABLED: tl.constexpr, BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr,
):  # fmt: skip
    """panel [rows, BLOCK_R] and factor [BLOCK_R, columns] of a step; RANK_STEPS for each slice from first to last.

    Zeros past the ranks, and in columns of other slices.
    """
    e = first + step // RANK_STEPS
    slice = enabled_slice(e, SLICES, ENABLED)
    ranks = step % RANK_STEPS * BLOCK_R + tl.arange(0, BLOCK_R)
    in_ranks = ranks < tl.where(e < last, R, 0)
    panel_ptrs = panel_ptr + e * R * stride_pr + rows[:, None] * stride_pm + ranks[None, :] * stride_pr
    panel = tl.load(panel_ptrs, mask=(rows[:, None] < M) & in_ranks[None, :], other=0.0)
    in_slice = (columns >= slice * WIDTH) & (columns < (slice + 1) * WIDTH)
    factor_ptrs = factor_ptr + (e - slice).to(tl.int64) * WIDTH * stride_fj
    factor_ptrs += ranks[:, None].to(tl.int64) * stride_fr + columns[None, :] * stride_fj
    factor = tl.load(factor_ptrs, mask=in_ranks[:, None] & in_slice[None, :], other=0.0)
    return panel, factor.to(panel.dtype)
