"""An adapter outside of any model and any file format: for each layer lora_A, lora_B and what scales them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["linear", "embedding", "conv", "merged"]


@dataclass(frozen=True, eq=False)
class AdapterLayer:
    """One layer's adapter: the weight gains scaling · B A.

    kind, and the shapes of lora_A and lora_B for a weight (out, in):
        "linear": (r, in) and (out, r). Also what loralib's files do not tell from it: its embeddings, whose weight is
            the transpose, and its convolutions, whose product has the weight's elements in order.
        "embedding": (r, num_embeddings) and (embedding_dim, r); the weight is the product's transpose.
        "conv": (r, in, k0, k1, ...) and (out, r, 1, 1, ...), as PEFT and kohya have them, or loralib's matrices.
        "merged": loralib's MergedLinear with n enabled slices, (r * n, in) and (out / slices * n, r).
    r: rank. lora_alpha: None if the format stores none. use_rslora: scaling is lora_alpha / sqrt(r) instead of / r.
    enable_lora: for "merged", which slices have an adapter; None if the format stores none. With a single one, "linear"
        stands for a layer that is "merged" if the base's shape says so.
    lora_dropout: as stored; 0 if the format stores none.
    fan_in_fan_out: whether a "linear" or "merged" layer's weight is stored (in, out); None if the format does not say.

    Raises ValueError if the tensors are not of these shapes, not floating-point, or a number is out of its range.
    """

    lora_A: Tensor
    lora_B: Tensor
    r: int
    lora_alpha: float | None = None
    use_rslora: bool = False
    kind: Kind = "linear"
    enable_lora: tuple[bool, ...] | None = None
    lora_dropout: float = 0.0
    fan_in_fan_out: bool | None = None

    def __post_init__(self) -> None:
        A, B = self.lora_A, self.lora_B
        for name, tensor in (("lora_A", A), ("lora_B", B)):
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise ValueError(f"{name} is {tensor.dtype}; expected a floating-point dtype of 16 bits or more.")
        inner = B.shape[1] if B.dim() > 1 else 0
        fits = A.dim() >= 2 and inner > 0 and B.shape[2:].numel() == 1
        if self.kind == "merged":
            fits = fits and A.dim() == B.dim() == 2 and A.shape[0] % inner == 0
        else:
            fits = fits and A.shape[0] == inner and (self.kind == "conv" or A.dim() == B.dim() == 2)
        if not fits:
            raise ValueError(
                f"lora_A has shape {tuple(A.shape)} and lora_B {tuple(B.shape)}; expected (r, in) and (out, r)."
            )
        if self.kind == "merged" and self.enable_lora is not None:
            n, slices = A.shape[0] // inner, len(self.enable_lora)
            if sum(self.enable_lora) != n or B.shape[0] % n != 0:
                raise ValueError(
                    f"enable_lora has {sum(self.enable_lora)} enabled of {slices} slices; expected the {n} that "
                    f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} hold."
                )
        # loralib's convolutions have r times the kernel's first size for the inner dimension.
        rank_fits = inner % self.r == 0 if self.loralib_conv and self.r > 0 else self.r == inner
        if type(self.r) is not int or not rank_fits:
            raise ValueError(f"r is {self.r}; expected {inner}, as lora_B {tuple(B.shape)} has.")
        if self.lora_alpha is not None and not abs(self.lora_alpha) <= torch.finfo(torch.float32).max:
            raise ValueError(f"lora_alpha is {self.lora_alpha}; expected a finite number of float32.")

    @property
    def scaling(self) -> float | None:
        """The factor of B A, or None if no lora_alpha is known."""
        if self.lora_alpha is None:
            return None
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def plain_alpha(self) -> float | None:
        """The lora_alpha for which lora_alpha / r is the scaling."""
        return self.lora_alpha if not self.use_rslora or self.scaling is None else self.scaling * self.r

    @property
    def loralib_conv(self) -> bool:
        """Whether this is certainly loralib's convolution, which only loralib's and this package's files can hold."""
        return self.kind == "conv" and self.lora_A.dim() == 2

    def dense(self) -> AdapterLayer:
        """The same update as one "linear" adapter over the whole weight; itself if it is not "merged".

        n slices of rank r become one adapter of rank r * n with a block-diagonal lora_B; scaling stays the same.
        Raises ValueError if enable_lora is not known and not all slices can have an adapter.
        """
        if self.kind != "merged":
            return self
        if self.enable_lora is None:
            raise ValueError(
                f"enable_lora is not stored beside a MergedLinear's lora_A {tuple(self.lora_A.shape)} and lora_B "
                f"{tuple(self.lora_B.shape)}; expected it as an argument."
            )
        n = sum(self.enable_lora)
        rows = self.lora_B.shape[0] // n
        block_diagonal = self.lora_B.new_zeros(rows * len(self.enable_lora), self.r * n)
        enabled = [s for s, on in enumerate(self.enable_lora) if on]
        for e, s in enumerate(enabled):
            block = self.lora_B[e * rows : (e + 1) * rows]
            block_diagonal[s * rows : (s + 1) * rows, e * self.r : (e + 1) * self.r] = block
        alpha = None if self.plain_alpha is None else self.plain_alpha * n
        return replace(
            self,
            lora_B=block_diagonal,
            r=self.r * n,
            lora_alpha=alpha,
            use_rslora=False,
            kind="linear",
            enable_lora=None,
        )


