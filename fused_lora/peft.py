"""Runs the LoRA layers of a PEFT model on the fused ops, in place and reversibly.

`accelerate` gives PEFT's `Linear` and `Embedding` layers a subclass of their class, and changes nothing else: adapters,
parameters, state-dict keys and every method but forward stay PEFT's own. Its forward looks at each call whether the
fused op computes what PEFT's forward would, and calls PEFT's forward if not. What is covered is one plain adapter on
an nn.Linear, a transformers Conv1D or an nn.Embedding; `report` names the reason for every layer that is not.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .dispatch import Choice, autocast_dtype, choose, requested_backend
from .functional import lora_embedding, lora_linear

try:
    from peft.tuners.lora.layer import Embedding, Linear, LoraLayer
    from transformers.pytorch_utils import Conv1D
except ModuleNotFoundError as error:
    if error.name not in ("peft", "transformers"):
        raise
    raise ModuleNotFoundError(
        f"fused_lora.peft needs {error.name}, which is not installed (pip install 'fused-lora[peft]').",
        name=error.name,
    ) from error

_HALF = (torch.float16, torch.bfloat16)
_CAST_BY_AUTOCAST = (*_HALF, torch.float32)
_DTYPES = (*_CAST_BY_AUTOCAST, torch.float64)


class _LinearCall(NamedTuple):
    """What lora_linear needs beside x, and the dtype it computes in."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float
    fan_in_fan_out: bool
    dtype: torch.dtype


class _EmbeddingCall(NamedTuple):
    """What lora_embedding needs beside the indices."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    padding_idx: int | None
    scale_grad_by_freq: bool


class FusedLinear(Linear):
    """PEFT's LoRA layer of an nn.Linear or Conv1D, computed by `functional.lora_linear` wherever that is the same.

    x: (..., in_features) to (..., out_features), in the dtype that PEFT's forward returns. float32 adapters beside a
    half-precision base are rounded to the base's dtype inside the products, as under autocast, and get float32
    gradients. The dropout mask is drawn as `functional.lora_linear` says, not as nn.Dropout would.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = "its call has further arguments" if args or kwargs else _linear_call(self, x)
        if isinstance(call, str):
            return Linear.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        return lora_linear(
            x,
            call.weight,
            call.lora_A,
            call.lora_B,
            bias=call.bias,
            scaling=call.scaling,
            dropout_p=call.dropout_p,
            training=call.dropout_p > 0,
            fan_in_fan_out=call.fan_in_fan_out,
        )


class FusedEmbedding(Embedding):
    """PEFT's LoRA layer of an nn.Embedding, computed by `functional.lora_embedding` wherever that is the same.

    x: int32 or int64 of any shape to (*x.shape, embedding_dim), in the base weight's dtype.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = "its call has further arguments" if args or kwargs else _embedding_call(self, x)
        if isinstance(call, str):
            return Embedding.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        return lora_embedding(
            x,
            call.weight,
            call.lora_A,
            call.lora_B,
            scaling=call.scaling,
            padding_idx=call.padding_idx,
            scale_grad_by_freq=call.scale_grad_by_freq,
        )


_FUSED: dict[type[nn.Module], type[nn.Module]] = {Linear: FusedLinear, Embedding: FusedEmbedding}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {fused: plain for plain, fused in _FUSED.items()}
_ACCELERATED = (FusedLinear, FusedEmbedding)


class Report(dict[str, Choice]):
    """The path of every LoRA layer by its name in the model; "plain" is PEFT's own forward. str() is for reading."""

    def __str__(self) -> str:
        fused = sum(choice.path != "plain" for choice in self.values())
        lines = [f"{fused} of {len(self)} LoRA layers run on fused_lora's ops."]
        return "\n".join(lines + [f"{name}: {choice}" for name, choice in self.items()])


def accelerate(model: nn.Module) -> nn.Module:
    """Lets the LoRA layers of a PEFT model run on the fused ops where these cover them; returns the same model.

    model: what peft.get_peft_model, PeftModel.from_pretrained or peft.inject_adapter_in_model made, or a part of it.
        Call it again after adding an adapter that targets further layers. `restore` undoes it.
    Layers whose forward was replaced on the instance (the accelerate library's hooks, X-LoRA) are left alone.
    Raises ValueError if model has no LoRA layer of a kind that the ops cover.
    """
    for layer in model.modules():
        if type(layer) in _FUSED and "forward" not in vars(layer):
            layer.__class__ = _FUSED[type(layer)]
    if not any(isinstance(layer, _ACCELERATED) for layer in model.modules()):
        reasons = "; ".join(sorted({choice.reason for choice in report(model).values()})) or "it has none at all"
        raise ValueError(f"model has no LoRA layer to accelerate ({reasons}); expected PEFT's Linear or Embedding.")
    return model


