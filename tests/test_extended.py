"""The GEMM whose contraction goes on over the ranks: what it takes, accuracy at its edges, and whose numbers meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from numerics import assert_as_accurate_as

from fused_lora.kernels import config, extended, fused_linear

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")

TILE = config.INTERPRETER.linear
DTYPES = {"bfloat16": (torch.bfloat16,) * 2, "mixed": (torch.bfloat16, torch.float32), "float16": (torch.float16,) * 2}
# Rows, columns and steps that fill no tile; as many tiles as programs, and several for each.
SHAPES = [(33, 24, 72), (64, 16, 192), (150, 40, 136), (1, 8, 8)]
# Less than what the copy engine's rows are multiples of; a step, a part of one more, and several.
RANKS = [1, 4, 16, 17, 40]


def forward(
    rows: int,
    inner: int,
    columns: int,
    r: int,
    dtypes: str = "bfloat16",
    pattern: tuple[bool, ...] = (True,),
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments of fused_linear's forward."""
    dtype, adapter_dtype = DTYPES[dtypes]
    enabled = sum(pattern)
    return {
        "x": torch.randn(rows, inner, device=device).to(dtype),
        "weight": torch.randn(columns, inner, device=device).to(dtype),
        "bias": torch.randn(columns, device=device).to(dtype),
        "xa": torch.randn(rows, enabled * r, device=device).to(dtype),
        "lora_B": torch.randn(columns // len(pattern) * enabled, r, device=device).to(adapter_dtype),
        "enable_lora": pattern,
    }


def expected(t: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """By slices, in the given dtype."""
    x, weight, bias, xa, lora_B = (t[name].to(dtype) for name in ("x", "weight", "bias", "xa", "lora_B"))
    slices = list((x @ weight.T + bias).tensor_split(len(t["enable_lora"]), 1))
    enabled = [s for s, on in enumerate(t["enable_lora"]) if on]
    pieces = zip(xa.tensor_split(len(enabled), 1), lora_B.tensor_split(len(enabled)), strict=True)
    for s, (panel, factor) in zip(enabled, pieces, strict=True):
        slices[s] = slices[s] + panel @ factor.T
    return torch.cat(slices, 1)


def check(t: dict[str, Any]) -> Tensor:
    y = fused_linear.forward(**t)
    assert_as_accurate_as(y, expected(t, t["x"].dtype), expected(t, torch.float64), "y")
    return y


class Taken:
    """Which kernel each GEMM was launched as, and with which tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: list[tuple[str, dict[str, Tensor | None], dict[str, Any]]] = []
        for module in (extended, fused_linear):
            monkeypatch.setattr(module, "launch", self)

    def __call__(self, kernel, tensors, facts, arguments, made=None, descriptors=None) -> None:
        self.launched.append((kernel.fn.__name__, tensors, arguments()[1]))

    @property
    def names(self) -> list[str]:
        return [name.removeprefix("_").removesuffix("_kernel") for name, *_ in self.launched]


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.usefixtures("poisoned_allocations")
def test_forward_is_as_accurate_as_torch(shape: tuple[int, int, int], r: int, dtypes: str, device: str) -> None:
    t = forward(*shape, r, dtypes, device=device)
    y = check(t)
    # Both by another layout of the weight, and of lora_B.
    turned = t | {name: t[name].T.contiguous().T for name in ("weight", "lora_B")}
    assert torch.equal(check(turned), y)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.usefixtures("poisoned_allocations")
def test_a_mask_is_applied_to_the_ranks_alone(shape: tuple[int, int, int], r: int, dtypes: str, device: str) -> None:
    t = forward(*shape, r, dtypes, device=device)
    dy, weight, dyb, lora_A = t["x"], t["weight"].T, t["xa"], t["lora_B"].T
    bits = torch.randint(0, 256, (shape[0], -(-shape[2] // 8)), dtype=torch.uint8, device=device)
    keep = (bits[:, :, None] >> torch.arange(8, device=device, dtype=torch.uint8)) % 2 == 1
    keep = keep.reshape(shape[0], -1)[:, : shape[2]]

    def masked(dtype: torch.dtype) -> Tensor:
        return dy.to(dtype) @ weight.to(dtype) + torch.where(keep, dyb.to(dtype) @ lora_A.to(dtype), 0)

    dx = fused_linear.grad_input(dy, weight, dyb, lora_A, bits)
    assert_as_accurate_as(dx, masked(dy.dtype), masked(torch.float64), "dx")
    again = fused_linear.grad_input(dy, weight.contiguous(), dyb, lora_A.contiguous(), bits)
    assert torch.equal(again, dx)


@pytest.mark.parametrize("pattern", [(True, False, True), (False, True), (True, True, False)], ids=str)
@pytest.mark.parametrize("r", [1, 4, 8, 24])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_slices_of_whole_tiles(pattern: tuple[bool, ...], r: int, dtypes: str, device: str) -> None:
    width = 2 * TILE.block_j if device == "cpu" else 256
    check(forward(150, 40, width * len(pattern), r, dtypes, pattern, device))


@pytest.mark.parametrize("pattern", [(True, False, True), (False, True), (True, True, False)], ids=str)
@pytest.mark.parametrize("inner", [40, 64])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_slices_that_tiles_cross(pattern: tuple[bool, ...], inner: int, dtypes: str, device: str) -> None:
    """The other kernel, whose main loop the copy engine feeds here too."""
    t = forward(150, inner, 72 * len(pattern), 24, dtypes, pattern, device)
    assert torch.equal(check(t), check(t | {"weight": t["weight"].T.contiguous().T}))


@pytest.mark.parametrize("poisoned", ["xa", "lora_B"])
@pytest.mark.parametrize("slice", [0, 1])
def test_what_is_not_finite_stays_in_its_slice(poisoned: str, slice: int, device: str) -> None:
    """Not even in what is added for no rank of another slice, enabled or not."""
    width, r = TILE.block_j if device == "cpu" else 256, 8
    t = forward(70, 40, 4 * width, r, "bfloat16", (False, True, True, False), device)
    y = check(t)
    spoilt = t[poisoned].clone()
    (spoilt.T[slice * r : (slice + 1) * r] if poisoned == "xa" else spoilt[slice * width : (slice + 1) * width]).fill_(
        torch.inf
    )
    columns = torch.arange(4 * width, device=device) // width != slice + 1
    of_spoilt = fused_linear.forward(**t | {poisoned: spoilt})
    assert torch.equal(of_spoilt[:, columns], y[:, columns])
    assert not of_spoilt[:, ~columns].isfinite().any()


@interpreted
def test_what_the_copy_engine_reads_as_it_lies_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Taken(monkeypatch)
    plain = forward(33, 24, 72, 8)
    cases = [
        (plain, {"panel_ptr": True, "factor_ptr": True}),
        (plain | {"lora_B": plain["lora_B"].float()}, {"panel_ptr": True, "factor_ptr": False}),
        (plain | {"weight": plain["weight"].T.contiguous().T}, {"panel_ptr": True, "factor_ptr": False}),
        (forward(33, 24, 72, 12), {"panel_ptr": False, "factor_ptr": False}),
        (forward(33, 24, 72, 4, "mixed"), {"panel_ptr": False, "factor_ptr": False}),
        (forward(33, 24, 2 * TILE.block_j, 8, pattern=(True, True)), {"panel_ptr": True, "factor_ptr": True}),
        # Rows that the engine reads, of slices that it does not.
        (forward(33, 24, 2 * TILE.block_j, 4, pattern=(True, True)), {"panel_ptr": False, "factor_ptr": False}),
    ]
    for t, as_they_lie in cases:
        fused_linear.forward(**t)
        given = taken.launched[-1][1]
        found = {
            name: given[name].data_ptr() == t[of].data_ptr()
            for name, of in (("panel_ptr", "xa"), ("factor_ptr", "lora_B"))
        }
        assert found == as_they_lie
        assert all(given[name].dtype == torch.bfloat16 and given[name].stride(0) % 8 == 0 for name in found)


@interpreted
def test_what_is_left_to_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Taken(monkeypatch)
    whole, crossed = 2 * TILE.block_j, 2 * TILE.block_j + 8
    pattern = (True, True)
    t = forward(33, 24, 2 * whole, 8)
    apart = torch.cat([t["x"], t["x"]], 1)
    cases = {
        "extended": [t, t | {"x": apart[:, :24]}, forward(33, 24, 2 * whole, 8, pattern=pattern)],
        "fused_linear": [
            # An address, or rows, that the copy engine does not take.
            t | {"x": apart[:, 1:25]},
            forward(33, 20, 72, 8),
            forward(33, 24, 36, 8),
            # Nothing to contract.
            forward(33, 0, 72, 8),
            # Slices that tiles cross.
            forward(33, 24, 2 * crossed, 8, pattern=pattern),
        ],
    }
    for name, problems in cases.items():
        for t in problems:
            fused_linear.forward(**t)
            assert taken.names[-1] == name


def grad_input(rows: int, columns: int, r: int, masked: bool) -> None:
    dy, weight, dyb, lora_A = (
        torch.empty(*size, dtype=torch.bfloat16) for size in ((rows, 256), (256, columns), (rows, r), (r, columns))
    )
    bits = torch.empty(rows, columns // 8, dtype=torch.uint8) if masked else None
    fused_linear.grad_input(dy, weight, dyb, lora_A, bits)


@pytest.mark.parametrize(("r", "rank_steps"), [(1, 1), (64, 1), (65, 2), (128, 2)])
def test_ranks_are_steps_like_others(monkeypatch: pytest.MonkeyPatch, r: int, rank_steps: int) -> None:
    taken = Taken(monkeypatch)
    monkeypatch.setattr(fused_linear, "tiles_for", lambda *_: config.HOPPER)
    for masked, pieces in ((False, 2), (True, 4)):
        grad_input(512, 1024, r, masked)
        found = {name: taken.launched[-1][2][name] for name in ("PIECES", "RANK_STEPS", "STEPS")}
        assert found == {"PIECES": pieces, "RANK_STEPS": rank_steps, "STEPS": 256 // 64 + rank_steps}


def test_a_mask_is_left_to_the_other_kernel_where_it_has_no_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Taken(monkeypatch)
    for table, masked, name in (
        (config.HOPPER, True, "extended"),
        (config.BLACKWELL, False, "extended"),
        (config.BLACKWELL, True, "fused_linear"),
        (config.AMPERE, False, "fused_linear"),
    ):
        monkeypatch.setattr(fused_linear, "tiles_for", lambda *_, table=table: table)
        grad_input(512, 1024, 16, masked)
        assert taken.names[-1] == name
