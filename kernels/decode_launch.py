"""The launch of decode.py's kernel: the first one, and again for inputs of the same kind."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._place import GROUP_M
from ._slices import slice_arguments
from .config import rank_block, read_ahead
from .decode import decode_kernel
from .decode_tiles import DecodeTile
from .flags import flags_for
from .launch import (
    Described,
    Dropout,
    Plan,
    cdiv,
    describable,
    dropout_arguments,
    dropout_facts,
    input_precision,
    launch,
    launch_again,
    plan_of,
    strides,
)

# Ranks that an output tile adds in a step, and that one of many elements, or whose factor is wide, does beside its
# registers. A panel's piece of more has few registers left, and of more rows than FEW_PANEL_ROWS none for a factor that
# is read across its rows.
RANK_STEP = 64
WIDE_RANK_STEP = 32
WIDE = 128 * 64
GROUP_M_ALONE = 32
FEW_ROWS = 128
# Beside a factor that is read ahead the compiler keeps every address of two operands of more rows, instead of making
# them from two in each step.
MOST_ROWS_AHEAD = 64
FEW_PANEL_ROWS = 32
# Elements of a mask that a warp draws at once.
MOST_DRAWN = 1024


def _panel_k(tile: DecodeTile, ranks: int, x: Tensor, lora_A: Tensor, dropout: Dropout | None) -> int:
    """The panel's step over K: the tile's, or less.

    Wide factors would take more shared memory than the output, and a mask drawn at once more registers than there are,
    as would addresses in a factor whose rows are not contiguous, and converting a wide one.
    """
    wide, element = ranks > RANK_STEP, x.element_size()
    if wide and lora_A.dtype != x.dtype:
        panel_k = min(tile.panel_k, 32)
    elif lora_A.stride(1) != 1 or (wide and dropout is not None):
        panel_k = min(tile.panel_k, 64)
    else:
        panel_k = tile.panel_k
    of_output = (tile.block_m + tile.block_n) * tile.block_k * element
    while panel_k > 16 and (tile.panel_rows * element + ranks * lora_A.element_size()) * panel_k > of_output:
        panel_k //= 2
    if dropout is not None:
        # Columns that start within a byte take two draws.
        most = MOST_DRAWN * tile.num_warps // (2 if dropout.column_offset % 8 else 1)
        while panel_k > 16 and tile.panel_rows * panel_k > most:
            panel_k //= 2
    return panel_k


def _panel_r(tile: DecodeTile, lora_A: Tensor) -> int:
    """Ranks of the panel's pieces; of many rows fewer where addresses in a factor would take the registers."""
    plain = lora_A.stride(1) == 1 or tile.panel_rows <= FEW_PANEL_ROWS
    return min(rank_block(len(lora_A)), tile.panel_ranks if plain else RANK_STEP)


def _block_r(tile: DecodeTile, lora_B: Tensor) -> int:
    """Ranks that a tile of the output adds at once."""
    room = not tile.ahead or read_ahead(RANK_STEP, tile.block_n, lora_B.dtype, tile.num_warps)
    narrow = room and tile.block_m * tile.block_n < WIDE
    return min(rank_block(lora_B.shape[1]), RANK_STEP if narrow else WIDE_RANK_STEP)


@lru_cache(maxsize=1024)
def _words(tile: DecodeTile, M: int, N: int, RANKS: int) -> tuple[int, int]:
    """How many numbers, float32, and flags a launch works in."""
    tiles, panel_tiles = cdiv(M, tile.block_m) * cdiv(N, tile.block_n), cdiv(M, tile.panel_rows)
    floats, flags = (tile.parts + 1) * M * RANKS, 2 + panel_tiles
    if tile.splits > 1:
        floats += tiles * tile.splits * tile.block_m * tile.block_n
        flags += tiles
    return floats, flags


