"""A mask on matrices, element by element: where(keep, x, 0), and where(keep, value, 0) added to another in place."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dropout import bit_ptrs, draw_tile, in_bits, unpacked
from .launch import Dropout, cdiv, dropout_arguments, dropout_facts, launch, stated_work, strides

BLOCK_M = 16
BLOCK_K = 128


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    x, value, total = args["x_ptr"], args["value_ptr"], args["total_ptr"]
    some = value if x is None else x
    masked = sum(matrix.numel() for matrix in (x, value) if matrix is not None)
    return stated_work(
        "mask", float(masked), x, args["out_ptr"], args["bits_ptr"], value, total, total, dtype=some.dtype
    )


@triton.jit(launch_metadata=_work, do_not_specialize=["M", "stride_bm", "threshold", "row_offset", "column_offset"])
def _mask_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K], or None
    out_ptr, stride_om, stride_ok,  # where(keep, x, 0), [M, K], or None
    value_ptr, stride_vm, stride_vk,  # [M, K], or None
    total_ptr, stride_tm, stride_tk,  # gains where(keep, value, 0), [M, K], or None
    bits_ptr, stride_bm,  # [M, cdiv(K, 8)]; drawn and stored if there is a seed, else read
    seed_ptr, threshold, row_offset, column_offset,
    M, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1).to(tl.int64) * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    byte_ptrs = bit_ptrs(bits_ptr, stride_bm, rows, first_column, BLOCK_K)
    in_bytes = in_bits(rows, first_column, M, K, BLOCK_K)
    if seed_ptr is not None:
        keep, bits = draw_tile(
            seed_ptr, threshold, rows + row_offset, first_column + column_offset, BLOCK_M, BLOCK_K, ALIGNED
        )  # fmt: skip
        tl.store(byte_ptrs, bits, mask=in_bytes)
    else:
        keep = unpacked(tl.load(byte_ptrs, mask=in_bytes, other=0), BLOCK_M, BLOCK_K)
    if x_ptr is not None:
        x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :] * stride_xk, mask=inside, other=0.0)
        out_ptrs = out_ptr + rows[:, None] * stride_om + columns[None, :] * stride_ok
        tl.store(out_ptrs, tl.where(keep, x, tl.zeros_like(x)), mask=inside)
    if value_ptr is not None:
        value = tl.load(value_ptr + rows[:, None] * stride_vm + columns[None, :] * stride_vk, mask=inside, other=0.0)
        total_ptrs = total_ptr + rows[:, None] * stride_tm + columns[None, :] * stride_tk
        total = tl.load(total_ptrs, mask=inside, other=0.0)
        gained = tl.where(keep, value.to(tl.float32), 0.0)
        tl.store(total_ptrs, (total.to(tl.float32) + gained).to(total_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor | None, value: Tensor | None, total: Tensor | None, bits: Tensor, dropout: Dropout | None = None
) -> Tensor | None:
    some = value if x is None else x
    assert some is not None
    M, K = some.shape
    out = None if x is None else torch.empty_like(x)
    if M == 0 or K == 0:
        return out
    seed = None if dropout is None else dropout.seed
    tensors = {
        "x_ptr": x,
        "out_ptr": out,
        "value_ptr": value,
        "total_ptr": total,
        "bits_ptr": bits,
        "seed_ptr": seed,
    }

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        return (cdiv(M, BLOCK_M), cdiv(K, BLOCK_K)), dict(
            **strides("xm xk", x),
            **strides("om ok", out),
            **strides("vm vk", value),
            **strides("tm tk", total),
            M=M, K=K,
            BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K,
            num_warps=4, enable_fp_fusion=True,
            **strides("bm", bits), **dropout_arguments(dropout),
        )  # fmt: skip

    launch(_mask_kernel, tensors, dropout_facts(dropout), arguments)
    return out


def drop(x: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """keep * x, [M, K], of a mask that is drawn here, and its bits [M, cdiv(K, 8)]."""
    M, K = x.shape
    bits = x.new_empty((M, cdiv(K, 8)), dtype=torch.uint8)
    dropped: Tensor = _launch(x, None, None, bits, dropout)  # type: ignore[assignment]
    return dropped, bits


def drop_again(x: Tensor, bits: Tensor) -> Tensor:
    """keep * x, [M, K]."""
    return _launch(x, None, None, bits)  # type: ignore[return-value]


def add_kept_(total: Tensor, value: Tensor, bits: Tensor, x: Tensor | None) -> Tensor | None:
    """Adds keep * value to total, in place and rounded once, and returns keep * x in the same launch; all [M, K]."""
    return _launch(x, value, total, bits)
