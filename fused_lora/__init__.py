"""LoRA layers whose forward and backward are fused Triton kernels, with loralib's interface."""

from . import functional
from .base import LoRALayer
from .dispatch import Choice, count_paths, explain, use_backend
from .linear import Linear
from .state import lora_state_dict, mark_only_lora_as_trainable

__version__ = "0.1.0"

__all__ = [
    "Choice",
    "Linear",
    "LoRALayer",
    "count_paths",
    "explain",
    "functional",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "use_backend",
]
