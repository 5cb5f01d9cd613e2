"""Training steps of a kind that is known from before: what they compute, and what is no such kind.

Recordings are stood in for by the path itself, given the tensors and the facts that they were found by.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from triton import knobs

import fused_lora
from fused_lora import fused, linear_op, repeat
from fused_lora.functional import lora_linear
from fused_lora.kernels import lookup, replay
from fused_lora.kernels.config import SAFE
from fused_lora.reference import Dropout

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run in the interpreter; on a GPU test_replay.py has real recordings"
)


class Recordings:
    """Counts how often each direction takes the long way, and how often what was kept of it."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.long = {"forward": 0, "backward": 0}
        self.short = {"forward": 0, "backward": 0}

    def replayed(self, given: Any, facts: tuple[Any, ...], call: Callable[[], Any], keep: Any = None) -> Any:
        self.long[facts[0]] += 1
        key = (facts, *replay.kinds_of(given))
        if key in self.seen and keep is not None:
            keep(lambda again: self.program(facts, again))
        self.seen.add(key)
        return call()

    def program(self, facts: tuple[Any, ...], given: Any) -> Any:
        self.short[facts[0]] += 1
        if facts[0] == "forward":
            _, _, inference, scaling, threshold, row_offset, column_offset, *enable_lora = facts
            assert not inference
            *tensors, seed = given
            dropout = None if seed is None else Dropout(seed, threshold, row_offset, column_offset)
            return fused.forward(*tensors, scaling=scaling, dropout=dropout, enable_lora=enable_lora)
        _, _, scaling, dtype, *enable_lora = facts
        *tensors, bits = given
        return fused.backward(*tensors, bits=bits, scaling=scaling, dtype=dtype, enable_lora=enable_lora)

    def counts(self) -> tuple[int, int, int, int]:
        """Long ways forward and backward, short ways forward and backward."""
        return (*self.long.values(), *self.short.values())


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recordings]:
    made = Recordings()
    monkeypatch.setattr(repeat, "_calls", OrderedDict())
    for module in (repeat, linear_op):
        monkeypatch.setattr(module, "here", lambda x: True)
    monkeypatch.setattr(replay, "repeats", lambda like: True)
    monkeypatch.setattr(fused, "replayed", made.replayed)
    with fused_lora.use_backend("triton"):
        yield made


def problem(**changed: Any) -> dict[str, Any]:
    """Arguments of a layer of rank 4 between 32 and 48 features, all of whose tensors but the weight are trained."""
    shapes = {"x": (6, 32), "weight": (48, 32), "lora_A": (4, 32), "lora_B": (48, 4), "bias": (48,)}
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    tensors = {name: t.requires_grad_(name != "weight") for name, t in tensors.items()}
    return tensors | {"scaling": 0.5} | changed


def square() -> dict[str, Any]:
    """Between 32 and 32 features, so that its weight may lie either way."""
    shapes = {"weight": (32, 32), "lora_B": (32, 4), "bias": (32,)}
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    return problem(**{name: t.requires_grad_(name != "weight") for name, t in tensors.items()})


def trained(t: dict[str, Any], dy: Tensor | None = None) -> list[Tensor]:
    """y and what it was differentiated by, with a mask that depends on nothing but what is given."""
    torch.manual_seed(3)
    y = lora_linear(**t)
    wanted = [value for value in t.values() if isinstance(value, Tensor) and value.requires_grad]
    generator = torch.Generator().manual_seed(4)
    if dy is None:
        dy = torch.randn(y.shape, generator=generator).to(y.dtype)
    return [y, *torch.autograd.grad(y, wanted, dy)]


