"""Merging: eval() and train() against float64 and against each other, for every layer class, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate_as
from torch import Tensor, nn
from torch.nn import functional as F

import fused_lora
from fused_lora import Conv1d, Conv2d, Conv3d, Embedding, Linear, MergedLinear, merged_state_dict

R, ALPHA = 2, 3.0
TFT = [True, False, True]
LAYERS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "Linear": (Linear, (5, 7), {}),
    "Linear-fan_in_fan_out": (Linear, (5, 7), {"fan_in_fan_out": True}),
    "MergedLinear": (MergedLinear, (5, 9), {"enable_lora": TFT}),
    "MergedLinear-fan_in_fan_out": (MergedLinear, (5, 9), {"enable_lora": TFT, "fan_in_fan_out": True}),
    "Embedding": (Embedding, (11, 5), {}),
    "Conv1d": (Conv1d, (3, 4, 3), {}),
    "Conv2d-groups=2": (Conv2d, (4, 6, 3), {"groups": 2}),
    "Conv3d": (Conv3d, (2, 3, 2), {}),
}
FEW = ["Linear", "MergedLinear-fan_in_fan_out", "Embedding", "Conv2d-groups=2"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HALVES = [torch.float16, torch.bfloat16]
X_SHAPES = {"Linear": (2, 3, 5), "MergedLinear": (2, 3, 5), "Conv1d": (2, 3, 7), "Conv2d": (2, 4, 6, 5)}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

every_layer = pytest.mark.parametrize("name", LAYERS)
few_layers = pytest.mark.parametrize("name", FEW)
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
    ],
)
# Many tests call a merged layer with gradients enabled; that it warns is test_linear.py's subject.
pytestmark = pytest.mark.filterwarnings("ignore:A merged fused_lora layer")


def build(name: str, device: str, **options: Any) -> Any:
    """A layer of LAYERS whose adapter weighs as much as its base."""
    cls, sizes, its_own = LAYERS[name]
    layer = cls(*sizes, **{"r": R, "lora_alpha": ALPHA, "device": device} | its_own | options)
    redraw_adapter(layer)
    return layer


def redraw_adapter(module: nn.Module) -> None:
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "lora_" in key:
                parameter.normal_()


def make_x(name: str, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if name == "Embedding":
        return torch.randint(11, (3, 4), device=device)
    return torch.randn(X_SHAPES.get(name.partition("-")[0], (2, 2, 4, 3, 5)), device=device, dtype=dtype)


def owner(layer: Any) -> Any:
    """The module that has the weight."""
    return getattr(layer, "conv", layer)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.device == expected.device, what
    changed = int((bits(actual) != bits(expected)).sum())
    assert changed == 0, f"{what}: {changed} of {actual.numel()} elements have other bits"


def assert_same_entries(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, tensor in actual.items():
        assert_same_bits(tensor, expected[key], key)


def entries(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}


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
    if backend == "triton" and dtype == torch.float64:
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
@pytest.mark.parametrize("changed", ["base", "lora_A", "lora_B"])
@every_layer
def test_a_change_in_place_while_merged_shows_in_the_next_output(
    name: str, changed: str, guard: Callable[[], Any], device: str
) -> None:
    layer, x = build(name, device), make_x(name, device)
    twin = copy.deepcopy(layer)
    layer.eval()
    for module in (layer, twin):
        with torch.no_grad():
            (module.base_weight if changed == "base" else getattr(module, changed)).mul_(-2)
    with guard():
        assert_same_bits(layer(x), twin.eval()(x), "output")
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


def torch_saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


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


class InByOut(nn.Module):
    """What fan_in_fan_out replaces: GPT-2's Conv1D, a linear layer whose weight is (in_features, out_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        # Strided as fan_in_fan_out's is: BLAS rounds differently for another layout.
        self.weight = nn.Parameter(torch.empty(out_features, in_features).T)
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


def plain(name: str) -> nn.Module:
    """torch's own layer of a name in LAYERS."""
    cls, sizes, options = LAYERS[name]
    if options.get("fan_in_fan_out"):
        return InByOut(*sizes)
    if cls is MergedLinear:
        return nn.Linear(*sizes)
    return getattr(nn, cls.__name__)(*sizes, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "never merged"])
