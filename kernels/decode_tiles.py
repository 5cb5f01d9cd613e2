"""Tiles of the decode kernel: a frozen table for each architecture, and the choice from it.

The tiles for up to so many rows stand from narrow to wide. That one is taken with which the programs of all tiles run
at once, beside those that compute the panel; if there is room left, K is split, for many ranks the panel's K rather
than the output's. The last ones serve more rows too. Where a mask is drawn for the panel, its K is cut for more
programs, room or not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

import torch

from .config import capability, filled, processors
from .launch import cdiv


@dataclass(frozen=True)
class DecodeTile:
    """A tile of the output and its step over K, in how many splits K is cut; rows, step and parts of K of the panel's.

    descriptors: whether the copy engine loads x and weight, where it can. dependent: whether a launch may begin before
    the one before it has ended, for which it waits itself. panel_ranks: of a piece of the panel, for which x is read
    once. held: programs that a multiprocessor holds at once. ahead: whether lora_B is read before the main loop.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    panel_rows: int
    panel_k: int
    parts: int
    splits: int = 1
    descriptors: bool = False
    dependent: bool = False
    panel_ranks: int = 64
    held: int = 1
    ahead: bool = False


Tiles = MappingProxyType[int, tuple[DecodeTile, ...]]

INTERPRETER = DecodeTile(16, 32, 16, 4, 1, panel_rows=16, panel_k=16, parts=2, splits=2, ahead=True)
IRREGULAR = DecodeTile(16, 32, 32, 8, 2, panel_rows=16, panel_k=32, parts=4)


def _by_rows(**tiles: tuple[DecodeTile, ...]) -> Tiles:
    return MappingProxyType({int(name.removeprefix("up_to_")): of for name, of in tiles.items()})


SAFE = _by_rows(
    up_to_16=(
        DecodeTile(16, 32, 128, 4, 4, panel_rows=16, panel_k=128, parts=4, splits=4),
        DecodeTile(16, 64, 128, 4, 4, panel_rows=16, panel_k=128, parts=4),
    ),
    up_to_64=(
        DecodeTile(64, 32, 64, 4, 4, panel_rows=64, panel_k=64, parts=4, splits=4),
        DecodeTile(64, 64, 64, 4, 4, panel_rows=64, panel_k=64, parts=4),
    ),
)

AMPERE = _by_rows(
    up_to_16=(
        DecodeTile(16, 32, 256, 4, 4, panel_rows=16, panel_k=128, parts=4, splits=4),
        DecodeTile(16, 128, 128, 4, 4, panel_rows=16, panel_k=128, parts=4),
    ),
    up_to_64=(
        DecodeTile(64, 32, 128, 4, 4, panel_rows=64, panel_k=64, parts=4, splits=4),
        DecodeTile(64, 128, 64, 8, 4, panel_rows=64, panel_k=64, parts=4),
    ),
)

HOPPER = _by_rows(
    up_to_16=(
        DecodeTile(16, 32, 256, 4, 5, panel_rows=16, panel_k=128, parts=4, splits=4, dependent=True),
        DecodeTile(16, 128, 128, 4, 4, panel_rows=16, panel_k=128, parts=4, dependent=True),
    ),
    up_to_32=(
        DecodeTile(32, 32, 128, 4, 7, panel_rows=32, panel_k=64, parts=4, splits=4, dependent=True),
        DecodeTile(32, 128, 128, 4, 4, panel_rows=32, panel_k=128, parts=4, dependent=True),
    ),
    up_to_64=(
        DecodeTile(64, 32, 128, 4, 7, 64, 64, parts=4, splits=4, descriptors=True, dependent=True),
        DecodeTile(64, 128, 64, 4, 5, 64, 64, parts=4, descriptors=True, dependent=True),
    ),
    up_to_128=(
        DecodeTile(64, 32, 128, 4, 7, 64, 128, parts=2, splits=4, descriptors=True, dependent=True),
        DecodeTile(64, 64, 128, 4, 6, 64, 128, parts=2, splits=4, descriptors=True),
        DecodeTile(128, 128, 64, 4, 6, 64, 128, parts=4, descriptors=True, dependent=True),
    ),
    up_to_256=(
        DecodeTile(64, 64, 128, 4, 6, 64, 128, parts=4, descriptors=True),
        DecodeTile(64, 128, 64, 4, 7, 64, 64, parts=1, descriptors=True),
        DecodeTile(128, 128, 64, 4, 6, 128, 64, parts=1, descriptors=True, dependent=True),
        DecodeTile(128, 256, 64, 8, 4, 64, 64, parts=4, descriptors=True, dependent=True),
    ),
    up_to_512=(
        DecodeTile(128, 64, 64, 4, 8, 64, 64, parts=4, descriptors=True, dependent=True),
        DecodeTile(64, 64, 64, 4, 6, 64, 64, parts=2, descriptors=True, held=2),
        DecodeTile(128, 128, 64, 4, 6, 128, 64, parts=1, descriptors=True, dependent=True),
        DecodeTile(128, 256, 64, 8, 4, 64, 64, parts=4, descriptors=True, dependent=True),
    ),
    up_to_1024=(
        DecodeTile(64, 128, 64, 4, 4, 64, 64, parts=2, descriptors=True, held=2),
        DecodeTile(128, 128, 64, 8, 3, 128, 64, parts=1, descriptors=True, dependent=True),
    ),
    up_to_2048=(DecodeTile(128, 256, 64, 8, 4, 256, 64, parts=1, descriptors=True, dependent=True),),
)

