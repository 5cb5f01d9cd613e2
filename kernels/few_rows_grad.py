"""Both of an adapter's gradients from few rows in one launch: da = dyb.T @ (keep * x) and db = dy.T @ xa.

A program owns BLOCK_I columns of x or of dy and reads all of their rows, which makes sense for two thousand at most:
with more, adapter_grad.py divides the rows too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accumulate import accumulate
from ._dropout import bit_ptrs, in_bits, unpacked
from .config import rank_block
from .launch import cdiv, input_precision, launch, stated_work, strides

# Rows of a step and stages of its loop: of the fewest rows, and of more.
FEWEST_ROWS, STEP_OF_FEWEST, STEP = 64, (32, 2), (64, 3)
BLOCK_I = 64


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    x, dy, dyb, xa, da, db = (args[f"{name}_ptr"] for name in ("x", "dy", "dyb", "xa", "da", "db"))
    some = x if xa is None else dy
    flops = 2.0 * args["M"] * sum(grad.numel() for grad in (da, db) if grad is not None)
    panel = None if x is None else dyb
    return stated_work("few_rows_grad", flops, x, dy, panel, xa, da, db, args["bits_ptr"], dtype=some.dtype)


@triton.jit
def _gradient(
    left_ptr, stride_lm, stride_li,  # [M, I]
    panel_ptr, stride_pm, stride_pr,  # [M, R]
    grad_ptr, stride_gi, stride_gr,  # [I, R]
    bits_ptr, stride_bm,  # [M, cdiv(I, 8)], or None
    tile,
    M, I, R,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_inner = tile.to(tl.int64) * BLOCK_I
    inner = first_inner + tl.arange(0, BLOCK_I)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_inner, in_ranks = (inner < I)[None, :], (ranks < R)[None, :]
    acc = tl.zeros((BLOCK_I, BLOCK_R), tl.float32)
    for start in range(0, M, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        in_rows = (rows < M)[:, None]
        left_ptrs = left_ptr + rows[:, None] * stride_lm + inner[None, :] * stride_li
        left = tl.load(left_ptrs, mask=in_rows & in_inner, other=0.0)
        if bits_ptr is not None:
            ptrs = bit_ptrs(bits_ptr, stride_bm, rows, first_inner, BLOCK_I)
            bits = tl.load(ptrs, mask=in_bits(rows, first_inner, M, I, BLOCK_I), other=0)
            left = tl.where(unpacked(bits, BLOCK_M, BLOCK_I), left, tl.zeros_like(left))
        panel_ptrs = panel_ptr + rows[:, None] * stride_pm + ranks[None, :] * stride_pr
        acc = accumulate(left.T, tl.load(panel_ptrs, mask=in_rows & in_ranks, other=0.0), acc, PRECISION)
    grad_ptrs = grad_ptr + inner[:, None] * stride_gi + ranks[None, :].to(tl.int64) * stride_gr
    tl.store(grad_ptrs, acc.to(grad_ptr.dtype.element_ty), mask=(inner < I)[:, None] & in_ranks)


@triton.jit(launch_metadata=_work, do_not_specialize=["M", "stride_bm"])
def _few_rows_grad_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K], or None
    dyb_ptr, stride_dm, stride_dr,  # [M, R]
    da_ptr, stride_ar, stride_ak,  # [R, K], where there is x
    bits_ptr, stride_bm,  # of the mask on x, [M, cdiv(K, 8)], or None
    dy_ptr, stride_ym, stride_yn,  # [M, N]
    xa_ptr, stride_xam, stride_xar,  # [M, R], or None
    db_ptr, stride_bn, stride_br,  # [N, R], where there is xa
    M, K, N, R,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, tiles_of_x = tl.program_id(0), 0
    if x_ptr is not None:
        tiles_of_x = tl.cdiv(K, BLOCK_I)
        if tile < tiles_of_x:
            _gradient(
                x_ptr, stride_xm, stride_xk, dyb_ptr, stride_dm, stride_dr, da_ptr, stride_ak, stride_ar,
                bits_ptr, stride_bm, tile, M, K, R, BLOCK_M, BLOCK_I, BLOCK_R, PRECISION,
            )  # fmt: skip
    # What is there is known when it is compiled, and which tile when it runs.
    if xa_ptr is not None:  # noqa: SIM102
        if tile >= tiles_of_x:
            _gradient(
                dy_ptr, stride_ym, stride_yn, xa_ptr, stride_xam, stride_xar, db_ptr, stride_bn, stride_br,
                None, 0, tile - tiles_of_x, M, N, R, BLOCK_M, BLOCK_I, BLOCK_R, PRECISION,
            )  # fmt: skip


def few_rows_grad(
    dy: Tensor, dyb: Tensor, x: Tensor | None, xa: Tensor | None, bits: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """da [R, K] where x [M, K] is given and db [N, R] where xa [M, R] is, in `dtype`; dy [M, N] and dyb [M, R].

    bits: of the mask on x, [M, cdiv(K, 8)]. dy, x and both panels are of one dtype.
    """
    (M, N), R = dy.shape, dyb.shape[1]
    K = 0 if x is None else x.shape[1]
    da = None if x is None else x.new_empty((R, K), dtype=dtype)
    db = None if xa is None else dy.new_empty((N, R), dtype=dtype)
    tiles = cdiv(K, BLOCK_I) + (0 if xa is None else cdiv(N, BLOCK_I))
    if tiles == 0 or R == 0:
        return da, db
    precision = input_precision(dy.dtype)

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        block_r, (block_m, num_stages) = rank_block(R), STEP_OF_FEWEST if M <= FEWEST_ROWS else STEP
        return (tiles, cdiv(R, block_r)), dict(
            **strides("xm xk", x),
            **strides("dm dr", dyb),
            **strides("ar ak", da),
            **strides("bm", bits),
            **strides("ym yn", dy),
            **strides("xam xar", xa),
            **strides("bn br", db),
            M=M, K=K, N=N, R=R,
            BLOCK_M=block_m, BLOCK_I=BLOCK_I, BLOCK_R=block_r, PRECISION=precision,
            num_warps=4, num_stages=num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    tensors = {"x_ptr": x, "dyb_ptr": dyb, "bits_ptr": bits, "dy_ptr": dy, "xa_ptr": xa}
    launch(_few_rows_grad_kernel, tensors, (precision, dtype), arguments, {"da_ptr": da, "db_ptr": db})
    return da, db
