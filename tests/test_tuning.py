"""The search for tiles, by a clock that tells what a test says, and the command around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate_as, make_problem, unfused

pytest.importorskip("triton", reason="triton is not installed, so there is nothing to tune")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import fused_lora
from fused_lora import cli, cli_tune, tuning
from fused_lora.functional import lora_linear
from fused_lora.kernels import config, lookup, panel
from fused_lora.kernels.config import HOPPER, INTERPRETER, LinearTile, PanelTile, Tiles
from fused_lora.kernels.tiles_file import Tuned, as_json, read_tiles
from fused_lora.tuning import Trial, neighbours, tune

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, unused on a GPU")
CPU = torch.device("cpu")
PRESENT = INTERPRETER.panel[16]
OTHERS = [replace(PRESENT, block_m=block_m) for block_m in (32, 64, 128)]


def panel_in_force() -> PanelTile:
    return lookup.table_of(CPU).panel[16]


def with_panel(tile: PanelTile) -> Tiles:
    return replace(INTERPRETER, panel=MappingProxyType(INTERPRETER.panel | {16: tile}))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of panels alone, and of them only twice the rows, are tried."""

    def next_ones(tile: tuning.Tile, descriptors: bool) -> Iterator[tuning.Tile]:
        if tile in (PRESENT, *OTHERS[:-1]):
            yield replace(tile, block_m=2 * tile.block_m)

    monkeypatch.setattr(tuning, "neighbours", next_ones)


def tuned(times: Mapping[int, float]) -> tuple[Tiles, list[Trial]]:
    """What a search finds where panels take these times by their rows, half a millisecond if not said; its trials."""
    trials: list[Trial] = []

    def clock(steps: Mapping[tuning.Tile, Callable[[], object]]) -> dict[tuning.Tile, float]:
        return {tile: times.get(tile.block_m, 0.5) for tile in steps}

    return tune([(64, 48)], "cpu", tokens=20, ranks=(5,), time=clock, on_trial=trials.append), trials


@on_a_cpu
@pytest.mark.usefixtures("few")
def test_the_search_goes_from_faster_to_faster_until_nothing_is_gained() -> None:
    tiles, trials = tuned({16: 1.0, 32: 0.9, 64: 0.8, 128: 0.79})
    assert tiles == with_panel(OTHERS[1])
    seen = [(trial.tile.block_m, trial.outcome, trial.ms) for trial in trials]
    assert seen == [(m, "timed", t) for m, t in ((16, 1.0), (32, 0.9), (32, 0.9), (64, 0.8), (64, 0.8), (128, 0.79))]
    assert {(trial.kernel, trial.rank_block) for trial in trials} == {("panel", 16)}


@on_a_cpu
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("ms", "taken"), [(0.98, True), (0.985, False), (1.0, False), (2.0, False)])
def test_only_a_gain_of_two_percent_counts(ms: float, taken: bool) -> None:
    tiles, _ = tuned({16: 1.0, 32: ms, 64: 1.0})
    assert tiles == (with_panel(OTHERS[0]) if taken else INTERPRETER)


@on_a_cpu
def test_of_equally_fast_tiles_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "neighbours", lambda tile, _: OTHERS if tile == PRESENT else [])
    assert tuned({16: 1.0, 32: 0.9, 64: 0.8, 128: 0.8})[0] == with_panel(OTHERS[1])


