"""Tables of tiles as files, and which table a kernel takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from fused_lora.kernels import config, lookup
from fused_lora.kernels.config import HOPPER, INTERPRETER, PanelTile, Tiles
from fused_lora.kernels.tiles_file import Tuned, as_json, read_tiles, slug

NAME = "NVIDIA H200 (test)"


def table(block_m: int) -> Tiles:
    """A table unlike all others, told by the number."""
    tile = PanelTile(block_m=block_m, block_i=64, num_warps=2, num_stages=5)
    return replace(HOPPER, panel=MappingProxyType(dict.fromkeys(config.RANK_BLOCKS, tile)))


def written(path: Path, tiles: Tiles, capability: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(Tuned(tiles, NAME, capability, "3.7.1")))
    return path


@pytest.mark.parametrize("tiles", [*config.TABLES.values(), config.SAFE, config.IRREGULAR, INTERPRETER, table(128)])
def test_a_table_comes_back_from_its_file(tiles: Tiles, tmp_path: Path) -> None:
    tuned = read_tiles(written(tmp_path / "tiles.json", tiles))
    assert tuned == Tuned(tiles, NAME, 90, "3.7.1")
    assert as_json(tuned) == (tmp_path / "tiles.json").read_text()
    with pytest.raises(TypeError):
        tuned.tiles.panel[16] = tuned.tiles.panel[32]  # type: ignore[index]


def changed(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        if to is None:
            del content[path[-1]]
        else:
            content[path[-1]] = to

    return change


WRONG = {
    "another format": (changed("format", to=2), "format is 2; expected 1"),
    "no device": (changed("device", to=None), "the file has no key 'device'; expected capability, device"),
    "a device that is no text": (changed("device", to=3), "device is 3; expected a text"),
    "a capability that is no number": (changed("capability", to="9.0"), "capability is '9.0'; expected a whole number"),
    "an unknown key": (changed("author", to="me"), "the file has the key 'author'; expected"),
    "an unknown kernel": (changed("tiles", "norm", to={}), "tiles has the key 'norm'; expected linear, update"),
    "no kernel": (changed("tiles", "update", to=None), "tiles has no key 'update'; expected"),
    "no object": (changed("tiles", "linear", to=[1]), "tiles.linear is a list; expected an object with block_m"),
    "a missing rank": (changed("tiles", "panel", "64", to=None), "tiles.panel has no key '64'; expected 16, 32, 64"),
    "an unknown rank": (changed("tiles", "panel", "8", to={}), "tiles.panel has the key '8'; expected 16"),
    "a missing number": (
        changed("tiles", "grad_lora_A", "16", "programs", to=None),
        "tiles.grad_lora_A.16 has no key 'programs'; expected",
    ),
    "an unknown number": (changed("tiles", "linear", "block_k", to=64), "tiles.linear has the key 'block_k'"),
    "no power of two": (
        changed("tiles", "adapter_grad", "32", "block_i", to=48),
        "tiles.adapter_grad.32.block_i is 48; expected a power of two of at least 16",
    ),
    "a block of nothing": (changed("tiles", "linear", "block_m", to=0), "tiles.linear.block_m is 0; expected a whole"),
    "a negative block": (
        changed("tiles", "linear", "block_m", to=-16),
        "tiles.linear.block_m is -16; expected a whole",
    ),
    "a narrow block": (
        changed("tiles", "linear", "block_j", to=16),
        "tiles.linear.block_j is 16; expected .* least 32",
    ),
    "a fraction": (
        changed("tiles", "linear", "num_stages", to=2.5),
        "tiles.linear.num_stages is 2.5; expected a whole number",
    ),
    "a truth for a number": (
        changed("tiles", "linear", "num_stages", to=True),
        "tiles.linear.num_stages is True; expected a whole",
    ),
    "a number for a truth": (
        changed("tiles", "linear", "descriptors", to=1),
        "tiles.linear.descriptors is 1; expected true or",
    ),
    "warps": (changed("tiles", "update", "num_warps", to=3), "tiles.update.num_warps is 3; expected one of 1, 2, 4, 8"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_refused_by_its_name_and_key(wrong: str, tmp_path: Path) -> None:
    change, message = WRONG[wrong]
    path = written(tmp_path / "tiles.json", HOPPER)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"tiles.json' is no table of tiles: {message}"):
        read_tiles(path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe"])
def test_what_is_no_json_object_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"tiles.json' is no table of tiles: "):
        read_tiles(path)


def test_a_gpus_name_becomes_a_files() -> None:
    assert slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
    assert slug("NVIDIA H100 80GB HBM3 MIG 1g.10gb ") == "nvidia-h100-80gb-hbm3-mig-1g-10gb"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """A GPU that is not there: sm_90, by the name NAME, with empty folders of shipped and cached tables."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSED_LORA_TILES", raising=False)
    forget()
    yield torch.device("cuda", 63)
    forget()


