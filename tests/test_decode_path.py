"""A layer's forward in one launch, as layers and graphs take it, and rows that do not depend on the others."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_as_accurate_as

import fused_lora
from fused_lora import Linear, MergedLinear
from fused_lora.functional import lora_linear

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

DTYPES = {"float32": (torch.float32,) * 2, "mixed": (torch.bfloat16, torch.float32), "float16": (torch.float16,) * 2}


def layer_of(kind: str, device: str, **options) -> torch.nn.Module:
    """In eval mode and unmerged, with an adapter that counts."""
    options = {"r": 3, "lora_alpha": 6, "merge_weights": False, "device": device} | options
    if kind == "linear":
        layer = Linear(48, 33, **options)
    elif kind == "transposed":
        layer = Linear(48, 33, fan_in_fan_out=True, **options)
    else:
        layer = MergedLinear(48, 33, enable_lora=[True, False, True], **options)
    torch.nn.init.normal_(layer.lora_B)
    return layer.eval()


KINDS = pytest.mark.parametrize("kind", ["linear", "transposed", "merged"])


@KINDS
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 19, 48), (0, 48)], ids=str)
@torch.no_grad()
def test_a_layer_in_one_launch_is_as_accurate_as_torch(kind: str, dtypes: str, shape, device: str) -> None:
    dtype, adapter_dtype = DTYPES[dtypes]
    layer = layer_of(kind, device, dtype=dtype, adapter_dtype=adapter_dtype)
    x = torch.randn(*shape, device=device, dtype=dtype)
    with fused_lora.use_backend("decode"), fused_lora.count_paths() as paths:
        y = layer(x)
    assert dict(paths) == {"forward/decode": 1}
    with fused_lora.use_backend("reference"):
        same_dtype, exact = layer(x), layer.double()(x.double())
    assert_as_accurate_as(y, same_dtype, exact)


@torch.no_grad()
def test_an_adapter_that_is_copied_in_place_is_followed(device: str) -> None:
    layer, other, x = layer_of("linear", device), layer_of("linear", device), torch.randn(5, 48, device=device)
    other.weight.copy_(layer.weight), other.bias.copy_(layer.bias)
    with fused_lora.use_backend("decode"):
        before, expected = layer(x), other(x)
        layer.lora_A.copy_(other.lora_A), layer.lora_B.copy_(other.lora_B)
        assert torch.equal(layer(x), expected) and not torch.equal(before, expected)


@pytest.mark.parametrize("kind", ["linear", "merged"])
def test_training_takes_it_too(kind: str, device: str) -> None:
    """A backward only of a plain layer, and only if dx is wanted."""
    layer = layer_of(kind, device, lora_dropout=0.5).train()
    for requires_grad in (True, False):
        x = torch.randn(5, 48, device=device, requires_grad=requires_grad)
        with fused_lora.use_backend("decode"), fused_lora.count_paths() as paths:
            assert fused_lora.explain(layer, x).path == "decode"
            layer(x).sum().backward()
        backward = "decode" if kind == "linear" and requires_grad else "triton"
        assert dict(paths) == {"forward/decode": 1, f"backward/{backward}": 1}


@torch.no_grad()
def test_compiled_layers_take_it_too(device: str) -> None:
    layer, x = layer_of("merged", device), torch.randn(5, 48, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with fused_lora.use_backend("decode"), fused_lora.count_paths() as paths:
        assert torch.equal(compiled(x), layer(x))
    assert dict(paths) == {"forward/decode": 2}
    with fused_lora.batch_invariant(), fused_lora.count_paths() as paths:
        assert torch.equal(compiled(x), layer(x))
    assert dict(paths) == {"forward/batch_invariant": 2}


def invariant_layers(device: str, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Of every kind: unmerged, merged, and without any adapter."""
    layers = {kind: layer_of(kind, device, dtype=dtype) for kind in ("linear", "transposed", "merged")}
    layers["adapter merged"] = layer_of("linear", device, dtype=dtype, merge_weights=True).train().eval()
    layers["transposed, merged"] = layer_of("transposed", device, dtype=dtype, merge_weights=True).train().eval()
    layers["no adapter"] = Linear(48, 33, device=device, dtype=dtype).eval()
    assert layers["adapter merged"].merged
    return layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore:A merged fused_lora layer")
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: torch.dtype, grad: bool, device: str) -> None:
    x = torch.randn(64, 48, device=device, dtype=dtype)
    for name, layer in invariant_layers(device, dtype).items():
        with fused_lora.batch_invariant(), fused_lora.count_paths() as paths, torch.set_grad_enabled(grad):
            y = layer(x.view(4, 16, 48)).view(64, 33)
            for rows in (slice(0, 1), slice(5, 22), slice(31, 64)):
                assert torch.equal(layer(x[rows]), y[rows]), name
                assert torch.equal(layer(x[rows.start]), y[rows.start]), name
        assert set(paths) == {"forward/batch_invariant"}, name
        with fused_lora.use_backend("reference"):
            same_dtype = layer(x)
        exact = layer.double()(x.double())
        assert_as_accurate_as(y.detach(), same_dtype.detach(), exact.detach(), name)


