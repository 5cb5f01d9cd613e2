"""Adapters in files: each format read back, PEFT's and loralib's own files, and files that are broken or hostile."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from adapters import (
    TFT,
    adapters,
    as_stored,
    assert_same_adapter,
    conv,
    embedding,
    examples,
    kohya_names,
    linear,
    merged,
    whole_numbers,
)
from checkpoints import ALPHA, R, assert_same_entries, filled
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import fused_lora
from fused_lora.adapter import Adapter, AdapterLayer
from fused_lora.adapter_io import load_state_dict_from_safetensors, read_adapter, write_adapter
from fused_lora.formats import FORMATS
from fused_lora.state_merge import merge_lora_into_state_dict

FILES = {"fused_lora": ["linear", "embedding", "merged"]} | {
    format: list(spelling.kinds) for format, spelling in FORMATS.items() if format != "fused_lora"
}


LINEAR_KEYS = {"lora_A.weight": (2, 3), "lora_B.weight": (5, 2)}


def written(adapter: Adapter, format: str, folder: Any) -> Path:
    path = Path(folder) / f"adapter{FORMATS[format].suffix}"
    write_adapter(adapter, path, format)
    return path


@pytest.mark.parametrize("format", FILES)
@examples(15)
@given(data=st.data())
def test_a_file_gives_back_every_bit_and_every_number_that_its_format_has(format: str, data: st.DataObject) -> None:
    adapter = data.draw(adapters(tuple(FILES[format]), one_dtype=format == "mistral"))
    if format in ("peft", "fused_lora", "diffusers", "diffusers-old"):
        dropout, rslora = data.draw(st.sampled_from([0.0, 0.25])), data.draw(st.booleans())
        layers = {
            path: replace(layer, lora_dropout=dropout, use_rslora=rslora) for path, layer in adapter.layers.items()
        }
        adapter = replace(adapter, layers=layers, others={"head.weight": torch.randn(2, 3)})
    if format.startswith("diffusers"):
        adapter = adapter.with_names({path: f"unet.{path}" for path in adapter.layers})
    with tempfile.TemporaryDirectory() as folder:
        again = read_adapter(written(adapter, format, folder), None)
        assert sorted(file.name for file in Path(folder).iterdir()) == [f"adapter{FORMATS[format].suffix}"]
    if format == "kohya":
        adapter = adapter.with_names(kohya_names(adapter))
    assert again.format == format
    assert_same_adapter(again, as_stored(adapter, format))


class Model(nn.Module):
    """A layer of every kind that PEFT adapts and can merge, in a block, with a head beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.block = nn.ModuleDict(
            {
                "fc": nn.Linear(6, 7),
                "square": nn.Linear(6, 6),
                "conv1": nn.Conv1d(4, 6, 3),
                "conv2": nn.Conv2d(4, 8, (3, 2)),
                "conv3": nn.Conv3d(2, 4, 2),
                "point": nn.Conv2d(4, 3, 1),
            }
        )
        self.head = nn.Linear(6, 2)


TARGETS = ["embed", "fc", "square", "conv1", "conv2", "conv3", "point"]


def peft_model(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """A base's state dict and PEFT's model over it, every adapter's entry drawn anew."""
    peft = pytest.importorskip("peft", reason="needs PEFT")
    base = filled(Model().to(dtype), "cpu")
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    options = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS} | changes
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return before, model


def peft_layers(model: Any) -> dict[str, Any]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }


PATTERNS = {"rank_pattern": {"fc": 4, "^block.conv1": 1}, "alpha_pattern": {"block.fc": 7, "conv.*": 0.5}}