def forget() -> None:
    config.capability.cache_clear()
    lookup._found.cache_clear()


def looked_up(device: torch.device) -> Tiles:
    forget()
    return lookup.tiles_for(device, torch.bfloat16, 64, 32)


def test_the_table_is_the_one_in_force_or_asked_for_or_shipped_or_the_architectures(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert looked_up(gpu) is HOPPER
    # What was tuned here is not taken unless it is asked for.
    written(lookup.cached(NAME), table(16))
    assert lookup.cached(NAME) == tmp_path / "cache/fused_lora/tiles/nvidia-h200-test.json"
    assert looked_up(gpu) is HOPPER
    written(lookup.SHIPPED / "nvidia-h200-test.json", table(32))
    assert looked_up(gpu) == table(32)
    monkeypatch.setenv("FUSED_LORA_TILES", str(written(tmp_path / "mine.json", table(64))))
    assert looked_up(gpu) == table(64)
    monkeypatch.setenv("FUSED_LORA_TILES", "cache")
    assert looked_up(gpu) == table(16)
    with lookup.use_tiles(table(128)):
        assert looked_up(gpu) == table(128)


def test_a_gpu_of_no_known_architecture_gets_the_safe_table(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 77))
    assert looked_up(gpu) is config.SAFE


def test_the_cache_lies_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert lookup.cached("A 1") == Path("/home/somebody/.cache/fused_lora/tiles/a-1.json")


@pytest.mark.parametrize("asked", ["", "cache", "/nowhere/tiles.json"])
def test_a_file_that_was_asked_for_and_is_not_there_is_no_reason_to_take_another_table(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("FUSED_LORA_TILES", asked)
    with pytest.raises(FileNotFoundError, match=rf"FUSED_LORA_TILES is '{asked}', and '.*' is no file; expected"):
        looked_up(gpu)


def test_tiles_for_another_architecture_are_refused(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FUSED_LORA_TILES", str(written(tmp_path / "tiles.json", config.AMPERE, capability=80)))
    with pytest.raises(ValueError, match=r"of compute capability 8.0; expected 9.0, that of cuda:63"):
        looked_up(gpu)


def test_a_table_serves_regular_sizes_in_16_bit_dtypes_alone(gpu: torch.device) -> None:
    cpu, half = torch.device("cpu"), torch.float16
    with lookup.use_tiles(table(16)):
        assert lookup.tiles_for(gpu, half, 48, 16) == lookup.tiles_for(cpu, half) == table(16)
        assert lookup.tiles_for(gpu, torch.float32, 48) is config.FLOAT32
        assert lookup.tiles_for(gpu, half, 48, 40) is lookup.tiles_for(gpu, half, aligned=False) is config.IRREGULAR
        for sizes, dtype, aligned in (((48,), torch.float32, True), ((40,), half, True), ((48,), half, False)):
            assert lookup.tiles_for(cpu, dtype, *sizes, aligned=aligned) is INTERPRETER


def test_use_tiles_restores_what_was_before() -> None:
    cpu = torch.device("cpu")
    with lookup.use_tiles(table(16)):
        with pytest.raises(KeyError), lookup.use_tiles(table(32)):
            assert lookup.table_of(cpu) == table(32)
            raise KeyError
        assert lookup.table_of(cpu) == table(16)
    assert lookup.table_of(cpu) is INTERPRETER
    with pytest.raises(TypeError, match="tiles is a PosixPath; expected a Tiles"), lookup.use_tiles(Path("x")):  # type: ignore[arg-type]
        pass


def test_every_table_that_ships_is_whole_and_has_its_gpus_name() -> None:
    for path in lookup.SHIPPED.glob("*"):
        assert path.name == f"{slug(read_tiles(path).device)}.json"
