"""python -m benchmarks.sweep: is our layer ever slower than loralib's eager one, beyond 2 % of noise?

Points are tokens x shape x rank x dropout, each with CUDA graphs and called as a user calls it. They come in a shuffled
order, so that a run which --seconds ends early is a sample of them all; what was not measured is reported. Each point's
outputs are checked first. Short windows find the suspects, all that are not faster; a suspect is measured again in full
windows, and these count. With few tokens the weight is one of several that take turns, since a model's is not cached.

--backends auto,triton,... measures several paths by their name for `fused_lora.use_backend` and says which is fastest
where; losses are counted for the first. Writes sweep.md, sweep.json and sweep.csv.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from benchmarks.accuracy import check
from benchmarks.linear import dtype_name
from benchmarks.peers import LORALIB, Layer, fused, loralib_eager, on_backend, path_of
from benchmarks.report import Progress, Results, parser
from benchmarks.timing import machine_header, measure, release_memory

TOKENS = (*(2**i for i in range(15)), 3, 17, 100, 1000, 5000)
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (4096, 1024))
RANKS = (8, 16, 32, 64, 128)
QUICK_TOKENS = (1, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)
QUICK_RANKS = (8, 16, 128)
NOISE = 0.02
CONFIRM_ROUNDS = 6
# Rows at each end whose y and dx are compared with float64.
CHECKED_ROWS = 128
# Weights that take turns add up to more than any cache; beyond so many tokens x and y do that by themselves.
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


def candidates(layer: Layer, backends: list[str]) -> tuple[dict[str, Callable[[], object]], int]:
    """loralib's layer and ours on each backend, each a step over several weights; and how many weights that is."""
    weights = 1
    if len(layer.x) <= FEW_TOKENS:
        weights = min(MOST_WEIGHTS, -(-CACHE_BYTES // layer.weight.nbytes))
    layers = [layer, *(replace(layer, weight=layer.weight.clone()) for _ in range(weights - 1))]
    steps = {LORALIB: in_turn([loralib_eager(turn) for turn in layers])}
    ours = [fused(turn) for turn in layers]
    for backend in backends:
        steps[backend] = in_turn([on_backend(step, backend) for step in ours])
    return steps, weights


def measure_point(point: Point, modes: list[str], options: argparse.Namespace) -> list[Row]:
    """One row for each mode: times, our ratio to eager on the first backend, its path, and the fastest backend."""
    dtype = getattr(torch, options.dtype)
    sizes = point.tokens, point.in_features, point.out_features, point.r, point.p, dtype
    layer = Layer.random(*sizes, adapter_dtype=getattr(torch, options.adapter_dtype), device=options.device)
    check(layer, {}, backends=options.backends, rows=CHECKED_ROWS)
    paths = {backend: path_of(on_backend(fused(layer), backend)) for backend in options.backends}
    steps, weights = candidates(layer, options.backends)
    first = options.backends[0]
    rows = []
    for mode in modes:
        clock = {"graphs": mode == "graph", "burst_rounds": 0, "device": options.device}
        timings = measure(steps, options.rounds, window_ms=options.window, **clock)
        suspect = timings[first].sustained_ms > timings[LORALIB].sustained_ms
        if suspect:
            timings = measure(steps, CONFIRM_ROUNDS, window_ms=options.confirm_window, **clock)
        ms = {name: timing.sustained_ms / weights for name, timing in timings.items()}
        row: Row = {**vars(point), "mode": mode, "eager_ms": ms[LORALIB]}
        row |= {f"{backend}_ms": ms[backend] for backend in options.backends}
        row |= {"ratio": ms[first] / ms[LORALIB], "path": paths[first], "full_windows": suspect}
        row["fastest"] = min(options.backends, key=ms.__getitem__)
        row["fastest_path"] = paths[row["fastest"]]
        rows.append(row)
    return rows


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
        summary = [f"{ratio[0]:.3f}", f"{ratio[len(ratio) // 2]:.3f}", f"{ratio[-1]:.3f}"]
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
    options_of.add_argument("--rounds", type=int, default=3)
    options_of.add_argument("--window", type=float, default=15.0, help="milliseconds")
    options_of.add_argument("--confirm-window", type=float, default=80.0, help="milliseconds, for suspects")
    options_of.add_argument("--shrink", type=int, default=1, help="divide K and N by this, to try the code")
    options = options_of.parse_args(arguments)
    options.backends = options.backends.split(",")
    options.adapter_dtype = options.adapter_dtype or options.dtype
    say = Progress()
    shapes = [shape for shape in SHAPES if any(text in "x".join(map(str, shape)) for text in options.only)]
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
        f"{options.adapter_dtype}, backend {options.backends[0]}: medians of {options.rounds} rounds of "
        f"{options.window:g} ms, suspects' of {CONFIRM_ROUNDS} of {options.confirm_window:g} ms"
    )
    results = Results(title, machine_header(options.commit, options.device))
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
