"""The transformer once more, for one new token of each text, in plain NumPy.

Generation runs the model on rows, (B, 1, C). There the arithmetic costs little. What counts is how
fast the weights come from memory (see vectors.py) and, if the model is small, the overhead of each
call. So this version makes few calls, without graph, token axis or tiles (np.add.reduce costs half
as much as x.sum()). It equals `model(tokens, cache=cache)` up to rounding: models in 16 bits round
at the same places.

Adaptation methods replace modules, so the modules decide what may run here, not the Config.
`caches` says whether one token may be run by itself, `decodes` whether it may be run here. Modules
that are not plain, such as adapted layers, are called as they are.

Shapes: B texts, C width, H heads, K key/value heads, D head width, S tokens so far, V vocabulary;
"..." is B, or nothing for a single text.
"""

import math

import numpy as np

from minilm import ops, seq2seq
from minilm.arrays import wide
from minilm.block import MLP, Attention, Block
from minilm.nn import Dropout, Embedding, LayerNorm, Linear, RMSNorm
from minilm.rope import rotary_tables
from minilm.seq2seq import Reader
from minilm.tensor import Tensor
from minilm.transformer import Transformer
from minilm.vectors import product


def caches(model) -> bool:
    """Whether this model gives the same results with a cache of keys and values.

    It does if its attention is causal and minilm's own, which reads and fills the cache, and if
    every other module is `tokenwise`. Each class must say so itself, because a parent class cannot
    know what a subclass does with its rows.
    """
    cached = type(model) in (Transformer, Block, Reader, seq2seq.Block, seq2seq.Attention) or (
        type(model) in (Attention, seq2seq.Stack) and model.causal)
    tokenwise = "tokenwise" in vars(type(model)) and model.tokenwise
    return (cached or tokenwise) and all(caches(child) for _, child in model.children())


def decodes(model) -> bool:
    """Whether `decode` can run this model: a pre-norm decoder on the CPU.

    Its parts must have the classes named here. Inside them any tokenwise module will do.
    """
    if not (type(model) is Transformer and caches(model) and type(model.embed) is Embedding
            and type(model.position) in (Embedding, type(None))):
        return False
    return (isinstance(model.embed.weight.data, np.ndarray)
            and model.segment is model.embed_norm is None and model.norm is not None
            and type(model.drop) is Dropout and all(map(_decodes, model.blocks)))


def _decodes(block) -> bool:
    return (type(block) is Block and block.norm_first and type(block.attention) is Attention
            and type(block.drop) is Dropout)


def decode(model: Transformer, tokens, cache) -> np.ndarray:  # (...) -> (..., V)
    """Logits of what follows `tokens`, one for each text. Their keys and values enter the Cache.

    tokens: integers (B,), or one for a single text. Call it with the graph and dropout off: modules
    that are called as they are would use them.
    """
    c, place, x = model.config, cache.length, model.embed.weight.data[tokens]
    if c.scaled_embedding:
        x = x * x.dtype.type(np.float32(math.sqrt(c.width)))
    angles = None
    if model.position:
        x = x + model.position.weight.data[place]
    else:
        angles = [t[0] for t in rotary_tables(c, np.arange(place, place + 1), x.dtype)]
    for block, kept in zip(model.blocks, cache.layers):
        if block.norm_output:
            x = x + norm(block.norm1, attend(block.attention, x, angles, kept))
            x = x + norm(block.norm2, mlp(block.mlp, x))
        else:
            y = attend(block.attention, norm(block.norm1, x), angles, kept)
            x = x + (norm(block.end1, y) if block.norm_both else y)
            y = mlp(block.mlp, norm(block.norm2, x))
            x = x + (norm(block.end2, y) if block.norm_both else y)
    cache.length += 1
    logits = linear(model.head, norm(model.norm, x))
    return ops.soft_cap(logits, c.logits_cap).data if c.logits_cap else logits


def attend(m, x, angles, kept):  # (..., C) -> (..., C)
    """Attention of the newest token to all tokens so far."""
    q, k, v = linear(m.q, x), linear(m.k, x), linear(m.v, x)
    if m.qk_norm == "width":
        q, k = norm(m.q_norm, q), norm(m.k_norm, k)
    D = q.shape[-1] // m.heads
    q = q.reshape(-1, m.kv_heads, m.heads // m.kv_heads, D)  # (B, K, H/K, D)
    k, v = k.reshape(-1, m.kv_heads, 1, D), v.reshape(-1, m.kv_heads, 1, D)  # (B, K, 1, D)
    if m.qk_norm == "head":
        q, k = m.q_norm(Tensor(q)).data, m.k_norm(Tensor(k)).data
    if angles is not None and m.rotates:
        cos, sin = angles[-2:] if m.window else angles[:2]
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    k, v = kept.put(k, v)  # (B, K, S, D)
    if m.window:
        k, v = k[:, :, -m.window :], v[:, :, -m.window :]
    P = (wide(q) * (m.scale or 1 / math.sqrt(D))) @ wide(k).swapaxes(-1, -2)  # (B, K, H/K, S)
    if m.cap:
        P = m.cap * np.tanh(P / m.cap)
    P -= np.maximum.reduce(P, -1, keepdims=True)
    np.exp(P, out=P)
    y = P @ wide(v)
    y /= np.add.reduce(P, -1, keepdims=True)
    return linear(m.o, y.astype(x.dtype, copy=False).reshape(*x.shape[:-1], -1))


def turn(x, cos, sin):
    """Rotary positions on (..., D)."""
    half = cos.shape[-1]  # np.split would take as long as all that follows
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def mlp(m, x):  # (..., C) -> (..., C)
    if type(m) is not MLP:
        return m(Tensor(x)).data
    if m.activation == "gelu_tanh":
        h = gelu(linear(m.up, x))
    elif m.activation == "gelu":
        h = ops.gelu(linear(m.up, x)).data
    elif m.activation == "swiglu":
        h = ops.swiglu(linear(m.gate, x), linear(m.up, x)).data
    else:  # geglu_tanh
        h = gelu(linear(m.gate, x)) * linear(m.up, x)
    return linear(m.down, h)


def gelu(x):
    """plain_gelu_tanh(x), in place."""
    h = wide(x)
    u = h * h
    u *= 0.044715 * math.sqrt(2 / math.pi)
    u += math.sqrt(2 / math.pi)
    u *= h
    np.tanh(u, out=u)
    u += 1
    u *= h
    u *= 0.5
    return u.astype(x.dtype, copy=False)


def norm(m, x):  # (..., C) -> (..., C)
    if type(m) not in (LayerNorm, RMSNorm):
        return m(Tensor(x)).data
    y, C = wide(x), x.shape[-1]
    if type(m) is LayerNorm:
        y = y - np.add.reduce(y, -1, keepdims=x.ndim > 1) / C
    rstd = 1 / math.sqrt(y @ y / C + m.eps) if x.ndim == 1 else (
        1 / np.sqrt(np.vecdot(y, y)[..., None] / C + m.eps))
    y = y * rstd
    y *= wide(m.weight.data) + 1 if type(m) is RMSNorm and m.plus_one else m.weight.data
    if type(m) is LayerNorm:
        y += m.bias.data
    return y.astype(x.dtype, copy=False)


def linear(m, x):  # (..., I) -> (..., O)
    if type(m) is not Linear:
        return m(Tensor(x)).data
    y = product(x, m.weight.data)
    if m.bias is not None:
        y += m.bias.data
    return y
