"""Parameter-efficient fine-tuning: one file a method."""

from minilm.peft.lora import (
    add_lora,
    merge_lora,
    requantize_lora,
    trainable_parameters,
    unload_lora,
    unmerge_lora,
    use_adapter,
)

__all__ = [
    "add_lora", "merge_lora", "requantize_lora", "trainable_parameters", "unload_lora",
    "unmerge_lora", "use_adapter",
]
