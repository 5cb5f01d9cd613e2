"""What was done before for tensors of the same kind, done again without deciding anything anew.

Most of the host's time in a forward or a backward goes into finding out what to launch, which follows from dtypes,
shapes, strides, alignments and a few numbers. The second time that the same of them come, it is written down what is
allocated, launched, multiplied or converted by torch and given back, in this order; from then on that is done for
other tensors. A call in which anything else happens, another operation of torch's or a launch in memory of unknown
origin, is never repeated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .flags import flags_for
from .launch import Described, Plan, Pointer, recording_by
from .lookup import instrumentation, tiles_in_force, watched
from .spans import begins, overlap, span

Results = tuple[Tensor | None, ...]

# What of torch's is repeated, and how it is called, which takes less time by its public name.
_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.mm.dtype: torch.ops.aten.mm.dtype,
    torch.ops.aten.addmm.default: torch.addmm,
    torch.ops.aten.addmm_.default: Tensor.addmm_,
    torch.ops.aten.zero_.default: Tensor.zero_,
    torch.ops.aten.copy_.default: Tensor.copy_,
    torch.ops.aten.embedding_dense_backward.default: torch.ops.aten.embedding_dense_backward.default,
    torch.ops.aten._to_copy.default: torch.ops.aten._to_copy.default,
    torch.ops.aten.to.dtype: Tensor.to,
}
# Inductor's way to an empty tensor on the current device, which takes half of the time of torch's own.
_EMPTY = {
    "cuda": torch._C._dynamo.guards._empty_strided_cuda,  # type: ignore[attr-defined]
    "cpu": torch._C._dynamo.guards._empty_strided_cpu,  # type: ignore[attr-defined]
}
_MOST_PROGRAMS, _MOST_READY = 1024, 4096
_ONCE, _NEVER = "seen once", "not to be repeated"
_programs: OrderedDict[Hashable, Program | str] = OrderedDict()
# By launch, stream and addresses what Triton's launcher takes; None where they came once.
_ready: OrderedDict[Hashable, tuple[Any, ...] | None] = OrderedDict()


@dataclass(frozen=True, slots=True)
class _Address:
    """So many bytes past a value's; values are the given tensors, and then what is allocated, one after another."""

    value: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Allocation:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Flags:
    """Words for a launch whose programs wait for one another: a value as well."""

    count: int


@dataclass(frozen=True, slots=True)
class _Release:
    value: int


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """A plan, addresses among its arguments, and by place there which of them, and of what shapes and strides.

    Without a shape and strides it is a pointer, else a descriptor.
    """

    plan: Plan
    addresses: tuple[_Address, ...]
    places: tuple[tuple[int, tuple[int, ...] | None, tuple[int, ...]], ...]

    def arguments(self, pointers: Sequence[int]) -> list[Any]:
        arguments = self.plan.values.copy()
        for pointer, (place, shape, strides) in zip(pointers, self.places, strict=True):
            arguments[place] = pointer if shape is None else Described(Pointer(pointer), shape, strides)
        return arguments

    def run(self, values: Sequence[int], stream: int) -> None:
        """With the values' addresses, on the stream, which is the current one."""
        plan = self.plan
        pointers = [values[at.value] + at.offset for at in self.addresses]
        key = (self, stream, *pointers)
        ready = _ready.get(key)
        if ready is not None and plan.launch_ready is not None:
            plan.launch_ready(*ready)
            return
        arguments = self.arguments(pointers)
        plan.launch_with(arguments)
        if plan.launch_ready is not None:
            # Addresses that come once are not worth being made ready.
            _ready[key] = plan.ready(arguments) if key in _ready else None
            if len(_ready) > _MOST_READY:
                _ready.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _View:
    """A value, or a view of it."""

    value: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # in elements
    whole: bool

    def of(self, values: Sequence[Tensor | None]) -> Tensor:
        value = values[self.value]
        assert value is not None
        if self.whole:
            return value
        return value.as_strided(self.shape, self.stride, value.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class _Operation:
    """One of torch's, of views and constants; a value where it does not work in place."""

    function: Callable[..., Tensor]
    operands: tuple[Any, ...]
    options: dict[str, Any]
    in_place: bool

    def of(self, values: Sequence[Tensor | None]) -> Tensor:
        operands = [each.of(values) if isinstance(each, _View) else each for each in self.operands]
        return self.function(*operands, **self.options)


_Event = _Allocation | _Flags | _Release | _Launch | _Operation


@dataclass(frozen=True, slots=True)
class Program:
    events: tuple[_Event, ...]
    outputs: tuple[_View | None, ...]

    def __call__(self, given: Sequence[Tensor | None]) -> Results:
        """The outputs for these tensors, on their stream; the first of them is none that is not there."""
        like, values = given[0], list(given)
        assert like is not None
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in given]
        empty = _EMPTY[like.device.type]
        stream = torch._C._cuda_getCurrentRawStream(like.get_device()) if like.is_cuda else 0
        for event in self.events:
            if isinstance(event, _Launch):
                event.run(pointers, stream)
            elif isinstance(event, _Release):
                values[event.value] = None
            else:
                if isinstance(event, _Operation):
                    made = event.of(values)
                    if event.in_place:
                        continue
                elif isinstance(event, _Allocation):
                    made = empty(event.shape, event.stride, event.dtype)
                else:
                    made = flags_for(like, event.count)
                values.append(made)
                pointers.append(made.data_ptr())
        return tuple(None if output is None else output.of(values) for output in self.outputs)


