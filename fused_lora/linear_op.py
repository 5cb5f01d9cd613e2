"""The LoRA linear layer's ops: implementations, fakes, autocast, autograd and what it saves.

`fused_lora::lora_linear` is the one that graphs, export and users see. MergedLinear is the same op: enable_lora names
the slices of the output that have an adapter, and a plain layer is one slice.

Two-dimensional from here on: x [M, K], weight [N, K], lora_A [R, K], lora_B [N, R], dy [M, N]; see reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import lib, make_differentiable, path_of, register, without_autocast
from .reference import Dropout, dropout_threshold

_FORWARD_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, bool[] enable_lora, "
    "Tensor? seed, float scaling, float dropout_p, SymInt row_offset, SymInt column_offset, str backend"
)
_DROPOUT_ARGUMENTS = "Tensor? seed, float dropout_p, SymInt row_offset, SymInt column_offset, str backend"


def _dropout(seed: Tensor | None, p: float, row_offset: int, column_offset: int) -> Dropout | None:
    threshold = dropout_threshold(p)
    if seed is None or threshold == 0:
        return None
    return Dropout(seed, threshold, row_offset, column_offset)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: Sequence[bool],
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    row_offset: int,
    column_offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dropout = _dropout(seed, dropout_p, row_offset, column_offset)
    path = path_of("forward", backend, x, lora_A.dtype)
    y_xa: tuple[Tensor, Tensor] = path.forward(
        x, weight, bias, lora_A, lora_B, scaling=scaling, dropout=dropout, enable_lora=enable_lora
    )
    return y_xa


def _inference(x: Tensor, *arguments: Any) -> Tensor:
    return _forward(x, *arguments)[0]


def _grad_panels(
    dy: Tensor,
    lora_B: Tensor | None,
    xa: Tensor | None,
    enable_lora: Sequence[bool],
    scaling: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    path = path_of("grad_panels", backend, dy, dtype)
    dyb, db = path.grad_panels(dy, lora_B, xa, scaling=scaling, dtype=dtype, enable_lora=enable_lora)
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
    path = path_of("grad_input", backend, dy, lora_A.dtype)
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
    path = path_of("grad_lora_A", backend, x, dtype)
    da: Tensor = path.grad_lora_A(dyb, x, dropout=dropout, dtype=dtype)
    return da


def _fake_inference(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_forward(x: Tensor, weight: Tensor, bias: Any, lora_A: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], lora_A.shape[0]))


def _fake_grad_panels(
    dy: Tensor,
    lora_B: Tensor | None,
    xa: Tensor | None,
    enable_lora: Sequence[bool],
    scaling: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    enabled, rows = sum(enable_lora), dy.shape[1] // len(enable_lora) * sum(enable_lora)
    dyb = dy.new_empty(0 if lora_B is None else (dy.shape[0], enabled * lora_B.shape[1]))
    db = dy.new_empty(0 if xa is None else (rows, xa.shape[1] // enabled), dtype=dtype)
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
        enable_lora: Sequence[bool],
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        row_offset: int,
        column_offset: int,
        backend: str,
    ) -> Tensor:
        wants_dx, wants_dw, _, wants_da, wants_db = ctx.needs_input_grad[:5]
        y, xa = torch.ops.fused_lora.lora_linear_forward(
            x, weight, bias, lora_A, lora_B, enable_lora, seed, scaling, dropout_p, row_offset, column_offset, backend
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
        ctx.panel_arguments = enable_lora, scaling, lora_A.dtype, backend
        ctx.adapter_dtype = lora_A.dtype
        ctx.dropout_arguments = dropout_p, row_offset, column_offset, backend
        ctx.set_materialize_grads(False)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 12
        x, weight, lora_A, lora_B, xa, seed = ctx.saved_tensors
        wants_dx, wants_dw, wants_dbias, wants_da, wants_db = ctx.needs_input_grad[:5]
        ops, dx, dw, dbias, da, db = torch.ops.fused_lora, None, None, None, None, None
        with without_autocast(dy.device.type):
            if lora_B is not None or wants_db:
                dyb, db = ops.lora_linear_grad_panels(dy, lora_B, xa, *ctx.panel_arguments)
            if wants_dx:
                dx = ops.lora_linear_grad_input(dy, weight, dyb, lora_A, seed, *ctx.dropout_arguments)
            if wants_da:
                da = ops.lora_linear_grad_lora_A(dyb, x, ctx.adapter_dtype, seed, *ctx.dropout_arguments)
            if wants_dw:
                dw = dy.T @ x
            if wants_dbias:
                dbias = dy.sum(0)
        return dx, dw, dbias, da, db if wants_db else None, *(None,) * 7


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


register(f"lora_linear({_FORWARD_ARGUMENTS}) -> Tensor", _inference, _fake_inference)
register(f"lora_linear_forward({_FORWARD_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _fake_forward)
register(
    "lora_linear_grad_panels(Tensor dy, Tensor? lora_B, Tensor? xa, bool[] enable_lora, float scaling, "
    "ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _grad_panels,
    _fake_grad_panels,
)
register(
    f"lora_linear_grad_input(Tensor dy, Tensor weight, Tensor dyb, Tensor lora_A, {_DROPOUT_ARGUMENTS}) -> Tensor",
    _grad_input,
    _fake_grad_input,
)
register(
    f"lora_linear_grad_lora_A(Tensor dyb, Tensor x, ScalarType dtype, {_DROPOUT_ARGUMENTS}) -> Tensor",
    _grad_lora_A,
    _fake_grad_lora_A,
)
make_differentiable("lora_linear", _LoRALinear)
for _device_type in ("cpu", "cuda"):
    lib.impl("lora_linear", _autocast(_device_type), f"Autocast{_device_type.upper()}")
