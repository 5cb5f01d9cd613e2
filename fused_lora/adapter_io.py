"""Adapters in files: reads and writes every one of `formats.FORMATS`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .adapter import Adapter, AdapterLayer
from .adapter_file import HEADER, PICKLES, AdapterConfig, check_ending, configs_of
from .formats import FORMATS, adapter_from_state_dict, adapter_to_state_dict
from .peft_config import check_plain, config_of, with_config, with_layer_config
from .whole import written_whole

_DIFFUSERS_HEADER = "lora_adapter_metadata"
_PEFT_CONFIG, _PEFT_TENSORS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


def read_adapter(path: str | os.PathLike[str], format: str | None = None) -> Adapter:
    """Reads an adapter: a safetensors file, a pickle of tensors (.pt, .pth, .bin, .ckpt), or a folder of PEFT's.

    format: what the file is expected to be. It decides where the file does not tell: one of keys like
        `x.lora_A.weight`, without PEFT's config or diffusers' metadata, is "diffusers" (scaling 1) if its paths begin
        with a component's name, otherwise "mistral" (scaling not stored).
    Pickles are read with weights_only=True. Raises ValueError if the file is not an adapter that is understood, needs
    more than tensors to be unpickled, or contradicts itself, and OSError if it cannot be read.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}.")
    path = Path(path)
    folder = _peft_folder(path)
    with _naming(path):
        if folder is not None:
            adapter = _read_peft(folder, path.name if path.name in _PEFT_TENSORS and path != folder else None)
        elif path.suffix in PICKLES:
            adapter = adapter_from_state_dict(_unpickled(path))
        else:
            adapter = _read_safetensors(path)
        if format is not None and format != adapter.format:
            if {format, adapter.format} != {"mistral", "diffusers"}:
                raise ValueError(f"format is {format!r}; expected {adapter.format!r}, as the file says.")
            adapter = replace(adapter, format=format)
        if adapter.format == "diffusers":
            # Its own reading of a file without metadata or .alpha entries.
            adapter = replace(adapter, layers={p: _with_alpha_r(layer) for p, layer in adapter.layers.items()})
        return adapter


