"""A merged layer is torch's own layer: its ops, no recompilation, one parameter for every adapter that it is given."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mergeable import (
    assert_same_bits,
    build,
    every_layer,
    few_layers,
    make_x,
    owner,
    plain,
    redraw_adapter,
    torch_saved,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fused_lora import Linear, load_adapter, merged_state_dict, save_adapter

GUARDS = [torch.no_grad, torch.inference_mode]
guards = pytest.mark.parametrize("guard", GUARDS)


def plain_twin(name: str, layer: Any, device: str) -> nn.Module:
    """torch's own layer with the merged weight."""
    twin = plain(name).to(device)
    twin.load_state_dict(merged_state_dict(layer))
    # torch takes another matrix product for weights that require a gradient.
    return twin.eval().requires_grad_(False)


def successor(layer: Any, folder: Path) -> tuple[Any, Path]:
    """An unmerged layer with the same base and another adapter, and a file of that adapter."""
    other = copy.deepcopy(layer).train()
    redraw_adapter(other)
    save_adapter(other, folder / "successor.safetensors")
    return other, folder / "successor.safetensors"


def ops(layer: nn.Module, x: Tensor) -> list[str]:
    layer(x)  # Some ops run on the first call alone.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    return [event.name for event in profile.events() if event.name.startswith("aten::")]


def python_calls(layer: nn.Module, x: Tensor) -> list[str]:
    calls: list[str] = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    return calls


@guards
@every_layer
def test_a_merged_layer_runs_the_ops_of_torchs_own_and_no_others(
    name: str, guard: Callable[[], Any], device: str
) -> None:
    layer = build(name, device).eval().requires_grad_(False)
    twin, x = plain_twin(name, layer, device), make_x(name, device)
    with guard():
        assert ops(layer, x) == ops(twin, x)
        assert_same_bits(layer(x), twin(x))


@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Embedding"])
def test_a_merged_layer_looks_up_no_more_parameters_than_torchs_own(name: str, device: str) -> None:
    """nn.Module's attributes cost the most of a call's Python; the rest is a handful of calls."""
    layer = build(name, device).eval()
    twin, x = plain_twin(name, layer, device), make_x(name, device)
    with torch.inference_mode():
        mine, theirs = python_calls(layer, x), python_calls(twin, x)
    assert mine.count("__getattr__") == theirs.count("__getattr__") > 0
    assert len(mine) <= len(theirs) + 4


@guards
@few_layers
def test_a_new_adapter_for_a_compiled_merged_layer_recompiles_nothing(
    name: str, guard: Callable[[], Any], device: str, tmp_path: Path
) -> None:
    layer, x = build(name, device).eval(), make_x(name, device)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with guard():
        outputs = [compiled(x)]
        for _ in range(2):
            other, file = successor(layer, tmp_path)
            load_adapter(layer, file)
            outputs.append(compiled(x))
            assert_same_bits(outputs[-1], other.eval()(x))
    assert counter.frame_count == 1 and not torch.equal(outputs[1], outputs[2])


@guards
@few_layers
def test_copying_into_a_and_b_of_a_compiled_unmerged_layer_is_enough(
    name: str, guard: Callable[[], Any], device: str
) -> None:
    layer, x = build(name, device, merge_weights=False).eval(), make_x(name, device)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with guard():
        before = compiled(x)
        other = copy.deepcopy(layer)
        redraw_adapter(other)
        layer.lora_A.copy_(other.lora_A), layer.lora_B.copy_(other.lora_B)
        after = compiled(x)
        assert_same_bits(after, other(x))
    assert counter.frame_count == 1 and not torch.equal(before, after)


def renew(how: str, layer: Any, other: Any, file: Path) -> None:
    """Gives a merged layer other's adapter."""
    if how == "load_adapter":
        load_adapter(layer, file)
    elif how.startswith("load_state_dict"):
        state = copy.deepcopy(other.state_dict())
        layer.load_state_dict(state, assign="assign" in how)
    else:
        with torch.no_grad():
            layer.lora_A.copy_(other.lora_A), layer.lora_B.copy_(other.lora_B)
        layer.eval() if how == "eval" else layer.to(layer.lora_A.device)


@pytest.mark.parametrize("guard", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["load_adapter", "load_state_dict", "load_state_dict, assign", "eval", "to"])
@every_layer
def test_merging_anew_writes_a_fresh_merge_into_the_very_parameter(
    name: str, how: str, dtype: torch.dtype, guard: Callable[[], Any], device: str, tmp_path: Path
) -> None:
    layer = build(name, device, dtype=dtype)
    base = layer.base_weight.detach().clone()
    merged = owner(layer.eval()).weight
    place, before = merged.data_ptr(), merged.detach().clone()
    other, file = successor(layer, tmp_path)
    with guard():
        renew(how, layer, other, file)
        assert owner(layer).weight is merged and merged.data_ptr() == place
        assert_same_bits(merged, owner(copy.deepcopy(other).eval()).weight, "merged weight")
        assert not torch.equal(merged, before) and not merged.is_inference()
    layer.train()
    assert_same_bits(owner(layer).weight, base, "base")
    assert_same_bits(layer.lora_A, other.lora_A)


