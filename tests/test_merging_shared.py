"""Merging next to others' use of the weight: ties, graphs, inference mode, the CPU, flags and optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mergeable import (
    R,
    assert_same_bits,
    assert_same_entries,
    build,
    complaint,
    every_layer,
    few_layers,
    make_x,
    owner,
    redraw_adapter,
    torch_saved,
)
from torch import Tensor, nn

import fused_lora
from fused_lora import Conv2d, Embedding, Linear

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
    ],
)
# Many tests call a merged layer with gradients enabled; that it warns is test_linear.py's subject.
pytestmark = pytest.mark.filterwarnings("ignore:A merged fused_lora layer")


def tied(kind: str, device: str) -> tuple[Any, nn.Module, list[Tensor]]:
    """The layer to merge, the module that shares its weight, and inputs of the two."""
    torch.manual_seed(1)
    if kind == "two Linear":
        first, second = Linear(5, 7, r=R, device=device), Linear(5, 7, r=R, device=device)
        second.weight = first.weight
    elif kind == "Embedding and head":
        first, second = Embedding(11, 5, r=R, device=device), nn.Linear(5, 11, bias=False, device=device)
        second.weight = first.weight
    elif kind == "Conv2d and plain":
        first, second = Conv2d(2, 3, 3, r=R, device=device), nn.Conv2d(2, 3, 3, device=device)
        second.weight = first.conv.weight
    else:
        table = torch.randn(9, 5, device=device)
        first, second = Linear(5, 7, r=R, device=device), Linear(5, 7, r=R, device=device)
        # Overlapping: rows 2 to 6 are both layers'.
        first.weight, second.weight = (nn.Parameter(rows, requires_grad=False) for rows in (table[:7], table[2:]))
    redraw_adapter(first), redraw_adapter(second)
    x = torch.randint(11, (4,), device=device) if isinstance(first, Embedding) else None
    shape = (2, 2, 5, 5) if isinstance(second, nn.Conv2d) else (4, 5)
    x2 = torch.randn(shape, device=device)
    return first, second, [x2 if x is None else x, x2]


TIES = ["two Linear", "Embedding and head", "Conv2d and plain", "views of one tensor"]


@pytest.mark.parametrize("kind", TIES)
def test_merging_one_of_two_tied_layers_changes_nothing_for_the_other(kind: str, device: str) -> None:
    first, second, (x1, x2) = tied(kind, device)
    unmerged1, expected = first(x1).detach(), second(x2).detach()
    base1, base2 = owner(first).weight, second.weight
    bits1, bits2 = base1.detach().clone(), base2.detach().clone()
    first.eval()
    assert second.weight is base2
    assert_same_bits(second.weight, bits2, "the other's weight")
    assert_same_bits(second(x2), expected, "the other's output")
    first.train()
    assert owner(first).weight is base1 and second.weight is base2
    assert_same_bits(base1, bits1)
    assert_same_bits(first(x1), unmerged1, "own output after train()")


@pytest.mark.parametrize("order", ["first in first out", "last in first out"])
@pytest.mark.parametrize("kind", ["two Linear", "views of one tensor"])
def test_two_tied_layers_merged_at_once_unmerge_in_any_order(kind: str, order: str, device: str) -> None:
    first, second, (x1, x2) = tied(kind, device)
    outputs, weights = (first(x1).detach(), second(x2).detach()), (first.weight, second.weight)
    before = [weight.detach().clone() for weight in weights]
    alone = [copy.deepcopy(layer).eval() for layer in (first, second)]
    first.eval(), second.eval()
    assert_same_bits(first(x1), alone[0](x1), "the first's merged output")
    assert_same_bits(second(x2), alone[1](x2), "the second's merged output")
    for layer in (first, second) if order.startswith("first") else (second, first):
        layer.train()
    assert first.weight is weights[0] and second.weight is weights[1]
    assert_same_bits(first.weight, before[0])
    assert_same_bits(second.weight, before[1])
    assert_same_bits(first(x1), outputs[0])
    assert_same_bits(second(x2), outputs[1])


@pytest.mark.parametrize(
    "change", [lambda m: m.double(), copy.deepcopy, torch_saved], ids=["double", "deepcopy", "save"]
)
@pytest.mark.parametrize("kind", ["two Linear", "Embedding and head"])
def test_a_tie_outlives_casting_and_copying_while_merged(
    kind: str, change: Callable[[nn.Module], nn.Module], device: str
) -> None:
    first, second, _ = tied(kind, device)
    model = nn.ModuleList([first, second]).eval()
    changed = change(model).train()
    assert changed[0].weight is changed[1].weight


@pytest.mark.parametrize("kept", ["both", "the first's", "the second's"])
@pytest.mark.parametrize("kind", ["two Linear", "Embedding and head"])
def test_loading_tied_weights_while_merged_reaches_both(kind: str, kept: str, device: str) -> None:
    """Checkpoints of tied models (safetensors') often hold the weight under one of its two names."""
    first, second, (x1, x2) = tied(kind, device)
    model = nn.ModuleList([first, second])
    state = {key: torch.randn_like(tensor) for key, tensor in model.state_dict().items()}
    state["1.weight"] = state["0.weight"]
    if kept != "both":
        state.pop("1.weight" if kept == "the first's" else "0.weight")
    unmerged = copy.deepcopy(model)
    for loading in (model.eval(), unmerged):
        loading.load_state_dict(state, strict=False)
    unmerged.eval()
    with torch.no_grad():
        assert_same_bits(first(x1), unmerged[0](x1), "the first's output")
        assert_same_bits(second(x2), unmerged[1](x2), "the second's output")
    assert_same_entries(model.state_dict(), unmerged.state_dict())


def test_requires_grad_set_through_a_tied_head_while_merged_survives_unmerging(device: str) -> None:
    embedding, head, _ = tied("Embedding and head", device)
    embedding.eval()
    head.weight.requires_grad_(True)
    embedding.train()
    assert head.weight.requires_grad


@pytest.mark.parametrize("then", ["eval", "eval-train"])
@every_layer
def test_a_graph_built_before_eval_gives_the_same_gradients_after_it(name: str, then: str, device: str) -> None:
    layer = build(name, device)
    layer.requires_grad_(True)
    x = make_x(name, device)
    if x.is_floating_point():
        x.requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    wanted = [p for p in (x, *layer.parameters()) if p.requires_grad]
    expected = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    layer.eval()
    if then != "eval":
        layer.train()
    for actual, other in zip(torch.autograd.grad(y, wanted, dy), expected, strict=True):
        # Not bit for bit: cuDNN may add in another order.
        torch.testing.assert_close(actual, other)


@every_layer
def test_the_base_collects_gradients_of_both_sides_of_an_evaluation(name: str, device: str) -> None:
    """An evaluation in the middle of gradient accumulation, of a layer whose base is trained, too."""
    layers = [build(name, device)]
    layers.append(copy.deepcopy(layers[0]))
    x = make_x(name, device)
    for layer, evaluates in zip(layers, (True, False), strict=True):
        layer.requires_grad_(True)
        layer(x).sum().backward()
        if evaluates:
            with torch.no_grad():
                layer.eval()(x)
            layer.train()
        layer(x).sum().backward()
    for (key, mine), other in zip(layers[0].named_parameters(), layers[1].parameters(), strict=True):
        # Not bit for bit: cuDNN may add in another order.
        torch.testing.assert_close(mine.grad, other.grad, msg=key)


@pytest.mark.parametrize("set_to_none", [False, True])
@every_layer
def test_a_merged_layer_has_the_bases_gradient_and_clears_it(name: str, set_to_none: bool, device: str) -> None:
    layer = build(name, device).requires_grad_(True)
    layer(make_x(name, device)).sum().backward()
    gradients = {key: p.grad for key, p in layer.named_parameters()}
    layer.eval()
    assert {key: p.grad for key, p in layer.named_parameters()} == gradients
    layer.zero_grad(set_to_none)
    layer.train()
    for key, p in layer.named_parameters():
        assert p.grad is None if set_to_none else p.grad is gradients[key] and not p.grad.any(), key


@few_layers
def test_a_gradient_cleared_by_the_bases_optimizer_while_merged_stays_cleared(name: str, device: str) -> None:
    layer = build(name, device).requires_grad_(True)
    optimizer = torch.optim.SGD(layer.parameters())
    layer(make_x(name, device)).sum().backward()
    layer.eval()
    optimizer.zero_grad()
    layer.train()
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("swaps", [False, True])
@few_layers
def test_a_gradient_is_cast_with_a_merged_layer(name: str, swaps: bool, device: str) -> None:
    layer = build(name, device).requires_grad_(True)
    layer(make_x(name, device)).sum().backward()
    gradients = {key: p.grad.clone() for key, p in layer.named_parameters()}
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        assert complaint(layer.eval().double) == ""
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for mode in (False, True):
        for key, p in layer.train(mode).named_parameters():
            assert_same_bits(p.grad, gradients[key].double(), key)


@pytest.mark.parametrize("where", ["inside", "outside"])
@every_layer
def test_merging_in_inference_mode_leaves_a_layer_that_can_be_differentiated(
    name: str, where: str, device: str
) -> None:
    layer = build(name, device)
    twin = copy.deepcopy(layer).eval()
    base = owner(layer).weight
    with torch.inference_mode():
        layer.eval()(make_x(name, device))
        if where == "inside":
            layer.train()
            layer.eval()
    assert not owner(layer).weight.is_inference() and not base.is_inference()
    x = make_x(name, device)
    if x.is_floating_point():
        for module in (layer, twin):
            for p in module.parameters():
                p.requires_grad_(False)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        layer(xs[0]).square().sum().backward()
        twin(xs[1]).square().sum().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad)  # As above.
        layer.lora_A.requires_grad_(True), layer.lora_B.requires_grad_(True)
    with torch.inference_mode() if where == "inside" else torch.no_grad():
        layer.train()
    assert owner(layer).weight is base and not base.is_inference()
    layer(make_x(name, device)).sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None


