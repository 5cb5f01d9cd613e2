"""The single launch at real sizes: every tile's accuracy, rows' bits, graphs, streams and a busy GPU. Needs a GPU."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_as_accurate_as, assert_step_is_as_accurate, make_problem
from torch import Tensor, nn

import fused_lora
from fused_lora.functional import lora_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]

SHAPES = pytest.mark.parametrize(
    "shape", [(4096, 4096), (4096, 1024), (4096, 2048), (4096, 14336), (14336, 4096)], ids=str
)


def problem(rows: int, in_features: int, out_features: int, r: int, adapter_dtype=torch.bfloat16) -> list[Tensor]:
    """x, weight, lora_A, lora_B; the term weighs as much as the base."""
    x = torch.randn(rows, in_features, device="cuda").bfloat16()
    weight = torch.randn(out_features, in_features, device="cuda").mul(in_features**-0.5).bfloat16()
    lora_A = torch.randn(r, in_features, device="cuda").mul(in_features**-0.5).to(adapter_dtype)
    return [x, weight, lora_A, torch.randn(out_features, r, device="cuda").mul(r**-0.5).to(adapter_dtype)]


def expected(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return x @ weight.T + scaling * (x @ lora_A.to(x.dtype).T) @ lora_B.to(x.dtype).T


@SHAPES
@pytest.mark.parametrize("r", [8, 64, 128, 200])
@pytest.mark.parametrize("rows", [1, 3, 16, 32, 64, 100, 128, 256, 512, 640, 1000, 2048, 5000])
@torch.no_grad()
def test_every_tile_is_as_accurate_as_torch(rows: int, r: int, shape: tuple[int, int]) -> None:
    inputs = problem(rows, *shape, r, torch.float32 if r == 64 else torch.bfloat16)
    with fused_lora.use_backend("decode"):
        y = lora_linear(*inputs, scaling=0.5)
    exact = expected(*(t.double() for t in inputs), 0.5)
    assert_as_accurate_as(y, expected(*inputs, 0.5), exact)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("r", "adapter_dtype"), [(16, torch.bfloat16), (65, torch.float32), (128, torch.bfloat16)])
@pytest.mark.parametrize(
    "shape",
    [(16, 4096, 4096), (64, 14336, 4096), (128, 8192, 8192), (250, 4096, 4096), (512, 4096, 2048), (1000, 4096, 1024)],
    ids=str,
)
def test_a_step_on_the_path_that_it_takes(
    shape: tuple[int, int, int], r: int, adapter_dtype: torch.dtype, p: float
) -> None:
    options = {"dtype": torch.bfloat16, "adapter_dtype": adapter_dtype, "bias": False, "device": "cuda"}
    assert_step_is_as_accurate(make_problem(*shape, r, **options), p)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(16, 4096, 4096), (16, 14336, 4096), (64, 4096, 4096), (128, 4096, 14336)], ids=str)
def test_a_step_of_most_ranks(shape: tuple[int, int, int], p: float) -> None:
    options = {"dtype": torch.bfloat16, "bias": False, "device": "cuda"}
    assert_step_is_as_accurate(make_problem(*shape, 256, **options), p)


@SHAPES
@torch.no_grad()
def test_a_row_has_the_same_bits_alone_and_among_others(shape: tuple[int, int]) -> None:
    x, *others = problem(200, *shape, 16)
    with fused_lora.batch_invariant():
        y = lora_linear(x, *others)
        merged = fused_lora.Linear(*shape, r=4, device="cuda", dtype=torch.bfloat16).eval()
        z = merged(x)
        for rows in (slice(0, 1), slice(199, 200), slice(3, 10), slice(40, 57), slice(100, 164)):
            assert torch.equal(lora_linear(x[rows], *others), y[rows])
            assert torch.equal(merged(x[rows]), z[rows])
            # Another alignment of x, and other rows beside these.
            shifted = torch.cat([torch.randn_like(x[:5]), x[rows]])
            assert torch.equal(lora_linear(shifted, *others)[5:], y[rows])


@torch.no_grad()
def test_graphs_and_streams_at_once_give_the_same_bits() -> None:
    problems = [problem(rows, 4096, 1024, 16) for rows in (1, 16, 32, 64, 128)]
    with fused_lora.use_backend("decode"):
        alone = [lora_linear(*inputs) for inputs in problems]
        graphs, captured = [], []
        for inputs in problems:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                captured.append(lora_linear(*inputs))
        streams = [torch.cuda.Stream() for _ in problems]
        for _ in range(50):
            results = []
            for stream, graph, inputs in zip(streams, graphs, problems, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
                    results.append(lora_linear(*inputs))
            torch.cuda.synchronize()
            for once, eager, replayed in zip(alone, results, captured, strict=True):
                assert torch.equal(once, eager) and torch.equal(once, replayed)


@torch.no_grad()
def test_ends_while_other_work_holds_most_multiprocessors() -> None:
    inputs = problem(16, 4096, 14336, 16)
    with fused_lora.use_backend("decode"):
        once = lora_linear(*inputs)
        busy = [torch.cuda.Stream() for _ in range(4)]
        large = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        for stream in busy:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)
                for _ in range(5):
                    large @ large
        results = [lora_linear(*inputs) for _ in range(100)]
        torch.cuda.synchronize()
    assert all(torch.equal(once, y) for y in results)


@torch.no_grad()
def test_new_row_counts_of_one_class_compile_nothing_new() -> None:
    from fused_lora.kernels.decode import decode_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for cache in decode_kernel.device_caches.values())

    _, *others = problem(16, 4096, 4096, 16)
    with fused_lora.use_backend("decode"):
        lora_linear(torch.randn(2, 4096, device="cuda", dtype=torch.bfloat16), *others)
        before = compiled()
        for rows in (3, 5, 8, 15, 16):
            lora_linear(torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16), *others)
        assert compiled() == before


@torch.no_grad()
def test_few_rows_take_it_unasked() -> None:
    layer = fused_lora.Linear(4096, 4096, r=8, merge_weights=False, device="cuda", dtype=torch.bfloat16).eval()
    paths = {}
    for rows in (1, 512, 2048, 8192):
        x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        with fused_lora.count_paths() as counted:
            layer(x)
        (paths[rows],) = counted
        assert paths[rows] == f"forward/{fused_lora.explain(layer, x).path}"
    assert paths == dict.fromkeys((1, 512, 2048), "forward/decode") | {8192: "forward/triton"}


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 16, 128, 512])
def test_a_call_made_again_computes_what_the_first_way_would(rows: int) -> None:
    def long_way(x: torch.Tensor) -> torch.Tensor:
        with fused_lora.count_paths() as paths:
            y = layer(x)
        assert paths == {"forward/decode": 1}
        return y

    options = {"merge_weights": False, "device": "cuda", "dtype": torch.bfloat16, "adapter_dtype": torch.float32}
    layer = fused_lora.Linear(4096, 1024, r=16, **options).eval()
    xs = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in [(rows, 4096)] * 3 + [(1, rows, 4096)]]
    for x in xs:
        nn.init.normal_(layer.lora_B)
        layer(x)
        assert torch.equal(layer(x), long_way(x))
    layer.weight.data = torch.randn_like(layer.weight)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = layer(xs[0])
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(y, long_way(xs[0]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(xs[0])
    nn.init.normal_(layer.lora_A)
    xs[0].normal_()
    for _ in range(2):
        graph.replay()
        # What is not captured works in other words than the graph.
        expected = long_way(xs[0])
        assert torch.equal(layer(xs[0]), expected) and torch.equal(y, expected)
