"""Checkpoints: to and from loralib and plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
from checkpoints import ALPHA, BIASES, TFT, R, add, assert_same_entries, drop, filled, rename
from numerics import assert_as_accurate_as
from torch import Tensor, nn
from torch.nn import functional as F

import fused_lora
from fused_lora import lora_state_dict


class Model(nn.Module):
    """Every layer class that loralib can run, beside plain ones. Tokens (batch, 5) to (batch, 2, 5, 9)."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        adapter = {"r": R, "lora_alpha": ALPHA}
        self.embedding = module.Embedding(11, 6, **adapter)
        self.norm = nn.LayerNorm(6)
        self.block = nn.ModuleDict(
            {
                "up": module.Linear(6, 4, **adapter),
                "out": module.Linear(4, 6, fan_in_fan_out=True, bias=False, **adapter),
                "qkv": module.MergedLinear(6, 9, enable_lora=TFT, **adapter),
                "plain": module.Linear(9, 9, r=0),
            }
        )
        self.conv = module.Conv2d(2, 2, 3, groups=2, padding=1, **adapter)
        self.head = nn.Conv2d(2, 2, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        x = self.block["qkv"](x + self.block["out"](torch.tanh(self.block["up"](x))))
        return self.head(self.conv(torch.stack([x, self.block["plain"](x)], 1)))


def assert_same_function(ours: nn.Module, theirs: nn.Module, device: str) -> None:
    """In both modes; `theirs` is the yardstick in float32 and, cast, the oracle in float64."""
    tokens = torch.randint(11, (3, 5), device=device)
    exact = copy.deepcopy(theirs).double()
    with torch.no_grad():
        for mode in (True, False, True):
            for module in (ours, theirs, exact):
                module.train(mode)
            assert_as_accurate_as(ours(tokens), theirs(tokens), exact(tokens), f"output of train({mode})")


@pytest.mark.parametrize("direction", ["from loralib", "to loralib"])
def test_full_state_dicts_are_loralibs(direction: str, device: str) -> None:
    ours, theirs = filled(Model(fused_lora), device, seed=1), filled(Model(loralib), device, seed=2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    source, target = (theirs, ours) if direction == "from loralib" else (ours, theirs)
    target.load_state_dict(source.state_dict(), strict=True)
    assert_same_entries(target.state_dict(), source.state_dict())
    assert_same_function(ours, theirs, device)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("direction", ["from loralib", "to loralib"])
def test_adapters_are_loralibs(direction: str, bias: Any, device: str) -> None:
    ours, theirs = filled(Model(fused_lora), device, seed=1), filled(Model(loralib), device, seed=1)
    mine, other = lora_state_dict(ours, bias), loralib.lora_state_dict(theirs, bias)
    # loralib looks for `conv.bias` of the layer `conv` under the name `bias`, which its own layer does not have.
    assert set(mine) == set(other) | ({"conv.conv.bias"} if bias == "lora_only" else set())
    assert ("head.bias" in mine) == ("norm.bias" in mine) == ("block.plain.bias" in mine) == (bias == "all")
    filled(ours if direction == "from loralib" else theirs, device, seed=2)
    loaded = copy.deepcopy(other if direction == "from loralib" else mine)
    target, source = (ours, theirs) if direction == "from loralib" else (theirs, ours)
    # Everything but the adapter is shared beforehand, as a base model is.
    base = {key: tensor for key, tensor in source.state_dict().items() if key not in loaded}
    target.load_state_dict(base, strict=False)
    report = target.load_state_dict(loaded, strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) == set(base)
    assert_same_entries(target.state_dict(), source.state_dict())
    assert_same_function(ours, theirs, device)


def test_an_adapter_from_loralib_takes_effect_in_a_merged_model_at_once(device: str) -> None:
    ours, theirs = filled(Model(fused_lora), device), filled(Model(loralib), device)
    ours.eval(), filled(theirs, device, seed=2)
    for strict, state in ((True, theirs.state_dict()), (False, loralib.lora_state_dict(theirs))):
        ours.load_state_dict(state, strict=strict)
        assert all(module.merged for module in ours.modules() if isinstance(module, fused_lora.LoRALayer))
        tokens = torch.randint(11, (3, 5), device=device)
        exact = copy.deepcopy(theirs).double().eval()
        with torch.no_grad():
            assert_as_accurate_as(ours(tokens), copy.deepcopy(theirs).eval()(tokens), exact(tokens), "output")


class MainConv2d(nn.Module):
    """Conv2d as loralib's main branch has it: `conv`, and its parameters once more under their own names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        for name, parameter in self.conv.named_parameters():
            self.register_parameter(name, parameter)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(R * 3, 2 * 3)), nn.Parameter(torch.zeros(2 * 3, R * 3))

    def forward(self, x: Tensor) -> Tensor:
        update = (self.lora_B @ self.lora_A).view(self.conv.weight.shape) * (ALPHA / R)
        return F.conv2d(x, self.conv.weight + update, self.conv.bias, groups=2)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("direction", ["from main", "to main"])
def test_convolutions_of_loralibs_main_branch(direction: str, mode: bool, device: str) -> None:
    theirs = nn.Sequential(nn.Identity(), filled(MainConv2d(), device, seed=1))
    ours = nn.Sequential(nn.Identity(), fused_lora.Conv2d(2, 4, 3, groups=2, r=R, lora_alpha=ALPHA))
    filled(ours, device, seed=2).train(mode)
    leaves = ["weight", "bias", "lora_A", "lora_B", "conv.weight", "conv.bias"]
    assert list(theirs.state_dict()) == [f"1.{leaf}" for leaf in leaves]
    if direction == "from main":
        state = theirs.state_dict()
        ours.load_state_dict(state, strict=True)
        assert list(state) == list(theirs.state_dict()), "loading changes nothing of the dictionary that it is given"
    else:
        # Of six keys, two are aliases that are not written.
        report = theirs.load_state_dict(ours.state_dict(), strict=False)
        assert report.missing_keys == ["1.weight", "1.bias"] and not report.unexpected_keys
    x = torch.randn(2, 2, 6, 5, device=device)
    exact = copy.deepcopy(theirs).double()
    with torch.no_grad():
        assert_as_accurate_as(ours(x), theirs(x), exact(x.double()), "output")
    for leaf in leaves[2:]:
        assert torch.equal(ours.state_dict()[f"1.{leaf}"], theirs.state_dict()[f"1.{leaf}"]), leaf


@pytest.mark.parametrize("bias", BIASES)
def test_convolution_adapters_of_loralibs_main_branch(bias: Any, device: str) -> None:
    theirs = nn.Sequential(filled(MainConv2d(), device, seed=1))
    ours = nn.Sequential(fused_lora.Conv2d(2, 4, 3, groups=2, r=R, lora_alpha=ALPHA)).to(device)
    state = {key: tensor for key, tensor in theirs.state_dict().items() if "lora_" in key}
    if bias != "none":
        state["0.bias"] = theirs.state_dict()["0.bias"]
    report = ours.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys == (["0.conv.weight"] + ["0.conv.bias"] * (bias == "none"))
    for key, tensor in state.items():
        assert torch.equal(ours.state_dict()[key.replace("0.bias", "0.conv.bias")], tensor)


def test_two_names_of_a_convolutions_weight_that_disagree_are_an_error(device: str) -> None:
    ours = fused_lora.Conv2d(2, 4, 3, groups=2, r=R).to(device)
    state = {key: tensor.clone() for key, tensor in filled(MainConv2d(), device).state_dict().items()}
    state["weight"] += 1
    with pytest.raises(RuntimeError, match=r"weight and conv\.weight differ"):
        ours.load_state_dict(state, strict=False)


class Plain(nn.Module):
    """A model before it has adapters, or the same model with fused_lora's layers in it."""

    def __init__(self, module: Any, **adapter: Any) -> None:
        super().__init__()
        self.before = nn.LayerNorm(3)
        self.embedding = module.Embedding(11, 6, **adapter)
        self.linear = module.Linear(6, 9, **adapter)
        merged = {"enable_lora": TFT} if adapter else {}
        self.merged = getattr(module, "MergedLinear" if adapter else "Linear")(9, 9, **merged, **adapter)
        self.conv = module.Conv1d(3, 4, 3, **adapter)
        self.convs = nn.Sequential(module.Conv2d(2, 2, 3, **adapter), module.Conv3d(1, 2, 2, **adapter))
        self.after = nn.Linear(2, 2)


LAYERS = ["embedding", "linear", "merged", "conv", "convs.0", "convs.1"]
ADAPTERS = {f"{layer}.{leaf}" for layer in LAYERS for leaf in ("lora_A", "lora_B")}


def with_adapters(device: str, seed: int = 2) -> Any:
    return filled(Plain(fused_lora, r=R, lora_alpha=ALPHA), device, seed)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("strict", [False, True])
def test_the_base_of_a_plain_model_loads(strict: bool, mode: bool, device: str) -> None:
    ours, source = with_adapters(device).train(mode), filled(Plain(nn), device, seed=1)
    adapters = {key: tensor.clone() for key, tensor in lora_state_dict(ours).items()}
    state = source.state_dict()
    report = ours.load_state_dict(state, strict=strict)
    assert not report.missing_keys and not report.unexpected_keys
    assert list(state) == list(source.state_dict()), "loading changes nothing of the dictionary that it is given"
    ours.train()
    assert_same_entries(lora_state_dict(ours), adapters)
    base = {
        key.replace("conv.conv.", "conv.").replace("0.conv.", "0.").replace("1.conv.", "1."): tensor
        for key, tensor in ours.state_dict().items()
        if key not in adapters
    }
    assert_same_entries(base, source.state_dict())


# What is wrong with the base checkpoint, and the keys to be called missing and unexpected.
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], set[str], set[str]]] = {
    **{
        f"weight of {layer} under another name": (
            rename(f"{layer}.weight", f"{layer}.wieght"),
            {f"{layer}.conv.weight" if "conv" in layer else f"{layer}.weight"},
            {f"{layer}.wieght"},
        )
        for layer in LAYERS
    },
    **{
        f"no bias of {layer}": (
            drop(f"{layer}.bias"),
            {f"{layer}.conv.bias" if "conv" in layer else f"{layer}.bias"},
            set(),
        )
        for layer in LAYERS[1:]
    },
    **{
        f"only lora_B of {layer}": (
            add(f"{layer}.lora_B", torch.zeros(1)),
            {f"{layer}.lora_A"},
            set(),
        )
        for layer in LAYERS
    },
    **{
        f"lora_a instead of lora_A of {layer}": (
            add(f"{layer}.lora_a", torch.zeros(1)),
            {f"{layer}.lora_A", f"{layer}.lora_B"},
            {f"{layer}.lora_a"},
        )
        for layer in LAYERS
    },
    "a plain module before": (drop("before.weight"), {"before.weight"}, set()),
    "a plain module after": (rename("after.bias", "after.bais"), {"after.bias"}, {"after.bais"}),
    "a whole layer": (drop("linear.weight", "linear.bias"), {"linear.weight", "linear.bias"}, set()),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_base_checkpoint_is_still_reported(fault: str, strict: bool, device: str) -> None:
    ours = with_adapters(device)
    state = dict(filled(Plain(nn), device, seed=1).state_dict())
    change, missing, unexpected = FAULTS[fault]
    change(state)
    for key in state.keys() & ADAPTERS:
        state[key] = torch.zeros_like(ours.state_dict()[key])
    allowed = set(missing)
    for key in missing:
        if key.endswith("weight"):
            # Without its weight, a layer's adapter may be missing as well as excused.
            layer = key.removesuffix(".weight").removesuffix(".conv")
            allowed |= {f"{layer}.lora_A", f"{layer}.lora_B"}
    if strict:
        with pytest.raises(RuntimeError) as raised:
            ours.load_state_dict(state, strict=True)
        named = set(str(raised.value).replace('"', " ").replace(",", " ").split())
        assert missing | unexpected <= named
        assert not (ADAPTERS - allowed) & named
    else:
        report = ours.load_state_dict(state, strict=False)
        assert missing <= set(report.missing_keys) <= allowed
        assert set(report.unexpected_keys) == unexpected


def test_a_missing_adapter_is_reported_when_no_base_is_loaded(device: str) -> None:
    ours = with_adapters(device)
    adapter = dict(lora_state_dict(ours))
    del adapter["conv.lora_A"], adapter["linear.lora_A"], adapter["linear.lora_B"]
    missing = set(ours.load_state_dict(adapter, strict=False).missing_keys)
    assert missing & ADAPTERS == {"conv.lora_A", "linear.lora_A", "linear.lora_B"}
