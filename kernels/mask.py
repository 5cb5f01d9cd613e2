"""A mask on a matrix, element by element: where(keep, value, 0), or that added to a matrix in place."""

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
    value, out = args["value_ptr"], args["out_ptr"]
    tensors = (value, args["bits_ptr"], out, out if args["ADD"] else None)
    return stated_work("mask", float(out.numel()), *tensors, dtype=out.dtype)


@triton.jit(launch_metadata=_work, do_not_specialize=["M", "stride_bm", "threshold", "row_offset", "column_offset"])
def _mask_kernel(
    value_ptr, stride_vm, stride_vk,  # [M, K]
    out_ptr, stride_om, stride_ok,  # [M, K]
    bits_ptr, stride_bm,  # [M, cdiv(K, 8)]; drawn and stored if there is a seed, else read
    seed_ptr, threshold, row_offset, column_offset,
    M, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1).to(tl.int64) * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    byte_ptrs = bit_ptrs(bits_ptr, stride_bm, rows, first_column, BLOCK_K)
    in_bytes = in_bits(rows, first_column, M, K, BLOCK_K)
    value = tl.load(value_ptr + rows[:, None] * stride_vm + columns[None, :] * stride_vk, mask=inside, other=0.0)
    if seed_ptr is not None:
        keep, bits = draw_tile(
            seed_ptr, threshold, rows + row_offset, first_column + column_offset, BLOCK_M, BLOCK_K, ALIGNED
        )  # fmt: skip
        tl.store(byte_ptrs, bits, mask=in_bytes)
    else:
        keep = unpacked(tl.load(byte_ptrs, mask=in_bytes, other=0), BLOCK_M, BLOCK_K)
    masked = tl.where(keep, value, tl.zeros_like(value))
    out_ptrs = out_ptr + rows[:, None] * stride_om + columns[None, :] * stride_ok
    if ADD:
        base = tl.load(out_ptrs, mask=inside, other=0.0)
        masked = (base.to(tl.float32) + masked.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, masked, mask=inside)


def _launch(value: Tensor, out: Tensor, bits: Tensor, dropout: Dropout | None, *, add: bool) -> None:
    M, K = value.shape
    if value.numel() == 0:
        return
    seed = None if dropout is None else dropout.seed
    tensors = {"value_ptr": value, "out_ptr": out, "bits_ptr": bits, "seed_ptr": seed}

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        return (cdiv(M, BLOCK_M), cdiv(K, BLOCK_K)), dict(
            **strides("vm vk", value),
            **strides("om ok", out),
            M=M, K=K,
            BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, ADD=add,
            num_warps=4, enable_fp_fusion=True,
            **strides("bm", bits), **dropout_arguments(dropout),
        )  # fmt: skip

    launch(_mask_kernel, tensors, (add, *dropout_facts(dropout)), arguments)


def drop(x: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """keep * x, [M, K], of a mask that is drawn here, and its bits [M, cdiv(K, 8)]."""
    out = x.new_empty(x.shape)
    bits = x.new_empty((len(x), cdiv(x.shape[1], 8)), dtype=torch.uint8)
    _launch(x, out, bits, dropout, add=False)
    return out, bits


def drop_again(x: Tensor, bits: Tensor) -> Tensor:
    """keep * x, [M, K]."""
    out = x.new_empty(x.shape)
    _launch(x, out, bits, None, add=False)
    return out


def add_kept_(out: Tensor, value: Tensor, bits: Tensor) -> Tensor:
    """Adds keep * value to out, in place; both [M, K]. Rounded once."""
    _launch(value, out, bits, None, add=True)
    return out
