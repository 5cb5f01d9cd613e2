"""What we are measured against: the bare GEMMs, loralib's layers, a hand-written backward on addmm_, and PEFT's layer.

A candidate is made of a `Layer` and called without arguments; one call is a forward and a backward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import loralib
import torch
from torch import Tensor, nn

import fused_lora
from fused_lora.functional import lora_linear

Step = Callable[[], tuple[Tensor, ...]]


@dataclass
class Layer:
    """Inputs of one step of a linear layer with an adapter in each enabled slice of its output.

    x [M, K], weight [N, K], dy [M, N]; with n enabled slices, lora_A [n R, K] and lora_B [n N / slices, R]. x and the
    adapter require gradients, the weight is frozen. The adapter may be float32 beside half-precision others.
    """

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    scaling: float
    p: float
    enable_lora: tuple[bool, ...] = (True,)

    @classmethod
    def random(
        cls,
        tokens: int,
        in_features: int,
        out_features: int,
        r: int,
        p: float,
        dtype: torch.dtype,
        *,
        adapter_dtype: torch.dtype | None = None,
        enable_lora: tuple[bool, ...] = (True,),
        device: str = "cuda",
        seed: int = 0,
    ) -> Layer:
        """Fresh normal data on the device, at the scale of a trained layer."""
        generator = torch.Generator(device).manual_seed(seed)
        x = _normal(generator, tokens, in_features).to(dtype).requires_grad_()
        weight = _normal(generator, out_features, in_features, scale=in_features**-0.5).to(dtype)
        dy = _normal(generator, tokens, out_features).to(dtype)
        nothing = x.new_empty(0)
        bare_layer = cls(x, weight, nothing, nothing, dy, scaling=2.0, p=p, enable_lora=enable_lora)
        return bare_layer.with_adapter(r, p, adapter_dtype or dtype, seed + 1)

    def with_adapter(self, r: int, p: float, adapter_dtype: torch.dtype, seed: int = 1) -> Layer:
        """The same x, weight and dy with another adapter, whose values x's dtype can hold."""
        generator = torch.Generator(self.x.device).manual_seed(seed)
        (out_features, in_features), enabled = self.weight.shape, sum(self.enable_lora)
        rows = out_features // len(self.enable_lora) * enabled
        lora_A = _normal(generator, r * enabled, in_features, scale=in_features**-0.5)
        lora_B = _normal(generator, rows, r, scale=r**-0.5)
        adapter = [t.to(self.x.dtype).to(adapter_dtype).requires_grad_() for t in (lora_A, lora_B)]
        return replace(self, lora_A=adapter[0], lora_B=adapter[1], p=p)

    @property
    def r(self) -> int:
        return self.lora_B.shape[1]

    def gradients_of(self, y: Tensor) -> tuple[Tensor, ...]:
        """y, dx, da and db of a y that was made of these tensors."""
        return y, *torch.autograd.grad(y, (self.x, self.lora_A, self.lora_B), self.dy)

    def autocast(self) -> AbstractContextManager[object]:
        """What the unfused expression needs where the adapter is wider than x; nothing elsewhere."""
        if self.lora_A.dtype == self.x.dtype:
            return nullcontext()
        # A cached cast would belong to a captured graph's memory.
        return torch.autocast(self.x.device.type, self.x.dtype, cache_enabled=False)


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device) * scale


def bare(layer: Layer) -> Callable[[], object]:
    """The frozen layer's two GEMMs and nothing else: the floor."""
    x = layer.x.detach()
    return lambda: (x @ layer.weight.T, layer.dy @ layer.weight)


class _AddmmLoRA(torch.autograd.Function):
    """What a careful user writes by hand: cuBLAS for everything, the low-rank term added in place by addmm_."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, layer: Layer) -> Tensor:
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        dropped, mask = torch.native_dropout(x, layer.p, True) if layer.p > 0 else (x, None)
        xa = (dropped @ a.T).mul_(layer.scaling)
        y = x @ weight.T
        for piece, panel, factor in _by_slice(layer, y, xa, b):
            piece.addmm_(panel, factor.T)
        ctx.save_for_backward(dropped, weight, a, b, xa, mask)
        ctx.layer, ctx.adapter_dtype = layer, lora_A.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, weight, a, b, xa, mask = ctx.saved_tensors
        slices = _by_slice(ctx.layer, dy, xa, b)
        dyb = _joined([piece @ factor for piece, _, factor in slices], 1).mul_(ctx.layer.scaling)
        db = _joined([piece.T @ panel for piece, panel, _ in slices], 0)
        dx = dy @ weight
        if mask is None:
            dx.addmm_(dyb, a)
        else:
            dx += torch.ops.aten.native_dropout_backward(dyb @ a, mask, 1 / (1 - ctx.layer.p))
        return dx, None, (dyb.T @ dropped).to(ctx.adapter_dtype), db.to(ctx.adapter_dtype), None


def _by_slice(layer: Layer, wide: Tensor, panel: Tensor, lora_B: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each enabled slice: its columns of y or dy, its panel and its part of lora_B."""
    enabled = sum(layer.enable_lora)
    pieces = wide.tensor_split(len(layer.enable_lora), 1)
    kept = [piece for piece, on in zip(pieces, layer.enable_lora, strict=True) if on]
    return list(zip(kept, panel.tensor_split(enabled, 1), lora_B.tensor_split(enabled), strict=True))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def addmm(layer: Layer) -> Step:
    return lambda: layer.gradients_of(_AddmmLoRA.apply(layer.x, layer.weight, layer.lora_A, layer.lora_B, layer))


