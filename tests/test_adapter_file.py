"""Adapters in files of their own: save_adapter, load_adapter and adapter_configs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ALPHA, BIASES, TFT, R, add, assert_same_entries, drop, filled, rename
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fused_lora
from fused_lora import AdapterConfig, adapter_configs, load_adapter, lora_state_dict, save_adapter


def adapted(
    device: str, seed: int, dtype: torch.dtype | None = None, adapter_dtype: torch.dtype | None = None, **changes: Any
) -> Any:
    """A model of layers with ranks, alphas and dropouts of their own. changes: to the MergedLinear's arguments."""
    options: dict[str, Any] = {"r": R, "lora_alpha": ALPHA, "dtype": dtype, "adapter_dtype": adapter_dtype}
    with_dropout = options | {"lora_dropout": 0.25}
    merged = options | {"r": 3, "lora_alpha": 1, "lora_dropout": 0.5, "enable_lora": TFT, "fan_in_fan_out": True}
    model = nn.ModuleDict(
        {
            "embedding": fused_lora.Embedding(11, 4, **options),
            "plain": nn.Linear(4, 3, dtype=dtype),
            "block": nn.Sequential(fused_lora.Linear(4, 6, **with_dropout), fused_lora.Linear(4, 6, r=0, dtype=dtype)),
            "qkv": fused_lora.MergedLinear(6, 9, **(merged | changes)),
            "conv": fused_lora.Conv2d(2, 4, 3, groups=2, **with_dropout),
        }
    )
    return filled(model, device, seed)


CONFIGS = {
    "embedding": AdapterConfig(R, ALPHA, 0.0, kind="embedding"),
    "block.0": AdapterConfig(R, ALPHA, 0.25, fan_in_fan_out=False, kind="linear"),
    "qkv": AdapterConfig(3, 1, 0.5, TFT, fan_in_fan_out=True, kind="merged"),
    "conv": AdapterConfig(R, ALPHA, 0.25, kind="conv"),
}


def entries(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}


def lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "scaling")}


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, tuple[Any, ...]]]:
    """Entries, merged weights and numbers: all of a model that a load could change."""
    tensors = entries(model) | {f"{key} as it is": p.detach().clone() for key, p in model.named_parameters()}
    numbers = {
        name: (layer.lora_alpha, layer.scaling, layer.merged, layer.r) for name, layer in lora_layers(model).items()
    }
    return tensors, numbers


def assert_unchanged(model: nn.Module, before: tuple[dict[str, Tensor], dict[str, tuple[Any, ...]]]) -> None:
    after = snapshot(model)
    assert_same_entries(after[0], before[0])
    assert after[1] == before[1]


@pytest.mark.parametrize("target_mode", [True, False], ids=["into-train", "into-eval"])
@pytest.mark.parametrize("source_mode", [True, False], ids=["from-train", "from-eval"])
@pytest.mark.parametrize("bias", BIASES)
def test_an_adapter_file_brings_back_every_bit_and_every_number(
    bias: Any, source_mode: bool, target_mode: bool, tmp_path: Path, device: str
) -> None:
    source, target = adapted(device, 1).train(source_mode), adapted(device, 2)
    for layer in lora_layers(target).values():
        layer.lora_alpha, layer.scaling = 40, 40 / layer.r
    target["conv"].lora_dropout.p = 0.125
    target.train(target_mode)
    base = entries(target)
    written = {key: tensor.clone() for key, tensor in lora_state_dict(source, bias).items()}
    save_adapter(source, tmp_path / "adapter.safetensors", bias)
    assert adapter_configs(tmp_path / "adapter.safetensors") == CONFIGS
    load_adapter(target, tmp_path / "adapter.safetensors")
    assert_same_entries(entries(target), base | written)
    for name, layer in lora_layers(target).items():
        assert (layer.lora_alpha, layer.scaling) == (CONFIGS[name].lora_alpha, CONFIGS[name].lora_alpha / layer.r)
        assert layer.merged == (not target_mode)
    assert target["conv"].lora_dropout.p == 0.125
    # What a merged model computes with is the new adapter over its own base.
    fresh = adapted(device, 2)
    fresh.load_state_dict(base | written)
    fresh.eval(), target.eval()
    assert_same_entries(snapshot(target)[0], snapshot(fresh)[0])
    assert not list(tmp_path.glob("*.unfinished")) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("path_type", [str, Path])