@on_a_cpu
def test_every_kernel_is_timed_with_the_tile_that_it_is_timed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step launches kernels, all under a table that is the present one but for its tile."""
    launched: list[tuple[str, Tiles]] = []
    originals = {"linear": tuning.fused_linear._fused_linear, "adapter": tuning.adapter_grad._prepared}
    for name, function in (("panel", "panel"), ("linear", "_fused_linear"), ("adapter", "_prepared")):
        module = {"panel": panel, "linear": tuning.fused_linear, "adapter": tuning.adapter_grad}[name]
        original = originals.get(name, panel.panel)

        def noted(*args: Any, name: str = name, original: Any = original, **more: Any) -> Any:
            launched.append((name, lookup.table_of(CPU)))
            return original(*args, **more)

        monkeypatch.setattr(module, function, noted)
    monkeypatch.setattr(tuning, "neighbours", lambda tile, _: [replace(tile, num_stages=2)])
    expected = {"linear": "linear", "panel": "panel", "drawn_panel": "panel"}
    expected |= {"adapter_grad": "adapter", "grad_lora_A": "adapter"}
    kernels = iter(expected)

    def clock(steps: Mapping[tuning.Tile, Callable[[], object]]) -> dict[tuning.Tile, float]:
        kernel = next(kernels)
        for tile, step in steps.items():
            launched.clear()
            step()
            assert {name for name, _ in launched} == {expected[kernel]}
            for _, tiles in launched:
                assert (tiles.linear if kernel == "linear" else getattr(tiles, kernel)[16]) == tile
                others = expected.keys() - {kernel}
                assert all(getattr(tiles, other) == getattr(INTERPRETER, other) for other in others)
        return dict.fromkeys(steps, 1.0)

    assert tune([(64, 48)], "cpu", tokens=20, ranks=(16,), time=clock) == INTERPRETER
    assert next(kernels, None) is None and lookup.table_of(CPU) is INTERPRETER


ORIGINAL = panel.panel


def spoil(monkeypatch: pytest.MonkeyPatch, how: Callable[[torch.Tensor], torch.Tensor], drawn: bool = False) -> None:
    """Panels with a mask, or those without, go through `how` where their tile is not the present one."""

    def spoiled(*args: Any, **more: Any) -> Any:
        xa, bits = ORIGINAL(*args, **more)
        present = panel_in_force() == PRESENT and lookup.table_of(CPU).drawn_panel == INTERPRETER.drawn_panel
        return (xa if present or (bits is not None) != drawn else how(xa)), bits

    monkeypatch.setattr(panel, "panel", spoiled)


def raising(error: Exception) -> Callable[[torch.Tensor], torch.Tensor]:
    def how(xa: torch.Tensor) -> torch.Tensor:
        raise error

    return how


WRONG = {
    "off by 5 %": lambda xa: xa * 1.05,
    "NaN in one place": lambda xa: xa.index_fill(0, torch.tensor([7]), torch.nan),
    # A rounding unit at most, which is no error, but for which no bits are the same twice.
    "not the same twice": lambda xa: torch.nextafter(xa, torch.rand_like(xa) - 0.5),
}


@on_a_cpu
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_results_are_not_timed_however_fast(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, WRONG[wrong])
    tiles, trials = tuned({16: 1.0})
    assert tiles == INTERPRETER and trials == [Trial("panel", 16, OTHERS[0], "wrong results")]


@on_a_cpu
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    "error",
    [OutOfResources(300_000, 232_448, "shared memory"), PTXASError("too many"), CompilationError(None, None, "no")],
    ids=lambda error: type(error).__name__,
)
def test_what_does_not_fit_is_said_and_passed_over(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, raising(error))
    tiles, trials = tuned({16: 1.0})
    assert tiles == INTERPRETER and trials == [Trial("panel", 16, OTHERS[0], "does not fit")]


@on_a_cpu
@pytest.mark.parametrize("fits", [False, True])
def test_a_tile_for_masks_is_looked_at_though_layers_draw_by_another_kernel(
    fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = INTERPRETER.drawn_panel[16]
    other = replace(present, block_m=2 * present.block_m)
    monkeypatch.setattr(tuning, "neighbours", lambda tile, descriptors: [other] if tile == present else [])
    error = OutOfResources(300_000, 232_448, "shared memory")
    spoil(monkeypatch, WRONG["off by 5 %"] if fits else raising(error), drawn=True)
    tiles, trials = tuned({present.block_m: 1.0})
    outcome = "wrong results" if fits else "does not fit"
    assert tiles == INTERPRETER and trials == [Trial("drawn_panel", 16, other, outcome)]


@on_a_cpu
@pytest.mark.usefixtures("few")
def test_any_other_error_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, raising(RuntimeError("an illegal memory access")))
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        tuned({16: 1.0})
    assert lookup.table_of(CPU) is INTERPRETER


def test_neighbours_are_one_step_away_and_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    for tiles in (*config.TABLES.values(), config.SAFE, INTERPRETER):
        for tile in neighbours(tiles.linear, True):
            assert tile != tiles.linear and max(tile.block_m, tile.block_j, tile.block_i) <= 256
            path.write_text(as_json(Tuned(replace(tiles, linear=tile), "a GPU", 90, "3.7.1")))
            assert read_tiles(path).tiles.linear == tile
    least = PanelTile(block_m=16, block_i=16, num_warps=4, num_stages=1)
    assert list(neighbours(least, True)) == [
        replace(least, **{name: value})
        for name, value in (("block_m", 32), ("block_i", 32), ("num_warps", 8), ("num_stages", 2))
    ]


def test_neighbours_trade_one_block_for_another_and_ask_the_copy_engine_where_there_is_one() -> None:
    tile = LinearTile(block_m=128, block_j=128, block_i=64, num_warps=8, num_stages=3)
    assert replace(tile, block_m=64, block_j=256) in neighbours(tile, False)
    assert replace(tile, descriptors=True) in neighbours(tile, True)
    assert replace(tile, descriptors=True) not in neighbours(tile, False)
    programs = {other.programs for other in neighbours(HOPPER.grad_lora_A[16], True)}
    assert programs == {264, 528, 1056}


@pytest.mark.parametrize("size", [16, 1024, 1040, 4096, 11008, 14336])
def test_small_sizes_are_divided_by_the_same_blocks(size: int) -> None:
    small = tuning._checked_size(size)
    assert small < 2048
    assert all((small % block == 0) == (size % block == 0) for block in (16, 32, 64, 128, 256))


BAD = {
    "shapes": ({"shapes": [(64, 40)]}, r"shapes is \[\(64, 40\)\]; expected pairs of multiples of 16"),
    "no shapes": ({"shapes": []}, r"shapes is \[\]; expected pairs"),
    "dtype": ({"dtype": torch.float32}, r"dtype is torch.float32; expected torch.bfloat16 or torch.float16"),
    "tokens": ({"tokens": 0}, r"tokens is 0; expected at least 1"),
    "ranks": ({"ranks": (0,)}, r"ranks is \(0,\); expected one or more numbers of at least 1"),
    "device": ({"time": None}, r"device is cpu; expected a CUDA GPU, or a time of your own"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named(bad: str) -> None:
    arguments: dict[str, Any] = {"shapes": [(64, 48)], "device": "cpu", "time": dict}
    with pytest.raises(ValueError, match=BAD[bad][1]):
        tune(**arguments | BAD[bad][0])


def test_results_with_a_table_from_a_file_are_accurate_and_the_same_bits_twice(tmp_path: Path, device: str) -> None:
    path = tmp_path / "tiles.json"
    panels = MappingProxyType({block: replace(tile, block_m=64) for block, tile in INTERPRETER.panel.items()})
    unlike = replace(INTERPRETER, panel=panels, linear=replace(INTERPRETER.linear, block_m=64, block_j=32))
    path.write_text(as_json(Tuned(unlike, "a GPU", 90, "3.7.1")))
    problem = make_problem(70, 64, 48, 5, dtype=torch.bfloat16, device=device)
    wide, taken = problem.to(torch.float64), []

    def run() -> list[torch.Tensor]:
        x, weight, lora_A, lora_B, bias = problem.arguments()
        y = lora_linear(x, weight, lora_A, lora_B, bias=bias)
        taken.append(lookup.table_of(x.device))
        return [y.detach(), *torch.autograd.grad(y, (x, lora_A, lora_B), problem.dy)]

    with fused_lora.use_backend("triton"), lookup.use_tiles(read_tiles(path).tiles):
        once, again = run(), run()
    assert taken == [unlike, unlike]
    assert all(map(torch.equal, once, again))
    expected, exact = [], []
    for inputs, results in ((problem, expected), (wide, exact)):
        y = unfused(*inputs.arguments(), 1.0)
        results += [y.detach(), *torch.autograd.grad(y, (inputs.x, inputs.lora_A, inputs.lora_B), inputs.dy)]
    for actual, same_dtype, reference in zip(once, expected, exact, strict=True):
        assert_as_accurate_as(actual, same_dtype, reference)


@on_a_cpu
def test_the_command_says_in_one_sentence_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--shapes", "64x64"]) == 2
    shown = capsys.readouterr()
    assert shown.err == "This machine has no CUDA GPU; expected one to tune for.\n" and not shown.out


@pytest.mark.parametrize("shape", ["64", "64x", "64x48x32", "ax48", "-64x48"])
def test_the_command_refuses_what_is_no_shape(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["tune", f"--shapes={shape}"])
    assert f"a shape is '{shape}'; expected in_features x out_features" in capsys.readouterr().err


class Command:
    """The command on a GPU that is not there, whose search returns at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.asked, self.error = capsys, {}, None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 63)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU 1")
        monkeypatch.setattr(cli_tune, "capability", lambda device: 90)
        monkeypatch.setattr(cli_tune, "obstacle_to_kernels", lambda *_: self.obstacle)
        monkeypatch.setattr(tuning, "tune", self.tune)
        self.obstacle: str | None = None

    def tune(self, shapes: Any, device: torch.device, *, on_trial: Callable[[Trial], object], **more: Any) -> Tiles:
        self.asked = {"shapes": shapes, "device": device, **more}
        on_trial(Trial("panel", 16, OTHERS[0], "timed", 0.25))
        on_trial(Trial("linear", None, INTERPRETER.linear, "does not fit"))
        if self.error is not None:
            raise self.error
        return with_panel(OTHERS[1])

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        code = cli.main(["tune", "--shapes", "64x48", "32x16", *map(str, arguments)])
        shown = self.capsys.readouterr()
        return code, shown.out, shown.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Command(monkeypatch, capsys)