@dataclass(frozen=True, eq=False)
class Adapter:
    """A whole adapter, as read from a file or a state dict.

    layers: by the adapted layer's path in its model; "" is the model itself. kohya's files have their own flat names.
    others: what is stored beside the layers: trained biases and whole modules, and entries that nothing here knows.
    format: which of `formats.FORMATS` it was read from. fan_in_fan_out: PEFT's one word for the layers that have none
    of their own, or None. config: what PEFT stores beside the tensors.
    """

    layers: Mapping[str, AdapterLayer]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    format: str = ""
    fan_in_fan_out: bool | None = None
    config: Mapping[str, Any] | None = None

    def stored_transposed(self, path: str) -> bool | None:
        """fan_in_fan_out of a "linear" or "merged" layer, its own or else the adapter's; None of others."""
        layer = self.layers[path]
        if layer.kind not in ("linear", "merged"):
            return None
        return self.fan_in_fan_out if layer.fan_in_fan_out is None else layer.fan_in_fan_out

    def with_alpha(self, lora_alpha: float) -> Adapter:
        """The same with lora_alpha for every layer that has none."""
        layers = {
            path: layer if layer.lora_alpha is not None else replace(layer, lora_alpha=float(lora_alpha))
            for path, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    def with_enable_lora(self, enable_lora: Sequence[bool]) -> Adapter:
        """The same with enable_lora for every MergedLinear that has none.

        Files with a single enabled slice do not tell a MergedLinear from a linear layer: the base's shapes do, and
        until they are known the adapter cannot be written. Raises ValueError if enable_lora fits no layer.
        """
        enabled = tuple(bool(on) for on in enable_lora)
        kinds = ("merged", "linear") if sum(enabled) == 1 else ("merged",)
        layers = {
            path: replace(layer, enable_lora=enabled) if layer.kind in kinds and layer.enable_lora is None else layer
            for path, layer in self.layers.items()
        }
        if not any(layer is not self.layers[path] for path, layer in layers.items()):
            raise ValueError(f"enable_lora is {list(enabled)}; expected it where a MergedLinear has none stored.")
        return replace(self, layers=layers)

    def with_embeddings(self, names: Iterable[str]) -> Adapter:
        """The same with these layers of kind "embedding", which loralib's files do not tell from linear ones.

        names: whole paths, or their last parts. Raises ValueError for one that names no linear layer.
        """
        layers = dict(self.layers)
        for name in names:
            found = [path for path in layers if path == name or path.endswith(f".{name}")]
            if not any(layers[path].kind == "linear" for path in found):
                raise ValueError(f"{name!r} is none of the adapter's linear layers; expected the name of one.")
            for path in found:
                layers[path] = replace(layers[path], kind="embedding", enable_lora=None)
        return replace(self, layers=layers)

    def with_names(self, names: Mapping[str, str]) -> Adapter:
        """The same with modules renamed; names: old path to new path, for all or some layers and owners of others.

        Raises ValueError if two layers or two others would have one name.
        """
        layers: dict[str, AdapterLayer] = {}
        for path, layer in self.layers.items():
            new = names.get(path, path)
            if new in layers:
                raise ValueError(f"Two layers would be called {new!r}; expected a path for each.")
            layers[new] = layer
        others: dict[str, Tensor] = {}
        for key, tensor in self.others.items():
            owner = key.rpartition(".")[0]
            # loralib's convolutions have their bias one level deeper.
            owner = owner if owner in names else owner.removesuffix(".conv")
            leaf = key.removeprefix(owner).removeprefix(".")
            new = f"{names[owner]}.{leaf}".removeprefix(".") if owner in names else key
            if new in others:
                raise ValueError(f"Two other entries would be called {new!r}; expected a name for each.")
            others[new] = tensor
        return replace(self, layers=layers, others=others)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of every lora_A and lora_B."""
        return {tensor.dtype for layer in self.layers.values() for tensor in (layer.lora_A, layer.lora_B)}
