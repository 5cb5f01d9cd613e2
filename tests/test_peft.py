"""The numbers of an accelerated PEFT layer, with PEFT's own forward and gradients as the yardstick."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate_as
from torch import Tensor, nn

import fused_lora
from fused_lora.functional import lora_linear

peft = pytest.importorskip("peft", reason="peft is not installed")

from transformers.pytorch_utils import Conv1D  # noqa: E402

import fused_lora.peft as fused_peft  # noqa: E402

HALF, FLOAT16, SINGLE, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [(SINGLE, SINGLE), (FLOAT16, FLOAT16), (HALF, HALF), (HALF, SINGLE), (FLOAT16, SINGLE)]
IN, OUT = 20, 12
BASES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(IN, OUT),
    "Linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, IN),
    "Embedding": lambda: nn.Embedding(IN, OUT),
}


class Holder(nn.Module):
    """The smallest model that PEFT takes: one layer, called `layer`, and one that has no adapter."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.layer = base
        self.other = nn.Linear(OUT, OUT)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.layer(x, **kwargs)


def peft_model(base: nn.Module, dtype: torch.dtype = SINGLE, adapter: torch.dtype | None = None, **options: Any) -> Any:
    """A PEFT model of one layer, whose adapter is as large as the base, and whose bias and adapter are trained."""
    torch.manual_seed(1)
    # Conv1D draws its weight at GPT-2's scale.
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    config = peft.LoraConfig(
        **{"target_modules": ["layer"], "r": 3, "lora_alpha": 4, "fan_in_fan_out": type(base) is Conv1D} | options
    )
    model = peft.get_peft_model(Holder(base).to(dtype), config, autocast_adapter_dtype=False)
    fill(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapter is not None:
            parameter.data = parameter.data.to(adapter)
        parameter.requires_grad = "lora_" in name or name.endswith("layer.bias")
    return model


def fill(model: nn.Module) -> None:
    """Gives every adapter factors of unit scale; PEFT's initial B (an embedding's A) is zero."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.4)


def layer_of(model: Any) -> Any:
    return model.base_model.model.layer


def outputs_and_gradients(model: Any, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """y and every gradient for one dy, which is the same in every dtype; x's, too, if it has one."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = model(x, **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    y.backward(dy.to(y))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **found} | ({"x": x.grad} if x.grad is not None else {})


def assert_as_peft(model: Any, x: Tensor, *, oracle: Any = None, seed: int = 0, mixed: bool = False) -> None:
    """Everything an accelerated model computes errs by at most twice what PEFT's own forward errs in the same dtype.

    mixed: the adapter is float32 beside a half-precision base; PEFT then computes as under autocast, as README says.
    oracle: the PEFT model to compare with, if it is not the restored one.
    """
    own = fused_peft.restore(copy.deepcopy(model)) if oracle is None else oracle
    exact = copy.deepcopy(own).double()
    torch.manual_seed(seed)
    with fused_lora.count_paths() as paths:
        actual = outputs_and_gradients(model, x)
    assert paths, "PEFT's own forward ran"
    dtype = layer_of(own).get_base_layer().weight.dtype
    with torch.autocast(x.device.type, dtype=dtype) if mixed else contextlib.nullcontext():
        same_dtype = outputs_and_gradients(own, x)
    truth = outputs_and_gradients(exact, x.double() if x.is_floating_point() else x)
    assert actual.keys() == same_dtype.keys() == truth.keys()
    for name, value in actual.items():
        assert_as_accurate_as(value, same_dtype[name], truth[name], name)


def dtype_id(value: Any) -> str | None:
    return "-".join(str(d).removeprefix("torch.") for d in value) if isinstance(value, tuple) else None


def tokens(*shape: int) -> Tensor:
    """Indices with repetitions, among them 0."""
    return torch.randint(0, IN, shape, generator=torch.Generator().manual_seed(3)) // 2


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("kind", [kind for kind in BASES if kind != "Embedding"])
def test_linear(kind: str, dtypes: tuple[torch.dtype, torch.dtype], backend: str, device: str) -> None:
    dtype, adapter = dtypes
    model = fused_peft.accelerate(peft_model(BASES[kind](), dtype, adapter).to(device))
    x = torch.randn(2, 5, IN).to(device, dtype)
    assert_as_peft(model, x, mixed=dtype != adapter)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_linear_in_float64(kind: str, device: str) -> None:
    model = fused_peft.accelerate(peft_model(BASES[kind](), DOUBLE).to(device))
    own = fused_peft.restore(copy.deepcopy(model))
    x = torch.randn(4, IN).to(device, DOUBLE)
    actual, expected = outputs_and_gradients(model, x), outputs_and_gradients(own, x)
    assert {"y", "x"} < actual.keys() == expected.keys()
    for name, value in actual.items():
        # 20 products and a few roundings of numbers near 1.
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str)
def test_embedding(options: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype], backend: str, device: str) -> None:
    dtype, adapter = dtypes
    model = fused_peft.accelerate(peft_model(nn.Embedding(IN, OUT, **options), dtype, adapter).to(device))
    assert_as_peft(model, tokens(3, 7).to(device), mixed=dtype != adapter)


