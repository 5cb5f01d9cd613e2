"""A LoRA layer's forward, or its backward to x, in one launch: a product and its low-rank term.

forward   y  = x @ w.T + (scale * (keep * x) @ a.T) @ b.T + bias
backward  dx = dy @ w  + keep * (scale * dy @ b) @ a          with dy for x, w.T for w, b.T for a, a.T for b

Few rows are bound by reading w, and each further launch costs a good part of the whole layer; with many, the panel is
computed where the last wave of tiles leaves multiprocessors idle. The first programs compute the panel, the product in
brackets, each over a part of the contraction; the last of a tile's to arrive adds the parts up in a fixed order. All
other programs stream w meanwhile, each for its own columns of out, and wait for the panel only before their last, small
product. Nothing can hang: who is waited for has the lowest program ids, is started first, and waits for nobody. The
last program to see the panel leaves the flags as they were found, at zero. Of a large output the first tiles alone may
be computed, beside the panel of all rows: first_wave.py.

Without dropout a row's bits do not depend on other rows, nor, with the same tiles, on how many there are.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._accumulate import accumulate
from ._dropout import bit_ptrs, draw_tile, in_bits, kept, unpacked
from ._place import place
from ._slices import enabled_among, enabled_slice
from .launch import cdiv, stated_work


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    x, out, factors = args["x_ptr"], args["out_ptr"], (args["lora_A_ptr"], args["lora_B_ptr"])
    tiles = cdiv(len(x), args["BLOCK_M"]) * cdiv(args["N"], args["BLOCK_N"])
    share = (args["first_tiles"] or tiles) / tiles
    flops = 2.0 * len(x) * (share * (x.shape[1] * args["N"] + factors[1].numel()) + factors[0].numel())
    others = (args["weight_ptr"], *factors, args["bias_ptr"], args["drawn_ptr"], args["bits_ptr"])
    return stated_work("decode", flops, x, *others, out[: round(share * len(out))], dtype=x.dtype)


@triton.jit
def _produce(
    x_ptr, stride_xm, stride_xk,
    lora_A_ptr, stride_ar, stride_ak,
    drawn_ptr, stride_dm,
    seed_ptr, threshold, row_offset, column_offset,
    parts_ptr, panel_ptr, ready_ptr, arrived_ptr,
    scale,
    M, K, RANKS,
    tile, part,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of K of a tile of the panel; the last to arrive adds them up. Draws the mask if there is a seed."""
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = (rows < M)[:, None]
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), PARTS)
    first = part * steps * BLOCK_K
    last = tl.minimum(first + steps * BLOCK_K, K)
    # Below 2**31 it comes in 32 bits, of which sums need the last one.
    first_column = column_offset.to(tl.uint32) if column_offset.dtype == tl.int32 else column_offset
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start_r in range(0, RANKS, BLOCK_R):
        ranks = start_r + tl.arange(0, BLOCK_R)
        in_ranks = (ranks < RANKS)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in range(first, last, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K).to(tl.int64)
            in_x, in_A = in_rows, in_ranks
            if not EVEN_K:
                in_x = in_x & (inner < K)[None, :]
                in_A = in_A & (inner < K)[:, None]
            x = tl.load(x_ptr + rows[:, None] * stride_xm + inner[None, :] * stride_xk, mask=in_x, other=0.0)
            if seed_ptr is not None:
                keep, bits = draw_tile(
                    seed, threshold, rows + row_offset, first_column + start, BLOCK_M, BLOCK_K, ALIGNED
                )  # fmt: skip
                # The first piece of the ranks stores the bits for all of them.
                ptrs = bit_ptrs(drawn_ptr, stride_dm, rows, start, BLOCK_K)
                tl.store(ptrs, bits, mask=in_bits(rows, start, tl.where(start_r == 0, M, 0), K, BLOCK_K))
                x = kept(keep, x)
            A_ptrs = lora_A_ptr + ranks[None, :].to(tl.int64) * stride_ar + inner[:, None] * stride_ak
            factor = tl.load(A_ptrs, mask=in_A, other=0.0)
            acc = accumulate(x, factor.to(x.dtype), acc, PRECISION)
        part_ptrs = parts_ptr + (part.to(tl.int64) * M + rows[:, None]) * RANKS + ranks[None, :]
        tl.store(part_ptrs, acc, mask=in_rows & in_ranks)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == PARTS - 1:
        # All parts of a piece are read at once, which takes registers.
        SUM_R: tl.constexpr = min(BLOCK_R, 16384 // (BLOCK_M * triton.next_power_of_2(PARTS)))
        for start_r in range(0, RANKS, SUM_R):
            ranks = start_r + tl.arange(0, SUM_R)
            inside = in_rows & (ranks < RANKS)[None, :]
            places = rows[:, None] * RANKS + ranks[None, :]
            total = tl.zeros((BLOCK_M, SUM_R), tl.float32)
            for p in tl.static_range(PARTS):
                ptrs = parts_ptr + tl.full((), p, tl.int64) * M * RANKS + places
                total += tl.load(ptrs, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(panel_ptr + places, (total * scale).to(panel_ptr.dtype.element_ty), mask=inside)
        tl.store(arrived_ptr, 0)
        tl.debug_barrier()
        tl.atomic_add(ready_ptr, 1, sem="release")


@triton.jit
def _factor(
    lora_B_ptr, stride_bn, stride_br,
    step, first, last, columns,
    N, R,
    WIDTH, SLICES: tl.constexpr, ENABLED: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr,
):  # fmt: skip
    """The piece of lora_B that a step multiplies by, its columns in the panel, and which of these exist."""
    e = first + step // RANK_STEPS
    inside = columns - enabled_slice(e, SLICES, ENABLED).to(tl.int64) * WIDTH
    in_slice = (inside >= 0) & (inside < WIDTH) & (columns < N)
    ranks = step % RANK_STEPS * BLOCK_R + tl.arange(0, BLOCK_R)
    in_ranks = ranks < tl.where(e < last, R, 0)
    B_ptrs = lora_B_ptr + (inside + e.to(tl.int64) * WIDTH)[None, :] * stride_bn
    B_ptrs += ranks[:, None].to(tl.int64) * stride_br
    factor = tl.load(B_ptrs, mask=in_ranks[:, None] & in_slice[None, :], other=0.0)
    return factor, e * R + ranks, in_ranks


@triton.jit
def _finish(
    acc,
    factor, ranks, in_ranks, first, last,
    lora_B_ptr, stride_bn, stride_br,
    bias_ptr, stride_bias,
    out_ptr, stride_om,
    bits_ptr, stride_bm,
    panel_ptr, ready_ptr, seen_ptr,
    rows, columns, tile_n, panel_tiles, finishers,
    M, N, R, RANKS,
    WIDTH, SLICES: tl.constexpr, ENABLED: tl.constexpr, SLICE_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr,
    PRECISION: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Waits for the panel, adds the low-rank product, masked if there are bits, and the bias to acc, and stores."""
    in_rows = (rows < M)[:, None]
    # Beside a factor that is read ahead there are no registers for it before the wait.
    LATE: tl.constexpr = AHEAD and RANK_STEPS > 0
    if bias_ptr is not None and not LATE:
        acc += tl.load(bias_ptr + columns * stride_bias, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if RANK_STEPS > 0:
        if not AHEAD:
            # Read while the panel may not be ready yet.
            factor, ranks, in_ranks = _factor(
                lora_B_ptr, stride_bn, stride_br, 0, first, last, columns,
                N, R, WIDTH, SLICES, ENABLED, BLOCK_R, RANK_STEPS,
            )  # fmt: skip
        ready = tl.atomic_add(ready_ptr, 0, sem="acquire")
        while ready < panel_tiles:
            ready = tl.atomic_add(ready_ptr, 0, sem="acquire")
        tl.debug_barrier()
        panel_row_ptrs = panel_ptr + rows[:, None] * RANKS
        in_panel = in_rows & in_ranks[None, :]
        panel = tl.load(panel_row_ptrs + ranks[None, :], mask=in_panel, other=0.0, cache_modifier=".cg")
        # Who counts has left the wait, who resets has all counts, and nobody reads the flags after that.
        if tl.atomic_add(seen_ptr, 1, sem="relaxed") == finishers - 1:
            tl.store(ready_ptr, 0)
            tl.store(seen_ptr, 0)
        if bias_ptr is not None and LATE:
            acc += tl.load(bias_ptr + columns * stride_bias, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        base = acc
        if bits_ptr is not None:
            acc = tl.zeros_like(acc)
        if AHEAD:
            # The compiler does not know that this is always so. It would copy the factor to shared memory before the
            # main loop, and wait for it there.
            factor = tl.where(ready >= panel_tiles, factor, 0.0)
        acc = accumulate(panel, factor.to(panel.dtype), acc, PRECISION)
        for step in tl.range(1, SLICE_STEPS * RANK_STEPS, num_stages=1):
            factor, ranks, in_ranks = _factor(
                lora_B_ptr, stride_bn, stride_br, step, first, last, columns,
                N, R, WIDTH, SLICES, ENABLED, BLOCK_R, RANK_STEPS,
            )  # fmt: skip
            in_panel = in_rows & in_ranks[None, :]
            panel = tl.load(panel_row_ptrs + ranks[None, :], mask=in_panel, other=0.0, cache_modifier=".cg")
            acc = accumulate(panel, factor.to(panel.dtype), acc, PRECISION)
        if bits_ptr is not None:
            ptrs = bit_ptrs(bits_ptr, stride_bm, rows, tile_n.to(tl.int64) * BLOCK_N, BLOCK_N)
            in_mask = in_bits(rows, tile_n.to(tl.int64) * BLOCK_N, M, N, BLOCK_N)
            keep = unpacked(tl.load(ptrs, mask=in_mask, other=0), BLOCK_M, BLOCK_N)
            acc = base + tl.where(keep, acc, 0.0)
    out_ptrs = out_ptr + rows[:, None] * stride_om + columns[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_rows & (columns < N)[None, :])


@triton.jit(
    launch_metadata=_work,
    do_not_specialize=["M", "first_tiles", "stride_dm", "stride_bm", "threshold", "row_offset", "column_offset"],
)
def decode_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    weight_ptr, stride_wn, stride_wk,  # [N, K]
    x_descriptor, weight_descriptor,  # of the same, or None each
    lora_A_ptr, stride_ar, stride_ak,  # [enabled * R, K]
    lora_B_ptr, stride_bn, stride_br,  # [enabled * WIDTH, R]
    bias_ptr, stride_bias,  # [N]
    out_ptr, stride_om,  # [M, N]
    drawn_ptr, stride_dm,  # bits of the mask on x for the panel, [M, cdiv(K, 8)], drawn here if there is a seed
    seed_ptr, threshold, row_offset, column_offset,
    bits_ptr, stride_bm,  # bits of the mask on the low-rank term, [M, cdiv(N, 8)], or None
    kept_panel_ptr,  # [M, RANKS], or None: then it is in the workspace
    workspace_ptr,  # [tiles of out, SPLITS, BLOCK_M, BLOCK_N] if SPLITS > 1, [PARTS, M, RANKS], the panel
    flags_ptr,  # tiles of the panel that are ready, tiles of out that saw it; arrivals at each of both
    scale,
    M, N, K, R, RANKS,  # R ranks in each slice, RANKS in all
    first_tiles,  # how many of out's tiles are computed, or None for all
    WIDTH, SLICES: tl.constexpr, ENABLED: tl.constexpr, SLICE_STEPS: tl.constexpr,
    PARTS: tl.constexpr, PANEL_ROWS: tl.constexpr, PANEL_K: tl.constexpr, PANEL_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    panel_tiles = tl.cdiv(M, PANEL_ROWS)
    producers = panel_tiles * PARTS if RANK_STEPS > 0 else 0
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    parts_ptr = workspace_ptr
    if SPLITS > 1:
        parts_ptr += tiles_m.to(tl.int64) * tiles_n * (SPLITS * BLOCK_M * BLOCK_N)
    panel_ptr = kept_panel_ptr
    if kept_panel_ptr is None:
        after_parts = parts_ptr + tl.full((), PARTS, tl.int64) * M * RANKS
        panel_ptr = after_parts.to(tl.pointer_type(out_ptr.dtype.element_ty))
    if program < producers:
        _produce(
            x_ptr, stride_xm, stride_xk,
            lora_A_ptr, stride_ar, stride_ak,
            drawn_ptr, stride_dm,
            seed_ptr, threshold, row_offset, column_offset,
            parts_ptr, panel_ptr, flags_ptr, flags_ptr + 2 + program // PARTS,
            scale,
            M, K, RANKS,
            program // PARTS, program % PARTS,
            PARTS, PANEL_ROWS, PANEL_K, PANEL_R, EVEN_K, ALIGNED, PRECISION,
        )  # fmt: skip
    else:
        tile = (program - producers) // SPLITS
        split = (program - producers) % SPLITS
        tile_m, tile_n = place(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows, in_columns = (rows < M)[:, None], (columns < N)[None, :]
        steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
        first = split * steps * BLOCK_K
        last = tl.minimum(first + steps * BLOCK_K, K)
        inner = first + tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + rows[:, None] * stride_xm + inner[None, :].to(tl.int64) * stride_xk
        weight_ptrs = weight_ptr + columns[None, :] * stride_wn + inner[:, None].to(tl.int64) * stride_wk
        step = tl.full((), BLOCK_K, tl.int64)
        factor, ranks, in_ranks, first_slice, last_slice = None, None, None, None, None
        if RANK_STEPS > 0:
            last_column = tl.minimum((tile_n + 1) * BLOCK_N, N) - 1
            first_slice, last_slice = enabled_among(tile_n * BLOCK_N, last_column, WIDTH, SLICES, ENABLED)
            if AHEAD:
                # The first piece is on its way while the weight is.
                factor, ranks, in_ranks = _factor(
                    lora_B_ptr, stride_bn, stride_br, 0, first_slice, last_slice, columns,
                    N, R, WIDTH, SLICES, ENABLED, BLOCK_R, RANK_STEPS,
                )  # fmt: skip
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(first, last, BLOCK_K):
            in_x, in_weight = in_rows, in_columns
            if not EVEN_K:
                in_x = in_x & (start + tl.arange(0, BLOCK_K) < K)[None, :]
                in_weight = in_weight & (start + tl.arange(0, BLOCK_K) < K)[:, None]
            if x_descriptor is not None:
                x = x_descriptor.load([tile_m * BLOCK_M, start])
            else:
                x = tl.load(x_ptrs, mask=in_x, other=0.0)
                x_ptrs += step * stride_xk
            if weight_descriptor is not None:
                weight = weight_descriptor.load([tile_n * BLOCK_N, start]).T
            else:
                if EVEN_K and EVEN_N:
                    weight = tl.load(weight_ptrs, eviction_policy="evict_first")
                else:
                    weight = tl.load(weight_ptrs, mask=in_weight, other=0.0, eviction_policy="evict_first")
                weight_ptrs += step * stride_wk
            acc = accumulate(x, weight, acc, PRECISION)

        arrivals = tl.full((), SPLITS - 1, tl.int32)
        if SPLITS > 1:
            places = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            split_ptrs = workspace_ptr + tile.to(tl.int64) * (SPLITS * BLOCK_M * BLOCK_N) + places
            tl.store(split_ptrs + split * (BLOCK_M * BLOCK_N), acc)
            tl.debug_barrier()
            arrived_ptr = flags_ptr + 2 + panel_tiles + tile
            arrivals = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
            if arrivals == SPLITS - 1:
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for s in tl.static_range(SPLITS):
                    acc += tl.load(split_ptrs + s * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
                tl.store(arrived_ptr, 0)
        if arrivals == SPLITS - 1:
            _finish(
                acc,
                factor, ranks, in_ranks, first_slice, last_slice,
                lora_B_ptr, stride_bn, stride_br,
                bias_ptr, stride_bias,
                out_ptr, stride_om,
                bits_ptr, stride_bm,
                panel_ptr, flags_ptr, flags_ptr + 1,
                rows, columns, tile_n, panel_tiles, tiles_m * tiles_n if first_tiles is None else first_tiles,
                M, N, R, RANKS,
                WIDTH, SLICES, ENABLED, SLICE_STEPS, BLOCK_M, BLOCK_N, BLOCK_R, RANK_STEPS, PRECISION, AHEAD,
            )  # fmt: skip