def test_the_command_writes_the_table_and_says_how_to_use_it(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    code, out, errors = command("--output", path, "--tokens", 32, "--ranks", 4, 64, "--dtype", "float16")
    assert (code, errors) == (0, "")
    assert command.asked == {
        "shapes": [(64, 48), (32, 16)],
        "device": torch.device("cuda", 63),
        "tokens": 32,
        "ranks": [4, 64],
        "dtype": torch.float16,
    }
    tuned = read_tiles(path)
    assert (tuned.tiles, tuned.device, tuned.capability) == (with_panel(OTHERS[1]), "A GPU 1", 90)
    first, second, last = out.splitlines()
    assert first.split() == ["panel", "16", "0.2500", "ms", "block_m=32", "block_i=16", "num_warps=4", "num_stages=1"]
    assert second.startswith("linear              does not fit   block_m=32")
    assert last.endswith(f"{path}; set FUSED_LORA_TILES={path} to use it")


def test_the_command_keeps_its_result_where_the_cache_is_looked_for(command: Command, tmp_path: Path) -> None:
    code, out, _ = command()
    assert code == 0 and out.endswith("set FUSED_LORA_TILES=cache to use it\n")
    assert read_tiles(tmp_path / "cache/fused_lora/tiles/a-gpu-1.json").tiles == with_panel(OTHERS[1])


def test_a_failed_search_leaves_the_old_file_and_no_new_one(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text("old")
    command.error = ValueError("tokens is 0; expected at least 1.")
    assert command("--output", path)[::2] == (2, "tokens is 0; expected at least 1.\n")
    assert [(p.name, p.read_text()) for p in tmp_path.glob("tiles*")] == [("tiles.json", "old")]


def test_the_command_finds_out_what_is_in_its_way_before_it_searches(command: Command, tmp_path: Path) -> None:
    code, out, errors = command("--output", tmp_path / "no folder/tiles.json")
    assert code == 2 and not out and "No such file or directory" in errors
    command.obstacle = "triton is not installed"
    assert command() == (2, "", "Nothing can be tuned, because triton is not installed.\n")
    assert not command.asked


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
def test_a_small_search_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    first_two = lambda tile, descriptors: list(neighbours(tile, descriptors))[:2]  # noqa: E731
    monkeypatch.setattr(tuning, "neighbours", first_two)
    trials: list[Trial] = []
    tiles = tune([(256, 512)], tokens=512, ranks=(8, 40), on_trial=trials.append)
    assert {(t.kernel, t.rank_block) for t in trials} == {
        ("linear", None),
        *((kernel, block) for kernel in ("panel", "drawn_panel", "adapter_grad", "grad_lora_A") for block in (16, 64)),
    }
    assert all(trial.ms is not None and trial.ms > 0 for trial in trials if trial.outcome == "timed")
    problem = make_problem(512, 256, 512, 8, dtype=torch.bfloat16, device="cuda")
    with fused_lora.use_backend("triton"), lookup.use_tiles(tiles):
        once, again = (lora_linear(*problem.arguments()[:4]) for _ in range(2))
    assert torch.equal(once, again)
