"""T5: an encoder reads a text, and a decoder that looks at it writes another.

Raffel et al. 2020, arXiv:1910.10683, section 2.1. The blocks are pre-norm with RMSNorm and without
biases, and both stacks share one embedding. What differs from the Transformer beside this file:

    scores     q k^T + b, without 1 / sqrt(D): the initial q is so small that it needs none
    positions  b (H, T, S) is learned for each head and each bucket of distances; a stack has one
               table, which serves all its blocks. Near distances have buckets of their own, farther
               ones share them by their logarithm, and all from max_distance on share the last
    decoder    causal; between attention and MLP it attends to the encoder's rows, without b
    output     the rows times 1 / sqrt(C), then the embedding's transpose

T5 v1.1 and Flan-T5 have a gated MLP (GEGLU), and an output of their own that is not scaled. Left
out is dropout inside the MLP, of the attention's weights, and behind the last norm.

Shapes: B batch, T tokens, S keys, C width, H heads, D head width, V vocabulary. There is no largest
T: a distance of any size has its bucket.
"""

import math
from dataclasses import dataclass

import numpy as np

from minilm import ops
from minilm.backend import array_module
from minilm.inputs import seen
from minilm.nn import Dropout, Embedding, Linear, Module, RMSNorm
from minilm.ranges import AT_LEAST_0, BELOW_1, check, one_of, whole
from minilm.tensor import Tensor
from minilm.transformer import Ends, Front

SIZE = whole(1)._replace(words="positive")
SIZES = ("vocab_size", "layers", "decoder_layers", "heads", "width", "hidden", "head_width")
RANGES = dict.fromkeys(SIZES, SIZE) | {
    "buckets": whole(4), "max_distance": SIZE, "norm_eps": AT_LEAST_0, "start": whole(0),
    "activation": one_of("relu", "geglu_tanh"), "dropout": BELOW_1}


@dataclass(frozen=True)
class T5:
    """The facts of a T5. ValueError if one is impossible or two contradict each other.

    The defaults are v1.0's; v1.1 has activation="geglu_tanh", tied=False and scaled_head=False.
    """

    vocab_size: int
    layers: int  # of the encoder
    decoder_layers: int
    heads: int
    width: int
    hidden: int  # the width inside the MLP
    head_width: int
    buckets: int = 32  # of distances
    max_distance: int = 128
    norm_eps: float = 1e-6
    activation: str = "relu"  # or "geglu_tanh"
    tied: bool = True  # the head shares the embedding's weight
    scaled_head: bool = True  # the head's input is divided by sqrt(width)
    start: int = 0  # the token in front of what the decoder writes: T5's padding
    dropout: float = 0.0  # after the embedding and at the end of each residual branch

    # What others ask a Config: the decoder writes, and neither a table nor an angle ends anywhere.
    causal, head, context, steady, padding = True, "linear", 2**31, 2**31, None
    language, labels = True, ()
    shared = property(lambda self: self.tied)

    def __post_init__(self):
        check(RANGES, **{name: getattr(self, name) for name in RANGES})
        for name in ("tied", "scaled_head"):
            if not isinstance(given := getattr(self, name), bool | np.bool_):
                raise TypeError(f"{name} must be True or False, got {given!r}")
        if self.max_distance <= self.buckets // 2:
            raise ValueError(f"max_distance {self.max_distance} must be more than half of the "
                             f"{self.buckets} buckets")
        if self.start >= self.vocab_size:
            raise ValueError(f"start {self.start} must be an id below {self.vocab_size}")

    def require_language(self, whose="this model"):
        """It is one."""

    def require_writer(self, whose, does: str):
        """It is one."""


def bucket(offset, c: T5, causal: bool):
    """The number of the bucket of each offset, key - query: integers -> integers.

    The encoder has half of the buckets for the keys behind the query. The decoder's are all for
    those in front of it and for itself. Half of either are one distance each.

    >>> c = T5(9, 1, 1, heads=1, width=4, hidden=4, head_width=4, buckets=8, max_distance=16)
    >>> bucket(np.arange(-9, 1), c, causal=True)
    array([6, 6, 5, 5, 4, 4, 3, 2, 1, 0])
    """
    n = c.buckets if causal else c.buckets // 2
    distance = np.maximum(-offset, 0) if causal else abs(offset)
    near = n // 2
    # In float32, as in the programs that trained T5: a bucket's border may be a rounding away.
    log = np.log(np.maximum(distance, near).astype(np.float32) / near)
    far = near + (log / math.log(c.max_distance / near) * (n - near)).astype(np.int64)
    number = np.where(distance < near, distance, np.minimum(far, n - 1))
    return number if causal else number + n * (offset > 0)


