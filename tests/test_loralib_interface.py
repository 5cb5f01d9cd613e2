"""What must agree with loralib: names, arguments, attributes, shapes, values of a seed, and what eval() merges."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
from promises import (
    KINDS,
    SIZES,
    adapter,
    build,
    filled,
    inputs,
    one_thread,  # noqa: F401 (an autouse fixture)
    output,
    plain,
    update_of,
    weight_of,
)
from torch import nn

import fused_lora


@pytest.fixture
def on_device(device: str) -> Iterator[None]:
    """What names no device is made on `device`."""
    with torch.device(device):
        yield


# What must agree. Both packages are asked, so that what is asserted is known to be loralib's interface.
both = pytest.mark.parametrize("lora", [loralib, fused_lora], ids=["loralib", "fused_lora"])
every_kind = pytest.mark.parametrize("kind", KINDS)
LAYERS = ["Linear", "MergedLinear", "Embedding", "ConvLoRA", "Conv1d", "Conv2d", "Conv3d", "LoRALayer"]
FUNCTIONS = ["mark_only_lora_as_trainable", "lora_state_dict"]


@both
def test_exported_names(lora: ModuleType) -> None:
    assert lora.name == "lora"
    for module, names in (("layers", LAYERS), ("utils", FUNCTIONS)):
        submodule = importlib.import_module(f"{lora.__name__}.{module}")
        assert getattr(lora, module) is submodule
        namespace: dict[str, Any] = {}
        exec(f"from {lora.__name__} import *", namespace)
        for name in names:
            assert getattr(lora, name) is getattr(submodule, name) is namespace[name], name


@both
def test_class_tree(lora: ModuleType) -> None:
    assert issubclass(lora.Linear, nn.Linear) and issubclass(lora.MergedLinear, nn.Linear)
    assert issubclass(lora.Embedding, nn.Embedding) and issubclass(lora.ConvLoRA, nn.Module)
    assert all(issubclass(cls, lora.ConvLoRA) for cls in (lora.Conv1d, lora.Conv2d, lora.Conv3d))
    assert all(issubclass(getattr(lora, name), lora.LoRALayer) for name in LAYERS)
    assert not issubclass(lora.LoRALayer, nn.Module) and not issubclass(lora.MergedLinear, lora.Linear)


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Embedding", "ConvLoRA", "LoRALayer", *FUNCTIONS])
def test_loralibs_arguments_keep_their_places_names_and_defaults(name: str) -> None:
    def arguments(lora: ModuleType) -> list[tuple[str, Any]]:
        parameters = inspect.signature(getattr(lora, name)).parameters.values()
        # enable_lora's default is a list there and a tuple here.
        return [
            (p.name, list(p.default) if p.name == "enable_lora" else p.default)
            for p in parameters
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

    assert arguments(fused_lora) == arguments(loralib)


@both
@every_kind
def test_attributes(lora: ModuleType, kind: str, on_device: None) -> None:
    layer = build(lora, kind, merge_weights=False)
    assert (layer.r, layer.lora_alpha, layer.scaling) == (2, 4, 2.0)
    assert layer.merged is False and layer.merge_weights is False
    x = inputs(kind)
    assert layer.lora_dropout(x) is x
    if kind != "Embedding":
        dropout = build(lora, kind, lora_dropout=0.25).lora_dropout
        assert isinstance(dropout, nn.Dropout) and dropout.p == 0.25
    if "Linear" in kind:
        assert layer.fan_in_fan_out is kind.endswith("transposed")
    if kind.startswith("MergedLinear"):
        assert list(layer.enable_lora) == SIZES[kind][2]["enable_lora"]
        assert layer.lora_ind.dtype == torch.bool and layer.lora_ind.shape == (6,) and not list(layer.buffers())
        # The outputs that an adapter reaches, whatever its values.
        for parameter in adapter(layer):
            nn.init.ones_(parameter)
        update = update_of(layer)
        assert torch.equal((update.T if layer.fan_in_fan_out else update).any(1), layer.lora_ind)
    if kind.startswith("Conv"):
        assert isinstance(layer.conv, getattr(nn, kind[:6]))


SHAPES = {
    "Linear": ((6, 4), (2, 4), (6, 2)),
    "Linear-transposed": ((4, 6), (2, 4), (6, 2)),
    "MergedLinear": ((6, 4), (4, 4), (4, 2)),
    "MergedLinear-transposed": ((4, 6), (2, 4), (3, 2)),
    "Embedding": ((7, 6), (2, 7), (6, 2)),
    "Conv1d": ((4, 2, 1), (2, 2), (4, 2)),
    "Conv2d": ((4, 2, 3, 3), (6, 6), (12, 6)),
    "Conv2d-groups": ((4, 1, 3, 3), (6, 6), (6, 6)),
    "Conv3d": ((4, 2, 1, 1, 1), (2, 2), (4, 2)),
}


@both
@every_kind
def test_shapes_keys_their_order_and_freezing(lora: ModuleType, kind: str, on_device: None) -> None:
    layer = build(lora, kind)
    keys = ["weight", "bias", "lora_A", "lora_B"]
    if kind == "Embedding":
        keys.remove("bias")
    if kind.startswith("Conv"):
        keys = ["lora_A", "lora_B", "conv.weight", "conv.bias"]
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()] == keys
    assert (weight_of(layer).shape, layer.lora_A.shape, layer.lora_B.shape) == SHAPES[kind]
    assert weight_of(layer).is_contiguous() is not kind.endswith("transposed")
    frozen = [name for name, parameter in layer.named_parameters() if not parameter.requires_grad]
    assert frozen == [key for key in keys if key.endswith("weight")]


@both
@every_kind
@pytest.mark.parametrize("merge_weights", [True, False])
def test_eval_merges_and_train_unmerges_unless_told_not_to(
    merge_weights: bool, lora: ModuleType, kind: str, on_device: None
) -> None:
    layer, x = filled(lora, kind, merge_weights=merge_weights), inputs(kind)
    base, update = weight_of(layer).detach().clone(), update_of(layer)
    assert update.any()
    for mode in (True, False, False, True, True, False):
        layer.train(mode)
        assert layer.merged is (merge_weights and not mode)
        assert torch.equal(weight_of(layer), base + update if layer.merged else base)
        assert torch.equal(output(layer, x), plain(layer, base + update, x))


INITIAL = {
    "Linear": ("Linear", (11, 7), {}),
    "Linear-transposed": ("Linear", (11, 7), {"fan_in_fan_out": True}),
    "Linear-no-bias": ("Linear", (11, 7), {"bias": False}),
    **{
        f"MergedLinear-{enable_lora}-{transposed}": (
            "MergedLinear",
            (11, 6),
            {"enable_lora": enable_lora, "fan_in_fan_out": transposed},
        )
        for enable_lora in ([True], [True, False, True], [False, True], [True, True, True])
        for transposed in (False, True)
    },
    "Embedding": ("Embedding", (13, 5), {}),
    "Embedding-padded": ("Embedding", (13, 5), {"padding_idx": 3}),
    "Conv2d": ("Conv2d", (4, 6, 3), {}),
    "Conv2d-groups": ("Conv2d", (4, 6, 3), {"groups": 2}),
    "Conv2d-no-bias": ("Conv2d", (4, 6, 1), {"bias": False}),
}


@pytest.mark.parametrize("r", [0, 1, 3])
@pytest.mark.parametrize("name", INITIAL)
def test_the_same_seed_draws_loralibs_values(name: str, r: int, on_device: None) -> None:
    cls, sizes, options = INITIAL[name]
    drawn = []
    for lora in (fused_lora, loralib):
        torch.manual_seed(7)
        # Two, and what comes after them: a draw too few or too many shows in the next.
        layers = [getattr(lora, cls)(*sizes, r=r, **options) for _ in range(2)]
        drawn.append([*nn.ModuleList(layers).state_dict().items(), ("next", torch.rand(3))])
    for (key, mine), (other_key, other) in zip(*drawn, strict=True):
        assert key == other_key and mine.stride() == other.stride() and torch.equal(mine, other), key


@both
@every_kind
def test_rank_0_has_no_adapter_but_still_says_merged(lora: ModuleType, kind: str, on_device: None) -> None:
    layer, x = filled(lora, kind, r=0), inputs(kind)
    assert not any(hasattr(layer, name) for name in ("lora_A", "lora_B", "scaling"))
    assert all(parameter.requires_grad for parameter in layer.parameters())
    base = weight_of(layer).detach().clone()
    for mode in (False, True):
        layer.train(mode)
        assert layer.merged is not mode
        assert torch.equal(weight_of(layer), base) and torch.equal(output(layer, x), plain(layer, base, x))
    layer.merge_weights = False
    layer.eval()
    assert layer.merged is False


@both
def test_an_unknown_bias_is_not_implemented(lora: ModuleType) -> None:
    for name in FUNCTIONS:
        with pytest.raises(NotImplementedError):
            getattr(lora, name)(nn.Sequential(build(lora, "Linear")), "some")
