"""Rows of a matrix with a low-rank update, in one kernel: out[m] = base[i] + scale * left[i] @ right, i = index[m].

effective weight  w + scaling * b @ a            base w [N, K],   left b [N, R],   right a [R, K],   no index: i = m
embedding         w[t] + scaling * a[:, t] @ b.T  base w [V, D],   left a.T [V, R], right b.T [R, D], index the tokens

The update is summed in float32 whatever the dtypes, so that a merged weight is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accumulate import accumulate
from .config import UpdateTile
from .launch import cdiv, launch, launch_again, plan_of, stated_work, strides
from .lookup import tiles_for

RANK_STEP = 16


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    out, panel, R = args["out_ptr"], args["panel_ptr"], args["R"]
    left = out.new_empty((args["M"], R), device="meta", dtype=args["left_ptr"].dtype)
    tensors = (args["index_ptr"], out, left, args["right_ptr"], panel, out)
    return stated_work("low_rank_update", 2.0 * out.numel() * R, *tensors, dtype=out.dtype)


@triton.jit(launch_metadata=_work, do_not_specialize=["M"])
def _low_rank_update_kernel(
    base_ptr, stride_bv, stride_bj,  # [V, J]
    left_ptr, stride_lv, stride_lr,  # [V, R]
    right_ptr, stride_rr, stride_rj,  # [R, J]
    index_ptr,  # [M], or None
    out_ptr, stride_om, stride_oj,  # [M, J]
    panel_ptr, stride_pm, stride_pr,  # scale * left[index], [M, R], or None
    scale,
    M, J, R, V,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    outs = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    in_rows, in_columns = outs < M, columns < J
    if index_ptr is None:
        rows = outs
    else:
        rows = tl.load(index_ptr + outs, mask=in_rows, other=0).to(tl.int64)
        tl.device_assert((rows >= 0) & (rows < V), "index out of range in fused_lora's embedding")
    acc = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R).to(tl.int64)
        in_left = in_rows[:, None] & (ranks[None, :] < R)
        left = tl.load(left_ptr + rows[:, None] * stride_lv + ranks[None, :] * stride_lr, mask=in_left, other=0.0)
        right_ptrs = right_ptr + ranks[:, None] * stride_rr + columns[None, :] * stride_rj
        right = tl.load(right_ptrs, mask=(ranks[:, None] < R) & in_columns[None, :], other=0.0)
        acc = accumulate(left, right, acc, "ieee")
        if panel_ptr is not None:
            panel_ptrs = panel_ptr + outs[:, None] * stride_pm + ranks[None, :] * stride_pr
            # The first tile of columns stores it for all of them.
            in_panel = (outs < tl.where(tl.program_id(1) == 0, M, 0))[:, None] & (ranks[None, :] < R)
            tl.store(panel_ptrs, (left.to(tl.float32) * scale).to(panel_ptr.dtype.element_ty), mask=in_panel)
    inside = in_rows[:, None] & in_columns[None, :]
    base = tl.load(base_ptr + rows[:, None] * stride_bv + columns[None, :] * stride_bj, mask=inside, other=0.0)
    out_ptrs = out_ptr + outs[:, None] * stride_om + columns[None, :] * stride_oj
    tl.store(out_ptrs, (base.to(tl.float32) + acc * scale).to(out_ptr.dtype.element_ty), mask=inside)


def _found_by(
    base: Tensor, left: Tensor, right: Tensor, index: Tensor | None, tile: UpdateTile, scale: float
) -> tuple[dict[str, Tensor | None], tuple[Hashable, ...]]:
    """The tensors and facts by which `launch` finds a plan."""
    return {"base_ptr": base, "left_ptr": left, "right_ptr": right, "index_ptr": index}, (tile, scale)


def _launch(
    base: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, out: Tensor, index: Tensor | None, panel: Tensor | None
) -> None:
    if out.shape[0] == 0:
        return
    tile = tiles_for(out.device, out.dtype).update
    left, right = (lora_B, lora_A) if index is None else (lora_A, lora_B)

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        lefts, rights = (left, right) if index is None else (left.T, right.T)
        (V, R), J = lefts.shape, rights.shape[1]
        M = V if index is None else len(index)
        return (cdiv(M, tile.block_m), max(1, cdiv(J, tile.block_j))), dict(
            **strides("bv bj", base.view(V, J)),
            **strides("lv lr", lefts),
            **strides("rr rj", rights),
            **strides("om oj", out.view(M, J)),
            **strides("pm pr", panel),
            scale=scale,
            M=M, J=J, R=R, V=V,
            BLOCK_M=tile.block_m, BLOCK_J=tile.block_j, BLOCK_R=RANK_STEP,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            debug=index is not None, sanitize_overflow=False,
        )  # fmt: skip

    found_by = _found_by(base, left, right, index, tile, scale)
    launch(_low_rank_update_kernel, *found_by, arguments, {"out_ptr": out, "panel_ptr": panel})


def effective_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """weight [N, K] + scaling * lora_B [N, R] @ lora_A [R, K], in weight's dtype.

    weight may be contiguous with other dimensions instead, which the result has too.
    """
    effective = _place_for(weight)
    _launch(weight, lora_A, lora_B, scaling, effective, None, None)
    return effective


def _place_for(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape) if weight.dim() == 2 else torch.empty_like(weight)


def effective_weight_again(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Callable[..., Tensor] | None:
    """`effective_weight` for other tensors of the same kind, whatever else is given; None if it was launched for none.

    The same kind: dtypes, shapes, strides, device and the addresses' alignment, and on that device.
    """
    tile = tiles_for(weight.device, weight.dtype).update
    plan = plan_of(_low_rank_update_kernel, *_found_by(weight, lora_B, lora_A, None, tile, scaling))
    if plan is None:
        return None

    def again(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *known: Any) -> Tensor:
        effective = _place_for(weight)
        launch_again(plan, (weight, lora_B, lora_A, None, effective, None))
        return effective

    return again


def embedding(indices: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """y [M, D] and its panel xa [M, R], both in weight's dtype, of indices [M] contiguous, weight [V, D].

    lora_A is [R, V] and lora_B [D, R]. An index out of range stops the device, as in torch.
    """
    tokens = indices.shape[0]
    y, xa = weight.new_empty((tokens, weight.shape[1])), weight.new_empty((tokens, lora_A.shape[0]))
    _launch(weight, lora_A, lora_B, scaling, y, indices, xa)
    return y, xa