@every_layer
def test_merged_state_dict_makes_the_plain_layer_compute_the_same_bits(
    name: str, mode: str, dtype: torch.dtype, device: str
) -> None:
    layer = build(name, device, dtype=dtype, merge_weights=mode != "never merged").train(mode == "train")
    before, weight, was_merged = entries(layer), owner(layer).weight, layer.merged
    own = {tensor.data_ptr() for tensor in layer.state_dict().values()}
    state = merged_state_dict(layer)
    for key, tensor in state.items():
        assert not tensor.requires_grad
        assert (tensor.data_ptr() in own) == key.endswith("bias") and tensor.data_ptr() != weight.data_ptr()
    nested = merged_state_dict(nn.Sequential(nn.Identity(), nn.Sequential(layer)))
    assert_same_entries(nested, {f"1.0.{key}": tensor for key, tensor in state.items()})
    target = plain(name).to(device, dtype)
    target.load_state_dict(state, strict=True)
    assert owner(layer).weight is weight and layer.merged == was_merged and layer.training == (mode == "train")
    assert_same_entries(entries(layer), before)
    merged, x = copy.deepcopy(layer), make_x(name, device, dtype)
    merged.merge_weights = True
    # torch takes another matrix product, which rounds differently, for weights that require a gradient.
    merged.eval().requires_grad_(False), target.requires_grad_(False)
    assert_same_bits(target(x), merged(x), "output")


class Language(nn.Module):
    """A model of every kind of layer, LoRA's or plain, with a head tied to the embedding and a block used twice."""

    def __init__(self, embedding: nn.Module, qkv: nn.Module, conv: nn.Module, out: nn.Module, tie: bool) -> None:
        super().__init__()
        self.embedding, self.norm = embedding, nn.BatchNorm1d(5)
        self.block = nn.ModuleDict({"qkv": qkv, "conv": nn.Sequential(conv)})
        self.again = self.block["qkv"]
        self.conv = out
        self.head = nn.Linear(5, 11, bias=False)
        if tie:
            self.head.weight = embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        q, k, v = self.block["qkv"](x).chunk(3, -1)
        x = q * k + self.again(v).chunk(3, -1)[0]
        images = self.block["conv"](x.unflatten(-1, (1, 5)).transpose(1, 2))
        return self.head(self.conv(images.flatten(1, 2)))


def language_model(device: str) -> Language:
    adapter = {"r": R, "lora_alpha": ALPHA}
    return Language(
        Embedding(11, 5, **adapter),
        MergedLinear(5, 15, enable_lora=TFT, **adapter),
        Conv2d(1, 2, 3, padding=1, **adapter),
        Conv1d(8, 4, 1, **adapter),
        tie=True,
    ).to(device)


@pytest.mark.parametrize("training", [False, True])
def test_merged_state_dict_of_a_whole_model(training: bool, device: str) -> None:
    model = language_model(device)
    redraw_adapter(model)
    tokens = torch.randint(11, (3, 4), device=device)
    with torch.no_grad():
        model(tokens)  # Moves BatchNorm's statistics off their start.
    before = entries(model)
    model.train(training)
    # Untied: the merged embedding is no longer the head's weight.
    target = Language(
        nn.Embedding(11, 5), nn.Linear(5, 15), nn.Conv2d(1, 2, 3, padding=1), nn.Conv1d(8, 4, 1), tie=False
    ).to(device)
    state = merged_state_dict(model)
    target.load_state_dict(state, strict=True)
    assert not any("lora_" in key for key in state)
    assert_same_bits(state["again.weight"], state["block.qkv.weight"])
    assert_same_bits(state["head.weight"], before["head.weight"])
    assert model.head.weight is model.embedding.base_weight
    assert_same_entries(entries(model), before)
    # Frozen for the reason given above.
    model.eval().requires_grad_(False), target.eval().requires_grad_(False)
    assert_same_bits(target(tokens), model(tokens), "logits")


def test_merged_state_dict_of_a_model_without_lora_is_its_state_dict(device: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)).to(device)
    state = merged_state_dict(model)
    assert list(state) == list(model.state_dict())
    assert all(tensor.data_ptr() == state[key].data_ptr() for key, tensor in model.state_dict().items())
