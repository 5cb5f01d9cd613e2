"""A forward whose tiles compute the panel of their rows: accuracy, addresses, and which layers take it."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from numerics import assert_as_accurate_as

from fused_lora.kernels import config, launch, own_panel
from fused_lora.kernels.own_panel import AT_ONCE, MOST_RANKS, fitted

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")

TILE = config.INTERPRETER.linear
# (rows, in_features, out_features, ranks of a slice): fewer tiles than programs, as many, and more; one column of
# tiles; edges in every direction.
SHAPES = [(32, 16, 64, 1), (70, 48, 136, 5), (192, 32, 64, 16), (150, 40, 192, 17), (289, 24, 128, 33), (1, 8, 8, 64)]
DTYPES = {"bfloat16": (torch.bfloat16,) * 2, "mixed": (torch.bfloat16, torch.float32), "float16": (torch.float16,) * 2}
PATTERNS = [(True,), (True, False, True), (False, True), (True, True)]


def problem(
    shape: tuple[int, int, int, int],
    pattern: tuple[bool, ...] = (True,),
    dtypes: str = "bfloat16",
    device: str = "cpu",
    bias: bool = True,
) -> dict[str, Tensor | None]:
    rows, K, N, r = shape
    dtype, adapter_dtype = DTYPES[dtypes]
    enabled = sum(pattern)
    sizes = {"x": (rows, K), "weight": (N, K), "bias": (N,)}
    adapters = {"lora_A": (enabled * r, K), "lora_B": (N // len(pattern) * enabled, r)}
    tensors = {name: torch.randn(*size, device=device).to(dtype) for name, size in sizes.items()}
    tensors |= {name: torch.randn(*size, device=device).to(adapter_dtype) for name, size in adapters.items()}
    return tensors if bias else tensors | {"bias": None}


def computed(t: dict[str, Tensor | None], pattern: tuple[bool, ...] = (True,)) -> tuple[Tensor, Tensor]:
    assert own_panel.takes(t["x"], t["weight"], t["lora_A"])
    tile = TILE if t["x"].device.type == "cpu" else AT_ONCE[-1]
    return own_panel.forward(**t, scale=0.5, tile=tile, enable_lora=pattern)


def expected(t: dict[str, Tensor | None], pattern: tuple[bool, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By slices, in the given dtype."""
    x, weight, lora_A, lora_B = (t[name].to(dtype) for name in ("x", "weight", "lora_A", "lora_B"))
    y, panel = x @ weight.T, 0.5 * x @ lora_A.T
    if t["bias"] is not None:
        y = y + t["bias"].to(dtype)
    enabled = [s for s, on in enumerate(pattern) if on]
    pieces = zip(panel.tensor_split(len(enabled), 1), lora_B.tensor_split(len(enabled)), strict=True)
    slices = list(y.tensor_split(len(pattern), 1))
    for s, (piece, factor) in zip(enabled, pieces, strict=True):
        slices[s] = slices[s] + piece @ factor.T
    return torch.cat(slices, 1), panel