@pytest.mark.parametrize("place", ["cpu", CUDA])
@every_layer
def test_a_base_kept_on_the_cpu_while_merged_comes_back_bit_for_bit(name: str, place: str) -> None:
    layer = build(name, place, dtype=torch.bfloat16)
    layer.merged_base_device = "cpu"
    twin = copy.deepcopy(layer)
    twin.merged_base_device = None
    base = owner(layer).weight
    expected, stride, x = base.detach().clone(), base.stride(), make_x(name, place, torch.bfloat16)
    twin.eval()
    for _ in range(3):
        layer.eval()
        assert layer.base_weight is base and base.device.type == "cpu" and owner(layer).weight.device.type == place
        assert_same_bits(owner(layer).weight, owner(twin).weight, "merged weight")
        assert_same_bits(layer.state_dict()[next(k for k in layer.state_dict() if "weight" in k)].to(place), expected)
        with torch.no_grad():
            assert_same_bits(layer(x), twin(x), "output")
        layer.train()
        assert owner(layer).weight is base and base.stride() == stride
        assert_same_bits(base, expected, "base")


@pytest.mark.parametrize("place", ["cpu", CUDA])
@few_layers
def test_a_base_kept_on_the_cpu_follows_loads_casts_and_copies(name: str, place: str) -> None:
    layer, source = build(name, place), build(name, place)
    layer.merged_base_device = "cpu"
    layer.eval().load_state_dict(source.state_dict())
    merged = owner(copy.deepcopy(source).eval()).weight
    assert_same_bits(owner(layer).weight, merged, "after a load")
    assert layer.base_weight.device.type == "cpu"
    assert_same_bits(layer.merged_weight(), merged, "merged_weight() of a merged layer")
    copied = copy.deepcopy(layer)
    assert_same_entries(copied.train().state_dict(), source.state_dict())
    layer.double()
    assert layer.base_weight.device.type == "cpu" and owner(layer).weight.device.type == place
    assert_same_entries(layer.train().state_dict(), source.double().state_dict())


