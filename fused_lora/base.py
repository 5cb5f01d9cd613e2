"""What every LoRA layer has in common: the attributes that loralib gives it."""

from __future__ import annotations

from torch import nn


class LoRALayer:
    """The attributes that loralib gives its layers; a plain object that modules inherit beside their torch class.

    r: rank; 0 makes a plain layer. lora_alpha: scaling * r. lora_dropout: probability in [0, 1], held as an nn.Dropout
    (nn.Identity for 0, so that layers pickle). merge_weights: whether eval() merges. merged: whether the weight holds
    the adapter now.

    Raises ValueError for a negative r or a probability outside [0, 1].
    """

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        if not isinstance(r, int) or r < 0:
            raise ValueError(f"r is {r}; expected an integer of 0 or more.")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(f"lora_dropout is {lora_dropout}; expected a probability in [0, 1].")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout: nn.Module = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.merged = False
        self.merge_weights = merge_weights


def dropout_in_force(lora_dropout: nn.Module) -> float:
    """The probability that a layer's lora_dropout module applies now; 0 in eval mode.

    Raises TypeError if somebody put another kind of module there.
    """
    if isinstance(lora_dropout, nn.Identity):
        return 0.0
    if type(lora_dropout) is not nn.Dropout:
        raise TypeError(f"lora_dropout is a {type(lora_dropout).__name__}; expected nn.Dropout or nn.Identity.")
    return lora_dropout.p if lora_dropout.training else 0.0