@pytest.mark.filterwarnings("ignore")  # PEFT's, about rslora with patterns and about embeddings it saves
@pytest.mark.parametrize(
    "changes",
    [
        {},
        PATTERNS,
        PATTERNS | {"use_rslora": True, "lora_dropout": 0.25},
        {"bias": "lora_only", "modules_to_save": ["head"]},
        {"bias": "all"},
    ],
    ids=["plain", "patterns", "rslora", "lora-only", "bias-all"],
)
def test_pefts_own_files_say_what_peft_says(changes: Any, tmp_path: Path) -> None:
    _, model = peft_model(**changes)
    model.save_pretrained(tmp_path / "one")
    adapter = read_adapter(tmp_path / "one")
    theirs = peft_layers(model)
    assert set(adapter.layers) == set(theirs) and adapter.fan_in_fan_out is False
    for path, layer in adapter.layers.items():
        assert layer.scaling == theirs[path].scaling["default"] and layer.r == theirs[path].r["default"]
        assert layer.lora_dropout == changes.get("lora_dropout", 0.0)
    for way in (tmp_path / "one" / "adapter_config.json", tmp_path / "one" / "adapter_model.safetensors"):
        assert_same_adapter(read_adapter(way), adapter)

    write_adapter(adapter, tmp_path / "two", "peft")
    assert_same_entries(
        load_file(tmp_path / "two" / "adapter_model.safetensors"),
        load_file(tmp_path / "one" / "adapter_model.safetensors"),
    )
    assert_same_adapter(read_adapter(tmp_path / "two"), adapter)
    # PEFT takes it for its own: same merged weights.
    peft = pytest.importorskip("peft")
    again = peft.PeftModel.from_pretrained(filled(Model(), "cpu"), tmp_path / "two")
    assert_same_entries(again.merge_and_unload().state_dict(), model.merge_and_unload().state_dict())


def test_pefts_older_pickle_is_read_as_well(tmp_path: Path) -> None:
    _, model = peft_model()
    model.save_pretrained(tmp_path / "new")
    (tmp_path / "old").mkdir()
    torch.save(load_file(tmp_path / "new" / "adapter_model.safetensors"), tmp_path / "old" / "adapter_model.bin")
    config = (tmp_path / "new" / "adapter_config.json").read_text()
    (tmp_path / "old" / "adapter_config.json").write_text(config)
    assert_same_adapter(read_adapter(tmp_path / "old"), read_adapter(tmp_path / "new"))


def test_the_file_that_is_named_is_read(tmp_path: Path) -> None:
    folder = written(Adapter({"x": linear(alpha=3.0)}), "peft", tmp_path)
    other = {f"base_model.model.x.{key}": torch.ones(shape) for key, shape in LINEAR_KEYS.items()}
    torch.save(other, folder / "adapter_model.bin")
    save_file(other, folder / "adapter_model.safetensors.bak")
    new, old, backup = (
        read_adapter(folder / f"adapter_model.{end}") for end in ("safetensors", "bin", "safetensors.bak")
    )
    assert_same_adapter(read_adapter(folder), new)
    assert_same_adapter(read_adapter(folder / "adapter_config.json"), new)
    assert not torch.equal(new.layers["x"].lora_A, torch.ones(2, 3))
    for adapter, scaling in ((old, 1.5), (backup, None)):
        assert torch.equal(adapter.layers["x"].lora_A, torch.ones(2, 3)) and adapter.layers["x"].scaling == scaling
    (folder / "adapter_model.safetensors").unlink()
    for name in ("adapter_model.safetensors", "adapter_model.does_not_exist"):
        with pytest.raises(FileNotFoundError, match=name):
            read_adapter(folder / name)


