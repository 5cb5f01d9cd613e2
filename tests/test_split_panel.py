"""A panel by the copy engine: against float64, with a mask and without, of parts, and that parts leave no trace."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from fused_lora import fused, reference, unfused
from fused_lora.kernels import config, launch, split_panel
from fused_lora.kernels.flags import flags_for
from fused_lora.reference import Dropout, dropout_threshold

SIZES = [(1, 16, 16), (33, 48, 8), (50, 96, 64), (17, 160, 40), (100, 528, 136), (300, 64, 128), (256, 1024, 16)]


def problem(M: int, K: int, R: int, backward: bool, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """left [M, K], and factor [K, R] as lora_B lies in a backward, or as lora_A.T does in a forward."""
    left, factor = torch.randn(M, K, device=device), torch.randn(R, K, device=device) * K**-0.5
    return left.to(dtype), factor.to(dtype).T.contiguous() if backward else factor.to(dtype).T


def in_parts(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    for name in ("layout_of", "drawn_layout_of"):
        layout_of = getattr(split_panel, name).__wrapped__
        monkeypatch.setattr(split_panel, name, lambda *of, layout_of=layout_of: (layout_of(*of)[0], splits))


def mask_of(device: str, row_offset: int = 0, column_offset: int = 0) -> Dropout:
    return Dropout(torch.tensor([2**61 + 7], device=device), dropout_threshold(0.3), row_offset, column_offset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 4, 16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_float64(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    sizes: tuple[int, int, int],
    splits: int,
    backward: bool,
    dtype: torch.dtype,
) -> None:
    in_parts(monkeypatch, splits)
    left, factor = problem(*sizes, backward, dtype, device)
    assert split_panel.takes(left, factor)
    expected = -1.5 * (left.double() @ factor.double())
    found = split_panel.split_panel(left, factor, -1.5)[0]
    by_torch = torch.addmm(left.new_empty(1), left, factor, beta=0, alpha=-1.5)
    bound = max(2 * (by_torch - expected).abs().max(), torch.finfo(dtype).eps * expected.abs().max())
    assert found.dtype == dtype and found.is_contiguous() and (found - expected).abs().max() <= bound
    assert torch.equal(found, split_panel.split_panel(left, factor, -1.5)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# The interpreter has one tile for masks.
@pytest.mark.parametrize("many", [False, True] if torch.cuda.is_available() else [False])
@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("sizes", [(1, 16, 16), (33, 48, 8), (50, 160, 64), (70, 272, 128), (130, 528, 40)], ids=str)
@pytest.mark.parametrize(("row_offset", "column_offset"), [(0, 0), (2**33 + 5, 2**34 + 8)])
def test_with_a_mask_against_float64(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    sizes: tuple[int, int, int],
    splits: int,
    many: bool,
    dtype: torch.dtype,
    row_offset: int,
    column_offset: int,
) -> None:
    """Bits are the contract's, those of the last columns too, and what is dropped is never multiplied."""
    monkeypatch.setattr(split_panel, "processors", lambda device: 1 if many else 2**20)
    in_parts(monkeypatch, splits)
    left, factor = problem(*sizes, splits == 2, dtype, device)
    dropout = mask_of(device, row_offset, column_offset)
    keep = dropout.mask(*left.shape)
    left = left.where(keep, torch.nan)
    assert split_panel.takes(left, factor, dropout)
    found, bits = split_panel.split_panel(left, factor, -1.5, dropout)
    assert bits is not None and torch.equal(bits, dropout.bits(*left.shape))
    kept, scale = left.where(keep, 0), -1.5 / dropout.keep_probability
    expected = scale * (kept.double() @ factor.double())
    by_torch = torch.addmm(left.new_empty(1), kept, factor, beta=0, alpha=scale)
    bound = max(2 * (by_torch - expected).abs().max(), torch.finfo(dtype).eps * expected.abs().max())
    assert found.dtype == dtype and (found - expected).abs().max() <= bound
    assert torch.equal(found, split_panel.split_panel(left, factor, -1.5, dropout)[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("sizes", [(1, 16, 16), (33, 48, 8), (50, 96, 72)], ids=str)
def test_every_address_is_one_of_its_arguments(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int], splits: int, drawn: bool, backward: bool
) -> None:
    from interpreter import checked_addresses

    in_parts(monkeypatch, splits)
    left, factor = problem(*sizes, backward, torch.bfloat16, "cpu")
    with checked_addresses() as counts:
        split_panel.split_panel(left, factor, 1.0, mask_of("cpu") if drawn else None)
    assert counts["launches"] == 1


def test_it_reads_columns_and_rows_of_something_larger(device: str) -> None:
    wide, factors = torch.randn(40, 160, device=device).half(), torch.randn(96, 64, device=device).half()
    left, factor = wide[3:, 32:128], factors[:, 16:56]
    assert split_panel.takes(left, factor)
    expected = split_panel.split_panel(left.contiguous(), factor.contiguous(), 1.0)[0]
    assert torch.equal(split_panel.split_panel(left, factor, 1.0)[0], expected)
    assert (expected - left.double() @ factor.double()).abs().max() < 0.05


def test_parts_are_added_in_their_order(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """In float32 the sum of these depends on it: 2^24 + 1 is 2^24."""
    in_parts(monkeypatch, 4)
    left, factor = torch.zeros(20, 64 * 4, device=device).half(), torch.ones(8, 64 * 4, device=device).half().T
    for part, value in enumerate((4096.0, 1.0, -4096.0, 1.0)):
        left[:, 64 * part] = value
        factor[64 * part] = abs(value)
    assert torch.equal(split_panel.split_panel(left, factor, 1.0)[0], left.new_full((20, 8), 1.0))


def test_parts_leave_words_at_zero(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """A part that is infinite, and one that is missing where programs run out of steps, come to light."""
    in_parts(monkeypatch, 8)
    given: list[Tensor] = []
    monkeypatch.setattr(split_panel, "flags_for", lambda *of: given.append(flags_for(*of)) or given[-1])
    left, factor = problem(70, 16 * 7, 24, False, torch.bfloat16, device)
    left[5, 16 * 6] = torch.inf
    found = split_panel.split_panel(left, factor, 1.0)[0]
    expected = left.double() @ factor.double()
    assert torch.equal(found.isfinite(), expected.isfinite())
    kept = found.isfinite()
    assert (found - expected)[kept].abs().max() < 0.05
    assert given and not any(words.any() for words in given)


@pytest.mark.parametrize(
    ("M", "K", "R", "rows", "splits"),
    [
        (8192, 4096, 128, 64, 1),
        (8192, 4096, 16, 64, 1),
        (2048, 4096, 128, 64, 2),
        (512, 4096, 128, 32, 8),
        (256, 4096, 128, 32, 8),
        (512, 4096, 8, 32, 8),
        (256, 14336, 128, 32, 16),
        (8192, 16, 16, 64, 1),
    ],
)
def test_the_tile_and_parts_that_took_the_least_time_on_an_h200(
    monkeypatch: pytest.MonkeyPatch, M: int, K: int, R: int, rows: int, splits: int
) -> None:
    monkeypatch.setattr(split_panel, "processors", lambda device: 132)
    split_panel.layout_of.cache_clear()
    tile, found = split_panel.layout_of(torch.device("cuda"), M, K, R)
    assert (tile.block_m, found) == (rows, splits)
    split_panel.layout_of.cache_clear()


@pytest.mark.parametrize(
    ("M", "K", "R", "warps", "splits"),
    [
        (8192, 4096, 16, 2, 2),
        (4096, 14336, 16, 2, 4),
        (2048, 4096, 16, 4, 8),
        (512, 4096, 32, 4, 16),
        (16384, 4096, 8, 2, 1),
        (8192, 14336, 64, 2, 2),
        (4096, 4096, 33, 2, 4),
        (2048, 4096, 64, 4, 4),
        (512, 4096, 64, 4, 8),
        (8192, 4096, 128, 4, 1),
        (4096, 14336, 65, 4, 2),
        (128, 4096, 128, 4, 8),
        (128, 512, 8, 4, 4),
        (8192, 128, 8, 2, 1),
    ],
)
def test_the_tile_and_parts_of_a_mask(
    monkeypatch: pytest.MonkeyPatch, M: int, K: int, R: int, warps: int, splits: int
) -> None:
    """Those that took the least time on an H200, or a few per cent more."""
    monkeypatch.setattr(split_panel, "processors", lambda device: 132)
    tile, found = split_panel.drawn_layout_of.__wrapped__(torch.device("cuda"), M, K, R)
    assert (tile.num_warps, found) == (warps, splits)
    assert tile.block_r(R) >= R


def refused(device: str) -> dict[str, tuple[Tensor, Tensor]]:
    left, factor = torch.randn(32, 64, device=device).half(), torch.randn(64, 8, device=device).half()
    return {
        "no rows": (left[:0], factor),
        "no ranks": (left, factor[:, :0]),
        "another dtype": (left, factor.float()),
        "odd columns to read": (torch.randn(32, 72, device=device).half(), torch.randn(72, 8, device=device).half()),
        "four bytes": (left.float(), factor.float()),
        "odd rows": (torch.randn(32, 65, device=device).half()[:, :64], factor),
        "odd columns": (left[:, ::2], factor[:32]),
        "odd ranks": (left, torch.randn(64, 7, device=device).half()),
        "an odd address": (torch.randn(32, 128, device=device).half()[:, 1:65], factor),
    }


@pytest.mark.parametrize("case", refused("cpu"))
def test_what_the_copy_engine_cannot_read_is_cublass(device: str, case: str) -> None:
    left, factor = refused(device)[case]
    assert not split_panel.takes(left, factor)
    found = fused.undrawn_panel(left, factor, 0.5)
    expected = 0.5 * (left.double() @ factor.double())
    assert found.shape == expected.shape and found.dtype == left.dtype
    assert expected.numel() == 0 or (found - expected).abs().max() < 0.05


@pytest.mark.parametrize("case", [*refused("cpu"), "many ranks", "a column within a byte", "nothing"])
def test_a_mask_is_drawn_alone_where_the_copy_engine_cannot_read_or_it_would_be_drawn_twice(
    monkeypatch: pytest.MonkeyPatch, device: str, case: str
) -> None:
    taken = {
        "many ranks": problem(33, 48, 136, False, torch.float16, device),
        "a column within a byte": problem(33, 48, 8, False, torch.float16, device),
        "nothing": problem(33, 48, 128, False, torch.float16, device),
    }
    left, factor = (refused(device) | taken)[case]
    dropout = mask_of(device, column_offset=3 if case == "a column within a byte" else 8)
    alone: list[Tensor] = []
    drop = fused.mask.drop
    monkeypatch.setattr(fused.mask, "drop", lambda x, dropout: alone.append(x) or drop(x, dropout))
    found, bits = fused.drawn_panel(left, factor, 0.5, dropout)
    # What is merely in another dtype is converted.
    assert bool(alone) == (case not in ("nothing", "another dtype"))
    assert torch.equal(bits, dropout.bits(*left.shape))
    kept = left.double().where(dropout.mask(*left.shape), 0)
    expected = 0.5 / dropout.keep_probability * (kept @ factor.double())
    assert found.shape == expected.shape and found.dtype == left.dtype
    assert expected.numel() == 0 or (found - expected).abs().max() < 0.05


@pytest.mark.parametrize("path", [fused, unfused], ids=["fused", "unfused"])
@pytest.mark.parametrize(("r", "K", "odd"), [(8, 48, False), (72, 48, False), (8, 40, False), (8, 48, True)])
def test_a_forward_draws_its_mask_and_its_panel_at_once(
    monkeypatch: pytest.MonkeyPatch, device: str, path: ModuleType, r: int, K: int, odd: bool
) -> None:
    """But for sizes that are no multiples of 16, and rows at odd addresses, whose mask is drawn by a launch alone."""
    at_once: list[tuple[Dropout, ...]] = []
    real = split_panel.split_panel
    monkeypatch.setattr(split_panel, "split_panel", lambda *of: (at_once.append(of[3:]), real(*of))[1])
    alone: list[Tensor] = []
    drop = fused.mask.drop
    monkeypatch.setattr(fused.mask, "drop", lambda x, dropout: alone.append(x) or drop(x, dropout))
    x, weight = torch.randn(40, K + 1, device=device).half(), torch.randn(64, K, device=device).half() * K**-0.5
    x = x[:, 1:] if odd else x[:, 1:].contiguous()
    lora_A, lora_B = torch.randn(r, K, device=device).half() * K**-0.5, torch.randn(64, r, device=device).half()
    dropout = mask_of(device)
    _, xa, bits = path.forward(x, weight, None, lora_A, lora_B, scaling=0.5, dropout=dropout)
    assert ((dropout,) in at_once) == (K % 16 == 0 and not odd)
    assert bool(alone) == (odd or (path is unfused and K % 16 != 0))
    _, exact, same = reference.forward(
        x.double(), weight.double(), None, lora_A.double(), lora_B.double(), scaling=0.5, dropout=dropout
    )
    assert torch.equal(bits, same) and (xa - exact).abs().max() < 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="replaces the interpreter's table, unused on a GPU")
def test_a_table_without_the_copy_engine_leaves_it_to_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    left, factor = problem(32, 64, 16, False, torch.bfloat16, "cpu")
    monkeypatch.setattr(split_panel, "tiles_for", lambda *_: config.AMPERE)
    assert not split_panel.takes(left, factor)


@pytest.mark.parametrize(("ranks", "read", "plain"), [(64, 0, True), (72, 0, False), (72, 40 * 64, True)])
def test_large_panels_of_many_ranks_are_cublass(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, read: int, plain: bool
) -> None:
    left, factor = problem(40, 64, ranks, False, torch.bfloat16, device)
    by_cublas: list[Tensor] = []
    monkeypatch.setattr(fused, "_FEW_READ", read)
    monkeypatch.setattr(fused, "product", lambda *of: by_cublas.append(reference.product(*of)) or by_cublas[-1])
    found = fused.undrawn_panel(left, factor, 0.5)
    assert (not by_cublas) == plain
    assert (found - 0.5 * (left.double() @ factor.double())).abs().max() < 0.05


def test_float32_factors_are_rounded_to_the_rows_dtype(device: str) -> None:
    left, factor = problem(40, 64, 16, False, torch.bfloat16, device)
    wide = factor.float() * (1 + 2**-10)
    expected = fused.undrawn_panel(left, wide.bfloat16(), 1.0)
    assert torch.equal(fused.undrawn_panel(left, wide, 1.0), expected)


def test_what_a_profiler_is_told() -> None:
    left, factor, panel = torch.empty(8, 64).half(), torch.empty(4, 64).half(), torch.empty(8, 4).half()
    arguments: dict[str, Any] = {"left_ptr": left, "factor_ptr": factor, "panel_ptr": panel, "bits_ptr": None, "I": 64}
    work = split_panel._work(None, None, arguments)
    assert work == {"name": "split_panel", "flops16": 2 * 8 * 64 * 4, "bytes": 2 * (8 * 64 + 4 * 64 + 8 * 4)}
    drawn = split_panel._work(None, None, arguments | {"bits_ptr": torch.empty(8, 8, dtype=torch.uint8)})
    assert drawn == work | {"bytes": work["bytes"] + 64}


COLD = """
import threading, torch
from fused_lora.kernels.split_panel import split_panel
left, factor = torch.randn(64, 256, device="cuda").half(), torch.randn(256, 16, device="cuda").half()
torch.cuda.synchronize()
found = []

def launch():
    found.append(split_panel(left, factor, 1.0)[0])

def capture():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    graph.replay()

for call in (launch, capture):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
torch.cuda.synchronize()
assert len(found) == 2 and torch.equal(*found)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
def test_a_thread_may_begin_with_it_and_capture_it() -> None:
    """A descriptor needs a context, which nothing has made current on a thread of autograd's or of a server's."""
    run = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def test_each_thread_makes_a_context_current_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: asked.append(threading.get_ident()))

    def describe() -> None:
        for _ in range(2):
            launch.Described(torch.empty(2, 8), (2, 8), (8, 1))

    threads = [threading.Thread(target=describe) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert len(asked) == 2
