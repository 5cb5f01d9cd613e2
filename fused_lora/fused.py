"""The same functions as reference.py, computed by the Triton kernels on their tensors' device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .kernels import (
    adapter_grad,
    first_wave,
    fused_linear,
    low_rank_update,
    mask,
    own_panel,
    panel,
    split_panel,
    token_grad,
)
from .kernels.config import overlaps, scaled
from .kernels.few_rows_grad import few_rows_grad
from .kernels.lookup import tiles_for
from .kernels.narrow import narrow
from .kernels.replay import Keep, Results, replayed
from .reference import Dropout, in_dtype, product
from .reference import embedding_grad_lora_A as sorted_grad_lora_A

# For more ranks of all slices together cuBLAS makes a panel in less time than panel.py, and with a mask `drawn_panel`
# does.
_FEW_RANKS, _FEW_MASKED_RANKS = 32, 64
# For more of those, and more numbers to be read, cuBLAS takes a few microseconds less for a panel alone.
_FEW_READ = 1 << 24
# For at most so many rows of many ranks, one launch for both of an adapter's gradients takes less time than several
# beside dx's GEMM.
_FEW_ROWS, _FEW_MASKED_ROWS = 2048, 1024
_HERE: AbstractContextManager[object] = nullcontext()


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch._C._cuda_getDevice():
        return _HERE
    return torch.cuda.device(tensor.device)


def repeated(
    given: Sequence[Tensor | None],
    facts: tuple[Hashable, ...],
    call: Callable[[], Results],
    keep: Keep | None = None,
) -> Results:
    """call's results, without the way to them where it was called before for the same facts and kinds of tensors.

    See `replayed`; what is given first is there.
    """
    like = given[0]
    assert like is not None
    with on(like):
        return replayed(given, facts, call, keep)


def _narrowed(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B, in x's dtype where the copy engine reads them, which converts nothing, else as they are."""
    if lora_A.dtype == x.dtype or min(lora_A.numel(), lora_B.numel()) == 0:
        return lora_A, lora_B
    reads = tiles_for(x.device, x.dtype, *weight.shape).linear.descriptors
    return narrow(lora_A, lora_B, x.dtype) if reads else (lora_A, lora_B)


def undrawn_panel(left: Tensor, factor: Tensor, scale: float, alike: Tensor | None = None) -> Tensor:
    """scale * left @ factor in left's dtype; alike: see `product`.

    By cuBLAS where the copy engine cannot read them, or it saves more of the GPU's time than it costs of the host's.
    """
    factor = in_dtype(factor, left.dtype)
    large = factor.shape[1] > _FEW_MASKED_RANKS and left.numel() > _FEW_READ
    if not large and split_panel.takes(left, factor):
        return split_panel.split_panel(left, factor, scale)[0]
    return product(left, factor, scale, alike)