def test_a_merged_weight_of_another_layout_is_a_new_parameter(device: str) -> None:
    layer = build("Conv2d-groups=2", device)
    twin = copy.deepcopy(layer).to(memory_format=torch.channels_last).eval()
    layer.eval().to(memory_format=torch.channels_last)
    assert layer.conv.weight.stride() == layer.base_weight.stride() == twin.conv.weight.stride()
    assert_same_bits(layer.conv.weight, twin.conv.weight)


def refusal(layer: nn.Module, x: Tensor) -> str:
    """What a forward raises, if it does."""
    try:
        layer(x)
    except RuntimeError as error:
        return str(error)
    return ""


CHANGES: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda layer: layer.lora_A.copy_(layer.lora_A.clone() * 2),
    "a view": lambda layer: layer.lora_B[0].add_(1),
    "foreach": lambda layer: torch._foreach_mul_([layer.lora_A, layer.lora_B], 2.0),
    "detached": lambda layer: layer.lora_A.detach().zero_(),
    "A replaced": lambda layer: setattr(layer, "lora_A", nn.Parameter(layer.lora_A * 2)),
    "B replaced": lambda layer: setattr(layer, "lora_B", nn.Parameter(layer.lora_B * 2)),
}


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("change", CHANGES)
@few_layers
def test_an_adapter_changed_while_merged_is_an_error_until_it_is_merged_anew(
    name: str, change: str, guard: Callable[[], Any], device: str
) -> None:
    layer, x = build(name, device), make_x(name, device)
    twin = copy.deepcopy(layer)
    merged = owner(layer.eval()).weight
    for module in (layer, twin):
        with guard() if "replaced" not in change else torch.no_grad():
            CHANGES[change](module)
    with guard():
        assert "load_adapter" in refusal(layer, x) and "eval()" in refusal(layer, x)
        layer.eval()
        assert owner(layer).weight is merged
        assert_same_bits(layer(x), twin.eval()(x))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), torch_saved],
    ids=["deepcopy", "pickle", "save"],
)
@few_layers
def test_a_copy_has_missed_what_its_original_has(name: str, duplicate: Callable[[nn.Module], Any], device: str) -> None:
    layer, x = build(name, device).eval(), make_x(name, device)
    with torch.no_grad():
        fresh = duplicate(layer)
        assert_same_bits(fresh(x), layer(x))
        for module in (fresh, layer):
            module.lora_B.mul_(2)
            assert refusal(duplicate(module), x).startswith("lora_B was changed")
            assert_same_bits(duplicate(module).eval()(x), module.eval()(x))


def test_a_copy_made_in_inference_mode_can_be_merged_anew(device: str) -> None:
    layer, x = build("Linear", device).eval(), make_x("Linear", device)
    with torch.inference_mode():
        duplicate = copy.deepcopy(layer)
    other = build("Linear", device)
    duplicate.load_state_dict(other.state_dict(), assign=True)
    with torch.no_grad():
        assert_same_bits(duplicate(x), other.eval()(x))


def test_changes_of_inference_tensors_are_not_seen_and_train_then_eval_takes_them(device: str) -> None:
    with torch.inference_mode():
        layer, x = build("Linear", device), make_x("Linear", device)
        before = layer.eval()(x)
        layer.lora_A.mul_(2)
        assert_same_bits(layer(x), before)
        assert not torch.equal(layer.train().eval()(x), before)


def test_layers_that_share_their_adapter_all_take_the_one_that_is_loaded(device: str, tmp_path: Path) -> None:
    model = nn.ModuleList([build("Linear", device) for _ in "12"])
    model[1].lora_A, model[1].lora_B = model[0].lora_A, model[0].lora_B
    other, x = copy.deepcopy(model), make_x("Linear", device)
    redraw_adapter(other)
    save_adapter(other, tmp_path / "adapter.safetensors")
    load_adapter(model.eval(), tmp_path / "adapter.safetensors")
    with torch.no_grad():
        for mine, its in zip(model, other.eval(), strict=True):
            assert refusal(mine, x) == ""
            assert_same_bits(mine(x), its(x))


def test_a_parameter_put_in_the_merged_ones_place_is_never_written(device: str) -> None:
    layer, plain_layer = Linear(5, 7, r=2, device=device).eval(), nn.Linear(5, 7, device=device)
    layer.weight = plain_layer.weight
    before = plain_layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B.normal_()
    with pytest.warns(UserWarning, match="what was put there is dropped"):
        layer.eval()
    assert_same_bits(layer.weight, layer.merged_weight())
    assert_same_bits(plain_layer.weight, before)
