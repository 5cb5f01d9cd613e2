"""summary against torch's own FLOP counter on plain expressions, and against what the real layers save."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import loralib
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fused_lora as lora
from fused_lora.convert import convert
from fused_lora.summary import Cost, LayerSummary, Summary, summary

DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float64, None),
]


def flops(expression: Callable[[], Tensor]) -> tuple[int, int]:
    """Of forward and of backward."""
    with FlopCounterMode(display=False, custom_mapping=lora.flop_formulas()) as counter:
        y = expression()
        forward = counter.get_total_flops()
        if y.requires_grad:
            y.sum().backward()
        return forward, counter.get_total_flops() - forward


def meta(*shape: int, grad: bool = True) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=grad)


def only(model: nn.Module, tokens: int) -> LayerSummary:
    (layer,) = summary(model, tokens).layers
    return layer


def counted(layer: LayerSummary) -> dict[str, tuple[int, int]]:
    return {
        "base": (layer.base_forward.flops, layer.base_backward.flops),
        "lora": (layer.lora_forward.flops, layer.lora_backward.flops),
    }


sizes = st.integers(0, 40)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(M=sizes, K=st.integers(1, 40), N=sizes, r=st.integers(1, 9), transposed=st.booleans())
def test_flops_of_linear(M: int, K: int, N: int, r: int, transposed: bool) -> None:
    layer = lora.Linear(K, N, r=r, fan_in_fan_out=transposed, device="meta")
    x, weight, A, B = meta(M, K), meta(N, K, grad=False), meta(r, K), meta(N, r)
    assert counted(only(layer, M)) == {
        "base": flops(lambda: F.linear(x, weight)),
        "lora": flops(lambda: x @ A.T @ B.T * 2.0),
    }


LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "Linear": ((6, 10), {}),
    "MergedLinear": ((6, 9), {"enable_lora": [True, False, True]}),
    "Embedding": ((7, 4), {}),
    "Conv1d": ((4, 6, 1), {}),
    "Conv2d": ((4, 6, 3), {"padding": 1}),
}


def an_input(name: str) -> Tensor:
    if name == "Embedding":
        return torch.zeros(2, 3, dtype=torch.int64)
    return torch.randn({"Conv1d": (1, 4, 5), "Conv2d": (1, 4, 5, 7)}.get(name, (2, 5, 6)), requires_grad=True)


@pytest.mark.parametrize("wanted", ["all", "no lora_A", "no lora_B", "x alone", "nothing"])
@pytest.mark.parametrize("name", LAYERS)
def test_torchs_counter_sees_a_layers_products(name: str, wanted: str) -> None:
    """As many as of loralib's layer; but loralib makes of a MergedLinear's adapter a matrix of the weight's size."""
    (sizes, options), x = LAYERS[name], an_input(name)
    ours, theirs = (getattr(module, name)(*sizes, r=3, **options) for module in (lora, loralib))
    for layer in (ours, theirs):
        layer.lora_A.requires_grad_(wanted in ("all", "no lora_B"))
        layer.lora_B.requires_grad_(wanted in ("all", "no lora_A"))
    if x.is_floating_point():
        x.requires_grad_(wanted != "nothing")
    expected = flops(lambda: theirs(x))
    if name == "MergedLinear":

        def slices() -> Tensor:
            lora_A, lora_B = ours.lora_A.chunk(2), ours.lora_B.chunk(2)
            return F.linear(x, ours.weight).sum() + sum(
                (x @ A.T @ B.T).sum() for A, B in zip(lora_A, lora_B, strict=True)
            )

        expected = flops(slices)
    assert flops(lambda: ours(x)) == expected
    if wanted == "all":
        layer = only(ours, positions(ours, x) if "Conv" in name else 6 if name == "Embedding" else 10)
        assert sum(expected) == layer.base.flops + layer.lora.flops
    with torch.no_grad():
        assert flops(lambda: ours(x))[0] == expected[0]


