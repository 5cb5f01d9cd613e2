"""Merging: eval() and train() against float64 and against each other, for every layer class, bit for bit."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mergeable import (
    DTYPES,
    HALVES,
    TFT,
    R,
    assert_same_bits,
    assert_same_entries,
    build,
    complaint,
    entries,
    every_layer,
    few_layers,
    make_x,
    owner,
    plain,
    redraw_adapter,
    torch_saved,
)
from numerics import assert_as_accurate_as
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from fused_lora import Conv1d, Conv2d, Conv3d, Embedding, Linear, MergedLinear

# Many tests call a merged layer with gradients enabled; that it warns is test_linear.py's subject.
pytestmark = pytest.mark.filterwarnings("ignore:A merged fused_lora layer")


def matrix_product(layer: Any, A: Tensor, B: Tensor) -> Tensor:
    """B A in the weight's layout, as loralib defines it for each class."""
    if isinstance(layer, MergedLinear):
        rows, update = layer.out_features // 3, A.new_zeros(layer.out_features, layer.in_features)
        for nth, place in enumerate(place for place, enabled in enumerate(TFT) if enabled):
            update[place * rows : (place + 1) * rows] = B[nth * rows : (nth + 1) * rows] @ A[nth * R : (nth + 1) * R]
        return update.T if layer.fan_in_fan_out else update
    transposed = isinstance(layer, Embedding) or getattr(layer, "fan_in_fan_out", False)
    return (B @ A).T if transposed else (B @ A).view(owner(layer).weight.shape)


def assert_rounded_once(layer: Any, base: Tensor) -> None:
    """|merged - exact| <= u |exact| for the dtype's unit roundoff u, and what a sum of r + 2 terms costs in float32."""
    merged = owner(layer).weight
    assert merged.dtype == base.dtype and merged.shape == base.shape and merged.stride() == base.stride()
    A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    exact = base.double() + layer.scaling * matrix_product(layer, A, B)
    terms = base.double().abs() + abs(layer.scaling) * matrix_product(layer, A.abs(), B.abs())
    wide = torch.promote_types(base.dtype, torch.float32)
    # The textbook bound of a sum, n u (sum of |terms|), with 2 u = eps so that float64's oracle may err as much.
    bound = (layer.r + 3) * torch.finfo(wide).eps * terms
    if wide != base.dtype:
        bound += torch.finfo(base.dtype).eps / 2 * exact.abs()
    assert not torch.equal(merged, base)
    worst = ((merged.double() - exact).abs() / bound).max()
    assert worst <= 1, f"a merged element is off by {worst:.3g} times its bound"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_layer
def test_a_thousand_merges_with_changing_adapters_leave_every_bit_of_the_base(
    name: str, dtype: torch.dtype, device: str
) -> None:
    layer = build(name, device, dtype=dtype)
    base = owner(layer).weight
    with torch.no_grad():
        special = torch.tensor([float("nan"), -0.0, float("inf"), torch.finfo(dtype).tiny / 2], dtype=dtype)
        base[0].view(-1)[:2], base[1].view(-1)[:2] = special[:2].to(device), special[2:].to(device)
        base[0].view(-1)[2] = 5.0  # Of another binade than the updates, which a float sum would not give back.
    expected, place, stride = base.detach().clone(), base.data_ptr(), base.stride()
    for cycle in range(1000):
        layer.eval()
        assert owner(layer).weight is not base and layer.merged
        layer.lora_A.data.normal_()
        if cycle % 2:
            layer.lora_B.data.normal_()
        layer.train()
        assert owner(layer).weight is base and not layer.merged
    assert_same_bits(base, expected, "base")
    assert base.data_ptr() == place and base.stride() == stride


