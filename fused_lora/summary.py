"""What a model's adapters cost, by arithmetic on their shapes; nothing is run.

A product of (m, k) and (k, n) takes 2 m k n FLOPs; what is added, gathered or dropped element by element counts none.
Bytes are what must pass through memory if every kernel reads each of its operands once and writes its result once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .base import as_count, dropout_probability
from .conv import ConvLoRA
from .embedding import Embedding
from .linear import Linear, MergedLinear
from .merge import MergingLayer

_INDEX_BYTES = 8
_HEAD = ("layer", "class", "r", "parameters", "trainable", "adapter", "FLOPs", "+ LoRA", "bytes", "+ LoRA", "saved")


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of memory traffic."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class LayerSummary:
    """One LoRA layer: its parameters, and what a training step costs its base alone and its adapter beside it.

    name: in the model. kind: its class. r: rank (of each slice). parameters, trainable: numbers of elements.
    adapter_bytes: of lora_A and lora_B. saved_bytes: what the layer keeps from forward to backward beside parameters.
    """

    name: str
    kind: str
    r: int
    parameters: int
    trainable: int
    adapter_bytes: int
    base_forward: Cost
    base_backward: Cost
    lora_forward: Cost
    lora_backward: Cost
    saved_bytes: int

    @property
    def base(self) -> Cost:
        """Forward and backward of the base alone."""
        return self.base_forward + self.base_backward

    @property
    def lora(self) -> Cost:
        """What the adapter adds to forward and backward."""
        return self.lora_forward + self.lora_backward


@dataclass(frozen=True)
class Summary:
    """A model's LoRA layers, and its parameters, shared ones counted once; `str()` is a table."""

    tokens: int
    parameters: int
    trainable: int
    layers: tuple[LayerSummary, ...]

    @property
    def trainable_share(self) -> float:
        """The share of all parameters that is trainable, from 0 to 1."""
        return self.trainable / max(1, self.parameters)

    @property
    def adapter_bytes(self) -> int:
        """Of all lora_A and lora_B."""
        return sum(layer.adapter_bytes for layer in self.layers)

    @property
    def base(self) -> Cost:
        """Forward and backward of all LoRA layers' bases; other layers are not counted."""
        return sum((layer.base for layer in self.layers), Cost())

    @property
    def lora(self) -> Cost:
        """What the adapters add to forward and backward."""
        return sum((layer.lora for layer in self.layers), Cost())

    @property
    def saved_bytes(self) -> int:
        """The sum over the layers; an x that several of them are fed is kept once, but counted for each."""
        return sum(layer.saved_bytes for layer in self.layers)

    def __str__(self) -> str:
        rows = [(layer.name or "model", layer.kind, str(layer.r), *_cells(layer)) for layer in self.layers]
        table = [_HEAD, *rows, ("in all", "", "", *_cells(self))]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        # Words to the left, numbers to the right.
        form = "  ".join(f"{{:{'<' if column < 2 else '>'}{width}}}" for column, width in enumerate(widths))
        lines = [form.format(*row).rstrip() for row in table]
        return "\n".join((*lines, self._note()))

    def _note(self) -> str:
        return (
            f"{self.trainable:,} of {self.parameters:,} parameters are trainable ({self.trainable_share:.2%}). FLOPs "
            f"and bytes: forward and backward of {self.tokens:,} tokens, these layers alone. Saved: an x that layers "
            "share is counted for each."
        )


def _cells(costs: LayerSummary | Summary) -> tuple[str, ...]:
    return (
        f"{costs.parameters:,}",
        f"{costs.trainable:,}",
        _scaled(costs.adapter_bytes, "B"),
        _scaled(costs.base.flops, ""),
        _scaled(costs.lora.flops, ""),
        _scaled(costs.base.bytes, "B"),
        _scaled(costs.lora.bytes, "B"),
        _scaled(costs.saved_bytes, "B"),
    )


