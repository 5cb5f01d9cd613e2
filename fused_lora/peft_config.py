"""What PEFT's adapter_config.json says of each layer's scaling, and the one that says what an adapter has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .adapter import Adapter, AdapterLayer

# What makes of an adapter more than scaling · B A over the base that it was trained on, or hides where it belongs.
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
# Their initialisation changes the base weights, which the file does not have.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def with_config(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """The adapter with what a PEFT config says of its layers: r, lora_alpha, use_rslora, lora_dropout and patterns.

    rank_pattern and alpha_pattern are regular expressions for the end of a layer's path, as in PEFT.
    Raises ValueError if the config is not of plain LoRA, has a field of another type, or a rank that is not lora_A's.
    """
    check_plain(config)
    fan_in_fan_out = _switch(config, "fan_in_fan_out")
    layers = {path: with_layer_config(path, layer, config) for path, layer in adapter.layers.items()}
    return replace(adapter, layers=layers, format="peft", fan_in_fan_out=fan_in_fan_out, config=dict(config))


def with_layer_config(path: str, layer: AdapterLayer, config: Mapping[str, Any]) -> AdapterLayer:
    """One layer of `with_config`, without `check_plain`."""
    r = _of_pattern(config, "rank_pattern", path, config.get("r", 8))
    lora_alpha = _of_pattern(config, "alpha_pattern", path, config.get("lora_alpha", 8))
    if type(r) is not int or r != layer.r:
        raise ValueError(f"Layer {path!r} has r={r!r} in its config; expected {layer.r}, as its lora_A has.")
    if type(lora_alpha) not in (int, float):
        raise ValueError(f"Layer {path!r} has lora_alpha={lora_alpha!r} in its config; expected a number.")
    dropout = config.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout <= 1:
        raise ValueError(f"lora_dropout is {dropout!r} in the config; expected a probability.")
    return replace(layer, lora_alpha=lora_alpha, use_rslora=_switch(config, "use_rslora"), lora_dropout=dropout)


def check_plain(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a config of more than plain LoRA."""
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"peft_type is {config['peft_type']!r}; expected 'LORA'.")
    for name in _VARIANTS:
        if config.get(name):
            raise ValueError(f"{name} is {config[name]!r} in the adapter's config; expected plain LoRA without it.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASES):
        raise ValueError(
            f"init_lora_weights is {init!r}, which changes the base weights; expected an adapter that was saved with "
            "PEFT's path_initial_model_for_weight_conversion."
        )


def _switch(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{field} is {value!r} in the config; expected true or false.")
    return bool(value)


def _of_pattern(config: Mapping[str, Any], field: str, path: str, default: Any) -> Any:
    patterns = config.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise ValueError(f"{field} is {patterns!r}; expected an object of patterns.")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error as error:
            raise ValueError(f"{field} has {pattern!r}; expected a regular expression ({error}).") from error
    return default


def config_of(adapter: Adapter) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A PEFT config for this adapter, and a sentence for each thing that it cannot say.

    r and lora_alpha are the most common ones; rank_pattern and alpha_pattern have the others, by whole paths.
    target_modules are whole paths too. What is stored beside the adapter is biases, or modules_to_save, of which PEFT
    loads whole modules alone. A config that the adapter was read with keeps its other fields.
    """
    layers, notes = adapter.layers, []
    rslora = all(layer.use_rslora for layer in layers.values())
    alphas = {path: layer.lora_alpha if rslora else layer.plain_alpha for path, layer in layers.items()}
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    dropouts = {layer.lora_dropout for layer in layers.values()}
    if len(dropouts) > 1:
        notes.append(f"peft stores one lora_dropout; the layers have {sorted(dropouts)}, and 0 is stored.")
    layouts = {adapter.stored_transposed(path) for path in layers} - {None}
    if len(layouts) > 1:
        notes.append("peft stores one fan_in_fan_out; the layers have both, and true is stored.")
    beside: dict[str, set[str]] = {}
    for key in adapter.others:
        owner, _, leaf = key.rpartition(".")
        beside.setdefault(owner, set()).add(leaf)
    biases = [owner for owner, leaves in beside.items() if leaves == {"bias"}]
    modules = sorted(set(beside) - set(biases) - set(layers))
    bias = ("lora_only" if set(biases) <= set(layers) else "all") if biases else "none"
    stored = dict(adapter.config or {})
    return {
        "base_model_name_or_path": None,
        "task_type": None,
        **stored,
        "peft_type": "LORA",
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "use_rslora": rslora,
        "rank_pattern": {_exactly(path): layer.r for path, layer in layers.items() if layer.r != r},
        "alpha_pattern": {_exactly(path): alpha for path, alpha in alphas.items() if alpha != lora_alpha},
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "fan_in_fan_out": True in layouts,
        "bias": bias,
        "target_modules": sorted(layers),
        "modules_to_save": stored.get("modules_to_save") or modules or None,
        # What chose the layers once; target_modules name them all.
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
    }, tuple(notes)


def _exactly(path: str) -> str:
    return "^" + re.escape(path)
