"""python -m benchmarks.inference: one layer's forward in eval mode as a ratio to the merged layer's one GEMM.

From one token, as in decoding, to a prompt of 8192. Each candidate is timed in cycles over copies of the weight that
together exceed the L2 cache, as CUDA graphs of one cycle and as called from Python; times are of one call. Everything
runs under torch.inference_mode(), and is held against float64 first, by twice the error of the unfused expression in
bfloat16: a wrong result prints no time. On a CPU the code runs, and no time is written.

--part linear is the grid of Linear, --part layers a MergedLinear and an Embedding. Ranks come one after another, so
that a run which --seconds ends early has all shapes of the first; what was not measured is reported. Writes
inference.md, inference.json, inference.csv and, if Linear was timed at r=16 as graphs, inference.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.accuracy import largest_error
from benchmarks.inference_cases import COMPILED, FUSED, MERGED, UNFUSED, Case, Embeddings, Linears
from benchmarks.peers import path_of
from benchmarks.report import Progress, Results, header_of, parser
from benchmarks.sweep import NOISE, in_turn
from benchmarks.timing import measure, release_memory

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
QUICK_TOKENS = (1, 16, 64, 512, 2048)
SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
RANKS = (16, 8, 64)
LAYERS_RANK = 16
GRAPHS, AS_CALLED = "CUDA graphs", "as called"
PARTS = ("linear", "layers")
# Up to here a call is bound by the memory that it reads.
FEW_TOKENS = 256

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A layer by name, at one rank, and how its candidates are made: once for all numbers of tokens."""

    part: str
    name: str
    r: int
    make: Callable[[], Linears | Embeddings]


def goal(row: Row) -> float | None:
    """The ratio that our row is to stay under; None where there is none."""
    shapes = {f"{k}→{n}" for k, n in SHAPES}
    if row["candidate"] != FUSED or row["mode"] != GRAPHS or row["layer"] not in shapes or row["r"] not in (16, 64):
        return None
    allowance = 0.05 if row["r"] == 64 else 0.0
    if row["tokens"] <= 16:
        return allowance + (1.00 if row["layer"] == "4096→4096" else 1.05)
    if 32 <= row["tokens"] <= 256:
        return allowance + 1.10
    return allowance + 1.06 if row["tokens"] >= 2048 else None


def check(case: Case, what: str) -> None:
    """Raises AssertionError, naming layer and candidate, if a copy is wrong; the merged layer has no adapter."""
    for turn in range(len(case.calls[MERGED])):
        truth = case.truth(turn)
        unit = torch.finfo(torch.bfloat16).eps * float(truth.abs().max())
        bound = 2 * largest_error(case.yardstick(turn), truth) + unit
        for name, calls in case.calls.items():
            if name != MERGED:
                error = largest_error(calls[turn](), truth)
                assert error <= bound, f"{what}, {name}: off by {error:.3e}, more than {bound:.3e}"


def measure_point(subject: Subject, tokens: int, case: Case, options: argparse.Namespace) -> list[Row]:
    """One row for each mode and candidate."""
    check(case, f"{subject.name} r={subject.r} M={tokens}")
    steps = {name: in_turn(calls) for name, calls in case.calls.items()}
    path = path_of(case.calls[FUSED][0]) if FUSED in case.calls else ""
    rows: list[Row] = []
    for mode in options.modes:
        window_ms = options.window_ms if mode == GRAPHS else options.called_window_ms
        clock = {"graphs": mode == GRAPHS, "window_ms": window_ms, "burst_rounds": 0}
        timings = measure(steps, options.rounds, device=options.device, **clock)
        merged_ms = timings[MERGED].sustained_ms
        for name, calls in case.calls.items():
            row: Row = {"part": subject.part, "layer": subject.name, "tokens": tokens, "r": subject.r}
            row |= {"mode": mode, "candidate": name, "path": path if name == FUSED else "", "copies": len(calls)}
            if options.device != "cpu":
                seconds = timings[name].sustained_ms / len(calls) / 1e3
                nbytes = case.plain_bytes + (0 if name == MERGED else case.adapter_bytes)
                row |= {"us": seconds * 1e6, "ratio": timings[name].sustained_ms / merged_ms}
                row |= {"gb_per_s": nbytes / seconds / 1e9, "tflop_per_s": case.flops / seconds / 1e12}
                row["rounds_us"] = [ms * 1e3 / len(calls) for ms in timings[name].sustained]
            row["goal"] = goal(row)
            rows.append(row)
    return rows