def restore(model: nn.Module) -> nn.Module:
    """Gives every layer that `accelerate` changed its PEFT class back; returns the same model.

    A model without such layers is left as it is. A pickle of a whole model then needs no fused_lora to be read.
    Raises RuntimeError, and changes nothing, if something else has put its own class or forward over such a layer.
    """
    layers: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if isinstance(m, _ACCELERATED)}
    for name, layer in layers.items():
        if type(layer) not in _PLAIN or "forward" in vars(layer):
            raise RuntimeError(
                f"{name or 'model'} is a {type(layer).__name__} whose class or forward was replaced after "
                "accelerate(model); expected that to be undone before restore(model)."
            )
    for layer in layers.values():
        layer.__class__ = _PLAIN[type(layer)]
    return model


def report(model: nn.Module) -> Report:
    """Says of every LoRA layer of a PEFT model whether PEFT's own forward would run now, "plain", or ours, and why.

    Which kernels ours takes depends on the rows too, which nobody knows here. It goes by the state of the layers, the
    current autocast and backend, and an input of the base weight's dtype and device without further arguments.
    Raises RuntimeError, as the call itself would, where the forced backend cannot run.
    """
    return Report({name: _path(m) for name, m in model.named_modules() if isinstance(m, LoraLayer)})


def _path(layer: object) -> Choice:
    call: _LinearCall | _EmbeddingCall | str
    if isinstance(layer, FusedLinear):
        call = _linear_call(layer)
    elif isinstance(layer, FusedEmbedding):
        call = _embedding_call(layer)
    elif type(layer) not in _FUSED:
        call = f"there is no fused op for a {type(layer).__module__}.{type(layer).__qualname__}"
    elif "forward" in vars(layer):
        call = "its forward was replaced on the instance"
    else:
        call = "accelerate(model) was not called since it was made"
    if isinstance(call, str):
        return Choice("plain", call)
    dtype = call.dtype if isinstance(call, _LinearCall) else call.weight.dtype
    return choose(requested_backend(), call.weight.device, dtype, call.lora_A.dtype)


def _linear_call(layer: Linear, x: Tensor | None = None) -> _LinearCall | str:
    """The fused op's arguments, or why PEFT's own forward must run. Of x only its kind is read; None is weight's."""
    adapters = layer.lora_A
    name, obstacle = _adapter_in_force(layer, adapters)
    if obstacle is not None:
        return obstacle
    base: Any = layer.base_layer
    module_A: Any = adapters[name]
    module_B: Any = layer.lora_B[name]
    dropout = layer.lora_dropout[name]
    obstacle = (
        _module_obstacle("base layer", base, (nn.Linear, Conv1D))
        or _module_obstacle("lora_A", module_A, (nn.Linear,))
        or _module_obstacle("lora_B", module_B, (nn.Linear,))
        or _module_obstacle("lora_dropout", dropout, (nn.Dropout, nn.Identity))
    )
    if obstacle is not None:
        return obstacle
    if module_A.bias is not None or module_B.bias is not None:
        return "its adapter has a bias (lora_bias)"
    if isinstance(dropout, nn.Dropout) and dropout.inplace:
        return "its lora_dropout works in place"
    weight, bias, lora_A, lora_B = base.weight, base.bias, module_A.weight, module_B.weight
    x = weight if x is None else x
    obstacle = _tensor_obstacle(x, weight, bias, lora_A, lora_B)
    if obstacle is not None:
        return obstacle
    cast = autocast_dtype(x.device.type)
    dtype = _computed_in(x, cast)
    if _computed_in(weight, cast) != dtype or (bias is not None and _computed_in(bias, cast) != dtype):
        beside = "" if bias is None else f" and its bias {bias.dtype}"
        return f"its input is {x.dtype}, its weight {weight.dtype}{beside}"
    obstacle = _dtype_obstacle(dtype, lora_A, lora_B)
    if obstacle is not None:
        return obstacle
    if cast is None and x.dtype != lora_A.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return f"casting its {x.dtype} input to the adapter's {lora_A.dtype} was disabled"
    dropout_p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return _LinearCall(weight, bias, lora_A, lora_B, layer.scaling[name], dropout_p, type(base) is Conv1D, dtype)


