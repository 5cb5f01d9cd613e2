"""The operands of a low-rank product, BLOCK_R ranks at a time: panel [rows, R] and factor [R, columns]."""

from __future__ import annotations

import triton
import triton.language as tl

from ._accumulate import accumulate


@triton.jit
def load_panel(panel_ptr, stride_pm, stride_pr, rows, start, M, R, BLOCK_R: tl.constexpr):
    ranks = start + tl.arange(0, BLOCK_R)
    ptrs = panel_ptr + rows[:, None] * stride_pm + ranks[None, :] * stride_pr
    return tl.load(ptrs, mask=(rows[:, None] < M) & (ranks[None, :] < R), other=0.0)


@triton.jit
def load_factor(
    factor_ptr, stride_fr, stride_fj, columns, start, first_column, last_column, R,
    BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    ranks = start + tl.arange(0, BLOCK_R)
    ptrs = factor_ptr + ranks[:, None].to(tl.int64) * stride_fr + columns[None, :] * stride_fj
    in_columns = columns < last_column
    if first_column is not None:
        in_columns = in_columns & (columns >= first_column)
    return tl.load(ptrs, mask=(ranks[:, None] < R) & in_columns[None, :], other=0.0).to(DTYPE)


@triton.jit
def add_ranks(
    acc,
    panel_ptr, stride_pm, stride_pr,
    factor_ptr, stride_fr, stride_fj,
    rows, columns, start,
    M, first_column, last_column, R,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + panel @ factor at the given rows and those of the columns from first to last, over BLOCK_R ranks."""
    panel = load_panel(panel_ptr, stride_pm, stride_pr, rows, start, M, R, BLOCK_R)
    factor = load_factor(
        factor_ptr, stride_fr, stride_fj, columns, start, first_column, last_column, R, BLOCK_R, panel.dtype
    )
    return accumulate(panel, factor, acc, PRECISION)
