"""What we are measured against: the bare GEMMs, loralib's eager layer, and a hand-written backward on addmm_."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import loralib
import torch
from torch import Tensor

from fused_lora.functional import lora_linear


@dataclass
class Layer:
    """Inputs of one step: x [M, K], weight [N, K], lora_A [R, K], lora_B [N, R], dy [M, N]."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    scaling: float
    p: float

    @classmethod
    def random(
        cls, tokens: int, in_features: int, out_features: int, r: int, p: float, dtype: torch.dtype, seed: int = 0
    ) -> Layer:
        """Fresh normal data on the GPU; x and the adapter require gradients, the weight is frozen."""
        generator = torch.Generator("cuda").manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

        return cls(
            x=draw(tokens, in_features).requires_grad_(),
            weight=draw(out_features, in_features, scale=in_features**-0.5),
            lora_A=draw(r, in_features, scale=in_features**-0.5).requires_grad_(),
            lora_B=draw(out_features, r, scale=r**-0.5).requires_grad_(),
            dy=draw(tokens, out_features),
            scaling=2.0,
            p=p,
        )

    def gradients_of(self, y: Tensor) -> tuple[Tensor, ...]:
        return y, *torch.autograd.grad(y, (self.x, self.lora_A, self.lora_B), self.dy)


class _AddmmLoRA(torch.autograd.Function):
    """What a careful user writes by hand: cuBLAS for everything, the low-rank term added in place by addmm_."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, p: float
    ) -> Tensor:
        dropped, mask = torch.native_dropout(x, p, True) if p > 0 else (x, None)
        xa = (dropped @ lora_A.T).mul_(scaling)
        y = x @ weight.T
        y.addmm_(xa, lora_B.T)
        ctx.save_for_backward(dropped, weight, lora_A, lora_B, xa, mask)
        ctx.scaling, ctx.p = scaling, p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, weight, lora_A, lora_B, xa, mask = ctx.saved_tensors
        dyb = (dy @ lora_B).mul_(ctx.scaling)
        dx = dy @ weight
        if mask is None:
            dx.addmm_(dyb, lora_A)
        else:
            dx += torch.ops.aten.native_dropout_backward(dyb @ lora_A, mask, 1 / (1 - ctx.p))
        return dx, None, dyb.T @ dropped, dy.T @ xa, None, None


def bare(layer: Layer) -> Callable[[], object]:
    """The frozen layer's two GEMMs and nothing else: the floor."""
    return lambda: (layer.x.detach() @ layer.weight.T, layer.dy @ layer.weight)


def addmm(layer: Layer) -> Callable[[], object]:
    return lambda: layer.gradients_of(
        _AddmmLoRA.apply(layer.x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling, layer.p)
    )


def loralib_eager(layer: Layer) -> Callable[[], object]:
    r, in_features = layer.lora_A.shape
    module = loralib.Linear(
        in_features,
        len(layer.weight),
        r=r,
        lora_alpha=layer.scaling * r,
        lora_dropout=layer.p,
        bias=False,
        device="cuda",
        dtype=layer.x.dtype,
    )
    module.weight.data, module.lora_A.data, module.lora_B.data = layer.weight, layer.lora_A.data, layer.lora_B.data
    return lambda: (
        y := module(layer.x),
        *torch.autograd.grad(y, (layer.x, module.lora_A, module.lora_B), layer.dy),
    )


def fused(layer: Layer, seed: Tensor | None = None) -> Callable[[], tuple[Tensor, ...]]:
    """This package; seed fixes the mask, None draws a fresh one each call."""
    return lambda: layer.gradients_of(
        lora_linear(
            layer.x,
            layer.weight,
            layer.lora_A,
            layer.lora_B,
            scaling=layer.scaling,
            dropout_p=layer.p,
            training=layer.p > 0,
            seed=seed,
        )
    )


PEERS: dict[str, Callable[[Layer], Callable[[], object]]] = {
    "fused_lora": fused,
    "base + addmm_": addmm,
    "loralib eager": loralib_eager,
}
