"""What `benchmarks.inference` calls: a layer in eval mode by each way of computing it, on copies that take turns.

A model's weights are not in the cache when their turn comes. So each candidate is called on one copy of the weight and
its adapter after another, as many as exceed the L2 cache by far; the input, which the layer before has just written, is
the same. A merged weight has the base's shape and dtype, so that the copies of the base serve for "merged" too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_lora
from benchmarks.accuracy import update
from benchmarks.peers import Layer, fused_module

MERGED, EAGER, ADDMM, COMPILED, FUSED = "merged", "eager", "base + addmm_", "torch.compile", "fused"
UNFUSED = (EAGER, ADDMM, COMPILED)
# Ours again, and up to how many tokens it is asked for.
INVARIANT = "batch-invariant"
MOST_INVARIANT_TOKENS = 64
DTYPE = torch.bfloat16
SCALING = 2.0
# A cycle of copies is to be larger than the cache by this factor, within a limit on memory. Lookups of few tokens would
# take thousands of calls for that: theirs stay in the cache, for every candidate alike.
CACHES = 3
FEWEST_COPIES = 4
MOST_COPIES = 64
MOST_BYTES = 8 << 30

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One layer and input: each candidate's calls, one a copy, and what tells by the copy's number whether it is right.

    plain_bytes: of weight, input and output, each once. adapter_bytes: of lora_A and lora_B, what is read of them.
    flops: of the base's product; 0 for a lookup.
    """

    calls: dict[str, list[Call]]
    yardstick: Callable[[int], Tensor]
    truth: Callable[[int], Tensor]
    plain_bytes: int
    adapter_bytes: int
    flops: int


def cache_bytes(device: str) -> int:
    """The size of the device's L2 cache; 0 for a CPU, whose times mean nothing."""
    return 0 if device == "cpu" else int(torch.cuda.get_device_properties(device).L2_cache_size)


