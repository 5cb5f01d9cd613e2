"""torch.library registration of the LoRA linear op: implementations, fakes, autocast, autograd and what it saves.

`fused_lora::lora_linear` is the one op that graphs, export and users see. It is differentiable at its Autograd key;
below that it is made of one forward op and three backward ops, each with a fake, so that a compiled backward holds
exactly the gradients that are wanted. All of them choose their path (reference or kernels) when they run.

Two-dimensional from here on: x [M, K], weight [N, K], lora_A [R, K], lora_B [N, R], dy [M, N]; see reference.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import autocast_dtype, choose, count
from .reference import Dropout, dropout_threshold

_lib = torch.library.Library("fused_lora", "DEF")

_FORWARD_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, float scaling, "
    "float dropout_p, SymInt row_offset, SymInt column_offset, str backend"
)
_DROPOUT_ARGUMENTS = "Tensor? seed, float dropout_p, SymInt row_offset, SymInt column_offset, str backend"

_lib.define(f"lora_linear({_FORWARD_ARGUMENTS}) -> Tensor")
_lib.define(f"lora_linear_forward({_FORWARD_ARGUMENTS}) -> (Tensor, Tensor)")
_lib.define(
    "lora_linear_grad_panels(Tensor dy, Tensor? lora_B, Tensor? xa, float scaling, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor)"
)
_lib.define(
    f"lora_linear_grad_input(Tensor dy, Tensor weight, Tensor dyb, Tensor lora_A, {_DROPOUT_ARGUMENTS}) -> Tensor"
)
_lib.define(f"lora_linear_grad_lora_A(Tensor dyb, Tensor x, ScalarType dtype, {_DROPOUT_ARGUMENTS}) -> Tensor")


def _dropout(seed: Tensor | None, p: float, row_offset: int, column_offset: int) -> Dropout | None:
    threshold = dropout_threshold(p)
    if seed is None or threshold == 0:
        return None
    return Dropout(seed, threshold, row_offset, column_offset)


def _path(op: str, backend: str, tensor: Tensor, adapter_dtype: torch.dtype) -> ModuleType:
    """reference.py or fused.py, which have the same four functions; Triton is imported when it is first needed."""
    path = choose(backend, tensor.device, tensor.dtype, adapter_dtype).path
    count(op, path)
    if path == "reference":
        return reference
    from . import fused

    return fused


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    row_offset: int,
    column_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dropout = _dropout(seed, dropout_p, row_offset, column_offset)
    path = _path("forward", backend, x, lora_A.dtype)
    y_xa: tuple[Tensor, Tensor] = path.forward(x, weight, bias, lora_A, lora_B, scaling=scaling, dropout=dropout)
    return y_xa


def _inference(x: Tensor, *arguments: Any) -> Tensor:
    return _forward(x, *arguments)[0]


def _grad_panels(
    dy: Tensor, lora_B: Tensor | None, xa: Tensor | None, scaling: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    dyb, db = _path("grad_panels", backend, dy, dtype).grad_panels(dy, lora_B, xa, scaling=scaling, dtype=dtype)
    return dy.new_empty(0) if dyb is None else dyb, dy.new_empty(0, dtype=dtype) if db is None else db


def _grad_input(
    dy: Tensor,
    weight: Tensor,
    dyb: Tensor,
    lora_A: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    row_offset: int,
    column_offset: int,
    backend: str,
) -> Tensor:
    dropout = _dropout(seed, dropout_p, row_offset, column_offset)
    path = _path("grad_input", backend, dy, lora_A.dtype)
    dx: Tensor = path.grad_input(dy, weight, dyb, lora_A, dropout=dropout)
    return dx


def _grad_lora_A(
    dyb: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    seed: Tensor | None,
    dropout_p: float,
    row_offset: int,
    column_offset: int,
    backend: str,
) -> Tensor:
    dropout = _dropout(seed, dropout_p, row_offset, column_offset)
    path = _path("grad_lora_A", backend, x, dtype)
    da: Tensor = path.grad_lora_A(dyb, x, dropout=dropout, dtype=dtype)
    return da


def _fake_inference(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_forward(x: Tensor, weight: Tensor, bias: Any, lora_A: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], lora_A.shape[0]))


def _fake_grad_panels(
    dy: Tensor, lora_B: Tensor | None, xa: Tensor | None, scaling: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    dyb = dy.new_empty(0 if lora_B is None else (dy.shape[0], lora_B.shape[1]))
    db = dy.new_empty(0 if xa is None else (dy.shape[1], xa.shape[1]), dtype=dtype)
    return dyb, db


def _fake_grad_input(dy: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return dy.new_empty((dy.shape[0], weight.shape[1]))


def _fake_grad_lora_A(dyb: Tensor, x: Tensor, dtype: torch.dtype, *arguments: Any) -> Tensor:
    return x.new_empty((dyb.shape[1], x.shape[1]), dtype=dtype)


class _LoRALinear(torch.autograd.Function):
    """Saves only what the wanted gradients read: x, the panel xa, the parameters and the seed; never a mask."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        row_offset: int,
        column_offset: int,
        backend: str,
    ) -> Tensor:
        wants_dx, wants_dw, _, wants_da, wants_db = ctx.needs_input_grad[:5]
        y, xa = torch.ops.fused_lora.lora_linear_forward(
            x, weight, bias, lora_A, lora_B, seed, scaling, dropout_p, row_offset, column_offset, backend
        )
        wants_dyb = wants_dx or wants_da
        ctx.save_for_backward(
            x if wants_da or wants_dw else None,
            weight if wants_dx else None,
            lora_A if wants_dx else None,
            lora_B if wants_dyb else None,
            xa if wants_db else None,
            seed if wants_dyb else None,
        )
        ctx.scaling, ctx.adapter_dtype, ctx.backend = scaling, lora_A.dtype, backend
        ctx.dropout_arguments = dropout_p, row_offset, column_offset, backend
        ctx.set_materialize_grads(False)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 11
        x, weight, lora_A, lora_B, xa, seed = ctx.saved_tensors
        wants_dx, wants_dw, wants_dbias, wants_da, wants_db = ctx.needs_input_grad[:5]
        ops, dx, dw, dbias, da, db = torch.ops.fused_lora, None, None, None, None, None
        with _without_autocast(dy.device.type):
            if lora_B is not None or wants_db:
                dyb, db = ops.lora_linear_grad_panels(dy, lora_B, xa, ctx.scaling, ctx.adapter_dtype, ctx.backend)
            if wants_dx:
                dx = ops.lora_linear_grad_input(dy, weight, dyb, lora_A, seed, *ctx.dropout_arguments)
            if wants_da:
                da = ops.lora_linear_grad_lora_A(dyb, x, ctx.adapter_dtype, seed, *ctx.dropout_arguments)
            if wants_dw:
                dw = dy.T @ x
            if wants_dbias:
                dbias = dy.sum(0)
        return dx, dw, dbias, da, db if wants_db else None, None, None, None, None, None, None


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _differentiable(keyset: Any, *arguments: Any) -> Tensor:
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        return _LoRALinear.apply(*arguments)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fused_lora.lora_linear.default.redispatch(  # type: ignore[no-any-return]
            keyset & torch._C._after_autograd_keyset, *arguments
        )


