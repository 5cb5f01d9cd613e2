"""Conv1d, Conv2d and Conv3d: against loralib where it works, against the mathematics where it does not."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import loralib
import pytest
import torch
from numerics import assert_as_accurate_as
from torch import Tensor, nn
from torch.nn import functional as F

import fused_lora
from fused_lora import Conv1d, Conv2d, Conv3d

CONVS = {1: Conv1d, 2: Conv2d, 3: Conv3d}
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (7,), 2: (6, 5), 3: (4, 5, 4)}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Convolutions this small spend their time waiting for each other's threads, on a busy machine seconds a call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def ieee_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN takes tf32 unless told otherwise, whose error would drown a yardstick that happened to round well."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def trained(layer: nn.Module) -> nn.Module:
    """With an lora_B that is not zero, at a scale at which the adapter weighs as much as the base."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.5)
    return layer


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> Tensor:
    # Rounded to bfloat16 first, so that every dtype sees the same numbers.
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return numbers.to(device, dtype)


def bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integers)


def step(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one call, for the same gradient of the output in any dtype."""
    layer.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = layer(x)
    y.backward(draw(tuple(y.shape), 6, y.dtype, y.device.type))
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


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


@dataclass(frozen=True)
class Case:
    """One convolution and the shape of its input; batch None is an unbatched input."""

    name: str
    channels: tuple[int, int]
    kernel: int | tuple[int, ...]
    size: tuple[int, ...]
    batch: int | None = 2
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dims(self) -> int:
        return len(self.size)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (*(() if self.batch is None else (self.batch,)), self.channels[0], *self.size)

    def build(self, **options: Any) -> nn.Module:
        torch.manual_seed(3)
        options = {"r": 2, "lora_alpha": 3, **self.options, **options}
        return trained(CONVS[self.dims](*self.channels, self.kernel, **options))


CASES = [
    Case("1d", (4, 6), 3, (7,)),
    Case("1d-strided-groups-even-kernel", (4, 6), 2, (8,), options={"stride": 2, "padding": 1, "groups": 2}),
    Case("1d-same-even-kernel", (3, 2), (4,), (7,), options={"padding": "same", "bias": False}),
    Case(
        "1d-same-dilated-circular", (3, 2), 3, (7,), 1, {"padding": "same", "dilation": 2, "padding_mode": "circular"}
    ),
    Case("1d-reflect-unbatched", (2, 3), 3, (5,), None, {"padding": 2, "padding_mode": "reflect"}),
    Case("1d-one-of-everything", (1, 1), 1, (1,), 1, {"r": 1}),
    Case("2d", (4, 6), 3, (6, 5)),
    Case("2d-1x1", (4, 6), 1, (3, 2), options={"groups": 2, "r": 5}),
    Case("2d-non-square", (4, 6), (3, 2), (6, 5), 1, {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    Case("2d-non-square-same-groups", (4, 6), (3, 2), (6, 5), options={"padding": "same", "groups": 2}),
    Case("2d-circular", (2, 3), (2, 3), (4, 5), options={"padding": (1, 2), "padding_mode": "circular"}),
    Case("2d-reflect-unbatched", (2, 3), 3, (4, 5), None, {"padding": (2, 1), "padding_mode": "reflect"}),
    Case("2d-depthwise", (4, 8), 3, (5, 4), options={"groups": 4, "padding": 1, "bias": False}),
    Case("2d-no-batch-at-all", (2, 3), 3, (4, 5), 0),
    Case("3d", (2, 4), 2, (3, 4, 3)),
    Case("3d-non-cubic", (4, 2), (2, 1, 3), (3, 2, 5), 1, {"stride": (1, 2, 1), "padding": (1, 0, 2), "groups": 2}),
    Case("3d-same-dilated", (2, 2), (2, 1, 3), (3, 2, 5), options={"padding": "same", "dilation": (1, 1, 2)}),
    Case("3d-circular", (2, 2), 2, (3, 2, 3), options={"padding": 1, "padding_mode": "circular", "bias": False}),
    Case("3d-reflect-unbatched", (2, 2), (3, 1, 2), (3, 2, 3), None, {"padding": 1, "padding_mode": "reflect"}),
]
TINY = [case for case in CASES if case.name in ("1d-reflect-unbatched", "2d-non-square-same-groups", "3d-non-cubic")]
BY_NAME = {case.name: case for case in CASES}


def parametrize_case(cases: list[Case]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def per_dimension(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * dims


class Definition(nn.Module):
    """conv(x, W) + bias + scaling * conv(dropout(x), (B @ A).view(W.shape)), with padding written out.

    keep: the mask of a dropout of probability 1/2; None for no dropout.
    """

    def __init__(self, case: Case, layer: nn.Module, dtype: torch.dtype | None = None, keep: Tensor | None = None):
        super().__init__()
        self.case, self.keep, self.scaling = case, keep, layer.lora_alpha / layer.r
        state = layer.state_dict()
        for name, tensor in state.items():
            of = dtype or tensor.dtype
            self.register_parameter(name.replace("conv.", ""), nn.Parameter(tensor.detach().clone().to(of)))

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        options, dims = self.case.options, self.case.dims
        dilation, padding = per_dimension(options.get("dilation", 1), dims), options.get("padding", 0)
        pads: list[int] = []
        for d in reversed(range(dims)):
            # "same": as many outputs as inputs, an odd one on the right.
            total = dilation[d] * (weight.shape[2 + d] - 1)
            side = padding if padding == "same" else per_dimension(padding, dims)[d]
            pads += [total // 2, total - total // 2] if side == "same" else [side, side]
        mode = {"zeros": "constant"}.get(options.get("padding_mode", "zeros"), options.get("padding_mode"))
        function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
        return function(
            F.pad(x, pads, mode=mode),
            weight,
            bias,
            stride=options.get("stride", 1),
            dilation=dilation,
            groups=options.get("groups", 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        update = (self.lora_B @ self.lora_A).view(self.weight.shape).to(self.weight.dtype)
        dropped = x if self.keep is None else x * self.keep.to(x.dtype) * 2
        base = self.convolution(x, self.weight, getattr(self, "bias", None))
        return base + self.scaling * self.convolution(dropped, update)


def assert_follows_the_definition(
    case: Case, layer: nn.Module, x: Tensor, keep: Tensor | None = None, *, frozen: bool = False
) -> None:
    """frozen: only x and the bias are to have gradients, as in a merged layer."""
    yardstick, oracle = Definition(case, layer, keep=keep), Definition(case, layer, torch.float64, keep)
    mine, same, exact = step(layer, x), step(yardstick, x), step(oracle, x.double())
    mine = {name.replace("conv.", ""): value for name, value in mine.items()}
    expected = {"y", "x", "bias"} & same.keys() if frozen else same.keys()
    assert mine.keys() == expected
    for name, value in mine.items():
        assert_as_accurate_as(value, same[name], exact[name], name)


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


def torchs_mask(x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return F.dropout(torch.ones_like(x), 0.5) != 0


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


# ---- merging ----


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [*((dtype, dtype) for dtype in DTYPES), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize(("dims", "kernel"), [(1, 3), (2, (3, 2)), (3, (2, 1, 3))])
def test_merging_rounds_once_and_unmerging_restores_every_bit(
    dims: int, kernel: int | tuple[int, ...], dtype: torch.dtype, adapter_dtype: torch.dtype, device: str
) -> None:
    options = {"r": 2, "lora_alpha": 3, "groups": 2, "dtype": dtype, "adapter_dtype": adapter_dtype}
    layer = trained(CONVS[dims](4, 6, kernel, device=device, **options))
    base = layer.conv.weight.detach().clone()
    for _ in range(3):
        layer.eval()
        exact = base.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()).view(base.shape)
        # One rounding of each element to dtype, and the error of summing in float32.
        once = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
        summed = 8 * torch.finfo(torch.float32).eps if dtype != torch.float64 else 1e-15
        assert ((layer.conv.weight.double() - exact).abs() <= once + summed * exact.abs().max()).all()
        assert not torch.equal(layer.conv.weight, base) and layer.conv.weight.dtype == dtype
        assert torch.equal(layer.base_weight, base)
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
        layer.train()
        assert torch.equal(bits(layer.conv.weight), bits(base))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerging_restores_numbers_that_no_arithmetic_would(dtype: torch.dtype, device: str) -> None:
    layer = trained(Conv2d(2, 4, 3, r=2, dtype=dtype, device=device))
    info = torch.finfo(dtype)
    odd = [0.0, -0.0, info.max, -info.max, info.tiny, info.tiny / 2, info.eps, float("inf"), float("nan")]
    with torch.no_grad():
        layer.conv.weight.view(-1)[: len(odd)] = torch.tensor(odd, dtype=dtype)
    base, parameter = bits(layer.conv.weight).clone(), layer.conv.weight
    layer.eval().train()
    assert torch.equal(bits(layer.conv.weight), base) and layer.conv.weight is parameter


@parametrize_case([BY_NAME["1d"], BY_NAME["2d-non-square-same-groups"], BY_NAME["3d-non-cubic"]])
def test_an_adapter_changed_in_place_while_merged_takes_effect(case: Case, device: str) -> None:
    layer = case.build(device=device)
    base = layer.conv.weight.detach().clone()
    layer.eval()
    with torch.no_grad():
        layer.lora_A.mul_(2)
        layer.lora_B.add_(1)
    assert_follows_the_definition(case, layer, draw(case.x_shape, 5, torch.float32, device), frozen=True)
    assert torch.equal(bits(layer.train().conv.weight), bits(base))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_casting_while_merged_casts_the_base_and_merges_anew(dims: int, dtype: torch.dtype, device: str) -> None:
    layer = trained(CONVS[dims](4, 6, 2, r=2, device=device))
    expected = copy.deepcopy(layer).to(dtype)
    layer.eval().to(dtype)
    assert layer.merged and torch.equal(bits(layer.conv.weight), bits(copy.deepcopy(expected).eval().conv.weight))
    assert torch.equal(bits(layer.train().conv.weight), bits(expected.conv.weight))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_loading_while_merged_takes_effect_and_unmerges_cleanly(nested: bool, assign: bool, device: str) -> None:
    source, target = (trained(Conv2d(4, 6, 3, r=2, device=device)) for _ in range(2))
    nn.init.normal_(source.lora_B)
    owner = nn.Sequential(target) if nested else target
    owner.eval()
    state = source.state_dict(prefix="0." if nested else "")
    owner.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=assign)
    merged = copy.deepcopy(source).eval()
    assert target.merged and torch.equal(target.conv.weight, merged.conv.weight)
    owner.train()
    for name, tensor in source.state_dict().items():
        assert torch.equal(bits(target.state_dict()[name]), bits(tensor)), name
    assert not target.conv.weight.requires_grad


def test_an_adapter_alone_loads_into_a_merged_layer(device: str) -> None:
    source, target = trained(Conv2d(4, 6, 3, r=2, device=device)), Conv2d(4, 6, 3, r=2, device=device).eval()
    base = target.conv.weight.detach().clone()
    target.load_state_dict(fused_lora.lora_state_dict(source), strict=False)
    update = source.scaling * (source.lora_B @ source.lora_A).view(base.shape)
    # float32's rounding of numbers around 1, some ten of them summed.
    torch.testing.assert_close(target.conv.weight, base + update, rtol=0, atol=1e-5)
    assert torch.equal(bits(target.train().conv.weight), bits(base))


def test_a_load_that_fails_leaves_a_merged_layer_merged(device: str) -> None:
    layer = trained(Conv2d(4, 6, 3, r=2, device=device))
    base = layer.conv.weight.detach().clone()
    merged = layer.eval().conv.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"conv\.weight"):
        layer.load_state_dict({"conv.weight": torch.zeros(1), "conv.bias": torch.zeros(6)})
    assert layer.merged and torch.equal(layer.conv.weight, merged)
    assert torch.equal(bits(layer.train().conv.weight), bits(base))


@pytest.mark.parametrize("keep_vars", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_holds_the_base_in_either_mode(nested: bool, keep_vars: bool, device: str) -> None:
    layer = trained(Conv2d(4, 6, 3, r=2, device=device))
    owner = nn.Sequential(nn.ReLU(), layer) if nested else layer
    before = {name: t.detach().clone() for name, t in owner.state_dict().items()}
    after = owner.eval().state_dict(keep_vars=keep_vars)
    assert layer.merged and list(after) == list(before)
    for name, tensor in after.items():
        assert torch.equal(bits(tensor), bits(before[name])), name
        assert isinstance(tensor, nn.Parameter) == keep_vars, name
    restored = trained(Conv2d(4, 6, 3, r=2, device=device)).eval()
    restored.load_state_dict({name.removeprefix("1."): tensor for name, tensor in after.items()})
    assert torch.equal(restored.conv.weight, layer.conv.weight), "saving merged and loading merged merges once"


def test_a_convolution_that_shares_the_weight_never_sees_the_adapter(device: str) -> None:
    layer, other = trained(Conv2d(4, 6, 3, r=2, device=device)), nn.Conv2d(4, 6, 3, device=device)
    other.weight = layer.conv.weight
    base = other.weight.detach().clone()
    layer.eval()
    assert torch.equal(other.weight, base)
    assert layer.train().conv.weight is other.weight


CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("last_x", [False, True], ids=["first-x", "last-x"])
@pytest.mark.parametrize("last_weight", [False, True], ids=["first-weight", "last-weight"])
@parametrize_case([BY_NAME["2d"], BY_NAME["2d-non-square-same-groups"], BY_NAME["3d-non-cubic"]])
def test_channels_last_weights_and_inputs(
    case: Case, last_weight: bool, last_x: bool, dropout: float, device: str
) -> None:
    layer = case.build(lora_dropout=dropout, device=device)
    x = draw(case.x_shape, 5, torch.float32, device)
    if last_weight:
        layer.to(memory_format=CHANNELS_LAST[case.dims])
    if last_x:
        x = x.to(memory_format=CHANNELS_LAST[case.dims])
    base, strides = layer.conv.weight.detach().clone(), layer.conv.weight.stride()
    layer.weight.requires_grad = True
    keep = torchs_mask(x, 8) if dropout > 0 else None
    torch.manual_seed(8)
    assert_follows_the_definition(case, layer, x, keep)
    layer.weight.requires_grad = False
    assert_follows_the_definition(case, layer.eval(), x, frozen=True)
    layer.train()
    assert torch.equal(bits(layer.conv.weight), bits(base)) and layer.conv.weight.stride() == strides


@pytest.mark.parametrize("last_x", [False, True], ids=["first-x", "last-x"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_channels_last_layer_stays_channels_last_as_loralibs(mode: bool, last_x: bool, device: str) -> None:
    x = draw((2, 4, 6, 5), 5, torch.float32, device)
    if last_x:
        x = x.to(memory_format=torch.channels_last)
    strides = []
    for module in (fused_lora, loralib):
        layer = trained(module.Conv2d(4, 6, 3, r=2, device=device)).to(memory_format=torch.channels_last)
        layer.train(mode)
        with torch.no_grad():
            strides.append({"y": layer(x).stride(), "weight": layer.conv.weight.stride()})
    assert strides[0] == strides[1]


def test_changing_the_memory_format_while_merged_changes_the_bases(device: str) -> None:
    layer = trained(Conv2d(4, 6, 3, r=2, device=device))
    base = layer.conv.weight.detach().clone()
    layer.eval().to(memory_format=torch.channels_last).train()
    assert layer.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.conv.weight, base)


# ---- checkpoints ----


def checkpoint(layout: str, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the published loralib layouts hold, and the entries they stand for. "main" holds one tensor twice."""
    source = trained(loralib.Conv2d(4, 6, 3, r=2, device=device))
    wheel = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    assert list(wheel) == ["lora_A", "lora_B", "conv.weight", "conv.bias"]
    plain = {"weight": wheel["conv.weight"], "bias": wheel["conv.bias"]}
    if layout == "plain":
        return plain, {f"conv.{name}": tensor for name, tensor in plain.items()}
    return (wheel if layout == "0.1.2" else {**plain, **wheel}), wheel


@pytest.mark.parametrize("merged", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
@pytest.mark.parametrize("layout", ["0.1.2", "main", "plain"])
def test_published_checkpoints_load_strictly_and_are_left_as_they_are(
    layout: str, nested: bool, merged: bool, device: str
) -> None:
    given, expected = checkpoint(layout, device)
    layer = trained(Conv2d(4, 6, 3, r=2, device=device))
    adapter = {name: layer.state_dict()[name].clone() for name in ("lora_A", "lora_B")}
    prefix = "blocks.1." if nested else ""
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.ReLU(), layer)}) if nested else layer
    model.train(not merged)
    given = {prefix + name: tensor for name, tensor in given.items()}
    before = {name: (tensor, tensor.clone()) for name, tensor in given.items()}
    report = model.load_state_dict(given, strict=True)
    assert not report.missing_keys and not report.unexpected_keys
    for name, tensor in {**adapter, **expected}.items():
        assert torch.equal(layer.state_dict()[name], tensor), name
    model.train()
    assert torch.equal(layer.conv.weight, expected["conv.weight"])
    assert list(given) == list(before)
    assert all(given[name] is tensor and torch.equal(tensor, kept) for name, (tensor, kept) in before.items())


@pytest.mark.parametrize("dims", [1, 3])
def test_plain_checkpoints_of_other_dimensions_load_strictly(dims: int) -> None:
    plain, layer = PLAIN[dims](4, 6, 3, bias=False), CONVS[dims](4, 6, 3, r=2, bias=False)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.conv.weight, plain.weight)


def test_a_plain_checkpoint_loads_into_a_layer_of_rank_0() -> None:
    plain, layer = nn.Conv2d(4, 6, 3), Conv2d(4, 6, 3)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.conv.weight, plain.weight) and torch.equal(layer.conv.bias, plain.bias)


def test_a_checkpoint_of_loralibs_main_loads_from_a_file() -> None:
    given, expected = checkpoint("main", "cpu")
    file = io.BytesIO()
    torch.save(given, file)
    file.seek(0)
    layer = Conv2d(4, 6, 3, r=2)
    layer.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in expected.items())


def aliased(tensor: Tensor) -> dict[str, Tensor]:
    """One tensor under both names, as a state_dict() of loralib's main gives it: two views of one storage."""
    adapter = {"lora_A": torch.zeros(6, 12), "lora_B": torch.zeros(18, 6)}
    bias = torch.zeros(6, device=tensor.device)
    return {
        "weight": tensor.detach(),
        "bias": bias.detach(),
        **adapter,
        "conv.weight": tensor.detach(),
        "conv.bias": bias.detach(),
    }


def test_one_tensor_under_both_names_loads_though_it_holds_nan() -> None:
    """A diverged model's checkpoint: NaN is not equal to itself, yet the tensors do not differ."""
    layer = Conv2d(4, 6, 3, r=2)
    layer.load_state_dict(aliased(torch.full((6, 4, 3, 3), float("nan"))))
    assert layer.conv.weight.isnan().all()


def test_one_meta_tensor_under_both_names_can_be_assigned() -> None:
    layer = Conv2d(4, 6, 3, r=2)
    layer.load_state_dict(aliased(torch.empty(6, 4, 3, 3, device="meta")), assign=True)
    assert layer.conv.weight.is_meta


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_that_differs_from_the_convolutions_is_an_error(name: str, nested: bool, strict: bool) -> None:
    given, _ = checkpoint("main", "cpu")
    given[name] = given[name] + 1
    layer = Conv2d(4, 6, 3, r=2)
    model, prefix = (nn.Sequential(layer), "0.") if nested else (layer, "")
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict({prefix + key: tensor for key, tensor in given.items()}, strict=strict)
    assert f"{prefix}{name} and {prefix}conv.{name} differ" in str(raised.value)


def test_only_the_adapter_may_be_missing_and_only_from_a_checkpoint_without_one() -> None:
    plain = nn.Conv2d(4, 6, 3).state_dict()
    for given, words in [
        ({"wieght": plain["weight"], "bias": plain["bias"]}, ["wieght", "conv.weight", "lora_A"]),
        ({"weight": plain["weight"]}, ["conv.bias"]),
        ({**plain, "lora_A": torch.zeros(6, 12)}, ["lora_B"]),
        ({**plain, "scale": torch.zeros(1)}, ["scale"]),
    ]:
        with pytest.raises(RuntimeError) as raised:
            Conv2d(4, 6, 3, r=2).load_state_dict(given)
        assert all(f'"{word}"' in str(raised.value) for word in words), given.keys()


def test_a_neighbours_missing_key_is_still_reported() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Conv2d(4, 6, 3, r=2), nn.Linear(2, 2))
    given = {f"1.{name}": tensor for name, tensor in nn.Conv2d(4, 6, 3).state_dict().items()}
    report = model.load_state_dict(given, strict=False)
    assert report.missing_keys == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_ours_loads_into_loralibs(mode: bool, device: str) -> None:
    ours = trained(Conv2d(4, 6, 3, r=2, lora_alpha=3, device=device)).train(mode)
    theirs = loralib.Conv2d(4, 6, 3, r=2, lora_alpha=3, device=device)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.train()
    oracle = copy.deepcopy(theirs).double()
    x = draw((2, 4, 6, 5), 5, torch.float32, device)
    mine, other, exact = step(ours, x), step(theirs, x), step(oracle, x.double())
    for name, value in mine.items():
        assert_as_accurate_as(value, other[name], exact[name], name)


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


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pickles_deepcopies_and_saves(dims: int, mode: bool) -> None:
    layer = trained(CONVS[dims](4, 6, 2, r=2)).train(mode)
    x = draw((2, 4, *SIZES[dims]), 5, torch.float32, "cpu")
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), torch.load(buffer, weights_only=False))
    with torch.no_grad():
        expected = layer(x)
        base = bits(layer.train().conv.weight)
        for copied in copies:
            assert copied.merged != mode and torch.equal(copied(x), expected)
            for name, tensor in copied.state_dict().items():
                assert torch.equal(tensor, layer.state_dict()[name]), name
            assert torch.equal(bits(copied.train().conv.weight), base)
            copied.conv.weight.zero_()
        assert torch.equal(bits(layer.conv.weight), base)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_meta_device_then_to_empty_then_reset_parameters(dims: int) -> None:
    layers = []
    for device in ("meta", "cpu"):
        layer = CONVS[dims](4, 6, 2, r=2, device=device).to_empty(device="cpu")
        torch.manual_seed(1)
        layer.reset_parameters()
        layers.append(layer)
    for mine, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(mine, other)


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
