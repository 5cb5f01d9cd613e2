"""Measuring on a GPU: in shuffled order, in the state that a training loop lives in, as CUDA graphs where they work.

Under load a large GPU runs at its power limit and lowers its clock; after an idle moment it is faster for a while.
`sustained` warms every candidate up for half a window and shuffles the order each round, so that nobody profits from
following a light neighbour. `burst` times a few replays after a pause.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

import torch

WINDOW_MS = 100.0
ROUNDS = 7


@dataclass
class Timing:
    """Milliseconds per call, one entry a round."""

    sustained: list[float] = field(default_factory=list)
    burst: list[float] = field(default_factory=list)

    @property
    def sustained_ms(self) -> float:
        return median(self.sustained)

    @property
    def burst_ms(self) -> float:
        return median(self.burst)


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The step as a CUDA graph; compiled and warmed up before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def run_ms(call: Callable[[], object], times: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / times


def measure(steps: dict[str, Callable[[], object]], rounds: int = ROUNDS, *, graphs: bool = True) -> dict[str, Timing]:
    """Times every step, in sustained state and in bursts; as a CUDA graph, or as it is called."""
    calls = {name: capture(step).replay if graphs else step for name, step in steps.items()}
    for call in calls.values():
        run_ms(call, 2)
    counts = {name: max(2, round(WINDOW_MS / run_ms(call, 3))) for name, call in calls.items()}
    timings = {name: Timing() for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            run_ms(calls[name], max(1, counts[name] // 2))
            timings[name].sustained.append(run_ms(calls[name], counts[name]))
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            torch.cuda.synchronize()
            time.sleep(0.1)
            run_ms(calls[name], 1)
            timings[name].burst.append(run_ms(calls[name], 3))
    return timings


def machine_header(commit: str | None = None) -> dict[str, str]:
    """GPU, driver, torch, triton and commit, to head every result file."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    if commit is None:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
