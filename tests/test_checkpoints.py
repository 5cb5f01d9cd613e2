"""Checkpoints: to and from loralib and plain torch, and adapters in files of their own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import loralib
import pytest
import torch
from numerics import assert_as_accurate_as
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fused_lora
from fused_lora import AdapterConfig, adapter_configs, load_adapter, lora_state_dict, save_adapter

R, ALPHA, TFT = 2, 6.0, [True, False, True]
BIASES = ["none", "all", "lora_only"]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Model(nn.Module):
    """Every layer class that loralib can run, beside plain ones. Tokens (batch, 5) to (batch, 2, 5, 9)."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        adapter = {"r": R, "lora_alpha": ALPHA}
        self.embedding = module.Embedding(11, 6, **adapter)
        self.norm = nn.LayerNorm(6)
        self.block = nn.ModuleDict(
            {
                "up": module.Linear(6, 4, **adapter),
                "out": module.Linear(4, 6, fan_in_fan_out=True, bias=False, **adapter),
                "qkv": module.MergedLinear(6, 9, enable_lora=TFT, **adapter),
                "plain": module.Linear(9, 9, r=0),
            }
        )
        self.conv = module.Conv2d(2, 2, 3, groups=2, padding=1, **adapter)
        self.head = nn.Conv2d(2, 2, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        x = self.block["qkv"](x + self.block["out"](torch.tanh(self.block["up"](x))))
        return self.head(self.conv(torch.stack([x, self.block["plain"](x)], 1)))


def filled(module: nn.Module, device: str, seed: int = 1) -> Any:
    """The module with entries of the seed that are the same for every class, all of them nonzero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.to(device)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def assert_same_entries(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(bits(tensor), bits(expected[key])), key


def entries(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}


def assert_same_function(ours: nn.Module, theirs: nn.Module, device: str) -> None:
    """In both modes; `theirs` is the yardstick in float32 and, cast, the oracle in float64."""
    tokens = torch.randint(11, (3, 5), device=device)
    exact = copy.deepcopy(theirs).double()
    with torch.no_grad():
        for mode in (True, False, True):
            for module in (ours, theirs, exact):
                module.train(mode)
            assert_as_accurate_as(ours(tokens), theirs(tokens), exact(tokens), f"output of train({mode})")


@pytest.mark.parametrize("direction", ["from loralib", "to loralib"])
def test_full_state_dicts_are_loralibs(direction: str, device: str) -> None:
    ours, theirs = filled(Model(fused_lora), device, seed=1), filled(Model(loralib), device, seed=2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    source, target = (theirs, ours) if direction == "from loralib" else (ours, theirs)
    target.load_state_dict(source.state_dict(), strict=True)
    assert_same_entries(target.state_dict(), source.state_dict())
    assert_same_function(ours, theirs, device)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("direction", ["from loralib", "to loralib"])
def test_adapters_are_loralibs(direction: str, bias: Any, device: str) -> None:
    ours, theirs = filled(Model(fused_lora), device, seed=1), filled(Model(loralib), device, seed=1)
    mine, other = lora_state_dict(ours, bias), loralib.lora_state_dict(theirs, bias)
    # loralib looks for `conv.bias` of the layer `conv` under the name `bias`, which its own layer does not have.
    assert set(mine) == set(other) | ({"conv.conv.bias"} if bias == "lora_only" else set())
    assert ("head.bias" in mine) == ("norm.bias" in mine) == ("block.plain.bias" in mine) == (bias == "all")
    filled(ours if direction == "from loralib" else theirs, device, seed=2)
    loaded = copy.deepcopy(other if direction == "from loralib" else mine)
    target, source = (ours, theirs) if direction == "from loralib" else (theirs, ours)
    # Everything but the adapter is shared beforehand, as a base model is.
    base = {key: tensor for key, tensor in source.state_dict().items() if key not in loaded}
    target.load_state_dict(base, strict=False)
    report = target.load_state_dict(loaded, strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) == set(base)
    assert_same_entries(target.state_dict(), source.state_dict())
    assert_same_function(ours, theirs, device)


def test_an_adapter_from_loralib_takes_effect_in_a_merged_model_at_once(device: str) -> None:
    ours, theirs = filled(Model(fused_lora), device), filled(Model(loralib), device)
    ours.eval(), filled(theirs, device, seed=2)
    for strict, state in ((True, theirs.state_dict()), (False, loralib.lora_state_dict(theirs))):
        ours.load_state_dict(state, strict=strict)
        assert all(module.merged for module in ours.modules() if isinstance(module, fused_lora.LoRALayer))
        tokens = torch.randint(11, (3, 5), device=device)
        exact = copy.deepcopy(theirs).double().eval()
        with torch.no_grad():
            assert_as_accurate_as(ours(tokens), copy.deepcopy(theirs).eval()(tokens), exact(tokens), "output")


class MainConv2d(nn.Module):
    """Conv2d as loralib's main branch has it: `conv`, and its parameters once more under their own names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        for name, parameter in self.conv.named_parameters():
            self.register_parameter(name, parameter)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(R * 3, 2 * 3)), nn.Parameter(torch.zeros(2 * 3, R * 3))

    def forward(self, x: Tensor) -> Tensor:
        update = (self.lora_B @ self.lora_A).view(self.conv.weight.shape) * (ALPHA / R)
        return F.conv2d(x, self.conv.weight + update, self.conv.bias, groups=2)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("direction", ["from main", "to main"])