def frozen(t: dict[str, Any], *names: str) -> dict[str, Any]:
    return t | {name: t[name].detach() for name in names}


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": problem,
    "no bias": lambda: problem(bias=None),
    "three dimensions": lambda: problem(x=torch.randn(2, 3, 32).bfloat16().requires_grad_()),
    "no rows": lambda: problem(x=torch.randn(2, 0, 32).bfloat16().requires_grad_()),
    "a mask": lambda: problem(dropout_p=0.5, training=True),
    "a mask elsewhere": lambda: problem(dropout_p=0.5, training=True, row_offset=3, column_offset=8),
    "a given seed": lambda: problem(dropout_p=0.5, training=True, seed=11),
    "everything dropped": lambda: problem(dropout_p=1.0, training=True),
    "a mask of three dimensions": lambda: problem(
        x=torch.randn(2, 3, 32).bfloat16().requires_grad_(), dropout_p=0.5, training=True
    ),
    "not training": lambda: problem(dropout_p=0.5),
    "stored transposed": lambda: square() | {"fan_in_fan_out": True},
    "slices": lambda: problem(lora_B=torch.randn(24, 4).bfloat16().requires_grad_(), enable_lora=(False, True)),
    "float32 adapters": lambda: problem(
        lora_A=torch.randn(4, 32, requires_grad=True), lora_B=torch.randn(48, 4, requires_grad=True)
    ),
    "a trained weight": lambda: problem(weight=torch.randn(48, 32).bfloat16().requires_grad_()),
    "x frozen": lambda: frozen(problem(), "x"),
    "x alone": lambda: frozen(problem(), "lora_A", "lora_B", "bias"),
    "lora_A alone": lambda: frozen(problem(), "x", "lora_B", "bias"),
    "lora_B alone": lambda: frozen(problem(), "x", "lora_A", "bias"),
    "bias alone": lambda: frozen(problem(), "x", "lora_A", "lora_B"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_the_long_way(recordings: Recordings, kind: str) -> None:
    for _ in range(3):
        trained(KINDS[kind]())
    for number in range(1, 3):
        t = KINDS[kind]()
        found = trained(t)
        with fused_lora.count_paths() as paths:
            expected = trained(t)
        assert paths["forward/triton"] == 1 and recordings.short["forward"] == number + 1
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype and one.stride() == other.stride()
    assert recordings.short["backward"] == (0 if kind == "bias alone" else 2)


def test_the_second_of_a_kind_is_long_and_the_third_short(recordings: Recordings) -> None:
    counted = []
    for _ in range(4):
        trained(problem())
        counted.append(recordings.counts())
    assert counted == [(1, 1, 0, 0), (2, 2, 0, 0), (2, 3, 1, 0), (2, 3, 2, 1)]


def known(recordings: Recordings, t: dict[str, Any]) -> tuple[int, int, int, int]:
    """After as many steps as it takes."""
    for _ in range(4):
        trained(t)
    assert recordings.short["backward"] > 0
    return recordings.counts()


def moved(tensor: Tensor) -> Tensor:
    """Equal to tensor, one element behind an aligned address."""
    flat = torch.cat([tensor.new_zeros(1), tensor.detach().flatten()])[1:]
    return flat.view(tensor.shape).requires_grad_(tensor.requires_grad)


def turned(tensor: Tensor) -> Tensor:
    return tensor.detach().T.contiguous().T.requires_grad_(tensor.requires_grad)


OTHERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "rows": lambda t: t | {"x": t["x"].detach()[:5].requires_grad_()},
    "dimensions": lambda t: t | {"x": t["x"].detach()[None].requires_grad_()},
    **{f"strides of {n}": lambda t, n=n: t | {n: turned(t[n])} for n in ("x", "weight", "lora_A", "lora_B")},
    **{f"alignment of {n}": lambda t, n=n: t | {n: moved(t[n])} for n in ("x", "weight", "lora_A", "lora_B", "bias")},
    "strides of bias": lambda t: t | {"bias": torch.randn(96).bfloat16()[::2].requires_grad_()},
    "dtype": lambda t: {n: v.detach().half().requires_grad_() if isinstance(v, Tensor) else v for n, v in t.items()},
    "dtype of the adapter": lambda t: t | {n: t[n].detach().float().requires_grad_() for n in ("lora_A", "lora_B")},
    "no bias": lambda t: t | {"bias": None},
    "scaling": lambda t: t | {"scaling": 0.25},
    "a mask": lambda t: t | {"dropout_p": 0.5, "training": True},
    "stored transposed": lambda t: t | {"weight": t["weight"].T.contiguous(), "fan_in_fan_out": True},
    "enable_lora": lambda t: (
        t | {"lora_B": t["lora_B"].detach()[:24].clone().requires_grad_(), "enable_lora": (True, False)}
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_kind_takes_the_long_way(recordings: Recordings, other: str) -> None:
    t = problem()
    before = known(recordings, t)
    trained(OTHERS[other](t))
    assert recordings.counts() == (before[0] + 1, before[1] + 1, *before[2:])
    trained(t)
    assert recordings.counts() == (before[0] + 1, before[1] + 1, before[2] + 1, before[3] + 1)


@pytest.mark.parametrize("number", ["row_offset", "column_offset", "dropout_p"])
def test_a_mask_elsewhere_is_another_kind(recordings: Recordings, number: str) -> None:
    t = problem(dropout_p=0.5, training=True)
    before = known(recordings, t)
    trained(t | {number: 0.25 if number == "dropout_p" else 8})
    assert recordings.counts()[2] == before[2]


BLOCKS: dict[str, Callable[[], Any]] = {
    "paths are counted": fused_lora.count_paths,
    "another backend": lambda: fused_lora.use_backend("unfused"),
    "other tiles": lambda: lookup.use_tiles(SAFE),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_within_a_block_the_long_way_is_taken(recordings: Recordings, block: str) -> None:
    t = problem()
    before = known(recordings, t)
    with BLOCKS[block]():
        trained(t)
    assert recordings.counts()[2:] == before[2:]


@pytest.mark.parametrize("what", ["hooks", "instrumentation"])
def test_the_long_way_is_taken_while_triton_is_watched(
    recordings: Recordings, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    t = problem()
    before = known(recordings, t)
    if what == "hooks":
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    else:
        monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "some mode")
    trained(t)
    # What repeats(x) would say of hooks is stood in for.
    assert recordings.counts()[2] == before[2]


def test_a_weight_that_lies_the_other_way_is_another_kind(recordings: Recordings) -> None:
    t = square()
    before = known(recordings, t)
    turned_around = trained(t | {"fan_in_fan_out": True})
    assert recordings.counts()[2:] == before[2:]
    for one, other in zip(turned_around, trained(t | {"weight": t["weight"].T.contiguous()}), strict=True):
        assert torch.equal(one, other)


def test_a_tensor_for_a_seed_takes_the_long_way(recordings: Recordings) -> None:
    """It may lie anywhere, and be anything."""
    t = problem(dropout_p=0.5, training=True, seed=11)
    before = known(recordings, t)
    expected = trained(t)
    for seed in (torch.tensor([11]), torch.tensor([0, 11])[1:]):
        for one, other in zip(trained(t | {"seed": seed}), expected, strict=True):
            assert torch.equal(one, other)
    assert recordings.counts()[2] == before[2] + 1
    with pytest.raises(ValueError, match=r"seed is torch\.int32"):
        lora_linear(**t | {"seed": torch.tensor([11], dtype=torch.int32)})


@pytest.mark.parametrize("number", ["dropout_p", "row_offset", "column_offset"])
def test_a_tensor_among_the_numbers_takes_the_long_way(recordings: Recordings, number: str) -> None:
    """It may hold another number the next time."""
    t = problem(dropout_p=0.5, training=True)
    known(recordings, t)
    held = torch.tensor(0.5) if number == "dropout_p" else torch.tensor(8)
    tensors = t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"]
    numbers = {"dropout_p": 0.5, "row_offset": 0, "column_offset": 0} | {number: held}
    assert repeat.key_of(*tensors, "triton", True, (0.5, *numbers.values()), (True, False, True)) is None


@pytest.mark.parametrize("flags", [(True, False, torch.tensor(True)), (1, False, True)])
def test_what_is_no_bool_among_the_flags_takes_the_long_way(recordings: Recordings, flags: tuple[Any, ...]) -> None:
    t = problem()
    tensors = t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"]
    assert repeat.key_of(*tensors, "triton", True, (0.5, 0.0, 0, 0), (True, False, True)) is not None
    assert repeat.key_of(*tensors, "triton", True, (0.5, 0.0, 0, 0), flags) is None


def test_the_backend_is_asked_for_once(recordings: Recordings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may enter or leave a block meanwhile, and what is kept is kept for good."""
    asked: list[str] = []
    requested = fused_lora.functional.requested_backend
    for module in (fused_lora.functional, linear_op, repeat):
        monkeypatch.setattr(module, "requested_backend", lambda: asked.append("") or requested(), raising=False)
    for number, t in enumerate([problem()] * 3 + [frozen(problem(), "x", "lora_A", "lora_B", "bias")] * 3, start=1):
        lora_linear(**t)
        assert len(asked) == number


def test_a_backward_within_a_count_is_counted(recordings: Recordings) -> None:
    t = problem()
    known(recordings, t)
    y = lora_linear(**t)
    with fused_lora.count_paths() as paths:
        y.backward(torch.ones_like(y))
    assert paths == {"backward/triton": 1}


@pytest.mark.parametrize("what", ["other tiles", "another GPU"])
def test_a_backward_takes_the_long_way_where_that_began_after_its_forward(
    recordings: Recordings, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    t = problem()
    before = known(recordings, t)
    y = lora_linear(**t)
    if what == "other tiles":
        monkeypatch.setattr(replay, "repeats", lambda like: not lookup.tiles_in_force())
    else:
        monkeypatch.setattr(linear_op, "here", lambda x: False)
    with lookup.use_tiles(SAFE) if what == "other tiles" else nullcontext():
        y.backward(torch.ones_like(y))
    assert recordings.counts() == (before[0], before[1] + 1, before[2] + 1, before[3])


class Subclass(torch.Tensor):
    pass


def test_a_subclass_takes_the_long_way(recordings: Recordings) -> None:
    t = problem()
    before = known(recordings, t)
    trained(t | {"x": t["x"].detach().as_subclass(Subclass).requires_grad_()})
    assert recordings.counts()[2:] == before[2:]


def test_float32_takes_the_long_way(recordings: Recordings) -> None:
    """Its products depend on a global precision."""
    t = {name: v.detach().float().requires_grad_() if isinstance(v, Tensor) else v for name, v in problem().items()}
    for _ in range(5):
        trained(t)
    assert recordings.short["forward"] == 0


def test_a_gradient_that_lies_otherwise_takes_the_long_way_back(recordings: Recordings) -> None:
    t = problem()
    before = known(recordings, t)
    for dy in (
        torch.ones(48, 6).bfloat16().T,
        torch.ones(()).bfloat16().expand(6, 48),
        moved(torch.ones(6, 48).bfloat16()),
    ):
        found, expected = trained(t, dy), trained(t, dy.contiguous().clone())
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    assert recordings.counts() == (before[0], before[1] + 3, before[2] + 6, before[3] + 3)


def test_saved_tensors_that_come_back_otherwise_take_the_long_way_back(recordings: Recordings) -> None:
    """As hooks may hand them back with other strides, or parameters may be given other memory meanwhile."""
    t = problem()
    before, expected = known(recordings, t), trained(t)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: turned(t.detach()) if t.dim() == 2 else t):
        found = trained(t)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert recordings.counts() == (before[0], before[1] + 1, before[2] + 2, before[3] + 1)


def test_few_ways_back_are_kept(recordings: Recordings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_op, "_MOST_BACKWARDS", 1)
    t, other = problem(), torch.ones(48, 6).bfloat16().T
    before = known(recordings, t)
    for _ in range(3):
        trained(t, other)
    assert recordings.counts() == (before[0], before[1] + 3, before[2] + 3, before[3])


@pytest.mark.parametrize("error", ["dropout_p", "row_offset", "column_offset", "bias"])
def test_bad_arguments_are_refused_after_good_ones(recordings: Recordings, error: str) -> None:
    t = problem()
    known(recordings, t)
    bad = {"dropout_p": 2.0, "row_offset": -1, "column_offset": -1, "bias": torch.randn(47).bfloat16()}
    with pytest.raises(ValueError, match=error):
        lora_linear(**t | {error: bad[error]})


@pytest.mark.parametrize("dims", [2, 3])
def test_the_output_may_be_written_to(recordings: Recordings, dims: int) -> None:
    """As a residual connection or an activation in place does."""
    t = problem(x=torch.randn(*(1, 6, 32)[3 - dims :]).bfloat16().requires_grad_())
    known(recordings, t)
    y = lora_linear(**t)
    assert not y._is_view()
    written = torch.autograd.grad(y.mul_(2).sum(), t["x"])
    expected = torch.autograd.grad((2 * lora_linear(**t)).sum(), t["x"])
    assert torch.equal(written[0], expected[0])


def test_rows_that_are_no_matrix_are_copied_once(recordings: Recordings) -> None:
    t = problem(x=torch.randn(3, 2, 32).bfloat16().transpose(0, 1).requires_grad_())
    for _ in range(4):
        found = trained(t)
        expected = trained(t | {"x": t["x"].detach().contiguous().requires_grad_()})
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_they_are_saved_as_the_copy(recordings: Recordings) -> None:
    t, saved = problem(x=torch.randn(3, 2, 32).bfloat16().transpose(0, 1).requires_grad_()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        lora_linear(**t)
    assert (6, 32) in saved and (2, 3, 32) not in saved


def test_a_written_input_is_an_error_on_the_short_way_too(recordings: Recordings) -> None:
    t = problem()
    known(recordings, t)
    y = lora_linear(**t)
    with torch.no_grad():
        t["lora_A"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_of_gradients_raise_on_the_short_way_too(recordings: Recordings) -> None:
    t = problem(x=torch.randn(2, 3, 32).bfloat16().requires_grad_())
    known(recordings, t)
    (gradient,) = torch.autograd.grad(lora_linear(**t).sum(), t["lora_A"], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        gradient.sum().backward()


def test_layers_take_the_short_way(recordings: Recordings) -> None:
    layer = fused_lora.Linear(32, 48, r=4, lora_dropout=0.1).bfloat16()
    for _ in range(4):
        layer(torch.randn(2, 5, 32).bfloat16()).sum().backward()
    assert recordings.short["forward"] == 2


@pytest.mark.parametrize("fused_backend", ["triton", "unfused"])
def test_without_a_stand_in_nothing_is_known_on_a_cpu(fused_backend: Any) -> None:
    with fused_lora.use_backend(fused_backend):
        before = len(repeat._calls)
        for _ in range(4):
            trained(problem())
        assert len(repeat._calls) == before
