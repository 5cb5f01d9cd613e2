"""python -m benchmarks.linear: one layer's forward + backward (y, dx, dA, dB) against the bare frozen layer.

Every number is a ratio to two cuBLAS GEMMs, x @ w.T and dy @ w, of the same run. Outputs are checked against float64
first; a wrong result prints no time. Options that take several values measure them all: shapes, tokens and dtypes one
after another, ranks and adapter dtypes of one shape side by side. Peers are measured at the first rank and adapter
dtype, with --all-peers at each. Writes linear.md, linear.json and linear.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from benchmarks.accuracy import check
from benchmarks.peers import (
    NO_GRAPH,
    NO_SLICES,
    OURS,
    PEERS,
    PEFT,
    Layer,
    Step,
    bare,
    capturable,
    path_of,
    peers,
)
from benchmarks.report import Progress, Results, header_of, parser, selected
from benchmarks.timing import ROUNDS, WINDOW_MS, Timing, measure, release_memory

DROPOUTS = (0.0, 0.1)


@dataclass(frozen=True)
class Shape:
    """K→N, its slices, and the ratios to aim for at 8192 tokens and r = 16, without dropout and with p = 0.1."""

    in_features: int
    out_features: int
    targets: tuple[float, float]
    enable_lora: tuple[bool, ...] = (True,)

    def __str__(self) -> str:
        if len(self.enable_lora) == 1:
            return f"{self.in_features}→{self.out_features}"
        slices, letters = len(self.enable_lora), ",".join("FT"[on] for on in self.enable_lora)
        return f"{self.in_features}→{slices}·{self.out_features // slices} ({letters})"


SHAPES = (
    Shape(4096, 4096, (1.10, 1.12)),
    Shape(4096, 14336, (1.06, 1.07)),
    Shape(14336, 4096, (1.07, 1.08)),
    Shape(8192, 8192, (1.06, 1.07)),
    Shape(4096, 1024, (1.28, 1.32)),
    Shape(4096, 3 * 4096, (1.07, 1.08), (True, False, True)),
)
# What a wider rank and float32 adapters may add to the row of r = 16, and of half-precision adapters, in the same run.
RANK_ALLOWANCE = {64: 0.04, 128: 0.08}
WIDE_ADAPTER_ALLOWANCE = 0.01

Row = dict[str, Any]


def target(row: Row, rows: list[Row]) -> float | None:
    """The ratio that our row is to stay under; None where there is none or the row it refers to was not measured."""
    if row["tokens"] != 8192 or row["dtype"] == "float32":
        return None
    base, allowance = dict(row), 0.0
    if row["r"] != 16:
        if row["r"] not in RANK_ALLOWANCE:
            return None
        base["r"], allowance = 16, RANK_ALLOWANCE[row["r"]]
    if row["adapter_dtype"] != row["dtype"]:
        base["adapter_dtype"] = row["dtype"]
        allowance += WIDE_ADAPTER_ALLOWANCE
    if allowance == 0:
        shape = next((s for s in SHAPES if str(s) == row["shape"]), None)
        return None if shape is None else shape.targets[DROPOUTS.index(row["p"])]
    keys = ("candidate", "shape", "tokens", "dtype", "adapter_dtype", "r", "p")
    found = [other["sustained_ratio"] for other in rows if all(other[key] == base[key] for key in keys)]
    return found[0] + allowance if found else None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def variants(base: Layer, options: argparse.Namespace) -> Iterator[tuple[Layer, list[str]]]:
    """Every layer to measure on one shape's data, and the names of the candidates to measure on it."""
    first = True
    for r, name in product(options.r, options.adapter_dtype or [dtype_name(base.x.dtype)]):
        for p in DROPOUTS:
            layer = base.with_adapter(r, p, getattr(torch, name))
            names = [peer for peer in peers(layer) if peer in options.peers] if first or options.all_peers else []
            yield layer, list(dict.fromkeys([OURS, *names]))
        first = False


def measure_shape(
    shape: Shape, tokens: int, dtype: torch.dtype, options: argparse.Namespace, say: Progress
) -> list[Row]:
    """Checks and times every candidate of one shape, all of them interleaved with the bare GEMMs."""
    sizes = tokens, shape.in_features, shape.out_features
    base = Layer.random(*sizes, 16, 0.0, dtype, enable_lora=shape.enable_lora, device=options.device)
    steps: dict[str, Callable[[], object]] = {"bare": bare(base)}
    rows: dict[str, Row] = {}
    uncaptured = []
    for layer, names in variants(base, options):
        made: dict[str, Step] = {name: peers(layer)[name](layer) for name in names}
        check(layer, made)
        path = path_of(made[OURS])
        for name, step in made.items():
            adapter_dtype = dtype_name(torch.float32 if name == PEFT else layer.lora_A.dtype)
            key = f"{name} r={layer.r} {adapter_dtype} p={layer.p}"
            steps[key] = step
            rows[key] = {
                "shape": str(shape),
                "tokens": tokens,
                "dtype": dtype_name(dtype),
                "candidate": name,
                "r": layer.r,
                "adapter_dtype": adapter_dtype,
                "p": layer.p,
                "path": path if name == OURS else "",
                "graph": capturable(name, layer),
            }
            if not capturable(name, layer):
                uncaptured.append(key)
    say(f"{shape}, {tokens} tokens, {dtype_name(dtype)}: right; timing {len(steps)} candidates")
    clock = {"window_ms": options.window, "burst_rounds": options.burst_rounds, "captures": options.captures}
    timings = measure(steps, options.rounds, as_called=uncaptured, device=options.device, **clock)
    for key, row in rows.items():
        row |= ratios(timings[key], timings["bare"]) | {"bare_sustained": timings["bare"].sustained}
    return list(rows.values())


