"""`Linear`, loralib's LoRA linear layer on the fused op."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import LoRALayer, dropout_in_force, merged_weight
from .functional import lora_linear


class Linear(nn.Linear, LoRALayer):
    """nn.Linear with a LoRA adapter: y = x Wᵀ + bias + lora_alpha / r · (dropout(x) Aᵀ) Bᵀ.

    Parameters: weight (out_features, in_features), or transposed if fan_in_fan_out, frozen if r > 0; bias
    (out_features,), trainable until `mark_only_lora_as_trainable` says otherwise; lora_A (r, in_features), Kaiming
    uniform; lora_B (out_features, r), zeros. The same torch seed gives the tensors that loralib.Linear would hold.

    r: rank; 0 is a plain nn.Linear. lora_alpha: scaling is lora_alpha / r. lora_dropout: probability in [0, 1].
    fan_in_fan_out: store the weight as (in_features, out_features), as GPT-2's Conv1D does.
    merge_weights: eval() adds the adapter to the weight and train() takes it away again; the base weight returns with
        the bits it had. While merged, a copy of the base is kept beside the weight, and state_dict() holds that copy.
    adapter_dtype: dtype of lora_A and lora_B; None is the base's. float32 beside a half-precision base is supported.

    The interface is loralib's (github.com/microsoft/LoRA). Raises ValueError for a negative r, a lora_dropout outside
    [0, 1] or a lora_alpha that is not finite.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=bias, device=device, dtype=dtype)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if not math.isfinite(lora_alpha):
            raise ValueError(f"lora_alpha is {lora_alpha}; expected a finite number.")
        self.fan_in_fan_out = fan_in_fan_out
        self._base_weight: Tensor | None = None
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T
        if r > 0:
            adapter_dtype = adapter_dtype or self.weight.dtype
            self.lora_A = nn.Parameter(self.weight.new_zeros((r, in_features), dtype=adapter_dtype))
            self.lora_B = nn.Parameter(self.weight.new_zeros((out_features, r), dtype=adapter_dtype))
            self.scaling = lora_alpha / r
            self.weight.requires_grad = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight, bias and lora_A anew from torch's default generator, in loralib's order; lora_B is zero."""
        # nn.Linear's constructor calls this too, before the attributes below exist; loralib draws twice as well.
        fan_in_fan_out = getattr(self, "fan_in_fan_out", False)
        nn.init.kaiming_uniform_(self.weight.T if fan_in_fan_out else self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0
            nn.init.uniform_(self.bias, -bound, bound)
        if hasattr(self, "lora_A"):
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) to (..., out_features), in x's dtype; see `functional.lora_linear` for the errors."""
        if self.r == 0 or self.merged:
            self._warn_if_training_merged()
            return F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        dropout_p = dropout_in_force(self.lora_dropout)
        return lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            bias=self.bias,
            scaling=self.scaling,
            dropout_p=dropout_p,
            training=dropout_p > 0,
            fan_in_fan_out=self.fan_in_fan_out,
        )

    def _warn_if_training_merged(self) -> None:
        if self.r == 0 or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self.lora_A.requires_grad or self.lora_B.requires_grad:
            warnings.warn(
                "A merged fused_lora layer (eval mode) gives lora_A and lora_B no gradient; call train(), build it "
                "with merge_weights=False, or evaluate under torch.no_grad().",
                stacklevel=4,
            )

    def train(self, mode: bool = True) -> Linear:
        """Sets the mode; with merge_weights, train(False) merges the adapter and train(True) takes it out again."""
        super().train(mode)
        if self.merge_weights and mode == self.merged:
            self._unmerge() if mode else self._merge()
        return self

    @torch.no_grad()
    def _merge(self) -> None:
        if self.r > 0:
            self._base_weight = self.weight.detach().clone()
            base = self._base_weight.T if self.fan_in_fan_out else self._base_weight
            merged = merged_weight(base, self.lora_A, self.lora_B, self.scaling)
            self.weight.copy_(merged.T if self.fan_in_fan_out else merged)
        self.merged = True

    @torch.no_grad()
    def _unmerge(self) -> None:
        if self._base_weight is not None:
            self.weight.copy_(self._base_weight)
            self._base_weight = None
        self.merged = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        # Casts and moves act on the base and the adapter; the merged weight is made anew from them.
        was_merged = self.merged
        if was_merged:
            self._unmerge()
        super()._apply(fn, recurse)
        if was_merged:
            self._merge()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base_weight is not None:
            destination[prefix + "weight"] = self._base_weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        was_merged = self.merged
        if was_merged:
            self._unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if was_merged:
            self._merge()

    def extra_repr(self) -> str:
        extra = f", r={self.r}, lora_alpha={self.lora_alpha}" if self.r > 0 else ""
        return super().extra_repr() + extra