def test_convolutions_of_loralibs_main_branch(direction: str, mode: bool, device: str) -> None:
    theirs = nn.Sequential(nn.Identity(), filled(MainConv2d(), device, seed=1))
    ours = nn.Sequential(nn.Identity(), fused_lora.Conv2d(2, 4, 3, groups=2, r=R, lora_alpha=ALPHA))
    filled(ours, device, seed=2).train(mode)
    leaves = ["weight", "bias", "lora_A", "lora_B", "conv.weight", "conv.bias"]
    assert list(theirs.state_dict()) == [f"1.{leaf}" for leaf in leaves]
    if direction == "from main":
        state = theirs.state_dict()
        ours.load_state_dict(state, strict=True)
        assert list(state) == list(theirs.state_dict()), "loading changes nothing of the dictionary that it is given"
    else:
        # Of six keys, two are aliases that are not written.
        report = theirs.load_state_dict(ours.state_dict(), strict=False)
        assert report.missing_keys == ["1.weight", "1.bias"] and not report.unexpected_keys
    x = torch.randn(2, 2, 6, 5, device=device)
    exact = copy.deepcopy(theirs).double()
    with torch.no_grad():
        assert_as_accurate_as(ours(x), theirs(x), exact(x.double()), "output")
    for leaf in leaves[2:]:
        assert torch.equal(ours.state_dict()[f"1.{leaf}"], theirs.state_dict()[f"1.{leaf}"]), leaf


@pytest.mark.parametrize("bias", BIASES)
def test_convolution_adapters_of_loralibs_main_branch(bias: Any, device: str) -> None:
    theirs = nn.Sequential(filled(MainConv2d(), device, seed=1))
    ours = nn.Sequential(fused_lora.Conv2d(2, 4, 3, groups=2, r=R, lora_alpha=ALPHA)).to(device)
    state = {key: tensor for key, tensor in theirs.state_dict().items() if "lora_" in key}
    if bias != "none":
        state["0.bias"] = theirs.state_dict()["0.bias"]
    report = ours.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys == (["0.conv.weight"] + ["0.conv.bias"] * (bias == "none"))
    for key, tensor in state.items():
        assert torch.equal(ours.state_dict()[key.replace("0.bias", "0.conv.bias")], tensor)


def test_two_names_of_a_convolutions_weight_that_disagree_are_an_error(device: str) -> None:
    ours = fused_lora.Conv2d(2, 4, 3, groups=2, r=R).to(device)
    state = {key: tensor.clone() for key, tensor in filled(MainConv2d(), device).state_dict().items()}
    state["weight"] += 1
    with pytest.raises(RuntimeError, match=r"weight and conv\.weight differ"):
        ours.load_state_dict(state, strict=False)


class Plain(nn.Module):
    """A model before it has adapters, or the same model with fused_lora's layers in it."""

    def __init__(self, module: Any, **adapter: Any) -> None:
        super().__init__()
        self.before = nn.LayerNorm(3)
        self.embedding = module.Embedding(11, 6, **adapter)
        self.linear = module.Linear(6, 9, **adapter)
        merged = {"enable_lora": TFT} if adapter else {}
        self.merged = getattr(module, "MergedLinear" if adapter else "Linear")(9, 9, **merged, **adapter)
        self.conv = module.Conv1d(3, 4, 3, **adapter)
        self.convs = nn.Sequential(module.Conv2d(2, 2, 3, **adapter), module.Conv3d(1, 2, 2, **adapter))
        self.after = nn.Linear(2, 2)


LAYERS = ["embedding", "linear", "merged", "conv", "convs.0", "convs.1"]
ADAPTERS = {f"{layer}.{leaf}" for layer in LAYERS for leaf in ("lora_A", "lora_B")}


def with_adapters(device: str, seed: int = 2) -> Any:
    return filled(Plain(fused_lora, r=R, lora_alpha=ALPHA), device, seed)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("strict", [False, True])
def test_the_base_of_a_plain_model_loads(strict: bool, mode: bool, device: str) -> None:
    ours, source = with_adapters(device).train(mode), filled(Plain(nn), device, seed=1)
    adapters = {key: tensor.clone() for key, tensor in lora_state_dict(ours).items()}
    state = source.state_dict()
    report = ours.load_state_dict(state, strict=strict)
    assert not report.missing_keys and not report.unexpected_keys
    assert list(state) == list(source.state_dict()), "loading changes nothing of the dictionary that it is given"
    ours.train()
    assert_same_entries(lora_state_dict(ours), adapters)
    base = {
        key.replace("conv.conv.", "conv.").replace("0.conv.", "0.").replace("1.conv.", "1."): tensor
        for key, tensor in ours.state_dict().items()
        if key not in adapters
    }
    assert_same_entries(base, source.state_dict())


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[new] = state.pop(old)

    return change


