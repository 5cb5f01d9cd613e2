"""The names that users of `from loralib import utils` expect; they live in state.py."""

from .state import lora_state_dict, mark_only_lora_as_trainable

__all__ = ["lora_state_dict", "mark_only_lora_as_trainable"]