def test_embedding_trains_its_weight_too(device: str) -> None:
    model = fused_peft.accelerate(peft_model(nn.Embedding(IN, OUT, padding_idx=1)).to(device))
    layer_of(model).base_layer.weight.requires_grad = True
    assert_as_peft(model, tokens(9).to(device))


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"r": 1}, {"r": 17, "lora_alpha": 3}],
    ids=str,
)
def test_options_of_lora_config(options: dict[str, Any], device: str) -> None:
    model = fused_peft.accelerate(peft_model(nn.Linear(IN, OUT), **options).to(device))
    assert_as_peft(model, torch.randn(6, IN, device=device))


def test_scaling_is_read_at_each_call(device: str) -> None:
    model = fused_peft.accelerate(peft_model(nn.Linear(IN, OUT)).to(device))
    x = torch.randn(6, IN, device=device)
    before = model(x)
    layer_of(model).set_scale("default", 3.0)
    assert_as_peft(model, x)
    with peft.helpers.rescale_adapter_scale(model, 0.0):
        assert torch.equal(model(x), layer_of(model).base_layer(x))
    layer_of(model).set_scale("default", 1.0)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
@pytest.mark.parametrize("cast", [HALF, FLOAT16], ids=str)
def test_under_autocast(kind: str, cast: torch.dtype, device: str) -> None:
    """x in float32 or already cast, float32 weights and adapters: outputs, dtypes and gradients as PEFT's."""
    for x_dtype in (SINGLE, cast):
        model = fused_peft.accelerate(peft_model(BASES[kind]()).to(device))
        x = tokens(8).to(device) if kind == "Embedding" else torch.randn(8, IN).to(device, x_dtype)
        own = fused_peft.restore(copy.deepcopy(model))
        truth = outputs_and_gradients(copy.deepcopy(own).double(), x.double() if x.is_floating_point() else x)
        with torch.autocast(device, dtype=cast), fused_lora.count_paths() as paths:
            actual = outputs_and_gradients(model, x)
            assert paths
            expected = outputs_and_gradients(own, x)
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            assert_as_accurate_as(value, expected[name], truth[name], name)


def test_a_float32_adapter_beside_a_half_base_returns_what_pefts_does(device: str) -> None:
    """PEFT's default: it upcasts adapters, and sums in float32 before it rounds to the base's dtype."""
    model = peft.get_peft_model(Holder(nn.Linear(IN, OUT)).to(HALF), peft.LoraConfig(target_modules=["layer"], r=2))
    fill(model)
    assert layer_of(model).lora_A["default"].weight.dtype == SINGLE
    fused_peft.accelerate(model.to(device))
    own = fused_peft.restore(copy.deepcopy(model))
    x = torch.randn(5, IN).to(device, HALF)
    actual, expected = outputs_and_gradients(model, x), outputs_and_gradients(own, x)
    assert fused_peft.report(model)["base_model.model.layer"].path != "plain"
    assert {name: t.dtype for name, t in actual.items()} == {name: t.dtype for name, t in expected.items()}
    assert actual["y"].dtype == actual["x"].dtype == HALF


