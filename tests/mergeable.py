"""What the tests of merging share: a layer of every class, torch's own in its place, inputs, and comparisons."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora import Conv1d, Conv2d, Conv3d, Embedding, Linear, MergedLinear

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


def build(name: str, device: str, **options: Any) -> Any:
    """A layer of LAYERS whose adapter weighs as much as its base."""
    cls, sizes, its_own = LAYERS[name]
    layer = cls(*sizes, **{"r": R, "lora_alpha": ALPHA, "device": device} | its_own | options)
    redraw_adapter(layer)
    return layer


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


def complaint(call: Callable[[], object]) -> str:
    """What the error says that call raises; empty without one."""
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


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


def torch_saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
