"""The LoRA linear layer's ops: implementations, fakes, autocast, autograd and what it saves.

`fused_lora::lora_linear` is the one that graphs, export and users see. MergedLinear is the same op: enable_lora names
the slices of the output that have an adapter, and a plain layer is one slice.

Two-dimensional but for what comes directly: x [M, K], weight [N, K], lora_A [R, K], lora_B [N, R], dy [M, N]; see
reference.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dispatch import BATCH_INVARIANT, autocasts, counted
from .linear_choice import choose_backward, choose_forward
from .ops import (
    differentiates,
    direct,
    direct_apply,
    direct_gradients,
    here,
    lib,
    make_differentiable,
    module_of,
    once_differentiable,
    register,
    repeated,
)
from .reference import Dropout, dropout_threshold

if TYPE_CHECKING:
    from .kernels.replay import Keep, Program

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
# Of one kind of forward: gradients that lie otherwise than y come in few ways.
_MOST_BACKWARDS = 4

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
    keep: Keep | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, its panel xa, and the mask's bits where there is dropout; keep: see `replay.replayed`."""
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
    return repeated(choice, (x, weight, bias, lora_A, lora_B, seed), facts, call, keep)


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
    keep: Keep | None = None,
) -> Gradients:
    """dx where weight, lora_A and lora_B are given, da where x and lora_B are, db where xa is."""
    if bits is not None:
        scaling /= 1 - dropout_threshold(dropout_p) / 65536
    if backend == BATCH_INVARIANT:
        # No path's gradients are; this one takes a rank of 0 too.
        backend = "reference"
    read = weight if x is None else x
    features = () if read is None else read.shape[1:]
    plain = weight is not None and lora_A is not None and lora_B is not None and len(enable_lora) == 1
    ranks = 0 if lora_B is None else sum(enable_lora) * lora_B.shape[1]
    choice = choose_backward(backend, dy.device, dy.dtype, dtype, *dy.shape, *features, plain=plain, ranks=ranks)
    module = module_of("backward", choice)

    def call() -> Gradients:
        return module.backward(  # type: ignore[no-any-return]
            dy, x, weight, lora_A, lora_B, xa, bits=bits, scaling=scaling, dtype=dtype, enable_lora=enable_lora
        )

    facts = "backward", choice.path, scaling, dtype, *enable_lora
    return repeated(choice, (dy, x, weight, lora_A, lora_B, xa, bits), facts, call, keep)


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


@dataclass(eq=False, slots=True)
class Known:
    """How a layer is computed where `direct` holds for its tensors: a forward that was recorded, and its backwards.

    The latter by the kinds of what they are given. Without a recording nothing is known but that.
    """

    forward: Program | None = None
    backwards: dict[Hashable, Program] = field(default_factory=dict)

    def gradients(self, given: tuple[Tensor | None, ...], arguments: tuple[Any, ...]) -> Gradients:
        """`_gradients` of the tensors that it is given and its other arguments."""
        dy = given[0]
        assert dy is not None
        if self.forward is None or counted() or not here(dy):
            return _gradients(*given, *arguments)  # type: ignore[arg-type]
        from .kernels.replay import kinds_of, repeats

        kinds = kinds_of(given)
        program = self.backwards.get(kinds)
        if program is not None and repeats(dy):
            return program(given)  # type: ignore[return-value]

        def keep(program: Program) -> None:
            if len(self.backwards) < _MOST_BACKWARDS:
                self.backwards[kinds] = program

        return _gradients(*given, *arguments, keep=keep)  # type: ignore[arg-type, misc]


class _LoRALinear(torch.autograd.Function):
    """Saves only what the wanted gradients read: x, the panel xa, the parameters, and one bit per element of x.

    x may have other dimensions where `known` is given, as it is if `direct` holds for all tensors.
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
        known: Known | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        wants_dx, wants_dw, _, wants_da, wants_db = ctx.needs_input_grad[:5]
        rows = x if x.dim() == 2 else x.flatten(0, -2)
        tensors, rest = (rows, weight, bias, lora_A, lora_B), (scaling, dropout_p, row_offset, column_offset, backend)
        if known is None:
            y, xa, bits = torch.ops.fused_lora.lora_linear_forward(*tensors, enable_lora, seed, *rest)
        elif known.forward is None:
            y, xa, bits = _compute(False, *tensors, enable_lora, seed, *rest, keep)
        else:
            y, xa, bits = known.forward((*tensors, seed))
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
        ctx.arguments, ctx.known, ctx.shape = (enable_lora, scaling, dropout_p, lora_A.dtype, backend), known, x.shape
        ctx.set_materialize_grads(False)
        # As a view it could not be written to.
        return y if rows is x else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        others = (None,) * (len(ctx.needs_input_grad) - 5)
        if dy is None:
            return (None,) * 5 + others
        saved = x, weight, lora_A, lora_B, xa, bits = ctx.saved_tensors
        wants_dx, wants_dw, wants_dbias, wants_da, wants_db = ctx.needs_input_grad[:5]
        dx, dw, dbias, da, db = None, None, None, None, None
        watched = ctx.known is None or not direct_gradients(dy, *saved)
        if len(ctx.shape) != 2:
            # Gradients that are batched cannot be flattened by that name.
            dy, x = dy.reshape(prod(dy.shape[:-1]), dy.shape[-1]), None if x is None else x.flatten(0, -2)
        if wants_dx or wants_da or wants_db:
            given = dy, x if wants_da else None, weight, lora_A, lora_B, xa, bits
            if watched:
                dx, da, db = torch.ops.fused_lora.lora_linear_backward(*given, *ctx.arguments)
            else:
                dx, da, db = ctx.known.gradients(given, ctx.arguments)
        if wants_dw:
            dw = dy.T @ x
        if wants_dbias:
            dbias = dy.sum(0)
        if wants_dx and dx is not None and len(ctx.shape) != 2:
            dx = dx.view(ctx.shape)
        return dx if wants_dx else None, dw, dbias, da if wants_da else None, db if wants_db else None, *others


_apply = direct_apply(_LoRALinear)
_UNKNOWN = Known()


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *rest: Any,
    keep: Keep | None = None,
) -> Tensor:
    """The op of the same name, or what it would do, called directly; x may have other dimensions than two.

    keep: is given the recording of a forward that is to be differentiated, once there is one; see `replay.replayed`.
    """
    tensors, seed = (weight, bias, lora_A, lora_B), rest[1]
    two_dimensional, unwatched = x.dim() == 2, direct(x, *tensors, seed) and not autocasts(x)
    differentiable = unwatched and differentiates(x, *tensors)
    if differentiable and (two_dimensional or (x.dim() > 2 and x.is_contiguous())):
        return _apply(x, *tensors, *rest, _UNKNOWN, keep)  # type: ignore[no-any-return]
    rows = x if two_dimensional else x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    if differentiable:
        y = _apply(rows, *tensors, *rest, _UNKNOWN)
    else:
        y = (_inference if unwatched else torch.ops.fused_lora.lora_linear)(rows, *tensors, *rest)
    return y if two_dimensional else y.view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def known_linear(known: Known, *arguments: Any) -> Tensor:
    """`lora_linear` of tensors to be differentiated, for which `direct` holds, by a forward that was recorded."""
    return _apply(*arguments, known)  # type: ignore[no-any-return]


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
