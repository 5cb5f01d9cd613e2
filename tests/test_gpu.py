"""What only a GPU can show: real sizes, more than 2**31 elements, graphs, several devices. Skipped elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate_as, assert_step_is_as_accurate, make_problem, unfused

import fused_lora
from fused_lora.functional import effective_weight, lora_embedding, lora_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


@pytest.fixture(autouse=True)
def kernels_only():
    with fused_lora.use_backend("triton"):
        yield


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("shape", [(8192, 4096, 4096), (2048, 4096, 14336), (1000, 5000, 1024 + 16)], ids=str)
def test_real_sizes(shape: tuple[int, int, int], r: int, p: float) -> None:
    problem = make_problem(*shape, r, dtype=torch.bfloat16, adapter_dtype=torch.float32, bias=False, device="cuda")
    assert_step_is_as_accurate(problem, p)


def test_more_than_2_to_the_31_elements_of_x_and_dy() -> None:
    """Every part of the large result equals the same part computed alone, with its row offset; da adds up."""
    rows, features, r, part = 2**31 // 4096 + 1000, 4096, 4, 50_000
    x = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(features, features, device="cuda", dtype=torch.bfloat16) / 64
    lora_A = (torch.randn(r, features, device="cuda") / 64).requires_grad_()
    lora_B = torch.randn(features, r, device="cuda").requires_grad_()
    options = {"dropout_p": 0.1, "training": True, "seed": 11}
    y = lora_linear(x, weight, lora_A, lora_B, **options)
    dy = torch.randn_like(y)
    dx, da, db = torch.autograd.grad(y, (x, lora_A, lora_B), dy)
    sum_da, sum_db = torch.zeros_like(da, dtype=torch.float64), torch.zeros_like(db, dtype=torch.float64)
    for start in range(0, rows, part):
        piece = x.detach()[start : start + part].requires_grad_()
        y_piece = lora_linear(piece, weight, lora_A, lora_B, row_offset=start, **options)
        assert torch.equal(y_piece, y[start : start + part]), f"y differs in rows {start} and after"
        dx_piece, da_piece, db_piece = torch.autograd.grad(y_piece, (piece, lora_A, lora_B), dy[start : start + part])
        assert torch.equal(dx_piece, dx[start : start + part]), f"dx differs in rows {start} and after"
        sum_da += da_piece
        sum_db += db_piece
    # float32 sums of half a million terms, split in other places: well within a thousandth of their scale.
    for whole, summed in ((da, sum_da), (db, sum_db)):
        assert (whole - summed).abs().max() <= 1e-3 * summed.abs().max()


def test_more_than_2_to_the_31_elements_of_weight() -> None:
    out_features, features, r = 2**31 // 4096 + 512, 4096, 4
    x = torch.randn(64, features, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(out_features, features, device="cuda", dtype=torch.bfloat16) / 64
    lora_A = torch.randn(r, features, device="cuda", dtype=torch.bfloat16) / 64
    lora_B = torch.randn(out_features, r, device="cuda", dtype=torch.bfloat16)
    y = lora_linear(x, weight, lora_A, lora_B)
    last = slice(out_features - 4096, None)
    effective = weight[last].double() + lora_B[last].double() @ lora_A.double()
    bfloat16_unit = torch.finfo(torch.bfloat16).eps
    expected = x.double() @ effective.T
    assert (y[:, last] - expected).abs().max() <= 2 * bfloat16_unit * expected.abs().max()
    # A gradient that is zero but for the last columns is the last rows' own.
    dy = torch.zeros_like(y)
    dy[:, last] = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = dy[:, last].double() @ effective
    assert (dx - expected).abs().max() <= 2 * bfloat16_unit * expected.abs().max()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("in_features", "width", "r"), [(4096, 4096, 16), (1600, 1600, 64)])
def test_real_sizes_of_merged_linear(in_features: int, width: int, r: int, transposed: bool) -> None:
    """Slices that tiles do not cross and slices that they do, against each slice as a layer of its own."""
    pattern, rows = (True, False, True), 3000
    x, dy = (torch.randn(rows, n, device="cuda", dtype=torch.bfloat16) for n in (in_features, 3 * width))
    weight = torch.randn(3 * width, in_features, device="cuda", dtype=torch.bfloat16) / in_features**0.5
    lora_A = torch.randn(2 * r, in_features, device="cuda") / in_features**0.5
    lora_B = torch.randn(2 * width, r, device="cuda") / r**0.5
    results = []
    for dtype in (None, torch.bfloat16, torch.float64):
        wide = [t if dtype is not torch.float64 else t.double() for t in (x, lora_A, lora_B)]
        leaves = [t.detach().requires_grad_() for t in wide]
        if dtype is None:
            stored = weight.T.contiguous() if transposed else weight
            y = lora_linear(
                leaves[0], stored, *leaves[1:], scaling=0.75, enable_lora=pattern, fan_in_fan_out=transposed
            )
        else:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
                slices = list((leaves[0] @ weight.to(leaves[0].dtype).T).chunk(3, 1))
                for s, a, b in zip((0, 2), leaves[1].chunk(2), leaves[2].chunk(2), strict=True):
                    slices[s] = slices[s] + 0.75 * (leaves[0] @ a.T @ b.T)
                y = torch.cat(slices, 1)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for name, actual, same_dtype, exact in zip(("y", "dx", "dA", "dB"), *results, strict=True):
        assert_as_accurate_as(actual, same_dtype, exact, name)


# Of more than 8192 tokens torch sorts what lora_A's gradient is a sum of.
@pytest.mark.parametrize("tokens_of_each", [256, 2048])
def test_embedding_is_deterministic_and_can_be_captured(tokens_of_each: int) -> None:
    layer = fused_lora.Embedding(50_000, 512, r=16, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_A)
    tokens = torch.randint(0, 50_000, (8, tokens_of_each), device="cuda")
    tokens[:, : 3 * tokens_of_each // 4] = 7
    dy = torch.randn(8, tokens_of_each, 512, device="cuda", dtype=torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        y = layer(tokens)
        return y, *torch.autograd.grad(y, (layer.lora_A, layer.lora_B), dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first, second = step(), step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for one, other, replayed in zip(first, second, captured, strict=True):
        assert torch.equal(one, other) and torch.equal(one, replayed)


def test_more_than_2_to_the_31_elements_of_a_merged_weight() -> None:
    rows, columns = 2**31 // 32768 + 1000, 32768
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    lora_A = torch.randn(4, columns, device="cuda", dtype=torch.bfloat16)
    lora_B = torch.randn(rows, 4, device="cuda", dtype=torch.bfloat16)
    merged = effective_weight(weight, lora_A, lora_B, scaling=0.5)
    last = slice(rows - 2000, None)
    assert torch.equal(merged[last], effective_weight(weight[last], lora_A, lora_B[last], scaling=0.5))
    tokens = torch.tensor([0, rows - 1], device="cuda")
    looked_up = lora_embedding(tokens, weight, lora_B.T, lora_A.T, scaling=0.5)
    assert torch.equal(looked_up, merged[tokens])


def test_graph_replays_draw_fresh_masks_and_follow_the_seed() -> None:
    layer = fused_lora.Linear(256, 128, r=8, lora_dropout=0.5, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    outputs = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        graph.replay()
        outputs.append(y.clone())
    assert not torch.equal(outputs[0], outputs[1]), "two replays used one mask"
    assert torch.equal(outputs[0], outputs[2]), "manual_seed does not reach a replay"


def captured(layer: torch.nn.Module, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        y = layer(x)
    return graph, y


ADAPTED = {
    "Linear": lambda **more: fused_lora.Linear(256, 384, r=8, device="cuda", dtype=torch.bfloat16, **more),
    "MergedLinear": lambda **more: fused_lora.MergedLinear(
        256, 384, r=8, enable_lora=[True, False, True], device="cuda", dtype=torch.bfloat16, **more
    ),
    "Embedding": lambda **more: fused_lora.Embedding(1000, 256, r=8, device="cuda", dtype=torch.bfloat16, **more),
    "Conv2d": lambda **more: fused_lora.Conv2d(8, 16, 3, r=8, device="cuda", dtype=torch.bfloat16, **more),
}
INPUTS = {"Embedding": (64,), "Conv2d": (2, 8, 32, 32)}


def adapted(name: str, **more: bool) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """Two layers that differ in their adapters alone, and an input."""
    layer = ADAPTED[name](**more)
    torch.nn.init.normal_(layer.lora_A), torch.nn.init.normal_(layer.lora_B)
    other = copy.deepcopy(layer)
    torch.nn.init.normal_(other.lora_A), torch.nn.init.normal_(other.lora_B)
    x = torch.randn(INPUTS.get(name, (64, 256)), device="cuda", dtype=torch.bfloat16)
    return layer, other, torch.randint(1000, x.shape, device="cuda") if name == "Embedding" else x


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ADAPTED)
def test_a_graph_of_a_merged_layer_follows_load_adapter(name: str, guard: Callable[[], Any], tmp_path: Path) -> None:
    layer, other, x = adapted(name)
    fused_lora.save_adapter(other, tmp_path / "adapter.safetensors")
    layer.eval(), other.eval()
    with guard():
        graph, y = captured(layer, x)
        graph.replay()
        before = y.clone()
        fused_lora.load_adapter(layer, tmp_path / "adapter.safetensors")
        graph.replay()
        assert torch.equal(y, other(x)) and not torch.equal(y, before)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ADAPTED)
def test_a_graph_of_an_unmerged_layer_follows_copies_into_a_and_b(name: str, guard: Callable[[], Any]) -> None:
    layer, other, x = adapted(name, merge_weights=False)
    layer.eval(), other.eval()
    with guard():
        graph, y = captured(layer, x)
        graph.replay()
        before = y.clone()
        layer.lora_A.copy_(other.lora_A), layer.lora_B.copy_(other.lora_B)
        graph.replay()
        assert torch.equal(y, other(x)) and not torch.equal(y, before)


def test_nothing_is_merged_anew_inside_a_graph() -> None:
    """The weight would not be made before the first replay, and then in each one."""
    layer, _, x = adapted("Linear")
    with torch.no_grad():
        layer.eval().base_weight.mul_(2)
        with pytest.raises(RuntimeError, match="The base weight was changed"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(x * 2)
        layer(x)
        captured(layer, x)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_x_on_a_gpu_that_is_not_the_current_one() -> None:
    layer = fused_lora.Linear(64, 32, r=4, device="cuda:1")
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(16, 64, device="cuda:1", requires_grad=True)
    assert torch.cuda.current_device() == 0
    y = layer(x)
    y.sum().backward()
    assert y.device == x.grad.device == torch.device("cuda", 1)
    torch.testing.assert_close(y, unfused(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, layer.scaling))


def test_new_row_counts_and_offsets_compile_nothing_new() -> None:
    from fused_lora.kernels import adapter_grad, extended, fused_linear, panel, reduce

    kernels = [
        extended._extended_kernel,
        fused_linear._fused_linear_kernel,
        panel._panel_kernel,
        adapter_grad._adapter_grad_kernel,
        reduce._reduce_kernel,
    ]

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def run(rows: int, row_offset: int) -> None:
        problem = make_problem(rows, 128, 256, 8, dtype=torch.bfloat16, device="cuda")
        y = lora_linear(*problem.arguments()[:4], dropout_p=0.1, training=True, seed=1, row_offset=row_offset)
        y.backward(problem.dy)

    # A gradient's rows all in one program, and in several.
    run(64, 0)
    run(2048, 0)
    before = compiled()
    for rows, row_offset in ((1, 1), (2, 16), (17, 32), (333, 7), (4096, 8)):
        run(rows, row_offset)
    assert compiled() == before


def test_profilers_see_each_kernels_work() -> None:
    import triton

    seen: dict[str, dict[str, object]] = {}

    def remember(metadata) -> None:
        work = metadata.get()
        seen[work["name"]] = work

    problem = make_problem(64, 128, 256, 8, dtype=torch.bfloat16, bias=False, device="cuda")
    triton.knobs.runtime.launch_enter_hook.add(remember)
    try:
        lora_linear(*problem.arguments()[:4]).backward(problem.dy)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(remember)
    assert set(seen) == {"split_panel", "fused_linear", "adapter_grad", "reduce"}
    # The last GEMM is dx: 64 x 256 by 256 x 128, and the rank on top.
    assert seen["fused_linear"]["flops16"] == 2 * 64 * 128 * (256 + 8)
    assert all(work["bytes"] > 0 for work in seen.values())


def test_float32_follows_torchs_matmul_precision() -> None:
    x, weight = torch.randn(256, 512, device="cuda"), torch.randn(256, 512, device="cuda")
    lora_A, lora_B = torch.randn(8, 512, device="cuda"), torch.zeros(256, 8, device="cuda")
    exact = x.double() @ weight.double().T
    errors = {}
    previous = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = (lora_linear(x, weight, lora_A, lora_B) - exact).abs().max() / exact.abs().max()
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous
    # tf32 keeps 10 bits of the mantissa, float32 keeps 23.
    assert errors["ieee"] < 2**-18 and 2**-14 < errors["tf32"] < 2**-8


def test_sums_of_the_same_partials_in_one_dtype_after_another() -> None:
    """What is made for a launch is no part of what its compiled kernel is found by."""
    from fused_lora.kernels.reduce import reduce

    partials = torch.randn(3, 40, 8, device="cuda")
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        for other in (torch.float32, torch.bfloat16):
            sums = reduce(partials, dtype, 2.0, (partials, other))
            for found, expected in zip(sums, ((2 * partials.sum(0)).to(dtype), partials.sum(0).to(other)), strict=True):
                assert found.dtype == expected.dtype
                # Sums of three numbers in another order, rounded once.
                assert (found - expected).abs().max() <= torch.finfo(found.dtype).eps * expected.abs().max()