def drawn_panel(left: Tensor, factor: Tensor, scale: float, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """scale / q * (keep * left) @ factor in left's dtype, and the bits of the mask; see `undrawn_panel`."""
    factor = in_dtype(factor, left.dtype)
    if split_panel.takes(left, factor, dropout):
        panel, bits = split_panel.split_panel(left, factor, scale, dropout)
        assert bits is not None
        return panel, bits
    dropped, bits = mask.drop(left, dropout)
    return undrawn_panel(dropped, factor, scale / dropout.keep_probability), bits


def _regular(x: Tensor, dropout: Dropout) -> bool:
    """Whether the copy engine reads such an x and mask, if the rows are aligned; if not, panel.py lacks registers."""
    regular = x.shape[1] % 16 == 0 and dropout.column_offset % 8 == 0
    return regular and tiles_for(x.device, x.dtype, x.shape[1]).linear.descriptors


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [M, N] and its panel xa [M, R], both in x.dtype, and the bits of the mask."""
    with on(x):
        if dropout is None:
            tile = own_panel.tile_of(x.device, x.dtype, x.shape[0], x.shape[1], len(weight))
            if tile is not None and own_panel.takes(x, weight, lora_A):
                return *own_panel.forward(x, weight, bias, lora_A, lora_B, scaling, tile, enable_lora), None
        lora_A, lora_B = _narrowed(x, weight, lora_A, lora_B)
        if dropout is None and first_wave.takes(x, weight, lora_A):
            return *first_wave.forward(x, weight, bias, lora_A, lora_B, scaling, enable_lora), None
        ranks, half = len(lora_A), x.dtype.itemsize == 2
        if dropout is None and half and (ranks > _FEW_RANKS or split_panel.takes(x, lora_A.t())):
            xa, bits = undrawn_panel(x, lora_A.t(), scaling), None
        elif dropout is not None and half and (ranks > _FEW_MASKED_RANKS or _regular(x, dropout)):
            xa, bits = drawn_panel(x, lora_A.t(), scaling, dropout)
        else:
            xa, bits = panel.panel(x, lora_A.T, scaling, dropout)
        return fused_linear.forward(x, weight, bias, xa, lora_B, enable_lora), xa, bits


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
    with on(dy):
        return adapter_grad.grad_panels(dy, lora_B, xa, scaling, dtype, enable_lora)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    xa: Tensor | None,
    *,
    bits: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    enable_lora: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx where weight, lora_A and lora_B are given, da where x and lora_B are, db where xa is; scaling includes 1/q."""
    many = lora_B is not None and lora_B.shape[1] > adapter_grad.FUSED_RANK
    dyb_alone = many and len(enable_lora) == 1 and dy.dtype.itemsize == 2
    in_one_launch = dyb_alone and len(dy) <= scaled(_FEW_ROWS if bits is None else _FEW_MASKED_ROWS, dy.device)
    # A db that needs a read of dy by itself can wait until dx's GEMM runs.
    early_xa, later_xa = (None, xa) if many else (xa, None)
    overlapping = overlaps(dy.device)
    dx = dyb = db = None
    with on(dy):
        if weight is not None and lora_A is not None and lora_B is not None:
            lora_A, lora_B = _narrowed(dy, weight, lora_A, lora_B)
        if lora_B is not None and dyb_alone:
            dyb = undrawn_panel(dy, lora_B, scaling, xa)
        else:
            dyb, db = adapter_grad.grad_panels(dy, lora_B, early_xa, scaling, dtype, enable_lora, overlaps=overlapping)
        # An empty dx is not launched.
        launches_dx = not (dyb is None or weight is None or lora_A is None) and dy.numel() * weight.numel() > 0
        beside = overlapping and launches_dx and not in_one_launch and not (x is None and later_xa is None)
        grads = None
        if not in_one_launch:
            grads = adapter_grad.prepared_grads(dy, later_xa, dyb, x, bits, dtype, enable_lora, beside=beside)
        if dyb is not None and weight is not None and lora_A is not None:
            dx = fused_linear.grad_input(dy, weight, dyb, lora_A, bits, followed=beside)
        if grads is None:
            assert dyb is not None
            return dx, *few_rows_grad(dy, dyb, x, xa, bits, dtype)
        da, later_db = grads()
    return dx, da, later_db if many else db


def effective_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float) -> Tensor:
    """weight + scaling * lora_B @ lora_A, summed in float32 and rounded once to weight.dtype.

    weight is [N, K], or contiguous with other dimensions, which the result has too.
    """
    with on(weight):
        return low_rank_update.effective_weight(weight, lora_A, lora_B, scaling)


def embedding(
    indices: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """y [M, D] and its panel xa [M, R], both in weight.dtype."""
    with on(weight):
        return low_rank_update.embedding(indices, weight, lora_A, lora_B, scaling)


def embedding_grad_lora_A(
    dyb: Tensor, indices: Tensor, num_embeddings: int, padding_idx: int, scale_grad_by_freq: bool, dtype: torch.dtype
) -> Tensor:
    """da [R, num_embeddings] in `dtype` of the panel dyb [M, R] and tokens [M]; padding_idx -1 is none."""
    given = dyb, indices, num_embeddings, padding_idx, scale_grad_by_freq, dtype
    if not token_grad.takes(dyb, num_embeddings):
        return sorted_grad_lora_A(*given)
    with on(dyb):
        return token_grad.grad_lora_A(*given)
