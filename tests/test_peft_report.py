"""The path of an accelerated PEFT layer follows its state; `report` tells it; errors are PEFT's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_peft import BASES, DOUBLE, HALF, IN, OUT, SINGLE, layer_of, outputs_and_gradients, peft_model
from test_peft import tokens as indices
from test_peft_paths import LAYER, Hook, add_second_adapter
from torch import nn
from torch.nn.utils import parametrize

import fused_lora

peft = pytest.importorskip("peft", reason="peft is not installed")

from accelerate.hooks import add_hook_to_module  # noqa: E402
from peft.helpers import disable_input_dtype_casting  # noqa: E402

import fused_lora.peft as fused_peft  # noqa: E402


def disable_and_enable(model: Any) -> Iterator[None]:
    with model.disable_adapter():
        yield


def merge_and_unmerge(model: Any) -> Iterator[None]:
    model.merge_adapter()
    yield
    model.unmerge_adapter()


def add_and_delete(model: Any) -> Iterator[None]:
    add_second_adapter(model)
    model.base_model.set_adapter(["default", "second"])
    yield
    model.delete_adapter("second")


def hook_and_unhook(model: Any) -> Iterator[None]:
    handle = layer_of(model).base_layer.register_forward_hook(lambda module, args, output: None)
    yield
    handle.remove()


def parametrize_and_back(model: Any) -> Iterator[None]:
    parametrize.register_parametrization(layer_of(model).base_layer, "weight", nn.Identity())
    yield
    parametrize.remove_parametrizations(layer_of(model).base_layer, "weight")


@pytest.mark.parametrize(
    "there_and_back", [disable_and_enable, merge_and_unmerge, add_and_delete, hook_and_unhook, parametrize_and_back]
)
@pytest.mark.parametrize("kind", ["Linear", "Embedding"])
def test_the_path_follows_the_state(kind: str, there_and_back: Callable[[Any], Iterator[None]]) -> None:
    model = fused_peft.accelerate(peft_model(BASES[kind]()))
    x = indices(6) if kind == "Embedding" else torch.randn(6, IN)

    def paths() -> tuple[str, int]:
        with fused_lora.count_paths() as counted:
            model(x)
        return fused_peft.report(model)[LAYER].path, counted.total()

    assert paths() == ("reference", 1)
    with contextmanager(there_and_back)(model):
        assert paths() == ("plain", 0)
    assert paths() == ("reference", 1)


def test_switching_between_adapters_switches_what_the_op_gets() -> None:
    model = fused_peft.accelerate(peft_model(BASES["Linear"]()))
    add_second_adapter(model, r=5, lora_alpha=1)
    x = torch.randn(6, IN)
    for name in ("second", "default", "second"):
        model.set_adapter(name)
        with fused_lora.count_paths() as paths:
            actual = outputs_and_gradients(model, x)
        assert paths
        expected = outputs_and_gradients(fused_peft.restore(copy.deepcopy(model)), x)
        assert actual.keys() == expected.keys() and all(name in key for key in actual if "lora_" in key)
        # Single precision, 25 products of numbers near 1.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def raised_by(model: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(Exception) as caught:
        model(*args, **kwargs)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    "arguments",
    [
        {"x": torch.randn(2, IN)},
        {"x": torch.ones(2, IN, dtype=torch.int64)},
        {"x": torch.randn(2, IN).bfloat16(), "unknown": 1},
        {"x": torch.randn(2, IN).bfloat16(), "adapter_names": ["default"]},
    ],
    ids=["dtype", "integers", "unknown argument", "adapter_names"],
)
def test_what_peft_refuses_is_refused_in_its_words(arguments: dict[str, Any]) -> None:
    model = peft_model(BASES["Linear"](), HALF)
    expected = raised_by(model, **arguments)
    assert raised_by(fused_peft.accelerate(model), **arguments) == expected


def test_a_base_of_another_dtype_is_refused_in_torchs_words() -> None:
    other_weight = peft_model(BASES["Linear without bias"](), HALF, SINGLE)
    other_bias = peft_model(BASES["Linear"](), SINGLE)
    layer_of(other_bias).base_layer.bias.data = layer_of(other_bias).base_layer.bias.data.bfloat16()
    for model in (other_weight, other_bias):
        expected = raised_by(model, torch.randn(2, IN))
        assert raised_by(fused_peft.accelerate(model), torch.randn(2, IN)) == expected


def test_disabled_input_casting_is_honoured() -> None:
    """PEFT then leaves x to hooks or to autocast, and without them torch refuses the mix of dtypes."""
    model, x = peft_model(BASES["Linear"](), HALF, SINGLE), torch.randn(4, IN).bfloat16()
    with disable_input_dtype_casting(model):
        expected = raised_by(model, x)
        fused_peft.accelerate(model)
        assert raised_by(model, x) == expected
        assert fused_peft.report(model)[LAYER].reason.startswith("casting its torch.bfloat16 input")
        with torch.autocast("cpu", dtype=HALF), fused_lora.count_paths() as paths:
            assert model(x).dtype == HALF and fused_peft.report(model)[LAYER].path == "reference"
        assert paths
    assert fused_peft.report(model)[LAYER].path == "reference"


def test_autocast_to_another_half_than_the_adapters_is_pefts() -> None:
    """PEFT rounds x to the adapter's dtype before autocast rounds it to its own."""
    model = fused_peft.accelerate(peft_model(BASES["Linear"](), HALF))
    with torch.autocast("cpu", dtype=torch.float16):
        reason = fused_peft.report(model)[LAYER].reason
    assert reason.startswith("its base is computed in torch.float16, its lora_A is torch.bfloat16")


