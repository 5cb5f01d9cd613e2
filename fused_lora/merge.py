"""Exact merging: how a layer takes its adapter into its weight and gives the base weight back, bit for bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .base import LoRALayer, as_number

_Self = TypeVar("_Self", bound="MergingLayer")
_BASE, _MERGED = "The base weight", "weight"


@dataclass
class _Source:
    """A tensor that was merged, and how many changes in place torch had counted by then."""

    name: str
    tensor: Tensor
    version: int


@dataclass
class _Kept:
    """What a merged layer keeps: the base, the parameter made for its place, and what that was made of.

    sources: what must not change while merged, that parameter among it. grad: the base's when it was merged.
    """

    base: nn.Parameter
    merged: nn.Parameter
    requires_grad: bool
    scaling: float
    sources: tuple[_Source, ...]
    grad: Tensor | None = None

    def changed(self, name: str) -> bool:
        """Whether the source of that name has changed since."""
        return any(source.name == name and source.tensor._version != source.version for source in self.sources)

    # A copy's tensors count from elsewhere, but the copy has missed the same changes.
    def __getstate__(self) -> tuple[Any, ...]:
        missed = [(source.name, source.tensor, source.tensor._version - source.version) for source in self.sources]
        return self.base, self.merged, self.requires_grad, self.scaling, missed

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.base, self.merged, self.requires_grad, self.scaling, missed = state
        self.sources = tuple(_Source(name, t, t._version - n) for name, t, n in missed if not t.is_inference())
        # Copies of parameters have none.
        self.grad = None


class MergingLayer(nn.Module, LoRALayer):
    """A LoRA layer that eval() merges and train() unmerges, if merge_weights is True.

    Merging puts a parameter of the layer's own in the place of the base weight, which is kept aside and never written:
    unmerging restores its every bit, and modules that share it never see the adapter. state_dict() holds the base in
    either mode; casting, moving and loading act on the base and the adapter, and merge anew, into the same parameter
    and storage unless dtype, device or strides are new ones: CUDA graphs and compiled code follow, as does a module
    that was given the merged parameter.

    A merged layer takes a new adapter by `load_adapter`, or by eval() once more after lora_A and lora_B were changed or
    replaced, or the scaling was. Until then its forward raises RuntimeError, as it does where its weight was replaced
    or written; a base that changed, which others may share, it merges anew by itself. This costs a comparison of
    version counters and has their limits: compiled code and graph replays do not look, and torch counts neither what is
    done through .data nor changes of inference tensors, after which train() and eval() merge. What was written to a
    merged weight, or put in its place, is dropped by the next train() or merge, with a warning.

    The merged parameter shares the base's gradient: what clears or fills it while merged does so for the base.

    merged_base_device: where the base is kept while merged; None leaves it where it is, at the cost of a second weight
        there. With a device, the base parameter's storage is moved: not for a weight that other modules share.
    """

    merged_base_device: torch.device | str | int | None = None
    scaling: float
    # Not whether lora_A is among the parameters: a parametrization, or FSDP's flat one, takes it from there.
    _has_adapter = False

    def _init_lora(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if not math.isfinite(as_number(lora_alpha)):
            raise ValueError(f"lora_alpha is {lora_alpha!r}; expected a finite number.")
        self._kept: _Kept | None = None
        self._merged_before_loading: _Kept | None = None
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
        self._has_adapter = True
        self.scaling = self.lora_alpha / self.r
        weight.requires_grad = False

    def _refuse_to_draw_merged(self) -> None:
        """What was drawn for a merged weight would be gone with the next train()."""
        # nn.Module's constructors draw before there is anything to merge.
        if getattr(self, "_kept", None) is not None:
            raise RuntimeError("reset_parameters() was called of a merged layer; expected train() first.")

    def _owner(self) -> Any:
        """The module whose `weight` the adapter belongs to."""
        return self

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
        """Sets the mode; with merge_weights, train(False) merges the adapter and train(True) takes it out again.

        train(False) of a merged layer merges anew if lora_A, lora_B or the base changed.
        """
        super().train(mode)
        if self.merge_weights and mode == self.merged:
            self._unmerge() if mode else self._merge()
        elif not mode:
            self._merge_changes()
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """nn.Module's; of a merged layer, a new lora_A or lora_B counts as changed."""
        super().register_parameter(name, param)
        if name in ("lora_A", "lora_B") and self._kept is not None:
            # No tensor's version is negative.
            self._kept.sources = (_Source(name, self._kept.merged, -1), *self._kept.sources)

    # Leaving inference mode, since eval() called there shall not make an inference tensor of the weight.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _merge(self, before: _Kept | None = None) -> None:
        """before: of an earlier merge, whose parameter is written if it is as a new one would be."""
        if self._has_adapter:
            owner = self._owner()
            self._refuse_parametrized(to_merge=True)
            base, weight = self.base_weight, self.merged_weight()
            merged = nn.Parameter(weight, requires_grad=base.requires_grad)
            if before is not None and _alike(before.merged, merged):
                merged = before.merged
                merged.copy_(weight)
                merged.requires_grad = base.requires_grad
            merged.grad = base.grad
            owner.weight = merged
            if self.merged_base_device is not None:
                base.data = base.data.to(self.merged_base_device)
            sources = (("lora_A", self.lora_A), ("lora_B", self.lora_B), (_BASE, base), (_MERGED, merged))
            counted = tuple(_Source(name, t, t._version) for name, t in sources if not t.is_inference())
            # A number: a Tensor that was changed in place would equal itself.
            self._kept = _Kept(base, merged, base.requires_grad, float(self.scaling), counted, base.grad)
        self.merged = True

    def _refuse_parametrized(self, *, to_merge: bool) -> None:
        """Raises RuntimeError for a weight, lora_A or lora_B that is no parameter of the layer's own.

        to_merge: also for views of FSDP's flat parameter, which may be read. Its use_orig_params leaves them there, and
        it would write the merge into that.
        """
        for name, of in (("weight", self._owner()), ("lora_A", self), ("lora_B", self)):
            parameter = of._parameters.get(name)
            if parameter is None or (to_merge and getattr(parameter, "_fsdp_flattened", False)):
                raise RuntimeError(
                    f"{name} is parametrized or sharded; expected a parameter of the layer's own, to be merged and "
                    "watched, or a layer with merge_weights=False."
                )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _unmerge(self) -> _Kept | None:
        before = self._kept
        if before is not None:
            owner, base = self._owner(), before.base
            if "weight" not in owner._parameters:
                raise RuntimeError(
                    "weight was parametrized or pruned while the layer is merged; expected train() before that."
                )
            weight = owner.weight
            if weight is not base and (weight is not before.merged or before.changed(_MERGED)):
                warnings.warn(
                    "weight was replaced or written while the layer was merged, and what was put there is dropped; "
                    "call train() before that, which puts the base weight in place.",
                    stacklevel=5,
                )
            if base.device != weight.device:
                base.data = base.data.to(weight.device)
            if weight.requires_grad != before.requires_grad:
                base.requires_grad = weight.requires_grad
            if base.grad is before.grad:
                base.grad = before.merged.grad
            # Shared no longer: torch.utils.swap_tensors refuses what has two owners.
            before.merged.grad = None
            owner.weight, self._kept = base, None
        self.merged = False
        return before

    def _merge_changes(self) -> None:
        """Merges a merged layer anew if what it was merged of has changed."""
        kept = self._kept
        if kept is None:
            return
        if kept.scaling != self.scaling or any(s.tensor._version != s.version for s in kept.sources):
            self._merge(self._unmerge())

    def _check_merged(self) -> None:
        """Before a merged forward: looks for changes since the merge, and warns if a gradient would be missing.

        Raises RuntimeError if lora_A, lora_B or the scaling changed, if the weight in place is not the merged one as it
        was made, or for anything while a CUDA graph is captured, which would hold the merge.
        """
        kept = self._kept
        if torch.compiler.is_compiling() or kept is None:
            return
        weight = self._owner()._parameters.get("weight")
        if weight is not kept.merged and _is_anothers(weight, kept):
            self._follow(_MERGED, kept.merged)
        if kept.scaling != self.scaling:
            self._follow("scaling", kept.merged)
        for source in kept.sources:
            if source.tensor._version != source.version:
                self._follow(source.name, kept.merged)
                break
        if not torch.is_grad_enabled():
            return
        if self.lora_A.requires_grad or self.lora_B.requires_grad or self._owner().weight.requires_grad:
            warnings.warn(
                "A merged fused_lora layer (eval mode) gives lora_A and lora_B no gradient, and the base weight's to "
                "the merged one; call train(), build it with merge_weights=False, or evaluate under torch.no_grad().",
                stacklevel=5,
            )

    def _follow(self, changed: str, merged: Tensor) -> None:
        if changed == _MERGED:
            raise RuntimeError(
                "weight was replaced or written while the layer is merged, and may lack the adapter; expected train() "
                "before that, which puts the base weight in place."
            )
        captured = _captured(merged)
        if changed != _BASE or captured:
            raise RuntimeError(
                f"{changed} was changed while the layer is merged, and its weight has not taken the change; expected "
                "load_adapter, or eval() after the change, which merges anew."
            )
        self._merge_changes()

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        was_merged = self.merged
        before = self._unmerge()
        super()._apply(fn, recurse)
        if was_merged:
            self._merge(before)
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
        if self._kept is not None:
            self._merged_before_loading = self._unmerge()
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
    before, module._merged_before_loading = module._merged_before_loading, None
    if before is not None:
        module._merge(before)


def _is_anothers(weight: Tensor | None, kept: _Kept) -> bool:
    """Whether a weight that is not the merged parameter was put there as the base, rather than made of the merged one.

    As a functional call's may be, or a replica's. None is a parametrization's, or a replica's of torch's DataParallel.
    A copy of the base is known by its values, where they may be read.
    """
    if isinstance(weight, nn.Parameter):
        return True
    if type(weight) is not Tensor or torch._C._are_functorch_transforms_active():
        return False
    if weight.numel() == 0 or weight.device.type == "meta":
        return False
    if weight.data_ptr() == kept.base.data_ptr():
        return True
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None or _captured(weight):
        return False
    base, merged = (t.detach().to(weight) for t in (kept.base, kept.merged))
    return torch.equal(weight, base) and not torch.equal(weight, merged)


def _captured(tensor: Tensor) -> bool:
    """Whether what is done with it now becomes a CUDA graph's."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether a's storage can take b."""
    return not a.is_inference() and (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