@few_layers
def test_the_mode_may_be_set_twice_and_returns_the_layer(name: str, device: str) -> None:
    layer = build(name, device)
    base = owner(layer).weight
    assert layer.eval() is layer and layer.train(False) is layer
    once = owner(layer).weight.detach().clone()
    assert_same_bits(owner(layer.eval()).weight, once)
    assert layer.train() is layer and layer.train(True) is layer
    assert owner(layer).weight is base


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_layer
def test_the_merged_weight_is_the_exact_sum_rounded_once(
    name: str, dtype: torch.dtype, device: str, backend: str
) -> None:
    if backend != "reference" and dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    layer = build(name, device, dtype=dtype)
    base = owner(layer).weight.detach().clone()
    assert_rounded_once(layer.eval(), base)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_layer
def test_a_float32_adapter_is_not_rounded_before_it_is_merged_into_a_half_base(
    name: str, dtype: torch.dtype, device: str, backend: str
) -> None:
    layer = build(name, device, dtype=dtype, adapter_dtype=torch.float32)
    base = owner(layer).weight.detach().clone()
    assert_rounded_once(layer.eval(), base)


@every_layer
def test_autocast_does_not_coarsen_a_merge(name: str, device: str) -> None:
    layer = build(name, device)
    expected = owner(copy.deepcopy(layer).eval()).weight
    with torch.autocast(device, dtype=torch.bfloat16):
        layer.eval()
    assert_same_bits(owner(layer).weight, expected)


@every_layer
def test_merged_weight_is_the_same_in_both_modes_and_a_tensor_of_its_own(name: str, device: str) -> None:
    layer = build(name, device)
    before, trained = entries(layer), layer.merged_weight()
    assert not trained.requires_grad and trained.data_ptr() != owner(layer).weight.data_ptr()
    layer.eval()
    evaluated = layer.merged_weight()
    assert_same_bits(trained, owner(layer).weight)
    assert_same_bits(evaluated, trained)
    assert evaluated.data_ptr() != owner(layer).weight.data_ptr()
    assert layer.merged and layer.base_weight is not owner(layer).weight
    evaluated.zero_(), trained.zero_()
    assert_same_entries(entries(layer), before)
    assert layer.base_weight is owner(layer.train()).weight


@pytest.mark.parametrize(
    "make",
    [
        lambda device: Linear(0, 3, r=2, device=device),
        lambda device: Linear(3, 0, r=2, device=device),
        lambda device: Linear(1, 1, r=1, device=device),
        lambda device: Linear(2, 3, r=5, device=device),
        lambda device: MergedLinear(3, 4, r=1, enable_lora=[False, True], device=device),
        lambda device: MergedLinear(3, 4, r=1, enable_lora=[True] * 4, device=device),
        lambda device: Embedding(1, 1, r=1, device=device),
        lambda device: Conv1d(1, 1, 1, r=1, device=device),
        lambda device: Conv2d(2, 3, (3, 1), r=2, device=device),
        lambda device: Conv3d(2, 4, (1, 2, 3), r=1, groups=2, device=device),
    ],
    ids=["in=0", "out=0", "one", "r>in", "one-slice", "all-slices", "vocabulary=1", "conv=1", "kernel=3x1", "1x2x3"],
)
# torch's own initialisers warn about weights without elements.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_smallest_and_odd_shapes_merge_to_what_the_unmerged_layer_computes(
    make: Callable[[str], Any], device: str
) -> None:
    layer = make(device)
    redraw_adapter(layer)
    base = owner(layer).weight.detach().clone()
    if isinstance(layer, Embedding):
        x = torch.zeros(3, dtype=torch.int64, device=device)
    elif isinstance(layer, nn.Linear):
        x = torch.randn(3, layer.in_features, device=device)
    else:
        x = torch.randn(2, layer.conv.in_channels, *(4 for _ in layer.conv.kernel_size), device=device)
    yardstick, exact = layer(x).detach(), copy.deepcopy(layer).double()(x if not x.is_floating_point() else x.double())
    with torch.no_grad():
        assert_as_accurate_as(layer.eval()(x), yardstick, exact, "merged output")
    assert_same_bits(owner(layer.train()).weight, base)


