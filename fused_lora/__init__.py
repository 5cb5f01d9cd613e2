"""LoRA layers whose forward and backward are fused Triton kernels, with loralib's interface."""

from . import functional
from .adapter import Adapter, AdapterLayer
from .adapter_file import AdapterConfig, adapter_configs, load_adapter, save_adapter
from .adapter_io import load_state_dict_from_safetensors, read_adapter, write_adapter
from .convert import Replaced, convert, unconvert
from .dispatch import Choice, batch_invariant, count_paths, use_backend
from .explanation import explain
from .flop_counts import flop_formulas
from .layers import Conv1d, Conv2d, Conv3d, ConvLoRA, Embedding, Linear, LoRALayer, MergedLinear
from .merge_file import merge_file
from .state import lora_state_dict, mark_only_lora_as_trainable, merged_state_dict
from .state_merge import merge_lora_into_state_dict, merge_report
from .summary import Summary, summary
from .warm import warmup

__version__ = "0.1.0"

# loralib has it, too.
name = "lora"

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterLayer",
    "Choice",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "Replaced",
    "Summary",
    "adapter_configs",
    "batch_invariant",
    "convert",
    "count_paths",
    "explain",
    "flop_formulas",
    "functional",
    "load_adapter",
    "load_state_dict_from_safetensors",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_file",
    "merge_lora_into_state_dict",
    "merge_report",
    "merged_state_dict",
    "read_adapter",
    "save_adapter",
    "summary",
    "unconvert",
    "use_backend",
    "warmup",
    "write_adapter",
]
