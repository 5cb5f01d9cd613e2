"""What begins while the launch before runs: which launches, in which order, and that they change no bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from fused_lora import fused
from fused_lora.kernels import adapter_grad, config, extended, few_rows_grad, fused_linear, narrow, panel, reduce
from fused_lora.kernels import launch as module

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def problem(
    rows: int, N: int, K: int, r: int, device: str, masked: bool = False, adapter_dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """All that backward takes, in bfloat16 but for the adapters."""
    sizes = {"dy": (rows, N), "x": (rows, K), "weight": (N, K), "lora_A": (r, K), "lora_B": (N, r), "xa": (rows, r)}
    tensors = {name: torch.randn(*size, device=device).bfloat16() for name, size in sizes.items()}
    tensors |= {name: tensors[name].to(adapter_dtype) for name in ("lora_A", "lora_B")}
    bits = torch.randint(0, 256, (rows, -(-K // 8)), dtype=torch.uint8, device=device) if masked else None
    return tensors | {"bits": bits, "scaling": 0.5, "dtype": torch.float32, "enable_lora": (True,)}


def backward(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], overlaps: bool) -> Gradients:
    with monkeypatch.context() as patched:
        patched.setattr(fused, "overlaps", lambda device: overlaps)
        return fused.backward(**given)


def assert_equal(some: Gradients, others: Gradients) -> None:
    for name, one, other in zip(("dx", "da", "db"), some, others, strict=True):
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name


class Launches:
    """Stands in for `launch`: notes each kernel, and what of it the GPU is told about overlapping."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.told: list[str] = []
        self.allocated_since: set[StorageWeakRef] = set()
        new_empty = Tensor.new_empty

        def allocate(*arguments: Any, **options: Any) -> Tensor:
            made = new_empty(*arguments, **options)
            self.allocated_since.add(StorageWeakRef(made.untyped_storage()))
            return made

        monkeypatch.setattr(Tensor, "new_empty", allocate)
        for launcher in (adapter_grad, extended, few_rows_grad, fused_linear, narrow, panel, reduce):
            monkeypatch.setattr(launcher, "launch", self)
        # Triton's interpreter knows neither instruction.
        for launcher, name in ((adapter_grad, WAIT), (reduce, WAIT), (adapter_grad, BEGIN), (extended, BEGIN)):
            monkeypatch.setattr(launcher, name, lambda name=name: self.told.append(name))

    def __call__(self, kernel, tensors, facts, arguments, made=None, descriptors=None) -> None:
        grid, others = arguments()
        followed, beside = others.get("FOLLOWED", False), others.get("BESIDE", False)
        assert others.get("launch_pdl", False) == beside
        name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
        self.seen.append(name + " followed" * followed + " beside" * beside)
        self.told.clear()
        if not beside:
            self.allocated_since.clear()
        elif name != "reduce":
            # Since then memory may have been freed that is still read: by dx, or by another thread's launch.
            written = {StorageWeakRef(t.untyped_storage()) for t in made.values() if t is not None}
            assert not written & self.allocated_since
        module.launch(kernel, tensors, facts, arguments, made or {}, descriptors or {})
        # Every program lets the next launch begin; all of a sum's wait for the one before, of others one.
        assert self.told.count(BEGIN) == (math.prod(grid) if followed else 0)
        assert self.told.count(WAIT) == (math.prod(grid) if beside and name == "reduce" else beside)


