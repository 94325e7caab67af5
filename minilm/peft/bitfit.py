"""BitFit: only the biases are trained.

Ben Zaken et al. 2021, arXiv:2106.10199, section 3. Every linear layer and every LayerNorm gets a
bias of its own, which starts as the model's; all else is frozen:

    h = W x + b'          in place of  W x + b
    h = g * xhat + b'     in place of  g * xhat + b

A GPT-2 of L blocks has 11 C L + C biases: 9 C in the linear layers of a block and 2 C in its norms,
and C in the last norm. Llama's layers have no biases, and its norms neither.

Left out: the paper's second form, which trains the biases of queries and of the MLP's inside alone.
"""

from minilm.nn import Module
from minilm.peft.adapted import insert_adapters, unadapted
from minilm.peft.retrained import retrained
from minilm.tensor import Tensor


def add_bitfit(model: Module, name: str = "default") -> Module:
    """Freeze the model, and give each layer that has a bias one that is trained; returns the model.

    The base keeps its own biases, so use_adapter, merge_lora and unload_lora work as for all
    methods. Merging is exact. ValueError if no layer has a bias, if the name is taken, and while
    another adapter is merged; the model is then as it was.

    >>> from minilm.transformer import Config, Transformer
    >>> model = Transformer(Config.gpt2(vocab_size=50, context=16, layers=2, heads=2, width=8))
    >>> sum(p.size for p in add_bitfit(model).parameters())  # 11 C L + C
    184
    """
    bases = unadapted(model)
    biased = {path: m for path, m in bases.items() if isinstance(getattr(m, "bias", None), Tensor)}
    if not biased:
        kinds = {type(m).__name__ for m in bases.values() if hasattr(m, "weight")}
        raise ValueError("BitFit trains biases, but no layer of this model has one "
                         f"({', '.join(sorted(kinds))}); "
                         "GPT-2 and BERT have them, a Llama only if it was made with them")
    return insert_adapters(model, name, {p: retrained(m, "bias") for p, m in biased.items()})
