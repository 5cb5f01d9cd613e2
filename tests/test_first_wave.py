"""A forward whose panel is computed in the first wave of tiles: accuracy, addresses, and which layers take it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from numerics import assert_as_accurate_as

from fused_lora import fused, reference
from fused_lora.kernels import config, decode_launch, first_wave
from fused_lora.kernels.first_wave import HOPPER, MOST_RANKS, RANK_STEP, fits

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="was measured on Hopper alone"
)

# (rows, in_features, out_features, ranks of a slice): two and more waves, with one, two and more programs for the
# panel; edges of y's columns and of K; the most ranks.
SHAPES = [(64, 48, 224, 5), (128, 40, 128, 16), (128, 16, 240, 1), (160, 24, 168, 32), (96, 32, 192, 64)]
DTYPES = {"bfloat16": (torch.bfloat16,) * 2, "mixed": (torch.bfloat16, torch.float32), "float16": (torch.float16,) * 2}
PATTERNS = [(True,), (True, False, True), (False, True)]


def problem(
    shape: tuple[int, int, int, int], device: str, pattern: Sequence[bool] = (True,), dtypes: str = "bfloat16"
) -> dict[str, Tensor]:
    rows, K, N, r = shape
    if device != "cpu":
        # As many waves of as many tiles, with as many programs idle for each that computes a panel.
        rows, K, N = rows // 32 * 128 * config.processors(torch.device(device)) // 6, 8 * K, 4 * N
    dtype, adapter_dtype = DTYPES[dtypes]
    enabled = sum(pattern)
    sizes = {"x": (rows, K), "weight": (N, K), "bias": (N,)}
    adapters = {"lora_A": (enabled * r, K), "lora_B": (N // len(pattern) * enabled, r)}
    tensors = {name: torch.randn(*size, device=device).to(dtype) for name, size in sizes.items()}
    return tensors | {name: torch.randn(*size, device=device).to(adapter_dtype) for name, size in adapters.items()}


def computed(t: dict[str, Tensor], pattern: Sequence[bool] = (True,)) -> tuple[Tensor, Tensor]:
    assert first_wave.takes(t["x"], t["weight"], t["lora_A"])
    return first_wave.forward(**t, scale=0.5, enable_lora=pattern)


def check(t: dict[str, Tensor], pattern: Sequence[bool] = (True,)) -> None:
    def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tensors = {name: tensor.to(dtype) for name, tensor in t.items()}
        return reference.forward(**tensors, scaling=0.5, dropout=None, enable_lora=pattern)[:2]

    results = computed(t, pattern), expected(t["x"].dtype), expected(torch.float64)
    for name, *values in zip(("y", "xa"), *results, strict=True):
        assert values[0].shape == values[2].shape
        assert_as_accurate_as(*values, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.usefixtures("poisoned_allocations")
def test_is_as_accurate_as_torch(shape: tuple[int, int, int, int], dtypes: str, device: str) -> None:
    check(problem(shape, device, dtypes=dtypes))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("width", [64, 40])
def test_slices_that_tiles_cross_and_slices_that_they_do_not(
    pattern: tuple[bool, ...], width: int, device: str
) -> None:
    rows = {64: 224, 40: 224, 128: 128, 80: 128, 192: 160, 120: 128}[width * len(pattern)]
    check(problem((rows, 48, width * len(pattern), 5), device, pattern), pattern)


def test_gives_the_same_bits_twice_and_for_other_layouts_of_the_adapter(device: str) -> None:
    t = problem(SHAPES[0], device)
    y, xa = computed(t)
    turned = {name: t[name].T.contiguous().T for name in ("lora_A", "lora_B")}
    padded = {name: torch.cat([t[name], t[name]], 1)[:, : t[name].shape[1]] for name in ("x", "weight")}
    for other in ({}, turned, padded):
        again = computed(t | other)
        assert torch.equal(again[0], y) and torch.equal(again[1], xa)


def test_does_not_take_what_it_cannot_read_or_has_no_use_for(device: str) -> None:
    t = problem(SHAPES[0], device)
    x, weight, lora_A = t["x"], t["weight"], t["lora_A"]

    def shifted(matrix: Tensor) -> Tensor:
        return torch.cat([matrix, matrix], 1)[:, 1 : matrix.shape[1] + 1]

    assert first_wave.takes(x, weight, shifted(lora_A))
    assert not first_wave.takes(shifted(x), weight, lora_A)
    assert not first_wave.takes(x, shifted(weight), lora_A)
    assert not first_wave.takes(x, weight.T.contiguous().T, lora_A)
    assert not first_wave.takes(x[:-1], weight, lora_A)
    assert not first_wave.takes(x[:0], weight, lora_A)
    ranks = {r for r in range(MOST_RANKS + 17) if first_wave.takes(x, weight, lora_A[:1].expand(r, -1))}
    assert ranks == {*range(1, RANK_STEP + 1), 32, 48, 64}


def test_fits_where_the_last_wave_has_room_for_the_panel() -> None:
    # 8192 tokens on an H200: as many idle multiprocessors in the last of 8 waves as the panel needs, 32, and more.
    assert fits(HOPPER, 8192, 4096, 132) and fits(HOPPER, 8192, 14336, 132) and fits(HOPPER, 4096, 4096, 132)
    # One multiprocessor too few; only eight.
    assert not fits(HOPPER, 8192, 4096, 131)
    assert not fits(HOPPER, 8192, 1024, 132)
    # All tiles at once; a last wave that is full; rows that fill no tile.
    assert not fits(HOPPER, 2048, 1024, 132)
    assert not fits(HOPPER, 4224, 4096, 132)
    assert not fits(HOPPER, 4097, 4096, 132)


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_touches_only_its_arguments_and_writes_every_element_once(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from interpreter import checked_addresses

    flags, flags_for = [], decode_launch.flags_for
    monkeypatch.setattr(decode_launch, "flags_for", lambda *args: flags.append(flags_for(*args)) or flags[-1])
    with checked_addresses() as counts:
        y, xa = computed(problem(shape, "cpu"))
    assert counts["launches"] == 2
    assert not y.isnan().any() and not xa.isnan().any()
    assert len(flags) == 1 and not flags[0].any()


@interpreted
def test_all_waves_go_through_the_tiles_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more rows of tiles than a group of them has, and a first wave that is longer than the group."""
    monkeypatch.setattr(first_wave, "processors", lambda device: 24)
    check(problem((288, 16, 192, 3), "cpu"))


@interpreted
def test_is_what_a_forward_without_a_mask_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], first_wave.forward
    monkeypatch.setattr(first_wave, "forward", lambda *given: calls.append(1) or forward(*given))
    monkeypatch.setattr(fused.own_panel, "tile_of", lambda *sizes: None)
    t = problem(SHAPES[0], "cpu")
    dropout = reference.Dropout(torch.ones(1, dtype=torch.int64), 6554)
    for given, taken in ((None, 1), (dropout, 0)):
        calls.clear()
        y, xa, bits = fused.forward(**t, scaling=0.5, dropout=given)
        assert len(calls) == taken and (bits is None) == (given is None)
        exact = {name: tensor.double() for name, tensor in t.items()}
        truth = reference.forward(**exact, scaling=0.5, dropout=given)
        # Both are rounded once to bfloat16, y after a panel that was.
        assert (y - truth[0]).abs().max() <= 2**-7 * truth[0].abs().max()
        assert (xa - truth[1]).abs().max() <= 2**-7 * truth[1].abs().max()
