"""MergedLinear: the sliced op against float64 and loralib, in every pattern, and what it reads and launches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import loralib
import pytest
import torch
from numerics import assert_as_accurate_as
from torch import Tensor, nn
from torch.nn import functional as F

import fused_lora
from fused_lora import Linear, MergedLinear
from fused_lora.functional import lora_linear
from fused_lora.reference import Dropout, dropout_threshold

T, N = True, False
# (enable_lora, slice width): slices that are tiles' multiples, primes, narrower than a tile, and many at once
PATTERNS = [
    ((T, N, T), 64),
    ((T, N, T), 53),
    ((N, T, T), 40),
    ((T, T, T), 17),
    ((N, N, T, N), 31),
    ((T,), 70),
    ((N, T), 1),
    ((T, N) * 9, 5),
]
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
NAMES = ("y", "x", "weight", "lora_A", "lora_B", "bias")


def pattern_id(value: object) -> str | None:
    return "".join("T" if on else "F" for on in value) if isinstance(value, tuple) else None


def zero_padded(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor, pattern: Sequence[bool], keep: Tensor
) -> Tensor:
    """loralib's way: a second dense product with an update that is zero in the slices without an adapter."""
    width, n = len(weight) // len(pattern), sum(pattern)
    updates = iter([b @ a for a, b in zip(lora_A.chunk(n), lora_B.chunk(n), strict=True)])
    padded = [next(updates) if on else weight.new_zeros(width, x.shape[1]).to(lora_A.dtype) for on in pattern]
    return F.linear(x, weight, bias) + 0.75 * F.linear(x * keep, torch.cat(padded))


def tensors(
    pattern: Sequence[bool], width: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str, rows: int
) -> list[Tensor]:
    """x, weight, lora_A, lora_B, bias and dy, at the scale of a trained layer."""
    columns, n, out = 43, sum(pattern), width * len(pattern)
    shapes = [(rows, columns), (out, columns), (n * r, columns), (n * width, r), (out,), (rows, out)]
    scales = [1, columns**-0.5, columns**-0.5, r**-0.5, 1, 1]
    dtypes = [dtype, dtype, adapter_dtype, adapter_dtype, dtype, dtype]
    drawn = zip(shapes, scales, dtypes, strict=True)
    return [(torch.randn(shape) * scale).to(device, of) for shape, scale, of in drawn]


