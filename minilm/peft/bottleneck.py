"""Bottleneck adapters: small MLPs with a residual connection, in the frozen model's blocks.

With m numbers in the middle, for W_down (m, C), W_up (C, m) and a nonlinearity f:

    A(h) = W_up f(W_down h + b_down) + b_up                                   (1)
    h + A(h)          in place of h                                           (2)

    H   Houlsby et al. 2019, arXiv:1902.00751: one on the output of attention and one on that of the
        MLP, in front of the residual additions. If asked for, the blocks' norms are trained too.
    P   Pfeiffer et al. 2020, arXiv:2005.00052: one a block, after the MLP. In a post-norm block,
        whose output is norm2(s) for a sum s, it is norm2(s + A(norm2(s))).
    L   Lin et al. 2020, arXiv:2004.03829: one a block, after the MLP. A LayerNorm of its own stands
        in front of W_down.

Of AdapterDrop (Rueckle et al. 2020, arXiv:2010.11918): the lowest n blocks have no adapter.

W_up and b_up start as zeros, so training starts from the model as it is. W_down is drawn from
N(0, 0.01^2). No linear layer computes eq. (2), so these adapters cannot be merged.

Left out: Houlsby's normal numbers in W_up too, and what he cuts off beyond two deviations. In L the
middle sees the MLP's output h; in Lin's paper it sees the sum of h and the residual stream.
"""

import numpy as np

from minilm import ops
from minilm.nn import LayerNorm, Module
from minilm.peft.adapted import (
    Adapter,
    insert_adapters,
    placed,
    require_transformer,
    unadapted,
)
from minilm.peft.retrained import retrained
from minilm.ranges import check, one_of, whole
from minilm.tensor import Tensor

NONLINEAR = {"relu": ops.relu, "gelu": ops.gelu, "silu": ops.silu}
BRANCHES = ("attention.o", "mlp.down")  # the last layers of a block's two residual branches


class Bottleneck(Adapter):
    """W_down (m, C), b_down (m,), W_up (C, m) and b_up (C,) behind one layer.

    activation: f, one of relu, gelu and silu. norm: what stands in front of W_down, for form L.
    around: the layer is the norm of a post-norm block, which acts on the result, for form P.
    """

    tokenwise = True

    def __init__(self, W_down, b_down, W_up, b_up, activation: str = "relu",
                 norm: LayerNorm | None = None, around: bool = False):
        m, C = W_down.shape
        if W_up.shape != (C, m) or b_down.shape != (m,) or b_up.shape != (C,):
            raise ValueError(f"W_down {W_down.shape} goes with b_down {(m,)}, W_up {(C, m)} and "
                             f"b_up {(C,)}, got {b_down.shape}, {W_up.shape} and {b_up.shape}")
        check({"activation": one_of(*NONLINEAR)}, activation=activation)
        self.W_down, self.b_down, self.W_up, self.b_up = (
            Tensor(a, requires_grad=True) for a in (W_down, b_down, W_up, b_up))
        self.activation, self.norm, self.around = activation, norm, around
        self.shape, self.anywhere = (C, None), around

    def forward(self, x, base):  # (..., I) -> (..., C)
        h = base(x)
        return base(x + self.added(h)) if self.around else h + self.added(h)  # eq. (2)

    def added(self, h):  # (..., C) -> (..., C)
        """A(h)."""
        h = self.norm(h) if self.norm else h
        middle = NONLINEAR[self.activation](ops.linear(h, self.W_down, self.b_down))  # (..., m)
        return ops.linear(middle, self.W_up, self.b_up)  # eq. (1)


def add_bottleneck(model: Module, m: int, form: str = "H", skip: int = 0, norms: bool = False,
                   activation: str = "relu", name: str = "default", seed: int = 0) -> Module:
    """Freeze a Transformer, and put adapters of m numbers in its blocks; returns the model.

    form: "H", "P" or "L", see above. skip: the lowest blocks that get none. norms: train norm1 and
    norm2 of the others too; with form H only. activation: relu, gelu or silu. seed: of W_down. The
    newest adapter acts. ValueError for settings out of range, if the name is taken, and while
    another adapter is merged; the model is then as it was.

    >>> from minilm.transformer import Config, Transformer
    >>> model = Transformer(Config.gpt2(vocab_size=50, context=16, layers=2, heads=2, width=8))
    >>> model = add_bottleneck(model, m=3)
    >>> [name for name, _ in model.named_parameters()][:2]
    ['blocks.0.attention.o.adapters.default.W_down', 'blocks.0.attention.o.adapters.default.b_down']
    >>> sum(p.size for p in model.parameters())  # 2 blocks x 2 x (2 C m + m + C)
    236
    """
    adapters = bottlenecks(model, m, form, skip, norms, activation, seed)
    return insert_adapters(model, name, adapters)


def bottlenecks(model: Module, m: int, form: str = "H", skip: int = 0, norms: bool = False,
                activation: str = "relu", seed: int = 0) -> dict[str, Adapter]:
    """path -> adapter, for insert_adapters. Settings and errors are those of add_bottleneck."""
    require_transformer(model)
    layers, C = len(model.blocks), model.config.width
    check({"m": whole(1), "form": one_of("H", "P", "L"), "skip": whole(0, layers - 1),
           "activation": one_of(*NONLINEAR)}, m=m, form=form, skip=skip, activation=activation)
    if norms and form != "H":
        raise ValueError(f"norms are trained with form H, got form {form}")
    post_norm = form == "P" and not model.config.norm_first
    places = BRANCHES if form == "H" else ("norm2",) if post_norm else ("mlp.down",)
    bases, rng, adapters = unadapted(model), np.random.default_rng(seed), {}
    for i in range(skip, layers):
        for place in places:
            W_down = 0.01 * rng.standard_normal((m, C), dtype=np.float32)
            arrays = (placed(model, a) for a in (W_down, np.zeros(m), np.zeros((C, m)),
                                                 np.zeros(C)))
            norm = placed_norm(model, C) if form == "L" else None
            adapters[f"blocks.{i}.{place}"] = Bottleneck(*arrays, activation, norm, post_norm)
        for place in ("norm1", "norm2") if norms else ():
            adapters[f"blocks.{i}.{place}"] = retrained(bases[f"blocks.{i}.{place}"])
    return adapters


def placed_norm(model: Module, C: int) -> LayerNorm:
    """A new LayerNorm in the model's dtype, on its device."""
    norm = LayerNorm(C, 1e-5)
    for _, t in norm.named_tensors():
        t.become(placed(model, t.data))
    return norm
