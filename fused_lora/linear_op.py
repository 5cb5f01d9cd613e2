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

from .dispatch import BATCH_INVARIANT, autocasts
from .linear_choice import choose_backward, choose_forward
from .ops import (
    differentiates,
    direct,
    direct_apply,
    lib,
    make_differentiable,
    module_of,
    once_differentiable,
    register,
    repeated,
)
from .reference import Dropout, dropout_threshold

_FORWARD_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, bool[] enable_lora, "
    "Tensor? seed, float scaling, float dropout_p, SymInt row_offset, SymInt column_offset, str backend"
)
_BACKWARD_ARGUMENTS = (
    "Tensor dy, Tensor? x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, Tensor? xa, Tensor? bits, "
    "bool[] enable_lora, float scaling, float dropout_p, ScalarType dtype, str backend"
)


def _compute(
    inference: bool,
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, its panel xa, and the mask's bits where there is dropout."""
    threshold = 0 if seed is None else dropout_threshold(dropout_p)
    kind = {"ranks": lora_A.shape[0], "drops": threshold > 0, "trains": not inference}
    choice = choose_forward(backend, x.device, x.dtype, lora_A.dtype, *x.shape, weight.shape[0], **kind)
    module = module_of("forward", choice)

    def call() -> tuple[Tensor, Tensor, Tensor | None]:
        dropout = None if seed is None or threshold == 0 else Dropout(seed, threshold, row_offset, column_offset)
        options = {"keep_panel": False} if inference and choice.path == "decode" else {}
        return module.forward(  # type: ignore[no-any-return]
            x, weight, bias, lora_A, lora_B, scaling=scaling, dropout=dropout, enable_lora=enable_lora, **options
        )

    facts = "forward", choice.path, inference, scaling, threshold, row_offset, column_offset, *enable_lora
    return repeated(choice, (x, weight, bias, lora_A, lora_B, seed), facts, call)


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As an op: bits that are not there are empty."""
    y, xa, bits = _compute(False, x, *arguments)
    return y, xa, x.new_empty(0, dtype=torch.uint8) if bits is None else bits


def _inference(*arguments: Any) -> Tensor:
    return _compute(True, *arguments)[0]


def _gradients(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    xa: Tensor | None,
    bits: Tensor | None,
    enable_lora: Sequence[bool],
    scaling: float,
    dropout_p: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx where weight, lora_A and lora_B are given, da where x and lora_B are, db where xa is."""
    if bits is not None:
        scaling /= 1 - dropout_threshold(dropout_p) / 65536
    if backend == BATCH_INVARIANT:
        # No path's gradients are; this one takes a rank of 0 too.
        backend = "reference"
    read = weight if x is None else x
    features = () if read is None else read.shape[1:]
    plain = weight is not None and lora_A is not None and lora_B is not None and len(enable_lora) == 1
    choice = choose_backward(backend, dy.device, dy.dtype, dtype, *dy.shape, *features, plain=plain)
    module = module_of("backward", choice)

    def call() -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return module.backward(  # type: ignore[no-any-return]
            dy, x, weight, lora_A, lora_B, xa, bits=bits, scaling=scaling, dtype=dtype, enable_lora=enable_lora
        )

    facts = "backward", choice.path, scaling, dtype, *enable_lora
    return repeated(choice, (dy, x, weight, lora_A, lora_B, xa, bits), facts, call)


def _backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """As an op: what is not wanted is empty."""
    return tuple(dy.new_empty(0) if gradient is None else gradient for gradient in _gradients(dy, *arguments))


def _fake_inference(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    enable_lora: Sequence[bool],
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    drops = seed is not None and dropout_threshold(dropout_p) > 0
    bits = x.new_empty((x.shape[0], (x.shape[1] + 7) // 8) if drops else 0, dtype=torch.uint8)
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], lora_A.shape[0])), bits


def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    xa: Tensor | None,
    bits: Tensor | None,
    enable_lora: Sequence[bool],
    scaling: float,
    dropout_p: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    enabled = sum(enable_lora)
    dx, da, db = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    if weight is not None and lora_A is not None and lora_B is not None:
        dx = dy.new_empty((dy.shape[0], weight.shape[1]))
    if x is not None and lora_B is not None:
        da = dy.new_empty((enabled * lora_B.shape[1], x.shape[1]), dtype=dtype)
    if xa is not None:
        rows = dy.shape[1] // len(enable_lora) * enabled
        db = dy.new_empty((rows, xa.shape[1] // enabled), dtype=dtype)
    return dx, da, db


class _LoRALinear(torch.autograd.Function):
    """Saves only what the wanted gradients read: x, the panel xa, the parameters, and one bit per element of x.

    unwatched: whether `direct` holds for all tensors.
    """

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
        unwatched: bool = False,
    ) -> Tensor:
        wants_dx, wants_dw, _, wants_da, wants_db = ctx.needs_input_grad[:5]
        tensors, rest = (x, weight, bias, lora_A, lora_B), (scaling, dropout_p, row_offset, column_offset, backend)
        if unwatched:
            y, xa, bits = _compute(False, *tensors, enable_lora, seed, *rest)
        else:
            y, xa, bits = torch.ops.fused_lora.lora_linear_forward(*tensors, enable_lora, seed, *rest)
        wants_dyb = wants_dx or wants_da
        drops = seed is not None and dropout_threshold(dropout_p) > 0
        ctx.save_for_backward(
            x if wants_da or wants_dw else None,
            weight if wants_dx else None,
            lora_A if wants_dx else None,
            lora_B if wants_dyb else None,
            xa if wants_db else None,
            bits if wants_dyb and drops else None,
        )
        ctx.arguments = enable_lora, scaling, dropout_p, lora_A.dtype, backend
        ctx.set_materialize_grads(False)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        others = (None,) * (len(ctx.needs_input_grad) - 5)
        if dy is None:
            return (None,) * 5 + others
        saved = x, weight, lora_A, lora_B, xa, bits = ctx.saved_tensors
        wants_dx, wants_dw, wants_dbias, wants_da, wants_db = ctx.needs_input_grad[:5]
        dx, dw, dbias, da, db = None, None, None, None, None
        if wants_dx or wants_da or wants_db:
            watched = not direct(dy, *saved)
            backward = torch.ops.fused_lora.lora_linear_backward if watched else _gradients
            wanted_x = x if wants_da else None
            dx, da, db = backward(dy, wanted_x, weight, lora_A, lora_B, xa, bits, *ctx.arguments)
        if wants_dw:
            dw = dy.T @ x
        if wants_dbias:
            dbias = dy.sum(0)
        return dx if wants_dx else None, dw, dbias, da if wants_da else None, db if wants_db else None, *others


_apply = direct_apply(_LoRALinear)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, *rest: Any) -> Tensor:
    """The op of the same name, or what it would do, called directly; x is two-dimensional."""
    tensors, seed = (x, weight, bias, lora_A, lora_B), rest[1]
    if not direct(*tensors, seed) or autocasts(x):
        return torch.ops.fused_lora.lora_linear(*tensors, *rest)  # type: ignore[no-any-return]
    if differentiates(*tensors):
        return _apply(*tensors, *rest, True)  # type: ignore[no-any-return]
    return _inference(*tensors, *rest)


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
register(f"lora_linear_forward({_FORWARD_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _forward, _fake_forward)
register(f"lora_linear_backward({_BACKWARD_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _backward, _fake_backward)
make_differentiable("lora_linear", _LoRALinear)
for _device_type in ("cpu", "cuda"):
    lib.impl("lora_linear", _autocast(_device_type), f"Autocast{_device_type.upper()}")