def test_a_config_with_the_fewest_fields_is_enough(tmp_path: Path) -> None:
    folder = written(Adapter({"x": linear(r=2, alpha=3.0)}), "peft", tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    assert read_adapter(folder).layers["x"].scaling == 1.5


def test_patterns_are_for_whole_names_and_written_for_whole_paths(tmp_path: Path) -> None:
    """As PEFT matches them: "fc" is for fc and block.fc, but not for myfc."""
    layers = {"fc": linear(r=4, alpha=9.0), "block.fc": linear(), "block.myfc": linear(), "x": linear()}
    folder = written(Adapter(layers), "peft", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert {path: layer.scaling for path, layer in read_adapter(folder).layers.items()} == dict.fromkeys(layers, 2) | {
        "fc": 2.25
    }
    config |= {"alpha_pattern": {"fc": 1}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    alphas = {path: layer.lora_alpha for path, layer in read_adapter(folder).layers.items()}
    assert alphas == {"fc": 1, "block.fc": 1, "block.myfc": 4, "x": 4}


@pytest.mark.filterwarnings("ignore")  # PEFT's
@pytest.mark.parametrize(
    ("others", "bias", "modules"),
    [
        ([], "none", None),
        (["block.fc.bias"], "lora_only", None),
        (["block.fc.bias", "head.bias"], "all", None),
        (["block.fc.bias", "head.bias", "head.weight"], "lora_only", ["head"]),
        (
            ["head.bias", "head.weight", "block.square.weight", "block.square.bias"],
            "none",
            ["block.square", "head"],
        ),
    ],
)
def test_peft_loads_what_is_beside_the_adapter(others: Any, bias: str, modules: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT")
    # Of whole numbers both merges are exact, in whichever order a CPU's BLAS adds up.
    base, layer = filled(Model(), "cpu"), AdapterLayer(whole_numbers(2, 6), whole_numbers(7, 2), 2, 4.0)
    base.block["fc"].weight.data = whole_numbers(7, 6, seed=1)
    trained = {key: torch.randn_like(base.state_dict()[key]) for key in others}
    folder = written(Adapter({"block.fc": layer}, trained), "peft", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == (bias, modules)
    expected = merge_lora_into_state_dict(base.state_dict(), read_adapter(folder), dtype=None)
    merged_state = peft.PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    assert_same_entries(merged_state, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters is"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights is 'OLoRA', which changes the base"),
        ({"use_rslora": "false"}, "use_rslora is 'false' in the config; expected true or false"),
        ({"fan_in_fan_out": "false"}, "fan_in_fan_out is 'false' in the config; expected true or false"),
        ({"r": 3}, r"Layer 'x' has r=3 in its config; expected 2"),
        ({"r": "2"}, r"Layer 'x' has r='2'"),
        ({"rank_pattern": {"x": 5}}, r"Layer 'x' has r=5"),
        ({"rank_pattern": [2]}, r"rank_pattern is \[2\]"),
        ({"alpha_pattern": {"(": 5}}, r"alpha_pattern has '\('; expected a regular expression"),
        ({"lora_alpha": None}, "Layer 'x' has lora_alpha=None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 1e39}, r"lora_alpha is 1e\+39; expected a finite number of float32"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_dropout": 2}, "lora_dropout is 2"),
    ],
)
def test_a_config_of_more_than_plain_lora_is_refused(changes: Any, message: str, tmp_path: Path) -> None:
    folder = written(Adapter({"x": linear(r=2)}), "peft", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_pefts_dora_is_refused(tmp_path: Path) -> None:
    _, model = peft_model(use_dora=True, target_modules=["fc"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is DoRA"):
        read_adapter(tmp_path)


def test_loralibs_own_checkpoint(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {
            "embed": loralib.Embedding(11, 4, r=R, lora_alpha=int(ALPHA)),
            "fc": loralib.Linear(4, 6, r=3, lora_alpha=int(ALPHA)),
            "qkv": loralib.MergedLinear(6, 9, r=R, lora_alpha=int(ALPHA), enable_lora=list(TFT)),
        }
    )
    state = loralib.lora_state_dict(filled(model, "cpu"), bias="lora_only")
    torch.save(state, tmp_path / "a.pt")
    adapter = read_adapter(tmp_path / "a.pt")
    assert adapter.format == "loralib" and set(adapter.others) == {"fc.bias", "qkv.bias"}
    kinds = {path: (layer.kind, layer.r, layer.lora_alpha) for path, layer in adapter.layers.items()}
    assert kinds == {"embed": ("linear", R, None), "fc": ("linear", 3, None), "qkv": ("merged", R, None)}
    write_adapter(adapter, tmp_path / "b.pt", "loralib")
    assert_same_entries(torch.load(tmp_path / "b.pt", weights_only=True), state)


def ours(seed: int) -> Any:
    model = nn.ModuleDict(
        {
            "embed": fused_lora.Embedding(11, 4, r=R, lora_alpha=ALPHA),
            "fc": fused_lora.Linear(4, 6, r=3, lora_alpha=5, lora_dropout=0.25),
            "qkv": fused_lora.MergedLinear(6, 9, r=R, lora_alpha=ALPHA, enable_lora=list(TFT)),
            "conv": fused_lora.Conv2d(2, 4, 3, r=R, lora_alpha=ALPHA),
        }
    )
    return filled(model, "cpu", seed)


def test_this_packages_own_file_is_read_and_written(tmp_path: Path) -> None:
    model = ours(1)
    fused_lora.save_adapter(model, tmp_path / "a.safetensors", bias="lora_only")
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.format == "fused_lora" and set(adapter.others) == {"fc.bias", "qkv.bias", "conv.conv.bias"}
    assert {path: layer.kind for path, layer in adapter.layers.items()} == {
        "embed": "embedding",
        "fc": "linear",
        "qkv": "merged",
        "conv": "conv",
    }
    assert all(layer.scaling == model[path].scaling for path, layer in adapter.layers.items())
    assert adapter.layers["qkv"].enable_lora == TFT and adapter.layers["fc"].lora_dropout == 0.25

    write_adapter(adapter, tmp_path / "b.safetensors", "fused_lora")
    other = ours(2)
    fused_lora.load_adapter(other, tmp_path / "b.safetensors")
    assert_same_entries(fused_lora.lora_state_dict(other, "lora_only"), fused_lora.lora_state_dict(model, "lora_only"))


def test_an_own_file_from_before_kinds_were_stored_is_read_as_it_was(tmp_path: Path) -> None:
    fused_lora.save_adapter(ours(1), tmp_path / "a.safetensors")
    fields = ("r", "lora_alpha", "lora_dropout", "enable_lora")
    header = {
        name: {field: getattr(config, field) for field in fields}
        for name, config in fused_lora.adapter_configs(tmp_path / "a.safetensors").items()
    }
    tensors = load_file(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "a.safetensors", {"fused_lora": json.dumps(header)})
    layers = read_adapter(tmp_path / "a.safetensors").layers
    kinds = {path: (layer.kind, layer.fan_in_fan_out) for path, layer in layers.items()}
    assert kinds == {
        "embed": ("linear", None),
        "fc": ("linear", None),
        "qkv": ("merged", None),
        "conv": ("conv", None),
    }


def test_own_files_and_peft_tell_each_other_which_weights_are_in_by_out(tmp_path: Path) -> None:
    layers = {"a": linear(), "b": linear(), "e": embedding()}
    for word in (True, False):
        ours = read_adapter(written(Adapter(layers, fan_in_fan_out=word), "fused_lora", tmp_path))
        assert {path: layer.fan_in_fan_out for path, layer in ours.layers.items()} == {"a": word, "b": word, "e": None}
        notes = write_adapter(ours, tmp_path / f"peft-{word}", "peft")
        assert read_adapter(tmp_path / f"peft-{word}").fan_in_fan_out is word and not notes
    mixed = layers | {"a": replace(layers["a"], fan_in_fan_out=True)}
    notes = write_adapter(Adapter(mixed, fan_in_fan_out=False), tmp_path / "mixed", "peft")
    assert notes == ("peft stores one fan_in_fan_out; the layers have both, and true is stored.",)
    assert read_adapter(tmp_path / "mixed").fan_in_fan_out is True


def test_an_adapter_of_peft_loads_into_this_packages_layers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT")
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1"]))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "peft")
    write_adapter(read_adapter(tmp_path / "peft"), tmp_path / "ours.safetensors", "fused_lora")
    layers = nn.Sequential(fused_lora.Linear(6, 6, r=3), fused_lora.Linear(6, 4, r=3)).double()
    for layer, theirs in zip(layers, base, strict=True):
        layer.load_state_dict(theirs.base_layer.state_dict(), strict=False)
    fused_lora.load_adapter(layers, tmp_path / "ours.safetensors")
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.allclose(layers(x), model.double()(x), rtol=1e-12)


def test_diffusers_metadata_is_a_config_for_each_component(tmp_path: Path) -> None:
    layers = {
        "unet.a": linear(r=2, alpha=3.0),
        "unet.b": linear(r=4, alpha=3.0),
        "text_encoder.a": linear(r=1, alpha=7.0),
    }
    path = written(Adapter(layers), "diffusers", tmp_path)
    with_header = read_adapter(path)
    assert {p: layer.scaling for p, layer in with_header.layers.items()} == {
        "unet.a": 1.5,
        "unet.b": 0.75,
        "text_encoder.a": 7,
    }
    save_file(load_file(path), path)
    assert all(layer.scaling == 1 for layer in read_adapter(path).layers.values())
    assert read_adapter(path, "mistral").layers["unet.a"].scaling is None
    save_file(
        load_file(path), path, metadata={"lora_adapter_metadata": json.dumps({"unet.r": 9, "unet.lora_alpha": 1})}
    )
    with pytest.raises(ValueError, match="Layer 'a' has r=9 in its config; expected 2"):
        read_adapter(path)
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": "["})
    with pytest.raises(ValueError, match="lora_adapter_metadata is no JSON"):
        read_adapter(path)


def test_a_lone_models_diffusers_file_has_one_config_for_all(tmp_path: Path) -> None:
    layers = {"mid.a": linear(r=2, alpha=3.0), "mid.b": linear(r=4, alpha=6.0)}
    path = written(Adapter(layers), "mistral", tmp_path)
    config = {"r": 2, "lora_alpha": 3, "rank_pattern": {"b": 4}, "alpha_pattern": {"b": 6}, "peft_type": "LORA"}
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps(config)})
    adapter = read_adapter(path)
    assert adapter.format == "diffusers"
    assert {name: layer.scaling for name, layer in adapter.layers.items()} == {"mid.a": 1.5, "mid.b": 1.5}
    for refused in (config | {"use_dora": True}, {f"mid.{key}": v for key, v in (config | {"use_dora": True}).items()}):
        save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps(refused)})
        with pytest.raises(ValueError, match="use_dora is True"):
            read_adapter(path)


def test_peft_has_one_dropout_and_says_so(tmp_path: Path) -> None:
    adapter = Adapter({"x": linear(lora_dropout=0.5), "y": linear(lora_dropout=0.25)})
    notes = write_adapter(adapter, tmp_path / "a", "peft")
    assert any("one lora_dropout; the layers have [0.25, 0.5]" in note for note in notes)
    assert read_adapter(tmp_path / "a").layers["x"].lora_dropout == 0


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil-was-here",)


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin"])
@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 100, b"{}", b"\x80\x02.", b"PK\x03\x04" + b"\0" * 40])
def test_broken_files_are_refused_in_a_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as caught:
        read_adapter(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["loralib", "mistral", "fused_lora", "peft"])