BEGIN, WAIT = "gdc_launch_dependents", "gdc_wait"
# Of more ranks than that, db is a read of dy by itself.
FEW, MANY = adapter_grad.FUSED_RANK, adapter_grad.FUSED_RANK + 1
AT_ONCE = ["adapter_grad followed", "reduce beside"]
BESIDE = "adapter_grad followed beside"
ONE = ["extended followed", BESIDE, "reduce beside"]
BOTH = ["extended followed", BESIDE, BESIDE, "reduce beside"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")
@pytest.mark.parametrize(
    ("r", "left_out", "expected"),
    [
        (FEW, "", [*AT_ONCE, *ONE]),
        (MANY, "", BOTH),
        (FEW, "x", [*AT_ONCE, "extended"]),
        (MANY, "x", ONE),
        (FEW, "xa", ["panel", *ONE]),
        (MANY, "x xa", ["extended"]),
        (FEW, "weight lora_A", [*AT_ONCE, "adapter_grad", "reduce"]),
        (MANY, "weight lora_A", ["adapter_grad", "adapter_grad", "reduce"]),
        (MANY, "weight lora_A lora_B x", ["adapter_grad", "reduce"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_begins_beside_what(
    monkeypatch: pytest.MonkeyPatch,
    r: int,
    left_out: str,
    expected: list[str],
    masked: bool,
    adapter_dtype: torch.dtype,
) -> None:
    given = problem(70, 40, 72, r, "cpu", masked, adapter_dtype) | dict.fromkeys(left_out.split())
    alone = backward(monkeypatch, given, False)
    if given["xa"] is not None:
        exact = given["dy"].double().T @ given["xa"].double()
        # Seventy products summed in float32.
        torch.testing.assert_close(alone[2], exact.float(), rtol=0, atol=70 * 2**-24 * exact.abs().max().item())
    if adapter_dtype == torch.float32 and given["lora_A"] is not None:
        expected = ["narrow", *expected]
    launches = Launches(monkeypatch)
    assert_equal(backward(monkeypatch, given, True), alone)
    assert launches.seen == expected
    launches.seen.clear()
    backward(monkeypatch, given, False)
    assert launches.seen == [name.split()[0] for name in expected]


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")
@pytest.mark.parametrize(
    ("r", "masked", "rows", "expected"),
    [
        (FEW, True, 32, [*AT_ONCE, "extended followed", BESIDE]),
        (FEW, True, 33, [*AT_ONCE, *ONE]),
        (MANY, True, 32, ["extended", "few_rows_grad"]),
        (MANY, True, 33, BOTH),
        (MANY, False, 64, ["extended", "few_rows_grad"]),
        (MANY, False, 65, BOTH),
    ],
)
def test_few_rows_take_fewer_launches(
    monkeypatch: pytest.MonkeyPatch, r: int, masked: bool, rows: int, expected: list[str]
) -> None:
    given = problem(rows, 40, 72, r, "cpu", masked)
    launches = Launches(monkeypatch)
    backward(monkeypatch, given, True)
    assert launches.seen == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")
@pytest.mark.parametrize("sizes", [(0, 40, 72), (50, 0, 72), (50, 40, 0)], ids=str)
@pytest.mark.parametrize("r", [FEW, MANY])
def test_nothing_begins_beside_a_dx_that_is_not_launched(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int], r: int
) -> None:
    given = problem(*sizes, r, "cpu")
    launches = Launches(monkeypatch)
    backward(monkeypatch, given, True)
    assert not {"extended followed", BESIDE} & set(launches.seen)


def cut_by_hopper(monkeypatch: pytest.MonkeyPatch, table: config.Tiles = config.HOPPER) -> list[dict[str, int]]:
    """What a Hopper GPU's launches of gradients would be given; nothing is launched."""
    seen: list[dict[str, int]] = []
    monkeypatch.setattr(adapter_grad, "tiles_for", lambda *sizes: table)
    monkeypatch.setattr(adapter_grad, "scaled", lambda rows, device: rows)
    monkeypatch.setattr(adapter_grad, "reduce", lambda *partials, **options: (None, None))
    monkeypatch.setattr(adapter_grad, "launch", lambda *of: seen.append(of[3]()[1]))
    return seen


def nothing(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    ("M", "K", "r", "masked", "rows"),
    [
        (8192, 4096, 16, True, 1024),
        # With a mask and up to 64 ranks a program has at most 2048 rows, unless there are so few that one has all.
        (8192, 14336, 16, True, 2048),
        (8192, 14336, 64, True, 2048),
        (8192, 14336, 128, True, 4096),
        (8192, 14336, 16, False, 4096),
        (2049, 14336, 16, True, 1088),
        (1024, 14336, 16, True, 1024),
    ],
)
def test_how_many_rows_of_a_gradient_a_program_adds_up(
    monkeypatch: pytest.MonkeyPatch, M: int, K: int, r: int, masked: bool, rows: int
) -> None:
    seen = cut_by_hopper(monkeypatch)
    bits = torch.empty(M, K // 8, dtype=torch.uint8, device="meta") if masked else None
    adapter_grad.prepared_grads(nothing(M, 16), None, nothing(M, r), nothing(M, K), bits, torch.bfloat16)()
    assert [each["ROWS"] for each in seen] == [rows]


@pytest.mark.parametrize(
    ("columns", "r", "slices", "own", "block"),
    [
        (8192, 16, 1, False, 512),
        (8176, 16, 1, False, 256),
        (8192, 17, 1, False, 256),
        (8192, 16, 3, False, 512),
        (8192, 16, 1, True, 256),
    ],
)
def test_many_columns_of_few_ranks_are_added_up_by_a_wider_tile(
    monkeypatch: pytest.MonkeyPatch, columns: int, r: int, slices: int, own: bool, block: int
) -> None:
    """Not in spite of a table that somebody measured."""
    seen = cut_by_hopper(monkeypatch, replace(config.HOPPER) if own else config.HOPPER)
    dy, lora_B, xa = nothing(64, slices * columns), nothing(slices * columns, r), nothing(64, slices * r)
    adapter_grad.grad_panels(dy, lora_B, xa, 1.0, torch.bfloat16, [True] * slices)
    assert [each["BLOCK_I"] for each in seen] == [block]


def test_where_kernels_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, overlaps in ((80, False), (89, False), (90, True), (94, False), (100, True), (120, False)):
        monkeypatch.setattr(config, "capability", lambda device, capability=capability: capability)
        assert config.overlaps(torch.device("cuda", 0)) == overlaps
        assert not config.overlaps(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
# Of float32, dx reads copies.
@pytest.mark.parametrize(
    ("r", "adapter_dtype"),
    [(16, torch.bfloat16), (64, torch.bfloat16), (128, torch.bfloat16), (4, torch.float32), (64, torch.float32)],
    ids=str,
)
# The first: dx takes a hundred times as long as what begins beside it, and no sum comes after that.
@pytest.mark.parametrize("sizes", [(128, 65536, 4096), (8192, 1024, 4096), (4096, 4096, 14336)], ids=str)
def test_the_same_bits_as_one_after_another(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int], r: int, adapter_dtype: torch.dtype, masked: bool
) -> None:
    if not config.overlaps(torch.device("cuda")):
        pytest.skip("kernels do not overlap on this GPU")
    given = problem(*sizes, r, "cuda", masked, adapter_dtype)
    alone = backward(monkeypatch, given, False)

    def step() -> Gradients:
        gradients = backward(monkeypatch, given, True)
        # Reads what has just been launched, at once.
        return tuple(gradient.clone() for gradient in gradients if gradient is not None)  # type: ignore[return-value]

    for _ in range(5):
        # The allocator gives dx this memory, so that whoever reads it too early finds NaN.
        poison = torch.full_like(given["x"], float("nan"))
        del poison
        assert_equal(step(), alone)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for gradient in captured:
            gradient.fill_(float("nan"))
        graph.replay()
        assert_equal(captured, alone)
