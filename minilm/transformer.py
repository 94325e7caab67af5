"""One transformer in three families: GPT-2, Llama/Mistral, BERT/DistilBERT.

`Config` holds what differs. The families share all code below except for these choices:

                 GPT-2             Llama, Mistral      BERT, DistilBERT
    positions    learned           rotary              learned
    norm         LayerNorm, first  RMSNorm, first      LayerNorm, after the residual
    MLP          GELU (tanh)       SwiGLU              GELU (exact)
    attention    causal            causal, K <= H      bidirectional
    head         tied linear       linear              transform, then tied linear

Shapes: B batch, T tokens, C width, H heads, K key/value heads, D head width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minilm import ops
from minilm.backend import array_module
from minilm.nn import Dropout, Embedding, LayerNorm, Linear, Module, RMSNorm
from minilm.ranges import AT_LEAST_0, BELOW_1, POSITIVE, check, one_of, whole
from minilm.tensor import Tensor, checkpoint

SIZES = ("vocab_size", "context", "layers", "heads", "width", "hidden", "kv_heads")
RANGES = dict.fromkeys(SIZES, whole(1)._replace(words="positive")) | {
    "norm": one_of("layer", "rms"), "positions": one_of("learned", "rotary"),
    "activation": one_of("gelu_tanh", "gelu", "swiglu"), "head": one_of("linear", "masked"),
    "segments": whole(0), "norm_eps": AT_LEAST_0, "rope_theta": POSITIVE, "dropout": BELOW_1}


@dataclass(frozen=True)
class Config:
    """The facts of an architecture. ValueError if one is impossible or two contradict each other.

    The presets `gpt2`, `llama` and `bert` make a family's choices; the sizes are their arguments.

    >>> c = Config.llama(vocab_size=256, context=64, layers=2, heads=4, width=32, hidden=96)
    >>> c.norm, c.positions, c.activation, c.tied
    ('rms', 'rotary', 'swiglu', False)
    """

    vocab_size: int
    context: int  # the largest T
    layers: int
    heads: int
    width: int
    hidden: int  # the width inside the MLP
    kv_heads: int
    norm: str = "layer"  # or "rms"
    norm_first: bool = True  # pre-norm; False: post-norm, as in the original transformer
    norm_eps: float = 1e-5
    positions: str = "learned"  # or "rotary"
    rope_theta: float = 10000.0
    activation: str = "gelu_tanh"  # or "gelu", "swiglu"
    causal: bool = True
    head: str = "linear"  # or "masked": BERT's transform in front of the output
    tied: bool = True  # the head shares the embedding's weight
    bias: bool = True  # in the linear layers
    segments: int = 0  # BERT's token types; 0: no embedding of them
    dropout: float = 0.0  # after the embedding and at the end of each residual branch

    def __post_init__(self):
        for name in ("norm_first", "causal", "tied", "bias"):
            if not isinstance(given := getattr(self, name), bool | np.bool_):
                raise TypeError(f"{name} must be True or False, got {given!r}")
        check(RANGES, **{name: getattr(self, name) for name in RANGES})
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}, "
                             f"and heads of kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError("rotary positions need an even head width, "
                             f"got {self.width // self.heads}")

    @classmethod
    def gpt2(cls, vocab_size, context, layers, heads, width, **changes):
        """GPT-2 (Radford et al. 2019)."""
        return cls(**dict(vocab_size=vocab_size, context=context, layers=layers, heads=heads,
                          width=width, hidden=4 * width, kv_heads=heads) | changes)

    @classmethod
    def llama(cls, vocab_size, context, layers, heads, width, hidden, kv_heads=None, **changes):
        """Llama (Touvron et al. 2023, arXiv:2302.13971); with kv_heads < heads also Mistral."""
        return cls(**dict(vocab_size=vocab_size, context=context, layers=layers, heads=heads,
                          width=width, hidden=hidden, kv_heads=kv_heads or heads, norm="rms",
                          norm_eps=1e-6, positions="rotary", activation="swiglu", tied=False,
                          bias=False) | changes)

    @classmethod
    def bert(cls, vocab_size, context, layers, heads, width, hidden, segments=2, **changes):
        """BERT for masked LM (Devlin et al. 2018, arXiv:1810.04805); with segments=0 DistilBERT."""
        return cls(**dict(vocab_size=vocab_size, context=context, layers=layers, heads=heads,
                          width=width, hidden=hidden, kv_heads=heads, norm_first=False,
                          norm_eps=1e-12, activation="gelu", causal=False, head="masked",
                          segments=segments) | changes)


class Ends(NamedTuple):
    """The ids that begin, end and fill up a text. An id outside of the vocabulary never comes."""

    bos: int | None = None
    eos: tuple[int, ...] = ()  # each of them ends a text
    pad: int | None = None


class Attention(Module):
    """Multi-head attention. If K < H, each key/value head serves a group of query heads."""

    def __init__(self, c: Config, rng):
        kv_width = c.width // c.heads * c.kv_heads
        self.heads, self.kv_heads, self.causal = c.heads, c.kv_heads, c.causal
        self.q = Linear(c.width, c.width, rng, c.bias)
        self.k = Linear(c.width, kv_width, rng, c.bias)
        self.v = Linear(c.width, kv_width, rng, c.bias)
        self.o = Linear(c.width, c.width, rng, c.bias, std=residual_std(c))

    def forward(self, x, mask=None, angles=None, cache=None):  # (B, T, C) -> (B, T, C)
        q = ops.split_heads(self.q(x), self.heads)  # (B, H, T, D)
        k = ops.split_heads(self.k(x), self.kv_heads)  # (B, K, T, D)
        v = ops.split_heads(self.v(x), self.kv_heads)
        if angles is not None:
            q, k = ops.rotary(q, *angles), ops.rotary(k, *angles)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D), the cached ones first
        return self.o(ops.merge_heads(ops.attention(q, k, v, mask=mask, causal=self.causal)))


class MLP(Module):
    """down(act(up(x))), or SwiGLU's down(silu(gate(x)) up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    tokenwise = True

    def __init__(self, c: Config, rng):
        self.activation = c.activation
        if c.activation == "swiglu":
            self.gate = Linear(c.width, c.hidden, rng, c.bias)
        self.up = Linear(c.width, c.hidden, rng, c.bias)
        self.down = Linear(c.hidden, c.width, rng, c.bias, std=residual_std(c))

    def forward(self, x):
        return self.down(self.inner(x))

    def inner(self, x):
        """The input of `down`: (..., C) -> (..., config.hidden)."""
        if self.activation == "swiglu":
            return ops.swiglu(self.gate(x), self.up(x))
        form = "tanh" if self.activation == "gelu_tanh" else "none"
        return ops.gelu(self.up(x), approximate=form)