def test_autocast_leaves_float64_alone() -> None:
    model, x = fused_peft.accelerate(peft_model(BASES["Linear"](), DOUBLE)), torch.randn(4, IN, dtype=DOUBLE)
    expected = model(x)
    with torch.autocast("cpu", dtype=HALF), fused_lora.count_paths() as paths:
        assert fused_peft.report(model)[LAYER].path == "reference"
        assert torch.equal(model(x), expected)
    assert paths


@pytest.mark.parametrize("kind", ["Linear", "Embedding"])
def test_a_dtype_without_arithmetic_is_pefts(kind: str) -> None:
    model = fused_peft.accelerate(peft_model(BASES[kind]())).to(torch.float8_e4m3fn)
    choice = fused_peft.report(model)[LAYER]
    assert choice.path == "plain" and choice.reason.startswith("its base is computed in torch.float8_e4m3fn")


def test_a_subclass_of_pefts_layer_is_left_alone() -> None:
    model = peft_model(BASES["Linear"]())
    layer_of(model).__class__ = type("TorchaoLoraLinear", (peft.tuners.lora.Linear,), {})
    with pytest.raises(ValueError, match=r"there is no fused op for a .*TorchaoLoraLinear"):
        fused_peft.accelerate(model)
    assert type(layer_of(model)).__name__ == "TorchaoLoraLinear"


class Others(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)
        self.conv = nn.Conv2d(2, 3, 1)
        self.attention = nn.MultiheadAttention(4, 2)
        self.hooked = nn.Linear(IN, OUT)
        self.plain = nn.Linear(IN, OUT)


def test_report_names_every_lora_layer() -> None:
    model = peft.get_peft_model(Others(), peft.LoraConfig(target_modules=["layer", "conv", "attention", "hooked"]))
    add_hook_to_module(model.base_model.model.hooked, Hook())
    assert {str(choice) for choice in fused_peft.report(model.base_model.model.layer).values()} == {
        "plain: accelerate(model) was not called since it was made"
    }
    found = fused_peft.report(fused_peft.accelerate(model))
    assert {name.removeprefix("base_model.model."): str(choice) for name, choice in found.items()} == {
        "layer": f"reference: {found[LAYER].reason}",
        "conv": "plain: there is no fused op for a peft.tuners.lora.layer.Conv2d",
        "attention": "plain: there is no fused op for a peft.tuners.lora.layer.MultiheadAttention",
        "attention.base_layer.out_proj": "plain: its base layer is a NonDynamicallyQuantizableLinear",
        "hooked": "plain: its forward was replaced on the instance",
    }
    text = str(found).splitlines()
    assert text[0] == f"1 of {len(found)} LoRA layers run on fused_lora's ops."
    assert text[1:] == [f"{name}: {choice}" for name, choice in found.items()]


def test_report_raises_what_a_forced_backend_would() -> None:
    model = fused_peft.accelerate(peft_model(BASES["Linear"](), DOUBLE))
    with fused_lora.use_backend("triton"), pytest.raises(RuntimeError, match="forced to triton"):
        fused_peft.report(model)