# Of up to MOST_MANY ranks without a mask, where two programs on a multiprocessor leave room for a panel that takes no
# longer than a tile; measured on Hopper.
FEWEST_MANY, MOST_MANY, FEWEST_ROWS_OF_MANY = 65, 128, 129
HOPPER_OF_MANY = _by_rows(
    up_to_256=(
        DecodeTile(64, 64, 128, 4, 6, 64, 128, parts=4, descriptors=True),
        DecodeTile(64, 64, 64, 4, 6, 64, 64, parts=8, descriptors=True, held=2),
        DecodeTile(64, 128, 64, 4, 4, 64, 64, parts=2, descriptors=True, held=2),
    ),
    up_to_512=(
        DecodeTile(128, 64, 64, 4, 8, 64, 64, parts=4, descriptors=True, dependent=True),
        DecodeTile(64, 64, 64, 4, 6, 64, 64, parts=4, descriptors=True, held=2),
        DecodeTile(64, 128, 64, 4, 4, 64, 64, parts=2, descriptors=True, held=2),
    ),
    up_to_1024=(DecodeTile(64, 128, 64, 4, 4, 64, 64, parts=2, descriptors=True, held=2),),
)

BLACKWELL = MappingProxyType({rows: tiles for rows, tiles in HOPPER.items() if rows <= 64})

TABLES = MappingProxyType({80: AMPERE, 90: HOPPER, 100: BLACKWELL})


# Measured on Hopper: with more ranks and rows than these, the panel takes longer than the halves of a tile's splits. It
# comes in so many parts then, each of so many rows and columns a step: up to so many rows, and beyond.
FEW_RANKS, FEWEST_ROWS_OF_PANELS, PARTS_OF_MANY = 32, 17, 8
FEWER_ROWS, PANEL_OF_FEWER, PANEL_OF_MORE = 64, (16, 64), (32, 128)
# And the panel is computed in pieces of so many ranks, if a thread of its programs holds no more sums than these.
PIECE_OF_MANY, SUMS_OF_A_THREAD = 128, 64

# Stages of this tile, without a mask, for up to so many steps over K.
STAGED_TILE, FEW_STEPS, FEW_STAGES = (32, 32), 16, 6

# And where a mask is drawn for the panel: rows from which that takes longer than reading the weight does in so few
# parts that these times the outputs are less than the last; then so many programs draw.
FEWEST_DRAWN_ROWS, DRAWING_PROGRAMS, HIDDEN_PARTS = 65, 64, 26_000


@lru_cache(maxsize=1024)
def decode_tile(
    device: torch.device, dtype: torch.dtype, rows: int, inputs: int, outputs: int, ranks: int, drawn: bool = False
) -> DecodeTile:
    """The tile for an input [rows, inputs], a panel [rows, ranks] and an output [rows, outputs].

    drawn: whether the panel's programs draw a mask.
    """
    if device.type == "cpu":
        return INTERPRETER
    if dtype.itemsize == 4 or inputs % 16 != 0 or outputs % 16 != 0:
        return IRREGULAR
    tile = fitted(capability(device), processors(device), rows, outputs, ranks, drawn)
    if capability(device) != 90:
        return tile
    if drawn:
        return tile if rows < FEWEST_DRAWN_ROWS else drawing(tile, processors(device), rows, inputs, outputs)
    few = cdiv(cdiv(inputs, tile.block_k), tile.splits) <= FEW_STEPS
    return replace(tile, num_stages=FEW_STAGES) if few and (tile.block_m, tile.block_n) == STAGED_TILE else tile


