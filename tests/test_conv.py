"""Conv1d, Conv2d and Conv3d: against loralib where it works, against the mathematics where it does not."""

from __future__ import annotations

import copy
from typing import Any

import loralib
import pytest
import torch
from convolutions import (
    BY_NAME,
    CASES,
    CONVS,
    PLAIN,
    SIZES,
    Case,
    Definition,
    assert_follows_the_definition,
    draw,
    ieee_convolutions,  # noqa: F401 (an autouse fixture)
    one_thread,  # noqa: F401 (an autouse fixture)
    parametrize_case,
    step,
    torchs_mask,
    trained,
)
from numerics import assert_as_accurate_as
from torch import Tensor, nn

import fused_lora
from fused_lora import Conv2d

# ---- loralib 0.1.2, whose convolutions work for one and three dimensions if the kernel has size 1 ----

GEOMETRIES = [{}, {"stride": 2, "padding": 1, "bias": False}, {"padding": 2, "dilation": 2, "padding_mode": "circular"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("merge_weights", [True, False])
@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("dims", "kernel"), [(2, 1), (2, 3), (1, 1), (3, 1)])
def test_same_seed_same_init_outputs_and_gradients_as_loralib(
    dims: int,
    kernel: int,
    groups: int,
    r: int,
    merge_weights: bool,
    geometry: dict[str, Any],
    dtype: torch.dtype,
    device: str,
) -> None:
    options = {"r": r, "lora_alpha": 3, "merge_weights": merge_weights, "groups": groups, **geometry}
    layers = []
    for module in (fused_lora, loralib):
        torch.manual_seed(3)
        layer = getattr(module, f"Conv{dims}d")(4, 6, kernel, dtype=dtype, device=device, **options)
        layers.append(trained(layer) if r > 0 else layer)
    ours, theirs = layers
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, mine), (other_name, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other_name and torch.equal(mine, other) and mine.stride() == other.stride(), name
        assert mine.requires_grad == other.requires_grad, name
    for attribute in ("r", "lora_alpha", "merged", "merge_weights"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert hasattr(ours, "scaling") == hasattr(theirs, "scaling") == (r > 0)
    assert r == 0 or ours.scaling == theirs.scaling
    oracle = copy.deepcopy(theirs).double()
    x = draw((2, 4, *SIZES[dims]), 5, dtype, device)
    for mode in (True, False, False, True):
        for layer in (ours, theirs, oracle):
            layer.train(mode)
        mine, other, exact = step(ours, x), step(theirs, x), step(oracle, x.double())
        assert ours.merged == theirs.merged, f"merged after train({mode})"
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert_as_accurate_as(value, other[name], exact[name], f"{name} after train({mode})")


def test_a_new_layer_computes_what_the_plain_convolution_does(device: str) -> None:
    """lora_B is zero, and reset_parameters makes it so again."""
    layer = trained(Conv2d(3, 4, 3, r=2, device=device))
    x = draw((1, 3, 5, 5), 5, torch.float32, device)
    layer.reset_parameters()
    assert torch.equal(layer(x), layer.conv(x)) and layer.lora_A.count_nonzero() > 0


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_attributes_and_class_tree(dims: int) -> None:
    layer = CONVS[dims](4, 6, 3, r=2, lora_alpha=8, lora_dropout=0.25, stride=2)
    assert isinstance(layer, fused_lora.ConvLoRA) and isinstance(layer, fused_lora.LoRALayer)
    assert isinstance(layer.conv, PLAIN[dims]) and layer.conv.stride == (2,) * dims
    assert layer.weight is layer.conv.weight and layer.bias is layer.conv.bias
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert layer.scaling == 4.0 and isinstance(layer.lora_dropout, nn.Dropout) and layer.lora_dropout.p == 0.25
    assert "r=2" in repr(layer) and "lora_alpha=8" in repr(layer)
    assert layer.eval() is layer and layer.train() is layer
    assert CONVS[dims](4, 6, 3, bias=False).bias is None


@pytest.mark.parametrize(
    ("dims", "kernel", "groups", "lora_A", "lora_B"),
    [
        (1, 1, 1, (5, 4), (6, 5)),
        (1, 3, 1, (15, 4), (18, 15)),
        (1, 3, 2, (15, 4), (9, 15)),
        (2, 3, 1, (15, 12), (18, 15)),
        (2, 3, 2, (15, 12), (9, 15)),
        (2, (3, 2), 1, (15, 8), (18, 15)),
        (2, (2, 3), 2, (10, 12), (6, 10)),
        (3, 2, 1, (10, 16), (12, 10)),
        (3, (2, 1, 3), 1, (10, 12), (12, 10)),
        (3, (2, 1, 3), 2, (10, 12), (6, 10)),
    ],
)
def test_the_documented_shapes_of_lora_A_and_lora_B(
    dims: int, kernel: int | tuple[int, ...], groups: int, lora_A: tuple[int, ...], lora_B: tuple[int, ...]
) -> None:
    layer = CONVS[dims](4, 6, kernel, r=5, groups=groups)
    assert (tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)) == (lora_A, lora_B)


# ---- the definition ----

TINY = [case for case in CASES if case.name in ("1d-reflect-unbatched", "2d-non-square-same-groups", "3d-non-cubic")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@parametrize_case(CASES)
def test_as_accurate_as_the_definition_in_training_and_merged(case: Case, dtype: torch.dtype, device: str) -> None:
    layer = case.build(dtype=dtype, device=device)
    layer.weight.requires_grad = True
    x = draw(case.x_shape, 5, dtype, device)
    assert_follows_the_definition(case, layer, x)
    layer.weight.requires_grad = False
    assert_follows_the_definition(case, layer.eval(), x, frozen=True)


@parametrize_case(CASES)
def test_whole_numbers_give_the_definition_exactly(case: Case, device: str) -> None:
    """Small integers and a scaling of 1/2: every product and sum is exact in float64, whatever the order."""
    layer = case.build(dtype=torch.float64, device=device, lora_alpha=case.options.get("r", 2) / 2)
    layer.weight.requires_grad = True
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_((2 * draw(tuple(parameter.shape), seed, torch.float64, device)).round())
    x = (2 * draw(case.x_shape, 5, torch.float64, device)).round()
    definition = Definition(case, layer)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = layer(x1), definition(x2)
    dy = draw(tuple(y2.shape), 6, torch.float64, device).mul(2).round()
    y1.backward(dy), y2.backward(dy)
    assert torch.equal(y1, y2) and torch.equal(x1.grad, x2.grad)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, definition.get_parameter(name.replace("conv.", "")).grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize_case(TINY)
def test_both_backends_follow_the_definition(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    layer = case.build(dtype=dtype, device=device)
    layer.weight.requires_grad = True
    x = draw(case.x_shape, 5, dtype, device)
    with fused_lora.count_paths() as paths:
        assert_follows_the_definition(case, layer, x)
        layer.weight.requires_grad = False
        assert_follows_the_definition(case, layer.eval(), x, frozen=True)
    assert paths[f"effective_weight/{backend}"] == 2, "once in training and once to merge"


def test_both_backends_with_dropout_and_float32_adapters(backend: str, device: str) -> None:
    case = BY_NAME["2d-non-square-same-groups"]
    layer = case.build(dtype=torch.bfloat16, adapter_dtype=torch.float32, lora_dropout=0.5, device=device)
    layer.weight.requires_grad = True
    x = draw(case.x_shape, 5, torch.bfloat16, device)
    keep = torchs_mask(x, 8)
    torch.manual_seed(8)
    assert_follows_the_definition(case, layer, x, keep)


@parametrize_case([BY_NAME["1d"], BY_NAME["2d"], BY_NAME["3d"]])
def test_strided_inputs_and_parameters(case: Case, device: str) -> None:
    layer = case.build(device=device)
    layer.weight.requires_grad = True
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B, layer.conv.weight):
            wide = torch.full((*parameter.shape, 2), float("nan"), device=device)
            wide[..., 0] = parameter
            parameter.data = wide[..., 0]
    wide = torch.full((*case.x_shape[:-1], 2 * case.x_shape[-1]), float("nan"), device=device)
    wide[..., ::2] = draw(case.x_shape, 5, torch.float32, device)
    assert_follows_the_definition(case, layer, wide[..., ::2])


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
@parametrize_case([BY_NAME["1d"], BY_NAME["2d-non-square"], BY_NAME["3d-non-cubic"]])
def test_float32_adapters_on_a_half_base_keep_float32_gradients(case: Case, base: torch.dtype, device: str) -> None:
    layer = case.build(dtype=base, adapter_dtype=torch.float32, device=device)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and layer.weight.dtype == base
    layer.weight.requires_grad = True
    x = draw(case.x_shape, 5, base, device)
    # The yardstick's own adapter is float32 too, so this compares the gradients' dtypes as well.
    assert_follows_the_definition(case, layer, x)
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


# ---- dropout ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize_case([BY_NAME["1d-reflect-unbatched"], BY_NAME["2d"], BY_NAME["2d-circular"], BY_NAME["3d-non-cubic"]])
def test_the_adapters_input_is_dropped_with_torchs_own_mask(case: Case, dtype: torch.dtype, device: str) -> None:
    layer = case.build(lora_dropout=0.5, dtype=dtype, device=device)
    layer.weight.requires_grad = True
    x = draw(case.x_shape, 5, dtype, device)
    keep = torchs_mask(x, 8)
    assert keep.any() and not keep.all()
    torch.manual_seed(8)
    assert_follows_the_definition(case, layer, x, keep)


def test_dropout_follows_the_mode_and_the_dropout_module(device: str) -> None:
    layer = trained(Conv2d(4, 6, 3, r=2, lora_dropout=0.5, merge_weights=False, device=device))
    x = draw((2, 4, 5, 5), 5, torch.float32, device)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x)) and not layer.merged
    layer.train().lora_dropout.eval()
    assert torch.equal(layer(x), layer(x))
    layer.lora_dropout = nn.Dropout2d(0.5)
    with pytest.raises(TypeError, match="lora_dropout is a Dropout2d"):
        layer(x)


