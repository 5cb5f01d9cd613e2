"""lora_A's gradient from an embedding's lookups: da[:, v] = the sum of dyb[m] over all m with index[m] = v.

Every lookup is compared with all others. The first one of its token adds up the panel's rows of that token, by a
product with the comparison, and alone writes them: no sort, no atomic addition, and the same bits every time. That
takes the square of the lookups' number, which up to some thousands is less than sorting them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accumulate import accumulate
from .config import rank_block
from .launch import cdiv, launch, stated_work, strides

# For more lookups torch, which sorts them, takes less time: measured for up to so many ranks in half precision, and
# fewer are taken of others. Tokens are compared as 32-bit numbers.
MOST_LOOKUPS, MOST_MEASURED_RANKS, MOST_OTHER_LOOKUPS, MOST_TOKENS = 8192, 64, 2048, 1 << 31
# Of one warp, which meets no barrier. Where it reads numbers one by one, registers are enough for the short step alone.
BLOCK_M, STEP, SHORT_STEP, NUM_STAGES = 16, 128, 64, 3
# Ranks of a program.
MOST_RANKS = 32


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    dyb, da = args["dyb_ptr"], args["da_ptr"]
    written = dyb.new_empty(dyb.shape, device="meta", dtype=da.dtype)
    return stated_work("token_grad", 2.0 * len(dyb) * dyb.numel(), args["index_ptr"], dyb, written, dtype=dyb.dtype)


@triton.jit(launch_metadata=_work, do_not_specialize=["M", "padding_idx"])
def _token_grad_kernel(
    index_ptr,  # [M]
    dyb_ptr, stride_dm, stride_dr,  # [M, R]
    da_ptr, stride_ar, stride_av,  # [R, V], zeros
    M, R, padding_idx,
    BY_FREQUENCY: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    lookups = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    in_ranks = (ranks < R)[None, :]
    tokens = tl.load(index_ptr + lookups, mask=lookups < M, other=-1).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first = tl.zeros((BLOCK_M,), tl.int32) + M
    times = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, M, STEP):
        others = start + tl.arange(0, STEP)
        # Past the last one they are token 0, whose panel is zero there. For any other number triton 3.6 selects it in
        # other columns than those that it loads.
        same = tokens[:, None] == tl.load(index_ptr + others, mask=others < M, other=0).to(tl.int32)[None, :]
        first = tl.minimum(first, tl.min(tl.where(same, others[None, :], M), 1))
        if BY_FREQUENCY:
            times += tl.sum((same & (others < M)[None, :]).to(tl.int32), 1)
        dyb_ptrs = dyb_ptr + others.to(tl.int64)[:, None] * stride_dm + ranks[None, :] * stride_dr
        panel = tl.load(dyb_ptrs, mask=(others < M)[:, None] & in_ranks, other=0.0)
        acc = accumulate(same.to(panel.dtype), panel, acc, "ieee")
    finite = tl.abs(acc) < float("inf")
    if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
        # What is not finite met a zero of other tokens.
        apart = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for other in tl.range(0, M, num_stages=1):
            same_token = tokens == tl.load(index_ptr + other).to(tl.int32)
            row_ptrs = dyb_ptr + tl.full((), other, tl.int64) * stride_dm + ranks * stride_dr
            row = tl.load(row_ptrs, mask=ranks < R, other=0.0).to(tl.float32)
            apart += tl.where(same_token[:, None], row[None, :], 0.0)
        acc = tl.where(finite, acc, apart)
    if BY_FREQUENCY:
        acc *= (1.0 / tl.maximum(times, 1))[:, None]
    da_ptrs = da_ptr + tokens.to(tl.int64)[:, None] * stride_av + ranks[None, :] * stride_ar
    writes = (lookups < M) & (first == lookups) & (tokens != padding_idx)
    tl.store(da_ptrs, acc.to(da_ptr.dtype.element_ty), mask=writes[:, None] & in_ranks)


def takes(dyb: Tensor, num_embeddings: int) -> bool:
    """Whether the kernel computes lookups with this panel [M, R], and is thought to take less time than torch."""
    lookups, ranks = dyb.shape
    measured = dyb.dtype.itemsize == 2 and ranks <= MOST_MEASURED_RANKS and ranks % 8 == 0
    return lookups <= (MOST_LOOKUPS if measured else MOST_OTHER_LOOKUPS) and num_embeddings <= MOST_TOKENS


def grad_lora_A(
    dyb: Tensor, indices: Tensor, num_embeddings: int, padding_idx: int, scale_grad_by_freq: bool, dtype: torch.dtype
) -> Tensor:
    """da [R, num_embeddings] in `dtype` of dyb [M, R] and what `takes` holds for, indices [M] contiguous and in range.

    padding_idx: its column is zero, as those of tokens that do not occur; -1 is none. scale_grad_by_freq: each column
    is divided by how often its token occurs.
    """
    M, R = dyb.shape
    da = dyb.new_empty((R, num_embeddings), dtype=dtype).zero_()
    if dyb.numel() == 0:
        return da

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        block_r, step = min(rank_block(R), MOST_RANKS), STEP if dyb.dtype.itemsize == 2 and R % 16 == 0 else SHORT_STEP
        return (cdiv(M, BLOCK_M), cdiv(R, block_r)), dict(
            **strides("dm dr", dyb),
            **strides("ar av", da),
            M=M, R=R, padding_idx=padding_idx,
            BY_FREQUENCY=scale_grad_by_freq, BLOCK_M=BLOCK_M, STEP=step, BLOCK_R=block_r,
            num_warps=1, num_stages=NUM_STAGES, enable_fp_fusion=True,
        )  # fmt: skip

    facts = (dtype, num_embeddings, padding_idx, scale_grad_by_freq)
    launch(_token_grad_kernel, {"index_ptr": indices, "dyb_ptr": dyb}, facts, arguments, {"da_ptr": da})
    return da
