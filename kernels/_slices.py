"""MergedLinear's slices: equal runs of output features, some of which have a LoRA adapter.

A pattern is a bit mask, ENABLED, whose bit s says whether slice s has one. lora_A, lora_B and panels hold the enabled
slices only, one after another; e counts those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def enabled_before(slice, SLICES: tl.constexpr, ENABLED: tl.constexpr):
    """How many of the slices before the given one, or ones, are enabled."""
    count = slice * 0
    for s in tl.static_range(SLICES):
        if (ENABLED >> s) & 1:
            count += (slice > s).to(slice.dtype)
    return count


@triton.jit
def enabled_slice(e, SLICES: tl.constexpr, ENABLED: tl.constexpr):
    """The slice that the e-th enabled one is; e is a scalar."""
    found = e * 0
    seen = e * 0
    for s in tl.static_range(SLICES):
        if (ENABLED >> s) & 1:
            found = tl.where(seen == e, s, found)
            seen += 1
    return found


@triton.jit
def enabled_among(first_column, last_column, WIDTH, SLICES: tl.constexpr, ENABLED: tl.constexpr):
    """Which of the enabled slices these columns touch: the first one's e, and the e after the last one's."""
    first, last = tl.full((), 0, tl.int32), 1
    if SLICES > 1:
        first = enabled_before(first_column // WIDTH, SLICES, ENABLED)
        last = enabled_before(last_column // WIDTH + 1, SLICES, ENABLED)
    return first, last


def slice_arguments(enable_lora: Sequence[bool]) -> dict[str, int]:
    """The keyword arguments by which kernels take a pattern; a single enabled slice is a plain linear layer."""
    return {"SLICES": len(enable_lora), "ENABLED": sum(1 << s for s, enabled in enumerate(enable_lora) if enabled)}


def enabled_columns(matrix: Tensor, args: dict[str, Any]) -> Tensor:
    """As many columns of matrix [M, SLICES * I] as a kernel with these arguments reads."""
    return matrix[:, : args["ENABLED"].bit_count() * args["I"]]
