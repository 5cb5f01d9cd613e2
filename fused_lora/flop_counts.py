"""What torch's flop_counter is told of the ops: a product of (m, k) and (k, n) is 2 m k n FLOPs, and all else none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_Shape = tuple[int, ...]


def _linear(x: _Shape, weight: _Shape, bias: _Shape | None, lora_A: _Shape, lora_B: _Shape, *_: Any, **__: Any) -> int:
    """x [M, K], weight [N, K], lora_A [R, K], and lora_B [E, r] of the E outputs that have an adapter."""
    (M, K), (E, r) = x, lora_B
    return 2 * M * (weight[0] * K + lora_A[0] * K + E * r)


def _linear_backward(
    dy: _Shape,
    x: _Shape | None,
    weight: _Shape | None,
    lora_A: _Shape | None,
    lora_B: _Shape | None,
    xa: _Shape | None,
    bits: _Shape | None,
    enable_lora: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """The panel dyb, dx, lora_A's gradient and lora_B's, each where what it is made of is given."""
    (M, N), enabled = dy, sum(enable_lora)
    products = 0
    if lora_B is not None:
        products += lora_B[0] * lora_B[1]
    if weight is not None and lora_A is not None:
        products += weight[1] * (N + lora_A[0])
    if x is not None and lora_B is not None:
        products += x[1] * enabled * lora_B[1]
    if xa is not None:
        products += N // len(enable_lora) * xa[1]
    return 2 * M * products


def _embedding(indices: _Shape, weight: _Shape, lora_A: _Shape, lora_B: _Shape, *_: Any, **__: Any) -> int:
    return 2 * indices[0] * lora_B[0] * lora_B[1]


def _embedding_backward(
    dy: _Shape, indices: _Shape | None, lora_B: _Shape | None, xa: _Shape | None, *_: Any, **__: Any
) -> int:
    """The panel dyb and lora_B's gradient; lora_A's is a sum of dyb's rows."""
    ranks = (0 if lora_B is None else lora_B[1]) + (0 if xa is None else xa[1])
    return 2 * dy[0] * dy[1] * ranks


def _effective_weight(weight: _Shape, lora_A: _Shape, lora_B: _Shape, *_: Any, **__: Any) -> int:
    return 2 * lora_B[0] * lora_B[1] * lora_A[1]


_FORMULAS: dict[str, Callable[..., int]] = {
    "lora_linear": _linear,
    "lora_linear_forward": _linear,
    "lora_linear_backward": _linear_backward,
    "lora_embedding": _embedding,
    "lora_embedding_forward": _embedding,
    "lora_embedding_backward": _embedding_backward,
    "lora_effective_weight": _effective_weight,
}


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """By op, for torch's FlopCounterMode(custom_mapping=flop_formulas()), which counts 0 for an op unknown to it.

    Each takes the op's arguments with shapes in the tensors' places, and returns FLOPs.
    """
    return {getattr(torch.ops.fused_lora, name): formula for name, formula in _FORMULAS.items()}