def _autocast(device_type: str) -> Any:
    """x, weight and bias go to autocast's dtype, as for nn.Linear; float32 adapters stay as they are.

    The op rounds float32 adapters to x's dtype inside its products anyway, and hands their gradients out in float32.
    """
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def cast(tensor: Tensor | None, kept: tuple[torch.dtype, ...]) -> Tensor | None:
        if tensor is None or tensor.dtype in kept or not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, *rest: Any) -> Any:
        x, weight, bias = (cast(t, (torch.float64,)) for t in (x, weight, bias))  # type: ignore[assignment]
        lora_A, lora_B = (cast(t, (torch.float64, torch.float32)) for t in (lora_A, lora_B))  # type: ignore[assignment]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.fused_lora.lora_linear(x, weight, bias, lora_A, lora_B, *rest)

    return lora_linear


for _name, _implementation, _fake in (
    ("lora_linear", _inference, _fake_inference),
    ("lora_linear_forward", _forward, _fake_forward),
    ("lora_linear_grad_panels", _grad_panels, _fake_grad_panels),
    ("lora_linear_grad_input", _grad_input, _fake_grad_input),
    ("lora_linear_grad_lora_A", _grad_lora_A, _fake_grad_lora_A),
):
    _lib.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_lora::{_name}", _fake, lib=_lib)

_lib.impl("lora_linear", _differentiable, "Autograd", with_keyset=True)
for _device_type in ("cpu", "cuda"):
    _lib.impl("lora_linear", _autocast(_device_type), f"Autocast{_device_type.upper()}")