def test_an_adapter_file_is_plain_safetensors_and_loads_at_the_root(
    path_type: Callable[[Any], Any], tmp_path: Path, device: str
) -> None:
    source, path = filled(fused_lora.Linear(4, 3, r=2, lora_alpha=8), device), path_type(tmp_path / "a b.safetensors")
    save_adapter(source, path)
    assert adapter_configs(path) == {"": AdapterConfig(2, 8, 0.0, fan_in_fan_out=False, kind="linear")}
    assert_same_entries({key: t.to(device) for key, t in load_file(path).items()}, lora_state_dict(source))
    target = filled(fused_lora.Linear(4, 3, r=2), device, seed=2)
    load_adapter(target, path)
    assert_same_entries(lora_state_dict(target), lora_state_dict(source))
    assert target.scaling == 4


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_adapter_files_keep_the_dtype(
    dtype: torch.dtype, adapter_dtype: torch.dtype | None, tmp_path: Path, device: str
) -> None:
    if adapter_dtype is not None and dtype == torch.float64:
        pytest.skip("float32 adapters go beside half-precision bases")
    source, target = adapted(device, 1, dtype, adapter_dtype), adapted(device, 2, dtype, adapter_dtype)
    save_adapter(source, tmp_path / "adapter")
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter").values()} == {adapter_dtype or dtype}
    load_adapter(target, tmp_path / "adapter")
    assert_same_entries(lora_state_dict(target), lora_state_dict(source))


def test_a_float32_file_is_rounded_into_a_half_adapter(tmp_path: Path, device: str) -> None:
    source, target = adapted(device, 1), adapted(device, 2, torch.bfloat16)
    save_adapter(source, tmp_path / "adapter")
    load_adapter(target, tmp_path / "adapter")
    expected = {key: tensor.to(torch.bfloat16) for key, tensor in lora_state_dict(source).items()}
    assert_same_entries(lora_state_dict(target), expected)


def tied_model(device: str, seed: int) -> Any:
    """One module under two names, two modules that share an adapter, and a head that shares its embedding's weight."""
    shared = fused_lora.Linear(4, 4, r=R)
    first, second = fused_lora.Linear(4, 6, r=R), fused_lora.Linear(4, 6, r=R)
    second.lora_A = first.lora_A
    embedding, head = fused_lora.Embedding(11, 4, r=R), nn.Linear(4, 11)
    head.weight = embedding.weight
    layers = {"one": shared, "two": shared, "first": first, "second": second, "embedding": embedding, "head": head}
    return filled(nn.ModuleDict(layers), device, seed)


@pytest.mark.parametrize("mode", [True, False])
def test_tied_layers_and_tied_adapters_round_trip(mode: bool, tmp_path: Path, device: str) -> None:
    source, target = tied_model(device, 1).train(mode), tied_model(device, 2).train(mode)
    save_adapter(source, tmp_path / "adapter", "all")
    load_adapter(target, tmp_path / "adapter")
    assert_same_entries(lora_state_dict(target, "all"), lora_state_dict(source, "all"))
    assert target["one"] is target["two"] and target["first"].lora_A is target["second"].lora_A
    if not mode:
        copied = copy.deepcopy(target).train().eval()
        assert_same_entries(snapshot(target)[0], snapshot(copied)[0])


