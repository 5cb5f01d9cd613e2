"""Merging from files to files: the same bits as in memory, shards, little memory, and nothing half written."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import DTYPES, conv, embedding, examples, linear
from checkpoints import assert_same_entries
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fused_lora.merge_file
from fused_lora.adapter import Adapter
from fused_lora.adapter_io import write_adapter
from fused_lora.merge_file import base_tensors, merge_file, merge_file_report
from fused_lora.safetensors_stream import TensorReader, write_header, write_tensor
from fused_lora.state_merge import merge_lora_into_state_dict, merge_report

INDEX = "model.safetensors.index.json"


def model() -> dict[str, torch.Tensor]:
    return {
        "fc.weight": torch.randn(5, 3).bfloat16(),
        "fc.bias": torch.randn(5),
        "embed.weight": torch.randn(11, 4).half(),
        "conv.weight": torch.randn(5, 3, 3, 2, dtype=torch.float64),
        "norm.weight": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 3),
        "step": torch.tensor(3),
        "mask": torch.tensor([True, False, True]),
        "quantised": torch.randn(3).to(torch.float8_e4m3fn),
    }


def an_adapter() -> Adapter:
    layers = {"fc": linear(5, 3), "embed": embedding(11, 4), "conv": conv(5, 3, (3, 2)), "absent": linear()}
    return Adapter(layers, {"fc.bias": torch.randn(5), "stranger": torch.zeros(1)})


def single(folder: Path, tensors: Any = None, name: str = "base.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(model() if tensors is None else tensors, folder / name, metadata={"format": "pt", "note": "mine"})
    return folder / name


def sharded(folder: Path, tensors: Any = None, shards: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = model() if tensors is None else tensors
    names = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file(
            {key: tensors[key] for key in tensors if names[key] == name}, folder / name, metadata={"format": "pt"}
        )
    content = {"metadata": {"total_size": 0, "other": "kept"}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(content))
    (folder / "config.json").write_text('{"model_type": "mine"}')
    (folder / "tokenizer.model").write_bytes(b"\0\1")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    return folder


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype and tensor.shape == expected[key].shape, key
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[key].reshape(-1).view(torch.uint8)), key


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_a_file_merges_to_the_bits_that_a_state_dict_does(dtype: torch.dtype | None, tmp_path: Path) -> None:
    base, adapter, seen = single(tmp_path / "base"), an_adapter(), []
    before = files(tmp_path)
    report = merge_file(base, adapter, tmp_path / "out.safetensors", 0.5, dtype=dtype, on_tensor=seen.append)
    expected = merge_lora_into_state_dict(load_file(base), adapter, 0.5, dtype=dtype)
    assert_same(load_file(tmp_path / "out.safetensors"), expected)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "mine"}
    assert report == merge_report(load_file(base), adapter) == merge_file_report(base, adapter)
    assert report.missing == ("absent",) and report.unexpected == ("stranger",)
    assert sum(seen) == sum(tensor.nbytes for tensor in load_file(base).values()) and len(seen) == len(expected)
    (tmp_path / "out.safetensors").unlink()
    assert files(tmp_path) == before


@pytest.mark.parametrize("way", ["folder", "index"])
def test_shards_merge_shard_by_shard(way: str, tmp_path: Path) -> None:
    folder, adapter = sharded(tmp_path / "base"), an_adapter()
    before = files(folder)
    merge_file(folder if way == "folder" else folder / INDEX, adapter, tmp_path / "out", dtype=torch.float32)
    expected = merge_lora_into_state_dict(loaded(folder), adapter, dtype=torch.float32)
    assert_same(loaded(tmp_path / "out"), expected)
    assert set(files(tmp_path / "out")) == set(before) - {"pytorch_model.bin"}
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "mine"}'
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == json.loads(before[INDEX])["weight_map"]
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in expected.values()), "other": "kept"}
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert name in file.keys()  # noqa: SIM118
    assert files(folder) == before and {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_a_folder_with_one_file_is_a_model_too(tmp_path: Path) -> None:
    single(tmp_path / "base", name="model.safetensors")
    described = ("config.json", "qwen.tiktoken", "spiece.spm", "additional_chat_templates/tools.jinja")
    for name in (*described, "weights.bin", "additional_chat_templates/notes.txt", "other/tools.jinja"):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text("{}")
    merge_file(tmp_path / "base", an_adapter(), tmp_path / "out")
    assert set(files(tmp_path / "out")) == {"model.safetensors", *described}
    assert base_tensors(tmp_path / "base").keys() == model().keys()


TIED = {"tie_word_embeddings": True, "vocab_size": 11}
HEAD, ALL = torch.zeros(11, 4), ("m.embed.weight", "lm_head", "lm_head.weight")


@pytest.mark.parametrize(
    ("config", "more", "expected"),
    [
        (TIED, {}, ALL),
        ({"vocab_size": 11, "text_config": {"tie_word_embeddings": True}}, {}, ALL),
        ({"tie_word_embeddings": True, "text_config": {"vocab_size": 11}}, {}, ALL),
        (TIED | {"vocab_size": 5}, {}, ("m.fc.weight", "lm_head", "lm_head.weight")),
        (TIED, {"m.lm_head.weight": HEAD}, ()),
        (TIED | {"tie_word_embeddings": False}, {}, ()),
        ({}, {}, ()),
        (None, {}, ()),
    ],
)
@pytest.mark.parametrize("shards", [False, True])
def test_what_a_tied_base_cannot_hold_apart_is_named(
    shards: bool, config: Any, more: Any, expected: Any, tmp_path: Path
) -> None:
    tensors = {"m.fc.weight": torch.zeros(5, 3), "m.embed.weight": torch.zeros(11, 4)} | more
    folder = tmp_path / "base"
    sharded(folder, tensors) if shards else single(folder, tensors)
    (folder / "config.json").unlink(missing_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    layers = {"m.fc": linear(5, 3), "m.embed": embedding(11, 4), "lm_head": linear(11, 4)}
    adapter = Adapter(layers, {"lm_head.weight": HEAD, "m.embed.weight": torch.ones(11, 4)})
    if more:
        adapter = adapter.with_names({"lm_head": "m.lm_head"})
    assert merge_file_report(folder, adapter).tied == expected
    assert merge_file(folder, adapter, tmp_path / "out").tied == expected
    saved_whole = Adapter({"m.fc": linear(5, 3)}, {"m.embed.weight": torch.ones(11, 4)})
    assert ("m.embed.weight" in merge_file_report(folder, saved_whole).tied) == ("m.embed.weight" in expected)
    assert not merge_file_report(folder, Adapter({"m.fc": linear(5, 3)})).tied or expected[0] == "m.fc.weight"


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    single(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        merge_file(tmp_path / "base", an_adapter(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@examples(40)
@given(data=st.data())
def test_files_are_written_as_safetensors_reads_them(data: st.DataObject) -> None:
    dtypes = [*DTYPES, torch.int64, torch.int8, torch.uint16, torch.bool, torch.complex64, torch.float8_e5m2]
    shapes = st.lists(st.integers(0, 3), max_size=3)
    entries = data.draw(
        st.dictionaries(
            st.text(max_size=5).filter(lambda name: name != "__metadata__"),
            st.tuples(st.sampled_from(dtypes), shapes),
            max_size=6,
        )
    )
    entries = {name: entry for name, entry in entries.items() if name.isprintable()}
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in entries.items()}
    metadata = data.draw(st.dictionaries(st.sampled_from(["format", "ü"]), st.sampled_from(["pt", "é\n"])))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        with path.open("wb") as file:
            for name in write_header(file, tensors, metadata):
                # Where other readers, which map the file, can view it.
                assert file.tell() % tensors[name].element_size() == 0
                write_tensor(file, tensors[name])
        assert_same(load_file(path), tensors)
        with safe_open(path, "pt") as theirs, TensorReader(path) as ours:
            assert (theirs.metadata() or {}) == ours.metadata == metadata
            assert_same({name: ours.read(name) for name in ours.tensors}, tensors)
        save_file(tensors, path)
        with TensorReader(path) as ours:
            assert_same({name: ours.read(name) for name in ours.tensors}, tensors)


LIMITED = """
import resource, sys, torch
from fused_lora.adapter_io import read_adapter
from fused_lora.merge_file import merge_file
from safetensors.torch import load_file