def _described(tile: DecodeTile, x: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Whether the copy engine reads x, and whether the weight.

    It is slow past x's last row, and with few rows not worth having for the weight alone.
    """
    whole = len(x) % tile.block_m == 0
    of_weight = tile.descriptors and describable(weight) and (whole or len(x) > FEW_ROWS)
    return of_weight and whole and describable(x), of_weight


def _found_by(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    tile: DecodeTile,
    enable_lora: Sequence[bool],
    keep_panel: bool,
    dropout: Dropout | None,
    bits: Tensor | None,
    first: int | None = None,
) -> tuple[dict[str, Tensor | None], tuple[Hashable, ...]]:
    """The tensors and facts by which `launch` finds a plan."""
    tensors = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "lora_A_ptr": lora_A,
        "lora_B_ptr": lora_B,
        "seed_ptr": None if dropout is None else dropout.seed,
        "bits_ptr": bits,
    }
    return tensors, (tile, input_precision(x.dtype), scale, keep_panel, first, *dropout_facts(dropout), *enable_lora)


def decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    tile: DecodeTile,
    enable_lora: Sequence[bool] = (True,),
    *,
    dropout: Dropout | None = None,
    bits: Tensor | None = None,
    keep_panel: bool = True,
    first: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N], its panel xa [M, enabled * R] if kept, both in x's dtype, and the bits of the mask, [M, cdiv(K, 8)].

    Of x [M, K], weight [N, K], lora_A [enabled * R, K], lora_B [enabled * N / slices, R] and bias [N]. R may be 0: no
    term, and no panel. dropout: on x for the panel; 1/q is applied beside scale, and without it there are no bits.
    bits: of a mask on the low-rank term, [M, cdiv(N, 8)]. first: how many of y's tiles to compute, the first ones in
    fused_linear.py's order; None is all.
    """
    (M, K), N, RANKS, R = x.shape, weight.shape[0], lora_A.shape[0], lora_B.shape[1]
    out, panel = x.new_empty((M, N)), x.new_empty((M, RANKS)) if keep_panel else None
    drawn = None if dropout is None else x.new_empty((M, cdiv(K, 8)), dtype=torch.uint8)
    if M == 0 or N == 0:
        return out, panel, drawn
    if dropout is not None:
        scale /= dropout.keep_probability
    given = _found_by(x, weight, bias, lora_A, lora_B, scale, tile, enable_lora, keep_panel, dropout, bits, first)
    floats, flags = _words(tile, M, N, RANKS)
    descriptors: dict[str, tuple[Tensor, list[int]]] = {}
    of_x, of_weight = _described(tile, x, weight)
    if of_x:
        descriptors["x_descriptor"] = x, [tile.block_m, tile.block_k]
    if of_weight:
        descriptors["weight_descriptor"] = weight, [tile.block_n, tile.block_k]

    def arguments() -> tuple[tuple[int, ...], dict[str, Any]]:
        width, panel_r = N // len(enable_lora), _panel_r(tile, lora_A)
        touched = 1 if width % tile.block_n == 0 else min(sum(enable_lora), (tile.block_n - 2) // width + 2)
        block_r = _block_r(tile, lora_B)
        panel_k = _panel_k(tile, panel_r, x, lora_A, dropout)
        tiles = first or cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
        programs = tiles * tile.splits
        if R > 0:
            programs += cdiv(M, tile.panel_rows) * tile.parts
        return (programs,), dict(
            **strides("xm xk", x),
            **strides("wn wk", weight),
            **{name: None for name in ("x_descriptor", "weight_descriptor") if name not in descriptors},
            **strides("ar ak", lora_A),
            **strides("bn br", lora_B),
            **strides("bias", bias),
            stride_om=N,
            **strides("dm", drawn), **dropout_arguments(dropout),
            **strides("bm", bits),
            scale=scale,
            M=M, N=N, K=K, R=R, RANKS=RANKS, first_tiles=first,
            WIDTH=width, **slice_arguments(enable_lora), SLICE_STEPS=touched,
            PARTS=tile.parts, PANEL_ROWS=tile.panel_rows, PANEL_K=panel_k, PANEL_R=panel_r,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, SPLITS=tile.splits,
            BLOCK_R=block_r, RANK_STEPS=cdiv(R, block_r), GROUP_M=GROUP_M if first else GROUP_M_ALONE,
            EVEN_K=K % max(tile.block_k, panel_k) == 0, EVEN_N=N % tile.block_n == 0,
            PRECISION=input_precision(x.dtype), DEPENDENT=tile.dependent, launch_pdl=tile.dependent,
            AHEAD=tile.ahead and (of_weight or M <= MOST_ROWS_AHEAD),
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    made: dict[str, Tensor | None] = {
        "out_ptr": out,
        "drawn_ptr": drawn,
        "kept_panel_ptr": panel,
        "workspace_ptr": x.new_empty(floats, dtype=torch.float32),
        "flags_ptr": flags_for(x, flags),
    }
    launch(decode_kernel, *given, arguments, made, descriptors)
    return out, panel, drawn


class DecodeAgain:
    """y of a forward that `decode` launched before, without its panel, for other tensors of the same kind.

    The same kind: dtypes, shapes, strides, device and the addresses' alignment, and on that device. x may have other
    dimensions than the [M, K] of that launch if its elements lie alike; y has them too.
    """

    def __init__(self, plan: Plan, x: Tensor, rows: Tensor, weight: Tensor, lora_A: Tensor, tile: DecodeTile) -> None:
        self.plan, self.out_shape = plan, (*x.shape[:-1], len(weight))
        self.floats, self.flags = _words(tile, len(rows), len(weight), len(lora_A))
        self.of_x, self.of_weight = _described(tile, rows, weight)
        self.x_layout, self.weight_layout = (tuple(rows.shape), rows.stride()), (tuple(weight.shape), weight.stride())

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        out = x.new_empty(self.out_shape)
        workspace = x.new_empty(self.floats, dtype=torch.float32)
        flags = flags_for(x, self.flags)
        given = x, weight, bias, lora_A, lora_B, None, None, out, None, None, workspace, flags
        described = []
        if self.of_x:
            described.append(Described(x, *self.x_layout))
        if self.of_weight:
            described.append(Described(weight, *self.weight_layout))
        launch_again(self.plan, given, described)
        return out


def decode_again(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    tile: DecodeTile,
    enable_lora: Sequence[bool],
) -> DecodeAgain | None:
    """For tensors like these; None if `decode` has launched nothing for such, as nothing is in the interpreter."""
    rows = x.flatten(0, -2)
    given = _found_by(rows, weight, bias, lora_A, lora_B, scale, tile, enable_lora, False, None, None)
    plan = plan_of(decode_kernel, *given)
    return None if plan is None else DecodeAgain(plan, x, rows, weight, lora_A, tile)
