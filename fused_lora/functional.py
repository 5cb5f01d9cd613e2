"""The public functions of LoRA layers: argument checks, flattening and the dropout seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import embedding_op, linear_op, repeat, weight_op
from .base import as_number
from .dispatch import BATCH_INVARIANT, autocasts, requested_backend
from .ops import differentiates

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
    enable_lora: Sequence[bool] = (True,),
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
    enable_lora: which of the len(enable_lora) equal slices of the output features have an adapter. With n of them,
        lora_A is (n * r, in_features) and lora_B (n * out_features / len(enable_lora), r), slice after slice; the i-th
        enabled slice gains scaling * dropout(x) @ lora_A_i.T @ lora_B_i.T.
    Returns (..., out_features) in x's dtype. Under autocast, x, weight and bias are cast as nn.Linear would.

    Raises ValueError or TypeError, naming the argument, for anything else.
    The definition is that of Hu et al. 2021 (arXiv:2106.09685) and of loralib's Linear and MergedLinear.
    """
    drops, trains = training and 0.0 < dropout_p < 1.0, differentiates(x, weight, bias, lora_A, lora_B)
    key, backend = None, requested_backend()
    if not isinstance(seed, Tensor) and (trains or not drops):
        numbers, flags = (scaling, dropout_p, row_offset, column_offset), (training, fan_in_fan_out, *enable_lora)
        key = repeat.key_of(x, weight, bias, lora_A, lora_B, backend, trains, numbers, flags)
        again = repeat.call_of(key)
        if again is not None:
            given = x, weight, bias, lora_A, lora_B
            return again(*given, _seed_tensor(seed, x.device)) if drops else again(*given)
    if fan_in_fan_out and weight.dim() == 2:
        weight = weight.T
    slices = [bool(enabled) for enabled in enable_lora]
    _check(x, weight, lora_A, lora_B, bias, scaling, dropout_p, row_offset, column_offset, slices)
    if lora_A.shape[0] == 0:
        if backend != BATCH_INVARIANT:
            return F.linear(x, weight, bias)
        # Whatever columns and slices are named, there is no adapter to be read.
        lora_B, slices = weight.new_empty(weight.shape[0], 0, dtype=lora_A.dtype), [True]
    if not training:
        dropout_p = 0.0
    elif dropout_p == 1.0:
        # As nn.Dropout(1): the term is zero and so are its gradients, instead of missing ones.
        scaling, dropout_p = 0.0, 0.0
    rest = float(scaling), float(dropout_p), row_offset, column_offset, backend
    drawn = None if dropout_p == 0 else _seed_tensor(seed, x.device)
    if key is None or not trains:
        y = linear_op.lora_linear(x, weight, bias, lora_A, lora_B, slices, drawn, *rest)
        repeat.remember(key, x, weight, bias, lora_A, lora_B, scaling, slices, backend)
        return y
    keep = repeat.keeper(key, fan_in_fan_out, slices, rest)
    return linear_op.lora_linear(x, weight, bias, lora_A, lora_B, slices, drawn, *rest, keep=keep)


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear as `lora_linear` computes it within batch_invariant(); shapes and errors are those."""
    lora_A, lora_B = weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0)
    return lora_linear(x, weight, lora_A, lora_B, bias=bias)


def lora_embedding(
    indices: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """y = weight[indices] + scaling * lora_A.T[indices] @ lora_B.T, differentiable once.

    indices: int32 or int64, any shape. weight: (num_embeddings, embedding_dim), floating point. lora_A:
        (r, num_embeddings). lora_B: (embedding_dim, r). Both in weight's dtype, or both float32 beside a bfloat16 or
        float16 weight.
    scaling: the factor of the LoRA term (loralib: lora_alpha / r).
    padding_idx: the index whose row of weight and column of lora_A get no gradient.
    scale_grad_by_freq: divide the gradients of weight and lora_A by how often an index occurs, as F.embedding does.
    sparse: weight's gradient is a sparse tensor, as F.embedding's. lora_A's is dense in any case, since torch has no
        layout for a matrix that is sparse by columns.
    Returns (*indices.shape, embedding_dim) in weight's dtype, also under autocast, as F.embedding does.

    Raises ValueError or TypeError, naming the argument, and IndexError for an index out of range (on a GPU, a
    device-side assertion). The definition is that of loralib.Embedding.
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices is {indices.dtype}; expected torch.int32 or torch.int64.")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}; expected floating-point numbers of shape "
            "(num_embeddings, embedding_dim)."
        )
    num_embeddings, embedding_dim = weight.shape
    _check_factors(weight, lora_A, lora_B, (num_embeddings, embedding_dim))
    if indices.device != weight.device:
        raise ValueError(f"indices is on {indices.device}; expected {weight.device}, where weight is.")
    if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(f"padding_idx is {padding_idx}; expected an index into {num_embeddings} embeddings.")
    _check_scaling(scaling)
    if lora_A.shape[0] == 0:
        return F.embedding(indices, weight, padding_idx, None, 2.0, scale_grad_by_freq, sparse)
    padding = -1 if padding_idx is None else padding_idx % num_embeddings
    one_dimensional = indices.dim() == 1 and indices.is_contiguous()
    y = embedding_op.lora_embedding(
        indices if one_dimensional else indices.reshape(-1).contiguous(),
        weight,
        lora_A,
        lora_B,
        float(scaling),
        padding,
        scale_grad_by_freq,
        sparse,
        requested_backend(),
    )
    return y if one_dimensional else y.view(*indices.shape, embedding_dim)


