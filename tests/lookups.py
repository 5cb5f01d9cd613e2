"""What the tests of Embedding and of its op share: lookups, the plain expression and its float64 yardstick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numerics import assert_as_accurate_as
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora import Embedding
from fused_lora.functional import lora_embedding

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
DTYPES = [(SINGLE, SINGLE), (torch.float16, torch.float16), (HALF, HALF), (HALF, SINGLE), (torch.float16, SINGLE)]
SCALING = 0.75


def dtype_id(value: object) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in value) if isinstance(value, tuple) else str(value)


@dataclass
class Lookup:
    """Inputs of one lookup and the gradient of its output, on one device."""

    indices: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor

    NAMES = ("weight", "lora_A", "lora_B")

    def factors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.NAMES]

    def to(self, dtype: torch.dtype | None = None) -> Lookup:
        """The same values as fresh leaves, in another dtype if one is given."""
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.factors()]
        return Lookup(self.indices, *leaves, dy=self.dy.to(dtype or self.dy.dtype))


def make_lookup(
    tokens: int, rows: int, columns: int, r: int, *, dtype: torch.dtype, adapter: torch.dtype | None = None, device: str
) -> Lookup:
    """Random tokens of which two of three are the same one, factors of unit scale, all of them to be trained."""
    generator = torch.Generator().manual_seed(tokens * 7919 + rows * 31 + columns * 17 + r)

    def draw(*shape: int, of: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, of)

    indices = torch.randint(0, max(1, rows), (tokens,), generator=generator)
    indices[torch.rand(tokens, generator=generator) < 2 / 3] = rows // 2
    adapter = adapter or dtype
    return Lookup(
        indices.to(device),
        draw(rows, columns).requires_grad_(),
        draw(r, rows, of=adapter).requires_grad_(),
        draw(columns, r, of=adapter, scale=max(1, r) ** -0.5).requires_grad_(),
        dy=draw(tokens, columns),
    )


def expression(
    indices: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = SCALING,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """loralib's lookup, for plain autograd."""
    base = F.embedding(indices, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    update = F.embedding(indices, lora_A.T, padding_idx, scale_grad_by_freq=scale_grad_by_freq) @ lora_B.T
    return base + update * scaling


def fused(indices: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, **options: Any) -> Tensor:
    return lora_embedding(indices, weight, lora_A, lora_B, **{"scaling": SCALING, **options})


def outputs_and_gradients(lookup: Lookup, function: Callable[..., Tensor], **options: Any) -> dict[str, Tensor]:
    y = function(lookup.indices, *lookup.factors(), **options)
    y.backward(lookup.dy)
    gradients = {f"d{name}": getattr(lookup, name).grad for name in lookup.NAMES}
    return {"y": y.detach(), **{name: g for name, g in gradients.items() if g is not None}}


def assert_matches_float64(lookup: Lookup, **options: Any) -> None:
    mixed = lookup.lora_A.dtype != lookup.weight.dtype
    actual = outputs_and_gradients(lookup, fused, **options)
    with torch.autocast(lookup.dy.device.type, dtype=lookup.weight.dtype, enabled=mixed):
        same_dtype = outputs_and_gradients(lookup.to(), expression, **options)
    exact = outputs_and_gradients(lookup.to(DOUBLE), expression, **options)
    assert actual.keys() == same_dtype.keys() == exact.keys()
    for name, value in actual.items():
        assert_as_accurate_as(value, same_dtype[name], exact[name], name)


def trained(*arguments: Any, **options: Any) -> Embedding:
    """A layer whose adapter does something."""
    layer = Embedding(*arguments, **options)
    nn.init.normal_(layer.lora_A)
    return layer
