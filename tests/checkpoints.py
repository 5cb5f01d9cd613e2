"""What the tests of state dicts and of adapter files share: entries, their comparison and faults to put in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

R, ALPHA, TFT = 2, 6.0, [True, False, True]
BIASES = ["none", "all", "lora_only"]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def filled(module: nn.Module, device: str, seed: int = 1) -> Any:
    """The module with entries of the seed that are the same for every class, all of them nonzero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.to(device)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def assert_same_entries(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(bits(tensor), bits(expected[key])), key


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[new] = state.pop(old)

    return change


def drop(*keys: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        for key in keys:
            del state[key]

    return change


def add(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[key] = tensor

    return change
