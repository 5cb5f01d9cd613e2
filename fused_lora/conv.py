"""`Conv1d`, `Conv2d` and `Conv3d`, loralib's LoRA convolutions: torch's own over a weight that holds the adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .base import dropout_in_force
from .functional import effective_weight
from .merge import MergingLayer


class ConvLoRA(MergingLayer):
    """A convolution with a LoRA adapter: conv(x, W) + bias + lora_alpha / r · conv(dropout(x), B A).

    conv: the convolution, of class conv_module, with its weight (frozen if r > 0) and bias; `weight` and `bias` are
    short for conv.weight and conv.bias. For a kernel of sizes k0, k1, ...: lora_A (r * k0, in_channels * k1 * ...),
    Kaiming uniform, and lora_B (out_channels / groups * k0, r * k0), zeros; their product, in the order of its
    elements, has the weight's shape. For a square Conv2d these are loralib's shapes, and the same torch seed gives the
    tensors that loralib.Conv2d would hold.

    r: rank; 0 is the plain convolution. lora_alpha: scaling is lora_alpha / r. lora_dropout: probability in [0, 1] of
    dropping an element of the adapter's input, by torch's own masks; in force, it costs a second convolution, and
    without it there is one, whose weight is W + scaling · B A.
    merge_weights: eval() merges the adapter into conv.weight and train() gives the base weight back, bit for bit; see
        `MergingLayer`.
    adapter_dtype: dtype of lora_A and lora_B; None is the base's. The other keyword arguments are conv_module's.

    State dicts have loralib 0.1.2's keys: lora_A, lora_B, conv.weight, conv.bias. `weight` and `bias`, as loralib's
    main branch and a plain convolution have them, load as well. Raises ValueError as `Linear` does, and what
    conv_module raises.
    """

    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d

    def __init__(
        self,
        conv_module: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d],
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        *,
        adapter_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)  # type: ignore[arg-type]
        self._init_lora(r, lora_alpha, lora_dropout, merge_weights)
        if self.r > 0:
            first, *others = self.conv.kernel_size
            rows, ranks = out_channels // self.conv.groups * first, self.r * first
            self._init_adapter((ranks, in_channels * math.prod(others)), (rows, ranks), adapter_dtype)
        self.reset_parameters()

    def _owner(self) -> nn.Module:
        return self.conv

    @property
    def weight(self) -> Tensor:
        """conv.weight."""
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        """conv.bias."""
        return self.conv.bias

    def reset_parameters(self) -> None:
        """Draws conv's parameters and lora_A anew from torch's default generator, as loralib does; lora_B is zero."""
        self._refuse_to_draw_merged()
        self.conv.reset_parameters()
        if self._has_adapter:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x: as conv takes it. Raises what conv raises, and TypeError for dtypes that do not go together."""
        if self.merged or not self._has_adapter:
            self._check_merged()
            return self.conv(x)  # type: ignore[no-any-return]
        conv = self.conv
        if dropout_in_force(self.lora_dropout) == 0:
            return conv._conv_forward(x, self._with_adapter(conv.weight), conv.bias)  # type: ignore[no-any-return]
        update = self._with_adapter(torch.zeros_like(conv.weight, requires_grad=False))
        return conv(x) + conv._conv_forward(self.lora_dropout(x), update, None)  # type: ignore[no-any-return]

    def _with_adapter(self, base: Tensor) -> Tensor:
        return effective_weight(base, self.lora_A, self.lora_B, scaling=self.scaling)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                tensor = state_dict.pop(prefix + name)
                other = state_dict.setdefault(f"{prefix}conv.{name}", tensor)
                if not _same_bits(other, tensor):
                    error_msgs.append(f"{prefix}{name} and {prefix}conv.{name} differ; expected one tensor.")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}" if self._has_adapter else ""


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a is b or (a.is_meta and b.is_meta):
        return a.shape == b.shape
    a, b = (t.detach().cpu().contiguous() for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class Conv1d(ConvLoRA):
    """`ConvLoRA` over nn.Conv1d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """`ConvLoRA` over nn.Conv2d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """`ConvLoRA` over nn.Conv3d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)
