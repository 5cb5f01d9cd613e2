"""python -m benchmarks.host: how long one layer's forward + backward keeps the CPU busy, outside CUDA graphs.

Each call starts with an idle GPU and is timed on the host from the call of the layer until autograd has launched its
last kernel; waiting for the GPU is outside. Where a layer itself waits for the GPU (loralib's MergedLinear does), that
counts: the host cannot go on. Candidates take turns in a shuffled order. Writes host.md, host.json and host.csv.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import loralib
import torch
from torch import Tensor, nn

import fused_lora
from benchmarks.layer_cases import DTYPE, Case, check, prepared
from benchmarks.peers import path_of
from benchmarks.report import Progress, Results, header_of, parser, selected
from benchmarks.timing import synchronize

# One round's calls of one candidate: a few to get back into its code, then the timed ones.
WARM_CALLS = 5
CALLS = 40


@dataclass
class Candidate:
    """A layer with its input; microseconds of host time of each timed call."""

    layer: nn.Module
    x: Tensor
    dy: Tensor
    inputs: list[Tensor]
    forward_us: list[float] = field(default_factory=list)
    total_us: list[float] = field(default_factory=list)

    def call(self, device: str) -> tuple[float, float]:
        """Host microseconds of a forward, and of it with its backward; the GPU is idle before and after."""
        synchronize(device)
        began = time.perf_counter()
        y = self.layer(self.x)
        forwarded = time.perf_counter()
        if self.inputs:
            torch.autograd.grad(y, self.inputs, self.dy)
        ended = time.perf_counter()
        synchronize(device)
        return (forwarded - began) * 1e6, (ended - began) * 1e6


def cases(tokens: int, r: int, shrink: int) -> Iterator[Case]:
    """The layers of rank r; shrink divides every size."""
    width, channels, size = 4096 // shrink, 256 // shrink, max(4, 14 // shrink)
    embeddings, embedding_dim = 50257 // shrink, 1024 // shrink

    def x(device: str) -> Tensor:
        return torch.randn(tokens, width, device=device, dtype=DTYPE, requires_grad=True)

    def image(device: str) -> Tensor:
        return torch.randn(1, channels, size, size, device=device, dtype=DTYPE, requires_grad=True)

    yield Case(
        f"Linear {width}→{width}, M={tokens}",
        lambda package, p: package.Linear(width, width, r=r, lora_alpha=32, lora_dropout=p),
        lambda: nn.Linear(width, width),
        x,
    )
    yield Case(
        f"MergedLinear {width}→3·{width} (T,F,T), M={tokens}",
        lambda package, p: package.MergedLinear(
            width, 3 * width, r=r, lora_alpha=32, lora_dropout=p, enable_lora=[True, False, True]
        ),
        lambda: nn.Linear(width, 3 * width),
        x,
    )
    yield Case(
        f"Conv2d {channels}→{channels} 3x3, 1x{size}x{size}",
        lambda package, p: package.Conv2d(channels, channels, 3, r=r, lora_alpha=32, padding=1),
        lambda: nn.Conv2d(channels, channels, 3, padding=1),
        image,
        (0.0,),
    )
    yield Case(
        f"Embedding {embeddings}x{embedding_dim}, M={tokens}",
        lambda package, p: package.Embedding(embeddings, embedding_dim, r=r, lora_alpha=32),
        lambda: nn.Embedding(embeddings, embedding_dim),
        lambda device: torch.randint(embeddings, (tokens,), device=device),
        (0.0,),
    )


def candidate(layer: nn.Module, x: Tensor, dy: Tensor) -> Candidate:
    return Candidate(layer, x, dy, [t for t in (x, *layer.parameters()) if t.requires_grad])


def candidates_of(case: Case, device: str) -> dict[tuple[str, float], Candidate]:
    """The frozen layer, and of each dropout both packages' with the same parameters; ours is right if it is there."""
    torch.manual_seed(0)
    x, frozen = case.x(device), prepared(case.plain(), device)
    dy = torch.randn_like(frozen(x))
    made = {("frozen", 0.0): candidate(frozen, x, dy)}
    for p in case.dropouts:
        theirs, ours = (prepared(case.build(package, p), device) for package in (loralib, fused_lora))
        ours.load_state_dict(theirs.state_dict())
        if p == 0:
            check(ours, theirs, x, dy, case.name)
        made |= {("loralib", p): candidate(theirs, x, dy), ("fused_lora", p): candidate(ours, x, dy)}
    return made