@pytest.mark.parametrize("name", ["Linear", "Linear-fan_in_fan_out", "MergedLinear", "Embedding"])
def test_a_strided_base_merges_and_keeps_its_strides(name: str, device: str) -> None:
    layer = build(name, device, dtype=torch.bfloat16)
    rows, columns = layer.weight.shape
    table = torch.randn(3 * rows, 2 * columns + 1, device=device, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(table[1::3, 1::2], requires_grad=False)
    whole, base, stride = table.clone(), layer.weight.detach().clone(), layer.weight.stride()
    layer.eval()
    merged = build(name, device, dtype=torch.bfloat16)
    merged.load_state_dict(layer.state_dict())
    assert_same_bits(layer.weight, merged.eval().weight)
    layer.train()
    assert_same_bits(layer.weight, base)
    assert layer.weight.stride() == stride
    assert_same_bits(table, whole, "the table around the base")


def test_merging_an_embedding_does_not_renormalise_its_base(device: str) -> None:
    layer, unbounded = build("Embedding", device, max_norm=0.5), build("Embedding", device)
    base = layer.weight.detach().clone()
    renormalised = F.embedding(torch.arange(11, device=device), base.clone(), max_norm=0.5)
    unbounded.load_state_dict(layer.state_dict() | {"weight": renormalised})
    assert_same_bits(layer.eval().weight, unbounded.eval().weight, "merged weight")
    assert_same_bits(layer.train().weight, base, "base")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("keep_vars", [False, True])
@every_layer
def test_state_dict_of_a_merged_layer_holds_the_base(name: str, keep_vars: bool, nested: bool, device: str) -> None:
    layer = build(name, device)
    model = nn.Sequential(nn.Sequential(nn.Identity(), layer)) if nested else layer
    base, expected = owner(layer).weight, entries(model)
    state = model.eval().state_dict(keep_vars=keep_vars)
    assert_same_entries(state, expected)
    held = state[next(key for key in state if key.endswith("weight"))]
    assert (held is base) == keep_vars and held.data_ptr() == base.data_ptr()
    assert not any(isinstance(t, nn.Parameter) for t in state.values()) or keep_vars
    assert list(model.state_dict(prefix="model.")) == [f"model.{key}" for key in expected]
    assert_same_bits(
        model.state_dict(prefix="model.")["model." + next(k for k in expected if k.endswith("weight"))], base
    )


def source_entries(name: str, device: str, kind: str) -> dict[str, Tensor]:
    torch.manual_seed(9)
    state = entries(build(name, device))
    return {key: t for key, t in state.items() if kind == "full" or (kind == "adapter") == ("lora_" in key)}


@pytest.mark.parametrize(("assign", "strict"), [(False, True), (True, False)], ids=["copy-strict", "assign-lenient"])
@pytest.mark.parametrize("kind", ["full", "adapter", "base"])
@every_layer
def test_loading_while_merged_is_loading_and_then_merging(
    name: str, kind: str, assign: bool, strict: bool, device: str
) -> None:
    state = {f"1.0.{key}": tensor for key, tensor in source_entries(name, device, kind).items()}
    merged = nn.Sequential(nn.Identity(), nn.Sequential(build(name, device)))
    unmerged, layer = copy.deepcopy(merged), merged[1][0]
    before = owner(layer.eval()).weight.detach().clone()
    merged.eval()
    for model in (merged, unmerged):
        # load_state_dict can take what it is given: an assigned tensor must not be both models'.
        given = {key: tensor.clone() for key, tensor in state.items()}
        if kind == "adapter" and strict:
            # torch loads what is there before it raises.
            with pytest.raises(RuntimeError, match="Missing key"):
                model.load_state_dict(given, strict=True, assign=assign)
        else:
            model.load_state_dict(given, strict=strict, assign=assign)
    assert layer.merged and not torch.equal(owner(layer).weight, before)
    unmerged.eval()
    assert_same_bits(owner(layer).weight, owner(unmerged[1][0]).weight, "merged weight")
    x = make_x(name, device)
    with torch.no_grad():
        assert_same_bits(merged(x), unmerged(x), "output")
    merged.train(), unmerged.train()
    assert_same_entries(merged.state_dict(), unmerged.state_dict())
    for key, tensor in state.items():
        assert_same_bits(merged.state_dict()[key], tensor, key)


@pytest.mark.parametrize("assign", [False, True])
@few_layers
def test_loading_leaves_the_mode_and_requires_grad_alone(name: str, assign: bool, device: str) -> None:
    layer = build(name, device)
    expected = {key: p.requires_grad for key, p in layer.named_parameters()}
    layer.eval().load_state_dict(source_entries(name, device, "full"), assign=assign)
    assert layer.merged and not layer.training
    assert {key: p.requires_grad for key, p in layer.named_parameters()} == expected
    layer.train()
    assert {key: p.requires_grad for key, p in layer.named_parameters()} == expected


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@every_layer
def test_a_base_changed_in_place_while_merged_shows_in_the_next_output(
    name: str, guard: Callable[[], Any], device: str
) -> None:
    layer, x = build(name, device), make_x(name, device)
    twin = copy.deepcopy(layer)
    merged = owner(layer.eval()).weight
    for module in (layer, twin):
        with torch.no_grad():
            module.base_weight.mul_(-2)
    with guard():
        assert_same_bits(layer(x), twin.eval()(x), "output")
    assert owner(layer).weight is merged
    assert_same_entries(layer.train().state_dict(), twin.train().state_dict())


@few_layers
def test_a_load_that_fails_leaves_a_merged_layer_merged(name: str, device: str) -> None:
    layer = build(name, device).eval()
    before, merged = entries(layer), owner(layer).weight.detach().clone()
    state = {key: tensor.new_zeros(1, 1, 1, 1, 1, 1) for key, tensor in before.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(state)
    assert layer.merged
    assert_same_bits(owner(layer).weight, merged)
    assert_same_entries(layer.train().state_dict(), before)


@few_layers
def test_a_state_dict_from_a_merged_model_does_not_merge_twice(name: str, device: str) -> None:
    source, target = build(name, device).eval(), build(name, device).eval()
    target.load_state_dict(source.state_dict())
    assert_same_bits(owner(target).weight, owner(source).weight)
    target.train(), source.train()
    assert_same_entries(target.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.double(),
        lambda module: module.to(torch.bfloat16).float(),
    ],
    ids=["bfloat16", "double", "bfloat16-float"],
)
@every_layer
def test_casting_while_merged_is_casting_and_then_merging(
    name: str, cast: Callable[[nn.Module], nn.Module], device: str
) -> None:
    merged = nn.Sequential(build(name, device))
    unmerged = cast(copy.deepcopy(merged)).eval()
    assert cast(merged.eval()) is merged and merged[0].merged
    assert_same_bits(owner(merged[0]).weight, owner(unmerged[0]).weight, "merged weight")
    merged.train(), unmerged.train()
    assert_same_entries(merged.state_dict(), unmerged.state_dict())


@few_layers
def test_double_while_merged_merges_anew_in_float64(name: str, device: str) -> None:
    layer = build(name, device, dtype=torch.bfloat16)
    base = owner(layer).weight.detach().double()
    assert_rounded_once(layer.eval().double(), base)


@every_layer
def test_a_merged_layer_moves_to_meta_and_is_filled_again(name: str, device: str) -> None:
    layer, source = build(name, device).eval(), build(name, device)
    layer.to("meta")
    assert layer.merged and all(t.is_meta for t in layer.state_dict(keep_vars=True).values())
    assert owner(layer).weight.is_meta and layer.merged_weight().is_meta
    layer.to_empty(device=device).load_state_dict(source.state_dict())
    assert_same_bits(owner(layer).weight, owner(copy.deepcopy(source).eval()).weight)
    assert_same_entries(layer.train().state_dict(), source.state_dict())


@every_layer
def test_a_merged_layer_loads_from_meta_by_assignment(name: str, device: str) -> None:
    layer, source = build(name, "meta").eval(), build(name, device)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert_same_bits(owner(layer).weight, owner(copy.deepcopy(source).eval()).weight)
    assert_same_entries(layer.train().state_dict(), source.state_dict())


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), torch_saved],
    ids=["deepcopy", "pickle", "save"],
)
@every_layer
def test_a_copy_of_a_merged_layer_is_merged_and_its_own(
    name: str, duplicate: Callable[[nn.Module], nn.Module], device: str
) -> None:
    model = nn.Sequential(build(name, device))
    before = entries(model)
    copied = duplicate(model.eval())
    assert copied[0].merged
    assert_same_bits(owner(copied[0]).weight, owner(model[0]).weight)
    assert_same_entries(copied.state_dict(), before)
    # The hooks are the copy's, and nothing is shared.
    copied.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in before.items()})
    assert not copied[0].base_weight.any() and not owner(copied[0]).weight.any()
    assert_same_entries(model.train().state_dict(), before)
    assert not any(tensor.any() for tensor in copied.train().state_dict().values())


