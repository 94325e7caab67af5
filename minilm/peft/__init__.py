"""Parameter-efficient fine-tuning: few new parameters on a frozen model."""

from minilm.peft.lora import (
    add_lora,
    merge_lora,
    trainable_parameters,
    unload_lora,
    unmerge_lora,
    use_adapter,
)
from minilm.peft.requantize import requantize_lora

__all__ = [
    "add_lora", "merge_lora", "requantize_lora", "trainable_parameters", "unload_lora",
    "unmerge_lora", "use_adapter",
]
