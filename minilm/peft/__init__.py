"""Parameter-efficient fine-tuning: few new parameters on a frozen model.

merge_lora, unmerge_lora and unload_lora work for the adapters of any method.
"""

from minilm.peft.adapted import merge as merge_lora
from minilm.peft.adapted import trainable_parameters, use_adapter
from minilm.peft.adapted import unload as unload_lora
from minilm.peft.adapted import unmerge as unmerge_lora
from minilm.peft.ia3 import add_ia3
from minilm.peft.lora import add_lora
from minilm.peft.requantize import requantize_lora
from minilm.peft.retrained import retrain

__all__ = [
    "add_ia3", "add_lora", "merge_lora", "requantize_lora", "retrain", "trainable_parameters",
    "unload_lora", "unmerge_lora", "use_adapter",
]
