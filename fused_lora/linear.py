"""`Linear` and `MergedLinear`, loralib's LoRA linear layers on the fused op."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import dispatch
from .base import dropout_in_force
from .functional import effective_weight, invariant_linear, lora_linear
from .merge import MergingLayer


class _SlicedLinear(MergingLayer, nn.Linear):
    """A linear layer with an adapter for each enabled one of equal slices of its output features."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        enable_lora: Sequence[bool],
        fan_in_fan_out: bool,
        merge_weights: bool,
        *,
        bias: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._init_lora(r, lora_alpha, lora_dropout, merge_weights)
        if not isinstance(enable_lora, Iterable):
            raise ValueError(f"enable_lora is {enable_lora!r}; expected one bool for each slice.")
        self._slices = tuple(bool(enabled) for enabled in enable_lora)
        if not self._slices or out_features % len(self._slices) != 0:
            raise ValueError(
                f"enable_lora has length {len(self._slices)}; expected a divisor of out_features, {out_features}."
            )
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T
        enabled = sum(self._slices)
        if self.r > 0 and enabled > 0:
            rows = out_features // len(self._slices) * enabled
            self._init_adapter((self.r * enabled, in_features), (rows, self.r), adapter_dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight, bias and lora_A anew from torch's default generator, in loralib's order; lora_B is zero."""
        self._refuse_to_draw_merged()
        # nn.Linear's constructor calls this too, before the attributes below exist; loralib draws twice as well.
        fan_in_fan_out = getattr(self, "fan_in_fan_out", False)
        nn.init.kaiming_uniform_(self.weight.T if fan_in_fan_out else self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0
            nn.init.uniform_(self.bias, -bound, bound)
        if self._has_adapter:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) to (..., out_features), in x's dtype; see `functional.lora_linear` for the errors."""
        if self.merged or not self._has_adapter:
            self._check_merged()
            linear = invariant_linear if dispatch.invariant_blocks else F.linear
            return linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
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
            enable_lora=self._slices,
        )

    def _with_adapter(self, base: Tensor) -> Tensor:
        slices = list((base.T if self.fan_in_fan_out else base).tensor_split(len(self._slices)))
        enabled = [s for s, on in enumerate(self._slices) if on]
        for e, s in enumerate(enabled):
            lora_A, lora_B = (t.tensor_split(len(enabled))[e] for t in (self.lora_A, self.lora_B))
            slices[s] = effective_weight(slices[s], lora_A, lora_B, scaling=self.scaling)
        merged = slices[0] if len(enabled) == len(slices) == 1 else torch.cat(slices)
        return merged.T if self.fan_in_fan_out else merged

    def extra_repr(self) -> str:
        extra = f", r={self.r}, lora_alpha={self.lora_alpha}" if self._has_adapter else ""
        return super().extra_repr() + extra


class Linear(_SlicedLinear):
    """nn.Linear with a LoRA adapter: y = x Wᵀ + bias + lora_alpha / r · (dropout(x) Aᵀ) Bᵀ.

    Parameters: weight (out_features, in_features), or transposed if fan_in_fan_out, frozen if r > 0; bias
    (out_features,), trainable until `mark_only_lora_as_trainable` says otherwise; lora_A (r, in_features), Kaiming
    uniform; lora_B (out_features, r), zeros. The same torch seed gives the tensors that loralib.Linear would hold.

    r: rank; 0 is a plain nn.Linear. lora_alpha: scaling is lora_alpha / r. lora_dropout: probability in [0, 1].
    fan_in_fan_out: store the weight as (in_features, out_features), as GPT-2's Conv1D does.
    merge_weights: eval() merges the adapter into the weight and train() gives the base weight back, bit for bit; see
        `MergingLayer`.
    adapter_dtype: dtype of lora_A and lora_B; None is the base's. float32 beside a half-precision base is supported.

    The interface is loralib's (github.com/microsoft/LoRA). Raises ValueError for an r that is not an integer of 0 or
    more, a lora_dropout outside [0, 1] or a lora_alpha that is not a finite number.
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
        super().__init__(
            in_features,
            out_features,
            r,
            lora_alpha,
            lora_dropout,
            (True,),
            fan_in_fan_out,
            merge_weights,
            bias=bias,
            device=device,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
        )


class MergedLinear(_SlicedLinear):
    """nn.Linear whose output is cut into equal slices, some with a LoRA adapter of their own, as a stacked QKV has.

    Parameters: weight and bias as `Linear`'s, the weight frozen if there is an adapter; lora_A (r * n, in_features),
    Kaiming uniform over the whole; lora_B (out_features / len(enable_lora) * n, r), zeros, for n enabled slices. The
    i-th enabled slice gains lora_alpha / r · (dropout(x) A_iᵀ) B_iᵀ with the i-th parts of both. The same torch seed
    gives the tensors that loralib.MergedLinear would hold.

    enable_lora: which slices have an adapter; its length divides out_features. With none, as by default, or with
        r = 0, this is a plain nn.Linear.
    The other arguments are `Linear`'s. lora_ind: bool (out_features,), which outputs have an adapter.

    The interface is loralib's. Raises ValueError as `Linear` does, and for an enable_lora of another length.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            r,
            lora_alpha,
            lora_dropout,
            enable_lora,
            fan_in_fan_out,
            merge_weights,
            bias=bias,
            device=device,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
        )

    @property
    def enable_lora(self) -> list[bool]:
        """Which slices have an adapter; a copy."""
        return list(self._slices)

    @property
    def lora_ind(self) -> Tensor:
        """bool (out_features,), on the weight's device: which outputs have an adapter."""
        slices = torch.tensor(self._slices, device=self.weight.device)
        return slices.repeat_interleave(self.out_features // len(self._slices))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, enable_lora={self.enable_lora}"
