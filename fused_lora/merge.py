"""Exact merging: how a layer takes its adapter into its weight and gives the base weight back, bit for bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .base import LoRALayer

_Self = TypeVar("_Self", bound="MergingLayer")


@dataclass
class _Kept:
    """What a merged layer keeps: the base, and how the merged tensors were when they were merged."""

    base: nn.Parameter
    requires_grad: bool
    versions: tuple[tuple[int, int], ...]


class MergingLayer(nn.Module, LoRALayer):
    """A LoRA layer that eval() merges and train() unmerges, if merge_weights is True.

    Merging puts a parameter of the layer's own in the place of the base weight, which is kept aside and never written:
    unmerging restores its every bit, and modules that share it never see the adapter. state_dict() holds the base in
    either mode; casting, moving and loading act on the base and the adapter, and merge anew. So does the next forward
    after any of the three was replaced or changed in place while merged, as far as torch counts such changes (it does
    not see what is written through .data).

    merged_base_device: where the base is kept while merged; None leaves it where it is, at the cost of a second weight
        there. With a device, the base parameter's storage is moved: not for a weight that other modules share.
    """

    merged_base_device: torch.device | str | int | None = None
    scaling: float

    def _init_lora(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha is {lora_alpha}; expected a finite number.")
        self._kept: _Kept | None = None
        self._merge_after_loading = False
        self.register_state_dict_post_hook(_save_base)
        self.register_load_state_dict_post_hook(_merge_again)

    def _init_adapter(
        self, lora_A: tuple[int, int], lora_B: tuple[int, int], adapter_dtype: torch.dtype | None
    ) -> None:
        """Makes zero parameters of these shapes on the weight's device, and freezes the weight."""
        weight = self._owner().weight
        adapter_dtype = adapter_dtype or weight.dtype
        if adapter_dtype != weight.dtype and (adapter_dtype != torch.float32 or weight.dtype.itemsize != 2):
            raise ValueError(
                f"adapter_dtype is {adapter_dtype}; expected {weight.dtype}, the base's, or torch.float32 beside a "
                "half-precision base."
            )
        self.lora_A = nn.Parameter(weight.new_zeros(lora_A, dtype=adapter_dtype))
        self.lora_B = nn.Parameter(weight.new_zeros(lora_B, dtype=adapter_dtype))
        self.scaling = self.lora_alpha / self.r
        weight.requires_grad = False

    def _owner(self) -> Any:
        """The module whose `weight` the adapter belongs to."""
        return self

    @property
    def _has_adapter(self) -> bool:
        return "lora_A" in self._parameters

    @property
    def base_weight(self) -> nn.Parameter:
        """The weight without the adapter, whether or not the layer is merged."""
        weight: nn.Parameter = self._kept.base if self._kept else self._owner().weight
        return weight

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """A new tensor: the base weight with the adapter, summed in float32 and rounded once to the base's dtype."""
        base = self.base_weight.detach().to(self._owner().weight.device)
        return self._with_adapter(base) if self._has_adapter else base.clone()

    def _with_adapter(self, base: Tensor) -> Tensor:
        raise NotImplementedError

    def train(self: _Self, mode: bool = True) -> _Self:
        """Sets the mode; with merge_weights, train(False) merges the adapter and train(True) takes it out again."""
        super().train(mode)
        if self.merge_weights and mode == self.merged:
            self._unmerge() if mode else self._merge()
        return self

    # Leaving inference mode, since eval() called there shall not make an inference tensor of the weight.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _merge(self) -> None:
        if self._has_adapter:
            owner, base = self._owner(), self.base_weight
            owner.weight = nn.Parameter(self.merged_weight(), requires_grad=base.requires_grad)
            if self.merged_base_device is not None:
                base.data = base.data.to(self.merged_base_device)
            self._kept = _Kept(base, base.requires_grad, self._versions(base))
        self.merged = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def _unmerge(self) -> None:
        if self._kept is not None:
            owner, base = self._owner(), self._kept.base
            if base.device != owner.weight.device:
                base.data = base.data.to(owner.weight.device)
            if owner.weight.requires_grad != self._kept.requires_grad:
                base.requires_grad = owner.weight.requires_grad
            owner.weight, self._kept = base, None
        self.merged = False

    def _versions(self, base: Tensor) -> tuple[tuple[int, int], ...]:
        """Where each of the merged tensors is, and how often it has changed in place; of inference tensors torch keeps
        no count."""
        tensors = (base, self.lora_A, self.lora_B)
        return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)

    def _check_merged(self) -> None:
        """Before a merged forward: merges anew what has changed since, and warns if a gradient would be missing."""
        if self._kept is None or torch.compiler.is_compiling():
            return
        versions = self._versions(self._kept.base)
        if versions != self._kept.versions:
            with torch.no_grad():
                self._owner().weight.copy_(self.merged_weight())
            self._kept.versions = versions
        if not torch.is_grad_enabled():
            return
        if self.lora_A.requires_grad or self.lora_B.requires_grad or self._owner().weight.requires_grad:
            warnings.warn(
                "A merged fused_lora layer (eval mode) gives lora_A, lora_B and the base weight no gradient; call "
                "train(), build it with merge_weights=False, or evaluate under torch.no_grad().",
                stacklevel=5,
            )

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        was_merged = self.merged
        if was_merged:
            self._unmerge()
        super()._apply(fn, recurse)
        if was_merged:
            self._merge()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        self._merge_after_loading = self.merged
        if self.merged:
            self._unmerge()
        has_base = any(prefix + name in state_dict for name in ("weight", "conv.weight"))
        has_adapter = any(key.startswith(prefix + "lora_") for key in state_dict)
        already_missing = len(missing_keys)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        if has_base and not has_adapter:
            # The checkpoint is of the model before it had adapters: this layer's may be missing, nothing else.
            adapter = (prefix + "lora_A", prefix + "lora_B")
            missing_keys[already_missing:] = [key for key in missing_keys[already_missing:] if key not in adapter]


def _save_base(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    assert isinstance(module, MergingLayer)
    if module._kept is not None:
        key = prefix + ("weight" if module._owner() is module else "conv.weight")
        base = module._kept.base
        state_dict[key] = base if isinstance(state_dict[key], nn.Parameter) else base.detach()


def _merge_again(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, MergingLayer)
    if module._merge_after_loading:
        module._merge_after_loading = False
        module._merge()