@pytest.mark.parametrize("options", [{"r": 0}, {"enable_lora": [False] * 3}], ids=["r=0", "no-slice"])
@every_layer
def test_a_layer_without_adapter_only_says_that_it_is_merged(name: str, options: dict[str, Any], device: str) -> None:
    if "enable_lora" in options and "Merged" not in name:
        pytest.skip("only MergedLinear has slices")
    layer, x = build(name, device, **options), make_x(name, device)
    weight, expected, output = owner(layer).weight, entries(layer), layer(x).detach()
    assert "lora_A" not in dict(layer.named_parameters()) and weight.requires_grad
    for mode in (False, True, False):
        assert layer.train(mode).merged == (not mode)
        assert owner(layer).weight is weight and layer.base_weight is weight
        assert_same_bits(layer(x), output)
        assert_same_entries(layer.state_dict(), expected)
        layer.load_state_dict(expected)
        assert layer.merged == (not mode)
    layer(x).sum().backward()
    assert weight.grad is not None
    assert copy.deepcopy(layer).double().merged


def warns_of_what_is_dropped(call: Callable[[], object]) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    words = "weight was replaced or written while the layer was merged, and what was put there is dropped"
    return any(words in str(warning.message) for warning in caught)


REPLACED: dict[str, Callable[[Any, Any], None]] = {
    "the base again": lambda layer, owned: setattr(owned, "weight", layer.base_weight),
    "another parameter": lambda layer, owned: setattr(owned, "weight", nn.Parameter(owned.weight.detach().clone())),
    "in place": lambda layer, owned: owned.weight.detach().zero_(),
}


