"""Where tensors lie in memory, and whether one of them lies in another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import le

from torch import Tensor


def span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of its first element and past its last one."""
    first = tensor.data_ptr()
    if tensor.numel() == 0:
        return first, first
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


def overlap(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the spans of two of them reach into one another."""
    spans = sorted(span(tensor) for tensor in tensors if tensor is not None and tensor.numel() > 0)
    return any(start < end for (_, end), (start, _) in pairwise(spans))


def begins(tensor: Tensor, whole: Tensor) -> bool:
    """Whether a tensor at the address of another has no elements but the other's first ones, or those of its T."""
    for each in (whole, whole.T) if whole.dim() == 2 else (whole,):
        if tensor.stride() == each.stride() and all(map(le, tensor.shape, each.shape)):
            return True
    return False