def test_truncated_files_are_refused(format: str, tmp_path: Path) -> None:
    path = written(Adapter({"x": linear(50, 40, 8)}), format, tmp_path)
    truncated(path / "adapter_model.safetensors" if format == "peft" else path)
    with pytest.raises(ValueError, match=r"expected|it is no"):
        read_adapter(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_needs_more_than_tensors_is_refused_and_not_run(
    protocol: int, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"x.lora_A": Evil()}
    if zipped:
        torch.save(state, "a.pt", pickle_protocol=protocol)
    else:
        Path("a.pt").write_bytes(pickle.dumps(state, protocol))
    reason = "mkdir" if protocol == 2 else "Unsupported operand"
    with pytest.raises(ValueError, match=rf"'a.pt': it is no pickle of tensors alone.*{reason}"):
        read_adapter("a.pt")
    assert not Path("evil-was-here").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [([torch.zeros(1)], "it holds list; expected a dictionary"), ({"step": 3}, "'step' is int; expected tensors")],
)
def test_a_pickle_of_something_else_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / "a.pt")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    folder = written(Adapter({"x": linear()}), "peft", tmp_path)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read_adapter(folder)


def test_a_config_in_another_encoding_is_refused(tmp_path: Path) -> None:
    folder = written(Adapter({"x": linear()}), "peft", tmp_path)
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="utf-8"):
        read_adapter(folder)