def check_overwrites_none(output: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> None:
    """Raises ValueError if to write to output would change a source: a file, or a folder or one of its files.

    A file is the source under any name, a hard link's or a symbolic one's. What is new in PEFT's folder changes it too.
    """
    place = Path(output).parent.resolve() / Path(output).name
    for source in map(Path, sources):
        folder = _peft_folder(source)
        parts = [source] if folder is None else [folder, *folder.glob("*")]
        inside = folder is not None and (folder / _PEFT_CONFIG).exists() and folder.resolve() in place.parents
        if inside or (place.exists() and any(part.exists() and place.samefile(part) for part in parts)):
            raise ValueError(f"The output is {os.fspath(output)!r}, a part of {os.fspath(source)!r}; expected another.")


def load_state_dict_from_safetensors(file_path: str | os.PathLike[str], device: str = "cpu") -> dict[str, Tensor]:
    """Every tensor of a safetensors file by its name, on device. ROLL's function of this name.

    Raises ValueError if the file is not whole or no safetensors file, and OSError if it cannot be read.
    """
    with _naming(file_path):
        return _loaded(file_path, str(device))[0]


def write_adapter(adapter: Adapter, path: str | os.PathLike[str], format: str) -> tuple[str, ...]:
    """Writes a file, or for "peft" a new folder, that appears under its name when it is whole.

    Returns a sentence for all that the format cannot hold; see `formats`. Before anything is written it raises
    ValueError as `adapter_to_state_dict` does, and if the ending is a pickle's where the file is none, or the other way
    round; FileExistsError for a folder that is not empty; and OSError if path cannot be written.
    """
    tensors, notes = adapter_to_state_dict(adapter, format)
    if format == "peft":
        config, more = config_of(_as_stored(adapter, format))
        with written_whole(path, folder=True) as folder:
            _write_peft(folder, tensors, config)
        return notes + more
    check_ending(path, FORMATS[format].suffix)
    metadata = {"format": "pt"}
    if format == "fused_lora":
        metadata = {HEADER: json.dumps(_own_configs(adapter))}
    elif format in ("diffusers", "diffusers-old"):
        metadata[_DIFFUSERS_HEADER] = json.dumps(_diffusers_configs(_as_stored(adapter, format)))
    with written_whole(path) as file:
        if FORMATS[format].suffix == ".pt":
            # Opened here, since torch.save gives a full disk another error's name.
            with file.open("wb") as opened:
                torch.save(tensors, opened)
        else:
            save_file(tensors, file, metadata=metadata)
    return notes


def _as_stored(adapter: Adapter, format: str) -> Adapter:
    """With its layers as this format holds them: a MergedLinear as one adapter where there is none."""
    if FORMATS[format].loralib_layers:
        return adapter
    return replace(adapter, layers={path: layer.dense() for path, layer in adapter.layers.items()})


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from error


def _loaded(path: str | os.PathLike[str], device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"it is no whole safetensors file ({error})") from error


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # A broken or hostile pickle raises anything.
        # torch wraps the reason in advice on how to load it all the same.
        reason = str(error.__context__ or error).strip().partition("\n")[0].partition(". ")[0]
        reason = reason.removesuffix(".") or type(error).__name__
        raise ValueError(f"it is no pickle of tensors alone, which is all that is read: {reason}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds {type(content).__name__}; expected a dictionary of tensors.")
    return dict(content)


def _read_safetensors(path: Path) -> Adapter:
    tensors, metadata = _loaded(path)
    adapter = adapter_from_state_dict(tensors)
    if HEADER in metadata:
        return _with_own_configs(adapter, configs_of(metadata))
    if _DIFFUSERS_HEADER in metadata:
        return _with_diffusers_configs(adapter, _json(metadata[_DIFFUSERS_HEADER], _DIFFUSERS_HEADER))
    return adapter


def _with_own_configs(adapter: Adapter, configs: Mapping[str, AdapterConfig]) -> Adapter:
    if configs.keys() != adapter.layers.keys():
        odd = sorted(configs.keys() ^ adapter.layers.keys())
        raise ValueError(f"its header and its tensors differ in the layers {odd}; expected the same.")
    layers = {}
    for path, config in configs.items():
        layer = adapter.layers[path]
        enabled = tuple(config.enable_lora) if config.enable_lora is not None else None
        inner = layer.lora_B.shape[1]
        layers[path] = AdapterLayer(
            layer.lora_A,
            layer.lora_B,
            config.r,
            config.lora_alpha,
            kind=config.kind or ("merged" if enabled else "conv" if config.r != inner else layer.kind),
            enable_lora=enabled,
            lora_dropout=config.lora_dropout,
            fan_in_fan_out=config.fan_in_fan_out,
        )
    return replace(adapter, layers=layers, format="fused_lora")


def _own_configs(adapter: Adapter) -> dict[str, Any]:
    configs = {}
    for path, layer in adapter.layers.items():
        assert layer.plain_alpha is not None
        enabled = None if layer.enable_lora is None else list(layer.enable_lora)
        fan_in_fan_out = adapter.stored_transposed(path)
        config = AdapterConfig(layer.r, layer.plain_alpha, layer.lora_dropout, enabled, fan_in_fan_out, layer.kind)
        configs[path] = asdict(config)
    return configs


def _with_diffusers_configs(adapter: Adapter, metadata: Mapping[str, Any]) -> Adapter:
    """Its metadata is a PEFT config: a lone model's, or each component's, whose fields begin with the component's name.

    diffusers writes whichever spelling of the keys with it.
    """
    if "r" in metadata:
        return replace(with_config(adapter, metadata), format="diffusers", config=None)
    layers = {}
    for path, layer in adapter.layers.items():
        component, _, inner = path.partition(".")
        config = {key[len(component) + 1 :]: v for key, v in metadata.items() if key.startswith(component + ".")}
        check_plain(config)
        layers[path] = with_layer_config(inner, layer, config) if config else layer
    format = adapter.format if adapter.format == "diffusers-old" else "diffusers"
    return replace(adapter, layers=layers, format=format)


def _diffusers_configs(adapter: Adapter) -> dict[str, Any]:
    components: dict[str, dict[str, AdapterLayer]] = {}
    for path, layer in adapter.layers.items():
        component, _, inner = path.partition(".")
        components.setdefault(component, {})[inner] = layer
    fields = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "target_modules")
    metadata = {}
    for component, layers in components.items():
        config, _ = config_of(Adapter(layers))
        metadata.update({f"{component}.{name}": config[name] for name in fields})
    return metadata


def _with_alpha_r(layer: AdapterLayer) -> AdapterLayer:
    return layer if layer.lora_alpha is not None else replace(layer, lora_alpha=float(layer.r))


def _peft_folder(path: Path) -> Path | None:
    """The folder of PEFT's that path is, or is a file of."""
    if path.is_dir():
        return path
    beside_config = path.name in _PEFT_TENSORS and (path.parent / _PEFT_CONFIG).exists()
    return path.parent if path.name == _PEFT_CONFIG or beside_config else None


def _read_peft(folder: Path, name: str | None) -> Adapter:
    """name: of the file that has the tensors; None takes what there is."""
    config = _json((folder / _PEFT_CONFIG).read_text(encoding="utf-8"), _PEFT_CONFIG)
    new, old = (folder / each for each in _PEFT_TENSORS)
    file = folder / name if name else new if new.exists() else old
    tensors = _unpickled(file) if file.name == old.name else _loaded(file)[0]
    return with_config(adapter_from_state_dict(tensors), config)


def _json(text: str, name: str) -> Mapping[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds {type(content).__name__}; expected an object.")
    return content


def _write_peft(folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    save_file(tensors, folder / _PEFT_TENSORS[0], metadata={"format": "pt"})
    (folder / _PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