def outcome(row: Row, unfused: list[Row]) -> Row:
    """Whether our row meets its goal and loses, beyond noise, to the best unfused way; None where nobody can tell."""
    best = min((other for other in unfused if "us" in other), key=lambda other: other["us"], default=None)
    found: Row = {"best_unfused": None, "to_best_unfused": None, "loses": None, "met": None}
    if "us" in row and best is not None:
        ratio = row["us"] / best["us"]
        found |= {"best_unfused": best["candidate"], "to_best_unfused": ratio, "loses": ratio > 1 + NOISE}
    if "us" in row and row["goal"] is not None:
        found["met"] = row["ratio"] <= row["goal"]
    return found


def rate(row: Row | None) -> str:
    """What a row's call achieves: of the memory where few tokens or no product are bound by it, else of arithmetic."""
    if row is None or "us" not in row:
        return "-"
    if row["tokens"] <= FEW_TOKENS or row["tflop_per_s"] == 0:
        return f"{row['us']:.2f}, {row['gb_per_s']:.0f} GB/s"
    return f"{row['us']:.1f}, {row['tflop_per_s']:.0f} TFLOP/s"


def table_row(rows: dict[str, Row], names: list[str]) -> list[str]:
    """The cells of one layer, rank, number of tokens and mode, whose rows are given by candidate."""
    first = next(iter(rows.values()))
    ratios = [f"{rows[name]['ratio']:.3f}" if "us" in rows.get(name, {}) else "-" for name in names]
    cells = [first["layer"], str(first["r"]), str(first["tokens"]), rate(rows.get(MERGED)), rate(rows.get(FUSED))]
    ours = rows.get(FUSED)
    if ours is None:
        return [*cells, *ratios, "-", "-", "-"]
    aim = "-" if ours["goal"] is None else f"≤ {ours['goal']:.2f}"
    if ours["met"] is not None:
        aim += " met" if ours["met"] else " MISSED"
    against = "-"
    if ours["to_best_unfused"] is not None:
        against = f"{ours['to_best_unfused']:.3f}{' LOSES' if ours['loses'] else ''} ({ours['best_unfused']})"
    return [*cells, *ratios, aim, against, ours["path"]]


def add_tables(results: Results) -> None:
    """A table for each part and mode, and before them in how many points goals are met and nothing unfused wins."""
    groups: dict[tuple[str, str], dict[tuple[str, int, int], dict[str, Row]]] = {}
    for row in results.records:
        points = groups.setdefault((row["part"], row["mode"]), {})
        points.setdefault((row["layer"], row["r"], row["tokens"]), {})[row["candidate"]] = row
    for (part, mode), points in groups.items():
        for rows in points.values():
            if FUSED in rows:
                rows[FUSED] |= outcome(rows[FUSED], [rows[name] for name in UNFUSED if name in rows])
        ours = [rows[FUSED] for rows in points.values() if FUSED in rows]
        met, losing = ([row[key] for row in ours if row[key] is not None] for key in ("met", "loses"))
        verdicts = [f"{sum(met)} of {len(met)} goals met"] if met else []
        if losing:
            ways = [name for name in UNFUSED if any(name in rows for rows in points.values())]
            best = f"the best unfused way of {', '.join(ways)}"
            verdicts.append(f"{sum(losing)} of {len(losing)} points lose to {best} by more than {NOISE:.0%}")
        results.sections.append(f"**{part}, {mode}: {'; '.join(verdicts) or 'not judged'}.**")
        names = list(dict.fromkeys(name for rows in points.values() for name in rows if name != MERGED))
        ratios = [f"{name} / merged" for name in names]
        columns = ["layer", "r", "M", "merged, µs", "fused, µs", *ratios, "goal", "fused / best unfused", "our path"]
        results.table(columns, [table_row(rows, names) for rows in points.values()])


def subjects_of(options: argparse.Namespace) -> list[Subject]:
    """What the options ask for, in the order of measuring."""
    device, shrink = options.device, options.shrink
    found = []
    if "linear" in options.part:
        for r, (k, n) in product(options.ranks, SHAPES):
            sizes = k // shrink, n // shrink
            if any(text in f"{k}x{n}" for text in options.shapes):
                make = partial(Linears, *sizes, r, device)
                found.append(Subject("linear", f"{sizes[0]}→{sizes[1]}", r, make))
    if "layers" in options.part:
        k, vocabulary, slices = 4096 // shrink, 128256 // shrink, (True, False, True)
        name = f"MergedLinear {k}→3·{k} (T,F,T)"
        found.append(Subject("layers", name, LAYERS_RANK, partial(Linears, k, 3 * k, LAYERS_RANK, device, slices)))
        name = f"Embedding {vocabulary}x{k}"
        found.append(Subject("layers", name, LAYERS_RANK, partial(Embeddings, vocabulary, k, LAYERS_RANK, device)))
    return found


