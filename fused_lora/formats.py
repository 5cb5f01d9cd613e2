"""How adapters are spelt in state dicts: the keys of loralib, PEFT, Mistral, diffusers, kohya and Megatron.

What a format cannot hold is lost when it is written, and `adapter_to_state_dict` says so:
    loralib, mistral, megatron: no scaling (lora_alpha / r). loralib's files do not tell an embedding or a convolution
        from a linear layer, and its MergedLinear is one only by its shapes, without enable_lora.
    loralib, mistral, kohya, megatron: no lora_dropout.
    all but peft and this package's own: no fan_in_fan_out.
    kohya: the dots of a layer's path become underscores, and cannot be told from real ones when it is read. lora_alpha
        is a float32.
    all but loralib's and this package's own: a MergedLinear is one adapter of rank r * n with a block-diagonal lora_B.
    mistral, kohya, diffusers, megatron: no trained biases or whole modules; mistral and megatron: linear layers alone.
PEFT, diffusers and this package store the scaling beside the state dict, in the file; see `adapter_io`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter import Adapter, AdapterLayer, Kind


@dataclass(frozen=True)
class Format:
    """What a format's state dicts hold.

    lora_A, lora_B: what follows a layer's path. suffix: of its file. stores_layout: fan_in_fan_out. loralib_layers:
    MergedLinear and convolutions as loralib has them. stores_others: entries that are no adapter's. kinds: of layers.
    """

    lora_A: str
    lora_B: str
    suffix: str = ".safetensors"
    stores_alpha: bool = False
    stores_dropout: bool = False
    stores_layout: bool = False
    loralib_layers: bool = False
    stores_others: bool = False
    kinds: tuple[Kind, ...] = ("linear",)


FORMATS: Mapping[str, Format] = {
    "loralib": Format(
        "lora_A",
        "lora_B",
        ".pt",
        loralib_layers=True,
        stores_others=True,
        kinds=("linear", "embedding", "merged"),
    ),
    "fused_lora": Format(
        "lora_A",
        "lora_B",
        stores_alpha=True,
        stores_dropout=True,
        stores_layout=True,
        loralib_layers=True,
        stores_others=True,
        kinds=("linear", "embedding", "merged"),
    ),
    "peft": Format(
        "lora_A.weight",
        "lora_B.weight",
        suffix="",
        stores_alpha=True,
        stores_dropout=True,
        stores_layout=True,
        stores_others=True,
        kinds=("linear", "embedding", "conv"),
    ),
    "mistral": Format("lora_A.weight", "lora_B.weight"),
    "diffusers": Format(
        "lora_A.weight", "lora_B.weight", stores_alpha=True, stores_dropout=True, kinds=("linear", "conv")
    ),
    "diffusers-old": Format(
        "lora.down.weight", "lora.up.weight", stores_alpha=True, stores_dropout=True, kinds=("linear", "conv")
    ),
    "kohya": Format("lora_down.weight", "lora_up.weight", stores_alpha=True, kinds=("linear", "conv")),
    "megatron": Format("adapter.linear_in.weight", "adapter.linear_out.weight"),
    "megatron-weights": Format("weight_A", "weight_B"),
}

# Where an adapter was trained inside a larger model, its paths begin with that model's name for it.
PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
_COMPONENTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_PEFT = "base_model.model."

_WORDS = {
    "lora_A": ("mistral", "A"),
    "lora_B": ("mistral", "B"),
    "lora_embedding_A": ("mistral", "A"),
    "lora_embedding_B": ("mistral", "B"),
    "lora_down": ("kohya", "A"),
    "lora_up": ("kohya", "B"),
    "lora.down": ("diffusers-old", "A"),
    "lora.up": ("diffusers-old", "B"),
    "lora_linear_layer.down": ("diffusers-old", "A"),
    "lora_linear_layer.up": ("diffusers-old", "B"),
}
_MEGATRON_WORDS = {
    "linear_in": ("megatron", "A"),
    "linear_out": ("megatron", "B"),
    "weight_A": ("megatron-weights", "A"),
    "weight_B": ("megatron-weights", "B"),
}
_AFTER_WORD = r"(?:\.(?P<name>(?!weight$|bias$)[^.]+))?(?P<weight>\.weight)?"
_KEY = re.compile(
    r"(?:(?P<path>.+)\.)?(?P<word>lora_(?:embedding_)?[AB]|lora_(?:down|up)|lora(?:_linear_layer)?\.(?:down|up))"
    + _AFTER_WORD
)
# The first diffusers files: attn1.processor.to_q_lora.down.weight.
_PROCESSOR_KEY = re.compile(r"(?P<path>.+)_(?P<word>lora\.(?:down|up))" + _AFTER_WORD)
_MEGATRON_KEY = re.compile(r"(?:(?P<path>.+)\.)?(?P<word>linear_in|linear_out|weight_[AB])" + _AFTER_WORD)

_REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "a Tucker decomposition",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_diag": "KaSA",
    "trainable_tokens_": "trainable tokens",
}
# PEFT's, of VeLoRA and MonteCLoRA: what its forward needs in training alone.
_TRAINING_STATE = ("lora_velora_embed", "lora_monteclora_")
_BIAS_OF_B = re.compile(r"(?:.+\.)?(?:lora_B(?:\.[^.]+)?|lora_up|lora\.up)\.bias")


@dataclass(frozen=True)
class _Entry:
    key: str
    path: str
    side: str
    name: str
    format: str
    embedding: bool


def adapter_from_state_dict(state_dict: Mapping[str, Tensor]) -> Adapter:
    """What a state dict of any of `FORMATS` says of its layers; other entries are in the result's `others`.

    Keys may have an adapter's name, as in `x.lora_A.default.weight`, and PEFT's prefix, which is taken off.
    lora_alpha is what a layer's `.alpha` entry says; lora_down and lora_up without one mean scaling 1, as kohya and
    diffusers have it. Other layers have none: the state dict does not store it.

    Raises ValueError if there is no adapter in it, half a layer's is missing, two adapters are in it, the shapes do not
    fit, or it is of a kind that is more than scaling · B A, as DoRA and LoHa are, or has entries left over that look
    like an adapter's.
    """
    for key, tensor in state_dict.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"Entry {key!r} is {type(tensor).__name__}; expected tensors by name.")
        for word, what in _REFUSED.items():
            if word in key:
                raise ValueError(f"Entry {key!r} is {what}; expected plain LoRA, lora_A and lora_B alone.")
        if _BIAS_OF_B.fullmatch(key):
            raise ValueError(f"Entry {key!r} is a bias of lora_B; expected lora_A and lora_B without biases.")
    entries = list(_entries(state_dict))
    names = sorted({entry.name for entry in entries if entry.name})
    if len(names) > 1:
        raise ValueError(f"The state dict has the adapters {names}; expected one.")
    pairs: dict[str, dict[str, _Entry]] = {}
    for entry in entries:
        pair = pairs.setdefault(entry.path, {})
        if entry.side in pair:
            raise ValueError(f"Entries {pair[entry.side].key!r} and {entry.key!r} are both layer {entry.path!r}'s.")
        pair[entry.side] = entry
    if not pairs:
        raise ValueError("The state dict has no adapter; expected keys of " + ", ".join(FORMATS) + ".")
    used, layers = {entry.key for entry in entries}, {}
    for path, pair in pairs.items():
        for side, other in (("A", "B"), ("B", "A")):
            if side not in pair:
                raise ValueError(f"{pair[other].key!r} has no lora_{side} beside it; expected both.")
        alpha = next((key for key in (f"{path}.alpha", f"{_PEFT}{path}.alpha") if key in state_dict), None)
        used |= {alpha} if alpha else set()
        try:
            layers[path] = _layer(pair["A"], pair["B"], state_dict, alpha)
        except ValueError as error:
            raise ValueError(f"Layer {path!r}: {error}") from error
    for key in state_dict:
        if key not in used and _is_more_of_an_adapter(key):
            raise ValueError(f"Entry {key!r} is of no known kind; expected plain LoRA, lora_A and lora_B alone.")
    others = {_plain_name(key): tensor for key, tensor in state_dict.items() if key not in used}
    return Adapter(layers, others, entries[0].format)


def _entries(state_dict: Mapping[str, Tensor]) -> Iterator[_Entry]:
    words, grammars = _WORDS, [_KEY, _PROCESSOR_KEY]
    if not any(grammar.fullmatch(key.removeprefix(_PEFT)) for key in state_dict for grammar in grammars):
        words, grammars = _MEGATRON_WORDS, [_MEGATRON_KEY]
    for key in state_dict:
        plain = key.removeprefix(_PEFT)
        match = next(filter(None, (grammar.fullmatch(plain) for grammar in grammars)), None)
        if match is None:
            continue
        word, path = match["word"], match["path"] or ""
        format, side = words[word]
        if format == "megatron":
            path = re.sub(r"(^|\.)adapter$", "", path)
        if plain != key:
            format = "peft"
        elif format == "mistral" and not match["weight"] and "embedding" not in word:
            format = "loralib"
        elif format == "mistral" and path.startswith(_COMPONENTS):
            format = "diffusers"
        if match.re is _PROCESSOR_KEY:
            path = re.sub(r"\.to_out$", ".to_out.0", path.replace(".processor.", "."))
        yield _Entry(key, path, side, match["name"] or "", format, "embedding" in word)


def _layer(a: _Entry, b: _Entry, state_dict: Mapping[str, Tensor], alpha_key: str | None) -> AdapterLayer:
    lora_A, lora_B = state_dict[a.key], state_dict[b.key]
    r = lora_B.shape[1] if lora_B.dim() > 1 else 0
    kind: Kind = "embedding" if a.embedding else "conv" if lora_A.dim() > 2 else "linear"
    if a.format == "loralib" and lora_A.dim() == lora_B.dim() == 2 and r > 0 and lora_A.shape[0] > r:
        kind = "merged"
    layer = AdapterLayer(lora_A, lora_B, r, kind=kind)
    if alpha_key is not None:
        alpha = state_dict[alpha_key]
        if alpha.numel() != 1:
            raise ValueError(f"{alpha_key!r} has shape {tuple(alpha.shape)}; expected one number.")
        layer = replace(layer, lora_alpha=float(alpha.item()))
    elif a.format in ("kohya", "diffusers-old"):
        layer = replace(layer, lora_alpha=float(r))
    return layer


def _is_more_of_an_adapter(key: str) -> bool:
    """Whether what is left over changes what an adapter computes, as AdaLoRA's lora_E or an unused .alpha does."""
    parts = (part for part in key.split(".") if not part.startswith(_TRAINING_STATE))
    return key.endswith((".alpha", ".diff", ".diff_b")) or any(part.startswith("lora_") for part in parts)