def results(function: Any, inputs: list[Tensor], dy: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return dict(zip(NAMES, [y.detach(), *torch.autograd.grad(y, leaves, dy)], strict=True))


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "p"),
    [(SINGLE, SINGLE, 0.0), (HALF, HALF, 0.25), (torch.float16, SINGLE, 0.25)],
    ids=["float32", "bfloat16-dropout", "float16-float32-dropout"],
)
@pytest.mark.parametrize(("pattern", "width"), PATTERNS, ids=pattern_id)
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy_by_pattern(
    backend: str, device: str, pattern, width: int, dtype: torch.dtype, adapter_dtype: torch.dtype, p: float
) -> None:
    *inputs, dy = tensors(pattern, width, 5, dtype, adapter_dtype, device, rows=37)
    dropout = Dropout(torch.tensor([9], device=device), dropout_threshold(p)) if p > 0 else None
    keep = torch.ones(()) if dropout is None else dropout.mask(37, 43) / dropout.keep_probability

    def ours(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> Tensor:
        options = {"bias": bias, "scaling": 0.75, "dropout_p": p, "training": True, "seed": 9}
        return lora_linear(x, weight, lora_A, lora_B, enable_lora=pattern, **options)

    def theirs(*leaves: Tensor) -> Tensor:
        return zero_padded(*leaves, pattern, keep.to(device, leaves[0].dtype))

    actual = results(ours, inputs, dy)
    with torch.autocast(device, dtype=dtype, enabled=dtype != adapter_dtype):
        same_dtype = results(theirs, inputs, dy)
    exact = results(theirs, [t.double() for t in inputs], dy.double())
    for name in NAMES:
        assert_as_accurate_as(actual[name], same_dtype[name], exact[name], name)


@pytest.mark.parametrize("r", [1, 16, 33, 64, 130])
def test_accuracy_by_rank(backend: str, device: str, r: int) -> None:
    """From rank 33 on, dyb and db come from kernels of their own."""
    pattern = (T, N, T)
    *inputs, dy = tensors(pattern, 19, r, SINGLE, SINGLE, device, rows=21)
    keep = torch.ones((), device=device)
    actual = results(lambda *t: lora_linear(*t[:4], bias=t[4], scaling=0.75, enable_lora=pattern), inputs, dy)
    same_dtype = results(lambda *t: zero_padded(*t, pattern, keep), inputs, dy)
    exact = results(lambda *t: zero_padded(*t, pattern, keep.double()), [t.double() for t in inputs], dy.double())
    for name in NAMES:
        assert_as_accurate_as(actual[name], same_dtype[name], exact[name], name)


def test_more_rows_than_a_group_of_tiles_and_no_rows(backend: str, device: str) -> None:
    pattern = (T, N, T)
    for rows in (270, 1, 0):
        *inputs, dy = tensors(pattern, 30, 4, SINGLE, SINGLE, device, rows=rows)
        actual = results(lambda *t: lora_linear(*t[:4], bias=t[4], scaling=0.75, enable_lora=pattern), inputs, dy)
        ones = torch.ones((), device=device)
        same_dtype = results(lambda *t, keep=ones: zero_padded(*t, pattern, keep), inputs, dy)
        wide = [t.double() for t in inputs]
        exact = results(lambda *t, keep=ones: zero_padded(*t, pattern, keep.double()), wide, dy.double())
        for name in NAMES:
            assert_as_accurate_as(actual[name], same_dtype[name], exact[name], f"{name} of {rows} rows")


def test_a_transposed_weight_is_used_through_its_strides(backend: str, device: str) -> None:
    pattern = (T, N, T)
    x, weight, lora_A, lora_B, bias, _ = tensors(pattern, 24, 4, SINGLE, SINGLE, device, rows=9)
    y = lora_linear(x, weight, lora_A, lora_B, bias=bias, enable_lora=pattern)
    transposed = weight.T.contiguous()
    other = lora_linear(x, transposed, lora_A, lora_B, bias=bias, enable_lora=pattern, fan_in_fan_out=True)
    torch.testing.assert_close(other, y)


def test_slices_without_an_adapter_are_not_read_for_it(backend: str, device: str) -> None:
    """NaN in their part of dy reaches neither dyb nor db."""
    x, _, _, lora_B, _, dy = tensors((T, N, T), 20, 4, SINGLE, SINGLE, device, rows=33)
    dy[:, 20:40] = float("nan")
    xa = torch.randn(33, 8, device=device)
    arguments = (None, [T, N, T], 0.5, 0.0, SINGLE, fused_lora.dispatch.requested_backend())
    for wanted in ((x, None, None, lora_B, xa), (x, None, None, lora_B, None), (None, None, None, None, xa)):
        _, da, db = torch.ops.fused_lora.lora_linear_backward(dy, *wanted, *arguments)
        assert da.isfinite().all() and db.isfinite().all() and da.numel() + db.numel() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches in Triton's interpreter, unused on a GPU")
def test_launches_no_more_kernels_than_a_plain_layer() -> None:
    pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")
    from interpreter import checked_addresses

    launches = {}
    for pattern in ((T,), (T, N, T)):
        *inputs, dy = tensors(pattern, 30, 4, SINGLE, SINGLE, "cpu", rows=20)
        x, weight, lora_A, lora_B, bias = (t.requires_grad_() for t in inputs)
        with fused_lora.use_backend("triton"), checked_addresses() as forward:
            y = lora_linear(x, weight, lora_A, lora_B, bias=bias, enable_lora=pattern)
        with checked_addresses() as backward:
            torch.autograd.grad(y, (x, lora_A, lora_B), dy)
        launches[pattern] = forward["launches"], backward["launches"]
    # The panel and the GEMM; one read of dy and its sums, dx, and da with its sum.
    assert launches[(T, N, T)] == launches[(T,)] == (2, 5)


def test_one_enabled_slice_is_linear_bit_for_bit(backend: str, device: str) -> None:
    torch.manual_seed(1)
    layer = Linear(20, 12, r=4, lora_dropout=0.5, device=device)
    nn.init.normal_(layer.lora_B)
    sliced = MergedLinear(20, 12, r=4, lora_dropout=0.5, enable_lora=[True], device=device)
    sliced.load_state_dict(layer.state_dict())
    x = torch.randn(7, 20, device=device)
    outputs = []
    for module in (layer, sliced):
        torch.manual_seed(2)
        outputs.append(module(x))
    assert torch.equal(*outputs)


GRID = [
    {"r": r, "lora_alpha": 3, "enable_lora": list(pattern), "fan_in_fan_out": transposed, "merge_weights": merge}
    for r in (0, 1, 4)
    for pattern in ((T, N, T), (N, T, T), (T, T, T), (N, N, T), (T,))
    for transposed in (False, True)
    for merge in (False, True)
]


def grid_id(options: dict[str, Any]) -> str:
    flags = "-".join(name for name in ("fan_in_fan_out", "merge_weights") if options[name])
    return f"r={options['r']}-{pattern_id(tuple(options['enable_lora']))}-{flags}"


def step(layer: nn.Module, mode: bool) -> dict[str, Tensor]:
    layer.train(mode)
    generator = torch.Generator().manual_seed(5)
    dtype = layer.weight.dtype
    x = torch.randn(2, 5, 11, generator=generator).to(HALF).to(dtype).requires_grad_()
    dy = torch.randn(2, 5, 12, generator=generator).to(HALF).to(dtype)
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:A merged fused_lora layer")
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("options", GRID, ids=grid_id)
def test_same_seed_same_init_outputs_and_gradients_as_loralib(options: dict[str, Any], dtype: torch.dtype) -> None:
    layers = []
    for package in (fused_lora, loralib):
        torch.manual_seed(3)
        layer = package.MergedLinear(11, 12, **options).to(dtype)
        if options["r"] > 0:
            torch.manual_seed(4)
            nn.init.normal_(layer.lora_B)
        layers.append(layer)
    ours, theirs = layers
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other) and mine.stride() == other.stride(), name
        assert mine.requires_grad == other.requires_grad, name
    oracle = copy.deepcopy(theirs).double()
    if options["r"] > 0:
        assert torch.equal(ours.lora_ind, theirs.lora_ind)
        assert ours.enable_lora == theirs.enable_lora and ours.scaling == theirs.scaling
        for layer in (theirs, oracle):
            layer.lora_ind = layer.lora_ind.clone()
    for mode in (True, False, True):
        if options["r"] == 0 and mode:
            continue  # loralib calls merge_AB without an adapter
        mine, other, exact = step(ours, mode), step(theirs, mode), step(oracle, mode)
        assert ours.merged == theirs.merged
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert_as_accurate_as(value, other[name], exact[name], name)


