"""The decode kernel: every address it touches, its results, its flags, and rows that do not depend on one another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from numerics import assert_as_accurate_as

from fused_lora.kernels import decode_launch
from fused_lora.kernels.decode_launch import decode
from fused_lora.kernels.decode_tiles import DecodeTile
from fused_lora.kernels.flags import flags_for
from fused_lora.kernels.launch import cdiv
from fused_lora.reference import Dropout

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter, unused on a GPU")
PLAIN = DecodeTile(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=2, panel_rows=16, panel_k=32, parts=2)
SPLIT = DecodeTile(16, 16, 16, num_warps=4, num_stages=2, panel_rows=16, panel_k=16, parts=3, splits=4, ahead=True)
# More parts than are summed in pieces of all ranks.
PARTS = DecodeTile(16, 32, 16, num_warps=4, num_stages=2, panel_rows=64, panel_k=16, parts=9)
WIDE = replace(SPLIT, panel_ranks=128, ahead=False)
TILES = pytest.mark.parametrize("tile", [PLAIN, SPLIT, PARTS, WIDE], ids=["plain", "split", "parts", "wide"])

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
    y, *_ = decode(**t, scale=0.5, tile=tile, enable_lora=enable_lora)
    truth = expected({name: tensor.double() for name, tensor in t.items()}, enable_lora)
    assert_as_accurate_as(y, expected(t, enable_lora), truth)


@TILES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("enable_lora", [(True,), (True, False, True)], ids=str)
def test_a_factor_that_is_read_ahead_gives_the_same_bits(tile: DecodeTile, shape, enable_lora, device: str) -> None:
    t = problem(shape, len(enable_lora), sum(enable_lora), device)
    ahead, not_ahead = (
        decode(**t, scale=0.5, tile=replace(tile, ahead=is_ahead), enable_lora=enable_lora)
        for is_ahead in (True, False)
    )
    assert torch.equal(ahead[0], not_ahead[0]) and torch.equal(ahead[1], not_ahead[1])


@interpreted
@TILES
def test_programs_wait_for_the_panel_before_they_read_it_and_are_counted(
    tile: DecodeTile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs one program after another, so that only the order of what each does can show it."""
    from interpreter import recorded_accesses

    flags = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(decode_launch, "flags_for", lambda x, count: flags)
    with recorded_accesses() as programs:
        _, panel, _ = decode(**problem((37, 53, 41, 5), 1, 1, "cpu"), scale=0.5, tile=tile)
    ready, counted = flags.data_ptr(), flags.data_ptr() + 4
    panel_bytes = range(panel.data_ptr(), panel.data_ptr() + panel.nbytes)
    steps = {("atomic", ready): "wait", ("atomic", counted): "count"}
    finished = [program for program in programs if ("atomic", counted) in program]
    assert len(finished) == cdiv(37, tile.block_m) * cdiv(41, tile.block_n)
    for program in finished:
        done = [steps.get(step, "read" if step[0] == "load" and step[1] in panel_bytes else "") for step in program]
        assert [step for step in done if step] == ["wait", "read", "count"]


@interpreted
@TILES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_touches_only_its_arguments_and_writes_every_element_once(tile: DecodeTile, shape) -> None:
    from interpreter import checked_addresses

    t = problem(shape, 1, 1, "cpu")
    with checked_addresses() as counts:
        y, panel, _ = decode(**t, scale=0.5, tile=tile)
    assert counts["launches"] == 1
    assert not y.isnan().any() and not panel.isnan().any()


def bit_of(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """bool [rows, columns] of packed bits."""
    lanes = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits[:, :, None] >> lanes) & 1).flatten(1)[:, :columns].bool()


@TILES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offsets", [(0, 0), (3, 8), (2**32 - 2, 5), (2**31 - 5, 2**31 - 32)], ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_draws_the_mask_of_the_panel(tile: DecodeTile, shape, offsets: tuple[int, int], device: str) -> None:
    t = problem(shape, 1, 1, device)
    dropout = Dropout(torch.tensor([-7], device=device), 20_000, *offsets)
    y, panel, bits = decode(**t, scale=0.5, tile=tile, dropout=dropout)
    keep = dropout.mask(*t["x"].shape)
    assert torch.equal(bits, dropout.bits(*t["x"].shape))
    scale = 0.5 / dropout.keep_probability

    def forward(x: torch.Tensor, weight: torch.Tensor, bias, lora_A, lora_B) -> tuple[torch.Tensor, torch.Tensor]:
        xa = scale * ((x * keep) @ lora_A.T)
        return x @ weight.T + bias + xa @ lora_B.T, xa

    same_dtype, exact = forward(**t), forward(**{name: tensor.double() for name, tensor in t.items()})
    for actual, yardstick, truth in zip((y, panel), same_dtype, exact, strict=True):
        assert_as_accurate_as(actual, yardstick, truth)


@TILES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("poisoned_allocations")
def test_masks_the_term_by_given_bits(tile: DecodeTile, shape, transposed: bool, device: str) -> None:
    t = problem(shape, 1, 1, device)
    if transposed:
        t["weight"] = t["weight"].T.contiguous().T
    (rows, _), columns = t["x"].shape, len(t["weight"])
    bits = torch.randint(256, (rows, -(-columns // 8)), dtype=torch.uint8, device=device)
    y, *_ = decode(**t, scale=0.5, tile=tile, bits=bits)
    keep = bit_of(bits, columns)

    def forward(x: torch.Tensor, weight: torch.Tensor, bias, lora_A, lora_B) -> torch.Tensor:
        return x @ weight.T + bias + keep * (0.5 * (x @ lora_A.T) @ lora_B.T)

    assert_as_accurate_as(y, forward(**t), forward(**{name: tensor.double() for name, tensor in t.items()}))


@interpreted
@TILES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_masks_touch_only_their_bits_and_write_each_byte_once(tile: DecodeTile, shape) -> None:
    from interpreter import checked_addresses

    t = problem(shape, 1, 1, "cpu")
    (rows, _), columns = t["x"].shape, len(t["weight"])
    given = torch.zeros((rows, -(-columns // 8)), dtype=torch.uint8)
    with checked_addresses() as counts:
        decode(**t, scale=0.5, tile=tile, dropout=Dropout(torch.tensor([3]), 20_000))
        decode(**t, scale=0.5, tile=tile, bits=given)
    assert counts["launches"] == 2


@TILES
def test_leaves_its_flags_at_zero(tile: DecodeTile, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_lora.kernels import decode_launch as module

    given: list[torch.Tensor] = []
    monkeypatch.setattr(module, "flags_for", lambda *args: given.append(flags_for(*args)) or given[-1])
    t = problem((37, 64, 96, 16), 1, 1, device)
    first, *_ = decode(**t, scale=0.5, tile=tile)
    again, *_ = decode(**t, scale=0.5, tile=tile)
    assert torch.equal(first, again)
    assert len(given) == 2 and not any(flags.any() for flags in given)


@TILES
def test_a_row_depends_neither_on_other_rows_nor_on_their_number(tile: DecodeTile, device: str) -> None:
    t = problem((37, 64, 96, 16), 1, 1, device)
    y, *_ = decode(**t, scale=0.5, tile=tile)
    for rows in (slice(0, 1), slice(5, 22), slice(36, 37)):
        some, *_ = decode(**t | {"x": t["x"][rows]}, scale=0.5, tile=tile)
        assert torch.equal(some, y[rows])
