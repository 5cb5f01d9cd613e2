"""Calls that are made again without the way there: when, and that they launch what that way would.

The kernel runs in the interpreter; a stand-in for its plan notes what it would be launched with again.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from triton import knobs

import fused_lora
from fused_lora import repeat
from fused_lora.functional import effective_weight, lora_linear
from fused_lora.kernels import decode_launch, launch, lookup, low_rank_update, own_panel
from fused_lora.kernels.config import SAFE


class Plan:
    """What a launch with one key has kept."""

    def __init__(self, names: list[str]) -> None:
        self.launched: list[dict[str, Any]] = []
        self.watched: list[dict[str, Any]] = []
        self.launch = lambda given: self.launched.append(dict(zip(names, given, strict=True)))
        self.launch_watched = lambda given: self.watched.append(dict(zip(names, given, strict=True)))


class Launches:
    """Notes each launch on the way that is not short, and hands out a plan for it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.plans: dict[Any, Plan] = {}
        self.made: list[dict[str, Any]] = []
        self.described: list[dict[str, Any]] = []
        for launcher in (decode_launch, own_panel, low_rank_update):
            patch.setattr(launcher, "launch", self.launch)
            patch.setattr(launcher, "plan_of", lambda *of: self.plans.get(launch._key(*of)[0]))

    def launch(self, kernel, tensors, facts, arguments, made, descriptors=MappingProxyType({})) -> None:
        launch.launch(kernel, tensors, facts, arguments, made, descriptors)
        self.made.append(made)
        self.described.append(descriptors)
        self.plans.setdefault(launch._key(kernel, tensors, facts)[0], Plan([*tensors, *made, *descriptors]))

    @property
    def again(self) -> list[dict[str, Any]]:
        return [given for plan in self.plans.values() for given in plan.launched]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    monkeypatch.setattr(repeat, "_calls", OrderedDict())
    monkeypatch.setattr(repeat, "here", lambda x: True)
    with fused_lora.use_backend("decode"), torch.no_grad():
        yield Launches(monkeypatch)


def problem(rows: int = 5, dtype: torch.dtype = torch.bfloat16, **changed: Any) -> dict[str, Any]:
    """Arguments of a layer of rank 4 between 32 and 48 features."""
    tensors = {"x": (rows, 32), "weight": (48, 32), "lora_A": (4, 32), "lora_B": (48, 4), "bias": (48,)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in tensors.items()} | {"scaling": 0.5} | changed


