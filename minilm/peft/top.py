"""Fine-tuning of the top: only the last k blocks and the last norm are trained.

Lee et al. 2019, arXiv:1911.03090, and Li & Liang 2021, arXiv:2101.00190, whose FT-Top2 trains the
two last blocks. No adapter is put on the model: the trained tensors are its own. What lies below
gets no gradient, so the backward pass ends at the first trained block.

A tied head is the embedding, and stays frozen with it. So GPT-2 medium trains 25.19M numbers.
"""

from minilm.nn import Module
from minilm.peft.adapted import adapted_layers, require_transformer
from minilm.quantize.linear import QuantizedLinear
from minilm.ranges import check, whole


def train_top(model: Module, k: int) -> Module:
    """Freeze a Transformer but for its last k blocks and its last norm; returns the model.

    ValueError if there are no k blocks, if one of them is quantized, since codes have no gradients,
    and if the model has adapters; the model is then as it was.

    >>> from minilm.transformer import Config, Transformer
    >>> model = Transformer(Config.gpt2(vocab_size=50, context=16, layers=3, heads=2, width=8))
    >>> sum(p.size for p in train_top(model, 2).parameters())  # 2 (12 C^2 + 13 C) + 2 C
    1760
    """
    require_transformer(model)
    layers = len(model.blocks)
    check({"k": whole(1, layers)}, k=k)
    if adapted := list(adapted_layers(model)):
        raise ValueError(f"{adapted[0]} has adapters: unload_lora takes them off")
    for i in range(layers - k, layers):
        for path, m in model.blocks[i].named_modules():
            if type(m) is QuantizedLinear:
                raise ValueError(f"blocks.{i}.{path} is quantized, and codes cannot be trained: "
                                 f"give quantize_model skip=('head', 'blocks.{i}')")
    model.freeze()
    for part in filter(None, (*model.blocks[layers - k :], model.norm)):
        for _, t in part.named_tensors():
            t.become(t.data, requires_grad=True)
    return model
