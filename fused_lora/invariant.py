"""The same forward as reference.py, such that a row's bits do not depend on the other rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import choose
from .reference import Dropout


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N] and its panel xa [M, R], both in x.dtype, and no bits.

    Raises RuntimeError if there is a mask to apply.
    """
    if dropout is not None:
        raise RuntimeError("lora_dropout is in force within batch_invariant(); expected a layer in eval mode.")
    if choose("auto", x.device, x.dtype, lora_A.dtype).path == "triton":
        from . import decoding

        options: dict[str, Any] = {"dropout": None, "enable_lora": enable_lora, "tiles_for_rows": 1}
        return decoding.forward(x, weight, bias, lora_A, lora_B, scaling=scaling, **options)
    y, xa = x.new_empty((len(x), len(weight))), x.new_empty((len(x), len(lora_A)))
    for m in range(len(x)):
        # A copy starts at an aligned address, on which a CPU's GEMM may depend.
        row = x[m : m + 1].clone(memory_format=torch.contiguous_format)
        y[m : m + 1], xa[m : m + 1], _ = reference.forward(
            row, weight, bias, lora_A, lora_B, scaling=scaling, dropout=None, enable_lora=enable_lora
        )
    return y, xa, None
