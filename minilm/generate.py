"""Generation: one token after another, with the keys and values of earlier tokens kept.

Shapes: B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Collection, Iterator

import numpy as np

from minilm.backend import to_device
from minilm.cache import Cache
from minilm.decode import caches, decode, decodes
from minilm.graph import no_dropout
from minilm.seq2seq import EncoderDecoder
from minilm.tensor import no_grad
from minilm.transformer import Transformer


def generate(model: Transformer, tokens, max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, seed: int = 0,
             eos: Collection[int] | int | None = None) -> np.ndarray:
    """tokens (B, T) and max_new_tokens sampled after them: int64 (B, T + max_new_tokens).

    eos: ids that end a row, by default the model's own (model.ends, which a loaded model has). An
    ended row is filled up with the model's pad, or else with the first of eos. If all rows have
    ended, fewer than max_new_tokens are returned. Other settings and errors are those of `stream`.
    The same seed draws the same tokens. An EncoderDecoder reads the tokens, and what is returned is
    its decoder's start and what it draws after it: (B, 1 + max_new_tokens).

    >>> from minilm.transformer import Config
    >>> model = Transformer(Config.gpt2(vocab_size=256, context=8, layers=2, heads=4, width=64))
    >>> generate(model, [[72, 105]], 3, temperature=0)  # untrained, with a tied head: an echo
    array([[ 72, 105, 105, 105, 105]])
    """
    _require(_whole(max_new_tokens, 0), max_new_tokens=max_new_tokens, expected="0, 1, 2, ...")
    model, tokens = _begun(model, tokens)
    drawn = stream(model, tokens, temperature, top_k, top_p, seed)
    eos = model.ends.eos if eos is None else [eos] if _whole(eos, 0) else eos
    _require(isinstance(eos, Collection) and all(_whole(id, 0) for id in eos), eos=eos,
             expected="ids, or None for the model's own")
    pad = next(id for id in (model.ends.pad, *eos, 0) if id is not None)
    ended, new = np.zeros(len(tokens), bool), []
    while len(new) < max_new_tokens and not ended.all():
        ids = np.where(ended, pad, next(drawn))
        ended |= np.isin(ids, [*eos])
        new.append(ids[:, None])
    return np.concatenate([np.asarray(tokens), *new], axis=1, dtype=np.int64)


def stream(model: Transformer, tokens, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None, seed: int = 0) -> Iterator[np.ndarray]:
    """Sample tokens one after another without end, each (B,), to follow the prompts tokens (B, T).

    temperature divides the logits; 0 takes the likeliest token. top_k samples among the k
    likeliest, top_p among the fewest whose probabilities reach p (Holtzman et al. 2019,
    arXiv:1904.09751). Past the model's context the window slides: the last `context` tokens are run
    again for each token, because their positions change; with a rope that looks at the text's
    length, so do the angles beyond config.steady tokens. A model that cannot use a cache (see
    decode.caches) does so for every token; this is decided once, when the stream begins. Dropout is
    off, in this thread only. ValueError for bad settings or tokens, for a model that is not causal,
    and, as it is drawn, for a token whose logits are not finite.
    """
    model, tokens = _begun(model, tokens)
    rng = settled(model, tokens := np.asarray(tokens), temperature, top_k, top_p, seed)
    return _drawn(model, tokens, rng, temperature, top_k, top_p)


def _begun(model, tokens):
    """The causal model that draws, and what it goes on from: an EncoderDecoder reads the tokens."""
    if type(model) is not EncoderDecoder:
        return model, tokens
    with no_grad(), no_dropout():
        reader = model.read(tokens)
    return reader, np.full((len(tokens), 1), model.config.start)


def settled(model, tokens, temperature, top_k, top_p, seed) -> np.random.Generator:
    """The generator of random numbers. ValueError for what `stream` does not take."""
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be integers (B, T >= 1), got {tokens.dtype} {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise ValueError(f"tokens from {tokens.min()} to {tokens.max()}, but the table has "
                         f"{model.config.vocab_size} rows")
    model.config.require_language()
    if not model.config.causal:
        raise ValueError("only a causal model generates; this one sees later tokens too")
    _require(_number(temperature) and 0 <= temperature < math.inf, temperature=temperature,
             expected="a number from 0 up, which is finite; 0 takes the likeliest token")
    _require(top_k is None or _whole(top_k, 1), top_k=top_k, expected="1, 2, 3, ... or None")
    _require(top_p is None or (_number(top_p) and 0 < top_p <= 1), top_p=top_p,
             expected="a number above 0, up to 1, or None")
    try:
        return np.random.default_rng(seed)
    except (ValueError, TypeError):
        _require(False, seed=seed, expected="0, 1, 2, ...")


def _drawn(model, tokens, rng, *settings):
    context, steady, front = model.room, model.config.steady, model.front.length
    cached, fast = caches(model), decodes(model)
    cache, new = Cache.empty(model) if cached else None, tokens
    while True:
        if not cached:
            new = tokens[:, -context:]
        elif (cache.length or front) + new.shape[1] > steady:  # every position or angle changes
            cache, new = Cache.empty(model), tokens[:, -context:]
        drawn = sample(logits_after(model, new, cache, fast), rng, *settings)
        yield drawn
        new = drawn[:, None]
        tokens = np.concatenate([tokens[:, 1 - context :], new], axis=1, dtype=np.int64)


def logits_after(model, new, cache: Cache | None, fast: bool):  # (B, T) -> (B, V)
    """Logits of what follows new tokens, which come after those of the cache, and enter it.

    fast: whether the model `decodes`.
    """
    with no_grad(), no_dropout():
        if cache is None:
            logits = model(new).data[:, -1]
        elif fast and new.shape[1] == 1 and (cache.length or not model.front.length):
            one = len(new) == 1  # a vector takes less time than a row of a matrix
            logits = decode(model, new[0, 0] if one else new[:, 0], cache).reshape(len(new), -1)
        else:
            logits = model.logits(model.hidden(new, cache=cache)[:, -1]).data
    return to_device(logits, "cpu")


def sample(logits, rng, temperature, top_k, top_p):  # (B, V) -> (B,)
    """One token per row, as `stream` describes.

    A logit of -inf forbids its token. ValueError if a row has NaN or +inf, or forbids all tokens.
    """
    logits = logits.astype(np.float64)
    most = logits.max(-1, keepdims=True)  # NaN if there is one
    if not np.isfinite(most).all():
        raise ValueError("the model's logits are not finite: some are NaN or infinite, so that no "
                         "token can be drawn")
    if temperature == 0:
        return logits.argmax(-1)
    with np.errstate(over="ignore"):
        z, top = logits / temperature, most / temperature
        if not np.isfinite(top).all():  # a tiny temperature: only differences matter
            z, top = (logits - most) / temperature, 0.0
    if top_k is not None and top_k < z.shape[-1]:
        z[z < np.partition(z, -top_k, axis=-1)[:, -top_k, None]] = -np.inf
    p = np.exp(z - top)
    if top_p is not None:
        order = np.argsort(-p, axis=-1, kind="stable")
        falling = np.take_along_axis(p, order, -1)
        reached = np.cumsum(falling, -1) >= top_p * p.sum(-1, keepdims=True)
        falling[:, 1:][reached[:, :-1]] = 0  # the one that reaches p stays
        np.put_along_axis(p, order, falling, -1)
    upto = np.cumsum(p, -1)
    return (upto <= rng.random((len(p), 1)) * upto[:, -1:]).sum(-1)


def _require(fits, expected, **setting):
    if not fits:
        (name, value), = setting.items()
        raise ValueError(f"bad setting {name}={value!r}: expected {expected}")


def _number(value):
    return isinstance(value, (int, float, np.integer, np.floating)) and type(value) is not bool


def _whole(value, least):
    return isinstance(value, (int, np.integer)) and type(value) is not bool and value >= least
