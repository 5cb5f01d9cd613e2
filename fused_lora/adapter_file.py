"""Adapters in files that carry how they are to be read beside the tensors: safetensors with a header of ours."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .base import dropout_probability
from .merge import MergingLayer
from .state import Bias, lora_state_dict
from .whole import written_whole

HEADER = "fused_lora"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class AdapterConfig:
    """How one layer's adapter is to be read. enable_lora: MergedLinear's slices; None for other layers.

    fan_in_fan_out: whether a Linear's or MergedLinear's weight is stored (in, out). kind: as in `AdapterLayer`. Both
        None in files from before they were stored.
    Raises ValueError for a field of another type or out of its range.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    enable_lora: list[bool] | None = None
    fan_in_fan_out: bool | None = None
    kind: Literal["linear", "embedding", "conv", "merged"] | None = None

    def __post_init__(self) -> None:
        fields = {
            "r": type(self.r) is int and self.r > 0,
            "lora_alpha": type(self.lora_alpha) in (int, float) and math.isfinite(self.lora_alpha),
            "lora_dropout": type(self.lora_dropout) in (int, float) and 0 <= self.lora_dropout <= 1,
            "enable_lora": self.enable_lora is None
            or (type(self.enable_lora) is list and all(type(on) is bool for on in self.enable_lora)),
            "fan_in_fan_out": self.fan_in_fan_out is None or type(self.fan_in_fan_out) is bool,
            "kind": self.kind in (None, "merged")
            or (self.kind in ("linear", "embedding", "conv") and self.enable_lora is None),
        }
        for name, valid in fields.items():
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected what a LoRA layer takes.")


def save_adapter(model: nn.Module, path: str | os.PathLike[str], bias: Bias = "none") -> None:
    """Writes `lora_state_dict(model, bias)` to a safetensors file, with an `AdapterConfig` of every layer.

    The file appears under its name when it is whole. Raises ValueError if the model has no LoRA layer or path has a
    pickle's ending, and OSError if the file cannot be written.
    """
    check_ending(path, ".safetensors")
    layers = _lora_layers(model)
    if not layers:
        raise ValueError("model has no LoRA layer; expected at least one to save.")
    header = json.dumps({name: asdict(_config(layer)) for name, layer in layers.items()})
    # A copy each: safetensors refuses tensors that share storage.
    tensors = {key: tensor.clone().contiguous() for key, tensor in lora_state_dict(model, bias).items()}
    with written_whole(path) as unfinished:
        save_file(tensors, unfinished, metadata={HEADER: header})


def adapter_configs(path: str | os.PathLike[str]) -> dict[str, AdapterConfig]:
    """By layer name, what `save_adapter` wrote beside the tensors.

    Raises ValueError if the file was not written by `save_adapter`, and OSError if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return configs_of(file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} was not written by save_adapter; expected safetensors with its header."
        ) from error


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a file of `save_adapter` into a model with the same LoRA layers: tensors, lora_alpha and scaling.

    A merged layer is merged anew, into the parameter and storage of its merged weight, so that compiled code and CUDA
    graphs follow; an unmerged one has lora_A and lora_B written in place. lora_dropout is left as the model has it.
    Raises ValueError, before anything is changed, if the file's layers, ranks, slices, names or shapes are not the
    model's.
    """
    configs, tensors = adapter_configs(path), load_file(path)
    layers, state = _lora_layers(model), model.state_dict()
    for name in configs.keys() ^ layers.keys():
        where = "the file" if name in configs else "model"
        raise ValueError(f"Layer {name!r} is in {where} alone; expected the same LoRA layers in both.")
    for name, layer in layers.items():
        mine, theirs = _config(layer), configs[name]
        if (mine.r, mine.enable_lora) != (theirs.r, theirs.enable_lora):
            raise ValueError(
                f"Layer {name!r} of model has r={mine.r} and enable_lora={mine.enable_lora}; expected the file's "
                f"r={theirs.r} and enable_lora={theirs.enable_lora}."
            )
    for key in lora_state_dict(model):
        if key not in tensors:
            raise ValueError(f"The file has no {key!r}; expected every adapter tensor of model.")
    adapter = lora_state_dict(model, "all")
    for key, tensor in tensors.items():
        if key in state and key not in adapter:
            raise ValueError(f"The file has {key!r}; expected adapters and biases alone.")
        if key not in state or state[key].shape != tensor.shape:
            held = f"shape {tuple(state[key].shape)}" if key in state else "no such entry"
            raise ValueError(f"The file has {key!r} of shape {tuple(tensor.shape)}; model has {held}.")
    for name, layer in layers.items():
        layer.lora_alpha = configs[name].lora_alpha
        layer.scaling = layer.lora_alpha / layer.r
    model.load_state_dict(tensors, strict=False)
    for layer in layers.values():
        # Where layers share a tensor, those that were loaded before the last one have missed its loading.
        layer._merge_changes()


def _lora_layers(model: nn.Module) -> dict[str, MergingLayer]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MergingLayer) and module._has_adapter
    }


def _config(layer: MergingLayer) -> AdapterConfig:
    # A file holds no scaling; one that was set, such as lora_alpha / sqrt(r), has a lora_alpha too.
    lora_alpha = layer.lora_alpha if layer.scaling == layer.lora_alpha / layer.r else layer.scaling * layer.r
    enable_lora, fan_in_fan_out = (getattr(layer, name, None) for name in ("enable_lora", "fan_in_fan_out"))
    return AdapterConfig(
        layer.r, lora_alpha, dropout_probability(layer.lora_dropout), enable_lora, fan_in_fan_out, _kind(layer)
    )


def _kind(layer: MergingLayer) -> Literal["linear", "embedding", "conv", "merged"]:
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if layer._owner() is not layer:
        return "conv"
    return "merged" if hasattr(layer, "enable_lora") else "linear"


def check_ending(path: str | os.PathLike[str], suffix: str) -> None:
    """Raises ValueError if path's ending says pickle where suffix, a format's, does not, or the other way."""
    ending = os.path.splitext(path)[1]
    if (ending in PICKLES) != (suffix in PICKLES):
        raise ValueError(f"path is {os.fspath(path)!r}; expected it to end in {suffix}, as which it is written.")


def configs_of(metadata: Mapping[str, str]) -> dict[str, AdapterConfig]:
    """By layer name, what a file's metadata say. Raises ValueError if they are not as save_adapter writes them."""
    try:
        return {name: AdapterConfig(**config) for name, config in json.loads(metadata.get(HEADER, "")).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError("its header is not save_adapter's.") from error
