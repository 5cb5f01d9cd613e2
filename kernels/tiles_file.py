"""A table of tiles for one GPU as a file of JSON, checked in full when it is read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from .config import RANK_BLOCKS, AdapterGradTile, LinearTile, PanelTile, Tiles, UpdateTile

FORMAT = 1
# tl.dot takes no less; fused_linear.py cuts block_j into quarters, which the copy engine stores.
LEAST_BLOCKS = MappingProxyType({"block_m": 16, "block_i": 16, "block_j": 32})
NUM_WARPS = (1, 2, 4, 8, 16)

_ONE = {"linear": LinearTile, "update": UpdateTile}
_BY_RANK = {
    "panel": PanelTile,
    "drawn_panel": PanelTile,
    "adapter_grad": AdapterGradTile,
    "grad_lora_A": AdapterGradTile,
}
_Tile = TypeVar("_Tile")


@dataclass(frozen=True)
class Tuned:
    """tiles, for regular sizes in 16-bit dtypes, and where they were tuned: torch's name for the GPU, 90 for 9.0."""

    tiles: Tiles
    device: str
    capability: int
    triton: str


def slug(device: str) -> str:
    """A GPU's name as it is in the name of its file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def as_json(tuned: Tuned) -> str:
    """What `read_tiles` reads; the same text for the same table."""
    tiles: dict[str, Any] = {name: asdict(getattr(tuned.tiles, name)) for name in _ONE}
    for name in _BY_RANK:
        tiles[name] = {str(rank): asdict(tile) for rank, tile in getattr(tuned.tiles, name).items()}
    of = {"device": tuned.device, "capability": tuned.capability, "triton": tuned.triton, "format": FORMAT}
    return json.dumps(of | {"tiles": tiles}, indent=2, sort_keys=True) + "\n"


def read_tiles(path: str | os.PathLike[str]) -> Tuned:
    """The table in a file that `as_json` made.

    Raises ValueError, which names the file and the key, if anything is missing, unknown or no tile, and OSError.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return _tuned(content)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no table of tiles: {error}") from error


def _tuned(content: object) -> Tuned:
    file = _keys(content, "the file", ("capability", "device", "format", "tiles", "triton"))
    if file["format"] != FORMAT:
        raise ValueError(f"format is {file['format']!r}; expected {FORMAT}.")
    for key in ("device", "triton"):
        if not isinstance(file[key], str):
            raise ValueError(f"{key} is {file[key]!r}; expected a text.")
    tiles = _keys(file["tiles"], "tiles", (*_ONE, *_BY_RANK))
    read: dict[str, Any] = {name: _tile(kind, tiles[name], f"tiles.{name}") for name, kind in _ONE.items()}
    for name, kind in _BY_RANK.items():
        ranks = _keys(tiles[name], f"tiles.{name}", tuple(map(str, RANK_BLOCKS)))
        read[name] = MappingProxyType(
            {rank: _tile(kind, ranks[str(rank)], f"tiles.{name}.{rank}") for rank in RANK_BLOCKS}
        )
    capability = _positive(file["capability"], "capability")
    return Tuned(Tiles(**read), file["device"], capability, file["triton"])


def _keys(value: object, name: str, expected: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a {type(value).__name__}; expected an object with {', '.join(expected)}.")
    for key in value.keys() - set(expected):
        raise ValueError(f"{name} has the key {key!r}; expected {', '.join(expected)}.")
    for key in expected:
        if key not in value:
            raise ValueError(f"{name} has no key {key!r}; expected {', '.join(expected)}.")
    return value


def _tile(kind: type[_Tile], value: object, name: str) -> _Tile:
    names = tuple(field.name for field in fields(kind))  # type: ignore[arg-type]
    values = _keys(value, name, names)
    return kind(**{key: _number(values[key], f"{name}.{key}", key) for key in names})


def _number(value: object, name: str, key: str) -> int:
    if key in ("descriptors", "extends_masked"):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; expected true or false.")
        return value
    number = _positive(value, name)
    if key == "num_warps" and number not in NUM_WARPS:
        raise ValueError(f"{name} is {number}; expected one of {', '.join(map(str, NUM_WARPS))}.")
    least = LEAST_BLOCKS.get(key)
    if least is not None and (number < least or number & number - 1):
        raise ValueError(f"{name} is {number}; expected a power of two of at least {least}.")
    return number


def _positive(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1.")
    return value