@pytest.mark.parametrize("place", ["cpu", CUDA])
@few_layers
def test_a_base_kept_on_the_cpu_is_trainable_after_inference_mode(name: str, place: str) -> None:
    layer = build(name, place)
    layer.merged_base_device = "cpu"
    with torch.inference_mode():
        layer.eval().train()
        layer.eval()
    layer.train()
    assert not owner(layer).weight.is_inference()
    layer(make_x(name, place)).square().sum().backward()
    assert layer.lora_A.grad is not None


@every_layer
def test_merge_weights_false_never_merges(name: str, device: str) -> None:
    layer = build(name, device, merge_weights=False)
    base, x = owner(layer).weight, make_x(name, device)
    expected, trained = base.detach().clone(), layer(x).detach()
    layer.eval()
    assert not layer.merged and owner(layer).weight is base and layer.base_weight is base
    assert_same_bits(layer(x), trained, "output in eval mode")
    layer(x).sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None
    layer.load_state_dict(layer.state_dict())
    assert not layer.merged and owner(layer.to(torch.bfloat16).float()).weight is base
    assert_same_bits(layer.train().base_weight, expected.to(torch.bfloat16).float())


@pytest.mark.parametrize("wanted", [False, True])
@every_layer
def test_requires_grad_set_while_merged_survives_unmerging(name: str, wanted: bool, device: str) -> None:
    model = nn.Sequential(build(name, device))
    model.requires_grad_(not wanted).eval()
    assert owner(model[0]).weight.requires_grad != wanted
    model.requires_grad_(wanted)
    assert all(p.requires_grad == wanted for p in model.parameters())
    model.train()
    assert all(p.requires_grad == wanted for p in model.parameters())


@every_layer
def test_mark_only_lora_as_trainable_acts_on_a_merged_model(name: str, device: str) -> None:
    model = nn.Sequential(build(name, device)).requires_grad_(True).eval()
    fused_lora.mark_only_lora_as_trainable(model)
    model.train()
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {"0.lora_A", "0.lora_B"}


def test_an_optimizer_made_before_eval_trains_the_base_after_train(device: str) -> None:
    layer = build("Linear", device).requires_grad_(True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer.eval().train()
    before = layer.weight.detach().clone()
    layer(make_x("Linear", device)).sum().backward()
    optimizer.step()
    assert_same_bits(layer.weight, before - 0.5 * layer.weight.grad)