def _embedding_call(layer: Embedding, x: Tensor | None = None) -> _EmbeddingCall | str:
    """The fused op's arguments, or why PEFT's own forward must run. Of x only its kind is read."""
    adapters = layer.lora_embedding_A
    name, obstacle = _adapter_in_force(layer, adapters)
    if obstacle is not None:
        return obstacle
    base: Any = layer.base_layer
    obstacle = _module_obstacle("base layer", base, (nn.Embedding,))
    if obstacle is not None:
        return obstacle
    if base.max_norm is not None:
        return "PEFT applies the max_norm to lora_A, too"
    if base.sparse:
        return "its gradients are sparse"
    if hasattr(base, "embed_scale"):
        return "its base layer has an embed_scale"
    if any(name in getattr(layer, functions, {}) for functions in ("input_fns", "output_fns")):
        return "its lookup is tensor parallel"
    weight, lora_A, lora_B = base.weight, adapters[name], layer.lora_embedding_B[name]
    obstacle = _tensor_obstacle(x, weight, lora_A, lora_B) or _dtype_obstacle(weight.dtype, lora_A, lora_B)
    if obstacle is not None:
        return obstacle
    scaling, padding_idx, by_freq = layer.scaling[name], base.padding_idx, bool(base.scale_grad_by_freq)
    return _EmbeddingCall(weight, lora_A, lora_B, scaling, padding_idx, by_freq)


def _adapter_in_force(layer: LoraLayer, available: nn.ModuleDict | nn.ParameterDict) -> tuple[str, str | None]:
    """The name of the one plain adapter that is in force, or why it is not like that."""
    if layer.disable_adapters:
        return "", "its adapters are disabled"
    if layer.merged:
        return "", f"merged into its weight: {', '.join(layer.merged_adapters)}"
    active = layer.active_adapters
    here = [name for name in active if name in available]
    if not here:
        return "", f"it has no adapter of the active ones ({', '.join(active)})"
    if len(here) > 1:
        return "", f"several adapters are active: {', '.join(here)}"
    name = here[0]
    # DoRA was an attribute of its own before PEFT had variants.
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None:
        return "", f"its adapter is of a variant, {type(variant).__name__}"
    if layer.use_dora.get(name, False):
        return "", "its adapter is of a variant, DoRA"
    scaling = layer.scaling[name]
    if not isinstance(scaling, (int, float)):
        return "", f"its scaling is a {type(scaling).__name__}"
    if not math.isfinite(scaling):
        return "", f"its scaling is {scaling}"
    if torch.nn.modules.module._has_any_global_hook():
        return "", "there are hooks on every module"
    return name, None


def _module_obstacle(role: str, module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """Why calling a submodule could be more than its kind's own forward; None if it is not."""
    if type(module) not in kinds:
        return f"its {role} is a {type(module).__name__}"
    if "forward" in vars(module):
        return f"the forward of its {role} was replaced on the instance"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"its {role} has hooks"
    return None


def _tensor_obstacle(*tensors: Tensor | None) -> str | None:
    """Why the ops do not take these tensors; None if they do.

    DTensors, quantised tensors and those that torch.export traces with are subclasses of Tensor.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"one of its tensors is a {type(tensor).__name__}"
        if tensor.layout != torch.strided:
            return f"one of its tensors is {tensor.layout}"
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            return f"one of its tensors is on {tensor.device}"
    return None


def _computed_in(tensor: Tensor, cast: torch.dtype | None) -> torch.dtype:
    """The dtype in which nn.Linear computes with a tensor, where autocast casts to `cast`."""
    return tensor.dtype if cast is None or tensor.dtype not in _CAST_BY_AUTOCAST else cast


def _dtype_obstacle(dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor) -> str | None:
    """Why the ops take no such adapter beside a base that is computed in dtype; None if they do."""
    allowed = (dtype, torch.float32) if dtype in _HALF else (dtype,)
    if dtype not in _DTYPES or lora_A.dtype not in allowed or lora_B.dtype != lora_A.dtype:
        return f"its base is computed in {dtype}, its lora_A is {lora_A.dtype} and its lora_B {lora_B.dtype}"
    return None