def _plain_name(key: str) -> str:
    """The name in the plain model of what PEFT trains beside its adapters."""
    key = key.removeprefix(_PEFT).replace(".base_layer.", ".")
    return re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.)", "", key)


def adapter_to_state_dict(adapter: Adapter, format: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The adapter's state dict in one of `FORMATS`, and a sentence for all that this format cannot hold.

    lora_A and lora_B have the bits that they have in the adapter; a MergedLinear's lora_B is block-diagonal where the
    format has no MergedLinear. The tensors are contiguous, and share no storage with each other.

    Raises ValueError if format is not one of them, or cannot hold a layer at all.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}.")
    spelling, notes = FORMATS[format], []
    state: dict[str, Tensor] = {}
    blocks = [path for path, layer in adapter.layers.items() if layer.kind == "merged" and not spelling.loralib_layers]
    for path, stored in adapter.layers.items():
        if stored.kind == "linear" and stored.enable_lora is not None:
            raise ValueError(
                f"Layer {path!r} may be linear or a MergedLinear of one enabled slice; expected a base, which tells."
            )
        try:
            layer = stored.dense() if path in blocks else stored
        except ValueError as error:
            raise ValueError(f"Layer {path!r}: {error}") from error
        loralib_conv = layer.loralib_conv and spelling.loralib_layers
        if (layer.kind not in spelling.kinds or layer.loralib_conv) and not loralib_conv:
            kind = "loralib's convolution" if layer.loralib_conv else f"of kind {layer.kind!r}"
            raise ValueError(f"Layer {path!r} is {kind}; expected one of {', '.join(spelling.kinds)} for {format}.")
        name = _written_name(path, format)
        for side, tensor in (("A", layer.lora_A), ("B", layer.lora_B)):
            word = spelling.lora_A if side == "A" else spelling.lora_B
            if format == "peft" and layer.kind == "embedding":
                word = f"lora_embedding_{side}"
            _put(state, f"{name}.{word}" if name else word, tensor)
        if spelling.stores_alpha and layer.plain_alpha is None:
            raise ValueError(f"Layer {path!r} has no lora_alpha, which {format} stores; expected it as an argument.")
        if format == "kohya":
            _put(state, f"{name}.alpha", torch.tensor(layer.plain_alpha, dtype=torch.float32))
    if format == "mistral" and len(adapter.dtypes) > 1:
        raise ValueError(f"The adapter has the dtypes {adapter.dtypes}; expected one, as Mistral's files have.")
    if not spelling.stores_alpha:
        scalings = sorted({layer.scaling for layer in adapter.layers.values() if layer.scaling is not None})
        notes.append(f"{format} stores no scaling; this adapter's is {', '.join(map(str, scalings)) or 'not known'}.")
    if not spelling.stores_dropout and any(layer.lora_dropout for layer in adapter.layers.values()):
        dropouts = sorted({layer.lora_dropout for layer in adapter.layers.values()})
        notes.append(f"{format} stores no lora_dropout; this adapter's is {', '.join(map(str, dropouts))}.")
    transposed = [path for path in adapter.layers if adapter.stored_transposed(path)]
    if transposed and not spelling.stores_layout:
        notes.append(f"{format} stores no fan_in_fan_out; this adapter's {len(transposed)} layers have it.")
    if blocks:
        notes.append(f"{len(blocks)} MergedLinear are stored as one adapter each, with a block-diagonal lora_B.")
    if format == "kohya":
        notes.append("kohya stores paths with underscores for dots; the dots are lost.")
    if format == "loralib":
        notes.append("loralib does not store which layers are embeddings or convolutions, or enable_lora.")
    if spelling.stores_others:
        for key, tensor in adapter.others.items():
            _put(state, _written_other(key, adapter) if format == "peft" else key, tensor)
    elif adapter.others:
        notes.append(f"{format} stores no other entries; {len(adapter.others)} are left out: {_list(adapter.others)}.")
    return state, tuple(notes)