def _module(package: Any, layer: Layer, **options: Any) -> nn.Module:
    """Either package's Linear or MergedLinear of these tensors, in training mode."""
    out_features, in_features = layer.weight.shape
    options |= {"bias": False, "device": layer.x.device, "dtype": layer.x.dtype}
    options |= {"r": layer.r, "lora_alpha": layer.scaling * layer.r, "lora_dropout": layer.p}
    if layer.enable_lora == (True,):
        module: nn.Module = package.Linear(in_features, out_features, **options)
    else:
        module = package.MergedLinear(in_features, out_features, enable_lora=list(layer.enable_lora), **options)
    module.weight = nn.Parameter(layer.weight, requires_grad=False)
    module.lora_A, module.lora_B = nn.Parameter(layer.lora_A.detach()), nn.Parameter(layer.lora_B.detach())
    return module


def _step(module: nn.Module, layer: Layer, lora_A: Tensor, lora_B: Tensor) -> Step:
    def step() -> tuple[Tensor, ...]:
        y = module(layer.x)
        return y, *torch.autograd.grad(y, (layer.x, lora_A, lora_B), layer.dy)

    return step


def fused_module(layer: Layer, **options: Any) -> Any:
    """This package's layer of these tensors; options are further arguments of it."""
    return _module(fused_lora, layer, adapter_dtype=layer.lora_A.dtype, **options)


def loralib_module(layer: Layer) -> Any:
    """loralib's layer of these tensors; a float32 adapter beside another x needs autocast."""
    return _module(loralib, layer)


def peft_module(layer: Layer, *, as_it_comes: bool = True) -> Any:
    """PEFT's layer: as it comes its adapter and the low-rank term are float32, else of the base's dtype."""
    import peft

    out_features, in_features = layer.weight.shape
    proj = nn.Linear(in_features, out_features, bias=False, device=layer.x.device, dtype=layer.x.dtype)
    proj.weight = nn.Parameter(layer.weight)
    alpha = round(layer.scaling * layer.r)
    config = peft.LoraConfig(r=layer.r, lora_alpha=alpha, lora_dropout=layer.p, target_modules=["0"])
    model: Any = peft.get_peft_model(nn.Sequential(proj), config, autocast_adapter_dtype=as_it_comes).train()
    module = model.base_model.model[0]
    for name, values in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
        factor = getattr(module, name)["default"]
        factor.weight = nn.Parameter(values.detach().to(factor.weight.dtype))
    return module


def fused(layer: Layer) -> Step:
    """This package's layer, called as a user calls it."""
    module = fused_module(layer)
    return _step(module, layer, module.lora_A, module.lora_B)


def loralib_eager(layer: Layer) -> Step:
    module = loralib_module(layer)
    inner = _step(module, layer, module.lora_A, module.lora_B)

    def step() -> tuple[Tensor, ...]:
        with layer.autocast():
            return inner()

    return step


def peft_eager(layer: Layer) -> Step:
    module = peft_module(layer)
    return _step(module, layer, module.lora_A["default"].weight, module.lora_B["default"].weight)


def fused_with_seed(layer: Layer, seed: Tensor) -> Step:
    """This package's function with a given dropout mask, for checks."""
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
            enable_lora=layer.enable_lora,
        )
    )


def on_backend(step: Step, backend: Any) -> Step:
    """A step of ours on the path of this name for `fused_lora.use_backend`; "auto" is the step itself."""

    def forced() -> tuple[Tensor, ...]:
        with fused_lora.use_backend(backend):
            return step()

    # Entering the context would cost host time that a user's call does not spend.
    return step if backend == "auto" else forced


OURS = "fused_lora"
ADDMM = "base + addmm_"
LORALIB = "loralib eager"
PEFT = "PEFT eager"
PEERS: dict[str, Callable[[Layer], Step]] = {OURS: fused, ADDMM: addmm, LORALIB: loralib_eager, PEFT: peft_eager}

# Why one of them is left out of CUDA graphs, and another of sliced layers.
NO_GRAPH = "loralib's MergedLinear indexes with a boolean mask, which waits for the GPU and cannot be captured"
NO_SLICES = "PEFT has no layer with adapters for slices of its output"


def peers(layer: Layer) -> dict[str, Callable[[Layer], Step]]:
    """Those of PEERS that have such a layer."""
    return {name: make for name, make in PEERS.items() if name != PEFT or len(layer.enable_lora) == 1}


def capturable(name: str, layer: Layer) -> bool:
    """Whether a CUDA graph can hold this peer's step; see NO_GRAPH."""
    return name != LORALIB or len(layer.enable_lora) == 1


def path_of(step: Callable[[], object]) -> str:
    """Which path our ops take in this step: "triton" if all take it, else each path with its ops."""
    with fused_lora.count_paths() as counts:
        step()
    ops = defaultdict(list)
    for key in sorted(counts):
        op, _, path = key.partition("/")
        ops[path].append(op)
    return next(iter(ops)) if len(ops) == 1 else "; ".join(f"{path}: {', '.join(of)}" for path, of in ops.items())