@pytest.mark.filterwarnings("ignore:A merged fused_lora layer")
def test_float64_is_invariant_too(device: str) -> None:
    for layer in invariant_layers(device, torch.float64).values():
        x = torch.randn(7, 48, device=device, dtype=torch.float64)
        with fused_lora.batch_invariant():
            assert torch.equal(layer(x)[3:4], layer(x[3:4]))


@pytest.mark.filterwarnings("ignore:A merged fused_lora layer")
def test_gradients_within_batch_invariant_are_the_layers(device: str) -> None:
    x = torch.randn(6, 48, device=device, dtype=torch.float64, requires_grad=True)
    for name, layer in invariant_layers(device, torch.float64).items():
        layer.weight.requires_grad_(not layer.merged)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad and not layer.merged)]
        gradients = []
        for context in (fused_lora.batch_invariant(), fused_lora.use_backend("reference")):
            with context:
                gradients.append(torch.autograd.grad(layer(x).sin().sum(), wanted))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("enable_lora", [(False,), (False, False), (True, False)])
@pytest.mark.parametrize("r", [0, 3])
def test_without_an_enabled_slice_or_a_rank_it_is_the_plain_layer(
    enable_lora: tuple[bool, ...], r: int, device: str
) -> None:
    rows = 8 // len(enable_lora) * sum(enable_lora)
    ranks = r * sum(enable_lora)
    x, weight = torch.randn(5, 6, device=device), torch.randn(8, 6, device=device)
    lora_A, lora_B = torch.zeros(ranks, 6, device=device), torch.zeros(rows, r, device=device)
    with fused_lora.batch_invariant():
        y = lora_linear(x, weight, lora_A, lora_B, enable_lora=enable_lora)
        expected = lora_linear(x, weight, torch.zeros(0, 6, device=device), torch.zeros(8, 0, device=device))
    assert torch.equal(y, expected)


def test_a_mask_is_refused_within_batch_invariant(device: str) -> None:
    layer, x = layer_of("linear", device, lora_dropout=0.5).train(), torch.randn(5, 48, device=device)
    message = r"lora_dropout is in force within batch_invariant\(\); expected a layer in eval mode"
    with fused_lora.batch_invariant(), pytest.raises(RuntimeError, match=message):
        layer(x)


def test_blocks_nest_and_end(device: str) -> None:
    layer, x = layer_of("linear", device), torch.randn(5, 48, device=device)
    with fused_lora.batch_invariant():
        with fused_lora.use_backend("reference"), fused_lora.batch_invariant():
            pass
        assert fused_lora.explain(layer, x).path == "batch_invariant"
    assert fused_lora.explain(layer, x).path != "batch_invariant"


@pytest.mark.parametrize(("p", "training"), [(0.5, True), (0.5, False), (1.0, True)])
@torch.no_grad()
def test_explain_agrees_with_what_runs(p: float, training: bool, device: str) -> None:
    """Also where the dropout's own mode is not the layer's."""
    layer, x = layer_of("linear", device, lora_dropout=p), torch.randn(5, 48, device=device)
    layer.lora_dropout.train(training)
    with fused_lora.use_backend("decode"), fused_lora.count_paths() as paths:
        layer(x)
    with fused_lora.use_backend("decode"):
        assert dict(paths) == {f"forward/{fused_lora.explain(layer, x).path}": 1}
    assert set(paths) == {"forward/decode"}


@torch.no_grad()
def test_explain_of_any_linear_layer_within_batch_invariant(device: str) -> None:
    x = torch.randn(3, 48, device=device)
    for layer in invariant_layers(device, torch.float32).values():
        with fused_lora.batch_invariant(), fused_lora.count_paths() as paths:
            layer(x)
            assert dict(paths) == {f"forward/{fused_lora.explain(layer, x).path}": 1}
    assert fused_lora.explain(fused_lora.Linear(4, 4), x).path == "plain"