@pytest.mark.parametrize("pattern", [[False], [False, False, False]])
def test_no_enabled_slice_is_a_plain_layer(pattern: list[bool]) -> None:
    layer = MergedLinear(6, 9, r=2, enable_lora=pattern)
    assert not hasattr(layer, "lora_A") and not hasattr(layer, "scaling")
    assert layer.weight.requires_grad and not layer.lora_ind.any()
    x = torch.randn(3, 6)
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), F.linear(x, layer.weight, layer.bias))
        assert layer.merged is not mode
    assert MergedLinear(6, 9, r=2).enable_lora == [False]


def test_the_callers_list_is_not_kept() -> None:
    pattern = [True, False, True]
    layer = MergedLinear(6, 9, r=2, enable_lora=pattern)
    pattern[1] = True
    assert layer.enable_lora == [True, False, True]
    layer.enable_lora.append(True)
    assert layer.enable_lora == [True, False, True]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("pattern", "width"), PATTERNS, ids=pattern_id)
def test_training_and_merged_outputs_agree(pattern: tuple[bool, ...], width: int, transposed: bool) -> None:
    layer = MergedLinear(10, width * len(pattern), r=3, enable_lora=pattern, fan_in_fan_out=transposed, dtype=DOUBLE)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 10, dtype=DOUBLE)
    unmerged = layer(x)
    with torch.no_grad():
        # Float64 sums in another order.
        torch.testing.assert_close(layer.eval()(x), unmerged, rtol=1e-12, atol=1e-12)


