"""Prefix tuning: keys and values in front of each layer's, which no text has.

Li & Liang 2021, arXiv:2101.00190, section 4; the LoRA paper calls it PrefixLayer. For the keys K
and values V of a layer, with p rows P_k and P_v of its own:

    attention(Q, [P_k; K], [P_v; V])                                          (3)

Nothing else is trained: 2 p K D numbers a layer. It adapts `model.front`, which gives the model a
cache that holds the rows, as if a text had been there; so attention joins them as it joins those of
earlier tokens, and neither it nor the model is changed. P_k gets no positions of any kind. GPT-3's
18.9M for p = 8 are the LoRA paper's L d (l_p + l_i) for 8 + 8; its table has 20.2M.

The paper trains a small table E, its P', and an MLP instead, which is steadier (section 4.3):

    [P_k; P_v] = MLP(E) = tanh(E W^T + b) W_i^T + b_i      for layer i,  E (p, C), W (h, C)

After training only the rows are kept: `settle_prefix`.

He et al. 2022, arXiv:2110.04366, section 3.1: each head then gives

    (1 - g) attention(Q, K, V) + g attention(Q, P_k, P_v)

with g the share of the softmax that the prefix has. g > 0 for any rows, so none are the identity.
"""

import numpy as np

from minilm import ops
from minilm.backend import array_module
from minilm.cache import Cache, for_rows
from minilm.graph import no_dropout
from minilm.nn import Module, normal, parameter
from minilm.peft.adapted import FRONT, Adapter, adapted_layers, placed
from minilm.peft.front import length_and_ids, put_in_front, seen
from minilm.ranges import check, whole
from minilm.rope import rotary_tables
from minilm.tensor import Tensor, no_grad
from minilm.transformer import Front, Transformer


class Rows(Module):
    """One layer's k and v, P_k and P_v of the paper: (1, K, p, D) each."""

    tokenwise = True

    def __init__(self, k, v):
        self.k, self.v = Tensor(k, requires_grad=True), Tensor(v, requires_grad=True)


class Projection(Module):
    """One layer's end of the MLP: (1, p, h) -> its k and v, (1, K, p, D) each."""

    tokenwise = True

    def __init__(self, h, width, rng):
        self.W_k, self.b_k = normal(rng, (width, h), 0.02), parameter(np.zeros(width))
        self.W_v, self.b_v = normal(rng, (width, h), 0.02), parameter(np.zeros(width))

    def forward(self, x, heads):
        return (ops.split_heads(ops.linear(x, self.W_k, self.b_k), heads),
                ops.split_heads(ops.linear(x, self.W_v, self.b_v), heads))


class Projected(Module):
    """The rows of all layers from a table E (p, C) and an MLP."""

    tokenwise = True

    def __init__(self, c, p, h, rng):
        self.E, self.heads = normal(rng, (p, c.width), 1.0), c.kv_heads
        self.W, self.b = normal(rng, (h, c.width), 0.02), parameter(np.zeros(h))
        self.ends = [Projection(h, c.kv_heads * c.D, rng) for _ in range(c.layers)]

    def forward(self):
        x = ops.tanh(ops.linear(self.E[None], self.W, self.b))  # (1, p, h)
        return [end(x, self.heads) for end in self.ends]


class Prefix(Adapter):
    """Every layer's Rows, or a Projected that makes them."""

    tokenwise = anywhere = True

    def __init__(self, layers: list[Rows], mlp: Projected | None = None):
        self.layers, self.mlp = layers, mlp

    @property
    def length(self) -> int:
        return len(self.mlp.E) if self.mlp else self.layers[0].k.shape[2]

    def pairs(self):
        """(k, v) for each layer."""
        return self.mlp() if self.mlp else [(m.k, m.v) for m in self.layers]

    def forward(self, model, tokens, mask, cache, segments, base):  # (B, T) -> (B, T, C)
        p, mask = self.length, seen(mask, self.length, tokens, cache)
        if cache and cache.length:
            return base(model, tokens, mask, cache, segments)
        x, angles = model.embedded(tokens, p, segments), None
        if cache:
            for layer, (k, v) in zip(cache.layers, self.pairs()):
                # k itself may require a gradient inside no_grad() too; k[:] may not
                layer.append(for_rows(k[:], len(x)), for_rows(v[:], len(x)))
            cache.length = p
        if not model.position:
            places = array_module(x.data).arange(p, p + x.shape[1])
            angles = rotary_tables(model.config, places, x.dtype)
        return model.run(x, mask, angles, cache or Cache.of(self.pairs()))

    def settle(self):
        """Keep what the MLP gives, and forget the MLP."""
        acts = self.resting is None
        self.activate(True)
        with no_grad():
            xp = array_module(self.mlp.E.data)
            self.layers = [Rows(*(xp.ascontiguousarray(t.data) for t in pair))
                           for pair in self.mlp()]
        self.mlp = None
        self.activate(acts)


def add_prefix(model: Transformer, length: int | None = None, ids=None, hidden: int | None = None,
               name: str = "default", seed: int = 0) -> Transformer:
    """Freeze the model, and put trained keys and values in front of each layer's; returns it.

    length: p. ids (n,): tokens whose keys and values they start as, as the model has them now for
    this text; repeated or cut to p, which is n by default. Without ids they are random. hidden: h
    of an MLP that makes them, until settle_prefix; it cannot start from ids. The rows act together
    with the layers' adapters of the same name. ValueError if p rows leave no room for a text, for
    bad ids or hidden, if the name is taken, and while an adapter is merged; the model is then as it
    was.

    >>> from minilm.transformer import Config
    >>> model = Transformer(Config.gpt2(vocab_size=50, context=16, layers=2, heads=2, width=8))
    >>> model = add_prefix(model, 5)
    >>> [(path, p.shape) for path, p in model.named_parameters()][:1], model.room
    ([('front.adapters.default.layers.0.k', (1, 2, 5, 4))], 11)
    """
    p, ids = length_and_ids(model, length, ids)
    c, rng = model.config, np.random.default_rng(seed)
    if hidden is not None:
        check({"hidden": whole(1)}, hidden=hidden)
        if ids is not None:
            raise ValueError(f"hidden={hidden}: an MLP cannot start from ids")
        mlp = Projected(c, p, hidden, rng)
        for _, t in mlp.named_tensors():
            t.become(placed(model, t.data))
        return put_in_front(model, name, Prefix([], mlp))
    if ids is None:
        shape = 1, c.kv_heads, p, c.D
        pairs = [[0.02 * rng.standard_normal(shape) for _ in "kv"] for _ in range(c.layers)]
    else:
        cache = Cache.empty(model)
        with no_grad(), no_dropout():
            Front()(model, ids[None], cache=cache)
        pairs = [(layer.k[:, :, :p], layer.v[:, :, :p]) for layer in cache.layers]
    return put_in_front(model, name, Prefix(
        [Rows(placed(model, k), placed(model, v)) for k, v in pairs]))


def settle_prefix(model: Transformer, name: str = "default") -> Transformer:
    """Put what a prefix's MLP gives in the place of the MLP: the same function; returns the model.

    The rows are new parameters: make the optimizer after this. ValueError if there is no prefix of
    this name with an MLP.
    """
    slot = adapted_layers(model).get(FRONT)
    adapter = slot and slot.adapters.get(name)
    if type(adapter) is not Prefix or not adapter.mlp:
        raise ValueError(f"there is no prefix {name!r} with an MLP")
    adapter.settle()
    return model
