"""What every launcher needs: a short way to a launch, the arguments of a mask, a kernel's stated work, and so on."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from types import CellType, FunctionType, MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .lookup import instrumentation, watched

# What the addresses of rows are multiples of for the GPU's copy engine.
COPIED_BYTES = 16
_MOST_PLANS = 4096
_plans: OrderedDict[Hashable, Plan] = OrderedDict()


class Plan:
    """A compiled kernel, its grid, and its arguments, into which each launch puts its tensors and their descriptors."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], others: dict[str, Any], given: list[str]) -> None:
        self.compiled, self.run = compiled, compiled.run
        self.grid = (*grid, 1, 1)[:3]
        self.stream_of = driver.active.get_current_stream
        self.device = driver.active.get_current_device()
        # What the launcher takes before the arguments; it calls no hooks that are None, nor asks for their metadata.
        self.unwatched = compiled.function, compiled.packed_metadata, None, None, None
        # None where this Triton's launcher is another, or allocates memory for each launch.
        self.launch_ready = _launcher_of(compiled.run)
        names = compiled.src.fn.arg_names
        # Of two values for one name, the later one is taken.
        self.places = [names.index(name) for name in given]
        self.values = [others.get(name) for name in names]

    def _arguments(self, given: Iterable[Any]) -> list[Any]:
        values = self.values.copy()
        for place, value in zip(self.places, given, strict=True):
            values[place] = value
        return values

    def launch(self, given: Iterable[Any]) -> None:
        """As Triton would while nobody watches; tensors are given as their addresses, which it need not look up."""
        self.launch_with(self._arguments(given))

    def launch_with(self, arguments: list[Any]) -> None:
        """The same with all arguments."""
        self.run(*self.grid, self.stream_of(self.device), *self.unwatched, *arguments)

    def ready(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """What Triton gives its launcher in C for all arguments on the current stream; for `launch_ready`.

        Descriptors in it are encoded, which takes the host longer than the launch, and hold for their addresses.
        """
        given: list[tuple[Any, ...]] = []
        spying = copy(self.run)
        spying.launch = _with_launcher(self.run.launch, lambda *final: given.append(final))
        spying(*self.grid, self.stream_of(self.device), *self.unwatched, *arguments)
        return given[0]

    def launch_watched(self, given: Iterable[Any]) -> None:
        self.compiled[self.grid](*self._arguments(given))


def _launcher_of(run: Any) -> Callable[..., None] | None:
    """The launcher in C below Triton's expansion of descriptors; None where there is none to be found."""
    launch = getattr(run, "launch", None)
    # The last is Triton's sanitizer, which counts launches.
    if launch is None or run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return None
    if not isinstance(launch, FunctionType):
        return launch  # type: ignore[no-any-return]
    cells = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
    return cells["launcher"].cell_contents if "launcher" in cells else None


def _with_launcher(launch: Any, launcher: Callable[..., None]) -> Callable[..., None]:
    """The same expansion of descriptors above another launcher."""
    if not isinstance(launch, FunctionType):
        return launcher
    names, cells = launch.__code__.co_freevars, launch.__closure__ or ()
    others = (CellType(launcher) if name == "launcher" else cell for name, cell in zip(names, cells, strict=True))
    return FunctionType(launch.__code__, launch.__globals__, launch.__name__, launch.__defaults__, tuple(others))


class Recorder(Protocol):
    """Is told of every launch, and of words that a launch counts in, on the thread that it is set for.

    repeatable: becomes false at a launch that it is not told of, by anybody else's plan than `launch` has kept.
    """

    repeatable: bool

    def launched(self, plan: Plan, tensors: Sequence[Tensor | None], described: Sequence[Tensor]) -> None: ...
    def took_flags(self, words: Tensor, count: int) -> None: ...


class _Thread(threading.local):
    """recorder: of this thread's launches. has_context: whether a CUDA context was made current on it."""

    recorder: Recorder | None = None
    has_context = False


thread = _Thread()


@contextmanager
def recording_by(recorder: Recorder) -> Iterator[None]:
    """Within the block the recorder is told of this thread's launches."""
    previous, thread.recorder = thread.recorder, recorder
    try:
        yield
    finally:
        thread.recorder = previous


def launch_again(plan: Plan, given: Sequence[Tensor | None], descriptors: Sequence[Described] = ()) -> None:
    """With other tensors and descriptors, in the plan's order."""
    if thread.recorder is not None:
        thread.recorder.repeatable = False
    if watched():
        plan.launch_watched([*given, *descriptors])
    else:
        plan.launch([*(None if tensor is None else tensor.data_ptr() for tensor in given), *descriptors])


def need_context() -> None:
    """Makes a CUDA context current, without which no descriptor can be encoded.

    On a thread of autograd's, or of a server's, nothing may have done so yet; Triton does before a launch, too late.
    """
    if not thread.has_context:
        if torch.cuda.is_available():
            torch.cuda.mem_get_info()
        thread.has_context = True


class Pointer:
    """To a `Described` what a tensor is."""

    __slots__ = ("pointer",)

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def data_ptr(self) -> int:
        return self.pointer


class Described:
    """To a launch what Triton's TensorDescriptor is, without checks that take as long as the launch itself.

    tensor: at an aligned address, its rows of contiguous elements and at multiples of 16 bytes.
    """

    padding, round_f32_to_tf32 = "zero", False
    __slots__ = ("base", "shape", "strides")

    def __init__(self, tensor: Tensor | Pointer, shape: Sequence[int], strides: Sequence[int]) -> None:
        need_context()
        self.base, self.shape, self.strides = tensor, shape, strides


def describable(matrix: Tensor) -> bool:
    """Whether the GPU's copy engine takes it: rows of contiguous elements, all of them at multiples of 16 bytes."""
    row = matrix.stride(0)
    return (
        matrix.stride(1) == 1
        and row >= matrix.shape[1]
        and row * matrix.element_size() % COPIED_BYTES == 0
        and matrix.data_ptr() % COPIED_BYTES == 0
    )


def new_describable(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """An empty [..., rows, columns] on like's device which the copy engine takes, whatever its sizes."""
    *rows, columns = shape
    multiple = COPIED_BYTES // dtype.itemsize
    return like.new_empty((*rows, multiple * cdiv(columns, multiple)), dtype=dtype)[..., :columns]


def _key(kernel: Any, tensors: Mapping[str, Tensor | None], facts: tuple[Hashable, ...]) -> tuple[Hashable, list[Any]]:
    """What a plan is found by, and the tensors' addresses."""
    # A plan keeps its kernel, whose id is therefore given to no other.
    determining: list[Hashable] = [id(kernel), facts, instrumentation()]
    given: list[Any] = []
    for tensor in tensors.values():
        if tensor is None:
            determining.append(None)
            given.append(None)
        else:
            pointer = tensor.data_ptr()
            determining.append((tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device(), pointer % 16))
            given.append(pointer)
    return tuple(determining), given


def plan_of(kernel: Any, tensors: Mapping[str, Tensor | None], facts: tuple[Hashable, ...]) -> Plan | None:
    """What `launch` of the same has kept to be launched again; None if it has not."""
    return _plans.get(_key(kernel, tensors, facts)[0])


def launch(
    kernel: Any,
    tensors: dict[str, Tensor | None],
    facts: tuple[Hashable, ...],
    arguments: Callable[[], tuple[tuple[int, ...], dict[str, Any]]],
    made: Mapping[str, Tensor | None] = MappingProxyType({}),
    descriptors: Mapping[str, tuple[Tensor, list[int]]] = MappingProxyType({}),
) -> None:
    """kernel[grid](**tensors, **made, **descriptors, **others), where `arguments` returns grid and others.

    Triton spends most of a launch's host time on finding the compiled kernel from the arguments. Here it is found from
    what determines them: every tensor's dtype, shape, strides, device and alignment, the facts, any other values, and
    how Triton instruments. `arguments` is called only the first time.

    tensors: by the kernel's names for them. made: tensors that were allocated for this launch, at aligned addresses, of
    sizes and dtypes that the rest determines. descriptors: of such tensors and a block each, which the kernel takes
    beside them or, under the same name, in their place.
    """
    key, given = _key(kernel, tensors, facts)
    plan = _plans.get(key)
    if plan is not None and not watched():
        for tensor in made.values():
            given.append(None if tensor is None else tensor.data_ptr())
        for described, _ in descriptors.values():
            given.append(Described(described, described.shape, described.stride()))
        plan.launch(given)
        if thread.recorder is not None:
            thread.recorder.launched(plan, [*tensors.values(), *made.values()], [t for t, _ in descriptors.values()])
        return
    if thread.recorder is not None:
        thread.recorder.repeatable = False
    if descriptors:
        need_context()
    named = {name: TensorDescriptor.from_tensor(*described) for name, described in descriptors.items()}
    if plan is not None:
        plan.launch_watched([*tensors.values(), *made.values(), *named.values()])
        return
    grid, others = arguments()
    compiled = kernel[grid](**{**tensors, **made, **named}, **others)
    # The interpreter returns nothing.
    if isinstance(compiled, CompiledKernel):
        _plans[key] = Plan(compiled, grid, others, [*tensors, *made, *named])
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