# One product, so that what torch starts at the first one is there before the limit.
torch.randn(4, 4) @ torch.randn(4, 4)
adapter = read_adapter("a.pt")
held = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + (64 << 20),) * 2)
if sys.argv[1] == "stream":
    merge_file("base.safetensors", adapter, "out.safetensors")
else:
    load_file("base.safetensors")
"""


def test_a_model_larger_than_memory_merges(tmp_path: Path) -> None:
    """192 MiB of weights under a limit of 64 MiB more than the process had; reading them at once breaks it."""
    if sys.platform != "linux":
        pytest.skip("RLIMIT_DATA counts mappings on Linux alone")
    torch.manual_seed(1)
    tensors = {f"layers.{i}.weight": torch.full((1024, 1024), float(i)) for i in range(48)}
    save_file(tensors, tmp_path / "base.safetensors")
    layers = {f"layers.{i}": linear(1024, 1024, r=1) for i in range(48)}
    write_adapter(Adapter(layers), tmp_path / "a.pt", "loralib")

    def run(way: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", textwrap.dedent(LIMITED), way]
        path = os.pathsep.join([str(Path(fused_lora.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    assert "Cannot allocate memory" in run("at-once").stderr
    done = run("stream")
    assert done.returncode == 0, done.stderr
    expected = merge_lora_into_state_dict(tensors, Adapter(layers), 0.25, dtype=None)
    assert_same(load_file(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_interrupted_run_leaves_nothing(kind: str, error: Any, tmp_path: Path) -> None:
    base = single(tmp_path / "base") if kind == "file" else sharded(tmp_path / "base")
    out = tmp_path / ("out.safetensors" if kind == "file" else "out")
    if kind == "file":
        out.write_text("before")
    before, seen = files(tmp_path), []

    def fail(size: int) -> None:
        seen.append(size)
        if len(seen) == 6:
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        merge_file(base, an_adapter(), out, on_tensor=fail)
    assert files(tmp_path) == before and (kind == "file" or not out.exists())
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_is_refused_leaves_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"dtype is {dtype}"):
        merge_file(single(tmp_path / "base"), an_adapter(), tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_codes_beside_an_adapter_keep_their_dtype(tmp_path: Path) -> None:
    codes = torch.tensor([0.5, 2, 8]).to(torch.float8_e4m3fn)
    adapter = Adapter({"fc": linear(5, 3)}, {"quantised": codes})
    merge_file(single(tmp_path / "base"), adapter, tmp_path / "out", dtype=torch.float32)
    assert_same({"quantised": load_file(tmp_path / "out")["quantised"]}, {"quantised": codes})


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_cannot_be_merged_leaves_nothing(kind: str, tmp_path: Path) -> None:
    base = single(tmp_path / "base") if kind == "file" else sharded(tmp_path / "base")
    before = files(tmp_path)
    for adapter in (Adapter({"nowhere": linear()}), Adapter({"fc": linear(4, 4)})):
        with pytest.raises(ValueError, match=r"nowhere|fc"):
            merge_file(base, adapter, tmp_path / "out")
    assert files(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_base_itself_and_folders_in_use_are_kept(tmp_path: Path) -> None:
    base, folder = single(tmp_path / "one"), sharded(tmp_path / "many")
    (tmp_path / "link.safetensors").symlink_to(base)
    before = files(tmp_path)
    for path, out in (
        (base, base),
        (base, tmp_path / "link.safetensors"),
        (folder, folder),
        (folder / INDEX, folder),
        (folder, next(folder.glob("*.safetensors"))),
    ):
        with pytest.raises(ValueError, match="the base itself"):
            merge_file(path, an_adapter(), out)
    for path, out in ((base, tmp_path / "many"), (folder, tmp_path / "one")):
        with pytest.raises(FileExistsError):
            merge_file(path, an_adapter(), out)
    with pytest.raises(OSError):
        merge_file(base, an_adapter(), tmp_path / "nowhere" / "out.safetensors")
    assert files(tmp_path) == before


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 64,
        with_header({}, length=2**63),
        with_header({}, length=2**46),
        with_header(b"x" * 20),
        with_header(b"[" * 200_000),
        with_header(b"\xff\xfe"),
        with_header([]),
        with_header({"x.weight": 3}),
        with_header({"x.weight": {}}),
        with_header({"x.weight": ENTRY}, b"\0" * 7),
        with_header({"x.weight": ENTRY}, b"\0" * 9),
        with_header({"x.weight": ENTRY | {"dtype": "F12"}}, b"\0" * 8),
        with_header({"x.weight": ENTRY | {"dtype": ["F32"]}}, b"\0" * 8),
        with_header({"x.weight": ENTRY | {"shape": [3]}}, b"\0" * 8),
        with_header({"x.weight": ENTRY | {"shape": [-2]}}, b"\0" * 8),
        with_header({"x.weight": ENTRY | {"shape": [2.0]}}, b"\0" * 8),
        with_header({"x.weight": ENTRY | {"shape": [2**62, 2**62]}}, b"\0" * 8),
        with_header({"x.weight": ENTRY | {"shape": [2**70, 0]}}, b"\0" * 8),
        with_header({"x.weight": ENTRY | {"data_offsets": [8, 16]}}, b"\0" * 16),
        with_header({"x.weight": ENTRY | {"data_offsets": [0]}}, b"\0" * 8),
        with_header({"x.weight": ENTRY | {"data_offsets": [0.0, 8.5]}}, b"\0" * 8),
        with_header({"x.weight": ENTRY, "y": ENTRY}, b"\0" * 8),
        with_header({"x.weight": ENTRY, "__metadata__": {"a": 3}}, b"\0" * 8),
        with_header({"x.weight": ENTRY, "__metadata__": "text"}, b"\0" * 8),
        with_header({"x.weight": ENTRY, "__metadata__": []}, b"\0" * 8),
    ],
    ids=range(28),
)
def test_a_broken_or_hostile_base_is_refused_in_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "base.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"base.safetensors' is no whole safetensors file"):
        merge_file(tmp_path / "base.safetensors", Adapter({"x": linear()}), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_metadata_that_are_null_are_none(tmp_path: Path) -> None:
    """As safetensors itself reads them."""
    (tmp_path / "base").write_bytes(with_header({"x.weight": ENTRY, "__metadata__": None}, b"\0" * 8))
    assert list(load_file(tmp_path / "base")) == ["x.weight"]
    with TensorReader(tmp_path / "base") as reader:
        assert reader.metadata == {} and list(reader.tensors) == ["x.weight"]


@pytest.mark.parametrize("way", ["read", "copy"])
def test_a_base_that_shrinks_while_it_is_read_is_refused(way: str, tmp_path: Path) -> None:
    base = single(tmp_path / "base", {"x": torch.zeros(100_000)})
    with TensorReader(base) as reader, (tmp_path / "copy").open("wb") as copy:
        os.truncate(base, 200_000)
        with pytest.raises(ValueError, match="ended within 'x'"):
            reader.read("x") if way == "read" else reader.copy("x", copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: "", "has no weight_map"),
        (lambda index: "[]", "has no weight_map"),
        (lambda index: "[" * 100_000, "has no weight_map"),
        (lambda index: json.dumps({"weight_map": {}}), "has no weight_map"),
        (lambda index: json.dumps({"weight_map": ["a"]}), "has no weight_map"),
        (lambda index: json.dumps({"weight_map": {"a": 3}}), "has no weight_map"),
        (lambda index: json.dumps(index | {"metadata": 3}), "has no weight_map"),
        (
            lambda index: json.dumps({"weight_map": {"a": "../base.safetensors"}}),
            "names the shard '../base.safetensors'",
        ),
        (lambda index: json.dumps({"weight_map": {"a": "/etc/x.safetensors"}}), "names the shard '/etc/x.safetensors'"),
        (lambda index: json.dumps({"weight_map": {"a": "config.json"}}), "names the shard 'config.json'"),
        (
            lambda index: json.dumps(
                {"weight_map": index["weight_map"] | {"ghost": "model-00001-of-00003.safetensors"}}
            ),
            "'ghost' is in 'no shard'",
        ),
        (
            lambda index: json.dumps(
                {"weight_map": index["weight_map"] | {"step": "model-00003-of-00003.safetensors"}}
            ),
            "'step' is in 'model-00001",
        ),
        (
            lambda index: json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != "step"}}),
            "'step' is in 'model-00001.*expected 'none'",
        ),
    ],
)
def test_a_broken_or_hostile_index_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base")
    (folder / INDEX).write_text(change(json.loads((folder / INDEX).read_text())))
    with pytest.raises(ValueError, match=message):
        merge_file(folder, an_adapter(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_that_are_missing_or_hold_the_same_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base")
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ValueError, match=r"is in 'model-00001-of-00003.safetensors' and in 'model-00002"):
        merge_file(folder, an_adapter(), tmp_path / "out")
    shards[1].write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors' is no whole"):
        merge_file(folder, an_adapter(), tmp_path / "out")
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        merge_file(folder, an_adapter(), tmp_path / "out")
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match="has 2 safetensors files and no one index"):
        merge_file(folder, an_adapter(), tmp_path / "out")
    with pytest.raises(ValueError, match="expected safetensors: a file, a folder or an index"):
        merge_file(folder / "pytorch_model.bin", an_adapter(), tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        merge_file(tmp_path / "none.safetensors", an_adapter(), tmp_path / "out")


def test_streams_and_dictionaries_agree_on_what_they_compute(tmp_path: Path) -> None:
    """The same functions plan and sum; a file's planner sees shapes alone."""
    base, adapter = single(tmp_path / "base"), an_adapter()
    assert_same_entries(
        {key: tensor.new_zeros(()) for key, tensor in load_file(base).items() if tensor.dtype == torch.bfloat16},
        {key: torch.zeros((), dtype=t.dtype) for key, t in base_tensors(base).items() if t.dtype == torch.bfloat16},
    )
    assert merge_file_report(base, adapter, fan_in_fan_out=True) == merge_report(
        load_file(base), adapter, fan_in_fan_out=True
    )