class Attention(Module):
    """softmax(q k^T + b) v: of rows to themselves, or of the decoder's to the encoder's."""

    def __init__(self, c: T5, rng):
        self.heads, (C, Q) = c.heads, (c.width, c.heads * c.head_width)
        self.q = Linear(C, Q, rng, False, std=(C * c.head_width) ** -0.5)
        self.k = Linear(C, Q, rng, False, std=C**-0.5)
        self.v = Linear(C, Q, rng, False, std=C**-0.5)
        self.o = Linear(Q, C, rng, False, std=Q**-0.5)

    def keys(self, x):  # (B, S, C) -> k and v, (B, H, S, D)
        return ops.split_heads(self.k(x), self.heads), ops.split_heads(self.v(x), self.heads)

    def forward(self, x, k, v, mask, bias=None, causal=False):  # (B, T, C) -> (B, T, C)
        q = ops.split_heads(self.q(x), self.heads)
        y = ops.attention(q, k, v, mask, bias, causal=causal, scale=1.0)
        return self.o(ops.merge_heads(y))


class MLP(Module):
    """down(relu(up(x))), or down(gelu(gate(x)) up(x)): GEGLU (Shazeer 2020, 2002.05202)."""

    tokenwise = True

    def __init__(self, c: T5, rng):
        gated, std = c.activation != "relu", c.width**-0.5
        self.gate = Linear(c.width, c.hidden, rng, False, std) if gated else None
        self.up = Linear(c.width, c.hidden, rng, False, std)
        self.down = Linear(c.hidden, c.width, rng, False, std=c.hidden**-0.5)

    def forward(self, x):
        if self.gate is None:
            return self.down(ops.relu(self.up(x)))
        return self.down(ops.gelu(self.gate(x), approximate="tanh") * self.up(x))


class Block(Module):
    """Attention, in a decoder also to the encoder's rows, and an MLP: each behind its norm."""

    def __init__(self, c: T5, rng, causal: bool):
        self.norm1, self.attention = RMSNorm(c.width, c.norm_eps), Attention(c, rng)
        self.norm_cross = RMSNorm(c.width, c.norm_eps) if causal else None
        self.cross = Attention(c, rng) if causal else None
        self.norm2, self.mlp = RMSNorm(c.width, c.norm_eps), MLP(c, rng)
        self.drop, self.causal = Dropout(c.dropout), causal

    def forward(self, x, mask, bias, text=None, text_mask=None, cache=None):
        h = self.norm1(x)
        k, v = self.attention.keys(h)
        if cache is not None:
            k, v = cache.append(k, v)
        x = x + self.drop(self.attention(h, k, v, mask, bias, self.causal))
        if text is not None:
            x = x + self.drop(self.cross(self.norm_cross(x), *text, text_mask))
        return x + self.drop(self.mlp(self.norm2(x)))


class Stack(Module):
    """The blocks of the encoder, or of the decoder, which is causal, and the table of distances."""

    def __init__(self, c: T5, rng, causal: bool):
        self.config, self.causal = c, causal
        self.distances = Embedding(c.buckets, c.heads, rng, std=c.width**-0.5)
        layers = c.decoder_layers if causal else c.layers
        self.blocks = [Block(c, rng, causal) for _ in range(layers)]
        self.norm = RMSNorm(c.width, c.norm_eps)

    def bias(self, T, past):  # -> (1, H, T, past + T)
        """What is added to the scores of T queries, the first of which has `past` keys in front."""
        offset = np.arange(past + T) - np.arange(past, past + T)[:, None]
        rows = self.distances(bucket(offset, self.config, self.causal))  # (T, S, H)
        return rows.transpose(2, 0, 1).reshape(1, -1, T, past + T)

    def forward(self, x, mask=None, texts=None, text_mask=None, cache=None):  # (B, T, C) twice
        """mask: (B, S). texts: for each block k and v of the encoder's rows, which text_mask hides.

        cache: a Cache of what is in front of x; the keys and values of x are added.
        """
        past, (B, T) = cache.length if cache else 0, x.shape[:2]
        if mask is not None:
            mask = seen(mask, (B, past + T), array_module(x.data))
        bias = self.bias(T, past)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, bias, texts and texts[i], text_mask, cache and cache.layers[i])
        if cache:
            cache.length += T
        return self.norm(x)


