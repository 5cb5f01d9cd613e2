"""The table of compiled kernels: when one is launched again, and with what; the compiler here compiles nothing."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from fused_lora.kernels import launch as module
from fused_lora.kernels.launch import launch

NAMES = ["x_ptr", "stride_x", "out_ptr", "seed_ptr", "SIZE"]


class Compiled:
    """A kernel for one set of facts, which notes what it is launched with."""

    def __init__(self) -> None:
        self.src = SimpleNamespace(fn=SimpleNamespace(arg_names=NAMES))
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.launched.append((grid, *values))


class Kernel:
    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(**arguments: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return compile_and_launch

    def launch(self, x: Tensor, out: Tensor, seed: Tensor | None = None, *facts: Any, **descriptors: Any) -> None:
        tensors = {"out_ptr": out, "x_ptr": x, "seed_ptr": seed}
        launch(self, tensors, facts, lambda: ((3,), {"stride_x": x.stride(0), "SIZE": 4}), descriptors or None)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(module, "CompiledKernel", Compiled)
    monkeypatch.setattr(module, "_plans", OrderedDict())
    return Kernel()


def test_a_kernel_is_launched_again_with_the_new_tensors_where_their_names_are(kernel: Kernel) -> None:
    kernel.launch(torch.zeros(4), torch.zeros(4))
    x, out = torch.ones(4), torch.ones(4)
    kernel.launch(x, out)
    (compiled,) = kernel.compiled
    ((grid, *values),) = compiled.launched
    assert grid == (3, 1, 1)
    assert values[0] is x and values[2] is out and values[1:2] + values[3:] == [1, None, 4]


def test_one_tensor_under_two_names_is_two_arguments(kernel: Kernel) -> None:
    x, out = torch.ones(4), torch.ones(4)
    kernel.launch(x, x)
    kernel.launch(x, out)
    assert len(kernel.compiled) == 1 and kernel.compiled[0].launched[0][3] is out


def test_a_descriptor_takes_its_tensors_place(kernel: Kernel) -> None:
    for described in ("first", "second"):
        kernel.launch(torch.zeros(4), torch.zeros(4), x_ptr=described)
    assert kernel.compiled[0].launched[0][1] == "second"


OTHERS = {
    "dtype": lambda x: x.half(),
    "shape": lambda x: x[:3],
    "strides": lambda x: x.repeat(2)[::2],
    "alignment": lambda x: x.repeat(2)[1:5],
}


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_compilation_depends_on_is_told_apart(kernel: Kernel, other: str) -> None:
    x = torch.ones(4)
    kernel.launch(x, x)
    kernel.launch(OTHERS[other](x), x)
    kernel.launch(x, OTHERS[other](x))
    assert len(kernel.compiled) == 3


def test_facts_and_missing_tensors_and_kernels_are_told_apart(kernel: Kernel) -> None:
    x, other = torch.ones(4), Kernel()
    for arguments in ((None,), (x,), (None, 0.5), (None, 0.25), (None, 0.5, True)):
        kernel.launch(x, x, *arguments)
    other.launch(x, x)
    assert len(kernel.compiled) == 5 and len(other.compiled) == 1
    assert not any(compiled.launched for compiled in kernel.compiled)


def test_the_table_is_bounded_and_forgets_the_oldest(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_PLANS", 2)
    x = torch.ones(4)
    for fact in (1, 2, 3, 3, 2, 1):
        kernel.launch(x, x, None, fact)
    assert len(module._plans) == 2 and len(kernel.compiled) == 4
