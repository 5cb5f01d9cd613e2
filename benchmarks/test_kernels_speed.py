"""Speed of each kernel by itself, to see a change slow one down: pytest benchmarks --benchmark-only

Against a run that was saved before the change, on the same GPU:

    pytest benchmarks --benchmark-only --benchmark-storage=benchmarks/results/kernels --benchmark-save=before
    pytest benchmarks --benchmark-only --benchmark-storage=benchmarks/results/kernels --benchmark-compare \\
        --benchmark-compare-fail=median:5%

-k "4096-4096 and grad" selects. A time is that of a CUDA graph of LAUNCHES calls, between two points at which the GPU
has done all its work; the first is what a light kernel would otherwise be measured by, Python's time to launch it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from benchmarks.timing import capture
from fused_lora.reference import Dropout, dropout_threshold

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from benchmarks.peers import Layer

TOKENS = 8192
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))
FEW_TOKENS = 64
R = 16
P = 0.1
LAUNCHES = 8
ROUNDS = 20
REPLAYS = 3

Call = Callable[[], object]


def cuda_timer() -> float:
    """Seconds, once the GPU has done all it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def mask(x: Tensor) -> tuple[Dropout, Tensor]:
    """The dropout that a forward draws on x, and what of it a backward is given."""
    dropout = Dropout(torch.tensor([97], device=x.device), dropout_threshold(P))
    return dropout, dropout.bits(*x.shape)


def forward_calls(layer: Layer) -> dict[str, Call]:
    """The launchers of a linear layer's forward, by name, the last two all of it; nothing is computed yet."""
    from fused_lora import fused
    from fused_lora.kernels import fused_linear, panel

    x, weight, lora_A, lora_B = (t.detach() for t in (layer.x, layer.weight, layer.lora_A, layer.lora_B))
    dropout, _ = mask(x)
    xa = x.new_ones(len(x), len(lora_A))

    def whole(dropout: Dropout | None) -> Call:
        return lambda: fused.forward(x, weight, None, lora_A, lora_B, scaling=layer.scaling, dropout=dropout)

    return {
        "panel": lambda: panel.panel(x, lora_A.T, layer.scaling, None),
        "undrawn_panel": lambda: fused.undrawn_panel(x, lora_A.T, layer.scaling),
        "panel, dropout": lambda: panel.panel(x, lora_A.T, layer.scaling, dropout),
        "drawn_panel": lambda: fused.drawn_panel(x, lora_A.T, layer.scaling, dropout),
        "fused_linear.forward": lambda: fused_linear.forward(x, weight, None, xa, lora_B),
        "forward": whole(None),
        "forward, dropout": whole(dropout),
    }


def backward_calls(layer: Layer) -> dict[str, Call]:
    """The same of its backward; the last two are all of it."""
    from fused_lora import fused
    from fused_lora.kernels import adapter_grad, fused_linear

    x, weight, lora_A, lora_B, dy = (t.detach() for t in (layer.x, layer.weight, layer.lora_A, layer.lora_B, layer.dy))
    bits = mask(x)[1]
    xa = x.new_ones(len(x), len(lora_A))
    dyb = xa
    scaling, dtype = layer.scaling, lora_A.dtype

    def whole(bits: Tensor | None) -> Call:
        tensors = dy, x, weight, lora_A, lora_B, xa
        return lambda: fused.backward(*tensors, bits=bits, scaling=scaling, dtype=dtype, enable_lora=(True,))

    return {
        "grad_panels": lambda: fused.grad_panels(dy, lora_B, xa, scaling=scaling, dtype=dtype),
        "grad_input": lambda: fused_linear.grad_input(dy, weight, dyb, lora_A, None),
        "grad_input, dropout": lambda: fused_linear.grad_input(dy, weight, dyb, lora_A, bits),
        "grad_lora_A": lambda: adapter_grad.grad_lora_A(dyb, x, None, dtype),
        "grad_lora_A, dropout": lambda: adapter_grad.grad_lora_A(dyb, x, bits, dtype),
        "backward": whole(None),
        "backward, dropout": whole(bits),
    }


