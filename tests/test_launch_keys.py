"""What a compiled kernel is found by determines all that it is launched with, but for the addresses."""

from __future__ import annotations

from collections import OrderedDict
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

import fused_lora
from fused_lora import fused
from fused_lora.functional import effective_weight, lora_embedding, lora_linear
from fused_lora.kernels import (
    adapter_grad,
    decode_launch,
    extended,
    few_rows_grad,
    fused_linear,
    low_rank_update,
    mask,
    narrow,
    own_panel,
    panel,
    reduce,
    split_panel,
    token_grad,
)
from fused_lora.kernels import launch as module

LAUNCHERS = (
    adapter_grad,
    decode_launch,
    extended,
    few_rows_grad,
    own_panel,
    fused_linear,
    low_rank_update,
    mask,
    narrow,
    panel,
    split_panel,
    reduce,
    token_grad,
)


class Keys(OrderedDict):
    """A table of plans that never has one, and remembers what it was last asked for."""

    def get(self, key: Any, default: Any = None) -> Any:
        self.last = key
        return default


class Launches:
    """Stands in for `launch`; complains if one key comes with other arguments than before."""

    def __init__(self, keys: Keys) -> None:
        self.keys, self.seen, self.repeated = keys, {}, set()

    def __call__(self, kernel, tensors, facts, arguments, made=None, descriptors=None) -> None:
        made, descriptors = made or {}, descriptors or {}
        module.launch(kernel, tensors, facts, arguments, made, descriptors)
        fresh = {n: None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for n, t in made.items()}
        found = (*arguments(), fresh, {name: block for name, (_, block) in descriptors.items()})
        assert all(of is None or of[-1] == 0 for of in fresh.values()), f"{kernel} is given what is not aligned"
        before = self.seen.setdefault(self.keys.last, found)
        assert before == found, f"one key of {kernel} comes with {before} and with {found}"
        self.repeated |= {kernel} if before is not found else set()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    keys = Keys()
    monkeypatch.setattr(module, "_plans", keys)
    launches = Launches(keys)
    for launcher in LAUNCHERS:
        monkeypatch.setattr(launcher, "launch", launches)
    return launches


def linear(
    rows: int,
    r: int,
    dtypes,
    wanted: str,
    p: float,
    pattern: tuple[bool, ...],
    scaling: float,
    K: int = 24,
    N: int = 36,
    row_offset: int = 5,
) -> None:
    """A layer, forward and as much of its backward as is wanted."""
    dtype, adapter_dtype = dtypes
    enabled = sum(pattern)
    x, weight = torch.randn(rows, K).to(dtype), torch.randn(N, K).to(dtype)
    lora_A, lora_B = (torch.randn(*s).to(adapter_dtype) for s in ((enabled * r, K), (N // len(pattern) * enabled, r)))
    leaves = [t.requires_grad_() for t, name in ((x, "x"), (lora_A, "A"), (lora_B, "B")) if name in wanted]
    options = {"scaling": scaling, "dropout_p": p, "training": True, "row_offset": row_offset, "enable_lora": pattern}
    y = lora_linear(x, weight, lora_A, lora_B, seed=rows, **options)
    if leaves:
        torch.autograd.grad(y, leaves, torch.ones_like(y))


BEGIN, WAIT = "gdc_launch_dependents", "gdc_wait"
SINGLE, HALF = (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)
MIXED = (torch.bfloat16, torch.float32)


def test_one_key_means_one_launch(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(
        product(
            (SINGLE, HALF, MIXED), ("xAB", "B", ""), (0.0, 0.5), ((True,), (True, False, True), (False, True, True))
        )
    )
    for backend in ("triton", "unfused", "decode"):
        with fused_lora.use_backend(backend):
            for dtypes, wanted, p, pattern in cases:
                # The same again, and what differs from it in one number only.
                for rows, r, scaling in ((5, 4, 0.5), (5, 4, 0.5), (5, 5, 0.5), (5, 4, 0.25), (21, 4, 0.5)):
                    linear(rows, r, dtypes, wanted, p, pattern, scaling)
    with fused_lora.use_backend("unfused"):
        # What the copy engine can read, in one part and in several.
        for splits, p, (rows, r, scaling) in product(
            (1, 4), (0.0, 0.5, 0.25), ((5, 8, 0.5), (5, 8, 0.5), (5, 16, 0.5), (5, 8, 0.25), (21, 8, 0.5))
        ):
            plain, drawn = (split_panel._INTERPRETED[0], splits), (split_panel._DRAWN_INTERPRETED, splits)
            monkeypatch.setattr(split_panel, "layout_of", lambda *_, layout=plain: layout)
            monkeypatch.setattr(split_panel, "drawn_layout_of", lambda *_, layout=drawn: layout)
            linear(rows, r, HALF, "xAB", p, (True,), scaling, K=64, N=48)
            linear(rows, r, HALF, "xAB", p, (True,), scaling, K=64, N=48, row_offset=6)
    with fused_lora.use_backend("triton"):
        # Of so many outputs, the tiles compute the panel.
        for dtypes, pattern in product((HALF, MIXED), ((True,), (True, False, True))):
            for rows, r, scaling in ((5, 4, 0.5), (5, 4, 0.5), (5, 5, 0.5), (5, 4, 0.25), (300, 4, 0.5), (300, 4, 0.5)):
                linear(rows, r, dtypes, "", 0.0, pattern, scaling, K=32, N=144)
        # Of so many tiles of y, the first ones come with the panel, and the others in another launch.
        for dtypes, (rows, N) in product((HALF, MIXED), ((64, 224), (128, 240))):
            for r, scaling in ((4, 0.5), (4, 0.5), (5, 0.5), (4, 0.25)):
                linear(rows, r, dtypes, "", 0.0, (True,), scaling, K=48, N=N)
        # What begins while dx's GEMM runs is another kernel. Triton's interpreter knows neither of its instructions.
        for where, name in ((adapter_grad, WAIT), (reduce, WAIT), (adapter_grad, BEGIN), (extended, BEGIN)):
            monkeypatch.setattr(where, name, lambda: None)
        for overlaps, r, wanted in product((False, True), (4, 40), ("xA", "xAB")):
            monkeypatch.setattr(fused, "overlaps", lambda device, overlaps=overlaps: overlaps)
            linear(70, r, HALF, wanted, 0.5, (True,), 0.5, N=40)
    for dtype, adapter_dtype in (SINGLE, HALF, MIXED):
        with fused_lora.use_backend("triton"):
            for tokens, r in ((5, 4), (5, 4), (6, 4), (5, 3)):
                weight = torch.randn(7, 12).to(dtype)
                lora_A, lora_B = torch.randn(r, 7).to(adapter_dtype), torch.randn(12, r).to(adapter_dtype)
                lora_embedding(torch.zeros(tokens, dtype=torch.int64), weight, lora_A, lora_B)
                for vocabulary, padding, by_frequency in ((7, -1, False), (8, -1, False), (8, 2, False), (8, 2, True)):
                    panel_of_dy, wide = torch.randn(tokens, r).to(dtype), adapter_dtype
                    index = torch.zeros(tokens, dtype=torch.int64)
                    token_grad.grad_lora_A(panel_of_dy, index, vocabulary, padding, by_frequency, wide)
                effective_weight(weight, lora_B.T, lora_A.T)
                effective_weight(weight.view(7, 3, 2, 2), lora_B.T, lora_A.T)
    kernels = {name for launcher in LAUNCHERS for name in vars(launcher) if name.endswith("_kernel")}
    assert {kernel.fn.__name__ for kernel in launches.repeated} == kernels