class Block(Module):
    """Attention and MLP, each in a residual branch, with a norm before or after it."""

    def __init__(self, c: Config, rng):
        self.norm_first = c.norm_first
        self.norm1, self.norm2 = make_norm(c), make_norm(c)
        self.attention, self.mlp = Attention(c, rng), MLP(c, rng)
        self.drop = Dropout(c.dropout)

    def forward(self, x, mask=None, angles=None, cache=None):
        if self.norm_first:
            x = x + self.drop(self.attention(self.norm1(x), mask, angles, cache))
            return x + self.drop(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.drop(self.attention(x, mask, angles, cache)))
        return self.norm2(x + self.drop(self.mlp(x)))


class MaskedHead(Module):
    """BERT's masked-LM head: a transform, then the embedding's transpose and a bias."""

    tokenwise = True

    def __init__(self, c: Config, rng):
        self.transform, self.norm = Linear(c.width, c.width, rng), make_norm(c)
        self.out = Linear(c.width, c.vocab_size, rng)

    def forward(self, x):
        return self.out(self.norm(ops.gelu(self.transform(x))))


class Transformer(Module):
    """model(tokens, mask=None) -> logits.

    tokens: integers (B, T), T <= config.context. mask: (B, T), 1 for a token and 0 for padding.
    cache: keys and values in front of the tokens; a mask then covers those too (see cache.py).
    logits: Tensor (B, T, V), float32 unless `astype` changed the model. ValueError for other tokens
    or masks. The weights are drawn from `seed` as GPT-2's: N(0, 0.02^2), but output projections of
    the residual branches are divided by sqrt(2 layers).
    checkpoint_every = k runs every k blocks under `checkpoint`; 0 keeps all activations.
    ends: what the folder names that the model was loaded from; a new model has none.

    >>> model = Transformer(Config.gpt2(vocab_size=256, context=8, layers=2, heads=4, width=32))
    >>> model(np.array([[72, 105, 33]])).shape
    (1, 3, 256)
    >>> sum(p.size for p in model.parameters())
    33920
    """

    def __init__(self, config: Config, seed: int = 0):
        c, rng = config, np.random.default_rng(seed)
        self.config, self.checkpoint_every, self.ends = c, 0, Ends()
        self.embed = Embedding(c.vocab_size, c.width, rng)
        self.position = Embedding(c.context, c.width, rng) if c.positions == "learned" else None
        self.segment = Embedding(c.segments, c.width, rng) if c.segments else None
        self.embed_norm = None if c.norm_first else make_norm(c)
        self.drop = Dropout(c.dropout)
        self.blocks = [Block(c, rng) for _ in range(c.layers)]
        self.norm = make_norm(c) if c.norm_first else None
        masked = c.head == "masked"
        self.head = MaskedHead(c, rng) if masked else Linear(c.width, c.vocab_size, rng, bias=False)
        if c.tied:
            (self.head.out if masked else self.head).weight = self.embed.weight

    def forward(self, tokens, mask=None, cache=None) -> Tensor:
        return self.head(self.hidden(tokens, mask, cache))

    def hidden(self, tokens, mask=None, cache=None) -> Tensor:
        """The last hidden states, which the head takes: (B, T, C).

        cache: a Cache of what is in front of these tokens; their own keys and values are added.
        """
        x = self.embedded(tokens, cache.length if cache else 0)
        return self.run(x, mask, cache=cache)

    def embedded(self, tokens, start: int = 0) -> Tensor:
        """The input of the first block: (B, T) -> (B, T, C).

        start: the first token's position. A method that puts P rows of its own in front of the text
        gives start=P. If positions are learned, the method decides which ones its rows get.
        """
        tokens = self._checked(tokens, start)
        x = self.embed(tokens)
        places = array_module(tokens).arange(start, start + tokens.shape[1])
        if self.position:
            x = x + self.position(places)
        if self.segment:
            x = x + self.segment(places * 0)  # segment 0: all tokens are of one text
        if self.embed_norm:
            x = self.embed_norm(x)
        return self.drop(x)

    def run(self, x, mask=None, angles=None, cache=None) -> Tensor:
        """Run the rows x through all blocks and the last norm: (B, T, C) -> (B, T, C).

        mask: (B, S), 1 for a key that may be seen; the cached keys come first, then those of x.
        angles: tables of rotary positions (see rotary_tables), by default from cache.length on.
        cache: as in `hidden`. With a cache no block runs under `checkpoint`.

        >>> model = Transformer(Config.gpt2(vocab_size=9, context=8, layers=1, heads=2, width=4))
        >>> prompt = Tensor(np.zeros((1, 3, 4), np.float32), requires_grad=True)
        >>> text = model.embedded(np.array([[1, 2]]), start=3)
        >>> model.run(ops.concat(prompt, text, axis=1)).shape
        (1, 5, 4)
        """
        past, (B, T) = cache.length if cache else 0, x.shape[:2]
        xp = array_module(x.data)
        if cache and len(cache.layers) != len(self.blocks):
            raise ValueError(f"a cache of {len(cache.layers)} layers does not go with "
                             f"{len(self.blocks)} blocks")
        if mask is not None:
            mask, wanted = xp.asarray(mask), (B, past + T)  # a number for each token
            if mask.shape != wanted:
                raise ValueError(f"mask {mask.shape} must have the shape {wanted}, as the tokens")
            # Floats may be one that is to be added to the scores: it has 0 for what may be seen.
            if (xp is np or mask.dtype.kind == "f") and not ((mask == 0) | (mask == 1)).all():
                raise ValueError("mask must be 1 for a token that may be seen, 0 for padding")
            mask = (mask != 0)[:, None, None, :]
        if angles is None and not self.position:
            angles = rotary_tables(self.config, xp.arange(past, past + T), x.dtype)
        x = self._run_blocks(x, mask, angles, cache)
        if cache:
            cache.length += T
        return self.norm(x) if self.norm else x

    def _run_blocks(self, x, mask, angles, cache):
        check({"checkpoint_every": whole(0)}, checkpoint_every=self.checkpoint_every)
        if cache or not self.checkpoint_every:
            for i, block in enumerate(self.blocks):
                x = block(x, mask, angles, cache and cache.layers[i])
            return x
        for i in range(0, len(self.blocks), self.checkpoint_every):
            def segment(x, blocks=self.blocks[i : i + self.checkpoint_every]):
                for block in blocks:
                    x = block(x, mask, angles)
                return x
            x = checkpoint(segment, x)
        return x

    def _checked(self, tokens, start):
        """tokens as an array of integers (B, T). ValueError if they are anything else.

        NumPy's tokens stay on the CPU, where ops.embedding checks their ids.
        """
        tokens = tokens if hasattr(tokens, "dtype") else np.asarray(tokens)
        context = self.config.context
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens must be integers (B, T), got {tokens.dtype} {tokens.shape}")
        T = start + tokens.shape[1]
        if tokens.shape[1] == 0 or T > context:
            raise ValueError(f"T must be 1 to {context}, the model's context; got {T}")
        return tokens


def residual_std(c: Config) -> float:
    """GPT-2's std for the 2 * layers projections whose results the residual stream adds up."""
    return 0.02 / math.sqrt(2 * c.layers)


def make_norm(c: Config) -> Module:
    return (LayerNorm if c.norm == "layer" else RMSNorm)(c.width, c.norm_eps)


def rotary_tables(c: Config, places, dtype):
    """cos and sin of place * theta^(-2i/D), from float32 as in transformers: (T, D/2) each."""
    xp, half = array_module(places), c.width // c.heads // 2
    inverse = 1 / c.rope_theta ** (xp.arange(half, dtype=np.float32) / half)
    angles = places[:, None].astype(np.float32) * inverse
    return xp.cos(angles).astype(dtype), xp.sin(angles).astype(dtype)
