"""Tile shapes in frozen tables, from which lookup.py chooses at launch.

16-bit dtypes have a table for each architecture, chosen by the GPU's compute capability unless the GPU has one of its
own; a GPU without either gets `SAFE`, whose tiles fit every GPU since Ampere. Two tables serve every architecture:
`FLOAT32`, and `IRREGULAR` for sizes that are no multiples of 16 and masks that do not start at a multiple of 8, whose
addresses cost registers. `INTERPRETER` has tiles so small that tests on a CPU cross many of their edges.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TypeVar

import torch

_Tile = TypeVar("_Tile")


@dataclass(frozen=True)
class LinearTile:
    """fused_linear.py: a tile of the output, the step of the contraction, and whether the copy engine loads them.

    extends_masked: whether extended.py, too, has registers enough for a mask beside the tile.
    """

    block_m: int
    block_j: int
    block_i: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    extends_masked: bool = True


@dataclass(frozen=True)
class PanelTile:
    """panel.py: rows of the panel that one program computes, and the step of the contraction."""

    block_m: int
    block_i: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AdapterGradTile:
    """adapter_grad.py: columns whose gradient one program accumulates, and its step over the rows."""

    block_m: int
    block_i: int
    num_warps: int
    num_stages: int
    programs: int  # how many fill the GPU


@dataclass(frozen=True)
class UpdateTile:
    """low_rank_update.py: a tile of the output."""

    block_m: int
    block_j: int
    num_warps: int
    num_stages: int


# A rank is padded to a power of two from 16, the least that a matrix instruction contracts over, and cut into pieces
# of at most the last. Panels and adapter gradients have a tile for each.
RANK_BLOCKS = (16, 32, 64, 128)
# Of a factor that is read before the main loop, what a thread has registers for.
BYTES_AHEAD = 128


@dataclass(frozen=True)
class Tiles:
    """What each kernel uses. adapter_grad: for db, with dyb from the same read or without, and for da without a mask.

    panel, drawn_panel: for what split_panel.py does not take, without and with a mask. grad_lora_A: for da with one.
    """

    linear: LinearTile
    panel: MappingProxyType[int, PanelTile]
    drawn_panel: MappingProxyType[int, PanelTile]
    adapter_grad: MappingProxyType[int, AdapterGradTile]
    grad_lora_A: MappingProxyType[int, AdapterGradTile]
    update: UpdateTile = UpdateTile(block_m=32, block_j=128, num_warps=8, num_stages=1)


def _by_rank(*tiles: _Tile) -> MappingProxyType[int, _Tile]:
    return MappingProxyType(dict(zip(RANK_BLOCKS, tiles, strict=True)))


_ADAPTER_GRAD = _by_rank(
    AdapterGradTile(block_m=32, block_i=128, num_warps=4, num_stages=3, programs=256),
    AdapterGradTile(block_m=32, block_i=128, num_warps=4, num_stages=3, programs=256),
    AdapterGradTile(block_m=32, block_i=128, num_warps=8, num_stages=3, programs=256),
    AdapterGradTile(block_m=32, block_i=128, num_warps=8, num_stages=3, programs=256),
)

_SAFE_PANEL = _by_rank(
    PanelTile(block_m=64, block_i=64, num_warps=4, num_stages=3),
    PanelTile(block_m=64, block_i=64, num_warps=4, num_stages=3),
    PanelTile(block_m=64, block_i=64, num_warps=8, num_stages=3),
    PanelTile(block_m=64, block_i=64, num_warps=8, num_stages=3),
)

SAFE = Tiles(
    linear=LinearTile(block_m=128, block_j=128, block_i=32, num_warps=8, num_stages=3),
    panel=_SAFE_PANEL,
    drawn_panel=_SAFE_PANEL,
    adapter_grad=_ADAPTER_GRAD,
    grad_lora_A=_ADAPTER_GRAD,
)

_AMPERE_PANEL = _by_rank(
    PanelTile(block_m=64, block_i=128, num_warps=4, num_stages=3),
    PanelTile(block_m=64, block_i=128, num_warps=4, num_stages=3),
    PanelTile(block_m=32, block_i=64, num_warps=8, num_stages=3),
    PanelTile(block_m=32, block_i=64, num_warps=8, num_stages=3),
)

AMPERE = Tiles(
    linear=LinearTile(block_m=128, block_j=128, block_i=64, num_warps=8, num_stages=3),
    panel=_AMPERE_PANEL,
    drawn_panel=_AMPERE_PANEL,
    adapter_grad=_ADAPTER_GRAD,
    grad_lora_A=_ADAPTER_GRAD,
)

HOPPER = Tiles(
    linear=LinearTile(128, 256, 64, num_warps=8, num_stages=3, descriptors=True),
    panel=_by_rank(
        PanelTile(block_m=32, block_i=128, num_warps=4, num_stages=5),
        PanelTile(block_m=32, block_i=128, num_warps=4, num_stages=4),
        PanelTile(block_m=64, block_i=128, num_warps=8, num_stages=3),
        PanelTile(block_m=64, block_i=128, num_warps=8, num_stages=3),
    ),
    drawn_panel=_by_rank(
        PanelTile(block_m=16, block_i=128, num_warps=2, num_stages=5),
        PanelTile(block_m=32, block_i=128, num_warps=4, num_stages=4),
        PanelTile(block_m=32, block_i=128, num_warps=4, num_stages=4),
        PanelTile(block_m=32, block_i=128, num_warps=8, num_stages=4),
    ),
    adapter_grad=_by_rank(
        AdapterGradTile(block_m=64, block_i=256, num_warps=8, num_stages=4, programs=132),
        AdapterGradTile(block_m=64, block_i=256, num_warps=8, num_stages=4, programs=132),
        AdapterGradTile(block_m=64, block_i=128, num_warps=8, num_stages=3, programs=264),
        AdapterGradTile(block_m=64, block_i=128, num_warps=8, num_stages=3, programs=264),
    ),
    grad_lora_A=_by_rank(
        AdapterGradTile(block_m=64, block_i=64, num_warps=4, num_stages=3, programs=528),
        AdapterGradTile(block_m=64, block_i=64, num_warps=4, num_stages=3, programs=528),
        AdapterGradTile(block_m=128, block_i=64, num_warps=4, num_stages=3, programs=264),
        AdapterGradTile(block_m=64, block_i=128, num_warps=4, num_stages=3, programs=264),
    ),
)

IRREGULAR = Tiles(
    linear=LinearTile(block_m=64, block_j=64, block_i=32, num_warps=4, num_stages=2),
    panel=_by_rank(*[PanelTile(block_m=32, block_i=32, num_warps=4, num_stages=2)] * 4),
    drawn_panel=_by_rank(*[PanelTile(block_m=32, block_i=32, num_warps=4, num_stages=2)] * 4),
    adapter_grad=_by_rank(*[AdapterGradTile(block_m=32, block_i=64, num_warps=4, num_stages=2, programs=256)] * 4),
    grad_lora_A=_by_rank(*[AdapterGradTile(block_m=32, block_i=64, num_warps=4, num_stages=2, programs=256)] * 4),
)

FLOAT32 = Tiles(
    linear=LinearTile(block_m=32, block_j=64, block_i=16, num_warps=4, num_stages=2),
    panel=_by_rank(*[PanelTile(block_m=16, block_i=32, num_warps=8, num_stages=2)] * 4),
    drawn_panel=_by_rank(*[PanelTile(block_m=16, block_i=32, num_warps=8, num_stages=2)] * 4),
    adapter_grad=_by_rank(*[AdapterGradTile(block_m=32, block_i=32, num_warps=8, num_stages=2, programs=256)] * 4),
    grad_lora_A=_by_rank(*[AdapterGradTile(block_m=32, block_i=32, num_warps=8, num_stages=2, programs=256)] * 4),
)

INTERPRETER = Tiles(
    linear=LinearTile(32, 64, 16, num_warps=4, num_stages=1, descriptors=True),
    panel=_by_rank(*[PanelTile(block_m=16, block_i=16, num_warps=4, num_stages=1)] * 4),
    drawn_panel=_by_rank(*[PanelTile(block_m=16, block_i=32, num_warps=4, num_stages=1)] * 4),
    adapter_grad=_by_rank(*[AdapterGradTile(block_m=16, block_i=32, num_warps=4, num_stages=1, programs=6)] * 4),
    grad_lora_A=_by_rank(*[AdapterGradTile(block_m=16, block_i=32, num_warps=4, num_stages=1, programs=6)] * 4),
    update=UpdateTile(block_m=16, block_j=32, num_warps=4, num_stages=1),
)

# Its accumulators lie in a memory of their own, from which a mask, or the transposition of the largest masked gradient,
# would bring them into registers all at once.
BLACKWELL = replace(
    HOPPER,
    linear=replace(HOPPER.linear, extends_masked=False),
    grad_lora_A=MappingProxyType(
        HOPPER.grad_lora_A | {128: AdapterGradTile(block_m=64, block_i=64, num_warps=8, num_stages=3, programs=264)}
    ),
)

TABLES = MappingProxyType({80: AMPERE, 90: HOPPER, 100: BLACKWELL})


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """How many programs of a whole multiprocessor run at once; few for a CPU, so that each gets several tiles."""
    if device.type == "cpu":
        return 6
    return torch.cuda.get_device_properties(device).multi_processor_count


def scaled(rows: int, device: torch.device) -> int:
    """A bound on rows; for a CPU a 32nd of it, so that tests in the interpreter come to both sides."""
    return rows if device.type != "cpu" else rows // 32


def filled(device: torch.device, tiles: int, others: int = 0) -> float:
    """Which part of its multiprocessors computes tiles until the last of them, and of the other programs, is done."""
    at_once = processors(device)
    return tiles / (-(-(tiles + others) // at_once) * at_once)


@lru_cache(maxsize=64)
def capability(device: torch.device) -> int:
    """Of a GPU, for instance 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin while the one before still runs; only on GPUs for which the tests compile that."""
    return device.type == "cuda" and capability(device) in (90, 100)


def rank_block(r: int) -> int:
    """The piece of the rank that a program treats at once."""
    return next((block for block in RANK_BLOCKS if block >= r), RANK_BLOCKS[-1])


def read_ahead(ranks: int, columns: int, dtype: torch.dtype, num_warps: int) -> bool:
    """Whether a factor [ranks, columns] has room in a program's registers while its main loop runs."""
    return ranks * columns * dtype.itemsize <= BYTES_AHEAD * 32 * num_warps
