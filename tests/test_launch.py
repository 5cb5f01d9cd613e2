"""The table of compiled kernels: when one is launched again, and with what; the compiler here compiles nothing."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.knobs import HookChain
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.kernels import launch as module
from fused_lora.kernels.launch import launch

NAMES = ["x_ptr", "stride_x", "out_ptr", "seed_ptr", "SIZE"]
DEVICE, STREAM = 3, 1234


class Compiled:
    """A kernel for one set of facts, which notes what it is launched with, and what with while hooks are there."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.src = SimpleNamespace(fn=SimpleNamespace(arg_names=NAMES))
        self.launched: list[tuple[Any, ...]] = []
        self.watched: list[tuple[Any, ...]] = []
        self.streams: list[tuple[int, int]] = []

    def run(self, *arguments: Any) -> None:
        grid, (stream, function, metadata, launch_metadata, enter, leave) = arguments[:3], arguments[3:9]
        assert (function, metadata) == (self.function, self.packed_metadata)
        self.streams.append(stream)
        assert launch_metadata is None and enter is None and leave is None
        self.launched.append((grid, *arguments[9:]))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.watched.append((grid, *values))


class Kernel:
    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(**arguments: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return compile_and_launch

    def launch(self, x: Tensor, out: Tensor, seed: Tensor | None = None, *facts: Any, **more: Any) -> None:
        tensors = {"out_ptr": out, "x_ptr": x, "seed_ptr": seed}
        launch(self, tensors, facts, lambda: ((3,), {"stride_x": x.stride(0), "SIZE": 4}), **more)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(module, "CompiledKernel", Compiled)
    monkeypatch.setattr(module, "_plans", OrderedDict())
    current = itertools.count(STREAM)
    active = SimpleNamespace(
        get_current_device=lambda: DEVICE, get_current_stream=lambda device: (device, next(current))
    )
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    return Kernel()


def test_a_kernel_is_launched_again_with_the_new_tensors_where_their_names_are(kernel: Kernel) -> None:
    kernel.launch(torch.zeros(4), torch.zeros(4))
    x, out = torch.ones(4), torch.ones(4)
    kernel.launch(x, out)
    (compiled,) = kernel.compiled
    ((grid, *values),) = compiled.launched
    assert grid == (3, 1, 1)
    assert values == [x.data_ptr(), 1, out.data_ptr(), None, 4] and not compiled.watched


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("as_chain", [True, False])
def test_while_there_are_hooks_triton_launches_and_sees_the_tensors(
    kernel: Kernel, name: str, as_chain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, out = torch.ones(4), torch.ones(4)
    for _ in range(2):
        kernel.launch(x, out)
    chain = HookChain[Any]()
    chain.add(print)
    with monkeypatch.context() as hooked:
        hooked.setattr(knobs.runtime, name, chain if as_chain else print)
        kernel.launch(x, out)
    kernel.launch(x, out)
    (compiled,) = kernel.compiled
    ((grid, *values),) = compiled.watched
    assert grid == (3, 1, 1) and values[0] is x and values[2] is out
    assert len(compiled.launched) == 2


def test_each_way_in_which_triton_instruments_has_its_own_kernel(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in ("", "fpsan", "", "fpsan", ""):
        monkeypatch.setattr(knobs.compilation, "instrumentation_mode", mode)
        kernel.launch(torch.zeros(4), torch.zeros(4))
    assert [len(compiled.launched) for compiled in kernel.compiled] == [2, 1]


def test_triton_itself_has_no_hooks_until_they_are_asked_for() -> None:
    assert not module.watched()
    knobs.runtime.launch_enter_hook.add(print)
    assert module.watched()
    knobs.runtime.launch_enter_hook.remove(print)
    assert not module.watched()


def test_each_launch_is_on_the_stream_that_is_current_then(kernel: Kernel) -> None:
    for _ in range(3):
        kernel.launch(torch.zeros(4), torch.zeros(4))
    assert kernel.compiled[0].streams == [(DEVICE, STREAM), (DEVICE, STREAM + 1)]


def test_one_tensor_under_two_names_is_two_arguments(kernel: Kernel) -> None:
    x, out = torch.ones(4), torch.ones(4)
    kernel.launch(x, x)
    kernel.launch(x, out)
    assert len(kernel.compiled) == 1 and kernel.compiled[0].launched[0][3] == out.data_ptr()


@pytest.mark.parametrize("watched", [False, True])
def test_a_descriptor_takes_its_tensors_place(kernel: Kernel, watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "watched", lambda: watched)
    matrices = [torch.zeros(8, 32, dtype=torch.float16) for _ in range(2)]
    for matrix in matrices:
        kernel.launch(matrix, torch.zeros(4), descriptors={"x_ptr": (matrix, [4, 16])})
    (compiled,) = kernel.compiled
    ((_, descriptor, *_),) = compiled.watched if watched else compiled.launched
    assert descriptor.base is matrices[1] and descriptor.shape == (8, 32) and descriptor.strides == (32, 1)


@pytest.mark.parametrize("on_the_gpu", [False, True])
def test_tritons_launcher_makes_the_same_of_a_matrix_as_of_its_own_descriptor(
    on_the_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[tuple[Any, ...]] = []
    fill = SimpleNamespace(fill_tma_descriptor=fill_as(filled), fill_tma_descriptor_tiled=fill_as(filled))
    monkeypatch.setattr(nvidia.triton.runtime.driver, "_active", SimpleNamespace(utils=fill))
    matrix = torch.zeros(8, 32, dtype=torch.float16)
    metadata = {"swizzle": 2, "elem_size": 2, "elem_type": 6, "block_size": [4, 16], "fp4_padded": False}
    theirs, ours = (
        nvidia.make_tensordesc_arg(described, metadata if on_the_gpu else None)
        for described in (
            TensorDescriptor.from_tensor(matrix, [4, 16]),
            module.Described(matrix, matrix.shape, matrix.stride()),
        )
    )
    assert ours == theirs
    if on_the_gpu:
        assert len(filled) == 2 and filled[0] == filled[1] and filled[0][0] == matrix.data_ptr()


def fill_as(filled: list[tuple[Any, ...]]) -> Any:
    return lambda *arguments: filled.append(arguments) or "map"


@pytest.mark.parametrize("watched", [False, True])
def test_what_is_made_for_a_launch_determines_nothing(
    kernel: Kernel, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "watched", lambda: watched)
    x, out = torch.ones(4), torch.ones(4)
    made = [torch.ones(4), torch.ones(5)]
    for workspace in made:
        kernel.launch(x, out, None, made={"seed_ptr": workspace})
    (compiled,) = kernel.compiled
    ((*_, given, _),) = compiled.watched if watched else compiled.launched
    assert given is made[1] if watched else given == made[1].data_ptr()


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


class Bottom:
    """Stands in for the launcher in C."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)


def tritons_launcher(bottom: Bottom, signature: dict[int, str], **options: Any) -> Any:
    """Triton's own, whichever version is installed, above the stand-in; it is built with a GPU there only."""
    launcher = object.__new__(nvidia.CudaLauncher)
    launcher.launch = nvidia.wrap_handle_tensordesc(bottom, signature, [None] * str(signature).count("tensordesc"))
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, True
    launcher.arg_annotations, launcher.kernel_signature = "annotations", b"signature"
    launcher.global_scratch_align = launcher.profile_scratch_align = 16
    launcher.global_scratch_size = launcher.profile_scratch_size = 0
    launcher.gsan_enabled = False
    vars(launcher).update(options)
    return launcher


def plan_with(run: Any, monkeypatch: pytest.MonkeyPatch) -> module.Plan:
    monkeypatch.setattr(
        module,
        "driver",
        SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda d: STREAM, get_current_device=lambda: DEVICE)),
    )
    compiled = SimpleNamespace(
        run=run, function="f", packed_metadata="m", src=SimpleNamespace(fn=SimpleNamespace(arg_names=NAMES))
    )
    return module.Plan(compiled, (5, 6), {"SIZE": 16}, ["x_ptr", "out_ptr"])


@pytest.mark.parametrize("described", [False, True])
def test_what_is_made_ready_is_what_triton_gives_its_launcher(described: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = dict(enumerate(["tensordesc<fp16[16, 16]>" if described else "*fp16", "i32", "*fp16", "*i64", "i32"]))
    bottom, x = Bottom(), torch.zeros(4, 8)
    plan = plan_with(tritons_launcher(bottom, signature), monkeypatch)
    assert plan.launch_ready is bottom
    arguments = [module.Described(x, (4, 8), (8, 1)) if described else x.data_ptr(), 8, 1 << 20, None, 16]
    plan.launch_with(arguments)
    ready = plan.ready(arguments)
    assert len(bottom.calls) == 1 and ready == bottom.calls[0] and STREAM in ready
    # Triton itself goes on as before.
    plan.launch_with(arguments)
    plan.launch_ready(*ready)
    assert bottom.calls == [ready] * 3


def test_nothing_is_made_ready_for_a_launcher_that_allocates_or_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    bottom, signature = Bottom(), {0: "*fp16"}
    for name in ("global_scratch_size", "profile_scratch_size", "gsan_enabled"):
        assert plan_with(tritons_launcher(bottom, signature, **{name: 8}), monkeypatch).launch_ready is None
    unknown = tritons_launcher(bottom, signature, launch=lambda *arguments: bottom(*arguments))
    assert plan_with(unknown, monkeypatch).launch_ready is None
    assert plan_with(lambda *arguments: None, monkeypatch).launch_ready is None
