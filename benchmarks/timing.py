"""Measuring on a GPU: in shuffled order, in the state that a training loop lives in, as CUDA graphs where they work.

Under load a large GPU runs at its power limit and lowers its clock; after an idle moment it is faster for a while.
`sustained` warms every candidate up for half a window and shuffles the order each round, so that nobody profits from
following a light neighbour. `burst` times a few replays after a pause.

A CPU is taken too, so that the benchmarks can be tried where there is no GPU; its times mean nothing.
"""

from __future__ import annotations

import gc
import itertools
import platform
import random
import subprocess
import time
from collections.abc import Callable, Collection, Iterable
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


def run_ms(call: Callable[[], object], times: int, device: str = "cuda") -> float:
    """Milliseconds per call of `times` calls in a row; on a GPU, between events on its stream."""
    if device == "cpu":
        began = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - began) * 1e3 / times
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / times


def measure(
    steps: dict[str, Callable[[], object]],
    rounds: int = ROUNDS,
    *,
    graphs: bool = True,
    as_called: Collection[str] = (),
    window_ms: float = WINDOW_MS,
    burst_rounds: int | None = None,
    captures: int = 1,
    device: str = "cuda",
) -> dict[str, Timing]:
    """Times every step, in sustained state and in bursts; as a CUDA graph, or as it is called.

    captures: how many graphs of each step take turns by rounds, so that none of them decides.
    as_called: names of the steps that cannot be captured and are called as they are beside the others' graphs.
    burst_rounds: None is as many as rounds; with 0 the timings have no bursts.
    """

    def prepared(name: str) -> list[Callable[[], object]]:
        captured = graphs and name not in as_called and device != "cpu"
        return [capture(steps[name]).replay for _ in range(captures)] if captured else [steps[name]]

    calls = {name: prepared(name) for name in steps}
    for call in itertools.chain(*calls.values()):
        run_ms(call, 2, device)
    counts = {name: max(2, round(window_ms / run_ms(turns[0], 3, device))) for name, turns in calls.items()}
    timings = {name: Timing() for name in steps}
    order = list(steps)
    # Another order for each point, or whom a candidate follows would be the same at all of them.
    shuffle = random.Random().shuffle
    for turn in range(rounds):
        shuffle(order)
        for name in order:
            call = calls[name][turn % len(calls[name])]
            run_ms(call, max(1, counts[name] // 2), device)
            timings[name].sustained.append(run_ms(call, counts[name], device))
    for turn in range(rounds if burst_rounds is None else burst_rounds):
        shuffle(order)
        for name in order:
            call = calls[name][turn % len(calls[name])]
            synchronize(device)
            time.sleep(0.1)
            run_ms(call, 1, device)
            timings[name].burst.append(run_ms(call, 3, device))
    return timings


def synchronize(device: str) -> None:
    """Waits until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def release_memory(device: str) -> None:
    """Gives what dropped graphs and tensors held back to the GPU; a graph's memory is of no use to the next one."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def machine_header(commit: str | None = None, device: str = "cuda") -> dict[str, str]:
    """GPU, driver, torch, triton and commit, to head every result file."""
    # It comes with pytest-benchmark, whose saved runs say the same.
    import cpuinfo
    import triton

    gpu, driver = "none; times on a CPU mean nothing", "none"
    if device != "cpu":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
        gpu = torch.cuda.get_device_name(device)
    if commit is None:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "gpu": gpu,
        "driver": driver,
        "cuda": torch.version.cuda or "none",
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.machine()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
