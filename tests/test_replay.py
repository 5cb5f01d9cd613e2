"""Calls that are repeated from a recording: the same results, for the same kind of tensors only, or not repeated."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from triton import knobs

import fused_lora
from fused_lora import Choice, embedding_op, fused, linear_op, ops, repeat
from fused_lora.kernels import config, launch, lookup, replay
from fused_lora.kernels.launch import Described
from fused_lora.kernels.replay import Program, replayed

NAMES = ["a_ptr", "b_ptr", "out_ptr", "n", "scale"]


def numbers(value: Any, n: int) -> np.ndarray:
    """At an address, or where a descriptor says; zeros for None."""
    if value is None:
        return np.zeros(n, np.float32)
    address = value if isinstance(value, int) else value.base.data_ptr()
    return np.ctypeslib.as_array((ctypes.c_float * n).from_address(address))


class Compiled:
    """A kernel that a CPU runs on addresses, as a GPU runs compiled ones: out = scale * a + b."""

    function = packed_metadata = None
    src = SimpleNamespace(fn=SimpleNamespace(arg_names=NAMES))

    def __init__(self) -> None:
        self.runs = 0

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        a, b, out, n, scale = rest[5:]
        self.runs += 1
        numbers(out, n)[:] = scale * numbers(a, n) + numbers(b, n)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def call(**arguments: Any) -> Compiled:
            values = [arguments[name] for name in NAMES]
            self.run(1, 1, 1, 0, *[None] * 5, *(v.data_ptr() if isinstance(v, Tensor) else v for v in values))
            return self

        return call


class Launcher:
    """As Triton's: what expands descriptors lies above a launcher in C."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, launcher: Callable[..., None]) -> None:
        self.expansions: list[int] = []
        expansions = self.expansions

        def launch(*arguments: Any) -> None:
            expansions.append(1)
            launcher(*(a.base.data_ptr() if isinstance(a, Described) else a for a in arguments))

        self.launch = launch

    def __call__(self, *arguments: Any) -> None:
        self.launch(*arguments)


class Layered(Compiled):
    def __init__(self) -> None:
        super().__init__()
        self.run = Launcher(super().run)  # type: ignore[assignment, method-assign]


@pytest.fixture(params=[Compiled, Layered])
def kernel(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Compiled:
    """Whose launches are plans, as on a GPU."""
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    active = SimpleNamespace(get_current_stream=lambda device: 0, get_current_device=lambda: 0)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "_plans", type(launch._plans)())
    monkeypatch.setattr(replay, "_programs", type(replay._programs)())
    monkeypatch.setattr(replay, "_ready", type(replay._ready)())
    monkeypatch.setattr(replay, "repeats", lambda like: True)
    return request.param()  # type: ignore[no-any-return]


def add(kernel: Compiled, a: Tensor, b: Tensor | None, out: Tensor, scale: float, described: bool = False) -> None:
    tensors = {"b_ptr": b} if described else {"a_ptr": a, "b_ptr": b}
    descriptors = {"a_ptr": (a, list(a.shape))} if described else {}
    constants = {"n": out.numel(), "scale": scale}
    launch.launch(kernel, tensors, (scale,), lambda: ((1,), constants), {"out_ptr": out}, descriptors)


class Work:
    """2 * (3 * x + w) + w and a row of it; counts how often it is done from the start."""

    def __init__(self, kernel: Compiled, within: Callable[[Tensor, Tensor | None], object] | None = None) -> None:
        self.kernel, self.within, self.calls = kernel, within, 0

    def do(self, x: Tensor, w: Tensor | None) -> tuple[Tensor | None, ...]:
        self.calls += 1
        first = x.new_empty(x.shape)
        add(self.kernel, x, w, first, 3.0)
        if self.within is not None:
            self.within(first, w)
        whole = x.new_empty((2, *x.shape))
        second = whole[1]
        add(self.kernel, first, w, second, 2.0, described=True)
        del first
        last = x.new_empty(x.shape)
        add(self.kernel, second, None, last, 1.0)
        return last, None, second.T

    def __call__(self, x: Tensor, w: Tensor | None, *facts: float) -> None:
        last, nothing, turned = replayed((x, w), facts, lambda: self.do(x, w))
        expected = 2 * (3 * x + (0 if w is None else w)) + (0 if w is None else w)
        assert nothing is None and last is not None and turned is not None
        assert torch.equal(last, expected) and torch.equal(turned, expected.T)


