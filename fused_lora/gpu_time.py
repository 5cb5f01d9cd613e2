"""How long steps take on a GPU beside one another, as replays of CUDA graphs in the sustained state of a training loop.

Under load a large GPU runs at its power limit and lowers its clock. So each round takes all steps in another order,
and each step runs for half a window before its own is timed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

WINDOW_MS = 40.0
ROUNDS = 7


def replay_times(steps: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds of one replay of each step on the current device, the median of the rounds.

    What the steps return is not kept: their graphs share the memory of their results.
    """
    pool = torch.cuda.graph_pool_handle()
    graphs = [_captured(step, pool) for step in steps]
    for graph in graphs:
        _replay_ms(graph, 2)
    replays = [math.ceil(WINDOW_MS / max(_replay_ms(graph, 3), 1e-3)) for graph in graphs]
    times: list[list[float]] = [[] for _ in graphs]
    order = list(range(len(graphs)))
    shuffle = random.Random(0).shuffle
    for _ in range(ROUNDS):
        shuffle(order)
        for i in order:
            _replay_ms(graphs[i], math.ceil(replays[i] / 2))
            times[i].append(_replay_ms(graphs[i], replays[i]))
    return [median(each) for each in times]


def _captured(step: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph, times: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        graph.replay()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / times
