"""dx and da of a layer without a mask in one launch: dx = dy @ w + dyb @ a, da = dyb.T @ x.

One program on each multiprocessor computes tiles of dx, one after another. Where their number is no multiple of the
programs, some have none left while others compute the last ones; they then read x for da. A mask takes too much
arithmetic for that: with one, adapter_grad.py is faster.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accumulate import accumulate
from .adapter_grad import load_rows
from .config import LinearTile, processors, rank_block
from .fused_linear import GROUP_M, RANK_STEP, compute_tile, describable
from .launch import cdiv, input_precision, launch, stated_work, strides
from .lookup import tiles_for
from .reduce import reduce

# Steps over the rows of x that are read ahead; in shared memory that the tiles of dx need no more.
STAGES = 5


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    dy, weight, dx = (getattr(args[name], "base", args[name]) for name in ("dy_ptr", "weight_ptr", "dx_ptr"))
    x, dyb, lora_A, grad = args["x_ptr"], args["dyb_ptr"], args["lora_A_ptr"], args["grad_ptr"]
    flops = 2.0 * x.numel() * (args["N"] + 2 * args["R"])
    return stated_work("dx_and_da", flops, dy, weight, dx, x, dyb, lora_A, grad, dtype=dy.dtype)


@triton.jit(launch_metadata=_work, do_not_specialize=["M", "ROWS"])
def _dx_and_da_kernel(
    dy_ptr,  # a descriptor of [M, N]
    weight_ptr,  # a descriptor of [N, K], or of its transpose if TRANSPOSED
    dyb_ptr, stride_dm, stride_dr,  # [M, R]
    lora_A_ptr, stride_ar, stride_ak,  # [R, K]
    dx_ptr,  # a descriptor of [M, K]
    x_ptr, stride_xm, stride_xk,  # [M, K]
    grad_ptr, stride_gs, stride_gr, stride_gk,  # [splits, R, K], in the gradient's dtype if that is the whole
    M, K, N, R,
    ROWS,  # rows per split, a multiple of ROW_STEP
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROW_STEP: tl.constexpr, COLUMNS: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_K)
    programs = tl.num_programs(0)
    for tile in range(tl.program_id(0), tiles, programs):
        compute_tile(
            tile,
            dy_ptr, 0, 0,
            weight_ptr, 0, 0,
            dyb_ptr, stride_dm, stride_dr,
            lora_A_ptr, stride_ar, stride_ak,
            None, 0,
            dx_ptr, 0, 0,
            None, 0, tl.uint8,
            M, K, N, R, K, 1, 1,
            BLOCK_M, BLOCK_K, BLOCK_N, BLOCK_R, 1, 1, GROUP_M, False,
            True, True, TRANSPOSED, False, False, PRECISION,
        )  # fmt: skip
    # The tasks of da go on where the tiles ended, in turn from program to program.
    column_tiles = tl.cdiv(K, COLUMNS)
    ranks = tl.arange(0, BLOCK_R)
    first_task = (tl.program_id(0) + programs - tiles % programs) % programs
    for task in range(first_task, column_tiles * tl.cdiv(M, ROWS), programs):
        columns = (task % column_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        split = (task // column_tiles).to(tl.int64)
        acc = tl.zeros((COLUMNS, BLOCK_R), tl.float32)
        for start in tl.range(split * ROWS, tl.minimum((split + 1) * ROWS, M), ROW_STEP, num_stages=STAGES):
            x, dyb = load_rows(
                x_ptr, stride_xm, stride_xk,
                dyb_ptr, stride_dm, stride_dr,
                start, columns, ranks, M, K, R, ROW_STEP, EVEN_K,
            )  # fmt: skip
            acc = accumulate(x.T, dyb, acc, PRECISION)
        grad_ptrs = (
            grad_ptr + split * stride_gs + columns[:, None] * stride_gk + ranks[None, :].to(tl.int64) * stride_gr
        )
        tl.store(grad_ptrs, acc.to(grad_ptr.dtype.element_ty), mask=(columns < K)[:, None] & (ranks < R)[None, :])


def takes(dy: Tensor, weight: Tensor, x: Tensor, r: int) -> bool:
    """Whether the kernel can read these, and whether its programs have several tiles of dx each."""
    (M, N), K = dy.shape, weight.shape[1]
    tile = tiles_for(dy.device, dy.dtype, N, K).linear
    return (
        tile.descriptors
        and 0 < r <= RANK_STEP
        and N > 0
        and x.dtype == dy.dtype
        and cdiv(M, tile.block_m) * cdiv(K, tile.block_j) > processors(dy.device)
        and describable(dy)
        and describable(weight if weight.stride(1) == 1 else weight.T)
        and K * dy.element_size() % 16 == 0
    )


def rows_of_task(tile: LinearTile, rows: int, outputs: int) -> int:
    """How many rows of x one program reads at once; about as long as it computes a tile of dx, from dy [rows, outputs].

    That is half a tile's columns of 2 * outputs rows, if each program gets a hundredth of an H200's memory bandwidth.
    """
    step = tile.block_m // 2
    return step * cdiv(min(rows, max(2 * outputs, step)), step)


def gradients(
    dy: Tensor, weight: Tensor, dyb: Tensor, lora_A: Tensor, x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dx [M, K] in dy.dtype and da [R, K] in `dtype`, of dy [M, N], weight [N, K], dyb [M, R] and x [M, K].

    Of what `takes` holds for.
    """
    (M, N), K, R = dy.shape, weight.shape[1], len(lora_A)
    tile = tiles_for(dy.device, dy.dtype, N, K).linear
    transposed = weight.stride(1) != 1
    weight_block = [tile.block_j, tile.block_i] if transposed else [tile.block_i, tile.block_j]
    rows, columns = rows_of_task(tile, M, N), tile.block_j // 2
    splits = cdiv(M, rows)
    dx, grad = dy.new_empty((M, K)), dy.new_empty((splits, R, K), dtype=torch.float32 if splits > 1 else dtype)
    precision = input_precision(dy.dtype)

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        return (processors(dy.device),), dict(
            **strides("dm dr", dyb),
            **strides("ar ak", lora_A),
            **strides("xm xk", x),
            **strides("gs gr gk", grad),
            M=M, K=K, N=N, R=R, ROWS=rows,
            BLOCK_M=tile.block_m, BLOCK_K=tile.block_j, BLOCK_N=tile.block_i, BLOCK_R=rank_block(R),
            GROUP_M=GROUP_M, TRANSPOSED=transposed,
            ROW_STEP=tile.block_m // 2, COLUMNS=columns, EVEN_K=K % columns == 0, STAGES=STAGES, PRECISION=precision,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    tensors: dict[str, Tensor | None] = {
        "dyb_ptr": dyb,
        "lora_A_ptr": lora_A,
        "x_ptr": x,
        "dy_ptr": dy,
        "weight_ptr": weight,
    }
    described = {
        "dy_ptr": (dy, [tile.block_m, tile.block_i]),
        "weight_ptr": (weight.T if transposed else weight, weight_block),
        "dx_ptr": (dx, [tile.block_m, tile.block_j // 4]),
    }
    launch(_dx_and_da_kernel, tensors, (tile, precision, grad.dtype), arguments, {"grad_ptr": grad}, described)
    return dx, reduce(grad, dtype)[0] if splits > 1 else grad[0]