def test_saving_leaves_the_model_alone_and_overwrites_a_file(tmp_path: Path, device: str) -> None:
    first, second = adapted(device, 1).eval(), adapted(device, 2)
    before = snapshot(first)
    save_adapter(second, tmp_path / "adapter")
    save_adapter(first, tmp_path / "adapter")
    assert_unchanged(first, before)
    assert_same_entries({k: t.to(device) for k, t in load_file(tmp_path / "adapter").items()}, lora_state_dict(first))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_an_interrupted_save_leaves_the_old_file_whole_and_nothing_else(
    exists: bool, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(tensors: dict[str, Tensor], path: Any, metadata: Any = None) -> None:
        save_file(tensors, path, metadata)
        Path(path).write_bytes(Path(path).read_bytes()[:-7])
        raise error("No space left on device")

    path = tmp_path / "adapter"
    if exists:
        save_adapter(adapted("cpu", 1), path)
    old = path.read_bytes() if exists else b""
    monkeypatch.setattr("fused_lora.adapter_file.save_file", fails)
    with pytest.raises(error, match="No space"):
        save_adapter(adapted("cpu", 2), path)
    assert list(tmp_path.iterdir()) == ([path] if exists else [])
    assert not exists or path.read_bytes() == old


def test_an_interrupted_rename_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter"
    save_adapter(adapted("cpu", 1), path)
    old = path.read_bytes()

    def fails(*arguments: Any) -> None:
        raise OSError("Stale file handle")

    monkeypatch.setattr(Path, "replace", fails)
    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="Stale"):
        save_adapter(adapted("cpu", 2), path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == old


def assert_one_sentence(error: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    message = str(error.value)
    assert message.endswith(".") and ". " not in message and "\n" not in message, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), fused_lora.Linear(2, 2, r=0), nn.Sequential()], ids=["plain", "r=0", "empty"]
)
def test_saving_a_model_without_lora_is_an_error_and_writes_nothing(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        save_adapter(model, tmp_path / "adapter")
    assert_one_sentence(raised, "model", "LoRA")
    assert not list(tmp_path.iterdir())


def test_saving_to_a_pickles_ending_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        save_adapter(adapted("cpu", 1), tmp_path / "adapter.pt")
    assert_one_sentence(raised, "path", "adapter.pt'", ".safetensors")
    assert not list(tmp_path.iterdir())


def test_configs_are_read_without_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(adapted("cpu", 1), tmp_path / "adapter")

    class HeaderAlone:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._opened = safe_open(*arguments, **options)

        def __enter__(self) -> HeaderAlone:
            self.metadata = self._opened.__enter__().metadata
            return self

        def __exit__(self, *exception: Any) -> None:
            self._opened.__exit__(*exception)

    monkeypatch.setattr("fused_lora.adapter_file.safe_open", HeaderAlone)
    assert adapter_configs(tmp_path / "adapter") == CONFIGS


def test_saving_with_an_unknown_bias_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="bias is 'some'"):
        save_adapter(adapted("cpu", 1), tmp_path / "adapter", "some")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_saving_where_no_folder_is_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        save_adapter(adapted("cpu", 1), tmp_path / "nowhere" / "adapter")


def write_truncated(path: Path) -> None:
    save_adapter(adapted("cpu", 1), path)
    path.write_bytes(path.read_bytes()[:-5])


def write_torch(path: Path) -> None:
    torch.save(lora_state_dict(adapted("cpu", 1)), path)


# Files that save_adapter did not write.
FOREIGN: dict[str, Callable[[Path], Any]] = {
    "without metadata": lambda path: save_file({"x": torch.zeros(2)}, path),
    "of somebody else": lambda path: save_file({"x": torch.zeros(2)}, path, {"format": "pt"}),
    "an adapter without header": lambda path: save_file(lora_state_dict(adapted("cpu", 1)), path),
    "truncated": write_truncated,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("lora_A: 1\n" * 20),
    "short": lambda path: path.write_bytes(b"abc"),
    "torch.save": write_torch,
}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_and_changes_nothing(kind: str, mode: bool, tmp_path: Path, device: str) -> None:
    path, model = tmp_path / "some file", adapted(device, 2).train(mode)
    FOREIGN[kind](path)
    before = snapshot(model)
    with pytest.raises(ValueError) as raised:
        load_adapter(model, path)
    assert_one_sentence(raised, "some file", "save_adapter")
    assert_unchanged(model, before)
    with pytest.raises(ValueError) as raised:
        adapter_configs(path)
    assert_one_sentence(raised, "some file", "save_adapter")


