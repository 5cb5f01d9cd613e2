"""A forward without a mask whose tiles all run at once, and its panel: y = x @ w.T + panel @ b.T + bias.

Every tile computes the panel of its own rows, scale * x @ a.T, beside its own product, from the x that passes by
anyway. That costs a tenth of the whole; in a kernel of its own the panel would take longer, as another read of x.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._accumulate import accumulate
from ._place import GROUP_M, place
from ._slices import enabled_among, enabled_slice, slice_arguments
from .config import INTERPRETER, LinearTile, capability, processors, rank_block, read_ahead
from .launch import (
    Described,
    Plan,
    cdiv,
    describable,
    input_precision,
    launch,
    launch_again,
    plan_of,
    stated_work,
    strides,
)

# Of all slices; the panel of more would not fit in registers beside the tile.
MOST_RANKS = 64
# On Hopper, measured for these rows and outputs, from narrow to wide.
AT_ONCE = LinearTile(64, 128, 64, 4, 6, descriptors=True), LinearTile(64, 256, 64, 4, 4, descriptors=True)
FEW_ROWS, MOST_OUTPUTS = 512, 2048


def _work(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    x, lora_A, weight, out = (
        getattr(args[name], "base", args[name]) for name in ("x_ptr", "lora_A_ptr", "weight_ptr", "out_ptr")
    )
    flops = 2.0 * x.numel() * (args["N"] + args["RANKS"])
    moved = x, weight, lora_A, args["lora_B_ptr"], out, args["panel_ptr"]
    return stated_work("own_panel", flops, *moved, dtype=x.dtype)


@triton.jit
def _factor(lora_B_ptr, stride_bn, stride_br, first_column, ranks, N, R, COLUMNS: tl.constexpr):
    """So many columns of lora_B [N, R] transposed, from the first one on."""
    columns = first_column.to(tl.int64) + tl.arange(0, COLUMNS)
    ptrs = lora_B_ptr + ranks[:, None].to(tl.int64) * stride_br + columns[None, :] * stride_bn
    return tl.load(ptrs, mask=(ranks < R)[:, None] & (columns < N)[None, :], other=0.0)


@triton.jit(launch_metadata=_work, do_not_specialize=["M", "R"])
def _own_panel_kernel(
    x_ptr,  # a descriptor of [M, K]
    weight_ptr,  # a descriptor of [N, K], or of its transpose if TRANSPOSED
    lora_A_ptr, stride_ar, stride_ak,  # [RANKS, K], a descriptor if DESCRIBED
    lora_B_ptr, stride_bn, stride_br,  # [enabled * WIDTH, R]
    bias_ptr, stride_bias,  # [N]
    out_ptr,  # a descriptor of [M, N]
    panel_ptr, stride_pm, stride_pr,  # [M, RANKS]
    scale,
    M, N, K, R, RANKS,  # R ranks in each slice, RANKS in all
    WIDTH, SLICES: tl.constexpr, ENABLED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, DESCRIBED: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner, ranks = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    HALF: tl.constexpr = BLOCK_N // 2
    QUARTER: tl.constexpr = BLOCK_N // 4
    if AHEAD:
        # On their way while the main loop runs.
        column = tile_n * BLOCK_N
        ahead = (
            _factor(lora_B_ptr, stride_bn, stride_br, column, ranks, N, R, QUARTER),
            _factor(lora_B_ptr, stride_bn, stride_br, column + QUARTER, ranks, N, R, QUARTER),
            _factor(lora_B_ptr, stride_bn, stride_br, column + HALF, ranks, N, R, QUARTER),
            _factor(lora_B_ptr, stride_bn, stride_br, column + HALF + QUARTER, ranks, N, R, QUARTER),
        )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = x_ptr.load([tile_m * BLOCK_M, start])
        if TRANSPOSED:
            weight = weight_ptr.load([start, tile_n * BLOCK_N])
        else:
            weight = weight_ptr.load([tile_n * BLOCK_N, start]).T
        if DESCRIBED:
            factor = lora_A_ptr.load([0, start]).T
        else:
            in_factor = ranks[None, :] < RANKS
            if not EVEN_K:
                in_factor = in_factor & (inner[:, None] < K - start)
            A_ptrs = (
                lora_A_ptr + ranks[None, :].to(tl.int64) * stride_ar + (start + inner)[:, None].to(tl.int64) * stride_ak
            )
            factor = tl.load(A_ptrs, mask=in_factor, other=0.0).to(x.dtype)
        acc = accumulate(x, weight, acc, PRECISION)
        sums = accumulate(x, factor, sums, PRECISION)
    panel = (sums * scale).to(panel_ptr.dtype.element_ty)
    if tile_n == 0:
        panel_ptrs = panel_ptr + rows[:, None] * stride_pm + ranks[None, :] * stride_pr
        tl.store(panel_ptrs, panel, mask=(rows < M)[:, None] & (ranks < RANKS)[None, :])

    last_column = tl.minimum((tile_n + 1) * BLOCK_N, N) - 1
    first, last = enabled_among(tile_n * BLOCK_N, last_column, WIDTH, SLICES, ENABLED)
    halves = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
    for half in tl.static_range(2):
        quarters = halves[half].reshape(BLOCK_M, 2, QUARTER).permute(0, 2, 1).split()
        for quarter in tl.static_range(2):
            first_column = tile_n * BLOCK_N + half * HALF + quarter * QUARTER
            columns = first_column.to(tl.int64) + tl.arange(0, QUARTER)
            # Unrolled, or on the main loop's accumulator, it would serialise all matrix instructions (triton 3.6).
            update = tl.zeros((BLOCK_M, QUARTER), tl.float32)
            for e in tl.range(first, tl.where(R > 0, last, first), num_stages=1):
                slice = enabled_slice(e, SLICES, ENABLED)
                in_slice = (columns >= slice * WIDTH) & (columns < (slice + 1) * WIDTH)
                own_ranks = ranks - e * R
                in_ranks = (own_ranks >= 0) & (own_ranks < R)
                if AHEAD:
                    # Selected here, or the compiler would copy it to shared memory before the main loop.
                    factor = tl.where(in_ranks[:, None], ahead[2 * half + quarter], 0.0)
                else:
                    rows_of_B = columns + (e - slice).to(tl.int64) * WIDTH
                    B_ptrs = lora_B_ptr + own_ranks[:, None].to(tl.int64) * stride_br + rows_of_B[None, :] * stride_bn
                    factor = tl.load(B_ptrs, mask=in_ranks[:, None] & in_slice[None, :], other=0.0)
                # What is not finite in one slice must not meet a zero of another.
                own_panel = tl.where(in_ranks[None, :], panel, tl.zeros_like(panel))
                own = accumulate(own_panel, factor.to(panel.dtype), tl.zeros((BLOCK_M, QUARTER), tl.float32), PRECISION)
                update = tl.where(in_slice[None, :], own, update)
            part = quarters[quarter] + update
            if bias_ptr is not None:
                part += tl.load(bias_ptr + columns * stride_bias, mask=columns < N, other=0.0).to(tl.float32)[None, :]
            out_ptr.store([tile_m * BLOCK_M, first_column], part.to(out_ptr.dtype))


def tile_of(device: torch.device, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> LinearTile | None:
    """The tile for x [rows, inputs] and y [rows, outputs]; None where this takes more time than a panel and a GEMM."""
    if dtype.itemsize != 2 or inputs % 16 != 0 or outputs % 16 != 0:
        return None
    if device.type == "cpu":
        # So that tests of layers come this way and the other.
        return INTERPRETER.linear if 1 < cdiv(outputs, INTERPRETER.linear.block_j) <= 3 else None
    return fitted(capability(device), processors(device), rows, outputs)


def fitted(capability: int, processors: int, rows: int, outputs: int) -> LinearTile | None:
    """Of 16-bit numbers and sizes that are multiples of 16, on a GPU with so many multiprocessors."""
    if capability != 90 or rows <= FEW_ROWS or outputs > MOST_OUTPUTS:
        return None
    for tile in AT_ONCE:
        if 3 * processors // 4 <= cdiv(rows, tile.block_m) * cdiv(outputs, tile.block_j) <= processors:
            return tile
    return None


def takes(x: Tensor, weight: Tensor, lora_A: Tensor) -> bool:
    """Whether the kernel can read these, and their panel fits beside its tile."""
    return (
        x.numel() > 0
        and 0 < len(lora_A) <= MOST_RANKS
        and describable(x)
        and describable(weight if weight.stride(1) == 1 else weight.t())
    )


def _found_by(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    enable_lora: Sequence[bool],
    tile: LinearTile,
) -> tuple[dict[str, Tensor | None], tuple[Hashable, ...]]:
    """The tensors and facts by which `launch` finds a plan."""
    tensors = {"x_ptr": x, "weight_ptr": weight, "lora_A_ptr": lora_A, "lora_B_ptr": lora_B, "bias_ptr": bias}
    return tensors, (tile, input_precision(x.dtype), scale, *enable_lora)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    tile: LinearTile,
    enable_lora: Sequence[bool] = (True,),
) -> tuple[Tensor, Tensor]:
    """y [M, N] and its panel xa [M, enabled * R], of what `takes` holds for."""
    (M, K), N, RANKS, R = x.shape, weight.shape[0], lora_A.shape[0], lora_B.shape[1]
    out, panel = x.new_empty((M, N)), x.new_empty((M, RANKS))
    transposed = weight.stride(1) != 1
    weight_block = [tile.block_i, tile.block_j] if transposed else [tile.block_j, tile.block_i]
    described = {
        "x_ptr": (x, [tile.block_m, tile.block_i]),
        "weight_ptr": (weight.t() if transposed else weight, weight_block),
        "out_ptr": (out, [tile.block_m, tile.block_j // 4]),
    }
    if _described(lora_A, x):
        described["lora_A_ptr"] = lora_A, [rank_block(RANKS), tile.block_i]

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        # Other slices' factors would have no registers left.
        ahead = len(enable_lora) == 1 and read_ahead(rank_block(RANKS), tile.block_j, lora_B.dtype, tile.num_warps)
        return (cdiv(M, tile.block_m) * cdiv(N, tile.block_j),), dict(
            **strides("ar ak", lora_A),
            **strides("bn br", lora_B),
            **strides("bias", bias),
            **strides("pm pr", panel),
            scale=scale,
            M=M, N=N, K=K, R=R, RANKS=RANKS, WIDTH=N // len(enable_lora), **slice_arguments(enable_lora),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_j, BLOCK_K=tile.block_i, BLOCK_R=rank_block(RANKS),
            GROUP_M=GROUP_M, EVEN_K=K % tile.block_i == 0, DESCRIBED="lora_A_ptr" in described,
            TRANSPOSED=transposed, PRECISION=input_precision(x.dtype), AHEAD=ahead,
            num_warps=tile.num_warps, enable_fp_fusion=True,
            # What is converted on its way takes more shared memory.
            num_stages=tile.num_stages if "lora_A_ptr" in described else max(1, tile.num_stages - 1),
        )  # fmt: skip

    given = _found_by(x, weight, bias, lora_A, lora_B, scale, enable_lora, tile)
    launch(_own_panel_kernel, *given, arguments, {"panel_ptr": panel}, described)
    return out, panel


def _described(lora_A: Tensor, x: Tensor) -> bool:
    """Whether the copy engine reads lora_A, which it does not convert."""
    return lora_A.dtype == x.dtype and describable(lora_A)


class ForwardAgain:
    """y of a `forward` that was launched before, for other tensors of the same kind, as in decode_launch.py."""

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        rows: Tensor,
        weight: Tensor,
        lora_A: Tensor,
    ) -> None:
        self.plan = plan
        self.out_shape, self.panel_shape = (*x.shape[:-1], len(weight)), (len(rows), len(lora_A))
        self.x_layout = tuple(rows.shape), rows.stride()
        self.out_layout = (len(rows), len(weight)), (len(weight), 1)
        stored = weight if weight.stride(1) == 1 else weight.t()
        self.weight_layout = tuple(stored.shape), stored.stride()
        self.lora_A_layout = (tuple(lora_A.shape), lora_A.stride()) if _described(lora_A, x) else None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        out, panel = x.new_empty(self.out_shape), x.new_empty(self.panel_shape)
        described = (
            Described(x, *self.x_layout),
            Described(weight, *self.weight_layout),
            Described(out, *self.out_layout),
        )
        factor = [] if self.lora_A_layout is None else [Described(lora_A, *self.lora_A_layout)]
        launch_again(self.plan, [x, weight, lora_A, lora_B, bias, panel], [*described, *factor])
        return out


def forward_again(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    enable_lora: Sequence[bool],
) -> ForwardAgain | None:
    """For tensors like these; None if `forward` has launched nothing for such, as nothing is in the interpreter."""
    rows = x.flatten(0, -2)
    (M, K), N = rows.shape, len(weight)
    tile = tile_of(x.device, x.dtype, M, K, N)
    if tile is None:
        return None
    plan = plan_of(_own_panel_kernel, *_found_by(rows, weight, bias, lora_A, lora_B, scale, enable_lora, tile))
    return None if plan is None else ForwardAgain(plan, x, rows, weight, lora_A)