def few_rows_calls(layer: Layer) -> dict[str, Call]:
    """What few rows of a layer take: all of it in one or two launches, and what goes beside cuBLAS otherwise."""
    from fused_lora import decoding, fused
    from fused_lora.kernels import few_rows_grad, narrow
    from fused_lora.kernels import mask as masks

    x, dy = layer.x.detach()[:FEW_TOKENS], layer.dy[:FEW_TOKENS]
    weight, lora_A, lora_B = (t.detach() for t in (layer.weight, layer.lora_A, layer.lora_B))
    dropout, bits = mask(x)
    xa, wide_A, wide_B = x.new_ones(len(x), len(lora_A)), lora_A.float(), lora_B.float()
    dx, scaling, dtype = torch.zeros_like(x), layer.scaling, lora_A.dtype

    def forward(dropout: Dropout | None) -> Call:
        return lambda: decoding.forward(x, weight, None, lora_A, lora_B, scaling=scaling, dropout=dropout)

    def backward(bits: Tensor | None) -> Call:
        tensors = dy, x, weight, lora_A, lora_B, xa
        return lambda: decoding.backward(*tensors, bits=bits, scaling=scaling, dtype=dtype)

    return {
        "decode": forward(None),
        "decode, dropout": forward(dropout),
        "decode, backward": backward(None),
        "decode, backward, dropout": backward(bits),
        "undrawn_panel, dyb": lambda: fused.undrawn_panel(dy, lora_B, scaling),
        "few_rows_grad, dropout": lambda: few_rows_grad.few_rows_grad(dy, xa, x, xa, bits, dtype),
        "mask.drop": lambda: masks.drop(x, dropout),
        "mask.add_kept_": lambda: masks.add_kept_(dx, xa, lora_A, bits, None),
        "narrow": lambda: narrow.narrow(wide_A, wide_B, x.dtype),
    }


def update_calls(layer: Layer) -> dict[str, Call]:
    """The layer's effective weight, and a lookup of a token for each row of x, with its gradient."""
    from fused_lora import fused

    weight, lora_A, lora_B = (t.detach() for t in (layer.weight, layer.lora_A, layer.lora_B))
    # The layer's weight serves as a table too, of K numbers for each of N words.
    indices = torch.randint(len(weight), (len(layer.x),), device=weight.device)
    table_A, table_B = weight.new_ones(layer.r, len(weight)), weight.new_ones(weight.shape[1], layer.r)
    dyb = weight.new_ones(len(indices), layer.r)
    return {
        "effective_weight": lambda: fused.effective_weight(weight, lora_A, lora_B, scaling=layer.scaling),
        "embedding": lambda: fused.embedding(indices, weight, table_A, table_B, scaling=layer.scaling),
        "embedding_grad_lora_A": lambda: fused.embedding_grad_lora_A(
            dyb, indices, len(weight), -1, False, weight.dtype
        ),
    }


PANELS = ("panel", "undrawn_panel", "panel, dropout", "drawn_panel")
FORWARD = (*PANELS, "fused_linear.forward", "forward", "forward, dropout")
GRADIENTS = ("grad_panels", "grad_input", "grad_input, dropout", "grad_lora_A", "grad_lora_A, dropout")
BACKWARD = (*GRADIENTS, "backward", "backward, dropout")
IN_ONE_LAUNCH = ("decode", "decode, dropout", "decode, backward", "decode, backward, dropout")
FEW_ROWS = (*IN_ONE_LAUNCH, "undrawn_panel, dyb", "few_rows_grad, dropout", "mask.drop", "mask.add_kept_", "narrow")
UPDATE = ("effective_weight", "embedding", "embedding_grad_lora_A")

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def layer(request: pytest.FixtureRequest) -> Layer:
    from benchmarks.peers import Layer

    in_features, out_features = request.param
    return Layer.random(TOKENS, in_features, out_features, R, P, torch.bfloat16)


def run(benchmark: BenchmarkFixture, call: Call) -> None:
    def calls() -> None:
        for _ in range(LAUNCHES):
            call()

    graph = capture(calls)
    benchmark.extra_info["launches per iteration"] = LAUNCHES
    benchmark.pedantic(graph.replay, rounds=ROUNDS, iterations=REPLAYS, warmup_rounds=2)


@needs_a_gpu
@pytest.mark.benchmark(group="forward", timer=cuda_timer)
@pytest.mark.parametrize("name", FORWARD)
def test_forward(benchmark: BenchmarkFixture, layer: Layer, name: str) -> None:
    run(benchmark, forward_calls(layer)[name])


@needs_a_gpu
@pytest.mark.benchmark(group="backward", timer=cuda_timer)
@pytest.mark.parametrize("name", BACKWARD)
def test_backward(benchmark: BenchmarkFixture, layer: Layer, name: str) -> None:
    run(benchmark, backward_calls(layer)[name])


@needs_a_gpu
@pytest.mark.benchmark(group="few rows", timer=cuda_timer)
@pytest.mark.parametrize("name", FEW_ROWS)
def test_few_rows(benchmark: BenchmarkFixture, layer: Layer, name: str) -> None:
    run(benchmark, few_rows_calls(layer)[name])


@needs_a_gpu
@pytest.mark.benchmark(group="update", timer=cuda_timer)
@pytest.mark.parametrize("name", UPDATE)
def test_update(benchmark: BenchmarkFixture, layer: Layer, name: str) -> None:
    run(benchmark, update_calls(layer)[name])