def test_a_header_that_names_other_layers_is_refused(tmp_path: Path) -> None:
    path = written(Adapter({"x": linear()}), "fused_lora", tmp_path)
    header = {"y": {"r": 2, "lora_alpha": 1, "lora_dropout": 0}}
    save_file(load_file(path), path, metadata={"fused_lora": json.dumps(header)})
    with pytest.raises(ValueError, match=r"differ in the layers \['x', 'y'\]"):
        read_adapter(path)


def test_missing_files_are_an_os_error(tmp_path: Path) -> None:
    for path in (tmp_path / "a.pt", tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(OSError):
            read_adapter(path)
    with pytest.raises(ValueError, match="format is 'x'"):
        read_adapter(tmp_path, "x")
    with pytest.raises(ValueError, match="format is 'kohya'; expected 'loralib', as the file says"):
        read_adapter(written(Adapter({"x": linear()}), "loralib", tmp_path), "kohya")


def test_what_is_there_stays_if_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Adapter({"x": linear(), "e": embedding()})
    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_text("before")
    with pytest.raises(ValueError, match="of kind 'embedding'"):
        write_adapter(adapter, tmp_path / "a.safetensors", "kohya")

    def fail(*arguments: Any, **options: Any) -> None:
        Path(str(arguments[1])).write_text("half") if isinstance(arguments[1], Path) else arguments[1].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(fused_lora.adapter_io, "save_file", fail)
    for name, format in (("a.safetensors", "fused_lora"), ("a.pt", "loralib"), ("new", "peft")):
        with pytest.raises(OSError, match="No space left"):
            write_adapter(adapter, tmp_path / name, format)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.safetensors": "before", "a.pt": "before"}


def test_folders_in_the_way_are_kept(tmp_path: Path) -> None:
    adapter = Adapter({"x": linear()})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for name, format in (("full", "peft"), ("full", "kohya"), ("empty", "kohya"), ("file", "peft")):
        with pytest.raises(FileExistsError):
            write_adapter(adapter, tmp_path / name, format)
    write_adapter(adapter, tmp_path / "empty", "peft")
    assert_same_adapter(read_adapter(tmp_path / "empty"), adapter)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    with pytest.raises(OSError):
        write_adapter(adapter, tmp_path / "nowhere" / "a.safetensors", "fused_lora")


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *((f"a{end}", "kohya") for end in (".pt", ".pth", ".bin", ".ckpt")),
        ("a.pt", "fused_lora"),
        ("a.safetensors", "loralib"),
    ],
)
def test_an_ending_that_would_be_misread_is_refused(name: str, format: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}'; expected it to end in {FORMATS[format].suffix}"):
        write_adapter(Adapter({"x": linear()}), tmp_path / name, format)
    assert not list(tmp_path.iterdir())
    write_adapter(Adapter({"x": linear()}), tmp_path / "a.pt", "peft")
    assert read_adapter(tmp_path / "a.pt").format == "peft"


