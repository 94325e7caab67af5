"""One transformer in three families: GPT-2, Llama and those after it, BERT/DistilBERT.

`Config` holds what differs. The families share all code below except for these choices, and what
later Llamas add: a head width of their own, norms of q and k or at both ends of a branch, windows,
layers without rotation, caps of scores and logits:

                 GPT-2             Llama, Mistral      BERT, DistilBERT
    positions    learned           rotary              learned
    norm         LayerNorm, first  RMSNorm, first      LayerNorm, after the residual
    MLP          GELU (tanh)       SwiGLU              GELU (exact)
    attention    causal            causal, K <= H      bidirectional
    head         tied linear       linear              transform, then tied linear

Instead of a head over the vocabulary each may have classes of whole texts, or no head at all.

Shapes: B batch, T tokens, C width, H heads, K key/value heads, D head width, V vocabulary.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from minilm import ops
from minilm.backend import array_module
from minilm.block import Block, make_norm
from minilm.cache import Joined
from minilm.config import Config
from minilm.inputs import checked, checked_segments, counted, last, seen
from minilm.nn import Dropout, Embedding, Linear, Module
from minilm.ranges import BELOW_1, check, whole
from minilm.rope import rotary_tables
from minilm.tensor import Tensor, checkpoint


class Ends(NamedTuple):
    """The ids that begin, end and fill up a text. An id outside of the vocabulary never comes."""

    bos: int | None = None
    eos: tuple[int, ...] = ()  # each of them ends a text
    pad: int | None = None


class MaskedHead(Module):
    """BERT's masked-LM head: a transform, then the embedding's transpose and a bias."""

    tokenwise = True

    def __init__(self, c: Config, rng):
        self.transform, self.norm = Linear(c.width, c.width, rng), make_norm(c)
        self.out = Linear(c.width, c.vocab_size, rng)

    def forward(self, x):
        return self.out(self.norm(ops.gelu(self.transform(x))))


class Pooler(Module):
    """What stands for a text: its first token's hidden state, through a linear layer and tanh (BERT
    and RoBERTa) or ReLU (DistilBERT)."""

    tokenwise = True

    def __init__(self, c: Config, rng):
        self.dense, self.activation = Linear(c.width, c.width, rng), c.pooler

    def forward(self, x):  # (..., C) -> (..., C)
        return (ops.tanh if self.activation == "tanh" else ops.relu)(self.dense(x))


class Front(Module):
    """What is in front of the text: nothing.

    It takes the model from tokens to the last hidden states, as `hidden` says. A method that puts
    rows in front adapts this module (see peft/front.py): it runs both halves with its rows, and
    gives back those of the text. A cache that is not empty has the rows in it already.
    """

    tokenwise, length = True, 0  # length: the rows in front

    def forward(self, model, tokens, mask=None, cache=None, segments=None):  # (B, T) -> (B, T, C)
        x = model.embedded(tokens, cache.length if cache else 0, segments)
        return model.run(x, mask, cache=cache)


class Transformer(Module):
    """model(tokens, mask=None) -> logits.

    tokens: integers (B, T), T <= model.room. mask: (B, T), 1 for a token and 0 for padding.
    cache: keys and values in front of the tokens; a mask then covers those too (see cache.py).
    segments: integers (B, T), each token's segment, by default 0, if config.segments is not 0.
    logits: Tensor (B, T, V), float32 unless `astype` changed the model. With config.labels they are
    those of a text's classes, (B, labels): of its pooled first token, or if there is no pooler, of
    its last one that is not padding. Without a head they are the hidden states (B, T, C).
    ValueError for other tokens, masks or segments. The weights are drawn from `seed` as GPT-2's:
    N(0, 0.02^2), but output projections of the residual branches are divided by sqrt(2 layers).
    With seed None nothing is drawn: the weights are to be put in place.
    checkpoint_every = k runs every k blocks under `checkpoint`; 0 keeps all activations.
    ends: what the folder names that the model was loaded from; a new model has none.
    origin: the small files of that folder, (name, bytes) each, which saving gives back.

    >>> model = Transformer(Config.gpt2(vocab_size=256, context=8, layers=2, heads=4, width=32))
    >>> model(np.array([[72, 105, 33]])).shape
    (1, 3, 256)
    >>> sum(p.size for p in model.parameters())
    33920
    """

    def __init__(self, config: Config, seed: int | None = 0):
        c, rng = config, None if seed is None else np.random.default_rng(seed)
        self.config, self.checkpoint_every, self.ends, self.origin = c, 0, Ends(), ()
        self.embed = Embedding(c.vocab_size, c.width, rng, padding=c.padding)
        unplaced = c.padding if c.positions == "counted" else None
        self.position = Embedding(c.places, c.width, rng, padding=unplaced) if c.places else None
        self.segment = Embedding(c.segments, c.width, rng) if c.segments else None
        self.embed_norm = None if c.norm_first else make_norm(c)
        self.drop = Dropout(c.dropout)
        self.blocks = [Block(c, rng, i) for i in range(c.layers)]
        self.norm = make_norm(c) if c.norm_first else None
        self.pooler = Pooler(c, rng) if c.pooler else None
        self.head = make_head(c, rng)
        if c.shared:
            (self.head.out if c.head == "masked" else self.head).weight = self.embed.weight
        self.front = Front()

    @property
    def room(self) -> int:
        """How many tokens of a text fit: the context, without what is in front."""
        return self.config.context - self.front.length

    def forward(self, tokens, mask=None, cache=None, segments=None) -> Tensor:
        x = self.hidden(tokens, mask, cache, segments)
        if self.config.labels:
            x = self.pooled(x) if self.pooler else last(x, tokens, mask, self.config.padding)
            return self.head(x)
        return self.logits(x) if self.head else x

    def pooled(self, x) -> Tensor:
        """What stands for each text, from its hidden states: (B, T, C) -> (B, C)."""
        if self.pooler is None:
            raise ValueError("this model has no pooler")
        return self.pooler(x[:, 0])

    def hidden(self, tokens, mask=None, cache=None, segments=None) -> Tensor:
        """The last hidden states, which the head takes: (B, T, C).

        cache: a Cache of what is in front of these tokens; their own keys and values are added.
        """
        return self.front(self, tokens, mask, cache, segments)

    def logits(self, x) -> Tensor:
        """What the head says of hidden states: (..., C) -> (..., V)."""
        cap, logits = self.config.logits_cap, self.head(x)
        return ops.soft_cap(logits, cap) if cap else logits

    def embedded(self, tokens, start: int = 0, segments=None) -> Tensor:
        """The input of the first block: (B, T) -> (B, T, C).

        start: the first token's position. A method that puts P rows of its own in front of the text
        gives start=P. If positions are learned, the method decides which ones its rows get.
        """
        c, tokens = self.config, checked(tokens, start, self.config.context)
        segments = checked_segments(segments, tokens, c.segments)
        places = array_module(tokens).arange(start, start + tokens.shape[1])
        if c.positions == "counted":
            places = counted(tokens, c.padding, start)
        return self.placed(self.looked_up(tokens), places, segments)

    def looked_up(self, tokens) -> Tensor:
        """The tokens' rows without their places: (...) -> (..., C)."""
        x = self.embed(tokens)
        if self.config.scaled_embedding:  # by a number of the model's dtype, as transformers does
            x = x * float(x.dtype.type(np.float32(math.sqrt(self.config.width))))
        return x

    def placed(self, x, places, segments=None) -> Tensor:
        """Rows x (B, T, C), of tokens or not, at the places (T,) or (B, T): (B, T, C)."""
        if self.position:
            x = x + self.position(places)
        if self.segment:  # 0: all tokens are of one text
            x = x + self.segment(places * 0 if segments is None else segments)
        if self.embed_norm:
            x = self.embed_norm(x)
        return self.drop(x)

    def run(self, x, mask=None, angles=None, cache=None) -> Tensor:
        """Run the rows x through all blocks and the last norm: (B, T, C) -> (B, T, C).

        mask: (B, S), 1 for a key that may be seen; the cached keys come first, then those of x.
        angles: tables of rotary positions (see rope.py), by default from cache.length on.
        cache: as in `hidden`. Under `checkpoint` it must be a Cache.of(prefix), and is used up. No
        block runs under `checkpoint` if it is one of buffers.

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
            mask = seen(mask, (B, past + T), xp)
        if angles is None and past and past + T > self.config.steady < self.config.context:
            raise ValueError(f"beyond {self.config.steady} tokens this model's rope turns the "
                             "earlier ones by other angles: run the whole text without a cache")
        if angles is None and not self.position:
            angles = rotary_tables(self.config, xp.arange(past, past + T), x.dtype)
        x = self._run_blocks(x, mask, angles, cache)
        if cache:
            cache.length += T
        return self.norm(x) if self.norm else x

    def _run_blocks(self, x, mask, angles, cache):
        check({"checkpoint_every": whole(0)}, checkpoint_every=self.checkpoint_every)
        layers = cache.layers if cache else []
        if not self.checkpoint_every or (layers and type(layers[0]) is not Joined):
            for i, block in enumerate(self.blocks):
                x = block(x, mask, angles, cache and layers[i])
            return x
        for i in range(0, len(self.blocks), self.checkpoint_every):
            def segment(x, *kv, blocks=self.blocks[i : i + self.checkpoint_every]):
                for j, block in enumerate(blocks):  # it may run twice, so it joins anew
                    x = block(x, mask, angles, Joined(*kv[2 * j : 2 * j + 2]) if kv else None)
                return x
            prefix = [t for m in layers[i : i + self.checkpoint_every] for t in (m.k, m.v)]
            x = checkpoint(segment, x, *prefix)
        if cache:
            cache.layers = []
        return x


def make_head(c: Config, rng) -> Module | None:
    """The head over the vocabulary, or over the classes of a text."""
    if c.head == "masked":
        return MaskedHead(c, rng)
    if c.head == "classes":
        return Linear(c.width, len(c.labels), rng, bias=bool(c.pooler))
    return None if c.head == "none" else Linear(c.width, c.vocab_size, rng, bias=False)


def with_classes(model: Transformer, labels: tuple[str, ...], seed: int = 0) -> Transformer:
    """The model with a new head, for classes of whole texts; its body is a copy.

    The head is drawn from `seed`, and so is a pooler (tanh), if the model is not causal and has
    none. ValueError for a model that has adapters or codes, since a new model has none.

    >>> model = Transformer(Config.bert(50, context=8, layers=1, heads=2, width=4, hidden=8))
    >>> with_classes(model, ("no", "yes"))(np.array([[1, 2, 3]])).shape
    (1, 2)
    """
    c, like = model.config, model.embed.weight
    pooler = None if c.causal else c.pooler or "tanh"
    new = Transformer(replace(c, head="classes", labels=labels, pooler=pooler), seed)
    new = new.astype(like.dtype).to(like.device)
    body = {name: a for name, a in model.state_dict().items() if not name.startswith("head.")}
    drawn = {name: a for name, a in new.state_dict().items()
             if name.startswith(("head.", "pooler."))}
    new.load_state_dict(drawn | body)
    new.ends = model.ends
    return new


def drop_attention(model: Transformer, p: float) -> Transformer:
    """Let each training step leave out a share p of what the tokens attend to; returns the model.

    It is dropout of the weights of the values, after the softmax, as GPT-2, BERT and Llama have it.
    It belongs to a training run: model.eval() turns it off, and no folder keeps it. TypeError for
    another model, ValueError unless 0 <= p < 1.

    >>> model = Transformer(Config.gpt2(vocab_size=9, context=8, layers=1, heads=2, width=4))
    >>> drop_attention(model, 0.1).blocks[0].attention.dropout
    0.1
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"attention dropout is for a Transformer, not {type(model).__name__}")
    check({"p": BELOW_1}, p=p)
    for block in model.blocks:
        block.attention.dropout = p
    return model