@pytest.mark.parametrize("there", ["nothing", "folder"])
def test_a_file_that_cannot_be_read_is_an_oserror(there: str, tmp_path: Path, device: str) -> None:
    path, model = tmp_path / "adapter", adapted(device, 2)
    if there == "folder":
        path.mkdir()
    before = snapshot(model)
    with pytest.raises(FileNotFoundError if there == "nothing" else OSError):
        load_adapter(model, path)
    with pytest.raises(FileNotFoundError if there == "nothing" else OSError):
        adapter_configs(path)
    assert_unchanged(model, before)


def other_file(path: Path, **changes: Any) -> None:
    save_adapter(adapted("cpu", 1, **changes), path)


def with_entries(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    """Writes a file of save_adapter's whose tensors were changed behind its back."""

    def write(path: Path) -> None:
        other_file(path)
        header, tensors = header_of(path), load_file(path)
        change(tensors)
        save_file(tensors, path, {"fused_lora": json.dumps(header)})

    return write


def header_of(path: Path) -> Any:
    """The metadata entry, read from the format's own first bytes: a length, then JSON."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["fused_lora"])


# Files of another model, and what the error has to name.
OTHERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "other layers": (
        lambda path: save_adapter(nn.ModuleDict({"x": fused_lora.Linear(4, 6, r=R)}), path),
        ["Layer '", "alone"],
    ),
    "one layer more": (
        lambda path: save_adapter(nn.ModuleDict({**adapted("cpu", 1), "more": fused_lora.Linear(2, 2, r=1)}), path),
        ["'more'", "the file"],
    ),
    "one layer less": (
        lambda path: save_adapter(nn.ModuleDict({k: v for k, v in adapted("cpu", 1).items() if k != "qkv"}), path),
        ["'qkv'", "model"],
    ),
    "other rank": (lambda path: other_file(path, r=5), ["'qkv'", "r=3", "r=5"]),
    "other slices": (lambda path: other_file(path, enable_lora=[False, True, True]), ["'qkv'", "enable_lora"]),
    "no lora_B": (with_entries(drop("conv.lora_B")), ["'conv.lora_B'"]),
    "other shape": (with_entries(add("block.0.lora_A", torch.zeros(4, 2))), ["'block.0.lora_A'", "(4, 2)", "(2, 4)"]),
    "one dimension": (with_entries(add("conv.lora_A", torch.zeros(36))), ["'conv.lora_A'", "(36,)"]),
    "no dimension": (with_entries(add("conv.lora_A", torch.zeros(()))), ["'conv.lora_A'", "()"]),
    "other name": (with_entries(rename("block.0.lora_A", "block.0.lora_a")), ["block.0.lora_"]),
    "one tensor more": (with_entries(add("block.0.lora_C", torch.zeros(2))), ["'block.0.lora_C'"]),
    "a bias of another shape": (with_entries(add("block.0.bias", torch.zeros(2))), ["'block.0.bias'", "(2,)", "(6,)"]),
    "a bias that is not there": (with_entries(add("embedding.bias", torch.zeros(4))), ["'embedding.bias'"]),
    "the base weight": (with_entries(add("block.0.weight", torch.zeros(6, 4))), ["'block.0.weight'"]),
    "a neighbour's weight": (with_entries(add("plain.weight", torch.zeros(3, 4))), ["'plain.weight'"]),
}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_model_is_refused_and_changes_nothing(
    kind: str, mode: bool, tmp_path: Path, device: str
) -> None:
    model, (write, words) = adapted(device, 2, lora_alpha=11).train(mode), OTHERS[kind]
    write(tmp_path / "adapter")
    before = snapshot(model)
    with pytest.raises(ValueError) as raised:
        load_adapter(model, tmp_path / "adapter")
    assert_one_sentence(raised, *words)
    assert_unchanged(model, before)


def test_loading_into_a_model_without_lora_is_an_error(tmp_path: Path) -> None:
    other_file(tmp_path / "adapter")
    with pytest.raises(ValueError) as raised:
        load_adapter(nn.Linear(4, 6), tmp_path / "adapter")
    assert_one_sentence(raised, "Layer '", "the file")


GOOD = {"r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0, "enable_lora": None}
HOSTILE = {
    "no JSON": "{",
    "nothing": "",
    "a list": "[1, 2]",
    "a number": "7",
    "null": "null",
    "a string": '"layers"',
    "a layer that is a number": json.dumps({"": 7}),
    "a layer that is a list": json.dumps({"": [2, 6.0, 0.0]}),
    "no r": json.dumps({"": {"lora_alpha": ALPHA, "lora_dropout": 0.0}}),
    "one field more": json.dumps({"": GOOD | {"rank": 2}}),
    "slices of a linear layer": json.dumps({"": GOOD | {"kind": "linear", "enable_lora": TFT}}),
    "deep nesting": "[" * 100_000,
    **{
        f"{field} is {repr(value)[:20]}": json.dumps({"": GOOD | {field: value}})
        for field, values in {
            "r": ["2", None, 2.5, -2, 0, [2]],
            "lora_alpha": ["6", None, [6.0], {}, float("nan"), float("inf"), 10**400],
            "lora_dropout": ["0", None, 1.5, float("nan")],
            "enable_lora": ["yes", [True, "x"]],
            "fan_in_fan_out": ["true", 1],
            "kind": ["dense", 1, True],
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("reader", ["adapter_configs", "load_adapter"])
@pytest.mark.parametrize("header", HOSTILE)
def test_a_hostile_header_is_a_valueerror_and_changes_nothing(header: str, reader: str, tmp_path: Path) -> None:
    model = filled(fused_lora.Linear(4, 3, r=R, lora_alpha=1), "cpu").eval()
    save_file(lora_state_dict(model), tmp_path / "adapter", {"fused_lora": HOSTILE[header]})
    before = snapshot(model)
    with pytest.raises(ValueError) as raised:
        if reader == "adapter_configs":
            adapter_configs(tmp_path / "adapter")
        else:
            load_adapter(model, tmp_path / "adapter")
    assert_one_sentence(raised)
    assert_unchanged(model, before)


def test_the_header_that_the_hostile_ones_are_made_from_is_a_good_one(tmp_path: Path) -> None:
    model = filled(fused_lora.Linear(4, 3, r=R, lora_alpha=1), "cpu").eval()
    save_file(lora_state_dict(model), tmp_path / "adapter", {"fused_lora": json.dumps({"": GOOD})})
    load_adapter(model, tmp_path / "adapter")
    assert model.lora_alpha == ALPHA


def test_a_scaling_that_was_set_travels_as_a_lora_alpha(tmp_path: Path) -> None:
    """Such as lora_alpha / sqrt(r), of which neither a file nor another layer knows."""
    model, other = (nn.Sequential(fused_lora.Linear(4, 3, r=4, lora_alpha=6)) for _ in range(2))
    nn.init.normal_(model[0].lora_B)
    model[0].scaling = 6 / 2
    save_adapter(model, tmp_path / "adapter.safetensors")
    load_adapter(other, tmp_path / "adapter.safetensors")
    assert (other[0].scaling, other[0].lora_alpha) == (3.0, 12.0) and model[0].lora_alpha == 6
    load_adapter(model, tmp_path / "adapter.safetensors")
    assert model[0].scaling == 3.0