Keep = Callable[[Program], object]


@dataclass(frozen=True, slots=True)
class _Live:
    """Memory that was allocated while recording, for as long as it is not given back."""

    storage: StorageWeakRef
    storage_pointer: int
    pointer: int
    kind: tuple[torch.dtype, torch.Size, tuple[int, ...]]


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.dtype, tensor.shape, tensor.stride()


class Recording(TorchDispatchMode):
    """Writes down what happens in its block for the given tensors, and whether that can be repeated."""

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.given = given
        self.events: list[_Event] = []
        self.live: dict[int, _Live] = {}
        self.values = len(given)
        # Of two that share memory, what is read could be either's or a part of either.
        self.repeatable = not overlap(given)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._note_releases()
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default:
            self._own(made)
            self.events.append(_Allocation(tuple(made.shape), made.stride(), made.dtype))
        elif func in _FUNCTIONS:
            self._note_operation(func, args, kwargs or {}, made)
        elif not func.is_view:
            self.repeatable = False
        return made

    def _note_operation(self, func: Any, args: tuple[Any, ...], options: Mapping[str, Any], made: Tensor) -> None:
        operands = [self._view(each) if isinstance(each, Tensor) else each for each in args]
        if any(view is None and isinstance(each, Tensor) for view, each in zip(operands, args, strict=True)):
            self.repeatable = False
        in_place = made is args[0]
        self.events.append(_Operation(_FUNCTIONS[func], tuple(operands), dict(options), in_place))
        if not in_place:
            self._own(made)

    def _own(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.live[self.values] = _Live(StorageWeakRef(storage), storage.data_ptr(), tensor.data_ptr(), _kind(tensor))
        self.values += 1

    def _note_releases(self) -> None:
        for value in [value for value, live in self.live.items() if live.storage.expired()]:
            del self.live[value]
            self.events.append(_Release(value))

    def took_flags(self, words: Tensor, count: int) -> None:
        # They are never given back, so that nothing else has their address.
        self.live[self.values] = _Live(StorageWeakRef(words.untyped_storage()), -1, words.data_ptr(), _kind(words))
        self.values += 1
        self.events.append(_Flags(count))

    def _address(self, tensor: Tensor) -> _Address | None:
        pointer, storage_pointer = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
        if pointer == 0:
            return None
        # The newest first, since two launches on one stream count in the same words, each in as many as it asked for.
        for value, live in reversed(self.live.items()):
            if live.storage_pointer == storage_pointer or live.pointer == pointer:
                return _Address(value, pointer - live.pointer)
        end = span(tensor)[1]
        for value, given in enumerate(self.given):
            if given is not None:
                first, last = span(given)
                # Between the elements of one with gaps lies what is not its own.
                whole = given.is_contiguous() or (pointer == first and begins(tensor, given))
                if first <= pointer and end <= last and whole:
                    return _Address(value, pointer - first)
        return None

    def _view(self, tensor: Tensor) -> _View | None:
        at = self._address(tensor)
        if at is None:
            return None
        given = self.given[at.value] if at.value < len(self.given) else None
        kind = self.live[at.value].kind if given is None else _kind(given)
        if tensor.dtype != kind[0]:
            return None
        whole = at.offset == 0 and kind == _kind(tensor)
        return _View(at.value, tuple(tensor.shape), tensor.stride(), at.offset // tensor.element_size(), whole)

    def launched(self, plan: Plan, tensors: Sequence[Tensor | None], described: Sequence[Tensor]) -> None:
        """Called for each launch with what its plan takes, in its order."""
        self._note_releases()
        addresses = [None if tensor is None else self._address(tensor) for tensor in (*tensors, *described)]
        if any(a is None and t is not None for a, t in zip(addresses, (*tensors, *described), strict=True)):
            self.repeatable = False
            return
        of_descriptors = plan.places[len(tensors) :]
        kinds = [None] * len(tensors) + [(tuple(t.shape), t.stride()) for t in described]
        there = [
            (at, (place, None, ()) if kind is None else (place, *kind))
            for at, place, kind in zip(addresses, plan.places, kinds, strict=True)
            if at is not None and (kind is not None or place not in of_descriptors)
        ]
        self.events.append(_Launch(plan, tuple(at for at, _ in there), tuple(place for _, place in there)))

    def program(self, results: Results) -> Program | None:
        """What repeats it; None if that cannot be."""
        outputs = [None if result is None else self._view(result) for result in results]
        if not self.repeatable or any(o is None and r is not None for o, r in zip(outputs, results, strict=True)):
            return None
        return Program(tuple(self.events), tuple(outputs))


def replayed(
    given: Sequence[Tensor | None],
    facts: tuple[Hashable, ...],
    call: Callable[[], Results],
    keep: Keep | None = None,
) -> Results:
    """call's results, from a recording if it was called twice before for tensors of the same kind and the same facts.

    given: all tensors that call reads, the first of them on the GPU that is current. facts: whatever else determines
    what call does, but for tables of tiles, which a `use_tiles` changes, and torch's matmul precision for float32.
    keep: is given the recording that is used, which holds for tensors of the same `kinds_of` while `repeats` does.
    """
    if not repeats(given[0]):
        return call()
    key = (facts, *kinds_of(given))
    program = _programs.get(key)
    if isinstance(program, Program):
        if keep is not None:
            keep(program)
        return program(given)
    if program is None:
        # Numbers of rows that come once are not worth a recording.
        _keep(key, _ONCE)
    if program != _ONCE:
        return call()
    recording = Recording(given)
    with recording_by(recording), recording:
        results = call()
    _keep(key, recording.program(results) or _NEVER)
    return results


def kinds_of(given: Sequence[Tensor | None]) -> tuple[Hashable, ...]:
    """What of the tensors determines, with the facts, what is done for them; and how Triton instruments."""
    kinds: list[Hashable] = [
        None if t is None else (t.dtype, t.shape, t.stride(), t.get_device(), t.data_ptr() % 16) for t in given
    ]
    return (instrumentation(), *kinds)


def repeats(like: Tensor | None) -> bool:
    """Whether calls are repeated now for such a tensor."""
    return like is not None and like.is_cuda and like.dtype.itemsize == 2 and not watched() and not tiles_in_force()


def _keep(key: Hashable, what: Program | str) -> None:
    _programs[key] = what
    if len(_programs) > _MOST_PROGRAMS:
        _programs.popitem(last=False)