def drawing(tile: DecodeTile, processors: int, rows: int, inputs: int, outputs: int) -> DecodeTile:
    """The tile with parts enough for a mask on an input [rows, inputs] to be drawn beside an output [rows, outputs]."""
    panels = cdiv(rows, tile.panel_rows)
    programs = cdiv(rows, tile.block_m) * cdiv(outputs, tile.block_n) * tile.splits + panels * tile.parts
    if programs <= processors and tile.parts * outputs >= HIDDEN_PARTS:
        return tile
    return replace(tile, parts=max(1, min(DRAWING_PROGRAMS // panels, inputs // tile.panel_k)))


def fitted(
    capability: int, processors: int, rows: int, outputs: int, ranks: int = 0, drawn: bool = False
) -> DecodeTile:
    """Of 16-bit numbers and sizes that are multiples of 16, on a GPU with so many multiprocessors."""
    table = TABLES.get(capability, SAFE)
    tiles = [tile for tile in _of_rows(table, rows) if tile.held == 1 or not drawn]
    at_once = (_at_once(tile, rows, outputs, processors) for tile in tiles)
    tile = next((tile for tile in at_once if tile is not None), replace(tiles[-1], splits=1))
    if capability != 90:
        return tile
    many = None if drawn else of_many_ranks(processors, rows, outputs, ranks)
    tile = replace(many or tile, ahead=True)
    if many is None and ranks > FEW_RANKS and rows >= FEWEST_ROWS_OF_PANELS and tile.splits > 1:
        panel_rows, panel_k = PANEL_OF_FEWER if rows <= FEWER_ROWS else PANEL_OF_MORE
        splits = tile.splits // 2
        room = processors - cdiv(rows, tile.block_m) * cdiv(outputs, tile.block_n) * splits
        parts = max(1, min(PARTS_OF_MANY, room // cdiv(rows, panel_rows)))
        tile = replace(tile, splits=splits, panel_rows=panel_rows, panel_k=panel_k, parts=parts)
    if tile.panel_rows * PIECE_OF_MANY <= SUMS_OF_A_THREAD * 32 * tile.num_warps:
        return replace(tile, panel_ranks=PIECE_OF_MANY)
    return tile


def of_many_ranks(processors: int, rows: int, outputs: int, ranks: int) -> DecodeTile | None:
    """Hopper's tile for a panel without a mask of more than few rows and ranks; None where there is no room for one."""
    if not FEWEST_MANY <= ranks <= MOST_MANY or not FEWEST_ROWS_OF_MANY <= rows <= max(HOPPER_OF_MANY):
        return None
    for tile in _of_rows(HOPPER_OF_MANY, rows):
        found = _at_once(tile, rows, outputs, processors)
        if found is not None and tile.panel_rows * ranks <= found.parts * tile.block_m * tile.block_n:
            return found
    return None


def _of_rows(table: Tiles, rows: int) -> tuple[DecodeTile, ...]:
    return table[min((most for most in table if most >= rows), default=max(table))]


def kept_busy(device: torch.device, rows: int, outputs: int) -> float:
    """Which part of the multiprocessors computes tiles until the last one is done; 1 if all programs run at once."""
    tile = fitted(capability(device), processors(device), rows, outputs)
    tiles = cdiv(rows, tile.block_m) * cdiv(outputs, tile.block_n) * tile.splits
    panels = cdiv(rows, tile.panel_rows) * tile.parts
    return 1.0 if tiles + panels <= processors(device) * tile.held else filled(device, tiles, panels)


def _at_once(tile: DecodeTile, rows: int, outputs: int, processors: int) -> DecodeTile | None:
    """The same with as many of its splits and parts as all have room at once; None if not even one of each has."""
    tiles, panels = cdiv(rows, tile.block_m) * cdiv(outputs, tile.block_n), cdiv(rows, tile.panel_rows)
    room = processors * tile.held
    if tiles + panels > room:
        return None
    splits = tile.splits
    while splits > 1 and tiles * splits + panels > room:
        splits //= 2
    return replace(tile, splits=splits, parts=min(tile.parts, (room - tiles * splits) // panels))