def some(*shape: int) -> Tensor:
    return torch.randn(*shape).round(decimals=2)


def test_a_third_call_is_launches_alone(kernel: Compiled) -> None:
    work = Work(kernel)
    for _ in range(5):
        work(some(4, 8), some(4, 8))
    assert work.calls == 2 and kernel.runs == 5 * 3


@pytest.mark.parametrize(
    "view",
    [lambda t: t.T, lambda t: t[1:], lambda t: t.view(-1), lambda t: t[:, 2]],
    ids=["transposed", "rows", "flat", "column"],
)
def test_an_output_may_be_a_view(kernel: Compiled, view: Callable[[Tensor], Tensor]) -> None:
    def whole(x: Tensor) -> Tensor:
        out = x.new_empty(x.shape)
        add(kernel, x, None, out, 1.0)
        return out

    for _ in range(4):
        x = some(4, 4)
        (found,) = replayed((x,), (), lambda x=x: (view(whole(x)),))
        assert found is not None and torch.equal(found, view(x)) and found.stride() == view(x).stride()
    assert isinstance(*replay._programs.values(), Program)


def test_memory_is_given_back_when_it_was(kernel: Compiled) -> None:
    work = Work(kernel)
    for _ in range(2):
        work(some(4, 8), some(4, 8))
    (program,) = replay._programs.values()
    assert isinstance(program, Program)
    assert [type(event).__name__ for event in program.events] == [
        "_Allocation", "_Launch", "_Allocation", "_Launch", "_Release", "_Allocation", "_Launch",
    ]  # fmt: skip


def test_other_kinds_are_done_from_the_start(kernel: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    work, x, w = Work(kernel), some(4, 8), some(4, 8)
    for _ in range(3):
        work(x, w, 1.0)
    for other in (
        lambda: work(some(8, 4), some(8, 4), 1.0),
        lambda: work(some(2, 8), some(2, 8), 1.0),
        lambda: work(x, None, 1.0),
        lambda: work(x, w, 2.0),
        lambda: work(some(4 * 8 + 1)[1:].view(4, 8), w, 1.0),
    ):
        calls = work.calls
        other()
        assert work.calls == calls + 1
    monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "fpsan")
    work(x, w, 1.0)
    assert work.calls == calls + 2


OUTSIDE = torch.zeros(4, 8)
WITHIN = {
    "nothing": (lambda kernel, first: None, 2),
    "a view": (lambda kernel, first: first.T, 2),
    "a launch": (lambda kernel, first: add(kernel, first, None, first, 1.0), 2),
    "a launch by another thread": (
        lambda kernel, first: in_a_thread(lambda: add(kernel, OUTSIDE, None, OUTSIDE, 1.0)),
        2,
    ),
    "an operation in place": (lambda kernel, first: first.mul_(1), 6),
    "an allocation by torch": (lambda kernel, first: torch.ones(3), 6),
    "a launch in memory from outside": (lambda kernel, first: add(kernel, OUTSIDE, None, OUTSIDE, 1.0), 6),
    "a launch of another's plan": (lambda kernel, first: launch.launch_again(ANOTHERS, [first, None, first]), 6),
}
ANOTHERS = SimpleNamespace(launch=lambda given: None)


def in_a_thread(call: Callable[[], None]) -> None:
    thread = Thread(target=call)
    thread.start()
    thread.join()