@pytest.mark.parametrize("merge_weights", [True, False])
def test_there_is_no_dropout_in_eval_mode(merge_weights: bool, device: str) -> None:
    case = BY_NAME["2d"]
    layer = case.build(lora_dropout=0.5, merge_weights=merge_weights, device=device).eval()
    layer.weight.requires_grad = not merge_weights
    assert_follows_the_definition(case, layer, draw(case.x_shape, 5, torch.float32, device), frozen=merge_weights)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dropout_of_probability_1_switches_the_adapter_off(dims: int, device: str) -> None:
    layer = trained(CONVS[dims](4, 6, 3, r=2, lora_dropout=1.0, device=device))
    x = draw((2, 4, *SIZES[dims]), 5, torch.float32, device)
    result, plain = step(layer, x), step(copy.deepcopy(layer.conv), x)
    assert torch.equal(result["y"], plain["y"])
    # A GPU may sum a convolution's gradient in another order each time; dropping would change it by its own size.
    torch.testing.assert_close(result["x"], plain["x"])
    # As nn.Dropout(1): gradients that are zero, not missing.
    assert result["lora_A"].count_nonzero() == result["lora_B"].count_nonzero() == 0


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_base_path_is_never_dropped(dims: int, device: str) -> None:
    layer = CONVS[dims](4, 6, 3, r=2, lora_dropout=0.5, device=device)
    x = draw((2, 4, *SIZES[dims]), 5, torch.float32, device)
    result, plain = step(layer, x), step(copy.deepcopy(layer.conv), x)
    # lora_B is zero: what is left is the base.
    assert torch.equal(result["y"], plain["y"])
    # A GPU may sum a convolution's gradient in another order each time; dropping would change it by its own size.
    torch.testing.assert_close(result["x"], plain["x"])
    assert result["lora_B"].count_nonzero() > 0


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": -1}, ["r is -1"]),
        ({"lora_dropout": 1.1}, ["lora_dropout is 1.1", "[0, 1]"]),
        ({"lora_dropout": -0.1}, ["lora_dropout is -0.1", "[0, 1]"]),
        ({"r": 2, "lora_alpha": float("nan")}, ["lora_alpha is nan"]),
        ({"r": 2, "lora_alpha": float("inf")}, ["lora_alpha is inf"]),
        ({"r": 2, "groups": 3}, ["in_channels", "groups"]),
        ({"r": 2, "padding_mode": "mirror"}, ["padding_mode", "mirror"]),
        ({"r": 2, "padding": "same", "stride": 2}, ["padding='same'", "strided"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_bad_options(dims: int, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        CONVS[dims](4, 6, 3, **options)
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    ("name", "tensor", "error", "words"),
    [
        ("lora_A", torch.zeros(5, 12), ValueError, ["lora_B", "(18, 6)", "(18, 5)", "lora_A"]),
        ("lora_A", torch.zeros(6, 13), ValueError, ["lora_A", "(6, 13)", "(6, 4, 3, 3)"]),
        ("lora_B", torch.zeros(17, 6), ValueError, ["lora_B", "(17, 6)", "(6, 4, 3, 3)"]),
        ("lora_A", torch.zeros(6, 12, dtype=torch.bfloat16), TypeError, ["lora_A is torch.bfloat16", "torch.float32"]),
        ("lora_B", torch.zeros(18, 6, dtype=torch.float64), TypeError, ["lora_B is torch.float64", "torch.float32"]),
        ("lora_B", torch.zeros(18, 6, device="meta"), ValueError, ["lora_B is on meta", "cpu"]),
    ],
    ids=["rank", "columns", "rows", "dtype-A", "dtype-B", "device"],
)
def test_an_adapter_that_does_not_fit_is_named(
    name: str, tensor: Tensor, error: type[Exception], words: list[str], dropout: float
) -> None:
    layer = Conv2d(4, 6, 3, r=2, lora_dropout=dropout)
    setattr(layer, name, nn.Parameter(tensor))
    with pytest.raises(error) as raised:
        layer(torch.zeros(1, 4, 5, 5))
    assert all(word in str(raised.value) for word in words)
    assert not layer.merged
    with pytest.raises(error):
        layer.eval()


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 5, 5), torch.zeros(4, 5), torch.zeros(2, 4, 5, 5, dtype=torch.int64)])
def test_bad_inputs_raise_what_the_plain_convolution_raises(x: Tensor) -> None:
    layer = Conv2d(4, 6, 3, r=2, lora_dropout=0.5)
    with pytest.raises(RuntimeError) as theirs:
        layer.conv(x)
    for dropout in (layer.lora_dropout, nn.Identity()):
        layer.lora_dropout = dropout
        with pytest.raises(RuntimeError) as ours:
            layer(x)
        assert str(ours.value) == str(theirs.value)


