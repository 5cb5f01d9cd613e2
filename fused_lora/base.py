"""What every LoRA layer has in common: the attributes that loralib gives it."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import nn


class LoRALayer:
    """The attributes that loralib gives its layers; a plain object that modules inherit beside their torch class.

    r: rank; 0 makes a plain layer. lora_alpha: scaling * r. lora_dropout: probability in [0, 1], held as an nn.Dropout
    (nn.Identity for 0, so that layers pickle). merge_weights: whether eval() merges. merged: whether the weight holds
    the adapter now.

    Raises ValueError for an r that is no integer or negative, or for anything but a probability in [0, 1].
    """

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        if not 0.0 <= as_number(lora_dropout) <= 1.0:
            raise ValueError(f"lora_dropout is {lora_dropout!r}; expected a probability in [0, 1].")
        self.r = as_count("r", r)
        self.lora_alpha = lora_alpha
        self.lora_dropout: nn.Module = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.merged = False
        self.merge_weights = merge_weights


def dropout_probability(lora_dropout: nn.Module) -> float:
    """The probability that a layer's lora_dropout module applies in training."""
    return lora_dropout.p if isinstance(lora_dropout, nn.Dropout) else 0.0


def dropout_in_force(lora_dropout: nn.Module) -> float:
    """The probability that a layer's lora_dropout module applies now; 0 in eval mode.

    Raises TypeError if somebody put another kind of module there.
    """
    if isinstance(lora_dropout, nn.Identity):
        return 0.0
    if type(lora_dropout) is not nn.Dropout:
        raise TypeError(f"lora_dropout is a {type(lora_dropout).__name__}; expected nn.Dropout or nn.Identity.")
    return lora_dropout.p if lora_dropout.training else 0.0


def as_count(name: str, value: Any, least: int = 0) -> int:
    """value as an int, whatever kind of integer it is; ValueError, naming it, for a bool, others and smaller ones."""
    try:
        count = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = least - 1
    if count < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of {least} or more.")
    return count


def as_number(value: Any) -> float:
    """value as a float; NaN, which lies in no range, where it is no number."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan
