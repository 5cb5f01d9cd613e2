"""Convolutions to test, the mathematics that they are held to, and the settings that both files of tests run under."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate_as
from torch import Tensor, nn
from torch.nn import functional as F

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


def torchs_mask(x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return F.dropout(torch.ones_like(x), 0.5) != 0
