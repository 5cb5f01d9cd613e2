"""The names that users of `from loralib import layers` expect; each lives in a module of its own."""

from .base import LoRALayer
from .conv import Conv1d, Conv2d, Conv3d, ConvLoRA
from .embedding import Embedding
from .linear import Linear, MergedLinear

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvLoRA", "Embedding", "Linear", "LoRALayer", "MergedLinear"]