def _put(state: dict[str, Tensor], key: str, tensor: Tensor) -> None:
    if key in state:
        raise ValueError(f"Two entries would be called {key!r}; expected paths that differ in the new format.")
    state[key] = tensor.detach().clone(memory_format=torch.contiguous_format)


def _written_name(path: str, format: str) -> str:
    if format == "peft":
        return (_PEFT + path).removesuffix(".")
    if format != "kohya" or is_flat(path):
        return path
    for component, word in (("text_encoder_2.", "te2"), ("text_encoder_3.", "te3"), ("text_encoder.", "te1")):
        if path.startswith(component):
            return f"lora_{word}_{path.removeprefix(component).replace('.', '_')}"
    return f"lora_unet_{bare(path).replace('.', '_')}"


def _written_other(key: str, adapter: Adapter) -> str:
    owner, _, leaf = key.rpartition(".")
    return f"{_PEFT}{owner}.base_layer.{leaf}" if owner in adapter.layers else _PEFT + key


def _list(names: Mapping[str, object]) -> str:
    shown = list(names)[:5]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def is_flat(path: str) -> bool:
    """Whether this is kohya's name of a layer, with underscores for dots."""
    return path.startswith("lora_") and "." not in path


def bare(path: str) -> str:
    """path without the prefixes that say which part of a larger model it is in."""
    while prefix := next((prefix for prefix in PREFIXES if path.startswith(prefix)), ""):
        path = path.removeprefix(prefix)
    return path
