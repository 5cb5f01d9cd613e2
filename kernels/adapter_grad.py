"""An adapter's gradient, from one read of left: grad = (keep * left).T @ panel, [I, R].

db  left dy [M, N], panel xa,  and dyb = scaling * dy @ b [M, R] from the same read; for each enabled slice
da  left x [M, K],  panel dyb, with the mask's bits; stored transposed, [R, K]

A program owns BLOCK_I columns and a run of rows. Of several runs, reduce.py adds up the sums in a fixed order.

dx depends on neither, and its GEMM leaves room on most multiprocessors and, in its last wave, some of them idle. Where
GPUs can (config.py's `overlaps`), those that come after it begin while it runs: see fused_linear.py's `grad_input`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._accumulate import accumulate
from ._dropout import bit_ptrs, in_bits, kept_by_bits
from ._slices import enabled_columns, enabled_slice, slice_arguments
from .config import HOPPER, AdapterGradTile, rank_block, scaled
from .launch import cdiv, input_precision, launch, stated_work, strides
from .lookup import tiles_for
from .panel import panel as compute_panel
from .reduce import reduce

# Beyond this rank the partial sums of dyb weigh more than a second read of dy; measured in benchmarks/NOTES.md.
FUSED_RANK = 32
# Instead of Hopper's first one, for db with dyb where so many columns fill the multiprocessors all the same.
WIDE, FEWEST_WIDE_COLUMNS, MOST_WIDE_RANKS = AdapterGradTile(64, 512, 8, 3, 132), 8192, 16
# Of so many, a masked gradient takes less time beside a GEMM if it is not divided, which spares the sum.
FEW_ROWS = 1024
# And of more, of up to so many ranks, if no program has more than these: what room a GEMM leaves comes bit by bit.
MOST_MASKED_ROWS, FEW_MASKED_RANKS = 2048, 64


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    left, grad, factor = args["left_ptr"], args["grad_ptr"], args["factor_ptr"]
    flops = 2.0 * args["M"] * grad[0].numel() * (1 if factor is None else 2)
    tensors = (enabled_columns(left, args), args["panel_ptr"], factor, grad, args["product_ptr"], args["bits_ptr"])
    return stated_work("adapter_grad", flops, *tensors, dtype=left.dtype)


@triton.jit
def _bits_of(
    start,
    bits_ptr, stride_bm,  # [M, cdiv(I, 8)]
    first_inner, M, I, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Those of a step's rows, the first of which is start and may be past the last one."""
    local, remaining = tl.arange(0, BLOCK_M), tl.minimum(M - start, BLOCK_M).to(tl.int32)
    ptrs = bit_ptrs(bits_ptr, stride_bm, start + local, first_inner, BLOCK_I)
    return tl.load(ptrs, mask=in_bits(local, first_inner, remaining, I, BLOCK_I), other=0)


