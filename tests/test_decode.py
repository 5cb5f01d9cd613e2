"""The decode kernel: every address it touches, its results, its flags, and rows that do not depend on one another."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from numerics import assert_as_accurate_as

from fused_lora.kernels.decode_launch import decode
from fused_lora.kernels.decode_tiles import DecodeTile
from fused_lora.kernels.flags import flags_for

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")
PLAIN = DecodeTile(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=2, panel_rows=16, panel_k=32, parts=2)
SPLIT = DecodeTile(16, 16, 16, num_warps=4, num_stages=2, panel_rows=16, panel_k=16, parts=3, splits=4)
TILES = pytest.mark.parametrize("tile", [PLAIN, SPLIT], ids=["plain", "split"])

# (rows, in_features, out_features, r): odd everywhere, several tiles of the panel, more parts than steps, r in steps
SHAPES = [(1, 64, 96, 16), (37, 53, 41, 5), (5, 16, 64, 130), (1, 1, 1, 1)]


def problem(shape: tuple[int, int, int, int], slices: int, enabled: int, device: str) -> dict[str, torch.Tensor]:
    m, k, n, r = shape
    sizes = {"x": (m, k), "weight": (n * slices, k), "bias": (n * slices,)}
    sizes |= {"lora_A": (r * enabled, k), "lora_B": (n * enabled, r)}
    return {name: torch.randn(*size, device=device).to(torch.bfloat16) for name, size in sizes.items()}


def expected(t: dict[str, torch.Tensor], enable_lora: tuple[bool, ...]) -> torch.Tensor:
    y = t["x"] @ t["weight"].T + t["bias"]
    panel, width, r = 0.5 * (t["x"] @ t["lora_A"].T), len(y[0]) // len(enable_lora), t["lora_B"].shape[1]
    slices = [s for s, on in enumerate(enable_lora) if on]
    for e, s in enumerate(slices):
        term = panel[:, e * r : (e + 1) * r] @ t["lora_B"][e * width : (e + 1) * width].T
        y[:, s * width : (s + 1) * width] += term
    return y


@TILES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("enable_lora", [(True,), (True, False, True)], ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_is_as_accurate_as_torch(tile: DecodeTile, shape, enable_lora: tuple[bool, ...], device: str) -> None:
    t = problem(shape, len(enable_lora), sum(enable_lora), device)
    y, _ = decode(**t, scale=0.5, tile=tile, enable_lora=enable_lora)
    truth = expected({name: tensor.double() for name, tensor in t.items()}, enable_lora)
    assert_as_accurate_as(y, expected(t, enable_lora), truth)


@interpreted
@TILES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_touches_only_its_arguments_and_writes_every_element_once(tile: DecodeTile, shape) -> None:
    from interpreter import checked_addresses

    t = problem(shape, 1, 1, "cpu")
    with checked_addresses() as counts:
        y, panel = decode(**t, scale=0.5, tile=tile)
    assert counts["launches"] == 1
    assert not y.isnan().any() and not panel.isnan().any()


@TILES
def test_leaves_its_flags_at_zero(tile: DecodeTile, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_lora.kernels import decode_launch as module

    given: list[torch.Tensor] = []
    monkeypatch.setattr(module, "flags_for", lambda *args: given.append(flags_for(*args)) or given[-1])
    t = problem((37, 64, 96, 16), 1, 1, device)
    first, _ = decode(**t, scale=0.5, tile=tile)
    again, _ = decode(**t, scale=0.5, tile=tile)
    assert torch.equal(first, again)
    assert len(given) == 2 and not any(flags.any() for flags in given)


@TILES
def test_a_row_depends_neither_on_other_rows_nor_on_their_number(tile: DecodeTile, device: str) -> None:
    t = problem((37, 64, 96, 16), 1, 1, device)
    y, _ = decode(**t, scale=0.5, tile=tile)
    for rows in (slice(0, 1), slice(5, 22), slice(36, 37)):
        some, _ = decode(**t | {"x": t["x"][rows]}, scale=0.5, tile=tile)
        assert torch.equal(some, y[rows])