def chosen(case: Case, options: argparse.Namespace) -> Case:
    """The case with the candidates that the options ask for, and the merged layer."""
    wanted = {n: c for n, c in case.calls.items() if n == MERGED or any(text in n for text in options.candidates)}
    return replace(case, calls=wanted)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    made = parser(__doc__, "inference")
    made.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    made.add_argument("--quick", action="store_true", help="fewer tokens, r=16, no torch.compile")
    made.add_argument("--tokens", type=int, nargs="+")
    made.add_argument("--shapes", nargs="+", default=[""], help="of Linear, like 4096x1024; a part will do")
    made.add_argument("--ranks", type=int, nargs="+", help="of Linear")
    made.add_argument("--candidates", nargs="+", default=[""], help="those whose name holds such a text, and merged")
    made.add_argument("--modes", nargs="+", default=["graphs", "called"], choices=["graphs", "called"])
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes seconds a point")
    made.add_argument("--compile-tokens", type=int, nargs="*", help="the only numbers of tokens to compile for")
    made.add_argument("--compile-backend", default="inductor")
    made.add_argument("--rounds", type=int, default=6)
    made.add_argument("--window-ms", type=float, default=20.0, help="of graphs, whose times differ by less than 1 %%")
    made.add_argument("--called-window-ms", type=float, default=80.0, help="of calls from Python")
    made.add_argument("--seconds", type=float, default=540.0, help="start no further point after this")
    made.add_argument("--shrink", type=int, default=1, help="divide every size by this, to try the code")
    options = made.parse_args(arguments)
    options.tokens = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    options.ranks = options.ranks or (RANKS[:1] if options.quick else RANKS)
    options.modes = [GRAPHS if mode == "graphs" else AS_CALLED for mode in options.modes]
    compiled = any(text in COMPILED for text in options.candidates) and not (options.no_compile or options.quick)
    every = options.tokens if options.compile_tokens is None else options.compile_tokens
    options.compile_tokens = every if compiled else []
    options.subjects = subjects_of(options)
    if {subject.part for subject in options.subjects} != set(options.part):
        made.error(f"--shapes is {options.shapes}; expected texts of {', '.join(f'{k}x{n}' for k, n in SHAPES)}.")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    say = Progress()
    title = (
        "Forward of one layer in eval mode, bfloat16, weights from memory, as a ratio to the merged layer; medians of "
        f"{options.rounds} rounds of {options.window_ms:g} ms, called from Python {options.called_window_ms:g} ms"
    )
    results = Results(title, header_of(options))
    missing = []
    for subject in options.subjects:
        copies = None
        for tokens in options.tokens:
            if say.seconds >= options.seconds:
                missing.append(f"{subject.name} r={subject.r} M={tokens}")
                continue
            copies = copies or subject.make()
            with torch.inference_mode():
                backend = options.compile_backend if tokens in options.compile_tokens else None
                case = copies.case(tokens, backend) if isinstance(copies, Linears) else copies.case(tokens)
                rows = measure_point(subject, tokens, chosen(case, options), options)
            results.records += rows
            ours = [f"{row['mode']} {row['ratio']:.3f}" for row in rows if row["candidate"] == FUSED and "us" in row]
            say(f"{subject.name} r={subject.r} M={tokens}: right; fused / merged {', '.join(ours) or 'not timed'}")
            del case
            release_memory(options.device)
    add_tables(results)
    if "layers" in options.part:
        results.sections.append("What Embedding's lookups of few tokens read stays in the cache, for all alike.")
    if missing:
        results.sections.append(f"{len(missing)} points not measured: {'; '.join(missing)}.")
    results.write(options.output, options.name)
    if any((r["part"], r["r"], r["mode"]) == ("linear", 16, GRAPHS) and "us" in r for r in results.records):
        # Only here, so that a machine without matplotlib has written its results before it fails.
        from benchmarks import plots

        plots.save(options.output, "inference", options.name)


if __name__ == "__main__":
    main()
