"""LoRA: a frozen weight plus a trained update of low rank.

Hu et al. 2021, arXiv:2106.09685, section 4.1, for W0 (O, I), A (r, I), B (O, r):

    h = W0 x + (alpha / r) B A x                                              (3)

A starts with normal numbers and B with zeros, so training starts from the model as it is. W0 gets
no gradient. Only A and B are trained: r (I + O) numbers instead of I O. Kalajdzievski 2023,
arXiv:2312.03732, shows that alpha / sqrt(r) keeps the update's size at any rank (rslora).

After merging, h = (W0 + (alpha / r) B A) x is one product again: see adapted.py, and requantize.py
for merging into codes.

The paper does not say how large A's numbers are. Here they are N(0, 1/I), so A x has x's size.
"""

import math

import numpy as np

from minilm.arrays import one_dtype, rows
from minilm.blas import matmul as product
from minilm.graph import once
from minilm.nn import Dropout, Linear, Module
from minilm.peft.adapted import Adapter, chosen, insert_adapters, placed
from minilm.peft.qlora import quantized_lora
from minilm.quantize.linear import QuantizedLinear
from minilm.ranges import BELOW_1, FINITE, check
from minilm.tensor import Tensor, op


@op
def add_low_rank(y, x, A, B, scale):  # (..., O), (..., I), (r, I), (O, r) -> (..., O)
    """y + scale x A^T B^T, for y = x W0^T: eq. (3), for x in rows. All have one dtype."""
    one_dtype("add_low_rank", y=y, x=x, A=A, B=B)
    lead, scale = x.shape[:-1], x.dtype.type(scale)
    h = product(rows(x), A.T) * scale  # (N, r)

    @once
    def dh(dy): return product(rows(dy), B) * scale  # before A: (N, r)
    def dx(dy): return product(dh(dy), A).reshape(*lead, -1)
    def dA(dy): return product(dh(dy).T, rows(x))
    def dB(dy): return product(rows(dy).T, h)
    z = product(h, B.T)
    z += rows(y)  # eq. (3)
    return z.reshape(*lead, -1), lambda dy: dy, dx, dA, dB


class LoRA(Adapter):
    """One layer's A (r, I) and B (O, r). The settings are those of add_lora."""

    tokenwise = True

    def __init__(self, A, B, alpha: float, dropout: float = 0.0, rslora: bool = False):
        if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1] or not len(A):
            raise ValueError(f"A must be (r, I) and B (O, r), got {A.shape} and {B.shape}")
        check({"alpha": FINITE, "dropout": BELOW_1}, alpha=alpha, dropout=dropout)
        if not isinstance(rslora, bool | np.bool_):
            raise TypeError(f"rslora must be True or False, got {rslora!r}")
        self.A, self.B = Tensor(A, requires_grad=True), Tensor(B, requires_grad=True)
        self.r, self.alpha, self.drop = len(A), alpha, Dropout(float(dropout))
        self.rslora = bool(rslora)
        self.scale = alpha / (math.sqrt(self.r) if rslora else self.r)
        self.shape = len(B), A.shape[1]

    def forward(self, x, base):
        return low_rank_beside(base, x, self.A, self.B, self.scale, self.drop)

    def merged(self, base):
        plain, update = base.plain(), self.update()
        return Linear.of(Tensor((plain.weight.data + update).astype(update.dtype)), plain.bias)

    def update(self):
        """(alpha / r) B A: (O, I)."""
        return product(self.B.data, self.A.data) * self.B.dtype.type(self.scale)


def low_rank_beside(base, x, A, B, scale: float, drop: Dropout):
    """Eq. (3) of a layer and an update: as one op if a quantized layer and A see the same x."""
    if type(base) is QuantizedLinear:
        # `is None`, since NumPy's float64 dtype == None is true
        same = base.compute_dtype is None or base.compute_dtype == x.dtype
        if same and base.threshold is None and not drop.acts:
            return quantized_lora(x, base.weight, A, B, base.bias, scale=scale)
    return add_low_rank(base(x), drop(x), A, B, scale=scale)


def add_lora(model: Module, r: int, alpha: float, targets=("q", "v"), dropout: float = 0.0,
             rslora: bool = False, name: str = "default", seed: int = 0) -> Module:
    """Freeze the model, and put an adapter of rank r on each target; returns the model.

    alpha: the update is scaled by alpha / r, with rslora by alpha / sqrt(r). targets: last parts of
    layers' paths, such as "q", "mlp.up" or "blocks.0.attention.q", or "all-linear" for all but the
    head. dropout: of A's input while training. seed: of A. A second adapter needs another name; the
    newest one acts. ValueError if targets match nothing, if r is below 1 or above a layer's size,
    if the name is taken, and while another adapter is merged; the model is then as it was.

    >>> from minilm.transformer import Config, Transformer
    >>> model = Transformer(Config.gpt2(vocab_size=50, context=16, layers=2, heads=2, width=8))
    >>> model = add_lora(model, r=2, alpha=4, targets=("q", "v"))
    >>> [name for name, _ in model.named_parameters()][:2]
    ['blocks.0.attention.q.adapters.default.A', 'blocks.0.attention.q.adapters.default.B']
    >>> sum(p.size for p in model.parameters())  # 2 blocks x 2 targets x r (I + O)
    128
    """
    bases, rng = chosen(model, targets), np.random.default_rng(seed)
    check_rank(bases, r)
    return insert_adapters(model, name, {
        path: LoRA(*first_numbers(model, base, r, rng), alpha, dropout, rslora)
        for path, base in bases.items()})


def check_rank(bases: dict, r: int):
    """ValueError if r is below 1 or above the size of one of the layers."""
    for path, base in bases.items():
        O, I = base.weight.shape
        if not isinstance(r, (int, np.integer)) or r is True or not 1 <= r <= min(I, O):
            raise ValueError(f"r must be 1 to {min(I, O)}, the size of {path} {O, I}; got {r!r}")


def first_numbers(model: Module, base, r: int, rng):
    """A layer's A, drawn from N(0, 1/I), and its B, zeros."""
    O, I = base.weight.shape
    A = rng.standard_normal((r, I), dtype=np.float32) / math.sqrt(I)
    return placed(model, A), placed(model, np.zeros((O, r)))