def ratios(timing: Timing, floor: Timing) -> Row:
    row: Row = {"sustained_ms": timing.sustained_ms, "bare_sustained_ms": floor.sustained_ms}
    row["sustained_ratio"] = timing.sustained_ms / floor.sustained_ms
    if timing.burst:
        row |= {"burst_ms": timing.burst_ms, "bare_burst_ms": floor.burst_ms}
        row["burst_ratio"] = timing.burst_ms / floor.burst_ms
    return row | vars(timing)


def cell(row: Row | None) -> str:
    if row is None:
        return "-"
    burst = f" ({row['burst_ratio']:.3f})" if "burst_ratio" in row else ""
    return f"{row['sustained_ratio']:.3f}{burst}{'' if row['graph'] else ' *'}"


def add_tables(results: Results, names: list[str]) -> None:
    """Our ratio beside its target and the peers' of the same layer; below it what the signs mean."""
    rows = results.records
    table = []
    for row in rows:
        if row["candidate"] != OURS:
            continue
        aim = target(row, rows)
        met = "-" if aim is None else f"≤ {aim:.3f} {'met' if row['sustained_ratio'] <= aim else 'MISSED'}"
        row |= {"target": aim}
        cells = [row["shape"], str(row["tokens"]), row["dtype"], str(row["r"]), row["adapter_dtype"], f"{row['p']:g}"]
        same = [other for other in rows if all(other[k] == row[k] for k in ("shape", "tokens", "dtype", "r", "p"))]
        others = []
        for name in names:
            fitting = [o for o in same if o["candidate"] == name]
            fitting = [o for o in fitting if name == PEFT or o["adapter_dtype"] == row["adapter_dtype"]]
            others.append(cell(fitting[0] if fitting else None))
        table.append([*cells, f"{row['bare_sustained_ms']:.3f}", cell(row), met, row["path"], *others])
    columns = ["K→N", "tokens", "dtype", "r", "adapter", "p", "bare, ms", OURS, "target", "our path", *names]
    results.table(columns, table)
    if PEFT in names:
        results.sections.append(f"PEFT's adapter is float32 in every row. {NO_SLICES}.")
    if any(not row["graph"] for row in rows):
        results.sections.append(f"* called as it is, without a CUDA graph: {NO_GRAPH}.")


def main(arguments: list[str] | None = None) -> None:
    options_of = parser(__doc__, "linear")
    options_of.add_argument("--tokens", type=int, nargs="+", default=[8192])
    options_of.add_argument("--r", type=int, nargs="+", default=[16])
    options_of.add_argument("--dtype", nargs="+", default=["bfloat16"], help="of x and the weight")
    options_of.add_argument("--adapter-dtype", nargs="+", help="default: as --dtype")
    options_of.add_argument("--only", nargs="+", default=[""], help="shapes like 4096x1024; a part will do")
    options_of.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), metavar="PEER")
    options_of.add_argument("--all-peers", action="store_true", help="measure them at every rank and adapter dtype")
    options_of.add_argument("--rounds", type=int, default=ROUNDS)
    options_of.add_argument("--burst-rounds", type=int, default=ROUNDS, help="0 for none")
    options_of.add_argument("--window", type=float, default=WINDOW_MS, help="milliseconds; 80 to 150 is meaningful")
    options_of.add_argument("--captures", type=int, default=3, help="CUDA graphs of each step, which take turns")
    options_of.add_argument("--shrink", type=int, default=1, help="divide every size by this, to try the code")
    options = options_of.parse_args(arguments)
    say = Progress()
    title = (
        "Forward + backward (y, dx, dA, dB) of one layer as a ratio to the bare frozen layer's two cuBLAS GEMMs, "
        f"CUDA-graph replays, sustained{', in brackets in a burst' if options.burst_rounds else ''}; medians of "
        f"{options.rounds} rounds of {options.window:g} ms, {options.captures} graphs in turn"
    )
    results = Results(title, header_of(options))
    chosen = selected(options_of, options.only, {str(shape).replace("→", "x"): shape for shape in SHAPES})
    for tokens, dtype, shape in product(options.tokens, options.dtype, chosen):
        small = Shape(
            shape.in_features // options.shrink,
            shape.out_features // options.shrink,
            shape.targets,
            shape.enable_lora,
        )
        for row in measure_shape(small, tokens, getattr(torch, dtype), options, say):
            results.records.append(row)
            say(f"  {row['candidate']} r={row['r']} {row['adapter_dtype']} p={row['p']}: {cell(row)}")
        release_memory(options.device)
    add_tables(results, [name for name in PEERS if name != OURS and name in options.peers])
    results.write(options.output, options.name)


if __name__ == "__main__":
    main()
