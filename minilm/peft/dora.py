"""DoRA: the magnitude of each row of a weight and its direction are trained apart.

Liu et al. 2024, arXiv:2402.09353, section 4, for W0 (O, I), LoRA's A, B and scale s, m (O,):

    W' = m (W0 + s B A) / ||W0 + s B A||                                      (5)

The norm is taken of each row, the weights of one output: the paper writes W with outputs in
columns. m starts as ||W0|| and B as zeros, so training starts from the model as it is. In the
backward pass the norm counts as a constant (section 4.3), which saves its gradient.

Each forward pass makes W0 + s B A once to take its norm. On a quantized base (QDoRA) W0 is
dequantized for that. Merging writes W' into the weights, and what acts is one product again.

With dropout, W0 sees all of x, and A what is left of it. PEFT drops inputs of m W0 / ||..|| too.
"""

from copy import copy

import numpy as np

from minilm.arrays import one_dtype, row_dot, wide
from minilm.backend import array_module
from minilm.nn import Linear, Module
from minilm.peft.adapted import Adapter, chosen, insert_adapters
from minilm.peft.lora import LoRA, check_rank, first_numbers
from minilm.tensor import Tensor


class DoRA(Adapter):
    """One layer's m (O,), and LoRA's A (r, I) and B (O, r). The settings are those of add_lora."""

    tokenwise = True

    def __init__(self, lora: LoRA, m):
        if m.shape != (lora.shape[0],):
            raise ValueError(f"m must be {(lora.shape[0],)}, a number for each row of B, got "
                             f"{m.shape}")
        self.lora, self.m, self.shape = lora, Tensor(m, requires_grad=True), lora.shape

    def forward(self, x, base):
        one_dtype("DoRA", x=x, m=self.m)
        y = self.lora(x, without_bias(base)) * (self.m / self.norm(base))  # eq. (5)
        return y if base.bias is None else y + base.bias

    def merged(self, base):
        plain, direction = base.plain(), self.direction(base)
        W = direction * (self.m.data / self.norm(base))[:, None]
        return Linear.of(Tensor(W.astype(self.m.dtype)), plain.bias)

    def direction(self, base):
        """W0 + s B A, in at least float32: (O, I)."""
        return wide(base.plain().weight.data) + wide(self.lora.update())

    def norm(self, base):
        """||W0 + s B A||, of each row, in m's dtype: (O,)."""
        return norms(self.direction(base)).astype(self.m.dtype)


def add_dora(model: Module, r: int, alpha: float, targets=("q", "v"), dropout: float = 0.0,
             rslora: bool = False, name: str = "default", seed: int = 0) -> Module:
    """Freeze the model, and put an adapter of rank r on each target; returns the model.

    All settings are those of add_lora, and so are the errors. ValueError too if a row of a weight
    is zero: it has no direction. The model is then as it was.

    >>> from minilm.transformer import Config, Transformer
    >>> model = Transformer(Config.gpt2(vocab_size=50, context=16, layers=2, heads=2, width=8))
    >>> model = add_dora(model, r=2, alpha=4)
    >>> [name for name, _ in model.named_parameters()][:1]
    ['blocks.0.attention.q.adapters.default.m']
    >>> sum(p.size for p in model.parameters())  # 2 blocks x 2 targets x (r (I + O) + O)
    160
    """
    bases, rng, adapters = chosen(model, targets), np.random.default_rng(seed), {}
    check_rank(bases, r)
    for path, base in bases.items():
        lora = LoRA(*first_numbers(model, base, r, rng), alpha, dropout, rslora)
        adapters[path] = at_rest(lora, base)
        if empty := int((adapters[path].m.data == 0).sum()):
            raise ValueError(f"{empty} rows of {path} are zero, which have no direction")
    return insert_adapters(model, name, adapters)


def at_rest(lora: LoRA, base) -> DoRA:
    """The adapter with m = ||W0 + s B A||, which changes no magnitude."""
    adapter = DoRA(lora, lora.B.data[:, 0])
    adapter.m.become(adapter.norm(base))
    return adapter


def row_norms(base):
    """||W0||, of each row of a layer's weight, in at least float32: (O,)."""
    return norms(wide(base.plain().weight.data))


def norms(W):  # (O, I) -> (O,)
    return array_module(W).sqrt(row_dot(W, W))[:, 0]


def without_bias(base: Module) -> Module:
    """The layer W x in place of W x + b."""
    new = copy(base)
    new.bias = None
    return new