class Mask(nn.Module):
    """A dropout layer with a given mask."""

    def __init__(self, keep: Tensor, p: float) -> None:
        super().__init__()
        self.register_buffer("keep", keep, persistent=False)
        self.q = 1 - round(p * 65536) / 65536

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.keep.view(x.shape), x / self.q, torch.zeros((), dtype=x.dtype, device=x.device))


@pytest.mark.parametrize("dtypes", [(SINGLE, SINGLE), (HALF, HALF), (HALF, SINGLE)], ids=dtype_id)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_dropout(kind: str, dtypes: tuple[torch.dtype, torch.dtype], backend: str, device: str) -> None:
    """PEFT's own forward with the very mask that the seed stands for, which an identity for an adapter shows."""
    dtype, adapter = dtypes
    p, rows = 0.3, 6
    model = fused_peft.accelerate(peft_model(BASES[kind](), dtype, adapter, lora_dropout=p).to(device))
    eye, zero = torch.eye(IN, device=device), torch.zeros(IN, IN, device=device)
    torch.manual_seed(11)
    keep = lora_linear(torch.ones(rows, IN, device=device), zero, eye, eye, dropout_p=p, training=True) != 0
    assert 0 < keep.float().mean() < 1
    masked = fused_peft.restore(copy.deepcopy(model))
    layer_of(masked).lora_dropout["default"] = Mask(keep, p)
    assert_as_peft(model, torch.randn(2, 3, IN).to(device, dtype), oracle=masked, seed=11, mixed=dtype != adapter)


def test_dropout_is_off_in_eval_mode_and_at_the_rate_it_says_in_training(device: str) -> None:
    size, p = 256, 0.25
    model = peft_model(nn.Linear(IN, OUT), lora_dropout=p).to(device)
    fused_peft.accelerate(model)
    x = torch.randn(4, IN, device=device)
    model.eval()
    assert_as_peft(model, x)
    model.train()
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    first = model(x)
    torch.manual_seed(5)
    assert torch.equal(model(x), first)
    # The rate, where the adapter is the identity: size² coins, and 5 standard deviations of their mean.
    wide = peft_model(nn.Linear(size, size), r=size, lora_alpha=size, lora_dropout=p).to(device)
    fused_peft.accelerate(wide)
    with torch.no_grad():
        for module in (layer_of(wide).lora_A, layer_of(wide).lora_B):
            module["default"].weight.copy_(torch.eye(size))
        x = torch.ones(size, size, device=device)
        update = wide(x) - layer_of(wide).base_layer(x)
    dropped = (update.abs() < 0.5).double().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p)) ** 0.5 / size
    assert (update[update > 0.5] - 1 / (1 - p)).abs().max() < 1e-5


def test_dropout_of_everything_leaves_the_base(device: str) -> None:
    model = fused_peft.accelerate(peft_model(nn.Linear(IN, OUT), lora_dropout=1.0).to(device))
    x = torch.randn(4, IN, device=device)
    assert torch.equal(model(x), layer_of(model).base_layer(x))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    kind=st.sampled_from(["Linear", "Linear without bias", "Embedding"]),
    strided=st.booleans(),
    r=st.integers(1, 6),
)
def test_any_shape_and_strides(shape: list[int], kind: str, strided: bool, r: int) -> None:
    """In float64, in which both paths agree but for a few roundings."""
    model = peft_model(BASES[kind](), DOUBLE, r=r)
    if kind == "Embedding":
        x = tokens(*shape)
    else:
        x = torch.randn(*shape, IN, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    if strided and x.dim() > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = outputs_and_gradients(model, x)
    actual = outputs_and_gradients(fused_peft.accelerate(model), x)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", BASES)
def test_on_the_meta_device(kind: str) -> None:
    model = fused_peft.accelerate(peft_model(BASES[kind]()).to("meta"))
    x = tokens(2, 3).to("meta") if kind == "Embedding" else torch.empty(2, 3, IN, device="meta")
    y = model(x)
    assert y.is_meta and y.shape == (2, 3, OUT) and y.dtype == SINGLE
    assert fused_peft.report(model)["base_model.model.layer"].path != "plain"
