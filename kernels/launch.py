"""What every launcher needs: a short way to a launch, the arguments of a mask, a kernel's stated work, and so on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

_MOST_PLANS = 4096
_plans: OrderedDict[Hashable, _Plan] = OrderedDict()


class _Plan:
    """A compiled kernel, its grid, and its arguments, into which each launch puts its tensors."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], named: dict[str, Any], tensors: Iterable[str]) -> None:
        self.run = compiled[(*grid, 1, 1)[:3]]
        names = compiled.src.fn.arg_names
        self.places = [names.index(name) for name in tensors]
        self.values = [None if name in tensors else named[name] for name in names]

    def launch(self, tensors: Iterable[Any]) -> None:
        values = self.values.copy()
        for place, tensor in zip(self.places, tensors, strict=True):
            values[place] = tensor
        self.run(*values)


def launch(
    kernel: Any,
    tensors: dict[str, Tensor | None],
    facts: tuple[Hashable, ...],
    arguments: Callable[[], tuple[tuple[int, ...], dict[str, Any]]],
    descriptors: dict[str, Any] | None = None,
) -> None:
    """kernel[grid](**tensors, **others), where `arguments` returns grid and others.

    Triton spends most of a launch's host time on finding the compiled kernel from the arguments. Here it is found from
    what determines them: every tensor's dtype, shape, strides, device and alignment, and the facts, any other values.
    `arguments` is called only the first time.

    tensors: by the kernel's names for them. descriptors: of some of them, which the kernel takes in their place.
    """
    # A plan keeps its kernel, whose id is therefore given to no other.
    key = (
        id(kernel),
        facts,
        *[
            None if t is None else (t.dtype, t.shape, t.stride(), t.get_device(), t.data_ptr() % 16)
            for t in tensors.values()
        ],
    )
    given: dict[str, Any] = tensors if descriptors is None else tensors | descriptors
    plan = _plans.get(key)
    if plan is not None:
        plan.launch(given.values())
        return
    grid, others = arguments()
    compiled = kernel[grid](**given, **others)
    # The interpreter returns nothing.
    if isinstance(compiled, CompiledKernel):
        _plans[key] = _Plan(compiled, grid, others, given)
        if len(_plans) > _MOST_PLANS:
            _plans.popitem(last=False)


class Dropout(Protocol):
    """Which elements are kept; 1 - threshold / 65536 of them."""

    @property
    def seed(self) -> Tensor: ...
    @property
    def threshold(self) -> int: ...
    @property
    def row_offset(self) -> int: ...
    @property
    def column_offset(self) -> int: ...
    @property
    def keep_probability(self) -> float: ...


def dropout_facts(dropout: Dropout | None) -> tuple[int, ...]:
    """What `launch` must know of a dropout beside its seed."""
    return () if dropout is None else (dropout.threshold, dropout.row_offset, dropout.column_offset)


def dropout_arguments(dropout: Dropout | None) -> dict[str, Any]:
    """The keyword arguments by which a kernel that draws takes its dropout, beside the seed."""
    if dropout is None:
        return {"threshold": 0, "row_offset": 0, "column_offset": 0, "ALIGNED": True}
    return {
        "threshold": dropout.threshold,
        "row_offset": dropout.row_offset,
        "column_offset": dropout.column_offset,
        "ALIGNED": dropout.column_offset % 8 == 0,
    }


def strides(names: str, tensor: Tensor | None) -> dict[str, int]:
    """The keyword arguments stride_<name> of a tensor's dimensions, one after another; zeros for None."""
    each = names.split()
    return {f"stride_{name}": 0 if tensor is None else tensor.stride(d) for d, name in enumerate(each)}


def cdiv(size: int, block: int) -> int:
    """How many blocks cover size. triton.cdiv works in kernels too, and takes ten times as long for it on the host."""
    return -(-size // block)


def input_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 follows torch's matmul precision, since tl.dot would take tf32 by itself."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def stated_work(name: str, flops: float, *tensors: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """A kernel's launch_metadata, in the keys that Triton's Proton reads: each tensor is moved once."""
    moved = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return {"name": name, f"flops{8 * dtype.itemsize}": flops, "bytes": moved}