@pytest.mark.parametrize("what", WITHIN)
def test_a_call_in_which_anything_else_happens_is_not_repeated(kernel: Compiled, what: str) -> None:
    within, calls = WITHIN[what]
    work = Work(kernel, lambda first, w: within(kernel, first))
    for _ in range(6):
        work(some(4, 8), some(4, 8))
    assert work.calls == calls


def test_a_kernel_without_a_plan_is_not_forgotten(kernel: Compiled) -> None:
    """Of the second call, which is recorded, a launch is the first of its kernel."""
    late = Compiled()

    class Late(Work):
        def do(self, x: Tensor, w: Tensor | None) -> tuple[Tensor | None, ...]:
            self.kernel = late if self.calls == 1 else kernel
            return super().do(x, w)

    work = Late(kernel)
    for _ in range(4):
        work(some(4, 8), some(4, 8))
    assert work.calls == 4


def test_tensors_at_one_address_are_not_told_apart(kernel: Compiled) -> None:
    work = Work(kernel)
    for _ in range(4):
        x = some(4, 8)
        work(x, x)
    assert work.calls == 4
    both = some(2, 4, 8)
    for _ in range(4):
        work(both[0], both[1], 1.0)
    assert work.calls == 6


def test_tensors_that_reach_into_one_another_are_not_told_apart(kernel: Compiled) -> None:
    """What is a part of one of them is the start of the other one, as long as they are recorded."""
    calls = 0

    def of_the_later_rows(x: Tensor, w: Tensor) -> tuple[Tensor]:
        nonlocal calls
        calls += 1
        sums = x.new_empty(2, 8)
        add(kernel, x[2:], w, sums, 2.0)
        return (sums,)

    for number in range(4):
        x = some(4, 8)
        w = x[2:] if number < 2 else some(2, 8)
        (sums,) = replayed((x, w), (), lambda x=x, w=w: of_the_later_rows(x, w))
        assert sums is not None and torch.equal(sums, 2 * x[2:] + w)
    assert calls == 4


