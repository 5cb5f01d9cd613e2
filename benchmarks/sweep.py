"""python -m benchmarks.sweep: is our layer ever slower than loralib's eager one, beyond 2 % of noise?

Points are tokens x shape x rank x dropout, each with CUDA graphs and called as a user calls it. They come in a shuffled
order, so that a run which --seconds ends early is a sample of them all; what was not measured is reported, and --resume
measures it. Each point's outputs are checked first. Without graphs every point is measured in full windows, as the
host's time is noisy; as graphs those that are not clearly faster in short ones, and the full ones count. With few
tokens the weight is one of several that take turns, since a model's is not cached.

--backends auto,triton,... measures several paths by their name for `fused_lora.use_backend` and says which is fastest
where; losses are counted for the first. Writes sweep.md, sweep.json and sweep.csv.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.accuracy import check
from benchmarks.linear import dtype_name
from benchmarks.peers import LORALIB, Layer, Step, fused, loralib_eager, on_backend, path_of
from benchmarks.report import Progress, Results, header_of, parser, selected
from benchmarks.timing import measure, release_memory

TOKENS = (*(2**i for i in range(15)), 3, 17, 100, 1000, 5000)
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (4096, 1024))
RANKS = (8, 16, 32, 64, 128)
QUICK_TOKENS = (1, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)
QUICK_RANKS = (8, 16, 128)
NOISE = 0.02
# Under graphs short windows err by a few per cent: whoever is faster by more than this is.
CLEARLY = 0.1
CONFIRM_ROUNDS = 6
# Rows at each end whose y and dx are compared with float64.
CHECKED_ROWS = 128
# Weights that take turns add up to more than any cache; beyond so many tokens x and y do much of that by themselves.
CACHE_BYTES = 128 << 20
MOST_WEIGHTS = 16
FEW_TOKENS = 512

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    tokens: int
    in_features: int
    out_features: int
    r: int
    p: float


def in_turn(steps: Sequence[Callable[[], object]]) -> Callable[[], object]:
    def all_of_them() -> None:
        for step in steps:
            step()

    return all_of_them


def candidates(layer: Layer, backends: list[str]) -> dict[str, list[Step]]:
    """loralib's layer and ours on each backend, a step for each of the weights that take turns."""
    weights = 1
    if len(layer.x) <= FEW_TOKENS:
        weights = min(MOST_WEIGHTS, -(-CACHE_BYTES // layer.weight.nbytes))
    layers = [layer, *(replace(layer, weight=layer.weight.clone()) for _ in range(weights - 1))]
    ours = [fused(turn) for turn in layers]
    steps = {LORALIB: [loralib_eager(turn) for turn in layers]}
    return steps | {backend: [on_backend(step, backend) for step in ours] for backend in backends}


def measure_point(point: Point, modes: list[str], options: argparse.Namespace) -> list[Row]:
    """One row for each mode: times, our ratio to eager on the first backend, its path, and the fastest backend."""
    dtype = getattr(torch, options.dtype)
    sizes = point.tokens, point.in_features, point.out_features, point.r, point.p, dtype
    layer = Layer.random(*sizes, adapter_dtype=getattr(torch, options.adapter_dtype), device=options.device)
    each = candidates(layer, options.backends)
    check(layer, {name: steps[-1] for name, steps in each.items()}, ours=options.backends, rows=CHECKED_ROWS)
    paths = {backend: path_of(each[backend][-1]) for backend in options.backends}
    steps, weights = {name: in_turn(turns) for name, turns in each.items()}, len(each[LORALIB])
    first = options.backends[0]
    rows = []
    for mode in modes:
        clock = {"graphs": mode == "graph", "burst_rounds": 0, "device": options.device}
        short = None
        if mode == "graph":
            timings = measure(steps, options.rounds, window_ms=options.window, **clock)
            short = timings[first].sustained_ms / timings[LORALIB].sustained_ms
        if short is None or short > 1 - CLEARLY:
            timings = measure(steps, CONFIRM_ROUNDS, window_ms=options.confirm_window, **clock)
        ms = {name: timing.sustained_ms / weights for name, timing in timings.items()}
        row: Row = {**vars(point), "mode": mode, "eager_ms": ms[LORALIB]}
        row |= {f"{backend}_ms": ms[backend] for backend in options.backends}
        row |= {"ratio": ms[first] / ms[LORALIB], "path": paths[first], "short_ratio": short}
        row |= {f"{name}_rounds_ms": timing.sustained for name, timing in timings.items()}
        row["fastest"] = min(options.backends, key=ms.__getitem__)
        row["fastest_path"] = paths[row["fastest"]]
        rows.append(row)
    return rows


def point_of(row: Row) -> Point:
    return Point(*(row[each.name] for each in fields(Point)))


def resume(results: Results, earlier: Path) -> None:
    """Takes over what a run on the same machine and commit measured; ValueError for any other."""
    content = json.loads(earlier.read_text())
    for name, value in results.header.items():
        before = content["header"][name]
        if name == "options":
            results.header[name] = f"{value} (resumed: {before})"
        elif before != value and name != "date":
            raise ValueError(f"--resume is {earlier}, whose {name} is {before}; expected {value}.")
    results.records += content["records"]


def losses(rows: list[Row]) -> list[Row]:
    """Rows in which we are slower than eager by more than noise; the worst first."""
    return sorted((row for row in rows if row["ratio"] > 1 + NOISE), key=lambda row: -row["ratio"])


def described(row: Row) -> str:
    return f"M={row['tokens']} {row['in_features']}→{row['out_features']} r={row['r']} p={row['p']:g} {row['mode']}"


def add_findings(results: Results, missing: list[Point], backends: list[str]) -> None:
    rows = results.records
    lost = losses(rows)
    results.sections.append(
        f"**{len(lost)} of {len(rows)} measured are slower than {LORALIB} by more than {NOISE:.0%}**; "
        f"{len(missing)} points not measured."
    )
    if lost:
        columns = ["where", f"ratio to {LORALIB}", "our path", f"{LORALIB}, ms", *(f"{b}, ms" for b in backends)]
        cells = [
            [described(row), f"{row['ratio']:.3f}", row["path"]]
            + [f"{row[key]:.4f}" for key in ("eager_ms", *(f"{b}_ms" for b in backends))]
            for row in lost
        ]
        results.table(columns, cells)
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((f"{row['in_features']}→{row['out_features']}", row["mode"], row["tokens"]), []).append(row)
    cells = []
    for (shape, mode, tokens), group in sorted(groups.items()):
        ratio = sorted(row["ratio"] for row in group)
        paths = ", ".join(sorted({row["path"] for row in group}))
        fastest = [row["fastest"] for row in group]
        wins = ", ".join(f"{name} {fastest.count(name)}" for name in backends if name in fastest)
        summary = [f"{each:.3f}" for each in (ratio[0], median(ratio), ratio[-1])]
        cells.append([shape, mode, str(tokens), str(len(group)), *summary, paths, wins])
    results.sections.append(f"Our time as a ratio to {LORALIB}'s, over the measured ranks and dropouts:")
    columns = ["K→N", "mode", "M", "points", "best", "median", "worst", "our path", "fastest backend"]
    results.table(columns, cells)
    if missing:
        left_out = Counter(f"{point.in_features}→{point.out_features} M={point.tokens}" for point in missing)
        listed = "; ".join(f"{where}: {count}" for where, count in sorted(left_out.items()))
        results.sections.append(f"Points not measured, by shape and M: {listed}.")


def main(arguments: list[str] | None = None) -> None:
    options_of = parser(__doc__, "sweep")
    options_of.add_argument("--quick", action="store_true", help="fewer tokens and ranks")
    options_of.add_argument("--tokens", type=int, nargs="+")
    options_of.add_argument("--r", type=int, nargs="+")
    options_of.add_argument("--p", type=float, nargs="+", default=[0.0, 0.1])
    options_of.add_argument("--only", nargs="+", default=[""], help="shapes like 4096x1024; a part will do")
    options_of.add_argument("--modes", nargs="+", default=["graph", "eager"], choices=["graph", "eager"])
    options_of.add_argument("--dtype", default="bfloat16")
    options_of.add_argument("--adapter-dtype", help="default: as --dtype")
    options_of.add_argument("--backends", default="auto", help="names for use_backend, separated by commas")
    options_of.add_argument("--seconds", type=float, default=480.0, help="start no further point after this")
    options_of.add_argument("--resume", type=Path, help="the JSON of a run that ended early, whose points are kept")
    options_of.add_argument("--rounds", type=int, default=3)
    options_of.add_argument("--window", type=float, default=15.0, help="milliseconds")
    options_of.add_argument("--confirm-window", type=float, default=80.0, help="milliseconds, of full windows")
    options_of.add_argument("--shrink", type=int, default=1, help="divide K and N by this, to try the code")
    options = options_of.parse_args(arguments)
    options.backends = options.backends.split(",")
    options.adapter_dtype = options.adapter_dtype or options.dtype
    say = Progress()
    shapes = selected(options_of, options.only, {f"{k}x{n}": (k, n) for k, n in SHAPES})
    points = [
        Point(tokens, k // options.shrink, n // options.shrink, r, p)
        for tokens, (k, n), r, p in product(
            options.tokens or (QUICK_TOKENS if options.quick else TOKENS),
            shapes,
            options.r or (QUICK_RANKS if options.quick else RANKS),
            options.p,
        )
    ]
    random.Random(0).shuffle(points)
    title = (
        f"Forward + backward of one layer against {LORALIB}, {dtype_name(getattr(torch, options.dtype))}, adapters "
        f"{options.adapter_dtype}, backend {options.backends[0]}: medians of {CONFIRM_ROUNDS} rounds of "
        f"{options.confirm_window:g} ms, under graphs where {options.rounds} of {options.window:g} ms are not clear"
    )
    results = Results(title, header_of(options))
    if options.resume is not None:
        resume(results, options.resume)
        measured = {point_of(row) for row in results.records}
        points = [point for point in points if point not in measured]
    missing: list[Point] = []
    for done, point in enumerate(points):
        if say.seconds >= options.seconds:
            missing = points[done:]
            break
        for row in measure_point(point, options.modes, options):
            results.records.append(row)
            lost = " LOSS" if losses([row]) else ""
            others = f", fastest {row['fastest']}" if len(options.backends) > 1 else ""
            say(f"{done + 1}/{len(points)} {described(row)}: {row['ratio']:.3f}{lost} ({row['path']}{others})")
        release_memory(options.device)
    results.records.sort(key=lambda row: (row["in_features"], row["out_features"], row["tokens"], row["r"], row["p"]))
    add_findings(results, missing, options.backends)
    results.write(options.output, options.name)


if __name__ == "__main__":
    main()