def test_flops_at_real_size() -> None:
    layer = only(lora.Linear(4096, 14336, r=16, device="meta", dtype=torch.bfloat16), 8192)
    x, A, B = meta(8192, 4096), meta(16, 4096), meta(14336, 16)
    assert layer.base.flops == 2 * 2 * 8192 * 4096 * 14336
    assert layer.lora.flops == sum(flops(lambda: x @ A.T @ B.T)) == 3 * 2 * 8192 * 16 * (4096 + 14336)


@pytest.mark.parametrize("slices", [[True], [True, False, True], [False, True, False], [True, True]], ids=str)
def test_flops_of_merged_linear(slices: list[bool]) -> None:
    M, K, N, r = 7, 11, 12, 3
    layer = lora.MergedLinear(K, N, r=r, enable_lora=slices, device="meta")
    x, rows = meta(M, K), N // len(slices)
    adapters = [(meta(r, K), meta(rows, r)) for on in slices if on]
    weight = meta(N, K, grad=False)
    assert counted(only(layer, M)) == {
        "base": flops(lambda: F.linear(x, weight)),
        "lora": flops(lambda: torch.cat([x @ A.T @ B.T for A, B in adapters], 1)),
    }


@pytest.mark.parametrize(("M", "V", "D", "r"), [(7, 13, 5, 3), (0, 3, 2, 1), (1, 1, 1, 1), (33, 2, 64, 16)])
def test_flops_of_embedding(M: int, V: int, D: int, r: int) -> None:
    layer = lora.Embedding(V, D, r=r, device="meta")
    indices, A, B = torch.zeros(M, dtype=torch.int64, device="meta"), meta(r, V), meta(D, r)
    assert counted(only(layer, M)) == {
        "base": flops(lambda: F.embedding(indices, meta(V, D, grad=False))),
        "lora": flops(lambda: F.embedding(indices, A.T) @ B.T),
    }


CONVOLUTIONS: list[tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = [
    (lora.Conv1d, {"kernel_size": 3, "padding": 1}, (9,)),
    (lora.Conv2d, {"kernel_size": 1}, (5, 7)),
    (lora.Conv2d, {"kernel_size": (3, 5), "padding": (1, 2)}, (6, 7)),
    (lora.Conv2d, {"kernel_size": 2, "stride": 2}, (6, 8)),
    (lora.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 2}, (6, 7)),
    (lora.Conv3d, {"kernel_size": 3, "padding": "same", "bias": False}, (4, 5, 6)),
]
EVERY_CONVOLUTION = pytest.mark.parametrize(
    ("cls", "options", "space"), CONVOLUTIONS, ids=[f"{c[0].__name__}-{c[1]['kernel_size']}" for c in CONVOLUTIONS]
)


def positions(layer: Any, x: Tensor) -> int:
    y = layer.conv(x)
    return y.numel() // y.shape[1]


@EVERY_CONVOLUTION
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_flops_of_convolutions(cls: Any, options: dict[str, Any], space: tuple[int, ...], p: float) -> None:
    layer = cls(4, 6, r=3, lora_dropout=p, device="meta", **options)
    conv, A, B = layer.conv, layer.lora_A, layer.lora_B
    x = meta(2, 4, *space)

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        # Group by group: torch's counter takes the weight's gradient of a grouped convolution for a dense one's.
        pieces = zip(x.chunk(conv.groups, 1), weight.chunk(conv.groups), strict=True)
        function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
        return torch.cat([function(xs, ws, None, conv.stride, conv.padding, conv.dilation) for xs, ws in pieces], 1)

    def with_adapter() -> Tensor:
        update = (B @ A).view(conv.weight.shape)
        if p > 0:
            return convolve(x, conv.weight) + convolve(F.dropout(x, p), update)
        return convolve(x, conv.weight + update)

    base = flops(lambda: convolve(x, conv.weight))
    both = flops(with_adapter)
    extra = (both[0] - base[0], both[1] - base[1])
    assert counted(only(layer, positions(layer, x))) == {"base": base, "lora": extra}