def drop(*keys: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        for key in keys:
            del state[key]

    return change


def add(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[key] = tensor

    return change


# What is wrong with the base checkpoint, and the keys to be called missing and unexpected.
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], set[str], set[str]]] = {
    **{
        f"weight of {layer} under another name": (
            rename(f"{layer}.weight", f"{layer}.wieght"),
            {f"{layer}.conv.weight" if "conv" in layer else f"{layer}.weight"},
            {f"{layer}.wieght"},
        )
        for layer in LAYERS
    },
    **{
        f"no bias of {layer}": (
            drop(f"{layer}.bias"),
            {f"{layer}.conv.bias" if "conv" in layer else f"{layer}.bias"},
            set(),
        )
        for layer in LAYERS[1:]
    },
    **{
        f"only lora_B of {layer}": (
            add(f"{layer}.lora_B", torch.zeros(1)),
            {f"{layer}.lora_A"},
            set(),
        )
        for layer in LAYERS
    },
    **{
        f"lora_a instead of lora_A of {layer}": (
            add(f"{layer}.lora_a", torch.zeros(1)),
            {f"{layer}.lora_A", f"{layer}.lora_B"},
            {f"{layer}.lora_a"},
        )
        for layer in LAYERS
    },
    "a plain module before": (drop("before.weight"), {"before.weight"}, set()),
    "a plain module after": (rename("after.bias", "after.bais"), {"after.bias"}, {"after.bais"}),
    "a whole layer": (drop("linear.weight", "linear.bias"), {"linear.weight", "linear.bias"}, set()),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_base_checkpoint_is_still_reported(fault: str, strict: bool, device: str) -> None:
    ours = with_adapters(device)
    state = dict(filled(Plain(nn), device, seed=1).state_dict())
    change, missing, unexpected = FAULTS[fault]
    change(state)
    for key in state.keys() & ADAPTERS:
        state[key] = torch.zeros_like(ours.state_dict()[key])
    allowed = set(missing)
    for key in missing:
        if key.endswith("weight"):
            # Without its weight, a layer's adapter may be missing as well as excused.
            layer = key.removesuffix(".weight").removesuffix(".conv")
            allowed |= {f"{layer}.lora_A", f"{layer}.lora_B"}
    if strict:
        with pytest.raises(RuntimeError) as raised:
            ours.load_state_dict(state, strict=True)
        named = set(str(raised.value).replace('"', " ").replace(",", " ").split())
        assert missing | unexpected <= named
        assert not (ADAPTERS - allowed) & named
    else:
        report = ours.load_state_dict(state, strict=False)
        assert missing <= set(report.missing_keys) <= allowed
        assert set(report.unexpected_keys) == unexpected


def test_a_missing_adapter_is_reported_when_no_base_is_loaded(device: str) -> None:
    ours = with_adapters(device)
    adapter = dict(lora_state_dict(ours))
    del adapter["conv.lora_A"], adapter["linear.lora_A"], adapter["linear.lora_B"]
    missing = set(ours.load_state_dict(adapter, strict=False).missing_keys)
    assert missing & ADAPTERS == {"conv.lora_A", "linear.lora_A", "linear.lora_B"}


def adapted(
    device: str, seed: int, dtype: torch.dtype | None = None, adapter_dtype: torch.dtype | None = None, **changes: Any
) -> Any:
    """A model of layers with ranks, alphas and dropouts of their own. changes: to the MergedLinear's arguments."""
    options: dict[str, Any] = {"r": R, "lora_alpha": ALPHA, "dtype": dtype, "adapter_dtype": adapter_dtype}
    with_dropout = options | {"lora_dropout": 0.25}
    merged = options | {"r": 3, "lora_alpha": 1, "lora_dropout": 0.5, "enable_lora": TFT}
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
    "embedding": AdapterConfig(R, ALPHA, 0.0),
    "block.0": AdapterConfig(R, ALPHA, 0.25),
    "qkv": AdapterConfig(3, 1, 0.5, TFT),
    "conv": AdapterConfig(R, ALPHA, 0.25),
}


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
    assert adapter_configs(path) == {"": AdapterConfig(2, 8, 0.0)}
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
    "deep nesting": "[" * 100_000,
    **{
        f"{field} is {repr(value)[:20]}": json.dumps({"": GOOD | {field: value}})
        for field, values in {
            "r": ["2", None, 2.5, -2, 0, [2]],
            "lora_alpha": ["6", None, [6.0], {}, float("nan"), float("inf"), 10**400],
            "lora_dropout": ["0", None, 1.5, float("nan")],
            "enable_lora": ["yes", [True, "x"]],
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