def test_load_state_dict_from_safetensors(tmp_path: Path, device: str) -> None:
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.tensor(3), "c": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = load_state_dict_from_safetensors(str(tmp_path / "a.safetensors"), device)
    assert all(tensor.device.type == device for tensor in loaded.values())
    assert {key: (tensor.dtype, tensor.tolist()) for key, tensor in loaded.items()} == {
        key: (tensor.dtype, tensor.tolist()) for key, tensor in tensors.items()
    }
    truncated(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors': it is no whole safetensors file"):
        load_state_dict_from_safetensors(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        load_state_dict_from_safetensors(tmp_path / "b.safetensors")


def test_merged_and_converted_layers_survive_every_way(tmp_path: Path) -> None:
    """loralib's MergedLinear to PEFT and on to this package: the dense adapter's bits do not change any more."""
    adapter = Adapter({"qkv": merged(alpha=None, slices=None), "c": linear(alpha=None)})
    path = written(adapter, "loralib", tmp_path)
    read = read_adapter(path).with_enable_lora(TFT).with_alpha(6)
    peft = read_adapter(written(read, "peft", tmp_path))
    assert peft.layers["qkv"].r == 4 and peft.layers["qkv"].scaling == read.layers["qkv"].scaling == 3
    again = read_adapter(written(peft, "fused_lora", tmp_path))
    assert_same_adapter(again, replace(peft, fan_in_fan_out=None))


def test_a_convolution_of_peft_goes_to_kohya_and_back(tmp_path: Path) -> None:
    adapter = Adapter({"unet.c": conv(kernel=(3, 3))})
    kohya = read_adapter(written(adapter, "kohya", tmp_path))
    assert list(kohya.layers) == ["lora_unet_c"]
    back = kohya.with_names({"lora_unet_c": "unet.c"})
    assert_same_adapter(read_adapter(written(back, "peft", tmp_path)), adapter)


def test_layers_are_compared_by_identity() -> None:
    """Equality of dataclasses would ask tensors for a truth value."""
    layer = AdapterLayer(torch.zeros(2, 3), torch.zeros(5, 2), 2)
    assert layer == layer and layer != replace(layer)
