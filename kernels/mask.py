"""A mask on matrices: where(keep, x, 0), and where(keep, panel @ factor, 0) added to another in place."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accumulate import accumulate
from ._dropout import bit_ptrs, draw_tile, in_bits, kept, unpacked
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

BLOCK_M = 16
# Of a product, with more rows than that: each tile reads its columns of the factor again.
BLOCK_M_OF_MANY = 32
BLOCK_K = 128
RANK_STEP = 16


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    x, total = args["x_ptr"], args["total_ptr"]
    some = total if x is None else x
    masked = sum(matrix.numel() for matrix in (x, total) if matrix is not None)
    flops = masked + (0 if total is None else 2 * total.numel() * args["R"])
    tensors = (x, args["out_ptr"], args["bits_ptr"], args["panel_ptr"], args["factor_ptr"], total, total)
    return stated_work("mask", float(flops), *tensors, dtype=some.dtype)


@triton.jit(launch_metadata=_work, do_not_specialize=["M", "stride_bm", "threshold", "row_offset", "column_offset"])
def _mask_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K], or None
    out_ptr, stride_om, stride_ok,  # where(keep, x, 0), [M, K], or None
    panel_ptr, stride_pm, stride_pr,  # [M, R], or None
    factor_ptr, stride_fr, stride_fk,  # [R, K], or None
    total_ptr, stride_tm, stride_tk,  # gains where(keep, panel @ factor, 0), [M, K], or None
    bits_ptr, stride_bm,  # [M, cdiv(K, 8)]; drawn and stored if there is a seed, else read
    seed_ptr, threshold, row_offset, column_offset,
    M, K, R,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1).to(tl.int64) * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    byte_ptrs = bit_ptrs(bits_ptr, stride_bm, rows, first_column, BLOCK_K)
    in_bytes = in_bits(rows, first_column, M, K, BLOCK_K)
    if seed_ptr is not None:
        keep, bits = draw_tile(
            tl.load(seed_ptr), threshold, rows + row_offset, first_column + column_offset, BLOCK_M, BLOCK_K, ALIGNED
        )  # fmt: skip
        tl.store(byte_ptrs, bits, mask=in_bytes)
    else:
        keep = unpacked(tl.load(byte_ptrs, mask=in_bytes, other=0), BLOCK_M, BLOCK_K)
    if x_ptr is not None:
        x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk, mask=inside, other=0.0)
        out_ptrs = out_ptr + rows[:, None] * stride_om + columns[None, :] * stride_ok
        tl.store(out_ptrs, kept(keep, x), mask=inside)
    if panel_ptr is not None:
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in range(0, R, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R).to(tl.int64)
            panel_ptrs = panel_ptr + rows[:, None] * stride_pm + ranks[None, :] * stride_pr
            panel = tl.load(panel_ptrs, mask=(rows < M)[:, None] & (ranks[None, :] < R), other=0.0)
            factor_ptrs = factor_ptr + ranks[:, None] * stride_fr + columns[None, :] * stride_fk
            factor = tl.load(factor_ptrs, mask=(ranks[:, None] < R) & (columns < K)[None, :], other=0.0)
            acc = accumulate(panel, factor.to(panel.dtype), acc, PRECISION)
        total_ptrs = total_ptr + rows[:, None] * stride_tm + columns[None, :] * stride_tk
        total = tl.load(total_ptrs, mask=inside, other=0.0).to(tl.float32) + kept(keep, acc)
        tl.store(total_ptrs, total.to(total_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor | None,
    bits: Tensor,
    dropout: Dropout | None = None,
    panel: Tensor | None = None,
    factor: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor | None:
    some = total if x is None else x
    assert some is not None
    M, K = some.shape
    out = None if x is None else x.new_empty(x.shape)
    if M == 0 or K == 0:
        return out
    precision = "ieee" if panel is None else input_precision(some.dtype)
    tensors = {
        "x_ptr": x,
        "panel_ptr": panel,
        "factor_ptr": factor,
        "total_ptr": total,
        "bits_ptr": bits,
        "seed_ptr": None if dropout is None else dropout.seed,
    }

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        block_m = BLOCK_M if panel is None or M <= BLOCK_M_OF_MANY else BLOCK_M_OF_MANY
        return (cdiv(M, block_m), cdiv(K, BLOCK_K)), dict(
            **strides("xm xk", x),
            **strides("om ok", out),
            **strides("pm pr", panel),
            **strides("fr fk", factor),
            **strides("tm tk", total),
            M=M, K=K, R=0 if panel is None else panel.shape[1],
            BLOCK_M=block_m, BLOCK_K=BLOCK_K, BLOCK_R=RANK_STEP, PRECISION=precision,
            num_warps=4, enable_fp_fusion=True,
            **strides("bm", bits), **dropout_arguments(dropout),
        )  # fmt: skip

    launch(_mask_kernel, tensors, (precision, *dropout_facts(dropout)), arguments, {"out_ptr": out})
    return out


def drop(x: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """keep * x, [M, K], of a mask that is drawn here, and its bits [M, cdiv(K, 8)]."""
    M, K = x.shape
    bits = x.new_empty((M, cdiv(K, 8)), dtype=torch.uint8)
    dropped: Tensor = _launch(x, bits, dropout)  # type: ignore[assignment]
    return dropped, bits


def drop_again(x: Tensor, bits: Tensor) -> Tensor:
    """keep * x, [M, K]."""
    return _launch(x, bits)  # type: ignore[return-value]


def add_kept_(total: Tensor, panel: Tensor, factor: Tensor, bits: Tensor, x: Tensor | None) -> Tensor | None:
    """Adds keep * (panel [M, R] @ factor [R, K]) to total, in place and rounded once; the factor in panel's dtype.

    Returns keep * x, of the same launch, if there is x; x and total are [M, K].
    """
    return _launch(x, bits, None, panel, factor, total)
