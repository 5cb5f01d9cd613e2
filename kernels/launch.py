"""What every launcher needs: a grid, the arguments of a mask, float32's precision, and a kernel's stated work."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Dropout(Protocol):
    """Which elements are kept; 1 - threshold / 65536 of them."""

    @property
    def seed(self) -> Tensor: ...
    @property
    def threshold(self) -> int: ...
    @property
    def row_offset(self) -> int: ...
    @property
    def column_offset(self) -> int: ...
    @property
    def keep_probability(self) -> float: ...


def dropout_arguments(dropout: Dropout | None) -> dict[str, Any]:
    """The keyword arguments by which a kernel that draws takes its dropout; seed_ptr None means none."""
    if dropout is None:
        return {"seed_ptr": None, "threshold": 0, "row_offset": 0, "column_offset": 0, "ALIGNED": True}
    return {
        "seed_ptr": dropout.seed,
        "threshold": dropout.threshold,
        "row_offset": dropout.row_offset,
        "column_offset": dropout.column_offset,
        "ALIGNED": dropout.column_offset % 8 == 0,
    }


def bits_arguments(bits: Tensor | None) -> dict[str, Any]:
    """The keyword arguments by which a kernel takes a mask's bits; bits_ptr None means none."""
    return {"bits_ptr": bits, "stride_bm": 0 if bits is None else bits.stride(0)}


def cdiv(size: int, block: int) -> int:
    """How many blocks cover size. triton.cdiv works in kernels too, and takes ten times as long for it on the host."""
    return -(-size // block)


def input_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 follows torch's matmul precision, since tl.dot would take tf32 by itself."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def stated_work(name: str, flops: float, *tensors: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """A kernel's launch_metadata, in the keys that Triton's Proton reads: each tensor is moved once."""
    moved = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return {"name": name, f"flops{8 * dtype.itemsize}": flops, "bytes": moved}
