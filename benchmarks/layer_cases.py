"""Layers to build from either package, made ready and checked: what benchmarks of whole layers have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fused_lora
from benchmarks.accuracy import CALLS

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A layer to build from either package with a dropout, torch's frozen layer of the same shape, and its input."""

    name: str
    build: Callable[[Any, float], nn.Module]
    plain: Callable[[], nn.Module]
    x: Callable[[str], Tensor]
    dropouts: tuple[float, ...] = (0.0, 0.1)


def prepared(layer: nn.Module, device: str) -> nn.Module:
    """In bfloat16 on the device, its base frozen and its adapter at random."""
    layer = layer.to(device, DTYPE)
    indices = getattr(layer, "lora_ind", None)
    if indices is not None and not isinstance(layer, fused_lora.LoRALayer):
        # loralib's is no buffer, so that the layer's move left it behind.
        layer.lora_ind = indices.to(device)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad = "lora_" in name
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
    return layer


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], list[Tensor]]:
    """y and what it is differentiated by: x where it is floating point, and the adapter."""
    inputs = [t for t in (x, *layer.parameters()) if t.requires_grad]
    if not inputs:
        return lambda: [layer(x)]

    def forward_backward() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    return forward_backward


def check(ours: nn.Module, theirs: nn.Module, x: Tensor, dy: Tensor, what: str) -> None:
    """A call after several against loralib's layer in float64, by twice loralib's error in this dtype; at p = 0."""
    exact = copy.deepcopy(theirs).double()
    wide = x.detach().double().requires_grad_() if x.is_floating_point() else x
    for _ in range(CALLS - 1):
        step(ours, x, dy)()
    results = [step(layer, t, g)() for layer, t, g in ((ours, x, dy), (theirs, x, dy), (exact, wide, dy.double()))]
    for i, (actual, same_dtype, truth) in enumerate(zip(*results, strict=True)):
        error, bound = (actual - truth).abs().max(), 2 * (same_dtype - truth).abs().max()
        assert error <= bound, f"result {i} of {what} is off by {error:.3e}, more than {bound:.3e}"
