"""Float32 adapters are rounded to x's dtype once, where the copy engine reads them, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from fused_lora import fused
from fused_lora.kernels import config, own_panel
from fused_lora.kernels.launch import describable
from fused_lora.kernels.narrow import MOST_COLUMNS, narrow
from fused_lora.reference import Dropout


def strided(rows: int, columns: int, device: str) -> Tensor:
    return torch.randn(3 * columns, 2 * rows, device=device).T[::2, 1::3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("ranks", "K", "N", "r"),
    [(1, 1, 1, 1), (16, 64, 48, 16), (21, 53, 37, 7), (3, MOST_COLUMNS + 1, 5, 3), (130, 40, 9, MOST_COLUMNS + 2)],
    ids=str,
)
def test_both_are_rounded_and_readable(device: str, ranks: int, K: int, N: int, r: int, dtype: torch.dtype) -> None:
    factors = strided(ranks, K, device), strided(N, r, device)
    for factor, special in zip(factors, (torch.inf, torch.nan), strict=True):
        factor[-1, -1] = special
    before = [factor.clone() for factor in factors]
    for rounded, factor, given in zip(narrow(*factors, dtype), factors, before, strict=True):
        torch.testing.assert_close(rounded, given.to(dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(factor, given, rtol=0, atol=0, equal_nan=True)
        assert describable(rounded)


class Narrowed:
    """Counts what is narrowed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(fused, "narrow", self)

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.count += 1
        assert all(factor.numel() > 0 for factor in arguments[:2])
        return narrow(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts under the interpreter's table, unused on a GPU")
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("r", [8, 40])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_once_a_forward_and_once_a_backward(
    monkeypatch: pytest.MonkeyPatch, adapter_dtype: torch.dtype, r: int, p: float
) -> None:
    x, weight, dy = (torch.randn(*size).bfloat16() for size in ((48, 32), (272, 32), (48, 272)))
    lora_A, lora_B = (torch.randn(*size).to(adapter_dtype) for size in ((r, 32), (272, r)))
    assert own_panel.tile_of(x.device, x.dtype, 48, 32, 272) is None
    narrowed, wide = Narrowed(monkeypatch), adapter_dtype == torch.float32
    dropout = Dropout(torch.tensor([3]), int(65536 * p)) if p > 0 else None
    y, xa, bits = fused.forward(x, weight, None, lora_A, lora_B, scaling=0.5, dropout=dropout)
    assert narrowed.count == wide
    options = {"bits": bits, "scaling": 0.5, "dtype": torch.float32, "enable_lora": (True,)}
    dx, da, db = fused.backward(dy, x, weight, lora_A, lora_B, xa, **options)
    assert narrowed.count == 2 * wide
    rounded = lora_A.bfloat16(), lora_B.bfloat16()
    found = fused.forward(x, weight, None, *rounded, scaling=0.5, dropout=dropout)
    assert torch.equal(y, found[0]) and torch.equal(xa, found[1])
    for one, other in zip((dx, da, db), fused.backward(dy, x, weight, *rounded, xa, **options), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sizes", [(48, 0, 272), (48, 32, 0), (0, 32, 272)], ids=str)
def test_nothing_is_narrowed_where_there_is_nothing(
    monkeypatch: pytest.MonkeyPatch, device: str, sizes: tuple[int, int, int]
) -> None:
    M, K, N = sizes
    narrowed = Narrowed(monkeypatch)
    x, weight = torch.randn(M, K, device=device).bfloat16(), torch.randn(N, K, device=device).bfloat16()
    lora_A, lora_B = torch.randn(40, K, device=device), torch.randn(N, 40, device=device)
    y, _, _ = fused.forward(x, weight, None, lora_A, lora_B, scaling=0.5, dropout=None)
    assert not y.any() and narrowed.count <= (M == 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="replaces the interpreter's table, unused on a GPU")
def test_tables_without_the_copy_engine_read_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    narrowed = Narrowed(monkeypatch)
    monkeypatch.setattr(fused, "tiles_for", lambda *_: config.AMPERE)
    x, weight = torch.randn(48, 32).bfloat16(), torch.randn(272, 32).bfloat16()
    fused.forward(x, weight, None, torch.randn(8, 32), torch.randn(272, 8), scaling=0.5, dropout=None)
    assert narrowed.count == 0
