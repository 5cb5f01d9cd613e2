"""`convert` makes LoRA layers of a model's plain layers, in place; `unconvert` makes them plain again.

A converted module stays the same object with another class: every name, reference and hook of it, and its very
parameters, are kept. What the new class holds is taken from a layer that its constructor built on the meta device.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .base import LoRALayer
from .conv import Conv1d, Conv2d, Conv3d, ConvLoRA
from .embedding import Embedding
from .linear import Linear, MergedLinear
from .merge import MergingLayer
from .targets import Targets, by_name, named

_CONVOLUTIONS: dict[type[nn.Module], type[ConvLoRA]] = {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}
_PLAIN: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, *_CONVOLUTIONS)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# These are called with the prefix of the keys that a convolution's parameters have.
_KEYED_HOOKS = ("_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
_HOOKS = ("_state_dict_hooks", "_load_state_dict_post_hooks", "_forward_pre_hooks")


@dataclass(frozen=True)
class Replaced:
    """One layer that `convert` or `unconvert` replaced: its name in the model, its classes and its adapter."""

    name: str
    before: type[nn.Module]
    after: type[nn.Module]
    r: int
    lora_alpha: float

    def __str__(self) -> str:
        classes = f"{self.before.__module__}.{self.before.__name__} -> {self.after.__module__}.{self.after.__name__}"
        return f"{self.name}: {classes}, r={self.r}, lora_alpha={self.lora_alpha:g}"


@dataclass(frozen=True)
class _Origin:
    """What a converted module was, and the attributes and hooks that it has only as a LoRA layer."""

    plain: type[nn.Module]
    attributes: tuple[str, ...]
    hooks: tuple[int, ...]


def convert(
    model: nn.Module,
    target_modules: Targets,
    r: int,
    lora_alpha: float = 1,
    lora_dropout: float = 0.0,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
    merge_weights: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> list[Replaced]:
    """Makes LoRA layers of the target modules of model, in place, and returns which, in the model's order.

    nn.Linear and transformers' Conv1D become `Linear` (Conv1D with fan_in_fan_out), nn.Embedding `Embedding`,
    nn.Conv1d, nn.Conv2d and nn.Conv3d `Conv1d`, `Conv2d` and `Conv3d`. Each stays the same object, also where it has
    several names, with its hooks, mode and attributes, and with the very same parameters, so that tied weights stay
    tied. A convolution's parameters, and its state-dict hooks, are then those of `conv`, so that their keys are
    conv.weight and conv.bias; plain checkpoints load all the same. The adapters are on the weights' devices and have
    the layers' initial values, drawn from torch's default generator.

    target_modules: a list of names, or ends of names from a dot on, as "q_proj"; or a regular expression that matches
        the whole name, as in PEFT; or a function of name and module. Everything that it names must be convertible.
    r, lora_alpha, lora_dropout: as the layers take them; r is 1 or more. An Embedding has no dropout.
    rank_pattern, alpha_pattern: other values of r and lora_alpha by layer, as in PEFT: the first key wins that, as a
        regular expression, matches the name or its end from a dot on.
    enable_lora: by such keys, the slices of linear layers that become `MergedLinear`: {"c_attn": [True, False, True]}.
    merge_weights: False by default, unlike the layers', since weights may be shared. With True, the next eval() merges,
        into a parameter of the layer's own.
    adapter_dtype: dtype of lora_A and lora_B; None is each weight's own.

    The weights of the converted layers no longer require gradients, as in the layers; every other parameter, biases
    too, is left as it is: `mark_only_lora_as_trainable` freezes them. Convert before the model is wrapped for
    distributed training and before an optimizer is made. On the meta device nothing is drawn: after to_empty(), load an
    adapter, or call the layers' reset_parameters() before the weights are loaded.

    On the reference path the outputs are at first those of the plain layers, bit for bit, but for a zero's sign, and as
    long as x lora_Aᵀ is finite. Kernels round as other programs of the same product do.

    Raises ValueError, with nothing changed, if nothing is named; if an entry of target_modules or a key of a pattern
    names nothing; if a named module is of another kind, already a LoRA layer, parametrised, of a subclass, bypassed by
    its parent (nn.MultiheadAttention's out_proj) or otherwise not computed by its class and weight alone: the message
    has each one and its reason; and what the layers raise. Raises TypeError for target_modules of another type.
    """
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError("model is wrapped in DistributedDataParallel; expected to be converted before it is wrapped.")
    targets = named(model, target_modules)
    ranks = by_name("rank_pattern", rank_pattern or {}, targets)
    alphas = by_name("alpha_pattern", alpha_pattern or {}, targets)
    slices = by_name("enable_lora", enable_lora or {}, targets)
    inside = {id(part) for module in model.modules() if isinstance(module, LoRALayer) for part in module.modules()}
    refused = {
        name: "is a LoRA layer already or a part of one"
        if id(module) in inside
        else _refusal(module, name in slices, merge_weights)
        for name, module in targets.items()
    }
    reasons = [f"{name or 'model'} {reason}" for name, reason in refused.items() if reason]
    if reasons:
        raise ValueError(f"target_modules names what cannot be converted; expected plain layers: {'; '.join(reasons)}.")
    layers = {
        name: _build(
            module,
            slices.get(name),
            lora_dropout,
            r=ranks.get(name, r),
            lora_alpha=alphas.get(name, lora_alpha),
            merge_weights=merge_weights,
            adapter_dtype=adapter_dtype,
        )
        for name, module in targets.items()
    }
    for name, module in targets.items():
        _check_fits(name, module, layers[name])
    bypassed = _bypassed(model)
    return [_convert(name, module, layers[name], id(module) in bypassed) for name, module in targets.items()]


def unconvert(model: nn.Module, *, merge: bool = True) -> list[Replaced]:
    """Makes plain layers again of all that `convert` made LoRA layers of, in place, and returns which.

    Each module has its class of before. merge: whether its weight is then a new parameter with the adapter (the float32
    sum, rounded once), of which modules that shared the weight see nothing; otherwise it is the base weight, the very
    same parameter, and the adapter is dropped. No parameter's requires_grad changes.

    Raises ValueError if model has no converted layer; layers that were built as LoRA layers are not converted ones.
    """
    converted = {name: module for name, module in model.named_modules() if "_converted_from" in vars(module)}
    if not converted:
        raise ValueError("model has no layer made by convert; expected at least one.")
    return [_unconvert(name, module, merge) for name, module in converted.items()]


def _refusal(module: Any, sliced: bool, merge_weights: bool) -> str | None:
    """Why a LoRA layer could not stand for this module; None if it can."""
    if parametrize.is_parametrized(module):
        return "is parametrised, so that its weight is computed anew for each use"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"is a {type(module).__name__}, which nn.MultiheadAttention never calls: it uses the weight alone"
    kind = type(module)
    if kind not in _PLAIN and not _is_conv1d(module):
        if isinstance(module, _PLAIN):
            return f"is a {kind.__name__}, a subclass that may compute something else"
        return f"is a {kind.__name__}" + (", which holds other modules" if module._modules else "")
    if "forward" in vars(module):
        return "has a forward of its own in place of its class's, as offloading hooks put there"
    more = [
        *module._modules,
        *module._buffers,
        *(name for name in module._parameters if name not in ("weight", "bias")),
    ]
    if more:
        return f"has {', '.join(more)} beside weight and bias"
    for name in ("weight", "bias"):
        tensor = getattr(module, name, None)
        if type(tensor) is not nn.Parameter and not (name == "bias" and tensor is None and not _is_conv1d(module)):
            return f"has a {type(tensor).__name__} for a {name}, not an nn.Parameter"
    if module.weight.dtype not in _DTYPES:
        return f"has a weight of {module.weight.dtype}"
    if sliced and kind is not nn.Linear and not _is_conv1d(module):
        return f"is a {kind.__name__}, which has no slices for enable_lora"
    if merge_weights and kind in _CONVOLUTIONS and module._state_dict_hooks:
        return "has state-dict hooks, which would see the merged weight; merge_weights must be False"
    return None


def _is_conv1d(module: nn.Module) -> bool:
    """Whether module is transformers' Conv1D, for which transformers must have been imported already."""
    return type(module) is getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _bypassed(model: nn.Module) -> set[int]:
    """Linear layers whose weights nn.TransformerEncoderLayer reads in inference without calling them."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    return {id(encoder._modules.get(name)) for encoder in encoders for name in ("linear1", "linear2")}


def _build(module: Any, enable_lora: Sequence[bool] | None, lora_dropout: float, **options: Any) -> MergingLayer:
    """The LoRA layer for module, with an initialised adapter on its weight's device and all else on meta."""
    if type(options["r"]) is not int or options["r"] < 1:
        raise ValueError(f"r is {options['r']!r}; expected an integer of 1 or more.")
    weight, kind = module.weight, type(module)
    options |= {"device": "meta", "dtype": weight.dtype}
    layer: Any
    if kind is nn.Embedding:
        own = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        options |= {key: getattr(module, key) for key in own}
        layer = Embedding(module.num_embeddings, module.embedding_dim, **options)
    elif kind in _CONVOLUTIONS:
        # Its other settings are moved when it is converted.
        options |= {"lora_dropout": lora_dropout, "groups": module.groups, "bias": module.bias is not None}
        layer = _CONVOLUTIONS[kind](module.in_channels, module.out_channels, module.kernel_size, **options)
    else:
        transposed = _is_conv1d(module)
        options |= {"lora_dropout": lora_dropout, "bias": module.bias is not None, "fan_in_fan_out": transposed}
        inputs, outputs = weight.shape if transposed else (module.in_features, module.out_features)
        if enable_lora is None:
            layer = Linear(inputs, outputs, **options)
        elif any(enable_lora):
            layer = MergedLinear(inputs, outputs, enable_lora=enable_lora, **options)
        else:
            raise ValueError(f"enable_lora is {list(enable_lora)}; expected at least one True.")
    for name in ("lora_A", "lora_B"):
        setattr(layer, name, nn.Parameter(torch.empty_like(getattr(layer, name), device=weight.device)))
    # Nothing is drawn for what is still on meta.
    layer.reset_parameters()
    return layer  # type: ignore[no-any-return]


def _check_fits(name: str, module: Any, layer: Any) -> None:
    expected = layer.weight.shape
    if module.weight.shape != expected:
        raise ValueError(
            f"{name or 'model'} has a weight of shape {tuple(module.weight.shape)}; expected {tuple(expected)}, as its "
            "attributes say."
        )
    theirs = vars(module)
    clashes = [key for key, value in _settings(layer).items() if key in theirs and theirs[key] != value]
    if clashes:
        raise ValueError(
            f"{name or 'model'} has attributes {', '.join(clashes)} of its own; expected names that LoRA layers do not "
            "use."
        )


def _settings(module: nn.Module) -> dict[str, Any]:
    """A module's attributes beyond those of every nn.Module."""
    common = vars(nn.Module())
    return {name: value for name, value in vars(module).items() if name not in common}


def _convert(name: str, module: Any, layer: Any, bypassed: bool) -> Replaced:
    plain, weight = type(module), module.weight
    if isinstance(layer, ConvLoRA):
        _move_convolution(module, layer.conv)
    added = {key: value for key, value in _settings(layer).items() if key not in vars(module)}
    vars(module).update(added)
    module._parameters |= {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    module._modules |= layer._modules
    for part in layer._modules.values():
        part.train(module.training)
    hooks = _add_first(module, layer)
    module.__class__ = type(layer)
    if bypassed:
        # nn.TransformerEncoderLayer's short cut past its layers is closed by any hook in them.
        hooks.append(module.register_forward_pre_hook(_no_short_cut).id)
    vars(module)["_converted_from"] = _Origin(plain, tuple(added), tuple(hooks))
    weight.requires_grad = False
    return Replaced(name, plain, type(module), layer.r, layer.lora_alpha)


def _unconvert(name: str, module: Any, merge: bool) -> Replaced:
    origin: _Origin = vars(module)["_converted_from"]
    replaced = Replaced(name, type(module), origin.plain, module.r, module.lora_alpha)
    if module.merged:
        module._unmerge()
    weight = module.base_weight
    if merge:
        merged = module.merged_weight()
        # fan_in_fan_out's comes transposed, which safetensors would not save.
        merged = merged.contiguous() if weight.is_contiguous() else merged
        weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
    for key in (*origin.attributes, "merged_base_device", "_converted_from"):
        vars(module).pop(key, None)
    for kind in _HOOKS:
        for hook in origin.hooks:
            vars(module)[kind].pop(hook, None)
    del module._parameters["lora_A"], module._parameters["lora_B"], module._modules["lora_dropout"]
    if "conv" in module._modules:
        _move_convolution(module._modules.pop("conv"), module)
    module.__class__ = origin.plain
    module.weight = weight
    return replaced


def _move_convolution(source: Any, target: Any) -> None:
    """Moves parameters, settings and the hooks on their keys from one convolution to another."""
    settings = _settings(nn.Conv1d(1, 1, 1, device="meta"))
    vars(target).update({key: vars(source)[key] for key in settings})
    target._parameters, source._parameters = source._parameters, {}
    for kind in _KEYED_HOOKS:
        theirs = vars(target)[kind]
        vars(target)[kind], vars(source)[kind] = vars(source)[kind], type(theirs)()
        vars(target)[kind].update(theirs)


def _add_first(module: nn.Module, layer: nn.Module) -> list[int]:
    """Puts layer's state-dict hooks before module's own, which then see the base weight in every mode."""
    added: list[int] = []
    for kind in ("_state_dict_hooks", "_load_state_dict_post_hooks"):
        for key, hook in reversed(vars(layer)[kind].items()):
            vars(module)[kind][key] = hook
            vars(module)[kind].move_to_end(key, last=False)
            added.append(key)
    return added


def _no_short_cut(module: Any, arguments: tuple[Tensor]) -> None:
    if arguments and arguments[0].is_nested and not module.merged:
        raise TypeError(
            "x is a nested tensor, as nn.TransformerEncoder makes in inference; expected a plain one: build it with "
            "enable_nested_tensor=False or set its use_nested_tensor to False."
        )
