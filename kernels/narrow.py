"""lora_A and lora_B rounded to a narrower dtype, both in one launch, where the GPU's copy engine can read them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, new_describable, stated_work, strides

# Elements of a block, and its columns at most.
BLOCK, MOST_COLUMNS = 1024, 128


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    tensors = [args[name] for name in ("lora_A_ptr", "lora_B_ptr", "A_out_ptr", "B_out_ptr")]
    return stated_work("narrow", float(tensors[0].numel() + tensors[1].numel()), *tensors, dtype=tensors[2].dtype)


@triton.jit
def _copy(
    source_ptr, stride_sr, stride_sc,  # [ROWS, COLUMNS]
    target_ptr, stride_tr,  # [ROWS, COLUMNS]
    ROWS, COLUMNS,
    block,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(COLUMNS, BLOCK_COLUMNS)
    rows = (block // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (block % across).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    source = tl.load(source_ptr + rows[:, None] * stride_sr + columns[None, :] * stride_sc, mask=inside)
    target_ptrs = target_ptr + rows[:, None] * stride_tr + columns[None, :]
    tl.store(target_ptrs, source.to(target_ptr.dtype.element_ty), mask=inside)


@triton.jit(launch_metadata=_work)
def _narrow_kernel(
    lora_A_ptr, stride_ar, stride_ak,  # [RANKS, K]
    lora_B_ptr, stride_bn, stride_br,  # [N, R]
    A_out_ptr, stride_aor,  # [RANKS, K]
    B_out_ptr, stride_bon,  # [N, R]
    RANKS, K, N, R,
    A_blocks,
    A_ROWS: tl.constexpr, A_COLUMNS: tl.constexpr, B_ROWS: tl.constexpr, B_COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if block < A_blocks:
        _copy(lora_A_ptr, stride_ar, stride_ak, A_out_ptr, stride_aor, RANKS, K, block, A_ROWS, A_COLUMNS)
    else:
        _copy(lora_B_ptr, stride_bn, stride_br, B_out_ptr, stride_bon, N, R, block - A_blocks, B_ROWS, B_COLUMNS)


def _block(columns: int) -> tuple[int, int]:
    across = min(MOST_COLUMNS, triton.next_power_of_2(columns))
    return BLOCK // across, across


def narrow(lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """lora_A [RANKS, K] and lora_B [N, R] in dtype, each rounded to nearest; none of them is empty."""
    A_out, B_out = (new_describable(factor.shape, dtype, factor) for factor in (lora_A, lora_B))

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        (A_rows, A_columns), (B_rows, B_columns) = _block(lora_A.shape[1]), _block(lora_B.shape[1])
        A_blocks, B_blocks = (
            cdiv(len(matrix), rows) * cdiv(matrix.shape[1], columns)
            for matrix, rows, columns in ((lora_A, A_rows, A_columns), (lora_B, B_rows, B_columns))
        )
        return (A_blocks + B_blocks,), dict(
            **strides("ar ak", lora_A),
            **strides("bn br", lora_B),
            stride_aor=A_out.stride(0), stride_bon=B_out.stride(0),
            RANKS=len(lora_A), K=lora_A.shape[1], N=len(lora_B), R=lora_B.shape[1], A_blocks=A_blocks,
            A_ROWS=A_rows, A_COLUMNS=A_columns, B_ROWS=B_rows, B_COLUMNS=B_columns, num_warps=4,
        )  # fmt: skip

    made = {"A_out_ptr": A_out, "B_out_ptr": B_out}
    launch(_narrow_kernel, {"lora_A_ptr": lora_A, "lora_B_ptr": lora_B}, (dtype,), arguments, made)
    return A_out, B_out