def time_all(candidates: dict[tuple[str, float], Candidate], rounds: int, calls: int, device: str) -> None:
    order = list(candidates.values())
    shuffle = random.Random(0).shuffle
    for candidate in order:
        candidate.call(device)
    for _ in range(rounds):
        shuffle(order)
        for candidate in order:
            for _ in range(WARM_CALLS):
                candidate.call(device)
            for _ in range(calls):
                forward, total = candidate.call(device)
                candidate.forward_us.append(forward)
                candidate.total_us.append(total)


def row_of(case: str, name: str, p: float, candidate: Candidate, device: str) -> dict[str, Any]:
    ours = name == "fused_lora"
    return {
        "layer": case,
        "p": p,
        "candidate": name,
        "forward_us": median(candidate.forward_us),
        "total_us": median(candidate.total_us),
        "total_us_p90": quantiles(candidate.total_us, n=10)[-1],
        "path": path_of(lambda: candidate.call(device)) if ours else "",
    }


def add_table(results: Results) -> None:
    totals = {(row["layer"], row["p"], row["candidate"]): row for row in results.records}
    cells = []
    for (layer, p, name), row in totals.items():
        if name != "fused_lora":
            continue
        theirs, frozen = totals[layer, p, "loralib"], totals[layer, 0.0, "frozen"]
        shown = [f"{r['total_us']:.0f} ({r['forward_us']:.0f})" for r in (frozen, theirs, row)]
        verdict = "less" if row["total_us"] < theirs["total_us"] else "MORE"
        ratio = row["total_us"] / theirs["total_us"]
        cells.append([layer, f"{p:g}", *shown, f"{ratio:.2f}", verdict, row["path"]])
    columns = ["layer", "p", "frozen torch layer", "loralib", "fused_lora", "ratio", "than loralib", "our path"]
    results.table(columns, cells)


def main(arguments: list[str] | None = None) -> None:
    options_of: argparse.ArgumentParser = parser(__doc__, "host")
    options_of.add_argument("--tokens", type=int, nargs="+", default=[16])
    options_of.add_argument("--r", type=int, default=16)
    options_of.add_argument("--only", nargs="+", default=[""], help="layers whose name holds such a text")
    options_of.add_argument("--rounds", type=int, default=8)
    options_of.add_argument("--calls", type=int, default=CALLS, help="timed calls of a candidate in a round")
    options_of.add_argument("--shrink", type=int, default=1, help="divide every size by this, to try the code")
    options = options_of.parse_args(arguments)
    # A convolution is of the same name whatever the number of tokens.
    every = {case.name: case for tokens in options.tokens for case in cases(tokens, options.r, options.shrink)}
    chosen = selected(options_of, options.only, every)
    say = Progress()
    title = (
        "Host time of one layer's forward + backward without CUDA graphs, in brackets of its forward: microseconds, "
        f"bfloat16, r={options.r}, medians of {options.rounds * options.calls} calls that each find the GPU idle"
    )
    results = Results(title, header_of(options))
    for case in chosen:
        candidates = candidates_of(case, options.device)
        time_all(candidates, options.rounds, options.calls, options.device)
        for (name, p), candidate in candidates.items():
            row = row_of(case.name, name, p, candidate, options.device)
            results.records.append(row)
            say(f"{case.name}, {name}, p={p:g}: {row['total_us']:.0f} us ({row['forward_us']:.0f} forward)")
    add_table(results)
    results.write(options.output, options.name)


if __name__ == "__main__":
    main()