@pytest.mark.parametrize("how", REPLACED)
@few_layers
def test_a_weight_that_took_the_merged_ones_place_is_not_taken_for_it(name: str, how: str, device: str) -> None:
    layer, x = build(name, device), make_x(name, device)
    expected = layer.eval()(x)
    REPLACED[how](layer, owner(layer))
    with pytest.raises(RuntimeError, match="weight was replaced or written while the layer is merged"):
        layer(x)
    with pytest.raises(RuntimeError, match="weight was replaced or written while the layer is merged"):
        copy.deepcopy(layer)(x)
    assert warns_of_what_is_dropped(layer.train) == (how != "the base again")
    assert_same_bits(layer.eval()(x), expected)


AFTER_WRITING: dict[str, Callable[[Any], Any]] = {
    "train": lambda layer: layer.train(),
    "eval": lambda layer: layer.eval(),
    "to": lambda layer: layer.to(torch.float64),
    "load_state_dict": lambda layer: layer.load_state_dict({"lora_A": layer.lora_A.detach()}, strict=False),
}


@pytest.mark.parametrize("then", AFTER_WRITING)
@few_layers
def test_what_was_written_to_a_merged_weight_is_dropped_with_a_warning(name: str, then: str, device: str) -> None:
    layer = build(name, device).eval()
    assert not warns_of_what_is_dropped(lambda: AFTER_WRITING[then](layer))
    layer = build(name, device).eval()
    base = layer.base_weight.detach().clone()
    with torch.no_grad():
        owner(layer).weight.fill_(1)
    assert warns_of_what_is_dropped(lambda: AFTER_WRITING[then](layer))
    assert not warns_of_what_is_dropped(layer.train)
    assert_same_bits(owner(layer).weight.float(), base)