def test_gradcheck_and_opcheck() -> None:
    *inputs, _ = tensors((T, N, T), 4, 2, DOUBLE, DOUBLE, "cpu", rows=3)
    x, weight, lora_A, lora_B, bias = (t.requires_grad_() for t in inputs)
    options = {"scaling": 0.5, "dropout_p": 0.3, "training": True, "seed": 3, "enable_lora": [T, N, T]}
    assert torch.autograd.gradcheck(
        lambda *t: lora_linear(*t[:4], bias=t[4], **options), (x, weight, lora_A, lora_B, bias)
    )
    ops, pattern = torch.ops.fused_lora, [T, N, T]
    arguments = (x, weight, bias, lora_A, lora_B, pattern, torch.tensor([3]), 0.5, 0.3, 0, 0, "auto")
    torch.library.opcheck(ops.lora_linear.default, arguments)
    plain = [t.detach() for t in arguments[:5]]
    y, xa, bits = ops.lora_linear_forward(*plain, *arguments[5:])
    torch.library.opcheck(ops.lora_linear_forward.default, (*plain, *arguments[5:]))
    x, weight, _, lora_A, lora_B = plain
    for wanted in ((x, weight, lora_A, lora_B, xa, bits), (None, None, None, None, xa, None)):
        torch.library.opcheck(ops.lora_linear_backward.default, (y, *wanted, pattern, 0.5, 0.3, DOUBLE, "auto"))


def test_compiles_without_a_graph_break_and_exports() -> None:
    torch._dynamo.reset()
    layer = MergedLinear(8, 12, r=2, enable_lora=[True, False, True], lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8)
    for mode in (True, False):
        layer.train(mode)
        outputs = []
        for module in (layer, compiled):
            torch.manual_seed(2)
            outputs.append(module(x))
        assert torch.equal(*outputs)
    program = torch.export.export(layer.train(), (x,))
    assert sum(node.target is torch.ops.fused_lora.lora_linear.default for node in program.graph.nodes) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"enable_lora": [True, False]}, ["enable_lora has length 2", "9"]),
        ({"enable_lora": []}, ["enable_lora has length 0"]),
        ({"enable_lora": [True, True, True]}, ["lora_B", "(9, r)"]),
        ({"lora_A": torch.zeros(6, 5)}, ["lora_B has shape (6, 2)", "(6, 3)"]),
        ({"lora_B": torch.zeros(9, 2)}, ["lora_B has shape (9, 2)", "(6, r)"]),
    ],
)
def test_bad_arguments(changes: dict[str, Any], words: list[str]) -> None:
    arguments = {
        "x": torch.zeros(2, 5),
        "weight": torch.zeros(9, 5),
        "lora_A": torch.zeros(4, 5),
        "lora_B": torch.zeros(6, 2),
        "enable_lora": [True, False, True],
    }
    lora_linear(**arguments)
    with pytest.raises(ValueError) as raised:
        lora_linear(**(arguments | changes))
    assert all(word in str(raised.value) for word in words), raised.value
    with pytest.raises(ValueError, match="enable_lora has length 4"):
        MergedLinear(5, 9, r=2, enable_lora=[True] * 4)
    with pytest.raises(ValueError, match="enable_lora is True; expected one bool for each slice"):
        MergedLinear(5, 9, r=2, enable_lora=True)


def test_what_is_true_enables_a_slice() -> None:
    x, weight, lora_A, lora_B = (torch.randn(size) for size in ((2, 5), (9, 5), (4, 5), (6, 2)))
    enabled = [
        lora_linear(x, weight, lora_A, lora_B, enable_lora=slices) for slices in ([2, 0, 1], [True, False, True])
    ]
    assert torch.equal(*enabled)