class EncoderDecoder(Module):
    """model(tokens, decoder_tokens, mask=None, decoder_mask=None) -> logits.

    tokens: integers (B, S), the texts that are read. decoder_tokens: integers (B, T), those written
    so far; `shifted` makes them from targets. The masks have their shapes, with 1 for a token and 0
    for padding. logits: Tensor (B, T, V). ValueError for other tokens or masks. The weights are
    drawn from `seed` with T5's standard deviations; None leaves them unwritten.
    ends, origin: what the folder says that the model was loaded from, as a Transformer's.

    >>> model = EncoderDecoder(T5(256, 2, 2, heads=4, width=32, hidden=64, head_width=8))
    >>> model(np.array([[72, 105, 33]]), np.array([[0, 72]])).shape
    (1, 2, 256)
    """

    def __init__(self, config: T5, seed: int | None = 0):
        c, rng = config, None if seed is None else np.random.default_rng(seed)
        self.config, self.ends, self.origin = c, Ends(), ()
        self.embed = Embedding(c.vocab_size, c.width, rng, std=1.0)
        self.encoder, self.decoder = Stack(c, rng, causal=False), Stack(c, rng, causal=True)
        self.head = Linear(c.width, c.vocab_size, rng, bias=False, std=c.width**-0.5)
        self.drop = Dropout(c.dropout)
        if c.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens, decoder_tokens, mask=None, decoder_mask=None) -> Tensor:
        return self.read(tokens, mask)(decoder_tokens, decoder_mask)

    def read(self, tokens, mask=None) -> "Reader":
        """Run the encoder: what can be written after it is the Reader's to say."""
        tokens = checked(tokens)
        rows = self.encoder(self.drop(self.embed(tokens)), mask)  # (B, S, C)
        if mask is not None:
            mask = seen(mask, tokens.shape, array_module(rows.data))
        return Reader(self, [block.cross.keys(rows) for block in self.decoder.blocks], mask)

    def shifted(self, targets, ignore_index: int = -100):  # (B, T) -> (B, T)
        """The decoder's tokens for these targets: start, and all targets but the last.

        In place of an ignored target stands the padding; start, if the folder names none.
        """
        targets = np.asarray(targets)
        before = np.full_like(targets, self.config.start)
        padding = self.config.start if self.ends.pad is None else self.ends.pad
        before[:, 1:] = np.where(targets == ignore_index, padding, targets)[:, :-1]
        return before


class Reader(Module):
    """The decoder, once the encoder has read: a causal model of B texts, given B others.

    reader(tokens, mask=None, cache=None) -> logits (B, T, V), as a Transformer's. `generate` takes
    it in a Transformer's place.
    """

    def __init__(self, model: EncoderDecoder, texts, text_mask):
        self.config, self.ends = model.config, model.ends
        self.embed, self.drop = model.embed, model.drop
        self.decoder, self.head = model.decoder, model.head
        self.texts, self.text_mask = texts, text_mask  # for each block (k, v): (B, H, S, D)
        self.front, self.room = Front(), model.config.context  # for `generate`: nothing in front

    @property
    def blocks(self):
        """The decoder's."""
        return self.decoder.blocks

    def forward(self, tokens, mask=None, cache=None) -> Tensor:
        return self.logits(self.hidden(tokens, mask, cache))

    def hidden(self, tokens, mask=None, cache=None) -> Tensor:
        """The decoder's last rows: (B, T, C)."""
        x = self.drop(self.embed(checked(tokens)))
        return self.decoder(x, mask, self.texts, self.text_mask, cache)

    def logits(self, x) -> Tensor:  # (..., C) -> (..., V)
        """What the head makes of the decoder's rows."""
        return self.head(x * self.config.width**-0.5 if self.config.scaled_head else x)


def checked(tokens):
    """tokens as an array of integers (B, T). ValueError if they are anything else."""
    tokens = tokens if hasattr(tokens, "dtype") else np.asarray(tokens)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.shape[1]:
        raise ValueError(f"tokens must be integers (B, T >= 1), got {tokens.dtype} {tokens.shape}")
    return tokens
