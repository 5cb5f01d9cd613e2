"""Sums of partial results in a fixed order, rounded once: out = scale * partials.sum(0), one or two in a launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from .launch import cdiv, launch, stated_work

BLOCK = 256
SPLIT_STEP = 16


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    partials, others = args["partials_ptr"], args["other_partials_ptr"]
    tensors = (partials, args["out_ptr"], others, args["other_out_ptr"])
    flops = float(partials.numel() + (0 if others is None else others.numel()))
    return stated_work("reduce", flops, *tensors, dtype=partials.dtype)


@triton.jit
def _sum(partials_ptr, out_ptr, scale, SPLITS, SIZE, block, BLOCK: tl.constexpr, SPLIT_STEP: tl.constexpr):
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < SIZE
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SPLITS, SPLIT_STEP):
        splits = start + tl.arange(0, SPLIT_STEP).to(tl.int64)
        in_partials = (splits < SPLITS)[:, None] & inside[None, :]
        partials = tl.load(partials_ptr + splits[:, None] * SIZE + offsets[None, :], mask=in_partials, other=0.0)
        acc += tl.sum(partials, 0)
    tl.store(out_ptr + offsets, (acc * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(launch_metadata=_work, do_not_specialize=["SPLITS", "SIZE", "OTHER_SPLITS", "OTHER_SIZE"])
def _reduce_kernel(
    partials_ptr,  # [SPLITS, SIZE]
    out_ptr,  # [SIZE]
    scale,
    SPLITS, SIZE,
    other_partials_ptr,  # [OTHER_SPLITS, OTHER_SIZE], or None
    other_out_ptr,  # [OTHER_SIZE], or None
    OTHER_SPLITS, OTHER_SIZE,
    BLOCK: tl.constexpr, SPLIT_STEP: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    if BESIDE:
        gdc_wait()
    block, blocks = tl.program_id(0), tl.cdiv(SIZE, BLOCK)
    if block < blocks:
        _sum(partials_ptr, out_ptr, scale, SPLITS, SIZE, block, BLOCK, SPLIT_STEP)
    elif other_partials_ptr is not None:
        _sum(other_partials_ptr, other_out_ptr, 1.0, OTHER_SPLITS, OTHER_SIZE, block - blocks, BLOCK, SPLIT_STEP)


def reduce(
    partials: Tensor,
    dtype: torch.dtype,
    scale: float = 1.0,
    other: tuple[Tensor, torch.dtype] | None = None,
    *,
    beside: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """partials: float32 [splits, *shape], contiguous; returns scale times their sum, [*shape] in dtype.

    other: partials and a dtype whose sum is returned beside it, unscaled.
    beside: is launched while the launch before still runs, which is told so, and waits for it.
    """
    out, others, other_out = partials.new_empty(partials.shape[1:], dtype=dtype), None, None
    if other is not None:
        others = other[0]
        other_out = others.new_empty(others.shape[1:], dtype=other[1])
    blocks = cdiv(out.numel(), BLOCK) + (0 if other_out is None else cdiv(other_out.numel(), BLOCK))
    if blocks == 0:
        return out, other_out

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        return (blocks,), dict(
            scale=scale, SPLITS=len(partials), SIZE=out.numel(),
            OTHER_SPLITS=0 if others is None else len(others),
            OTHER_SIZE=0 if other_out is None else other_out.numel(),
            BLOCK=BLOCK, SPLIT_STEP=SPLIT_STEP, BESIDE=beside, launch_pdl=beside, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    tensors, made = (
        {"partials_ptr": partials, "other_partials_ptr": others},
        {"out_ptr": out, "other_out_ptr": other_out},
    )
    facts = (scale, dtype, beside, None if other is None else other[1])
    launch(_reduce_kernel, tensors, facts, arguments, made)
    return out, other_out