def check(t: dict[str, Tensor | None], pattern: tuple[bool, ...] = (True,)) -> None:
    actual, dtype = computed(t, pattern), t["x"].dtype
    same_dtype, exact = expected(t, pattern, dtype), expected(t, pattern, torch.float64)
    for name, *values in zip(("y", "panel"), actual, same_dtype, exact, strict=True):
        assert values[0].dtype == dtype and values[0].shape == values[2].shape
        assert_as_accurate_as(*values, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.usefixtures("poisoned_allocations")
def test_is_as_accurate_as_torch(shape: tuple[int, int, int, int], dtypes: str, device: str) -> None:
    check(problem(shape, dtypes=dtypes, device=device))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("width", [64, 40, 8])
def test_slices_that_tiles_cross_and_slices_that_they_do_not(
    pattern: tuple[bool, ...], width: int, device: str
) -> None:
    check(problem((70, 48, width * len(pattern), 5), pattern, device=device), pattern)


@pytest.mark.parametrize("width", [64, 40])
def test_what_is_not_finite_stays_in_its_slice_and_its_row(width: int, device: str) -> None:
    """A panel of one slice that overflows, and an infinite x: the other slices, and the other rows, are as without."""
    pattern = (True, False, True)
    t = problem((70, 48, 3 * width, 5), pattern, "float16", device)
    y, _ = computed(t, pattern)
    overflowing = t | {"lora_A": torch.cat([t["lora_A"][:5], torch.full_like(t["lora_A"][5:], 60000)])}
    y_of_it, _ = computed(overflowing, pattern)
    assert torch.equal(y_of_it[:, : 2 * width], y[:, : 2 * width]) and not y_of_it[:, 2 * width :].isfinite().all()
    x = t["x"].clone()
    x[3, 4] = torch.inf
    y_of_it, _ = computed(t | {"x": x}, pattern)
    others = torch.arange(70, device=device) != 3
    assert torch.equal(y_of_it[others], y[others]) and not y_of_it[3].isfinite().any()


@pytest.mark.parametrize("shape", [(70, 48, 136, 5), (150, 40, 192, 17)], ids=str)
def test_takes_any_layout_that_the_copy_engine_reads(shape: tuple[int, int, int, int], device: str) -> None:
    t = problem(shape, device=device, bias=False)
    y, panel = computed(t)
    transposed = t | {"weight": t["weight"].T.contiguous().T}
    padded = t | {"x": torch.cat([t["x"], t["x"]], 1)[:, : shape[1]]}
    # lora_A is read by the copy engine or, at an address or with strides that it does not take, without it.
    shifted = t | {"lora_A": torch.cat([t["lora_A"][:, :1], t["lora_A"]], 1)[:, 1:]}
    turned = t | {name: t[name].T.contiguous().T for name in ("lora_A", "lora_B")}
    for other in (transposed, padded, shifted, turned):
        again = computed(other)
        assert torch.equal(again[0], y) and torch.equal(again[1], panel)
        check(other)


def test_does_not_take_what_the_copy_engine_does_not_read(device: str) -> None:
    t = problem((70, 48, 136, 5), device=device)
    x, weight, lora_A = t["x"], t["weight"], t["lora_A"]
    assert not own_panel.takes(torch.cat([x, x], 1)[:, 1:49], weight, lora_A)
    assert not own_panel.takes(x, torch.cat([weight, weight], 1)[:, 1:49], lora_A)
    assert not own_panel.takes(x[:0], weight, lora_A)
    assert not own_panel.takes(x, weight, lora_A[:0])
    assert not own_panel.takes(x, weight, lora_A[:1].expand(MOST_RANKS + 1, -1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_that_are_not_read_ahead_give_the_same_bits(
    shape: tuple[int, int, int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = problem(shape, device=device)
    y, panel = computed(t)
    monkeypatch.setattr(config, "BYTES_AHEAD", 0)
    monkeypatch.setattr(launch, "_plans", OrderedDict())
    again = computed(t)
    assert torch.equal(again[0], y) and torch.equal(again[1], panel)


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_touches_only_its_arguments_and_writes_every_element_once(shape: tuple[int, int, int, int]) -> None:
    from interpreter import checked_addresses

    with checked_addresses() as counts:
        y, panel = computed(problem(shape))
    assert counts["launches"] == 1
    assert not y.isnan().any() and not panel.isnan().any()


def test_tiles_that_run_at_once_are_taken_for_few_outputs() -> None:
    narrow, wider = AT_ONCE
    cases = {
        (1024, 1024): narrow,
        (2048, 1024): wider,
        (1024, 2048): wider,
        (4096, 512): wider,
        # More tiles than run at once.
        (8192, 1024): None,
        (4096, 1024): None,
        (2048, 2048): None,
        (8192, 2048): None,
        (8192, 4096): None,
        (576, 3584): None,
        # Few rows are bound by reading the weight.
        (512, 2048): None,
        (64, 14336): None,
    }
    assert {sizes: fitted(90, 132, *sizes) for sizes in cases} == cases
    for capability in (80, 89, 100):
        assert all(fitted(capability, 132, *sizes) is None for sizes in cases)


def test_only_regular_sizes_of_two_bytes_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_panel, "capability", lambda device: 90)
    monkeypatch.setattr(own_panel, "processors", lambda device: 132)
    gpu = torch.device("cuda", 0)
    assert own_panel.tile_of(gpu, torch.float16, 2048, 4096, 1024) is AT_ONCE[-1]
    assert own_panel.tile_of(gpu, torch.float32, 2048, 4096, 1024) is None
    assert own_panel.tile_of(gpu, torch.bfloat16, 2048, 4100, 1024) is None
    assert own_panel.tile_of(gpu, torch.bfloat16, 2048, 4096, 1020) is None
