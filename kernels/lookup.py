"""Which table of tiles a kernel takes, and what else is in force for all kernels of the process.

Regular sizes in 16-bit dtypes have one of the GPU's own, the first of: that of `use_tiles`; the file that
FUSED_LORA_TILES names; the file for this GPU in tuned/, which ships with the package; its architecture's; `SAFE`. The
files are looked for when a device first needs its table. Nothing measured is read unless it ships or was asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .config import FLOAT32, INTERPRETER, IRREGULAR, SAFE, TABLES, Tiles, capability
from .tiles_file import read_tiles, slug

VARIABLE = "FUSED_LORA_TILES"
SHIPPED = Path(__file__).parent / "tuned"

# For the whole process, since backward runs on autograd's threads.
_in_force: Tiles | None = None


@contextmanager
def use_tiles(tiles: Tiles) -> Iterator[None]:
    """Within the block every kernel of the process that goes by a table takes this one, for regular sizes in 16 bits.

    A captured CUDA graph keeps the tiles that it was captured with. Raises TypeError if tiles is no `Tiles`.
    """
    global _in_force
    if not isinstance(tiles, Tiles):
        raise TypeError(f"tiles is a {type(tiles).__name__}; expected a Tiles, as read_tiles(path).tiles.")
    previous, _in_force = _in_force, tiles
    try:
        yield
    finally:
        _in_force = previous


def tiles_in_force() -> bool:
    """Whether a `use_tiles` is in force."""
    return _in_force is not None


def _knobs(kind: str) -> Any:
    """Triton's of this kind; None where nobody has imported them, or another thread is about to."""
    return getattr(sys.modules.get("triton.knobs"), kind, None)


def instrumentation() -> str:
    """How Triton instruments what it compiles now, as its sanitizers and its profiler ask; "" where it does not."""
    compilation = _knobs("compilation")
    return "" if compilation is None else compilation.instrumentation_mode  # type: ignore[no-any-return]


def watched() -> bool:
    """Whether somebody, such as Triton's profiler, has hooks that are called at each launch."""
    runtime = _knobs("runtime")
    if runtime is None:
        return False
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def tiles_for(device: torch.device, dtype: torch.dtype, *sizes: int, aligned: bool = True) -> Tiles:
    """The table for a device, a dtype, the sizes that a kernel steps through, and a mask aligned to blocks of 8.

    Raises ValueError or OSError if a file was asked for and is not there, not whole, or another architecture's.
    """
    if dtype.itemsize == 2 and aligned and not any(size % 16 for size in sizes):
        return table_of(device)
    if device.type == "cpu":
        return INTERPRETER
    return FLOAT32 if dtype.itemsize == 4 else IRREGULAR


def table_of(device: torch.device) -> Tiles:
    """The device's own table."""
    return _found(device) if _in_force is None else _in_force


def cached(device: str) -> Path:
    """Where `fused-lora tune` keeps its result for the GPU of this name: in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "fused_lora" / "tiles" / f"{slug(device)}.json"


@lru_cache(maxsize=64)
def _found(device: torch.device) -> Tiles:
    if device.type == "cpu":
        return INTERPRETER
    name = torch.cuda.get_device_name(device)
    asked = os.environ.get(VARIABLE)
    if asked is not None:
        path = cached(name) if asked == "cache" else Path(asked)
        if not path.is_file():
            raise FileNotFoundError(
                f"{VARIABLE} is {asked!r}, and {str(path)!r} is no file; expected one that fused-lora tune wrote."
            )
        return _read(path, device)
    shipped = SHIPPED / f"{slug(name)}.json"
    return _read(shipped, device) if shipped.is_file() else TABLES.get(capability(device), SAFE)


def _read(path: Path, device: torch.device) -> Tiles:
    tuned = read_tiles(path)
    if tuned.capability != capability(device):
        raise ValueError(
            f"{str(path)!r} has tiles for {tuned.device}, of compute capability {tuned.capability / 10}; "
            f"expected {capability(device) / 10}, that of {device}."
        )
    return tuned.tiles