def test_words_that_a_launch_counts_in_are_asked_for_each_time(
    kernel: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stream has its own; here from a pool that gives others each time, which hold a one."""
    pool = torch.ones(100)
    taken: list[int] = []

    def words_for(x: Tensor, count: int) -> Tensor:
        taken.append(count)
        return pool[8 * len(taken) : 8 * len(taken) + count]

    def counting(x: Tensor) -> tuple[Tensor | None, ...]:
        words = words_for(x, 3)
        if launch.thread.recorder is not None:
            launch.thread.recorder.took_flags(words, 3)
        sums = x.new_empty(x.shape)
        add(kernel, x, words, sums, 1.0)
        add(kernel, words, None, words, 2.0)
        return (sums,)

    monkeypatch.setattr(replay, "flags_for", words_for)
    for number in range(1, 6):
        x = some(3)
        (sums,) = replayed((x,), (), lambda x=x: counting(x))
        assert sums is not None and torch.equal(sums, x + 1)
        assert taken == [3] * number and pool.eq(2).sum() == 3 * number
    assert kernel.runs == 5 * 2 and isinstance(*replay._programs.values(), Program)


def test_launches_that_count_in_the_same_words_have_each_as_many_as_they_asked_for(
    kernel: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on one stream they do; where a graph is captured, each has words of its own."""
    pool, asked, captured = torch.zeros(100), list[int](), False

    def words_for(x: Tensor, count: int) -> Tensor:
        asked.append(count)
        first = 8 * len(asked) if captured else 0
        words = pool[first : first + count]
        if launch.thread.recorder is not None:
            launch.thread.recorder.took_flags(words, count)
        return words

    def counting(x: Tensor) -> tuple[Tensor | None, ...]:
        for count in (2, 4):
            words = words_for(x, count)
            add(kernel, x[:count], None, words, 1.0)
        return (x.new_empty(1),)

    monkeypatch.setattr(replay, "flags_for", words_for)
    for number in range(4):
        captured = number == 3
        x = some(4)
        replayed((x,), (), lambda x=x: counting(x))
    assert isinstance(*replay._programs.values(), Program) and asked == [2, 4] * 4
    assert torch.equal(pool[56:58], x[:2]) and torch.equal(pool[64:68], x)


def test_no_recorder_stays_behind(kernel: Compiled) -> None:
    work = Work(kernel)
    for _ in range(2):
        work(some(4, 8), some(4, 8))
    assert launch.thread.recorder is None
    failing = Work(kernel, lambda first, w: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing(some(4, 8), some(4, 8), 5.0)
    assert launch.thread.recorder is None


def on_gpu(number: int = 0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What the machinery asks a tensor on a GPU."""
    facts = {"is_cuda": True, "dtype": dtype, "shape": torch.Size([2, 3])}
    calls = {"stride": (3, 1), "get_device": number, "data_ptr": 256}
    return SimpleNamespace(**facts, **{name: lambda value=value: value for name, value in calls.items()})


def test_when_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replay.repeats(on_gpu()) and replay.repeats(on_gpu(dtype=torch.float16))
    # A product of float32 depends on a global precision.
    assert not any(map(replay.repeats, (None, torch.zeros(2).half(), on_gpu(dtype=torch.float32))))
    with lookup.use_tiles(config.SAFE):
        assert not replay.repeats(on_gpu())
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    assert not replay.repeats(on_gpu())


def test_another_gpu_is_another_kind() -> None:
    one, same, other = (replay.kinds_of([on_gpu(number)]) for number in (0, 0, 1))
    assert one == same != other


def test_there_is_a_bound(kernel: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MOST_PROGRAMS", 3)
    work = Work(kernel)
    for fact in range(10):
        work(some(4, 8), some(4, 8), float(fact))
    assert len(replay._programs) == 3


@pytest.mark.parametrize("kernel", [Layered], indirect=True)
def test_the_same_addresses_are_made_ready_once(kernel: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    work, (x, w) = Work(kernel), (some(4, 8), some(4, 8))
    for _ in range(2):
        work(x, w)
    (program,) = replay._programs.values()
    assert isinstance(program, Program)
    event = next(event for event in program.events if isinstance(event, replay._Launch) and event.places[-1][1])
    expansions: list[int] = kernel.run.expansions  # type: ignore[attr-defined]
    streams = [7]
    event.plan.stream_of = lambda device: streams[0]

    def expanded(*tensors: Tensor) -> int:
        before = len(expansions)
        values = [0] * (1 + max(at.value for at in event.addresses))
        for at, tensor in zip(event.addresses, tensors, strict=True):
            values[at.value] = tensor.data_ptr() - at.offset
        for tensor in tensors[1:-1]:
            tensor.fill_(0)
        event.run(values, streams[0])
        assert torch.equal(tensors[1], 2 * tensors[2] + tensors[0])
        return len(expansions) - before

    # The kernel's second argument, its third, which is written, and its first, by a descriptor.
    one, other = ([some(4, 8), torch.empty(4, 8), some(4, 8)] for _ in range(2))
    # The second time once more, to be kept.
    assert [expanded(*one) for _ in range(4)] == [1, 2, 0, 0]
    assert [expanded(*other) for _ in range(3)] == [1, 2, 0]
    assert [expanded(other[0], *one[1:]) for _ in range(3)] == [1, 2, 0]
    streams[0] = 8
    assert [expanded(*one) for _ in range(3)] == [1, 2, 0]
    replay._ready.clear()
    monkeypatch.setattr(replay, "_MOST_READY", 3)
    kept = [[some(4, 8), torch.empty(4, 8), some(4, 8)] for _ in range(9)]
    assert [expanded(*each) for each in kept] == [1] * 9 and len(replay._ready) == 3


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_products_of_torch_are_repeated(kernel: Compiled, mode: Callable[[], AbstractContextManager[None]]) -> None:
    """Where nothing can be differentiated, torch does not take its operations apart beforehand."""
    calls = 0

    def products(x: Tensor, w: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        y = torch.addmm(x.new_empty(1), x, w.t(), beta=0, alpha=2.0)
        z = torch.mm(y.t(), x)
        z.addmm_(y[1:].t(), torch.mm(y[1:], w), alpha=-0.5)
        by_token = torch.ops.aten.embedding_dense_backward(w, indices, 5, -1, False)
        return z, z.to(torch.bfloat16), y.t()[2:], x.new_empty(3, 2).zero_(), x.new_empty(8, 5).copy_(by_token.t())

    for _ in range(5):
        given = some(4, 8), some(7, 8)[1:], torch.randint(5, (6,))
        with mode():
            found = replayed(given, (), lambda given=given: products(*given))
        expected = products(*given)
        calls -= 1
        for one, other in zip(found, expected, strict=True):
            assert one is not None and torch.equal(one, other) and one.stride() == other.stride()
    assert calls == 2 and isinstance(*replay._programs.values(), Program)


# What is given, of something larger; what is read; and whether that can be found again.
PARTS = {
    "from outside": (lambda whole: whole[:4], lambda whole: OUTSIDE, False),
    "given": (lambda whole: whole[:4], lambda whole: whole[:4].view(torch.float16).view(torch.float32)[:, :8], True),
    "columns": (lambda whole: whole[:4], lambda whole: whole[:4, 1:9], True),
    "rows": (lambda whole: whole[:8], lambda whole: whole[2:6], True),
    "the last of it": (lambda whole: whole[:4], lambda whole: whole[:4, 8:], True),
    "what begins within": (lambda whole: whole[:4], lambda whole: whole[2:6], False),
    "what begins as it": (lambda whole: whole[:4], lambda whole: whole[:5], False),
    "what lies before": (lambda whole: whole[1:5], lambda whole: whole[:4], False),
    "columns of columns": (lambda whole: whole[:4, :7], lambda whole: whole[:4, 1:5], False),
    "between its columns": (lambda whole: whole[:4, :7], lambda whole: whole[:3, 7:], False),
    "rows with what lies between": (lambda whole: whole[:4, :7], lambda whole: whole[:3], False),
    "rows of another length": (
        lambda whole: whole[:4, :7],
        lambda whole: whole.view(-1)[:24].view(3, 8)[:, :7],
        False,
    ),
    "columns where it begins": (lambda whole: whole[:4, :7], lambda whole: whole[:4, :3], True),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_product_of_what_cannot_be_found_again_is_not_repeated(kernel: Compiled, case: str) -> None:
    """What is read of something larger is elsewhere the next time, as seen from what is given of it."""
    given, read, repeated = PARTS[case]
    for number in range(5):
        whole = some(9, 9)
        x, operand = given(whole), read(whole)
        if not repeated and number > 2:
            operand = operand.clone()
        (found,) = replayed((x,), (), lambda x=x, operand=operand: (torch.mm(operand.t(), operand),))
        assert found is not None and torch.equal(found, operand.t() @ operand)
    assert isinstance(*replay._programs.values(), Program) == repeated


def test_a_launch_may_read_a_part_of_what_is_given(kernel: Compiled) -> None:
    def of_the_later_rows(x: Tensor) -> tuple[Tensor]:
        sums = x.new_empty(2, 8)
        add(kernel, x[2:], x[1:3], sums, 2.0, described=True)
        return (sums,)

    for _ in range(5):
        x = some(4, 8)
        (sums,) = replayed((x,), (), lambda x=x: of_the_later_rows(x))
        assert sums is not None and torch.equal(sums, 2 * x[2:] + x[1:3])
    assert kernel.runs == 5 and isinstance(*replay._programs.values(), Program)


def test_a_product_of_numbers_read_as_others_is_not_repeated(kernel: Compiled) -> None:
    for _ in range(4):
        x = torch.randn(4, 4).half()
        (found,) = replayed((x,), (), lambda x=x: (torch.mm(x.view(torch.bfloat16), x.view(torch.bfloat16)),))
        read = x.view(torch.bfloat16)
        assert found is not None and torch.equal(found, read @ read)
    assert not isinstance(*replay._programs.values(), Program)


def test_the_kind_of_a_forward_and_of_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is given to either, or a number of it, is in what a recording is found by."""
    told: list[tuple[Any, ...]] = []

    def noting(choice: Choice, given: Any, facts: tuple[Any, ...], call: Callable[[], Any], keep: Any) -> Any:
        told.append((choice.path, tuple(given), facts))
        return call()

    monkeypatch.setattr(linear_op, "repeated", noting)
    x, weight, bias, dy = torch.randn(8, 16), torch.randn(32, 16), torch.randn(32), torch.randn(8, 32)
    lora_A, lora_B, seed = torch.randn(4, 16), torch.randn(16, 2), torch.tensor([3])
    slices = [True, False, True, False]
    tensors, kind = (x, weight, bias, lora_A, lora_B), (slices, seed, 0.75, 0.25, 5, 8, "reference")
    for inference in (False, True):
        _, xa, bits = linear_op._compute(inference, *tensors, *kind)
        path, given, facts = told.pop()
        assert path == "reference" and [id(t) for t in given] == [id(t) for t in (*tensors, seed)]
        assert facts == ("forward", "reference", inference, 0.75, 16384, 5, 8, *slices)
    rest = slices, 0.75, 0.25, torch.float32, "reference"
    linear_op._gradients(dy, x, weight, lora_A, lora_B, xa, bits, *rest)
    path, given, facts = told.pop()
    assert path == "reference" and [id(t) for t in given] == [id(t) for t in (dy, x, weight, lora_A, lora_B, xa, bits)]
    assert facts == ("backward", "reference", 1.0, torch.float32, *slices)


def test_the_kind_of_a_lookup_and_of_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []

    def noting(choice: Choice, given: Any, facts: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        told.append(([id(t) for t in given], facts))
        return call()

    monkeypatch.setattr(embedding_op, "repeated", noting)
    indices, weight, lora_A, lora_B = torch.tensor([1, 4, 1]), torch.randn(5, 8), torch.randn(2, 5), torch.randn(8, 2)
    _, xa = embedding_op._forward(indices, weight, lora_A, lora_B, 0.75, -1, False, False, "reference")
    assert told.pop() == ([id(t) for t in (weight, indices, lora_A, lora_B)], ("embedding", "reference", 0.75))
    dy = torch.randn(3, 8)
    embedding_op._backward(dy, indices, lora_B, xa, 5, 4, True, 0.75, torch.float32, "reference")
    facts = ("embedding_backward", "reference", 5, 4, True, 0.75, torch.float32)
    assert told.pop() == ([id(t) for t in (dy, indices, lora_B, xa)], facts)


@pytest.mark.parametrize("path", ["reference", "batch_invariant", "triton", "unfused", "decode"])
def test_only_what_kernels_compute_is_recorded(monkeypatch: pytest.MonkeyPatch, path: Any) -> None:
    asked: list[object] = []
    monkeypatch.setattr(fused, "replayed", lambda given, facts, call, keep: asked.append(given) or call())
    x = torch.randn(2)
    assert ops.repeated(Choice(path, ""), (x,), (), lambda: (x, None)) == (x, None)
    assert len(asked) == (path in ("triton", "unfused", "decode"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
@pytest.mark.parametrize(
    ("path", "sizes"),
    [
        *(("triton", sizes) for sizes in ((2048, 4096, 1024), (2048, 1024, 4096), (8192, 4096, 4096), (100, 512, 256))),
        *(("unfused", sizes) for sizes in ((2048, 1024, 4096), (100, 512, 256))),
        ("decode", (100, 512, 256)),
    ],
    ids=str,
)
@pytest.mark.parametrize("r", [4, 16, 64, 128])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_as_from_the_start(
    monkeypatch: pytest.MonkeyPatch,
    path: Any,
    sizes: tuple[int, int, int],
    r: int,
    p: float,
    adapter_dtype: torch.dtype,
) -> None:
    M, K, N = sizes
    options = {"lora_dropout": p, "device": "cuda", "dtype": torch.bfloat16, "adapter_dtype": adapter_dtype}
    layers = [fused_lora.Linear(K, N, r=r, lora_alpha=r, **options) for _ in range(2)]
    rows = (2, M // 2) if r == 16 else (M,)
    kept = [[torch.empty(*rows, n, device="cuda", dtype=torch.bfloat16) for n in (K, N)] for _ in layers]
    for layer, (x, _) in zip(layers, kept, strict=True):
        torch.nn.init.normal_(layer.lora_B)
        x.requires_grad_()

    def step(number: int, which: int) -> list[Tensor]:
        torch.manual_seed(number)
        layer, (x, dy) = layers[which], kept[which]
        if number < 5:
            x, dy = torch.empty_like(x).requires_grad_(), torch.empty_like(dy)
        with torch.no_grad():
            x.normal_(), dy.normal_()
        with fused_lora.use_backend(path):
            y = layer(x)
        gradients = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)
        # What stays on the GPU would keep the next step from getting the addresses of this one.
        return [t.cpu() for t in (y, *gradients)]

    with monkeypatch.context() as patched:
        patched.setattr(fused, "replayed", lambda given, facts, call, keep: call())
        expected = [step(number, which) for number in range(9) for which in range(2)]
    for module, cache in ((replay, "_programs"), (replay, "_ready"), (repeat, "_calls")):
        monkeypatch.setattr(module, cache, OrderedDict())
    found = [step(number, which) for number in range(9) for which in range(2)]
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    # A layer whose factors are copied by torch for the copy engine is not repeated.
    if r == 4 and path == "triton":
        return
    programs = list(replay._programs.values())
    assert [type(program) for program in programs] == [Program, Program] and len(repeat._calls) == 1
    # And the last steps launch what an earlier one at the same addresses has made ready.
    launches = {event for program in programs for event in program.events if isinstance(event, replay._Launch)}
    assert {key[0] for key, ready in replay._ready.items() if ready is not None} == launches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
@pytest.mark.parametrize("path", ["triton", "unfused", "decode"])
@pytest.mark.parametrize("kind", ["slices", "lookups"])
@pytest.mark.parametrize("rows", [16, 300])
def test_the_same_bits_of_slices_and_lookups(monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, path: Any) -> None:
    """Which read columns of what they are given."""
    options: Any = {"device": "cuda", "dtype": torch.bfloat16}
    layer: Any = fused_lora.Embedding(1000, 512, r=16, **options)
    if kind == "slices":
        layer = fused_lora.MergedLinear(512, 768, r=16, enable_lora=[True, False, True], lora_dropout=0.1, **options)
    torch.nn.init.normal_(layer.lora_A), torch.nn.init.normal_(layer.lora_B)

    def step(number: int) -> list[Tensor]:
        torch.manual_seed(number)
        x = torch.randn(rows, 512, device="cuda").bfloat16().requires_grad_()
        with fused_lora.use_backend(path):
            y = layer(torch.randint(1000, (rows,), device="cuda") if kind == "lookups" else x)
        wanted = (layer.lora_A, layer.lora_B) if kind == "lookups" else (x, layer.lora_A, layer.lora_B)
        return [t.cpu() for t in (y, *torch.autograd.grad(y, wanted, torch.randn_like(y)))]

    with monkeypatch.context() as patched:
        patched.setattr(fused, "replayed", lambda given, facts, call, keep: call())
        expected = [step(number) for number in range(7)]
    monkeypatch.setattr(replay, "_programs", OrderedDict())
    for number, theirs in enumerate(expected):
        assert all(torch.equal(one, other) for one, other in zip(step(number), theirs, strict=True))
    programs = list(replay._programs.values())
    # Slices put together by torch are not repeated.
    assert programs and (Program in map(type, programs) or (path == "unfused" and kind == "slices"))