def saved_bytes(layer: nn.Module, x: Tensor) -> dict[torch.dtype, int]:
    """By dtype, what the layer's forward keeps for backward beside its parameters; every storage once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    for parameter in layer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    totals: dict[torch.dtype, int] = {}
    for tensor in kept.values():
        totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.numel() * tensor.element_size()
    return totals


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def linear(K: int, N: int, r: int, slices: list[bool] | None, **options: Any) -> Any:
    return (
        lora.Linear(K, N, r, **options) if slices is None else lora.MergedLinear(K, N, r, enable_lora=slices, **options)
    )


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("slices", [None, [True, False, True]], ids=str)
@pytest.mark.parametrize("M", [1, 7, 32])
def test_what_linear_layers_save(
    dtype: torch.dtype, adapter_dtype: torch.dtype | None, slices: list[bool] | None, M: int
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "adapter_dtype": adapter_dtype}
    layer = linear(13, 9, 3, slices, **options)
    measured = saved_bytes(layer, leaf(M, 13, dtype=dtype))
    rank = layer.lora_A.shape[0]
    assert measured == {dtype: only(layer, M).saved_bytes} == {dtype: M * (13 + rank) * dtype.itemsize}


@pytest.mark.parametrize("K", [1, 8, 13, 64])
def test_a_mask_is_a_bit_for_each_element_in_whole_bytes_a_row(K: int) -> None:
    plain, dropping = lora.Linear(K, 5, r=2), lora.Linear(K, 5, r=2, lora_dropout=0.25)
    assert only(dropping, 7).saved_bytes - only(plain, 7).saved_bytes == 7 * math.ceil(K / 8)
    assert only(lora.Linear(K, 5, r=2, lora_dropout=1.0), 7) == only(plain, 7)


@pytest.mark.parametrize("K", [1, 8, 13, 64])
def test_what_linear_layers_save_with_dropout(K: int) -> None:
    layer = lora.Linear(K, 5, r=2, lora_dropout=0.25, dtype=torch.bfloat16)
    measured = saved_bytes(layer, leaf(7, K, dtype=torch.bfloat16))
    # The seed is no activation.
    measured.pop(torch.int64, None)
    assert measured == {torch.bfloat16: 7 * (K + 2) * 2, torch.uint8: 7 * math.ceil(K / 8)}
    assert sum(measured.values()) == only(layer, 7).saved_bytes


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
def test_what_embeddings_save(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    layer = lora.Embedding(13, 6, r=3, dtype=dtype, adapter_dtype=adapter_dtype)
    measured = saved_bytes(layer, torch.randint(0, 13, (4, 5)))
    assert measured == {torch.int64: 20 * 8, dtype: 20 * 3 * dtype.itemsize}
    assert sum(measured.values()) == only(layer, 20).saved_bytes


@EVERY_CONVOLUTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_convolutions_save(
    cls: Any, options: dict[str, Any], space: tuple[int, ...], dtype: torch.dtype, p: float
) -> None:
    layer = cls(4, 6, r=3, lora_dropout=p, dtype=dtype, **options)
    x = leaf(2, 4, *space, dtype=dtype)
    expected = only(layer, positions(layer, x)).saved_bytes
    if p > 0:
        # On the CPU torch's mask has x's dtype, on a GPU it is of bytes.
        expected += x.numel() * (dtype.itemsize - 1)
    assert sum(saved_bytes(layer, x).values()) == expected


def nbytes(*tensors: Tensor | None) -> int:
    return sum(0 if tensor is None else tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("slices", [None, [True, False, True]], ids=str)
def test_bytes_of_linear_layers(slices: list[bool] | None, p: float) -> None:
    """Each pass names the tensors that it reads and writes."""
    half, M, K, N, r = torch.bfloat16, 7, 13, 9, 2
    options: dict[str, Any] = {"lora_dropout": p, "dtype": half, "adapter_dtype": torch.float32}
    layer = linear(K, N, r, slices, **options)
    enabled = 1 if slices is None else 2
    x, y, W, A, B = (
        torch.empty(M, K, dtype=half),
        torch.empty(M, N, dtype=half),
        layer.weight,
        layer.lora_A,
        layer.lora_B,
    )
    assert A.dtype == B.dtype == torch.float32
    xa = torch.empty(M, r * enabled, dtype=half)
    adapted = y if slices is None else y[:, :6]
    bits = torch.empty(M, 2, dtype=torch.uint8) if p > 0 else None
    assert only(layer, M) == dataclasses.replace(
        only(layer, M),
        base_forward=Cost(2 * M * N * K, nbytes(x, W, layer.bias, y)),
        base_backward=Cost(2 * M * N * K, nbytes(y, W, x)),
        # The panel; then what the base's product reads besides.
        lora_forward=Cost(only(layer, M).lora_forward.flops, nbytes(x, A, xa, bits) + nbytes(xa, B)),
        # dyb and db; what dx's product reads besides; da.
        lora_backward=Cost(
            only(layer, M).lora_backward.flops,
            nbytes(adapted, B, xa, xa, B) + nbytes(xa, A, bits) + nbytes(xa, x, bits, A),
        ),
    )


def test_bytes_of_embeddings() -> None:
    layer = lora.Embedding(13, 6, r=3, dtype=torch.float16, adapter_dtype=torch.float32)
    indices, y, xa = torch.zeros(20, dtype=torch.int64), torch.empty(20, 6).half(), torch.empty(20, 3).half()
    A, B, rows = layer.lora_A, layer.lora_B, torch.empty(20, 3)
    counted = only(layer, 20)
    assert counted.base_forward.bytes == nbytes(indices, y, y) and counted.base_backward == Cost()
    assert counted.lora_forward.bytes == nbytes(rows, B, xa)
    assert counted.lora_backward.bytes == nbytes(y, B, xa, xa, B) + nbytes(xa, indices, A)


def test_bytes_of_convolutions() -> None:
    options: dict[str, Any] = {"r": 2, "padding": 1, "groups": 2, "dtype": torch.bfloat16}
    layer, dropping = lora.Conv2d(4, 6, 3, **options), lora.Conv2d(4, 6, 3, lora_dropout=0.5, **options)
    x, y = torch.empty(2, 4, 5, 7).bfloat16(), torch.empty(2, 6, 5, 7).bfloat16()
    W, A, B = layer.weight, layer.lora_A, layer.lora_B
    mask = torch.empty(2, 4, 5, 7, dtype=torch.bool)
    without, with_dropout = only(layer, 70), only(dropping, 70)
    assert without.base_forward.bytes == nbytes(x, W, layer.bias, y) == with_dropout.base_forward.bytes
    assert without.base_backward.bytes == nbytes(y, W, x) == with_dropout.base_backward.bytes
    assert without.lora_forward.bytes == nbytes(W, A, B, W)
    # The weight's gradient, then lora_A's and lora_B's from it.
    assert without.lora_backward.bytes == nbytes(x, y, W) + nbytes(W, B, A) + nbytes(W, A, B)
    # Dropping x, the second convolution, the sum.
    assert with_dropout.lora_forward.bytes == nbytes(W, A, B, W) + nbytes(x, x, mask) + nbytes(x, W, y) + nbytes(
        y, y, y
    )
    assert with_dropout.lora_backward.bytes == (
        without.lora_backward.bytes + nbytes(y, W, x) + nbytes(x, mask, x) + nbytes(x, x, x)
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def test_parameters_and_totals() -> None:
    model = Tied()
    convert(model, ["embed", "body", "head"], r=2)
    lora.mark_only_lora_as_trainable(model)
    found = summary(model, 3)
    assert isinstance(found, Summary) and found.tokens == 3
    assert [(layer.name, layer.kind, layer.r) for layer in found.layers] == [
        ("embed", "Embedding", 2),
        ("body", "Linear", 2),
        ("head", "Linear", 2),
    ]
    assert [(layer.parameters, layer.trainable, layer.adapter_bytes) for layer in found.layers] == [
        (40 + 28, 28, 112),
        (20 + 16, 16, 64),
        (40 + 28, 28, 112),
    ]
    assert found.parameters == sum(p.numel() for p in model.parameters()) == 40 + 28 + 20 + 16 + 20 + 28
    assert found.trainable == 72 and found.trainable_share == 72 / 152 and found.adapter_bytes == 288
    for name in ("base", "lora"):
        costs = [getattr(layer, name) for layer in found.layers]
        assert getattr(found, name) == Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))
    assert found.saved_bytes == sum(layer.saved_bytes for layer in found.layers)
    body = found.layers[1]
    assert body.base == body.base_forward + body.base_backward and body.lora == body.lora_forward + body.lora_backward


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_mode_merging_device_and_frozen_adapters_do_not_matter(mode: str) -> None:
    model = nn.Sequential(lora.Linear(5, 4, r=2, lora_dropout=0.1), lora.Conv1d(4, 4, 3, r=2), nn.ReLU())
    expected = summary(model, 6)
    model.train(mode == "train")
    assert summary(model, 6).layers == expected.layers
    assert summary(model.to("meta"), 6) == expected
    frozen = summary(model.requires_grad_(False), 6)
    assert frozen.trainable == 0 and frozen.trainable_share == 0
    assert (frozen.base, frozen.lora, frozen.saved_bytes) == (expected.base, expected.lora, expected.saved_bytes)


def test_the_table_shows_every_layer_and_the_totals() -> None:
    model = nn.Sequential(lora.Linear(1000, 2000, r=8, device="meta"), lora.Linear(3, 3), lora.Embedding(10, 4, r=1))
    lora.mark_only_lora_as_trainable(model)
    head, *lines, total, note = str(summary(model, 4000)).split("\n")
    titles = [
        "layer",
        "class",
        "r",
        "parameters",
        "trainable",
        "adapter",
        "FLOPs",
        "+ LoRA",
        "bytes",
        "+ LoRA",
        "saved",
    ]
    assert re.split("  +", head) == titles
    assert [line.split()[:5] for line in lines] == [
        ["0", "Linear", "8", "2,026,000", "24,000"],
        ["2", "Embedding", "1", "54", "14"],
    ]
    # 2 · 2 · 4000 · 1000 · 2000 and 3 · 2 · 4000 · 8 · 3000 FLOPs; 4000 · (1000 + 8) floats.
    assert "96 kB" in lines[0] and "32 G" in lines[0] and "576 M" in lines[0] and lines[0].endswith("16.1 MB")
    assert total.split()[:4] == ["in", "all", "2,026,066", "24,014"]
    assert len({len(line) for line in (head, *lines, total)}) == 1, "columns are aligned"
    assert note.startswith("24,014 of 2,026,066 parameters are trainable (1.19%).") and "4,000 tokens" in note


def test_refusals() -> None:
    for model in (nn.Linear(2, 2), lora.Linear(2, 2), nn.Sequential()):
        with pytest.raises(ValueError, match="model has no LoRA layer"):
            summary(model, 3)
    assert summary(lora.Linear(2, 2, r=1), numpy.int64(3)).tokens == 3
    for tokens in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"tokens is {tokens}; expected an integer of 0 or more"):
            summary(lora.Linear(2, 2, r=1), tokens)  # type: ignore[arg-type]
    nothing = summary(lora.Linear(2, 2, r=1), 0)
    assert nothing.lora.flops == 0 and nothing.saved_bytes == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        nothing.tokens = 1  # type: ignore[misc]