def copies(nbytes: int, cache: int) -> int:
    """How many tensors of this size take turns."""
    wanted = max(FEWEST_COPIES, CACHES * cache // nbytes + 1)
    return min(wanted, MOST_COPIES, max(1, MOST_BYTES // nbytes))


def expression(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The unfused layer as loralib and PEFT write it."""
    return F.linear(x, weight) + F.linear(F.linear(x, lora_A), lora_B) * SCALING


def base_addmm(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B_T: Tensor) -> Tensor:
    """The unfused layer as a careful user writes it: three GEMMs, no other pass over y."""
    return F.linear(x, weight).addmm_(F.linear(x, lora_A), lora_B_T, alpha=SCALING)


def sliced_addmm(x: Tensor, weight: Tensor, lora_A: Tensor, terms: list[tuple[slice, slice, Tensor]]) -> Tensor:
    """The same where slices of the output have adapters; terms: columns of y, columns of the panel, a part of Bᵀ."""
    y, panel = F.linear(x, weight), F.linear(x, lora_A)
    for columns, ranks, factor in terms:
        y[:, columns].addmm_(panel[:, ranks], factor, alpha=SCALING)
    return y


def invariantly(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output within batch_invariant()."""
    with fused_lora.batch_invariant():
        return layer(x)  # type: ignore[no-any-return]


def terms_of(layer: Layer) -> list[tuple[slice, slice, Tensor]]:
    """What `sliced_addmm` needs of a layer."""
    width, r = len(layer.weight) // len(layer.enable_lora), layer.r
    enabled = [s for s, on in enumerate(layer.enable_lora) if on]
    factors = layer.lora_B.detach().tensor_split(len(enabled))
    return [(slice(s * width, (s + 1) * width), slice(e * r, (e + 1) * r), factors[e].T) for e, s in enumerate(enabled)]


class Linears:
    """As many of one Linear or MergedLinear, frozen and in eval mode, as take turns, for any number of tokens."""

    def __init__(
        self, in_features: int, out_features: int, r: int, device: str, enable_lora: tuple[bool, ...] = (True,)
    ) -> None:
        sizes = 1, in_features, out_features, r, 0.0, DTYPE
        count = copies(in_features * out_features * DTYPE.itemsize, cache_bytes(device))
        self.layers = []
        for seed in range(count):
            layer = Layer.random(*sizes, enable_lora=enable_lora, device=device, seed=seed)
            tensors = {name: getattr(layer, name).detach() for name in ("weight", "lora_A", "lora_B")}
            self.layers.append(replace(layer, scaling=SCALING, **tensors))
        self.modules = [fused_module(layer, merge_weights=False).eval() for layer in self.layers]

    def case(self, tokens: int, compile_backend: str | Callable[..., Any] | None = None) -> Case:
        """compile_backend: of the candidate that torch.compile makes for these sizes; None for none of it."""
        first = self.layers[0]
        weight, plain = first.weight, len(first.enable_lora) == 1
        generator = torch.Generator(weight.device).manual_seed(tokens)
        shape = tokens, weight.shape[1]
        x = torch.randn(*shape, generator=generator, device=weight.device).to(DTYPE)
        calls: dict[str, list[Call]] = {MERGED: [partial(F.linear, x, layer.weight) for layer in self.layers]}
        tensors = [(x, layer.weight, layer.lora_A) for layer in self.layers]
        if plain:
            whole = [(*three, layer.lora_B) for three, layer in zip(tensors, self.layers, strict=True)]
            calls[EAGER] = [partial(expression, *four) for four in whole]
            calls[ADDMM] = [partial(base_addmm, x, w, a, b.T) for _, w, a, b in whole]
            if compile_backend is not None:
                # Dynamo gives up, silently, on a function that it has compiled for eight sizes.
                torch.compiler.reset()
                compiled = torch.compile(expression, dynamic=False, backend=compile_backend)
                calls[COMPILED] = [partial(compiled, *four) for four in whole]
        else:
            terms = [terms_of(layer) for layer in self.layers]
            calls[ADDMM] = [partial(sliced_addmm, *three, of) for three, of in zip(tensors, terms, strict=True)]
        calls[FUSED] = [partial(module, x) for module in self.modules]
        if tokens <= MOST_INVARIANT_TOKENS:
            calls[INVARIANT] = [partial(invariantly, module, x) for module in self.modules]
        return Case(
            calls,
            yardstick=lambda turn: unfused(replace(self.layers[turn], x=x)),
            truth=lambda turn: unfused(widened(replace(self.layers[turn], x=x))),
            plain_bytes=x.nbytes + weight.nbytes + tokens * len(weight) * DTYPE.itemsize,
            adapter_bytes=first.lora_A.nbytes + first.lora_B.nbytes,
            flops=2 * tokens * weight.numel(),
        )


def unfused(layer: Layer) -> Tensor:
    return layer.x @ layer.weight.T + update(layer, None, 1.0)


def widened(layer: Layer) -> Layer:
    """The layer in float64."""
    return replace(layer, **{name: getattr(layer, name).double() for name in ("x", "weight", "lora_A", "lora_B")})


def looked_up(indices: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The unfused lookup as a careful user writes it."""
    return F.embedding(indices, weight).addmm_(lora_A[:, indices].T, lora_B.T, alpha=SCALING)


class Embeddings:
    """One Embedding, which is larger than any cache; the indices take turns."""

    def __init__(self, num_embeddings: int, embedding_dim: int, r: int, device: str) -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {"lora_alpha": SCALING * r, "merge_weights": False, "device": device, "dtype": DTYPE}
        self.module = fused_lora.Embedding(num_embeddings, embedding_dim, r=r, **options).eval()
        torch.nn.init.normal_(self.module.lora_A, std=r**-0.5)
        self.cache = cache_bytes(device)

    def case(self, tokens: int) -> Case:
        weight, a, b = (t.detach() for t in (self.module.weight, self.module.lora_A, self.module.lora_B))
        row = weight[0].nbytes
        generator = torch.Generator(weight.device).manual_seed(tokens)
        shape = copies(tokens * row, self.cache), tokens
        turns = torch.randint(len(weight), shape, generator=generator, device=weight.device)
        calls: dict[str, list[Call]] = {
            MERGED: [partial(F.embedding, indices, weight) for indices in turns],
            ADDMM: [partial(looked_up, indices, weight, a, b) for indices in turns],
            FUSED: [partial(self.module, indices) for indices in turns],
        }

        def rows(turn: int, dtype: torch.dtype) -> Tensor:
            indices = turns[turn]
            return weight[indices].to(dtype) + (a[:, indices].to(dtype).T @ b.to(dtype).T) * SCALING

        return Case(
            calls,
            yardstick=lambda turn: rows(turn, DTYPE),
            truth=lambda turn: rows(turn, torch.float64),
            plain_bytes=2 * tokens * row + turns[0].nbytes,
            adapter_bytes=tokens * len(a) * DTYPE.itemsize + b.nbytes,
            flops=0,
        )
