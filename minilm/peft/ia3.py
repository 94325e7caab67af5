"""IA3: learned vectors that make keys, values and the MLP's inner activations larger or smaller.

Liu et al. 2022, arXiv:2205.05638, section 3.3. The vectors l_k, l_v and l_ff start as ones:

    softmax(Q (l_k * K)^T / sqrt(d_k)) (l_v * V)                  attention
    (l_ff * gamma(W1 x)) W2                                       MLP

    l_k, l_v    scale the outputs of the layers k and v: l * (W x + b), before rotary positions
    l_ff        scales the input of `down`, the paper's W2: W (l * x) + b

Nothing else is trained. A block has one number for each output of k and of v, and one for each
inner feature of its MLP. Merging scales the rows of W and b by l_k and l_v, and the columns of W by
l_ff.

Left out: the paper's two losses beside cross-entropy, for wrong and for short answers.
"""

import numpy as np

from minilm.arrays import one_dtype
from minilm.nn import Linear, Module
from minilm.peft.adapted import Adapter, chosen, ends_with, insert_adapters, placed, words
from minilm.tensor import Tensor


class IA3(Adapter):
    """One layer's l: (O,) scales its output, or with feedforward (I,) scales its input."""

    tokenwise = True

    def __init__(self, l, feedforward: bool = False):
        if l.ndim != 1:
            raise ValueError(f"l must be a vector, got {l.shape}")
        self.l, self.feedforward = Tensor(l, requires_grad=True), feedforward
        self.shape = (None, len(l)) if feedforward else (len(l), None)

    def forward(self, x, base):
        one_dtype("IA3", x=x, l=self.l)
        return base(x * self.l) if self.feedforward else base(x) * self.l

    def merged(self, base):
        plain, l = base.plain(), self.l.data
        W, b = plain.weight.data, plain.bias
        if self.feedforward:
            return Linear.of(Tensor((W * l).astype(l.dtype)), b)
        b = None if b is None else Tensor(b.data * l)
        return Linear.of(Tensor((W * l[:, None]).astype(l.dtype)), b)


def add_ia3(model: Module, targets=("k", "v", "down"), feedforward=("down",),
            name: str = "default") -> Module:
    """Freeze the model, and put a vector of ones on each target; returns the model.

    targets: last parts of layers' paths, or "all-linear", as in add_lora. feedforward: the targets
    whose input is scaled; of all others the output is. The newest adapter acts. ValueError if
    targets match nothing, if feedforward names none of them, if the name is taken, and while
    another adapter is merged; the model is then as it was.

    >>> from minilm.transformer import Config, Transformer
    >>> model = Transformer(Config.gpt2(vocab_size=50, context=16, layers=2, heads=2, width=8))
    >>> [(path, p.shape) for path, p in add_ia3(model, "down").named_parameters()][:1]
    [('blocks.0.mlp.down.adapters.default.l', (32,))]
    """
    bases = chosen(model, targets)
    feedforward = words("feedforward", feedforward)
    if wrong := [f for f in feedforward if not any(ends_with(path, f) for path in bases)]:
        raise ValueError(f"feedforward {wrong} names none of the targets {sorted(bases)}")
    adapters = {}
    for path, base in bases.items():
        O, I = base.weight.shape
        inner = any(ends_with(path, f) for f in feedforward)
        adapters[path] = IA3(placed(model, np.ones(I if inner else O)), inner)
    return insert_adapters(model, name, adapters)
