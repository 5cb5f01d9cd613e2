"""The LoRA embedding's ops: y = weight[indices] + scaling * lora_A[:, indices].T @ lora_B.T, and its gradients.

indices [M] contiguous, weight [V, D], lora_A [R, V], lora_B [D, R], y and dy [M, D]; see reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import choose
from .linear_choice import choose_linear
from .ops import (
    differentiates,
    direct,
    direct_apply,
    direct_gradients,
    make_differentiable,
    module_of,
    once_differentiable,
    register,
    repeated,
    without_autocast,
)

_ARGUMENTS = (
    "Tensor indices, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, SymInt padding_idx, "
    "bool scale_grad_by_freq, bool sparse, str backend"
)


def _forward(
    indices: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *options: Any
) -> tuple[Tensor, Tensor]:
    choice = choose(options[-1], weight.device, weight.dtype, lora_A.dtype)
    path = module_of("embedding", choice)

    def call() -> tuple[Tensor, Tensor]:
        return path.embedding(indices, weight, lora_A, lora_B, scaling=scaling)  # type: ignore[no-any-return]

    # F.embedding is not autocast either.
    with without_autocast(weight):
        return repeated(choice, (weight, indices, lora_A, lora_B), ("embedding", choice.path, scaling), call)


def _inference(*arguments: Any) -> Tensor:
    return _forward(*arguments)[0]


def _fake_inference(indices: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return weight.new_empty((indices.shape[0], weight.shape[1]))


def _fake_forward(indices: Tensor, weight: Tensor, lora_A: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _fake_inference(indices, weight), weight.new_empty((indices.shape[0], lora_A.shape[0]))


def _backward(
    dy: Tensor,
    indices: Tensor | None,
    lora_B: Tensor | None,
    xa: Tensor | None,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    scaling: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """da [R, V] where indices and lora_B are given, db [D, R] where xa is, both in `dtype`; or an empty tensor each."""
    choice = choose_linear(backend, dy.device, dy.dtype, dtype, *dy.shape)
    module = module_of("embedding_backward", choice)
    lookups = num_embeddings, padding_idx, scale_grad_by_freq

    def call() -> tuple[Tensor | None, Tensor | None]:
        dyb, db = module.grad_panels(dy, lora_B, xa, scaling=scaling, dtype=dtype)
        return None if dyb is None else module.embedding_grad_lora_A(dyb, indices, *lookups, dtype), db

    facts = ("embedding_backward", choice.path, *lookups, scaling, dtype)
    da, db = repeated(choice, (dy, indices, lora_B, xa), facts, call)
    return dy.new_empty(0) if da is None else da, dy.new_empty(0) if db is None else db


def _fake_backward(
    dy: Tensor, indices: Tensor | None, lora_B: Tensor | None, xa: Tensor | None, num_embeddings: int, *arguments: Any
) -> tuple[Tensor, Tensor]:
    dtype = arguments[-2]
    da = dy.new_empty(0) if lora_B is None else dy.new_empty((lora_B.shape[1], num_embeddings), dtype=dtype)
    return da, dy.new_empty(0) if xa is None else dy.new_empty((dy.shape[1], xa.shape[1]), dtype=dtype)


class _LoRAEmbedding(torch.autograd.Function):
    """Saves the indices, the panel xa and lora_B, as far as the wanted gradients read them.

    unwatched: whether `direct` holds for all tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        indices: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        padding_idx: int,
        scale_grad_by_freq: bool,
        sparse: bool,
        backend: str,
        unwatched: bool = False,
    ) -> Tensor:
        _, wants_dw, wants_da, wants_db = ctx.needs_input_grad[:4]
        forward = _forward if unwatched else torch.ops.fused_lora.lora_embedding_forward
        y, xa = forward(indices, weight, lora_A, lora_B, scaling, padding_idx, scale_grad_by_freq, sparse, backend)
        ctx.save_for_backward(
            indices if wants_da or wants_dw else None, lora_B if wants_da else None, xa if wants_db else None
        )
        ctx.lookup = weight.shape[0], padding_idx, scale_grad_by_freq
        ctx.sparse = sparse
        ctx.op_arguments = scaling, lora_A.dtype, backend
        ctx.set_materialize_grads(False)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        others = (None,) * (len(ctx.needs_input_grad) - 4)
        if dy is None:
            return (None,) * 4 + others
        indices, lora_B, xa = ctx.saved_tensors
        _, wants_dw, wants_da, wants_db = ctx.needs_input_grad[:4]
        dw = da = db = None
        if wants_da or wants_db:
            given = dy, indices if wants_da else None, lora_B, xa
            unwatched = direct_gradients(*given)
            gradients = _backward if unwatched else torch.ops.fused_lora.lora_embedding_backward
            da, db = gradients(*given, *ctx.lookup, *ctx.op_arguments)
        if wants_dw:
            dw = torch.ops.aten.embedding_backward(dy, indices, *ctx.lookup, ctx.sparse)
        return None, dw, da if wants_da else None, db if wants_db else None, *others


_apply = direct_apply(_LoRAEmbedding)


def lora_embedding(indices: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *rest: Any) -> Tensor:
    """The op of the same name, or what it would do, called directly; indices is one-dimensional and contiguous."""
    tensors = (indices, weight, lora_A, lora_B)
    if not direct(*tensors):
        return torch.ops.fused_lora.lora_embedding(*tensors, *rest)  # type: ignore[no-any-return]
    if differentiates(*tensors):
        return _apply(*tensors, *rest, True)  # type: ignore[no-any-return]
    return _inference(*tensors, *rest)  # type: ignore[no-any-return]


register(f"lora_embedding({_ARGUMENTS}) -> Tensor", _inference, _fake_inference)
register(f"lora_embedding_forward({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _fake_forward)
register(
    "lora_embedding_backward(Tensor dy, Tensor? indices, Tensor? lora_B, Tensor? xa, SymInt num_embeddings, "
    "SymInt padding_idx, bool scale_grad_by_freq, float scaling, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
make_differentiable("lora_embedding", _LoRAEmbedding)
