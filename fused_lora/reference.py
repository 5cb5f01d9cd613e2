"""LoRA in plain PyTorch: the mathematics and the dropout bits, on any device.

    x [M, K]   weight [N, K]   lora_A [R, K]   lora_B [N, R]   bias [N]   y [M, N]   keep [M, K]   q = 1 - p

    xa  = scaling * (keep * x / q) @ lora_A.T          [M, R]
    y   = x @ weight.T + xa @ lora_B.T + bias          [M, N]
    dyb = scaling / q * dy @ lora_B                    [M, R]
    dx  = dy @ weight + keep * (dyb @ lora_A)          [M, K]
    da  = dyb.T @ (keep * x)                           [R, K]
    db  = dy.T @ xa                                    [N, R]

MergedLinear cuts N into equal slices, of which `enable_lora` names those with an adapter. lora_A and both panels then
hold R rows or columns for each enabled slice, lora_B and db its N / slices rows, one slice after another; x, dx and da
see one adapter whose rank is their sum.

The panels `xa` and `dyb` carry `scaling` and 1/q already, which enter as the `alpha` of a GEMM, so that they act on
its accumulator and cost no rounding of their own. Of the mask, one bit per element is saved for backward. `lora_A` and
`lora_B` may be float32 beside a half-precision `x`: products then see them rounded to `x.dtype`, and their gradients
stay float32.

The LoRA update is that of Hu et al. 2021 (arXiv:2106.09685); the random bits are Philox-4x32 of Salmon et al. 2011
(doi:10.1145/2063384.2063405) with 7 rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = (1, 2, 4, 8, 16, 32, 64, 128)
_WORD = 0xFFFFFFFF
_ROUNDS = 7
_SCRATCH_BLOCKS = 1 << 18


@dataclass(frozen=True)
class Dropout:
    """Which elements of x are kept: a pure function of the seed's value and of an element's global row and column.

    seed: int64, one element, on x's device. threshold: 1 to 65535, in units of 1/65536 of probability to drop.
    row_offset, column_offset: global index of x[0, 0], for shards that draw their part of a larger mask.
    """

    seed: Tensor
    threshold: int
    row_offset: int = 0
    column_offset: int = 0

    @property
    def keep_probability(self) -> float:
        return 1 - self.threshold / 65536

    def mask(self, rows: int, columns: int) -> Tensor:
        """keep, bool [rows, columns]: True where the element survives."""
        first_block = self.column_offset // 8
        blocks = torch.arange(first_block, (self.column_offset + columns + 7) // 8, device=self.seed.device)
        keep = torch.empty((rows, columns), dtype=torch.bool, device=self.seed.device)
        skip = self.column_offset - 8 * first_block
        step = max(1, _SCRATCH_BLOCKS // max(1, blocks.numel()))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            row = torch.arange(self.row_offset + start, self.row_offset + stop, device=self.seed.device)
            lanes = _lanes(self.seed, row[:, None], blocks[None, :])
            keep[start:stop] = lanes.flatten(1)[:, skip : skip + columns] >= self.threshold
        return keep

    def bits(self, rows: int, columns: int) -> Tensor:
        """The same as saved for backward: uint8 [rows, ceil(columns / 8)]; bit j of byte i is column 8 * i + j."""
        blocks = (columns + 7) // 8
        whole_bytes = self.mask(rows, 8 * blocks).view(rows, blocks, 8)
        values = torch.tensor(_BITS, dtype=torch.uint8, device=whole_bytes.device)
        return (whole_bytes * values).sum(2, dtype=torch.uint8)


def dropout_threshold(p: float) -> int:
    """The number of 65536ths that dropout probability p in [0, 1) stands for; 0 keeps everything."""
    return min(round(p * 65536), 65535)


def _lanes(seed: Tensor, row: Tensor, block: Tensor) -> Tensor:
    """Eight uint16 numbers (as int64) for each row and block of eight columns: [rows, blocks, 8]."""
    words = philox(seed, (block, row & _WORD, (row >> 32) & _WORD, torch.zeros_like(block)))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(torch.broadcast_tensors(*halves), dim=-1)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-7 of four uint32 counter words under a 64-bit key; words are held in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        # The products pass 2**63 and wrap; both halves of their low 64 bits are right all the same.
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (high >> 32 & _WORD) ^ c1 ^ k0,
            high & _WORD,
            (low >> 32 & _WORD) ^ c3 ^ k1,
            low & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), without torch where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def product(left: Tensor, right: Tensor, factor: float, alike: Tensor | None = None) -> Tensor:
    """factor * left @ right, rounded once; alike: any tensor of its shape and dtype, if there is one, saves time."""
    # With beta=0 the first argument is not read.
    return torch.addmm(left.new_empty(1) if alike is None else alike, left, right, beta=0, alpha=factor)


def _kept(value: Tensor, bits: Tensor | None) -> Tensor:
    """keep * value, both [M, K], of the mask with these bits; value itself without."""
    if bits is None:
        return value
    values = torch.tensor(_BITS, dtype=torch.uint8, device=bits.device)
    keep = (bits[:, :, None] & values).flatten(1)[:, : value.shape[1]] != 0
    return torch.where(keep, value, 0.0)


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
    """y [M, N] and its panel xa [M, R], both in x.dtype, and the bits of the mask.

    Differentiable by plain autograd, as the tests' oracle is.
    """
    bits, inverse_q = (None, 1.0) if dropout is None else (dropout.bits(*x.shape), 1 / dropout.keep_probability)
    xa = product(_kept(x, bits), lora_A.to(x.dtype).T, scaling * inverse_q)
    base = torch.nn.functional.linear(x, weight, bias)
    adapters = zip(xa.tensor_split(sum(enable_lora), 1), lora_B.to(x.dtype).tensor_split(sum(enable_lora)), strict=True)
    slices = [
        _add_adapter(piece, *next(adapters)) if enabled else piece
        for piece, enabled in zip(base.tensor_split(len(enable_lora), 1), enable_lora, strict=True)
    ]
    return _joined(slices, 1), xa, bits


def _add_adapter(base: Tensor, panel: Tensor, lora_B: Tensor) -> Tensor:
    return torch.addmm(base, panel, lora_B.T)


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


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
    slices = [piece for piece, on in zip(dy.tensor_split(len(enable_lora), 1), enable_lora, strict=True) if on]
    dyb, db = None, None
    if lora_B is not None:
        factors = lora_B.to(dy.dtype).tensor_split(len(slices))
        dyb = _joined([product(piece, factor, scaling) for piece, factor in zip(slices, factors, strict=True)], 1)
    if xa is not None:
        panels = xa.to(dtype).tensor_split(len(slices), 1)
        db = _joined([piece.T.to(dtype) @ panel for piece, panel in zip(slices, panels, strict=True)], 0)
    return dyb, db


def grad_input(dy: Tensor, weight: Tensor, dyb: Tensor, lora_A: Tensor, *, bits: Tensor | None) -> Tensor:
    """dx [M, K] in dy.dtype."""
    if bits is None:
        return torch.addmm(dy @ weight, dyb, lora_A.to(dy.dtype))
    return dy @ weight + _kept(dyb @ lora_A.to(dy.dtype), bits)


def grad_lora_A(dyb: Tensor, x: Tensor, *, bits: Tensor | None, dtype: torch.dtype) -> Tensor:
    """da [R, K] in `dtype`."""
    return dyb.T.to(dtype) @ _kept(x, bits).to(dtype)


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
    dyb, db = grad_panels(dy, lora_B, xa, scaling=scaling, dtype=dtype, enable_lora=enable_lora)
    if dyb is None:
        return None, None, db
    dx = None if weight is None or lora_A is None else grad_input(dy, weight, dyb, lora_A, bits=bits)
    return dx, None if x is None else grad_lora_A(dyb, x, bits=bits, dtype=dtype), db


def effective_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float) -> Tensor:
    """weight + scaling * lora_B @ lora_A, summed in at least float32 and rounded once to weight.dtype.

    weight is [N, K], or contiguous with other dimensions, which the result has too.
    """
    if weight.dim() == 2:
        return _updated(weight, lora_B, lora_A, scaling)
    matrix = weight.view(lora_B.shape[0], lora_A.shape[1])
    return _updated(matrix, lora_B, lora_A, scaling).view(weight.shape)


def embedding(
    indices: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """Of tokens [M], weight [V, D], lora_A [R, V] and lora_B [D, R]: y [M, D] and its panel xa [M, R], weight.dtype.

    y = weight[indices] + xa @ lora_B.T, rounded once; xa = scaling * lora_A[:, indices].T. Differentiable, as forward.
    """
    gathered = torch.nn.functional.embedding(indices, lora_A.T)
    y = _updated(torch.nn.functional.embedding(indices, weight), gathered, lora_B.T, scaling)
    return y, (gathered * scaling).to(weight.dtype)


def embedding_grad_lora_A(
    dyb: Tensor, indices: Tensor, num_embeddings: int, padding_idx: int, scale_grad_by_freq: bool, dtype: torch.dtype
) -> Tensor:
    """da [R, num_embeddings] in `dtype` of the panel dyb [M, R] and tokens [M]; padding_idx -1 is none.

    torch's own scatter is dense and sorts by token instead of adding atomically. A token that occurs often is summed in
    float32 even on the CPU, where torch would add in dyb's dtype.
    """
    wide = in_dtype(dyb, torch.float32) if dyb.dtype.itemsize == 2 else dyb
    by_token = torch.ops.aten.embedding_dense_backward.default(
        wide, indices, num_embeddings, padding_idx, scale_grad_by_freq
    )
    return dyb.new_empty((dyb.shape[1], num_embeddings), dtype=dtype).copy_(by_token.t())


def _updated(base: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    return torch.addmm(base.to(wide), left.to(wide), right.to(wide), alpha=scaling).to(base.dtype)