@pytest.mark.parametrize(
    "how",
    [parametrizations.weight_norm, lambda module: prune.identity(module, "weight")],
    ids=["parametrized", "pruned"],
)
@few_layers
def test_a_merged_weight_that_was_parametrized_is_named_when_it_would_be_unmerged(
    name: str, how: Callable[[nn.Module], object], device: str
) -> None:
    layer = build(name, device).eval()
    how(owner(layer))
    for change in (layer.train, layer.double, lambda: layer.load_state_dict({}, strict=False)):
        assert complaint(change).startswith("weight was parametrized or pruned while the layer is merged")


@few_layers
def test_functional_calls_of_a_merged_layer(name: str, device: str) -> None:
    """With its parameters it is what it is; with its state dict, which holds the base, it would lack the adapter."""
    layer, x = build(name, device).eval(), make_x(name, device)
    assert_same_bits(torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)), layer(x))
    with pytest.raises(RuntimeError, match="weight was replaced or written while the layer is merged"):
        torch.func.functional_call(layer, layer.state_dict(), (x,))


@pytest.mark.parametrize("copied", [Tensor.clone, Tensor.double, Tensor.bfloat16], ids=["clone", "double", "bfloat16"])
@few_layers
def test_functional_calls_of_a_merged_layer_with_copies(
    name: str, copied: Callable[[Tensor], Tensor], device: str
) -> None:
    """As an average of weights is evaluated; a copy of what is merged counts as merged."""
    layer, x = build(name, device).eval(), make_x(name, device)
    x = copied(x) if x.is_floating_point() else x
    merged, unmerged = (
        {key: copied(t) for key, t in of.items()} for of in (dict(layer.named_parameters()), layer.state_dict())
    )
    with torch.no_grad():
        expected = torch.func.functional_call(
            plain(name), {k.rpartition(".")[2]: t for k, t in merged.items() if "lora_" not in k}, (x,)
        )
        assert_same_bits(torch.func.functional_call(layer, merged, (x,)), expected)
    assert complaint(lambda: torch.func.functional_call(layer, unmerged, (x,))).startswith("weight was replaced")
    # Not within a trace, which would hold the answer.
    assert complaint(lambda: make_fx(lambda x: torch.func.functional_call(layer, unmerged, (x,)))(x)) == ""
    with torch.no_grad():
        layer.train().lora_B.zero_()
    layer.eval()
    for state in (dict(layer.named_parameters()), layer.state_dict()):
        copies = {key: copied(t) for key, t in state.items()}
        assert complaint(lambda copies=copies: torch.func.functional_call(layer, copies, (x,))) == ""


@few_layers
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("copied", [lambda layer: layer, copy.deepcopy], ids=["itself", "a copy"])
def test_a_scaling_that_changed_while_merged_is_taken_by_eval(
    name: str, copied: Callable[[nn.Module], nn.Module], in_place: bool, device: str
) -> None:
    layer, x = build(name, device), make_x(name, device)
    layer.scaling = torch.tensor(layer.scaling)
    layer.eval()
    if in_place:
        layer.scaling.mul_(2)
    else:
        layer.scaling = 0.5
    layer = copied(layer)
    with pytest.raises(RuntimeError, match="scaling was changed while the layer is merged"):
        layer(x)
    layer.eval()
    assert_same_bits(owner(layer).weight, layer.merged_weight())
    assert_same_bits(layer(x), layer.train().eval()(x))


@few_layers
def test_a_merged_layer_is_not_drawn_anew(name: str, device: str) -> None:
    layer = build(name, device).eval()
    before = entries(layer)
    with pytest.raises(RuntimeError, match=r"reset_parameters\(\) was called of a merged layer"):
        layer.reset_parameters()
    assert_same_entries(entries(layer), before)
    layer.train().reset_parameters()


def test_a_parameter_that_is_a_view_of_fsdps_flat_one_is_not_merged(device: str) -> None:
    layer = build("Linear", device)
    layer.weight._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="weight is parametrized or sharded"):
        layer.eval()