def _scaled(number: float, unit: str) -> str:
    """Three digits and a decimal prefix: 1234567 is 1.23 M."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5 or prefix == "P":
            break
        number /= 1000
    return f"{number:.3g} {prefix}{unit}".strip()


# base_forward, base_backward, lora_forward, lora_backward, saved_bytes
_Costs = tuple[Cost, Cost, Cost, Cost, int]


def summary(model: nn.Module, tokens: int) -> Summary:
    """What the LoRA layers of model cost in a training step of `tokens` tokens, layer by layer and in all.

    tokens: rows of each layer's input, all leading dimensions flattened; of a convolution, the positions of its output,
        all samples together. Its input is taken to have prod(stride) positions for each, which leaves out what
        padding adds or takes at the borders.

    The step is forward and backward with gradients of x, lora_A and lora_B, whatever requires_grad says, on unmerged
    layers with their lora_dropout in force, whatever the mode. Activations are taken to have the base weight's dtype
    and indices to be int64. Counted are:

    - the base's own product, and its gradient with respect to x;
    - for linear layers, x read once for the panel xa, dy read once for dyb and lora_B's gradient, x read once more
      for lora_A's; kept are x, xa (tokens, r times enabled slices) and, with dropout, a bit for each element of x, in
      whole bytes for each row. An x that is kept anyway, as by another layer that is fed it, takes no more memory;
    - for embeddings, a gather from lora_A and its expansion, and lora_A's dense gradient; kept are indices and xa;
    - for convolutions, W + scaling · B A and its gradient, or, with dropout, a second convolution; kept are x, the
      weight that was made and, with dropout, the dropped x and its mask of bytes, as torch has it on a GPU.

    A layer that is called several times in a step is counted once, and layers without an adapter are not. Raises
    ValueError if model has no LoRA layer or tokens is not an integer of 0 or more.
    """
    tokens = as_count("tokens", tokens)
    layers = tuple(
        _layer(name, module, tokens)
        for name, module in model.named_modules()
        if isinstance(module, MergingLayer) and module._has_adapter
    )
    if not layers:
        raise ValueError("model has no LoRA layer; expected at least one.")
    return Summary(tokens, *_counts(model.parameters()), layers)


def _counts(parameters: Iterable[Tensor]) -> tuple[int, int]:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    return sum(size for size, _ in sizes), sum(size for size, trainable in sizes if trainable)


def _layer(name: str, layer: Any, tokens: int) -> LayerSummary:
    count: Callable[[Any, int], _Costs] = _convolution
    if isinstance(layer, (Linear, MergedLinear)):
        count = _linear
    elif isinstance(layer, Embedding):
        count = _embedding
    base_forward, base_backward, lora_forward, lora_backward, saved_bytes = count(layer, tokens)
    parameters, trainable = _counts(layer.parameters())
    return LayerSummary(
        name=name,
        kind=type(layer).__name__,
        r=layer.r,
        parameters=parameters,
        trainable=trainable,
        adapter_bytes=_bytes(layer.lora_A) + _bytes(layer.lora_B),
        base_forward=base_forward,
        base_backward=base_backward,
        lora_forward=lora_forward,
        lora_backward=lora_backward,
        saved_bytes=saved_bytes,
    )


def _linear(layer: Linear | MergedLinear, M: int) -> _Costs:
    """x [M, K], y [M, N], lora_A [R, K] and lora_B [E, r], for E outputs that have an adapter of rank r."""
    K, N, item = layer.in_features, layer.out_features, layer.weight.element_size()
    R, (E, r) = layer.lora_A.shape[0], layer.lora_B.shape
    x, y, weight, panel = M * K * item, M * N * item, _bytes(layer.weight), M * R * item
    A, B = _bytes(layer.lora_A), _bytes(layer.lora_B)
    # With a probability of 1 there is no mask: the whole term is off.
    mask = M * math.ceil(K / 8) if 0 < dropout_probability(layer.lora_dropout) < 1 else 0
    base_forward = Cost(2 * M * N * K, x + weight + _bytes(layer.bias) + y)
    base_backward = Cost(2 * M * N * K, y + weight + x)
    to_panel, from_panel = 2 * M * R * K, 2 * M * E * r
    lora_forward = Cost(to_panel + from_panel, x + A + mask + panel + panel + B)
    panels = M * E * item + B + panel + panel + B  # dy's columns, lora_B, xa, dyb, lora_B's gradient
    update = panel + A + mask  # dx gains dyb @ lora_A
    gradient = panel + x + mask + A  # lora_A's
    return (
        base_forward,
        base_backward,
        lora_forward,
        Cost(2 * to_panel + 2 * from_panel, panels + update + gradient),
        x + panel + mask,
    )


def _embedding(layer: Embedding, M: int) -> _Costs:
    """indices [M], y [M, D], lora_A [R, V] and lora_B [D, R]."""
    R, D, item = layer.r, layer.embedding_dim, layer.weight.element_size()
    indices, y, panel = M * _INDEX_BYTES, M * D * item, M * R * item
    A, B = _bytes(layer.lora_A), _bytes(layer.lora_B)
    gathered = M * R * layer.lora_A.element_size()
    product = 2 * M * R * D
    return (
        Cost(0, indices + y + y),
        Cost(),
        Cost(product, gathered + panel + B),
        Cost(2 * product, y + B + panel + panel + B + panel + indices + A),
        indices + panel,
    )


def _convolution(layer: ConvLoRA, M: int) -> _Costs:
    """y [M, out_channels], and lora_B @ lora_A of the weight's size."""
    conv, item, R = layer.conv, layer.conv.weight.element_size(), layer.lora_A.shape[0]
    elements = M * math.prod(conv.stride) * conv.in_channels
    x, y, weight = elements * item, M * conv.out_channels * item, _bytes(conv.weight)
    A, B = _bytes(layer.lora_A), _bytes(layer.lora_B)
    product, convolution = 2 * conv.weight.numel() * R, 2 * M * conv.weight.numel()
    base_forward = Cost(convolution, x + weight + _bytes(conv.bias) + y)
    base_backward = Cost(convolution, y + weight + x)
    lora_forward = Cost(product, weight + A + B + weight)
    # The made weight's gradient, from which lora_A's and lora_B's are.
    gradient = Cost(convolution + 2 * product, x + y + weight + 2 * (weight + A + B))
    if dropout_probability(layer.lora_dropout) == 0:
        return base_forward, base_backward, lora_forward, gradient, x + weight
    dropping = Cost(0, x + x + elements)
    second = Cost(convolution, x + weight + y)
    return (
        base_forward,
        base_backward,
        lora_forward + dropping + second + Cost(0, 3 * y),
        gradient + second + dropping + Cost(0, 3 * x),
        x + weight + x + elements,
    )


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