def test_an_attribute_that_would_be_ignored_cannot_be_set() -> None:
    """`weight` and `bias` are conv's: a parameter set beside them would take no part in anything."""
    layer = Conv2d(4, 6, 3, r=2)
    for name in ("weight", "bias"):
        with pytest.raises(KeyError, match=name):
            setattr(layer, name, nn.Parameter(torch.zeros(6)))


# ---- torch ----


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_without_a_graph_break_in_training(dropout: float, device: str) -> None:
    torch._dynamo.reset()
    layer = trained(Conv2d(4, 6, 3, r=2, lora_dropout=dropout, padding=1, device=device))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = draw((2, 4, 6, 5), 5, torch.float32, device)
    results = []
    for module in (layer, compiled):
        torch.manual_seed(2)
        result = step(module, x)
        results.append({name.removeprefix("_orig_mod."): value for name, value in result.items()})
    assert results[0].keys() == results[1].keys() >= {"lora_A", "lora_B", "conv.bias"}
    for name, value in results[0].items():
        # The same operations; a GPU may sum a convolution's gradients in another order.
        torch.testing.assert_close(results[1][name], value)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@parametrize_case([BY_NAME["1d"], BY_NAME["2d-non-square-same-groups"], BY_NAME["3d"]])
def test_autocast_gives_what_it_gives_the_plain_convolution(case: Case, dropout: float, device: str) -> None:
    """bfloat16 outputs of float32 weights, and float32 gradients, in training and merged."""
    layer = case.build(lora_dropout=dropout, device=device)
    layer.weight.requires_grad = True
    x = draw(case.x_shape, 5, torch.float32, device)
    keep = torchs_mask(x, 8) if dropout > 0 else None
    yardstick, oracle = Definition(case, layer, keep=keep), Definition(case, layer, torch.float64, keep)
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.manual_seed(8)
        mine, same = step(layer, x), step(yardstick, x)
        assert mine["y"].dtype == layer.conv(x).dtype == torch.bfloat16
    exact = step(oracle, x.double())
    assert {name.removeprefix("conv.") for name in mine} == same.keys()
    for name, value in mine.items():
        name = name.removeprefix("conv.")
        if name != "y":
            assert value.dtype == torch.float32, name
        assert_as_accurate_as(value, same[name], exact[name], name)
    elsewhere = copy.deepcopy(layer).eval().conv.weight
    with torch.autocast(device, dtype=torch.bfloat16), torch.no_grad():
        assert layer.eval()(x).dtype == torch.bfloat16 and torch.equal(layer.conv.weight, elsewhere)
