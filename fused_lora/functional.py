"""The public function of a LoRA linear layer: argument checks, flattening and the dropout seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops  # noqa: F401  (registers the op)
from .dispatch import autocast_dtype, requested_backend

# A mask's counter holds column // 8 in 32 bits.
_MOST_COLUMNS = 2**35


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    column_offset: int = 0,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """y = x @ weight.T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias, differentiable once.

    x: (..., in_features), floating point, any strides, any number of leading dimensions (also none, also of size 0).
    weight: (out_features, in_features), or transposed if fan_in_fan_out. bias: (out_features,). Both in x's dtype.
    lora_A: (r, in_features). lora_B: (out_features, r). Both in x's dtype, or both float32 beside a bfloat16 or
        float16 x: they are then rounded to x's dtype inside the products and receive float32 gradients.
    scaling: the factor of the LoRA term (loralib: lora_alpha / r).
    dropout_p: probability in [0, 1] of dropping an element of the LoRA term's input; used only if training. It is
        realised in steps of 1/65536. 1 switches the LoRA term off.
    seed: int64 of one element on x's device, or an int, that fixes the dropout mask; None draws one from torch's
        default generator of x's device. The mask is a pure function of (seed, row, column); see reference.Dropout.
    row_offset, column_offset: global position of x's first row (leading dimensions flattened) and column in the
        mask, for shards of a larger x.
    Returns (..., out_features) in x's dtype. Under autocast, x, weight and bias are cast as nn.Linear would.

    Raises ValueError or TypeError, naming the argument, for anything else.
    The definition is that of Hu et al. 2021 (arXiv:2106.09685) and of loralib.Linear.
    """
    if fan_in_fan_out and weight.dim() == 2:
        weight = weight.T
    _check(x, weight, lora_A, lora_B, bias, scaling, dropout_p, row_offset, column_offset)
    if lora_A.shape[0] == 0:
        return F.linear(x, weight, bias)
    if not training:
        dropout_p = 0.0
    elif dropout_p == 1.0:
        # As nn.Dropout(1): the term is zero and so are its gradients, instead of missing ones.
        scaling, dropout_p = 0.0, 0.0
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    y: Tensor = torch.ops.fused_lora.lora_linear(
        rows,
        weight,
        bias,
        lora_A,
        lora_B,
        _seed_tensor(seed, x.device) if dropout_p > 0 else None,
        float(scaling),
        float(dropout_p),
        row_offset,
        column_offset,
        requested_backend(),
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _seed_tensor(seed: Tensor | int | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), device=device)
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed is {seed}; expected a number that fits in 64 signed bits.")
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"seed is {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}; expected one int64 on {device}."
        )
    return seed


def _check(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    row_offset: int,
    column_offset: int,
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; expected a floating-point dtype.")
    if x.dim() == 0:
        raise ValueError("x has no dimensions; expected (..., in_features).")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (out_features, in_features).")
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., {in_features}) to go with the weight.")
    if lora_A.dim() != 2 or lora_A.shape[1] != in_features:
        raise ValueError(f"lora_A has shape {tuple(lora_A.shape)}; expected (r, {in_features}) to go with the weight.")
    if lora_B.dim() != 2 or lora_B.shape[0] != out_features:
        raise ValueError(f"lora_B has shape {tuple(lora_B.shape)}; expected ({out_features}, r) to go with the weight.")
    if lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"lora_B has shape {tuple(lora_B.shape)}; expected ({out_features}, {lora_A.shape[0]}), the rank of lora_A."
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({out_features},) to go with the weight.")
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, where x is.")
    if autocast_dtype(x.device.type) is None:
        _check_dtypes(x.dtype, weight, lora_A, lora_B, bias)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; expected a probability in [0, 1].")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling is {scaling}; expected a finite number.")
    if row_offset < 0:
        raise ValueError(f"row_offset is {row_offset}; expected 0 or more.")
    if not 0 <= column_offset <= _MOST_COLUMNS - in_features:
        raise ValueError(f"column_offset is {column_offset}; expected columns from 0 up to 2**35 - 1.")


def _check_dtypes(dtype: torch.dtype, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {dtype}, as x, outside autocast.")
    allowed = (dtype, torch.float32) if dtype in (torch.bfloat16, torch.float16) else (dtype,)
    if lora_A.dtype not in allowed:
        raise TypeError(f"lora_A is {lora_A.dtype}; expected {' or '.join(map(str, allowed))} to go with x.")
    if lora_B.dtype != lora_A.dtype:
        raise TypeError(f"lora_B is {lora_B.dtype}; expected {lora_A.dtype}, as lora_A.")
