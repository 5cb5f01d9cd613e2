"""Which tile the decode kernel gets: programs that run at once, and the same table for every number of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed, so there are no kernels")

from fused_lora.kernels import decode_tiles
from fused_lora.kernels.decode_tiles import HOPPER, IRREGULAR, SAFE, TABLES, fitted
from fused_lora.kernels.launch import cdiv


@pytest.mark.parametrize("rows", [1, 16, 17, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("outputs", [16, 1024, 4096])
@pytest.mark.parametrize("ranks", [16, 64, 128])
def test_small_outputs_run_at_once_beside_the_panel(rows: int, outputs: int, ranks: int) -> None:
    for processors in (16, 60, 108, 128, 132, 148):
        tile = fitted(90, processors, rows, outputs, ranks)
        tiles = cdiv(rows, tile.block_m) * cdiv(outputs, tile.block_n)
        programs = tiles * tile.splits + cdiv(rows, tile.panel_rows) * tile.parts
        assert tile.parts > 0
        if tiles + cdiv(rows, tile.panel_rows) <= processors * tile.held:
            assert programs <= processors * tile.held, (processors, tile)
        else:
            assert tile.splits == 1, (processors, tile)


def test_what_room_there_is_goes_to_splits() -> None:
    assert fitted(90, 132, 1, 4096).splits == 1
    assert fitted(90, 132, 1, 1024).splits == 4
    assert fitted(90, 132, 1, 32).splits == 4


def test_many_ranks_get_programs_for_splits_where_there_are_more_than_few_rows() -> None:
    for rows, few, many in ((16, (4, 1, 4), (4, 1, 4)), (32, (4, 1, 4), (2, 2, 8)), (64, (4, 1, 4), (2, 4, 8))):
        for ranks, expected in ((32, few), (33, many), (256, many)):
            tile = fitted(90, 132, rows, 1024, ranks)
            assert (tile.splits, cdiv(rows, tile.panel_rows), tile.parts) == expected, (rows, ranks)
    for rows, panels, parts in ((17, 2, 8), (65, 3, 8), (128, 4, 8)):
        tile = fitted(90, 132, rows, 1024, 64)
        assert (cdiv(rows, tile.panel_rows), tile.parts) == (panels, parts), rows
    # Elsewhere it was not measured.
    assert fitted(80, 132, 32, 1024, 64) == fitted(80, 132, 32, 1024, 16)


@pytest.mark.parametrize(
    ("rows", "outputs", "ranks", "tile", "parts"),
    [
        (256, 1024, 128, (64, 64, 128), 4),
        (256, 4096, 128, (64, 64, 64), 2),
        (256, 4112, 128, (64, 128, 64), 2),
        (256, 8192, 65, (64, 128, 64), 2),
        (512, 1024, 128, (128, 64, 64), 4),
        # The panel in one part would take as long as two of these tiles, in two parts there is no room for it.
        (512, 2048, 128, (64, 128, 64), 2),
        (512, 4096, 128, (64, 128, 64), 1),
        (1024, 1024, 128, (64, 128, 64), 2),
        (512, 4112, 128, None, 0),
        (1025, 1024, 128, None, 0),
        (128, 1024, 128, None, 0),
        (256, 1024, 129, None, 0),
        (256, 1024, 64, None, 0),
    ],
)
def test_panels_of_many_ranks_take_no_longer_than_a_tile(
    rows: int, outputs: int, ranks: int, tile: tuple[int, ...] | None, parts: int
) -> None:
    found = decode_tiles.of_many_ranks(132, rows, outputs, ranks)
    if tile is None:
        assert found is None
        return
    assert found is not None and (found.block_m, found.block_n, found.block_k) == tile and found.parts == parts
    fit = fitted(90, 132, rows, outputs, ranks)
    assert (fit.block_m, fit.block_n, fit.parts, fit.panel_ranks) == (*tile[:2], parts, 128)
    # A mask takes longer to draw, and it was not measured on other GPUs.
    assert fitted(90, 132, rows, outputs, ranks, drawn=True).held == 1
    assert fitted(100, 132, rows, outputs, ranks).panel_ranks == 64


def test_two_programs_on_a_multiprocessor_where_one_tile_each_would_leave_half_idle() -> None:
    for rows, outputs, tile, held in ((512, 2048, (64, 64), 2), (512, 2064, (128, 128), 1), (640, 2048, (64, 128), 2)):
        found = fitted(90, 132, rows, outputs, 16)
        assert ((found.block_m, found.block_n), found.held) == (tile, held), (rows, outputs)
        assert fitted(90, 132, rows, outputs, 16, drawn=True).held == 1


def test_a_panel_comes_in_wide_pieces_where_its_sums_fit_in_registers() -> None:
    pieces = {rows: fitted(90, 132, rows, 4096, 16).panel_ranks for rows in (1, 64, 128, 512, 1024, 2048)}
    assert pieces == {1: 128, 64: 128, 128: 128, 512: 64, 1024: 128, 2048: 64}


def test_a_mask_is_drawn_by_programs_enough_to_be_ready_when_the_weight_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode_tiles, "processors", lambda device: 132)
    gpu = torch.device("cuda", 0)

    def parts(rows: int, inputs: int, outputs: int, capability: int, drawn: bool) -> tuple[int, int]:
        monkeypatch.setattr(decode_tiles, "capability", lambda device: capability)
        decode_tiles.decode_tile.cache_clear()
        tile = decode_tiles.decode_tile(gpu, torch.bfloat16, rows, inputs, outputs, 16, drawn)
        return cdiv(rows, tile.panel_rows), tile.parts

    for rows, inputs, outputs in ((65, 4096, 4096), (128, 14336, 4096), (512, 8192, 8192), (1024, 4096, 1024)):
        panels, more = parts(rows, inputs, outputs, 90, True)
        assert panels * more == 64 and more > parts(rows, inputs, outputs, 90, False)[1]
    # Reading this weight takes longer; of few rows a mask is soon drawn; and elsewhere it was not measured.
    for rows, outputs, capability in ((128, 14336, 90), (64, 4096, 90), (128, 4096, 80)):
        assert parts(rows, 4096, outputs, capability, True) == parts(rows, 4096, outputs, capability, False)
    # No part is empty, nor is there none.
    assert parts(128, 256, 1024, 90, True)[1] == 2 and parts(128, 16, 1024, 90, True)[1] == 1
    decode_tiles.decode_tile.cache_clear()


def test_a_loop_of_few_steps_has_fewer_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_tiles, "processors", lambda device: 132)

    def stages(rows: int, inputs: int, outputs: int, capability: int = 90, drawn: bool = False) -> tuple[int, int]:
        monkeypatch.setattr(decode_tiles, "capability", lambda device: capability)
        decode_tiles.decode_tile.cache_clear()
        gpu = torch.device("cuda", 0)
        tile = decode_tiles.decode_tile(gpu, torch.bfloat16, rows, inputs, outputs, 16, drawn)
        return tile.splits, tile.num_stages

    assert stages(32, 4096, 1024) == (4, 6) and stages(32, 8192, 1024) == (4, 6)
    assert stages(32, 8208, 1024) == (4, 7) and stages(32, 4096, 4096) == (1, 7)
    assert stages(32, 2048, 4096) == (1, 6) and stages(32, 2064, 4096) == (1, 7)
    # What was not measured is as it was.
    others = [stages(*sizes) for sizes in ((32, 4096, 14336), (16, 4096, 1024), (64, 4096, 1024))]
    assert others == [(1, 4), (4, 5), (4, 7)]
    assert stages(32, 4096, 1024, drawn=True) == stages(32, 4096, 1024, 100) == (4, 7)
    decode_tiles.decode_tile.cache_clear()


def test_wide_outputs_get_wide_tiles_and_many_rows_high_ones() -> None:
    assert fitted(90, 132, 1, 4096).block_n < fitted(90, 132, 1, 14336).block_n
    heights = [fitted(90, 132, rows, 4096).block_m for rows in (1, 32, 64, 100_000)]
    assert heights == sorted(set(heights))


def test_a_gpu_without_a_table_gets_the_safe_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 89 not in TABLES and fitted(89, 132, 1, 14336) in {tile for tiles in SAFE.values() for tile in tiles}
    monkeypatch.setattr(decode_tiles, "capability", lambda device: 90)
    monkeypatch.setattr(decode_tiles, "processors", lambda device: 132)
    gpu = torch.device("cuda", 0)
    assert decode_tiles.decode_tile(gpu, torch.float16, 2048, 4096, 4096, 16) == replace(HOPPER[2048][0], ahead=True)
    assert decode_tiles.decode_tile(gpu, torch.float16, 1, 4100, 4096, 16) is IRREGULAR
    assert decode_tiles.decode_tile(gpu, torch.float16, 1, 4096, 4100, 16) is IRREGULAR
    assert decode_tiles.decode_tile(gpu, torch.float32, 1, 4096, 4096, 16) is IRREGULAR
