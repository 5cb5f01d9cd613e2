"""What convert's target_modules and patterns name, with PEFT as the oracle, and what it refuses, changing nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from transformers.pytorch_utils import Conv1D

import fused_lora as lora
from fused_lora.convert import convert, unconvert

NAMES = ["a", "b", "ab", "proj"]


def tree(depth: int) -> nn.ModuleDict:
    """Names a.b.proj and the like, of every depth up to this one, each of a Linear."""
    leaves: dict[str, nn.Module] = {name: nn.Linear(2, 2, device="meta") for name in NAMES}
    inner = {f"{name}s": tree(depth - 1) for name in NAMES} if depth > 1 else {}
    return nn.ModuleDict(leaves | inner)


parts = st.sampled_from([*NAMES, *(f"{name}s" for name in NAMES), "", r"\w+", ".*", "(a|b)", "p.oj"])
paths = st.lists(parts, min_size=1, max_size=3).map(".".join)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(targets=st.one_of(paths, st.lists(st.one_of(st.sampled_from(NAMES), paths), min_size=1, max_size=3)))
@example(targets=["b"])
@example(targets=["abs.proj", "a"])
def test_names_and_expressions_match_what_peft_matches(targets: str | list[str]) -> None:
    model = tree(2)
    config = LoraConfig(target_modules=targets)
    named = [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]
    containers = [name for name in named if isinstance(model.get_submodule(name), nn.ModuleDict)]
    idle = [] if isinstance(targets, str) else [t for t in targets if not match_alone(model, t)]
    if named and not containers and not idle:
        assert [replaced.name for replaced in convert(model, targets, r=1)] == named
        for name, module in model.named_modules():
            assert isinstance(module, lora.Linear) == (name in named)
        return
    with pytest.raises(ValueError) as refused:
        convert(model, targets, r=1)
    assert not any(isinstance(module, lora.LoRALayer) for module in model.modules())
    if not idle:
        assert all(f"{name} is a ModuleDict, which holds other modules" in str(refused.value) for name in containers)


def match_alone(model: nn.Module, target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules())


@settings(derandomize=True, max_examples=60, deadline=None)
@given(keys=st.lists(st.sampled_from([*NAMES, "bs.a", "^a", "as.*", r"\w+", "(a|b)", "b.*proj"]), unique=True))
def test_patterns_choose_what_peft_chooses(keys: list[str]) -> None:
    model = tree(2)
    pattern = {key: index + 2 for index, key in enumerate(keys)}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    expected = {name: pattern.get(get_pattern_key(keys, name), 1) for name in names}
    replaced = convert(model, is_linear, 1, rank_pattern=pattern)
    assert {layer.name: layer.r for layer in replaced} == expected
    unconvert(model)
    replaced = convert(model, is_linear, 1, 1, alpha_pattern=pattern)
    assert {layer.name: layer.lora_alpha for layer in replaced} == expected
    for name, value in expected.items():
        layer = model.get_submodule(name)
        assert layer.r == 1 and layer.scaling == value


def is_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def test_predicates_get_name_and_module() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    seen: dict[str, nn.Module] = {}

    def wide(name: str, module: nn.Module) -> bool:
        seen[name] = module
        return getattr(module, "out_features", 0) == 3

    before = dict(model.named_modules())
    (replaced,) = convert(model, wide, r=2, lora_alpha=8)
    assert seen == before and replaced.name == "0"
    assert str(replaced) == "0: torch.nn.modules.linear.Linear -> fused_lora.linear.Linear, r=2, lora_alpha=8"


def test_layers_are_converted_a_few_at_a_time() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Conv1d(2, 2, 1))
    convert(model, ["0"], r=2)
    convert(model, ["1"], r=3)
    assert (model[0].r, model[1].r) == (2, 3)
    with pytest.raises(ValueError, match=r"0 is a LoRA layer already.*; 1 is a LoRA layer already"):
        convert(model, ["0", "1"], r=2)
    with pytest.raises(ValueError, match=r"1\.conv is a LoRA layer already or a part of one"):
        convert(model, ["conv"], r=2)


@pytest.mark.parametrize("slices", [[True], [True, False, True], [False, True]], ids=str)
@pytest.mark.parametrize("plain", [nn.Linear(4, 6), Conv1D(6, 4)], ids=["Linear", "Conv1D"])
def test_enable_lora_makes_merged_linears(slices: list[bool], plain: nn.Module) -> None:
    model = nn.ModuleDict({"c_attn": plain, "c_proj": nn.Linear(4, 4)})
    x = torch.randn(3, 4)
    expected = plain(x).detach()
    convert(model, ["c_attn", "c_proj"], r=2, enable_lora={"c_attn": slices})
    layer = model["c_attn"]
    assert type(layer) is lora.MergedLinear and layer.enable_lora == slices and type(model["c_proj"]) is lora.Linear
    assert torch.equal(layer(x), expected)
    nn.init.ones_(layer.lora_B)
    changed = (layer(x) != expected).any(0)
    assert torch.equal(changed, layer.lora_ind)
    merged = layer.merged_weight()
    unconvert(model)
    assert type(layer) is type(plain) and torch.equal(layer.weight, merged) and layer.weight.is_contiguous()


class Child(nn.Linear):
    pass


def replaced_forward() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def plain_weight() -> nn.Module:
    layer = nn.Linear(3, 3)
    del layer.weight
    layer.weight = torch.zeros(3, 3)
    return layer


def with_attribute(name: str, value: Any) -> nn.Module:
    layer = nn.Linear(3, 3)
    setattr(layer, name, value)
    return layer


class Quantised(torch.Tensor):
    """A tensor subclass, as quantised and distributed weights are."""


def quantised_weight() -> nn.Module:
    layer = nn.Linear(3, 3, bias=False)
    layer._parameters["weight"] = torch.zeros(3, 3).as_subclass(Quantised)  # type: ignore[assignment]
    return layer


def parametrised() -> nn.Module:
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


REFUSED = {
    "container": (lambda: nn.Sequential(nn.Linear(3, 3)), "bad is a Sequential, which holds other modules"),
    "norm": (lambda: nn.LayerNorm(3), "bad is a LayerNorm"),
    "bilinear": (lambda: nn.Bilinear(3, 3, 3), "bad is a Bilinear"),
    "embedding-bag": (lambda: nn.EmbeddingBag(3, 3), "bad is a EmbeddingBag"),
    "transposed": (lambda: nn.ConvTranspose2d(3, 3, 3), "bad is a ConvTranspose2d"),
    "lstm": (lambda: nn.LSTM(3, 3), "bad is a LSTM"),
    "subclass": (lambda: Child(3, 3), "bad is a Child, a subclass that may compute something else"),
    "lazy": (lambda: nn.LazyLinear(3), "bad is a LazyLinear, a subclass"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "bad is a MultiheadAttention, which holds other modules"),
    "out-proj": (
        lambda: nn.MultiheadAttention(4, 2).out_proj,
        "bad is a NonDynamicallyQuantizableLinear, which nn.MultiheadAttention never calls",
    ),
    "parametrised": (parametrised, "bad is parametrised"),
    "weight-norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "bad is parametrised"),
    "parametrised-conv": (lambda: parametrizations.orthogonal(nn.Conv1d(3, 3, 1)), "bad is parametrised"),
    "spectral-norm": (lambda: spectral_norm(nn.Linear(3, 3)), "bad has weight_u, weight_v, weight_orig beside"),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5), "bad has weight_mask, weight_orig"),
    "child": (lambda: with_attribute("extra", nn.ReLU()), "bad has extra beside weight and bias"),
    "parameter": (lambda: with_attribute("gain", nn.Parameter(torch.ones(1))), "bad has gain beside weight and bias"),
    "forward": (replaced_forward, "bad has a forward of its own"),
    "tensor": (plain_weight, "bad has a Tensor for a weight, not an nn.Parameter"),
    "quantised": (quantised_weight, "bad has a Quantised for a weight, not an nn.Parameter"),
    "complex": (lambda: nn.Linear(3, 3, dtype=torch.complex64), "bad has a weight of torch.complex64"),
    "float8": (lambda: nn.Linear(3, 3, device="meta").to(torch.float8_e4m3fn), "bad has a weight of torch.float8"),
    "shape": (lambda: with_attribute("weight", nn.Parameter(torch.ones(4, 3))), r"bad has a weight of shape \(4, 3\)"),
    "attribute": (lambda: with_attribute("scaling", 7), "bad has attributes scaling of its own"),
    "lora": (lambda: lora.Linear(3, 3, r=1), "bad is a LoRA layer already"),
    "lora-r0": (lambda: lora.Linear(3, 3), "bad is a LoRA layer already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_which_and_why_and_change_nothing(case: str) -> None:
    make, message = REFUSED[case]
    model = nn.ModuleDict({"good": nn.Linear(3, 3), "bad": make()})
    before = [(type(module), list(vars(module))) for module in model.modules()]
    with pytest.raises(ValueError, match=message) as refused:
        convert(model, ["good", "bad"], r=1)
    assert "good" not in str(refused.value) and str(refused.value).endswith(".")
    assert [(type(module), list(vars(module))) for module in model.modules()] == before
    assert model["good"].weight.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_modules": []}, ValueError, r"target_modules is \[\]; expected to name at least one"),
        ({"target_modules": ["a", "typo"]}, ValueError, "target_modules has 'typo'; expected the name"),
        ({"target_modules": ["inear"]}, ValueError, "target_modules has 'inear'; expected the name"),
        ({"target_modules": "typo"}, ValueError, "target_modules is 'typo'; expected to name at least one"),
        ({"target_modules": "("}, ValueError, r"target_modules has '\('; expected a regular expression"),
        ({"target_modules": lambda name, module: False}, ValueError, "expected to name at least one"),
        ({"target_modules": 3}, TypeError, "target_modules is 3; expected names"),
        ({"target_modules": [3]}, TypeError, r"target_modules is \[3\]; expected names"),
        ({"r": 0}, ValueError, "r is 0; expected an integer of 1 or more"),
        ({"r": True}, ValueError, "r is True; expected an integer"),
        ({"r": 2.0}, ValueError, "r is 2.0; expected an integer"),
        ({"rank_pattern": {"a": 0}}, ValueError, "r is 0; expected an integer of 1 or more"),
        ({"rank_pattern": {"typo": 4}}, ValueError, "rank_pattern has 'typo'; expected to match"),
        ({"alpha_pattern": {"typo": 4}}, ValueError, "alpha_pattern has 'typo'; expected to match"),
        ({"alpha_pattern": {"(": 4}}, ValueError, "alpha_pattern has .*; expected a regular expression"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha is nan; expected a finite number"),
        ({"lora_dropout": 1.5}, ValueError, "lora_dropout is 1.5; expected a probability"),
        ({"adapter_dtype": torch.float16}, ValueError, "adapter_dtype is torch.float16; expected torch.float32"),
        ({"enable_lora": {"typo": [True]}}, ValueError, "enable_lora has 'typo'; expected to match"),
        ({"enable_lora": {"a": [True, False]}}, ValueError, "enable_lora has length 2; expected a divisor"),
        ({"enable_lora": {"a": [False]}}, ValueError, r"enable_lora is \[False\]; expected at least one True"),
        ({"enable_lora": {"e": [True]}}, ValueError, "e is a Embedding, which has no slices for enable_lora"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "e": nn.Embedding(3, 3)})
    with pytest.raises(error, match=message):
        convert(model, **{"target_modules": ["a", "e"], "r": 1, **arguments})
    assert type(model["a"]) is nn.Linear and type(model["e"]) is nn.Embedding


def test_unconvert_refuses_what_convert_did_not_make() -> None:
    model = nn.Sequential(lora.Linear(3, 3, r=1), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="model has no layer made by convert"):
        unconvert(model)
    convert(model, ["1"], r=1)
    assert [replaced.name for replaced in unconvert(model)] == ["1"]
    assert type(model[0]) is lora.Linear
    with pytest.raises(ValueError, match="model has no layer made by convert"):
        unconvert(model)


def test_models_wrapped_for_distributed_training_are_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 3)))
        with pytest.raises(ValueError, match="model is wrapped in DistributedDataParallel"):
            convert(model, ["0"], r=1)
        convert(model.module, ["0"], r=1)
    finally:
        torch.distributed.destroy_process_group()


def test_transformers_is_not_needed() -> None:
    script = """
import sys
sys.modules["transformers"] = None
import torch
from fused_lora.convert import convert
class Conv1D(torch.nn.Module): pass
model = torch.nn.Sequential(torch.nn.Linear(2, 2), Conv1D())
convert(model, ["0"], r=1)
try:
    convert(model, ["1"], r=1)
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "1 is a Conv1D" in run.stdout
