"""Parameter-efficient fine-tuning: few new parameters on a frozen model.

merge_lora, unmerge_lora and unload_lora work for the adapters of any method.
"""

from minilm.peft.adalora import Orthogonal, add_adalora
from minilm.peft.adapted import merge as merge_lora
from minilm.peft.adapted import trainable_parameters, use_adapter
from minilm.peft.adapted import unload as unload_lora
from minilm.peft.adapted import unmerge as unmerge_lora
from minilm.peft.bitfit import add_bitfit
from minilm.peft.bottleneck import add_bottleneck
from minilm.peft.budget import Budget
from minilm.peft.dora import add_dora
from minilm.peft.ia3 import add_ia3
from minilm.peft.lora import add_lora
from minilm.peft.prefix import add_prefix, settle_prefix
from minilm.peft.prompt import add_prompt
from minilm.peft.requantize import requantize_lora
from minilm.peft.retrained import retrain
from minilm.peft.subspace import add_subspace, degrees_of_freedom, subspace_of
from minilm.peft.top import train_top

__all__ = [
    "Budget", "Orthogonal", "add_adalora", "add_bitfit", "add_bottleneck", "add_dora", "add_ia3",
    "add_lora", "add_prefix", "add_prompt", "add_subspace", "degrees_of_freedom", "merge_lora",
    "requantize_lora", "retrain", "settle_prefix", "subspace_of", "train_top",
    "trainable_parameters", "unload_lora", "unmerge_lora", "use_adapter",
]