def has_addresses_of(given: dict[str, Any], t: dict[str, Any]) -> bool:
    tensors = {name: t[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")}
    expected = {f"{name}_ptr": None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    return expected == {name: given[name] for name in expected}


@pytest.mark.parametrize("shape", [(5, 32), (1, 32), (2, 3, 32), (1, 1, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_call_is_made_again_with_its_own_tensors(launches: Launches, shape: tuple[int, ...], bias: bool) -> None:
    problems = [problem(x=torch.randn(shape, dtype=torch.bfloat16)) for _ in range(3)]
    problems = [t if bias else t | {"bias": None} for t in problems]
    results = [lora_linear(**t) for t in problems]
    (made,) = launches.made
    assert len(launches.again) == 2
    for given, y, t in zip(launches.again, results[1:], problems[1:], strict=True):
        assert has_addresses_of(given, t) and given["out_ptr"] == y.data_ptr()
        assert [given[f"{name}_ptr"] for name in ("seed", "bits", "drawn", "kept_panel")] == [None] * 4
        assert y.shape == (*shape[:-1], 48) and y.dtype == torch.bfloat16 and y.is_contiguous()
    assert results[0].shape == results[1].shape and made["kept_panel_ptr"] is None


def test_it_works_in_as_many_words_as_before(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, floats = [], []
    flags_for = decode_launch.flags_for
    monkeypatch.setattr(decode_launch, "flags_for", lambda x, count: flags.append(count) or flags_for(x, count))
    t = problem(37)
    lora_linear(**t)
    call = repeat._calls[next(iter(repeat._calls))]
    floats = [launches.made[0]["workspace_ptr"].numel(), call.floats]
    lora_linear(**t)
    assert len(flags) == 2 and flags[0] == flags[1] and floats[0] == floats[1]


@pytest.mark.parametrize(
    ("rows", "names"),
    [(8, {"x", "weight"}), (7, set()), (64, {"x", "weight"}), (65, {"weight"})],
    ids=["few whole tiles", "few rows", "whole tiles", "many rows"],
)
def test_descriptors_are_of_the_new_tensors(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, rows: int, names: set[str]
) -> None:
    monkeypatch.setattr(launch, "launch", lambda *_: None)
    monkeypatch.setattr(decode_launch, "FEW_ROWS", 64)
    tile = decode_launch.DecodeTile(16, 16, 16, 4, 1, 16, 16, parts=1, descriptors=True)
    monkeypatch.setattr("fused_lora.decoding.decode_tile", lambda *_: tile)
    problems = [problem(x=torch.randn(2, rows, 32, dtype=torch.bfloat16)) for _ in range(2)]
    for t in problems:
        lora_linear(**t)
    ((described,), (given,)) = launches.described, launches.again
    assert {name.removesuffix("_descriptor") for name in described} == names
    for name in names:
        (was, _), now = described[f"{name}_descriptor"], problems[1][name]
        of = given[f"{name}_descriptor"]
        assert of.base is now and tuple(of.shape) == was.shape and tuple(of.strides) == was.stride()


@pytest.mark.parametrize("shape", [(60, 32), (2, 150, 32)])
@pytest.mark.parametrize("kind", ["plain", "no bias", "fan_in_fan_out", "float32 adapters"])
def test_tiles_with_their_panel_are_launched_again(launches: Launches, shape: tuple[int, ...], kind: str) -> None:
    def made() -> dict[str, Any]:
        sizes = {"x": shape, "weight": (144, 32), "lora_A": (4, 32), "lora_B": (144, 4), "bias": (144,)}
        t = {name: torch.randn(size, dtype=torch.bfloat16) for name, size in sizes.items()} | {"scaling": 0.5}
        wide = {name: t[name].float() for name in ("lora_A", "lora_B")}
        return {"no bias": t | {"bias": None}, "fan_in_fan_out": transposed(t), "float32 adapters": t | wide}.get(
            kind, t
        )

    problems = [made() for _ in range(3)]
    with fused_lora.use_backend("triton"):
        results = [lora_linear(**t) for t in problems]
    (plan,) = launches.plans.values()
    for given, y, t in zip(plan.launched, results[1:], problems[1:], strict=True):
        bias = None if t["bias"] is None else t["bias"].data_ptr()
        assert (given["bias_ptr"], given["lora_B_ptr"]) == (bias, t["lora_B"].data_ptr())
        assert given["x_ptr"].base is t["x"] and given["weight_ptr"].base is t["weight"] and given["out_ptr"].base is y
        lora_A = given["lora_A_ptr"]
        assert lora_A == t["lora_A"].data_ptr() if kind == "float32 adapters" else lora_A.base is t["lora_A"]
    (described,) = launches.described
    for name, (tensor, _) in described.items():
        for given in plan.launched:
            assert tuple(given[name].shape) == tensor.shape and tuple(given[name].strides) == tensor.stride(), name


def transposed(t: dict[str, Any]) -> dict[str, Any]:
    return t | {"weight": t["weight"].T.contiguous(), "fan_in_fan_out": True}


OTHERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "rows": lambda t: t | {"x": torch.randn(6, 32, dtype=torch.bfloat16)},
    "dimensions": lambda t: t | {"x": t["x"][None]},
    "strides of x": lambda t: t | {"x": t["x"].T.contiguous().T},
    "alignment of x": lambda t: t | {"x": torch.randn(161, dtype=torch.bfloat16)[1:].view(5, 32)},
    "strides of weight": lambda t: t | {"weight": t["weight"].T.contiguous().T},
    "alignment of weight": lambda t: t | {"weight": torch.randn(1537, dtype=torch.bfloat16)[1:].view(48, 32)},
    "stored transposed": transposed,
    "dtype": lambda t: problem(dtype=torch.float16),
    "dtype of the adapter": lambda t: t | {name: t[name].float() for name in ("lora_A", "lora_B")},
    "rank": lambda t: t | {"lora_A": torch.randn(5, 32).bfloat16(), "lora_B": torch.randn(48, 5).bfloat16()},
    "strides of lora_A": lambda t: t | {"lora_A": t["lora_A"].T.contiguous().T},
    "strides of lora_B": lambda t: t | {"lora_B": t["lora_B"].T.contiguous().T},
    "no bias": lambda t: t | {"bias": None},
    "strides of bias": lambda t: t | {"bias": torch.randn(96, dtype=torch.bfloat16)[::2]},
    "scaling": lambda t: t | {"scaling": 0.25},
    "enable_lora": lambda t: t | {"lora_B": t["lora_B"][:24].contiguous(), "enable_lora": (True, False)},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_another_launch_comes_of_goes_another_way(launches: Launches, other: str) -> None:
    t = problem()
    lora_linear(**t)
    changed = OTHERS[other](t)
    lora_linear(**changed)
    assert len(launches.made) == 2 and not launches.again
    # Each of the two again, which must find what its own launch has kept.
    for once in (t, changed):
        lora_linear(**once)
    assert len(launches.made) == 2 and len(launches.again) == 2
    for given, once in zip(launches.again, (t, changed), strict=True):
        assert has_addresses_of(given, once)
    assert len(launches.plans) == (1 if other == "dimensions" else 2)


def test_another_pattern_of_as_many_slices_is_another_launch(launches: Launches) -> None:
    t = problem()
    t["lora_B"] = t["lora_B"][:24].contiguous()
    for pattern in ((True, False), (False, True), (True, False)):
        lora_linear(**t, enable_lora=pattern)
    assert len(launches.made) == 2 and len(launches.again) == 1


def autocast(t: dict[str, Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        lora_linear(**t)


def counted(t: dict[str, Any]) -> None:
    with fused_lora.count_paths() as paths:
        lora_linear(**t)
    assert paths == {"forward/decode": 1}


def within(block: Callable[[], Any], requires_grad: bool = False) -> Callable[[dict[str, Any]], None]:
    def call(t: dict[str, Any]) -> None:
        with block():
            lora_linear(**t | {"x": t["x"].detach().requires_grad_(requires_grad)})

    return call


@contextmanager
def instrumented() -> Iterator[None]:
    """For one call, since its kernel is then found as any other's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs.compilation, "instrumentation_mode", f"mode {next(MODES)}")
        yield


MODES = itertools.count()


class Subclass(torch.Tensor):
    pass


LONG_WAYS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a gradient is wanted": within(torch.enable_grad, requires_grad=True),
    "autocast": autocast,
    "paths are counted": counted,
    "another backend": within(lambda: fused_lora.use_backend("unfused")),
    "Triton instruments": within(instrumented),
    "batch_invariant": within(fused_lora.batch_invariant),
    "a mask": lambda t: lora_linear(**t, training=True, dropout_p=0.5),
    "a tensor for scaling": lambda t: lora_linear(**t | {"scaling": torch.tensor(0.5)}),
    "a subclass": lambda t: lora_linear(**t | {"x": t["x"].as_subclass(Subclass)}),
}


@pytest.mark.parametrize("way", LONG_WAYS)
def test_whatever_else_matters_goes_the_long_way(launches: Launches, way: str) -> None:
    t = problem()
    lora_linear(**t)
    for _ in range(2):
        LONG_WAYS[way](t)
    assert not launches.again
    lora_linear(**t)
    assert len(launches.again) == 1


def test_compiled_code_neither_repeats_nor_asks_where_tensors_are(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU that is current is asked for by a function that dynamo cannot trace."""
    t = problem()
    y = lora_linear(**t)
    monkeypatch.setattr(repeat, "here", lambda x: pytest.fail("asked while dynamo traces"))
    compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(**t), y)
    assert not launches.again


def test_a_tensor_elsewhere_than_on_the_current_gpu_goes_the_long_way(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = problem()
    lora_linear(**t)
    monkeypatch.setattr(repeat, "here", lambda x: False)
    lora_linear(**t)
    assert len(launches.made) == 2 and not launches.again


@pytest.mark.parametrize(
    "t",
    [
        problem(dtype=torch.float32),
        problem(0),
        problem(x=torch.randn(3, 2, 32, dtype=torch.bfloat16).transpose(0, 1)),
        problem(x=torch.randn(32, dtype=torch.bfloat16)),
    ],
    ids=["float32", "no rows", "rows that are no matrix", "one dimension"],
)
def test_what_is_no_single_launch_is_not_remembered(launches: Launches, t: dict[str, Any]) -> None:
    ys = [lora_linear(**t) for _ in range(3)]
    assert not launches.again and all(torch.equal(y, ys[0]) for y in ys)


def test_bad_arguments_are_refused_after_good_ones(launches: Launches) -> None:
    t = problem()
    lora_linear(**t)
    for changed in ({"dropout_p": 2.0}, {"row_offset": -1}, {"column_offset": -1}, {"scaling": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(changed))):
            lora_linear(**t | changed)
    with pytest.raises(ValueError, match="bias has shape"):
        lora_linear(**t | {"bias": torch.randn(47, dtype=torch.bfloat16)})


def test_hooks_see_the_tensors(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    t = problem()
    lora_linear(**t)
    monkeypatch.setattr(launch, "watched", lambda: True)
    y = lora_linear(**t)
    (plan,) = launches.plans.values()
    (given,) = plan.watched
    assert given["x_ptr"] is t["x"] and given["weight_ptr"] is t["weight"] and given["out_ptr"] is y
    assert not plan.launched


def test_a_layer_in_eval_mode_repeats_its_calls(launches: Launches) -> None:
    layer = fused_lora.Linear(32, 48, r=4, merge_weights=False, lora_dropout=0.1).bfloat16().eval()
    for _ in range(3):
        layer(torch.randn(5, 32, dtype=torch.bfloat16))
    assert len(launches.made) == 1 and len(launches.again) == 2


def test_few_calls_are_kept(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_MOST_CALLS", 2)
    for rows in (1, 2, 3, 3, 2, 1):
        lora_linear(**problem(rows))
    assert len(repeat._calls) == 2 and len(launches.again) == 2


def adapted(r: int = 4, dtype: torch.dtype = torch.float32, **changed: Any) -> dict[str, Any]:
    """A convolution's weight of 6 x 3 x 2 x 2 elements and its factors, which are to be trained."""
    shapes = {"weight": (6, 3, 2, 2), "lora_A": (r, 6), "lora_B": (12, r)}
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return {n: t.requires_grad_(n != "weight") for n, t in tensors.items()} | {"scaling": 0.5} | changed


def launched_for(t: dict[str, Any]) -> dict[str, Any]:
    addresses = {name: t[name].data_ptr() for name in ("weight", "lora_A", "lora_B")}
    return {"base_ptr": addresses["weight"], "left_ptr": addresses["lora_B"], "right_ptr": addresses["lora_A"]}


@pytest.mark.parametrize("grad", [True, False])
def test_a_weight_is_made_again_with_its_own_tensors_and_gradients(launches: Launches, grad: bool) -> None:
    problems = [adapted() for _ in range(3)]
    with torch.set_grad_enabled(grad):
        weights = [effective_weight(**t) for t in problems]
    assert len(launches.made) == 1 and len(launches.again) == 2
    for given, weight, t in zip(launches.again, weights[1:], problems[1:], strict=True):
        assert given == launched_for(t) | {"index_ptr": None, "out_ptr": weight.data_ptr(), "panel_ptr": None}
        assert weight.shape == t["weight"].shape and weight.stride() == t["weight"].stride()
        assert weight.requires_grad == grad
    if grad:
        dw, t = torch.randn(6, 3, 2, 2), problems[2]
        da, db = torch.autograd.grad(weights[2], [t["lora_A"], t["lora_B"]], dw)
        torch.testing.assert_close(da, 0.5 * t["lora_B"].T @ dw.view(12, 6))
        torch.testing.assert_close(db, 0.5 * dw.view(12, 6) @ t["lora_A"].T)


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """Equal to tensor, one element behind an aligned address."""
    return torch.cat([tensor.new_zeros(1), tensor.detach().flatten()])[1:].view(tensor.shape)


OTHER_WEIGHTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "rank": lambda t: adapted(5),
    "dtype": lambda t: adapted(dtype=torch.float16),
    "dtype of the adapter": lambda t: t | {"weight": t["weight"].bfloat16()},
    "scaling": lambda t: t | {"scaling": 0.25},
    "dimensions": lambda t: t | {"weight": t["weight"].view(6, 3, 4)},
    "strides of weight": lambda t: t | {"weight": t["weight"].view(12, 6).T.contiguous().T},
    "strides of lora_A": lambda t: t | {"lora_A": t["lora_A"].T.contiguous().T},
    "strides of lora_B": lambda t: t | {"lora_B": t["lora_B"].T.contiguous().T},
    **{f"alignment of {n}": lambda t, n=n: t | {n: moved(t[n])} for n in ("weight", "lora_A", "lora_B")},
}


@pytest.mark.parametrize("other", OTHER_WEIGHTS)
def test_what_another_weight_comes_of_goes_another_way(launches: Launches, other: str) -> None:
    t = adapted()
    changed = OTHER_WEIGHTS[other](t)
    for once in (t, changed, t, changed):
        effective_weight(**once)
    assert len(launches.made) == 2 and len(launches.again) == 2
    for given, once in zip(launches.again, (t, changed), strict=True):
        assert given | launched_for(once) == given


def test_a_weight_in_another_memory_format_is_copied_first_each_time(launches: Launches) -> None:
    t = adapted()
    expected = effective_weight(**t)
    for _ in range(2):
        weight = effective_weight(**t | {"weight": t["weight"].to(memory_format=torch.channels_last)})
        assert torch.equal(weight, expected) and weight.is_contiguous(memory_format=torch.channels_last)
    assert len(launches.made) == 3 and not launches.again


WEIGHTS_LONG_WAYS: dict[str, Callable[[], Any]] = {
    "paths are counted": fused_lora.count_paths,
    "another backend": lambda: fused_lora.use_backend("reference"),
    "other tiles": lambda: lookup.use_tiles(SAFE),
    "Triton instruments": instrumented,
}


@pytest.mark.parametrize("way", WEIGHTS_LONG_WAYS)
def test_whatever_else_matters_to_a_weight_goes_the_long_way(launches: Launches, way: str) -> None:
    t = adapted()
    effective_weight(**t)
    for _ in range(2):
        with WEIGHTS_LONG_WAYS[way]():
            effective_weight(**t)
    effective_weight(**t | {"weight": t["weight"].as_subclass(Subclass)})
    assert not launches.again
    effective_weight(**t)
    assert len(launches.again) == 1


def test_bad_factors_are_refused_after_good_ones(launches: Launches) -> None:
    t = adapted()
    effective_weight(**t)
    with pytest.raises(ValueError, match="scaling"):
        effective_weight(**t | {"scaling": float("nan")})
    with pytest.raises(TypeError, match="lora_B is"):
        effective_weight(**t | {"lora_B": t["lora_B"].double()})


def test_hooks_see_a_weights_tensors(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    t = adapted()
    effective_weight(**t)
    monkeypatch.setattr(launch, "watched", lambda: True)
    weight = effective_weight(**t)
    (plan,) = launches.plans.values()
    (given,) = plan.watched
    assert given["base_ptr"] is t["weight"] and given["out_ptr"] is weight and not plan.launched


def test_a_convolution_in_training_repeats_its_weight(launches: Launches) -> None:
    layer = fused_lora.Conv2d(3, 4, 3, r=2)
    with torch.enable_grad():
        for _ in range(3):
            layer(torch.randn(1, 3, 5, 5))
    assert len(launches.made) == 1 and len(launches.again) == 2
