"""A forward without a mask whose panel takes no time of its own: y = x @ w.T + panel @ b.T + bias.

Where y's tiles would leave multiprocessors idle in their last wave, as many programs of the first wave compute the
panel, while the others compute the first tiles and wait for it only before their last, small product: decode.py's
kernel. fused_linear.py computes the other tiles, in whole waves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import capability, processors
from .decode_launch import decode
from .decode_tiles import DecodeTile
from .fused_linear import later_tiles
from .launch import cdiv, describable
from .lookup import tiles_for

# Measured on Hopper; of tiles as large as those of the other waves.
HOPPER = DecodeTile(128, 256, 64, 8, 4, panel_rows=256, panel_k=64, parts=1, descriptors=True, ahead=True)
INTERPRETER = DecodeTile(32, 64, 16, 4, 1, panel_rows=128, panel_k=16, parts=1, ahead=True)
# Of all slices; and beyond the first of these, no others than its multiples, since masks would take registers.
RANK_STEP, MOST_RANKS = 16, 64


def first_wave(
    device: torch.device, dtype: torch.dtype, rows: int, inputs: int, outputs: int, ranks: int
) -> DecodeTile | None:
    """The first wave's tile for x [rows, inputs] and y [rows, outputs]; None where this is no way to save time."""
    if not 0 < ranks <= MOST_RANKS or (ranks > RANK_STEP and ranks % RANK_STEP != 0):
        return None
    if device.type == "cpu":
        return INTERPRETER if fits(INTERPRETER, rows, outputs, processors(device)) else None
    if dtype.itemsize != 2 or inputs % 16 != 0 or outputs % 16 != 0 or capability(device) != 90:
        return None
    return HOPPER if fits(HOPPER, rows, outputs, processors(device)) else None


def fits(tile: DecodeTile, rows: int, outputs: int, processors: int) -> bool:
    """Whether y [rows, outputs] has several waves of tiles, and the panel room in the last one.

    Rows that fill no tile are left out, since the copy engine is slow past x's last row.
    """
    tiles = cdiv(rows, tile.block_m) * cdiv(outputs, tile.block_n)
    return rows % tile.block_m == 0 and tiles > processors and cdiv(rows, tile.panel_rows) <= -tiles % processors


def takes(x: Tensor, weight: Tensor, lora_A: Tensor) -> bool:
    """Whether the kernels can read these, and are known to be faster so than a panel and a GEMM."""
    (M, K), N = x.shape, len(weight)
    wave = first_wave(x.device, x.dtype, M, K, N, len(lora_A))
    if wave is None or not describable(x) or not describable(weight):
        return False
    other = tiles_for(x.device, x.dtype, K, N).linear
    return other.descriptors and (other.block_m, other.block_j) == (wave.block_m, wave.block_n)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    enable_lora: Sequence[bool] = (True,),
) -> tuple[Tensor, Tensor]:
    """y [M, N] and its panel xa [M, enabled * R], of what `takes` holds for."""
    (M, K), N = x.shape, len(weight)
    wave, other = first_wave(x.device, x.dtype, M, K, N, len(lora_A)), tiles_for(x.device, x.dtype, K, N).linear
    assert wave is not None
    first = processors(x.device) - cdiv(M, wave.panel_rows) * wave.parts
    y, xa, _ = decode(x, weight, bias, lora_A, lora_B, scale, wave, enable_lora, first=first)
    assert xa is not None
    later_tiles(x, weight, bias, xa, lora_B, enable_lora, y, other, first)
    return y, xa
