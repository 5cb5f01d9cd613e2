"""The same functions as reference.py, computed by the Triton kernels on their tensors' device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .kernels import adapter_grad, fused_linear, low_rank_update, panel
from .reference import Dropout


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: Dropout | None,
    enable_lora: Sequence[bool] = (True,),
) -> tuple[Tensor, Tensor]:
    """y [M, N] and its panel xa [M, R], both in x.dtype."""
    with _on(x):
        xa = panel.panel(x, lora_A.T, scaling, dropout)
        return fused_linear.forward(x, weight, bias, xa, lora_B, enable_lora), xa


def grad_panels(
    dy: Tensor,
    lora_B: Tensor | None,
    xa: Tensor | None,
    *,
    scaling: float,
    dtype: torch.dtype,
    enable_lora: Sequence[bool] = (True,),
) -> tuple[Tensor | None, Tensor | None]:
    """dyb [M, R] in dy.dtype where lora_B is given, db [N, R] in `dtype` where xa is."""
    with _on(dy):
        return adapter_grad.grad_panels(dy, lora_B, xa, scaling, dtype, enable_lora)


def grad_input(dy: Tensor, weight: Tensor, dyb: Tensor, lora_A: Tensor, *, dropout: Dropout | None) -> Tensor:
    """dx [M, K] in dy.dtype."""
    with _on(dy):
        return fused_linear.grad_input(dy, weight, dyb, lora_A, dropout)


def grad_lora_A(dyb: Tensor, x: Tensor, *, dropout: Dropout | None, dtype: torch.dtype) -> Tensor:
    """da [R, K] in `dtype`."""
    with _on(x):
        return adapter_grad.grad_lora_A(dyb, x, dropout, dtype)


def effective_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float) -> Tensor:
    """weight + scaling * lora_B @ lora_A, [N, K], summed in float32 and rounded once to weight.dtype."""
    with _on(weight):
        return low_rank_update.effective_weight(weight, lora_A, lora_B, scaling)


def embedding(
    indices: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """y [M, D] and its panel xa [M, R], both in weight.dtype."""
    with _on(weight):
        return low_rank_update.embedding(indices, weight, lora_A, lora_B, scaling)