# stride_ds is a multiple of M, and M must not make new kernels.
@triton.jit(
    launch_metadata=_work,
    do_not_specialize=["stride_ds", "stride_bm", "M", "ROWS"],
)
def _adapter_grad_kernel(
    left_ptr, stride_lm, stride_li,  # [M, SLICES * I]
    panel_ptr, stride_pm, stride_pr,  # [M, enabled * R]
    grad_ptr, stride_gs, stride_gi, stride_gr,  # [splits, enabled * I, R], in the gradient's dtype if that is the whole
    factor_ptr, stride_fi, stride_fr,  # [enabled * I, R], or None
    product_ptr, stride_ds, stride_dm, stride_dr,  # left @ factor, [tiles of I, M, enabled * R], or None
    bits_ptr, stride_bm,  # [M, cdiv(I, 8)], or None
    M, I, R,
    ROWS,  # rows per split, a multiple of BLOCK_M
    SLICES: tl.constexpr, ENABLED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_I: tl.constexpr, PRECISION: tl.constexpr, BESIDE: tl.constexpr, FOLLOWED: tl.constexpr,
):  # fmt: skip
    if FOLLOWED:
        gdc_launch_dependents()
    tiles = tl.cdiv(I, BLOCK_I)
    tile, split = tl.program_id(0) % tiles, tl.program_id(1).to(tl.int64)
    if SLICES > 1:
        e = (tl.program_id(0) // tiles).to(tl.int64)
        left_ptr += enabled_slice(e, SLICES, ENABLED) * I * stride_li
        panel_ptr += e * R * stride_pr
        grad_ptr += e * I * stride_gi
        if factor_ptr is not None:
            factor_ptr += e * I * stride_fi
            product_ptr += e * R * stride_dr
    first_inner = tile.to(tl.int64) * BLOCK_I
    inner = first_inner + tl.arange(0, BLOCK_I)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_ranks = ranks[None, :] < R
    if factor_ptr is not None:
        factor_ptrs = factor_ptr + inner[:, None] * stride_fi + ranks[None, :].to(tl.int64) * stride_fr
        factor = tl.load(factor_ptrs, mask=(inner[:, None] < I) & in_ranks, other=0.0).to(left_ptr.dtype.element_ty)
    first = split * ROWS
    # What a mask leaves of left is in registers. With many ranks it goes from there to shared memory once if it is the
    # second operand, and back again if it is the first.
    MASKED_SECOND: tl.constexpr = bits_ptr is not None and BLOCK_R >= 64
    acc = tl.zeros((BLOCK_R, BLOCK_I) if MASKED_SECOND else (BLOCK_I, BLOCK_R), tl.float32)
    if bits_ptr is not None:
        bits = _bits_of(first, bits_ptr, stride_bm, first_inner, M, I, BLOCK_M, BLOCK_I)
    for start in range(first, tl.minimum(first + ROWS, M), BLOCK_M):
        local = tl.arange(0, BLOCK_M)
        rows = start + local
        # In 32 bits: every row of every load is compared.
        remaining = tl.minimum(M - start, BLOCK_M).to(tl.int32)
        in_rows = local[:, None] < remaining
        left_ptrs = left_ptr + rows[:, None] * stride_lm + inner[None, :] * stride_li
        if EVEN_I:
            left = tl.load(left_ptrs, mask=in_rows, other=0.0)
        else:
            left = tl.load(left_ptrs, mask=in_rows & (inner[None, :] < I), other=0.0)
        panel_ptrs = panel_ptr + rows[:, None] * stride_pm + ranks[None, :] * stride_pr
        panel = tl.load(panel_ptrs, mask=in_rows & in_ranks, other=0.0)
        if factor_ptr is not None:
            product = tl.dot(left, factor, input_precision=PRECISION)
            product_ptrs = product_ptr + tile.to(tl.int64) * stride_ds + rows[:, None] * stride_dm
            tl.store(product_ptrs + ranks[None, :] * stride_dr, product, mask=in_rows & in_ranks)
        if bits_ptr is not None:
            left = kept_by_bits(bits, left)
            # Nothing else brings single bytes in ahead.
            bits = _bits_of(start + BLOCK_M, bits_ptr, stride_bm, first_inner, M, I, BLOCK_M, BLOCK_I)
        if MASKED_SECOND:
            acc = accumulate(panel.T, left, acc, PRECISION)
        else:
            acc = accumulate(left.T, panel, acc, PRECISION)
    if MASKED_SECOND:
        acc = acc.T
    grad_ptrs = grad_ptr + split * stride_gs + inner[:, None] * stride_gi + ranks[None, :].to(tl.int64) * stride_gr
    tl.store(grad_ptrs, acc.to(grad_ptr.dtype.element_ty), mask=(inner[:, None] < I) & in_ranks)
    if BESIDE:
        # Whoever comes after this launch relies on the one before as well. One program that waits for it is enough.
        last = tl.num_programs(0) + tl.num_programs(1) + tl.num_programs(2) - 3
        if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == last:
            gdc_wait()


def _prepared(
    left: Tensor,
    panel: Tensor,
    factor: Tensor | None,
    bits: Tensor | None,
    tile: AdapterGradTile,
    dtype: torch.dtype,
    enable_lora: Sequence[bool] = (True,),
    *,
    transposed: bool,
    beside: bool = False,
    followed: bool = False,
) -> tuple[Tensor, Tensor | None, Callable[[], None]]:
    """Partial gradients [splits, I, R], or [splits, R, I] if transposed, partial products [tiles, M, R], and what
    launches their kernel.

    In float32; a single gradient, which is whole, in `dtype`. beside: begins while the launch before still runs.
    followed: the next launch begins while this one runs, and waits for it.

    With slices, the enabled ones' gradients and products stand one after another in I and in R respectively.
    """
    M, I, enabled = len(left), left.shape[1] // len(enable_lora), sum(enable_lora)
    R = panel.shape[1] // enabled
    block_r = rank_block(R)
    grid_i, grid_r = cdiv(I, tile.block_i), cdiv(R, block_r)
    steps = cdiv(M, tile.block_m)
    most = max(1, tile.programs // (enabled * grid_i * grid_r))
    if bits is not None and scaled(FEW_ROWS, left.device) >= M:
        most = 1
    elif bits is not None and R <= FEW_MASKED_RANKS:
        most = max(most, cdiv(M, scaled(MOST_MASKED_ROWS, left.device)))
    rows = tile.block_m * cdiv(steps, min(steps, most))
    splits = cdiv(M, rows)
    shape = (splits, R, enabled * I) if transposed else (splits, enabled * I, R)
    grad = left.new_empty(shape, dtype=torch.float32 if splits > 1 else dtype)
    product = None if factor is None else left.new_empty((grid_i, M, enabled * R), dtype=torch.float32)
    precision = input_precision(left.dtype)

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        return (enabled * grid_i, splits, grid_r), dict(
            **strides("lm li", left),
            **strides("pm pr", panel),
            **strides("gs gr gi" if transposed else "gs gi gr", grad),
            **strides("fi fr", factor),
            **strides("ds dm dr", product),
            M=M, I=I, R=R, ROWS=rows, **slice_arguments(enable_lora),
            BLOCK_M=tile.block_m, BLOCK_I=tile.block_i, BLOCK_R=block_r,
            EVEN_I=I % tile.block_i == 0, PRECISION=precision, BESIDE=beside, FOLLOWED=followed, launch_pdl=beside,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            **strides("bm", bits),
        )  # fmt: skip

    tensors = {
        "left_ptr": left,
        "panel_ptr": panel,
        "factor_ptr": factor,
        "bits_ptr": bits,
    }
    made = {"grad_ptr": grad, "product_ptr": product}
    facts = (tile, precision, transposed, beside, followed, grad.dtype, *enable_lora)
    return grad, product, lambda: launch(_adapter_grad_kernel, tensors, facts, arguments, made)


def grad_panels(
    dy: Tensor,
    lora_B: Tensor | None,
    xa: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    enable_lora: Sequence[bool] = (True,),
    *,
    overlaps: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """dyb [M, R] in dy's dtype where lora_B [N, R] is given, db [N, R] in `dtype` where xa [M, R] is.

    With slices: dyb and xa hold R columns for each enabled slice, lora_B and db its rows.
    overlaps: whether sums may be launched while what they add up is still computed.
    """
    if lora_B is not None and xa is not None and dy.numel() > 0 and lora_B.shape[1] <= FUSED_RANK:
        columns, ranks = dy.shape[1] // len(enable_lora), lora_B.shape[1]
        tiles = tiles_for(dy.device, dy.dtype, columns)
        tile = tiles.adapter_grad[rank_block(ranks)]
        if tiles is HOPPER and columns >= FEWEST_WIDE_COLUMNS and ranks <= MOST_WIDE_RANKS:
            tile = WIDE
        db, dyb, start = _prepared(
            dy, xa, lora_B, None, tile, torch.float32, enable_lora, transposed=False, followed=overlaps
        )
        assert dyb is not None
        start()
        return reduce(dyb, dy.dtype, scaling, (db, dtype), beside=overlaps)
    dyb = None if lora_B is None else compute_panel(dy, lora_B, scaling, None, enable_lora)[0]
    return dyb, prepared_grads(dy, xa, None, None, None, dtype, enable_lora)()[1]


def prepared_grads(
    dy: Tensor,
    xa: Tensor | None,
    dyb: Tensor | None,
    x: Tensor | None,
    bits: Tensor | None,
    dtype: torch.dtype,
    enable_lora: Sequence[bool] = (True,),
    *,
    beside: bool = False,
) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
    """What computes da [R, K] where x and dyb are given, and db [N, R] where xa is, both in `dtype`.

    Their partial sums have their memory already. beside: it is called after `grad_input`, which is followed, and its
    launches begin while that one runs; so is their sum launched while they run. Memory that came later could be another
    thread's, whose launch came in between.
    """
    partial_db = partial_da = None
    starts = []
    if xa is not None:
        I, R = dy.shape[1] // len(enable_lora), xa.shape[1] // sum(enable_lora)
        if dy.numel() == 0:
            partial_db = xa.new_zeros((1, sum(enable_lora) * I, R), dtype=dtype)
        else:
            tile = tiles_for(dy.device, dy.dtype, I).adapter_grad[rank_block(R)]
            partial_db, _, start = _prepared(
                dy, xa, None, None, tile, dtype, enable_lora, transposed=False, beside=beside, followed=beside
            )
            starts.append(start)
    if x is not None and dyb is not None:
        if x.numel() == 0:
            partial_da = x.new_zeros((1, dyb.shape[1], x.shape[1]), dtype=dtype)
        else:
            tiles = tiles_for(x.device, x.dtype, x.shape[1])
            tile = (tiles.adapter_grad if bits is None else tiles.grad_lora_A)[rank_block(dyb.shape[1])]
            partial_da, _, start = _prepared(
                x, dyb, None, bits, tile, dtype, transposed=True, beside=beside, followed=beside
            )
            starts.append(start)

    def compute() -> tuple[Tensor | None, Tensor | None]:
        for start in starts:
            start()
        if partial_da is not None and partial_db is not None and len(partial_da) > 1 and len(partial_db) > 1:
            return reduce(partial_da, dtype, 1.0, (partial_db, dtype), beside=beside)
        return _whole(partial_da, dtype, beside), _whole(partial_db, dtype, beside)

    return compute


def _whole(partials: Tensor | None, dtype: torch.dtype, beside: bool) -> Tensor | None:
    if partials is None or len(partials) == 1:
        return None if partials is None else partials[0]
    return reduce(partials, dtype, beside=beside)[0]


def grad_lora_A(dyb: Tensor, x: Tensor, bits: Tensor | None, dtype: torch.dtype) -> Tensor:
    """da [R, K] in `dtype`, of dyb [M, R] and x [M, K]."""
    da, _ = prepared_grads(x, None, dyb, x, bits, dtype)()
    assert da is not None
    return da
