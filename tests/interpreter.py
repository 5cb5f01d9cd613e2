"""Triton's interpreter, mended for bfloat16 and watched for bad addresses.

As of triton 3.6 to 3.9 it multiplies bfloat16's bit patterns as if they were integers in tl.dot, and truncates where
float32 is rounded to bfloat16. `mend` gives both the semantics of the hardware: products of upcast operands, and
rounding to nearest even. The kernels do all other arithmetic in float32, so nothing else needs mending.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def mend() -> None:
    builder = interpreter.InterpreterBuilder
    original_cast, original_dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        if source == tl.bfloat16:
            wide = interpreter.TensorHandle(widen(src.data), tl.float32)
            return wide if target == tl.float32 else original_cast(self, wide, dst_type)
        if target == tl.bfloat16:
            return interpreter.TensorHandle(narrow(src.data), tl.bfloat16)
        return original_cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(widen(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 else h for h in (a, b)
        )
        return original_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    # tl.device_assert is silent without it; there it is a launch option.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)


class _Watch:
    """Stands in for the interpreter's C++ half and checks every address that an unmasked lane touches."""

    def __init__(self, inner: Any, counts: Counter[str], stores: Counter[int]) -> None:
        self.inner, self.counts, self.stores = inner, counts, stores
        self.ranges: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def check(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        addresses = np.broadcast_to(pointers, mask.shape)[mask].astype(np.uint64)
        inside = np.zeros(addresses.shape, dtype=bool)
        for low, high in self.ranges:
            inside |= (addresses >= low) & (addresses + size <= high)
        assert inside.all(), f"{(~inside).sum()} of {inside.size} addresses lie outside every argument tensor"
        return addresses

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.counts["loads"] += self.check(pointers, mask, np.dtype(dtype).itemsize).size
        return self.inner.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        addresses = self.check(pointers, mask, value.dtype.itemsize)
        self.counts["stores"] += addresses.size
        self.stores.update(addresses.tolist())
        return self.inner.store(pointers, value, mask)


@contextmanager
def checked_addresses() -> Iterator[Counter[str]]:
    """Within the block, every launch touches only its own tensors' storage and writes no address twice."""
    counts: Counter[str] = Counter()
    original_module, original_run = interpreter._interpreter, interpreter.GridExecutor.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        stores: Counter[int] = Counter()
        watch = _Watch(original_module, counts, stores)
        for argument in (*args, *kwargs.values()):
            argument = getattr(argument, "base", argument)  # of a tensor descriptor
            if isinstance(argument, torch.Tensor) and argument.numel() > 0:
                storage = argument.untyped_storage()
                watch.ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        interpreter._interpreter = watch
        try:
            result = original_run(self, *args, **kwargs)
        finally:
            interpreter._interpreter = original_module
        twice = [address for address, times in stores.items() if times > 1]
        assert not twice, f"{len(twice)} addresses were written more than once in one launch"
        counts["launches"] += 1
        return result

    interpreter.GridExecutor.__call__ = run
    try:
        yield counts
    finally:
        interpreter.GridExecutor.__call__ = original_run


class _Record:
    """Stands in for the interpreter's C++ half and writes down where every load and atomic operation begins."""

    def __init__(self, inner: Any, programs: list[list[tuple[str, int]]]) -> None:
        self.inner, self.programs = inner, programs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        if mask.any():
            self.programs[-1].append(("load", int(np.broadcast_to(pointers, mask.shape)[mask].min())))
        return self.inner.load(pointers, mask, other, dtype)

    def atomic_rmw(self, operation: Any, pointer: Any, value: Any, mask: Any, sem: Any) -> Any:
        self.programs[-1].append(("atomic", int(pointer.min())))
        return self.inner.atomic_rmw(operation, pointer, value, mask, sem)


@contextmanager
def recorded_accesses() -> Iterator[list[list[tuple[str, int]]]]:
    """What each program of the launches within the block loads and counts in, by its lowest address, in its order."""
    programs: list[list[tuple[str, int]]] = []
    original_module, builder = interpreter._interpreter, interpreter.InterpreterBuilder
    original_set = builder.set_grid_idx

    def set_grid_idx(self: Any, *index: int) -> None:
        programs.append([])
        original_set(self, *index)

    interpreter._interpreter = _Record(original_module, programs)
    builder.set_grid_idx = set_grid_idx
    try:
        yield programs
    finally:
        interpreter._interpreter, builder.set_grid_idx = original_module, original_set
