"""convert and unconvert on one layer of every kind: same objects, same bits, hooks, ties and the way back."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fused_lora as lora
from fused_lora.convert import Replaced, convert, unconvert
from fused_lora.merge import MergingLayer

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def floats(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randn(shape).to(dtype)


def tokens(count: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randint(0, count, (3, 5))


# name: (a plain layer, the class that it becomes, an input for it)
KINDS: dict[str, tuple[Callable[[], nn.Module], type[MergingLayer], Callable[[torch.dtype], Tensor]]] = {
    "linear": (lambda: nn.Linear(11, 7), lora.Linear, floats(2, 5, 11)),
    "linear-no-bias": (lambda: nn.Linear(64, 33, bias=False), lora.Linear, floats(17, 64)),
    "linear-1x1": (lambda: nn.Linear(1, 1), lora.Linear, floats(1)),
    "linear-no-rows": (lambda: nn.Linear(5, 3), lora.Linear, floats(0, 5)),
    "conv1d-of-transformers": (lambda: Conv1D(7, 11), lora.Linear, floats(2, 5, 11)),
    "conv1d-of-transformers-1x1": (lambda: Conv1D(1, 1), lora.Linear, floats(3, 1)),
    "embedding": (lambda: nn.Embedding(13, 6), lora.Embedding, tokens(13)),
    "embedding-padding": (lambda: nn.Embedding(13, 6, padding_idx=-2), lora.Embedding, tokens(13)),
    "embedding-max-norm": (lambda: nn.Embedding(13, 6, max_norm=0.5, norm_type=1), lora.Embedding, tokens(13)),
    "embedding-by-freq": (lambda: nn.Embedding(13, 6, scale_grad_by_freq=True), lora.Embedding, tokens(13)),
    "embedding-sparse": (lambda: nn.Embedding(13, 6, sparse=True), lora.Embedding, tokens(13)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lora.Conv1d, floats(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), lora.Conv2d, floats(2, 4, 8, 9)),
    "conv2d-no-bias-1x1": (lambda: nn.Conv2d(4, 6, 1, bias=False), lora.Conv2d, floats(2, 4, 5, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, dilation=2), lora.Conv2d, floats(2, 4, 8, 9)),
    "conv2d-depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding="same"), lora.Conv2d, floats(2, 6, 8, 9)),
    "conv2d-circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        lora.Conv2d,
        floats(2, 4, 8, 9),
    ),
    "conv2d-channels-last": (
        lambda: nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last),
        lora.Conv2d,
        floats(2, 8, 8, 9),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=(1, 0, 1)), lora.Conv3d, floats(1, 2, 4, 5, 4)),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def plain(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    layer = KINDS[kind][0]().to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return layer


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)


def picture(module: nn.Module) -> dict[str, Any]:
    """Everything that a module holds, to compare by == and, for its parts, by identity."""
    held = {key: copy.copy(value) for key, value in vars(module).items()}
    held["class"] = type(module)
    held["parameters"] = {name: id(parameter) for name, parameter in module._parameters.items()}
    held["requires_grad"] = None
    del held["_parameters"]
    return held


@EVERY_KIND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_are_the_plain_layers_bit_for_bit(kind: str, dtype: torch.dtype, training: bool) -> None:
    layer = plain(kind, dtype).train(training)
    x = KINDS[kind][2](dtype)
    # A twin, because max_norm renormalises the weight in place, anew for each lookup in half precision.
    expected = copy.deepcopy(layer)(x).detach()
    replaced = convert(layer, [""], r=3, lora_alpha=6, lora_dropout=0.5)
    assert replaced == [Replaced("", type(plain(kind)), KINDS[kind][1], 3, 6)]
    assert type(layer) is KINDS[kind][1] and layer.training is training and layer.scaling == 2
    assert all(part.training is training for part in layer.modules())
    actual = layer(x)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    if x.numel() > 0:
        actual.float().sum().backward()
        assert layer.lora_A.grad is not None and layer.lora_B.grad is not None
    randomise(layer)
    layer.eval()
    assert x.numel() == 0 or not torch.equal(layer(x), expected), "the adapter does not reach the output"


@EVERY_KIND
def test_what_unconvert_restores_is_the_plain_layer_to_its_last_attribute(kind: str) -> None:
    layer = plain(kind)
    layer.tag = "mine"
    x = KINDS[kind][2](torch.float32)
    expected, before = copy.deepcopy(layer)(x).detach(), picture(layer)
    keys, shown = list(layer.state_dict()), repr(layer)
    convert(layer, [""], r=2, lora_alpha=4, lora_dropout=0.1, merge_weights=True)
    randomise(layer)
    layer.eval()
    layer.merged_base_device = "cpu"
    layer.train()
    assert unconvert(layer, merge=False) == [Replaced("", KINDS[kind][1], before["class"], 2, 4)]
    assert picture(layer) == before
    assert list(layer.state_dict()) == keys and repr(layer) == shown
    assert torch.equal(layer(x), expected)


# Merging with a max_norm renormalises every row, as test_embedding.py shows.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "max-norm" not in kind])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_unconvert_merges_out_of_place_with_one_rounding(kind: str, dtype: torch.dtype, merged: bool) -> None:
    layer = plain(kind, dtype)
    base, strides = layer.weight, layer.weight.stride()
    bits = base.detach().clone()
    convert(layer, [""], r=2, lora_alpha=3, merge_weights=True)
    randomise(layer)
    if merged:
        layer.eval()
    exact, size = bits.double().clone(), bits.double().abs()
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    transposed = isinstance(layer, lora.Embedding) or getattr(layer, "fan_in_fan_out", False)
    for total, delta in ((exact, B @ A), (size, B.abs() @ A.abs())):
        total += 1.5 * (delta.T if transposed else delta.reshape(total.shape))
    unconvert(layer)
    assert layer.weight is not base and torch.equal(base, bits), "the base was written"
    assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad
    assert layer.weight.stride() == strides
    # Half a unit for the rounding to the weight's dtype; before it, a sum of three terms and a factor in the wider one.
    wide = torch.promote_types(dtype, torch.float32)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 4 * torch.finfo(wide).eps * size
    assert ((layer.weight.detach().double() - exact).abs() <= bound).all()
    assert type(layer) is type(plain(kind)) and "lora_A" not in layer.state_dict()


@EVERY_KIND
def test_parameters_are_the_same_objects_and_only_weights_freeze(kind: str) -> None:
    layer = plain(kind)
    weight, bias = layer.weight, getattr(layer, "bias", None)
    convert(layer, [""], r=2)
    assert layer.weight is weight and not weight.requires_grad
    if bias is not None:
        assert layer.bias is bias and bias.requires_grad
    assert layer.lora_A.requires_grad and layer.lora_B.requires_grad
    parameters = list(layer.parameters())
    assert len(parameters) == len({id(p) for p in parameters}) == 3 + (bias is not None)
    layer.eval()
    assert not layer.merged and layer.weight is weight


def test_biases_that_were_frozen_stay_frozen() -> None:
    layer = nn.Linear(3, 3).requires_grad_(False)
    convert(layer, [""], r=1)
    assert not layer.bias.requires_grad and layer.lora_A.requires_grad


def test_requires_grad_stays_as_it_was_set_last() -> None:
    layer = nn.Linear(3, 3)
    convert(layer, [""], r=1, merge_weights=True)
    layer.eval()
    layer.weight.requires_grad = True
    unconvert(layer, merge=False)
    assert layer.weight.requires_grad
    convert(layer, [""], r=1)
    layer.weight.requires_grad = True
    unconvert(layer)
    assert layer.weight.requires_grad


def test_adapters_are_drawn_as_the_layers_draw_them_and_nothing_else_is() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Embedding(6, 4))
    torch.manual_seed(11)
    expected_A, expected_B = torch.empty(2, 5), torch.empty(4, 2)
    nn.init.kaiming_uniform_(expected_A, a=math.sqrt(5))
    nn.init.normal_(expected_B)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    convert(model, ["0", "1"], r=2)
    assert torch.equal(model[0].lora_A, expected_A) and not model[0].lora_B.any()
    assert torch.equal(model[1].lora_B, expected_B) and not model[1].lora_A.any()
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapter_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Conv1d(4, 4, 3)).to(dtype)
    convert(model, ["0", "1"], r=2, adapter_dtype=torch.float32)
    for layer in model:
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and layer.weight.dtype == dtype
    convert(other := nn.Linear(5, 4, dtype=dtype), [""], r=2)
    assert other.lora_A.dtype == dtype


def test_settings_changed_after_construction_are_the_ones_kept() -> None:
    layer = nn.Conv2d(4, 4, 3, stride=2)
    layer.stride, layer.dilation, layer.padding = (1, 1), (2, 2), (2, 2)
    x = torch.randn(1, 4, 9, 9)
    expected = layer(x)
    convert(layer, [""], r=1)
    assert torch.equal(layer(x), expected) and expected.shape[-1] == 9
    assert layer.stride == (1, 1) and layer.in_channels == 4, "what code reads of a convolution is still there"
    layer.conv.dilation = layer.conv.padding = (1, 1)
    expected = layer(x)
    unconvert(layer)
    assert torch.equal(layer(x), expected) and layer.dilation == (1, 1)


def test_a_padding_that_the_plain_convolution_does_not_heed_is_not_heeded() -> None:
    layer, x = nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), torch.randn(1, 2, 6)
    layer.padding = (2,)
    expected = layer(x)
    convert(layer, [""], r=1)
    assert torch.equal(layer(x), expected) and expected.shape[-1] == 6


def test_a_module_of_two_names_is_converted_once_and_stays_one() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    assert [r.name for r in convert(model, ["a", "b.0"], r=1)] == ["a"]
    assert model["a"] is model["b"][0] is shared and type(shared) is lora.Linear
    assert [r.name for r in unconvert(model)] == ["a"]
    assert type(shared) is nn.Linear


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.body = nn.Linear(5, 5)
        self.lm_head = nn.Linear(5, 9, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.body(self.embed(x)))


@pytest.mark.parametrize("targets", [["embed"], ["lm_head"], ["embed", "lm_head"]], ids="+".join)
def test_ties_hold_and_merging_does_not_leak_through_them(targets: list[str]) -> None:
    model, x = Tied(), torch.randint(0, 9, (2, 4))
    weight = model.embed.weight
    expected, bits = model(x).detach(), weight.detach().clone()
    convert(model, targets, r=2)
    assert model.lm_head.weight is model.embed.weight is weight
    assert torch.equal(model(x), expected)
    assert sum(p is weight for p in model.parameters()) == 1
    unconvert(model, merge=False)
    assert model.lm_head.weight is model.embed.weight is weight
    convert(model, targets, r=2, merge_weights=True)
    randomise(model)
    adapted = model(x).detach()
    model.eval()
    assert torch.equal(weight, bits)
    model.train()
    assert model.lm_head.weight is model.embed.weight is weight
    unconvert(model, merge=True)
    assert torch.equal(weight, bits)
    for name in ("embed", "lm_head"):
        assert (getattr(model, name).weight is weight) is (name not in targets)
    # float32 rounding of a few products of size 10, against an adapter that changes the output by far more.
    assert (model(x) - adapted).abs().max() < 1e-4 * adapted.abs().max()
    assert (adapted - expected).abs().max() > 0.1 * adapted.abs().max()


HOOKED = ["linear", "conv1d-of-transformers", "embedding", "conv2d"]


@pytest.mark.parametrize("kind", HOOKED)
def test_forward_and_backward_hooks_run_and_their_handles_still_remove_them(kind: str) -> None:
    layer, x = plain(kind), KINDS[kind][2](torch.float32)
    calls: list[str] = []

    def record(name: str) -> Callable[..., None]:
        return lambda module, *rest: calls.append(name) if module is layer else calls.append("stranger")

    def register() -> list[Any]:
        return [
            layer.register_forward_pre_hook(record("pre")),
            layer.register_forward_pre_hook(record("pre-kwargs"), with_kwargs=True),
            layer.register_forward_hook(record("post"), always_call=True),
            layer.register_full_backward_pre_hook(record("backward-pre")),
            layer.register_full_backward_hook(record("backward")),
        ]

    def run() -> list[str]:
        calls.clear()
        layer(x).sum().backward()
        return list(calls)

    handles = register()
    expected = run()
    assert len(expected) == 5 and "stranger" not in expected
    convert(layer, [""], r=2)
    assert run() == expected
    unconvert(layer, merge=False)
    layer.weight.requires_grad = True
    assert run() == expected
    convert(layer, [""], r=2)
    for handle in handles:
        handle.remove()
    assert run() == []
    register()
    assert run() == expected


@pytest.mark.parametrize("kind", HOOKED)
def test_state_dict_hooks_see_their_keys(kind: str) -> None:
    layer = plain(kind)
    bits = layer.weight.detach().clone()
    seen: list[str] = []

    def saved(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        seen.append("saved")
        assert torch.equal(state[prefix + "weight"], bits)

    def saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        seen.append("saving")

    def loading(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        seen.append("loading")
        state[prefix + "weight"] = state.pop(prefix + "old_weight")

    def loaded(module: nn.Module, incompatible: Any) -> None:
        seen.append("loaded")

    handles = [
        layer.register_state_dict_post_hook(saved),
        layer.register_state_dict_pre_hook(saving),
        layer.register_load_state_dict_pre_hook(loading),
        layer.register_load_state_dict_post_hook(loaded),
    ]

    def round_trip() -> list[str]:
        seen.clear()
        state = layer.state_dict()
        for key in [key for key in state if key.rpartition(".")[2] == "weight"]:
            state[key.removesuffix("weight") + "old_weight"] = state.pop(key)
        layer.load_state_dict(state)
        return list(seen)

    expected = round_trip()
    assert len(expected) == 4
    merges = not isinstance(layer, nn.Conv2d)
    if not merges:
        with pytest.raises(ValueError, match="has state-dict hooks, which would see the merged weight"):
            convert(layer, [""], r=2, merge_weights=True)
    convert(layer, [""], r=2, merge_weights=merges)
    randomise(layer)
    assert sorted(round_trip()) == sorted(expected)
    layer.eval()
    assert layer.merged is merges and sorted(round_trip()) == sorted(expected)
    assert torch.equal(layer.weight, bits) is not merges, "loading while merged merges anew"
    unconvert(layer, merge=False)
    assert round_trip() == expected and torch.equal(layer.weight, bits)
    for handle in handles:
        handle.remove()
    layer.load_state_dict(layer.state_dict())
    assert len(seen) == 4


def test_a_state_dict_hook_of_a_converted_convolution_survives_unconvert() -> None:
    layer, seen = nn.Conv1d(2, 2, 1), []
    convert(layer, [""], r=1)
    layer.register_state_dict_post_hook(lambda *arguments: seen.append(1))
    unconvert(layer)
    layer.state_dict()
    assert seen == [1]


@EVERY_KIND
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_whole(kind: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = plain(kind).eval(), KINDS[kind][2](torch.float32)
    base = layer(x).detach()
    convert(layer, [""], r=2, lora_dropout=0.5)
    randomise(layer)
    expected = layer(x).detach()
    other = copied(layer)
    assert torch.equal(other(x), expected) and other.weight is not layer.weight
    unconvert(other, merge=False)
    assert type(other) is type(plain(kind)) and torch.equal(other(x), base)
    assert torch.equal(layer(x), expected)


@EVERY_KIND
def test_plain_checkpoints_load_strictly_and_adapters_round_trip(kind: str) -> None:
    source, layer = plain(kind), plain(kind)
    convert(layer, [""], r=2)
    randomise(layer)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer.weight, source.weight)
    convert(source, [""], r=2)
    source.load_state_dict(layer.state_dict())
    assert torch.equal(source.lora_A, layer.lora_A)
    merged = lora.merged_state_dict(layer)
    unconvert(layer)
    assert merged.keys() == layer.state_dict().keys() and torch.equal(merged["weight"], layer.weight)


@EVERY_KIND
def test_the_meta_device(kind: str) -> None:
    source, x = plain(kind).eval(), KINDS[kind][2](torch.float32)
    layer = copy.deepcopy(source).to("meta")
    generator = torch.get_rng_state()
    convert(layer, [""], r=2)
    assert all(p.is_meta for p in layer.parameters()) and torch.equal(torch.get_rng_state(), generator)
    back = copy.deepcopy(layer)
    unconvert(back)
    assert back.weight.is_meta and type(back) is type(source)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))
