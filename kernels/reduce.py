"""Sum of partial results in a fixed order, scaled and rounded once: out = scale * partials.sum(0)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, stated_work

BLOCK = 1024


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    partials, out = args["partials_ptr"], args["out_ptr"]
    return stated_work("reduce", float(partials.numel()), partials, out, dtype=partials.dtype)


@triton.jit(launch_metadata=_work, do_not_specialize=["SPLITS", "SIZE"])
def _reduce_kernel(
    partials_ptr,  # [SPLITS, SIZE]
    out_ptr,  # [SIZE]
    scale,
    SPLITS, SIZE,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < SIZE
    acc = tl.zeros((BLOCK,), tl.float32)
    partial_ptrs = partials_ptr + offsets
    for _ in range(0, SPLITS):
        acc += tl.load(partial_ptrs, mask=inside, other=0.0)
        partial_ptrs += SIZE
    tl.store(out_ptr + offsets, (acc * scale).to(out_ptr.dtype.element_ty), mask=inside)


def reduce(partials: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """partials: float32 [splits, *shape], contiguous; returns [*shape] in dtype."""
    out = partials.new_empty(partials.shape[1:], dtype=dtype)
    if out.numel() > 0:
        _reduce_kernel[(cdiv(out.numel(), BLOCK),)](
            partials,
            out,
            scale,
            SPLITS=len(partials),
            SIZE=out.numel(),
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
