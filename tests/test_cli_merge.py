"""The commands merge, convert and inspect as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import TFT, assert_same_adapter, embedding, kohya_names, linear, merged
from safetensors.torch import load_file, save_file
from test_merge_file import an_adapter, assert_same, files, sharded, single

from fused_lora import cli
from fused_lora.adapter import Adapter
from fused_lora.adapter_io import read_adapter, write_adapter
from fused_lora.formats import FORMATS
from fused_lora.state_merge import merge_lora_into_state_dict

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def saved(folder: Path, adapter: Adapter | None = None, format: str = "peft") -> Path:
    path = folder / f"lora{FORMATS[format].suffix}"
    write_adapter(an_adapter() if adapter is None else adapter, path, format)
    return path


def merge(run: Run, base: Path, lora: Path, out: Path, *more: object) -> tuple[int, str, str]:
    return run("merge", "--base_model_path", base, "--lora_path", lora, "--output_path", out, *more)


def rows(text: str) -> dict[str, str]:
    return {line[:15].strip(): line[15:].strip() for line in text.splitlines()}


@pytest.mark.parametrize("shards", [False, True])
def test_merge_writes_what_the_function_gives_and_prints_its_report(shards: bool, run: Run, tmp_path: Path) -> None:
    base = sharded(tmp_path / "base") if shards else single(tmp_path / "base")
    lora, out = saved(tmp_path), tmp_path / "out"
    code, shown, errors = merge(run, base, lora, out, "--alpha", "0.5", "--dtype", "float32")
    assert code == 0 and not errors
    parts = sorted(out.glob("*.safetensors")) if shards else [out]
    tensors = {
        key: tensor
        for part in (sorted(base.glob("*.safetensors")) if shards else [base])
        for key, tensor in load_file(part).items()
    }
    expected = merge_lora_into_state_dict(tensors, read_adapter(lora), 0.5, dtype=torch.float32)
    assert_same({key: tensor for part in parts for key, tensor in load_file(part).items()}, expected)
    assert rows(shown) == {
        "format": "peft",
        "scaling": "2, times --alpha 0.5",
        "merged": "3 of 4 layers, 1 transposed",
        "replaced": "1: fc.bias",
        "missing": "1: absent",
        "unexpected": "1: stranger",
        "written": str(out),
    }


def test_merge_without_dtype_keeps_each_weights_own(run: Run, tmp_path: Path) -> None:
    base, lora = single(tmp_path / "base"), saved(tmp_path)
    assert merge(run, base, lora, tmp_path / "out.safetensors")[0] == 0
    assert_same(
        load_file(tmp_path / "out.safetensors"),
        merge_lora_into_state_dict(load_file(base), read_adapter(lora), dtype=None),
    )


def test_a_dry_run_prints_the_report_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    base, lora = sharded(tmp_path / "base"), saved(tmp_path)
    before = files(tmp_path)
    code, shown, errors = merge(run, base, lora, tmp_path / "out", "--dry-run")
    assert code == 0 and not errors and files(tmp_path) == before and not (tmp_path / "out").exists()
    assert rows(shown)["merged"] == "3 of 4 layers, 1 transposed" and "written" not in rows(shown)


def test_strict_fails_for_what_is_left_over(run: Run, tmp_path: Path) -> None:
    base, lora = single(tmp_path / "base"), saved(tmp_path)
    code, shown, errors = merge(run, base, lora, tmp_path / "out", "--strict")
    assert code == 2 and errors == "A part of the adapter is not in the base, which --strict forbids.\n"
    assert rows(shown)["missing"] == "1: absent" and not (tmp_path / "out").exists()
    whole = saved(tmp_path, Adapter({"fc": linear(5, 3)}), "kohya")
    assert merge(run, base, whole, tmp_path / "out", "--strict")[0] == 0


def test_an_output_head_that_changes_with_the_embeddings_is_said(run: Run, tmp_path: Path) -> None:
    base = single(tmp_path / "base", {"embed.weight": torch.zeros(11, 4)}).parent
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": True, "vocab_size": 11}))
    lora, out = saved(tmp_path, Adapter({"embed": embedding(11, 4)})), tmp_path / "out"
    code, shown, errors = merge(run, base, lora, out, "--strict")
    assert code == 2 and "ties its output head" in errors and errors.count("\n") == 1 and not out.exists()
    assert rows(shown)["tied"] == "1: embed.weight; the base has one weight for embeddings and output head"
    code, again, _ = merge(run, base, lora, out)
    assert code == 0 and "tied" in rows(again) and out.exists()


@pytest.mark.parametrize("command", ["merge", "convert"])
@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("a.safetensors", "a.safetensors"),
        ("a.safetensors", "folder/../a.safetensors"),
        ("a.safetensors", "hard.safetensors"),
        ("a.safetensors", "soft.safetensors"),
        ("soft.safetensors", "a.safetensors"),
        *(
            (source, output)
            for source in ("peft", "peft/adapter_config.json", "peft/adapter_model.safetensors", "linked")
            for output in ("peft/adapter_model.safetensors", "peft/new", "peft/deep/new", "linked/README.md", "outside")
        ),
    ],
)
def test_no_command_writes_over_its_source(command: str, source: str, output: str, run: Run, tmp_path: Path) -> None:
    base, adapter = single(tmp_path / "base"), Adapter({"fc": linear(5, 3)})
    write_adapter(adapter, tmp_path / "a.safetensors", "kohya")
    write_adapter(adapter, tmp_path / "peft", "peft")
    (tmp_path / "peft" / "README.md").write_text("mine")
    for folder in ("folder", "peft/deep"):
        (tmp_path / folder).mkdir()
    (tmp_path / "hard.safetensors").hardlink_to(tmp_path / "a.safetensors")
    (tmp_path / "soft.safetensors").symlink_to(tmp_path / "a.safetensors")
    (tmp_path / "linked").symlink_to(tmp_path / "peft")
    (tmp_path / "outside").symlink_to(tmp_path / "peft" / "adapter_model.safetensors")
    before = files(tmp_path)
    if command == "merge":
        code, shown, errors = merge(run, base, tmp_path / source, tmp_path / output)
    else:
        code, shown, errors = run("convert", tmp_path / source, tmp_path / output, "--to", "mistral")
    assert code == 2 and not shown and "expected another" in errors and errors.count("\n") == 1
    assert files(tmp_path) == before


def test_convert_keeps_the_base_and_may_write_beside_it(run: Run, tmp_path: Path) -> None:
    lora, base = saved(tmp_path, Adapter({"fc": linear(5, 3)}), "kohya"), sharded(tmp_path / "base")
    before = files(tmp_path)
    shard = next(base.glob("*.safetensors"))
    for model in (base, shard):
        code, _, errors = run("convert", lora, shard, "--to", "mistral", "--base_model_path", model)
        assert code == 2 and "expected another" in errors and files(tmp_path) == before
    assert run("convert", lora, base / "adapter", "--to", "peft", "--base_model_path", base)[0] == 0


def test_merge_says_that_no_scaling_is_stored(run: Run, tmp_path: Path) -> None:
    lora = saved(tmp_path, Adapter({"fc": linear(5, 3)}), "loralib")
    _, shown, _ = merge(run, single(tmp_path / "base"), lora, tmp_path / "out", "--alpha", "2")
    assert rows(shown)["scaling"] == "not stored, so --alpha alone 2"


def test_merge_says_how_square_weights_were_taken(run: Run, tmp_path: Path) -> None:
    base = single(tmp_path / "base", {"fc.weight": torch.zeros(3, 3)})
    lora = saved(tmp_path, Adapter({"fc": linear(3, 3)}), "kohya")
    _, shown, _ = merge(run, base, lora, tmp_path / "a")
    assert rows(shown)["square"].startswith("1 taken as (out, in), torch's layout;")
    _, shown, _ = merge(run, base, lora, tmp_path / "b", "--fan_in_fan_out")
    assert "square" not in rows(shown) and "1 transposed" in rows(shown)["merged"]
    assert torch.equal(load_file(tmp_path / "a")["fc.weight"], load_file(tmp_path / "b")["fc.weight"].T)
    peft = saved(tmp_path, Adapter({"fc": linear(3, 3)}, fan_in_fan_out=True))
    _, shown, _ = merge(run, base, peft, tmp_path / "c")
    assert rows(shown)["square"].startswith("1 taken as (in, out), as PEFT's config says;")
    _, shown, _ = merge(run, base, peft, tmp_path / "d", "--no-fan_in_fan_out")
    assert "square" not in rows(shown) and "0 transposed" in rows(shown)["merged"]


def test_merge_takes_enable_lora_for_loralibs_files(run: Run, tmp_path: Path) -> None:
    base = single(tmp_path / "base", {"qkv.weight": torch.zeros(9, 4)})
    lora = saved(tmp_path, Adapter({"qkv": merged(3, 4)}), "loralib")
    code, _, errors = merge(run, base, lora, tmp_path / "out")
    assert code == 2 and "enable_lora is not stored" in errors
    assert merge(run, base, lora, tmp_path / "out", "--enable_lora", "1,0,1")[0] == 0
    weight = load_file(tmp_path / "out")["qkv.weight"]
    assert weight[:3].any() and not weight[3:6].any() and weight[6:].any()


def test_as_a_program_with_one_sentence_and_code_2(tmp_path: Path) -> None:
    base, lora = single(tmp_path / "base"), saved(tmp_path)
    before = files(tmp_path)

    def program(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fused_lora", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    (tmp_path / "broken.safetensors").write_bytes(base.read_bytes()[:-1])
    broken = program(
        "merge",
        "--base_model_path",
        tmp_path / "broken.safetensors",
        "--lora_path",
        lora,
        "--output_path",
        tmp_path / "out",
    )
    absent = program("inspect", tmp_path / "none.safetensors")
    for done in (broken, absent):
        assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1 and done.stderr.endswith(".\n")
    (tmp_path / "broken.safetensors").unlink()
    assert files(tmp_path) == before
    done = program("merge", "--base_model_path", base, "--lora_path", lora, "--output_path", tmp_path / "out")
    assert done.returncode == 0 and not done.stderr and (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge"],
        ["merge", "--base_model_path", "a", "--lora_path", "b", "--output_path", "c", "--alpha", "x"],
        ["merge", "--base_model_path", "a", "--lora_path", "b", "--output_path", "c", "--enable_lora", "1,2"],
        ["merge", "--base_model_path", "a", "--lora_path", "b", "--output_path", "c", "--dtype", "int8"],
        ["convert", "a", "b"],
        ["convert", "a", "b", "--to", "gguf"],
        ["inspect"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("source", ["peft", "loralib", "kohya", "megatron", "fused_lora"])
def test_convert_between_any_two(source: str, to: str, run: Run, tmp_path: Path) -> None:
    adapter = Adapter({"blocks.0.q": linear(5, 3), "blocks.0.v": linear(5, 3, r=3)})
    path, target = saved(tmp_path, adapter, source), tmp_path / f"new{FORMATS[to].suffix}"
    base = single(tmp_path / "base", {f"{name}.weight": torch.zeros(5, 3) for name in adapter.layers})
    more = ["--base_model_path", base] if source == "kohya" else []
    more += [] if FORMATS[source].stores_alpha else ["--lora_alpha", 4]
    code, shown, errors = run("convert", path, target, "--to", to, *more)
    assert (code, errors) == (0, "")
    assert rows(shown)["written"] == f"{target}, 2 layers from {source} to {to}"
    again = read_adapter(target, to)
    if to == "kohya":
        again = again.with_names({flat: name for name, flat in kohya_names(adapter).items()})
    for name, layer in adapter.layers.items():
        assert torch.equal(again.layers[name].lora_A, layer.lora_A)
        assert torch.equal(again.layers[name].lora_B, layer.lora_B)
        assert again.layers[name].scaling == (layer.scaling if FORMATS[to].stores_alpha else None)
    if not FORMATS[to].stores_alpha:
        assert f"{to} stores no scaling; this adapter's is 1.3333333333333333, 2.0." in shown


def test_convert_needs_what_the_source_does_not_store(run: Run, tmp_path: Path) -> None:
    loralib = saved(tmp_path, Adapter({"qkv": merged(), "e": embedding()}), "loralib")
    kohya = saved(tmp_path, Adapter({"a.b": linear()}), "kohya")
    base = single(tmp_path / "base", {"a.c.weight": torch.zeros(5, 3)})
    before = files(tmp_path)
    for arguments, message in (
        ((loralib, "--to", "peft", "--enable_lora", "1,0,1"), "has no lora_alpha, which peft stores"),
        ((loralib, "--to", "peft", "--lora_alpha", 4), "enable_lora is not stored"),
        ((loralib, "--to", "peft", "--embeddings", "f"), "'f' is none of the adapter's linear layers"),
        ((kohya, "--to", "peft"), "expected --base_model_path, which has the dots"),
        ((kohya, "--to", "peft", "--base_model_path", base), "'lora_unet_a_b' and 0 other layers are not in the base"),
        ((kohya, "--to", "peft", "--base_model_path", tmp_path / "none.safetensors"), "No such file"),
    ):
        code, _, errors = run("convert", arguments[0], tmp_path / "new", *arguments[1:])
        assert code == 2 and message in errors and errors.count("\n") == 1, errors
    assert files(tmp_path) == before
    more = ("--lora_alpha", 4, "--enable_lora", "1,0,1", "--embeddings", "e")
    assert run("convert", loralib, tmp_path / "new", "--to", "peft", *more)[0] == 0
    read = read_adapter(tmp_path / "new")
    assert read.layers["e"].kind == "embedding" and read.layers["qkv"].r == 4


def test_convert_needs_a_base_for_one_enabled_slice(run: Run, tmp_path: Path) -> None:
    lora = saved(tmp_path, Adapter({"qkv": merged(slices=(True, False, False)), "fc": linear(5, 3)}), "loralib")
    more = ("--to", "peft", "--lora_alpha", 4, "--enable_lora", "1,0,0")
    code, _, errors = run("convert", lora, tmp_path / "new", *more)
    assert code == 2 and "may be linear or a MergedLinear" in errors and errors.count("\n") == 1
    base = single(tmp_path / "base", {"qkv.weight": torch.zeros(9, 4), "fc.weight": torch.zeros(5, 3)})
    assert run("convert", lora, tmp_path / "new", *more, "--base_model_path", base)[0] == 0
    B = read_adapter(tmp_path / "new").layers["qkv"].lora_B
    assert len(B) == 9 and B[:3].all() and not B[3:].any()
    assert len(read_adapter(tmp_path / "new").layers["fc"].lora_B) == 5


def test_convert_renames_what_is_beside_the_layers_too(run: Run, tmp_path: Path) -> None:
    others = {key: torch.ones(5) for key in ("fc.bias", "norm.bias", "stranger")}
    base = {f"transformer.{key}": torch.zeros(5) for key in ("fc.bias", "norm.bias")}
    base |= {"transformer.fc.weight": torch.zeros(5, 3)}
    lora = saved(tmp_path, Adapter({"fc": linear(5, 3)}, others))
    named = ("--base_model_path", single(tmp_path / "base", base))
    assert run("convert", lora, tmp_path / "new", "--to", "peft", *named)[0] == 0
    renamed = read_adapter(tmp_path / "new")
    assert set(renamed.layers) == {"transformer.fc"}
    assert set(renamed.others) == {"transformer.fc.bias", "transformer.norm.bias", "stranger"}


def test_inspect(run: Run, tmp_path: Path) -> None:
    layers = {"a.q": linear(5, 3, r=2), "b.q": linear(5, 3, r=3, dtype=torch.float16), "e": embedding(11, 4)}
    path = saved(tmp_path, Adapter(layers, {"head.weight": torch.zeros(2)}, fan_in_fan_out=True))
    code, shown, errors = run("inspect", path)
    assert code == 0 and not errors
    assert rows(shown) == {
        "format": "peft",
        "layers": "3",
        "kinds": "linear (2), embedding (1)",
        "r": "2 (2), 3 (1)",
        "lora_alpha": "4",
        "scaling": "2 (2), 1.33333 (1)",
        "dtypes": "float16, float32",
        "parameters": "70",
        "size": "232 bytes",
        "targets": "q (2), e (1)",
        "fan_in_fan_out": "True",
        "others": "1: head.weight",
    }
    assert "fan_in_fan_out" not in run("inspect", saved(tmp_path, Adapter({"x": linear()}), "loralib"))[1]
    assert rows(run("inspect", saved(tmp_path, Adapter({"m": merged()}), "fused_lora"))[1])["kinds"] == "merged"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\xff" * 40])
def test_inspect_of_broken_files_is_one_sentence(content: bytes, run: Run, tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors", "folder/adapter_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        code, shown, errors = run("inspect", tmp_path / name)
        assert code == 2 and not shown and errors.count("\n") == 1 and len(errors) < 500


def test_inspect_reads_what_it_is_told(run: Run, tmp_path: Path) -> None:
    state = {"transformer.x.lora_A.weight": torch.zeros(2, 3), "transformer.x.lora_B.weight": torch.zeros(5, 2)}
    save_file(state, tmp_path / "a.safetensors")
    assert rows(run("inspect", tmp_path / "a.safetensors")[1])["lora_alpha"] == "2"
    assert rows(run("inspect", tmp_path / "a.safetensors", "--from", "mistral")[1])["lora_alpha"] == "not stored"


def test_long_lists_are_cut(run: Run, tmp_path: Path) -> None:
    base = single(tmp_path / "base", {"l00.weight": torch.zeros(5, 3)})
    lora = saved(tmp_path, Adapter({f"l{i:02}": linear(5, 3) for i in range(30)}), "mistral")
    missing = rows(merge(run, base, lora, tmp_path / "out", "--dry-run")[1])["missing"]
    assert missing.startswith("29: l01, l02") and missing.endswith(", and 19 more")
    assert rows(run("inspect", lora)[1])["targets"].endswith("and 20 more")


def test_the_index_itself_names_the_model(run: Run, tmp_path: Path) -> None:
    base, lora = sharded(tmp_path / "base"), saved(tmp_path)
    assert merge(run, base / "model.safetensors.index.json", lora, tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["other"] == "kept"


def test_a_round_trip_through_the_program_keeps_every_number(run: Run, tmp_path: Path) -> None:
    adapter: Any = Adapter({"a.qkv": merged(slices=TFT, alpha=3.0), "b": linear(alpha=0.5, lora_dropout=0.25)})
    path = saved(tmp_path, adapter, "fused_lora")
    assert run("convert", path, tmp_path / "again.safetensors", "--to", "fused_lora")[0] == 0
    assert_same_adapter(read_adapter(tmp_path / "again.safetensors"), adapter)
