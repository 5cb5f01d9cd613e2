"""`tune`: a table of tiles for the GPU at hand, found by trials around the table that it has now.

For each kernel in turn: the tiles that differ from the present one by one step are tried, the fastest takes its place
if it gains enough, and so on from there. A tile is timed only if the whole layer, computed with it, errs at most
twice as much as with the table that the search began with, and gives the same bits twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import permutations
from types import MappingProxyType, ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from . import fused, reference
from .dispatch import choose
from .gpu_time import replay_times
from .kernels import adapter_grad, fused_linear, panel
from .kernels.config import AdapterGradTile, LinearTile, PanelTile, Tiles, capability, rank_block
from .kernels.lookup import table_of, use_tiles
from .kernels.tiles_file import LEAST_BLOCKS, read_tiles
from .reference import Dropout, dropout_threshold

__all__ = ["Tiles", "Trial", "read_tiles", "tune", "use_tiles"]

Tile = LinearTile | PanelTile | AdapterGradTile
Kernel = Literal["linear", "panel", "drawn_panel", "adapter_grad", "grad_lora_A"]
_BY_RANK: tuple[Kernel, ...] = ("panel", "drawn_panel", "adapter_grad", "grad_lora_A")
Timer = Callable[[Mapping[Tile, Callable[[], object]]], Mapping[Tile, float]]

LEAST_GAIN = 0.02
_DROPOUT_P = 0.1
_MOST_BLOCK = 256  # of a copy engine's box
_DOES_NOT_FIT = (OutOfResources, CompilationError, PTXASError)
# Sizes up to these are checked as they are, larger ones by their remainder, so that blocks divide them as before. The
# rows are those of more tiles than most GPUs compute at once, and leave a part of a tile.
_CHECKED_SIZE = 1024
_CHECKED_ROWS = 4173


@dataclass(frozen=True)
class Trial:
    """What came of one tile of one kernel; in the tables by rank, for this block of ranks.

    ms: of one run of the kernel's work over all shapes; None where it was not timed.
    """

    kernel: Kernel
    rank_block: int | None
    tile: Tile
    outcome: Literal["timed", "does not fit", "wrong results"]
    ms: float | None = None


def tune(
    shapes: Sequence[tuple[int, int]],
    device: torch.device | str = "cuda",
    *,
    tokens: int = 8192,
    ranks: Sequence[int] = (16,),
    dtype: torch.dtype = torch.bfloat16,
    time: Timer | None = None,
    on_trial: Callable[[Trial], object] | None = None,
) -> Tiles:
    """The table that takes the least time for layers of these shapes, as far as a gain of 2 % can be told.

    shapes: (in_features, out_features) of the layers, multiples of 16. tokens: rows of their input. ranks: of their
        adapters; tiles of other blocks of ranks stay. dtype: bfloat16 or float16. time: is given for each tile, the
        present one first, a function that runs the kernel's work, and returns their milliseconds; None replays CUDA
        graphs. on_trial: is given every trial, in order.
    The same times give the same table. Until it returns, all kernels of the process run with tiles on trial.

    Raises ValueError for other arguments, RuntimeError where the kernels cannot run, and what a kernel raises but for
    Triton's errors that a tile does not fit.
    """
    device = _checked(shapes, torch.device(device), tokens, ranks, dtype, time)
    here: AbstractContextManager[object] = nullcontext() if device.type == "cpu" else torch.cuda.device(device)
    with here:
        small = [(_checked_size(k), _checked_size(n)) for k, n in shapes]
        tiles = table_of(device)
        check = _Check(
            [_Layer.draw(*s, min(tokens, _CHECKED_ROWS), r, dtype, device) for s in small for r in ranks], tiles
        )
        layers = [_Layer.draw(*shape, tokens, r, dtype, device) for shape in shapes for r in ranks]
        search = _Search(
            check, time or _replayed, on_trial or _ignored, device.type == "cpu" or capability(device) >= 90
        )
        tiles = search.improved(tiles, "linear", None, layers)
        for block in sorted({rank_block(r) for r in ranks}):
            of_block = [layer for layer in layers if rank_block(layer.r) == block]
            for kernel in _BY_RANK:
                tiles = search.improved(tiles, kernel, block, of_block)
    return tiles


def _checked(
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    tokens: int,
    ranks: Sequence[int],
    dtype: torch.dtype,
    time: Timer | None,
) -> torch.device:
    """The device with its number."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}; expected torch.bfloat16 or torch.float16, which have tiles to tune.")
    if not shapes or any(len(shape) != 2 or min(shape) < 16 or any(n % 16 for n in shape) for shape in shapes):
        raise ValueError(f"shapes is {shapes}; expected pairs of multiples of 16, since other sizes have other tiles.")
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; expected at least 1.")
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks is {ranks}; expected one or more numbers of at least 1.")
    if device.type != "cuda" and time is None:
        raise ValueError(f"device is {device}; expected a CUDA GPU, or a time of your own.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    choose("triton", device, dtype, dtype)
    return device


def _checked_size(size: int) -> int:
    return size if size <= _CHECKED_SIZE else _CHECKED_SIZE + size % _CHECKED_SIZE


def _ignored(trial: Trial) -> None:
    pass


def _replayed(steps: Mapping[Tile, Callable[[], object]]) -> dict[Tile, float]:
    return dict(zip(steps, replay_times(list(steps.values())), strict=True))


@dataclass(frozen=True)
class _Layer:
    """A layer's tensors as the kernels take them; xa, dyb and bits are as good as drawn for a time."""

    r: int
    x: Tensor
    dy: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    xa: Tensor
    dyb: Tensor
    bits: Tensor
    dropout: Dropout

    @classmethod
    def draw(cls, K: int, N: int, M: int, r: int, dtype: torch.dtype, device: torch.device) -> _Layer:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

        return cls(
            r,
            x=normal(M, K),
            dy=normal(M, N),
            weight=normal(N, K, scale=K**-0.5),
            lora_A=normal(r, K, scale=K**-0.5),
            lora_B=normal(N, r, scale=r**-0.5),
            xa=normal(M, r),
            dyb=normal(M, r),
            bits=torch.randint(256, (M, -(-K // 8)), dtype=torch.uint8, generator=generator, device=device),
            dropout=Dropout(torch.ones(1, dtype=torch.int64, device=device), dropout_threshold(_DROPOUT_P)),
        )

    def results(self, module: ModuleType, dtype: torch.dtype, dropout: Dropout | None) -> tuple[Tensor, ...]:
        """y, xa, dx, da, db, the bits of the mask, and panels by `panel`; by fused or reference in dtype.

        Where the copy engine reads them, the layer's panels are another kernel's.
        """
        x, dy, weight, A, B = (t.to(dtype) for t in (self.x, self.dy, self.weight, self.lora_A, self.lora_B))
        y, xa, bits = module.forward(x, weight, None, A, B, scaling=1.0, dropout=dropout)
        options = {"bits": bits, "scaling": 1.0, "dtype": dtype, "enable_lora": (True,)}
        gradients = module.backward(dy, x, weight, A, B, xa, **options)
        if dropout is not None:
            drawn = (xa, bits) if module is reference else panel.panel(x, A.T, 1.0, dropout)
            return y, xa, *gradients, bits, *drawn  # type: ignore[return-value]
        panels = [(x, A.T, 1.0), (dy, B, 1.0)]
        alone = [reference.product(*of) if module is reference else panel.panel(*of)[0] for of in panels]
        return y, xa, *gradients, *alone

    def run(self, kernel: Kernel) -> None:
        """One kernel's share of a step without dropout and of one with, whatever the two do not share."""
        x, dy, bits, dtype = self.x, self.dy, self.bits, self.x.dtype
        fused_rank = self.r <= adapter_grad.FUSED_RANK
        if kernel == "linear":
            fused_linear.forward(x, self.weight, None, self.xa, self.lora_B)
            for mask in (None, bits):
                fused_linear.grad_input(dy, self.weight, self.dyb, self.lora_A, mask)
        elif kernel == "drawn_panel":
            panel.panel(x, self.lora_A.T, 1.0, self.dropout)
        elif kernel == "panel":
            panel.panel(x, self.lora_A.T, 1.0)
            if not fused_rank:
                panel.panel(dy, self.lora_B, 1.0)
        elif kernel == "adapter_grad":
            adapter_grad.grad_panels(dy, self.lora_B if fused_rank else None, self.xa, 1.0, dtype)
            adapter_grad.grad_lora_A(self.dyb, x, None, dtype)
        else:
            adapter_grad.grad_lora_A(self.dyb, x, bits, dtype)


class _Check:
    """Small layers whose results in float64 are known, and how far a table may be from them."""

    def __init__(self, layers: Sequence[_Layer], tiles: Tiles) -> None:
        self.cases = [(layer, dropout) for layer in layers for dropout in (None, layer.dropout)]
        self.exact = [layer.results(reference, torch.float64, dropout) for layer, dropout in self.cases]
        with use_tiles(tiles):
            present = [layer.results(fused, layer.x.dtype, dropout) for layer, dropout in self.cases]
        self.bounds = [
            [_bound(*pair) for pair in zip(results, exact, strict=True)]
            for results, exact in zip(present, self.exact, strict=True)
        ]

    def passes(self, tiles: Tiles) -> bool:
        """Whether these tiles give results within the bounds, and the same bits twice. Raises what the kernels do."""
        with use_tiles(tiles):
            for (layer, dropout), exact, bounds in zip(self.cases, self.exact, self.bounds, strict=True):
                once, again = (layer.results(fused, layer.x.dtype, dropout) for _ in range(2))
                if not all(map(torch.equal, once, again)):
                    return False
                if not all(_error(*each) <= bound for *each, bound in zip(once, exact, bounds, strict=True)):
                    return False
        return True


def _error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact.double()).abs().max())


def _bound(present: Tensor, exact: Tensor) -> float:
    """Twice the error that there is, with a floor of one rounding unit at exact's scale; none for a mask's bits."""
    if not present.is_floating_point():
        return 0.0
    return 2 * _error(present, exact) + torch.finfo(present.dtype).eps * float(exact.abs().max())


@dataclass(frozen=True)
class _Search:
    check: _Check
    time: Timer
    on_trial: Callable[[Trial], object]
    descriptors: bool

    def improved(self, tiles: Tiles, kernel: Kernel, block: int | None, layers: Sequence[_Layer]) -> Tiles:
        """The table with the kernel's tile, in the tables by rank that of a block, as fast as could be found."""

        def step(table: Tiles) -> Callable[[], object]:
            def run() -> None:
                with use_tiles(table):
                    for layer in layers:
                        layer.run(kernel)

            return run

        tile: Tile = tiles.linear if block is None else getattr(tiles, kernel)[block]
        seen = {tile}
        while True:
            fitting = [tile]
            for other in neighbours(tile, self.descriptors):
                if other not in seen:
                    seen.add(other)
                    outcome = self._outcome(_with(tiles, kernel, block, other))
                    if outcome == "timed":
                        fitting.append(other)
                    else:
                        self.on_trial(Trial(kernel, block, other, outcome))
            if len(fitting) == 1:
                return _with(tiles, kernel, block, tile)
            times = self.time({each: step(_with(tiles, kernel, block, each)) for each in fitting})
            for each in fitting:
                self.on_trial(Trial(kernel, block, each, "timed", times[each]))
            # Of equal ones the first, which is the smaller.
            best = min(fitting, key=times.__getitem__)
            if best == tile or times[best] > (1 - LEAST_GAIN) * times[tile]:
                return _with(tiles, kernel, block, tile)
            tile = best

    def _outcome(self, tiles: Tiles) -> Literal["timed", "does not fit", "wrong results"]:
        try:
            return "timed" if self.check.passes(tiles) else "wrong results"
        except _DOES_NOT_FIT:
            return "does not fit"


def _with(tiles: Tiles, kernel: Kernel, block: int | None, tile: Tile) -> Tiles:
    if block is None:
        return replace(tiles, linear=tile)  # type: ignore[arg-type]
    changed: dict[str, Any] = {kernel: MappingProxyType(getattr(tiles, kernel) | {block: tile})}
    return replace(tiles, **changed)


def neighbours(tile: Tile, descriptors: bool) -> Iterator[Tile]:
    """Tiles one step away, the smaller before the larger: a number halved or doubled, or one block for another.

    descriptors: whether the GPU's copy engine takes them.
    """
    blocks = [field.name for field in fields(tile) if field.name in LEAST_BLOCKS]
    steps: list[dict[str, int]] = [{block: getattr(tile, block) // 2} for block in blocks]
    steps += [{less: getattr(tile, less) // 2, more: 2 * getattr(tile, more)} for less, more in permutations(blocks, 2)]
    steps += [{block: 2 * getattr(tile, block)} for block in blocks]
    steps += [{"num_warps": tile.num_warps // 2}, {"num_warps": 2 * tile.num_warps}]
    steps += [{"num_stages": tile.num_stages - 1}, {"num_stages": tile.num_stages + 1}]
    if isinstance(tile, AdapterGradTile):
        steps += [{"programs": tile.programs // 2}, {"programs": 2 * tile.programs}]
    if isinstance(tile, LinearTile) and descriptors:
        steps.append({"descriptors": not tile.descriptors})
    for step in steps:
        if all(_allowed(name, value) for name, value in step.items()):
            yield replace(tile, **step)  # type: ignore[arg-type]


def _allowed(name: str, value: int) -> bool:
    if name in LEAST_BLOCKS:
        return LEAST_BLOCKS[name] <= value <= _MOST_BLOCK
    # Hopper's matrix instructions take four warps.
    return 4 <= value <= 16 if name == "num_warps" else value >= 1 or name == "descriptors"
