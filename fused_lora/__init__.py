"""LoRA layers whose forward and backward are fused Triton kernels, with loralib's interface."""

from . import functional
from .adapter_file import AdapterConfig, adapter_configs, load_adapter, save_adapter
from .dispatch import Choice, count_paths, explain, use_backend
from .layers import Conv1d, Conv2d, Conv3d, ConvLoRA, Embedding, Linear, LoRALayer, MergedLinear
from .state import lora_state_dict, mark_only_lora_as_trainable, merged_state_dict

__version__ = "0.1.0"

# loralib has it, too.
name = "lora"

__all__ = [
    "AdapterConfig",
    "Choice",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "adapter_configs",
    "count_paths",
    "explain",
    "functional",
    "load_adapter",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merged_state_dict",
    "save_adapter",
    "use_backend",
]