def effective_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float = 1.0) -> Tensor:
    """weight + scaling * (lora_B @ lora_A).view(weight.shape), summed in float32, rounded once; differentiable once.

    weight: (out, in), any strides, or a convolution's of more dimensions, whose first and later ones are split so that
        lora_B (rows, r) and lora_A (r, columns) have rows * columns elements in weight's order.
    lora_A, lora_B: in weight's dtype, or both float32 beside a bfloat16 or float16 weight.
    scaling: the factor of the LoRA term (loralib: lora_alpha / r).
    Returns a new tensor of weight's shape and dtype, also if r is 0. Nothing else of its size is made on a GPU.

    Raises ValueError or TypeError, naming the argument. The definition is that of loralib's layers.
    """
    backend = requested_backend()
    key = repeat.weight_key_of(weight, lora_A, lora_B, scaling, backend)
    again = repeat.call_of(key)
    if again is not None:
        return weight_op.computed(again, weight, lora_A, lora_B, scaling, "")
    if not weight.is_floating_point():
        raise TypeError(f"weight is {weight.dtype}; expected a floating-point dtype.")
    size_A, size_B = lora_A.shape, lora_B.shape
    rows, columns = size_B[0] if size_B else 0, size_A[-1] if size_A else 0
    if weight.shape != (rows, columns) and (weight.dim() == 2 or rows * columns != weight.numel()):
        raise ValueError(
            f"lora_B has shape {tuple(size_B)} and lora_A {tuple(size_A)}; expected (rows, r) and "
            f"(r, columns) of which rows times columns fill the weight's shape {tuple(weight.shape)}."
        )
    _check_factors(weight, lora_A, lora_B, (columns, rows))
    _check_scaling(scaling)
    effective = weight_op.lora_effective_weight(weight, lora_A, lora_B, float(scaling), backend)
    repeat.remember_weight(key, weight, lora_A, lora_B, scaling, backend)
    return effective


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
    # The reference broadcasts it against rows and columns.
    return seed.reshape(1)


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
    enable_lora: Sequence[bool],
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; expected a floating-point dtype.")
    if x.layout is not torch.strided:
        raise TypeError(f"x has layout {x.layout}; expected a strided tensor.")
    if x.dim() == 0:
        raise ValueError("x has no dimensions; expected (..., in_features).")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (out_features, in_features).")
    out_features, in_features = weight.shape
    size_A, size_B = lora_A.shape, lora_B.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., {in_features}) to go with the weight.")
    slices, enabled = len(enable_lora), sum(enable_lora)
    if slices == 0 or out_features % slices != 0:
        raise ValueError(f"enable_lora has length {slices}; expected a divisor of the {out_features} output features.")
    if len(size_A) != 2 or size_A[1] != in_features:
        raise ValueError(f"lora_A has shape {tuple(size_A)}; expected (r, {in_features}) to go with the weight.")
    rows = out_features // slices * enabled
    if len(size_B) != 2 or size_B[0] != rows:
        raise ValueError(f"lora_B has shape {tuple(size_B)}; expected ({rows}, r) to go with the weight.")
    if size_A[0] != size_B[1] * enabled:
        raise ValueError(
            f"lora_B has shape {tuple(size_B)}; expected ({rows}, {size_A[0] / max(1, enabled):g}), "
            "the rank of lora_A in each enabled slice."
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({out_features},) to go with the weight.")
    device = x.device
    if not (weight.device == lora_A.device == lora_B.device == device) or (bias is not None and bias.device != device):
        _raise_elsewhere("x", device, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias)
    if not autocasts(x):
        _check_dtypes(x.dtype, weight, lora_A, lora_B, bias)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; expected a probability in [0, 1].")
    _check_scaling(scaling)
    if type(row_offset) is not int or type(column_offset) is not int:
        for name, offset in (("row_offset", row_offset), ("column_offset", column_offset)):
            if not isinstance(offset, int | torch.SymInt):
                raise TypeError(f"{name} is {offset!r}; expected an int.")
    if row_offset < 0:
        raise ValueError(f"row_offset is {row_offset}; expected 0 or more.")
    if not 0 <= column_offset <= _MOST_COLUMNS - in_features:
        raise ValueError(f"column_offset is {column_offset}; expected columns from 0 up to 2**35 - 1.")


def _check_dtypes(dtype: torch.dtype, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        name, tensor = ("weight", weight) if bias is None or weight.dtype != dtype else ("bias", bias)
        raise TypeError(f"{name} is {tensor.dtype}; expected {dtype}, as x, outside autocast.")
    _check_adapter_dtypes("x", dtype, lora_A, lora_B)


def _check_adapter_dtypes(beside: str, dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor) -> None:
    adapter_dtype = lora_A.dtype
    if adapter_dtype != dtype:
        allowed = (dtype, torch.float32) if dtype in (torch.bfloat16, torch.float16) else (dtype,)
        if adapter_dtype not in allowed:
            raise TypeError(
                f"lora_A is {adapter_dtype}; expected {' or '.join(map(str, allowed))} to go with {beside}."
            )
    if lora_B.dtype != adapter_dtype:
        raise TypeError(f"lora_B is {lora_B.dtype}; expected {adapter_dtype}, as lora_A.")


def _check_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor, sizes: tuple[int, int]) -> None:
    columns, rows = sizes
    size_A, size_B = lora_A.shape, lora_B.shape
    if len(size_A) != 2 or size_A[1] != columns:
        raise ValueError(f"lora_A has shape {tuple(size_A)}; expected (r, {columns}) to go with the weight.")
    if size_B != (rows, size_A[0]):
        raise ValueError(
            f"lora_B has shape {tuple(size_B)}; expected ({rows}, {size_A[0]}) to go with the weight and lora_A."
        )
    if not lora_A.device == lora_B.device == weight.device:
        _raise_elsewhere("weight", weight.device, lora_A=lora_A, lora_B=lora_B)
    _check_adapter_dtypes("weight", weight.dtype, lora_A, lora_B)


def _raise_elsewhere(beside: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, where {beside} is.")


def _check_scaling(scaling: float) -> None:
    number = scaling
    if type(scaling) is not float:
        if isinstance(scaling, Tensor) and scaling.requires_grad:
            raise TypeError("scaling is a Tensor that requires a gradient; expected a number.")
        number = as_number(scaling)
    # Of a scaling that varies, dynamo can trace comparisons, but not math.isfinite.
    if not -math.inf < number < math.inf:
        raise ValueError(f"scaling is {scaling!r}; expected a finite number.")
