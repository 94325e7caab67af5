"""One block of the transformer: attention and an MLP, each in a residual branch.

Shapes: B batch, T tokens, S keys, C width, H heads, K key/value heads, D head width.
"""

import math

from minilm import ops
from minilm.arrays import wide
from minilm.backend import array_module
from minilm.config import Config
from minilm.nn import Dropout, LayerNorm, Linear, Module, RMSNorm


class Attention(Module):
    """Multi-head attention. If K < H, each key/value head serves a group of query heads."""

    def __init__(self, c: Config, rng, i: int = 0):  # i: the layer's number
        self.heads, self.kv_heads, self.causal = c.heads, c.kv_heads, c.causal
        self.window = None if i in c.unwindowed else c.window
        self.rotates, self.qk_norm = i not in c.unrotated, c.qk_norm
        self.scale, self.cap = c.attention_scale, c.attention_cap
        q, kv = c.heads * c.D, c.kv_heads * c.D
        self.q = Linear(c.width, q, rng, c.has_bias("q"))
        self.k = Linear(c.width, kv, rng, c.has_bias("k"))
        self.v = Linear(c.width, kv, rng, c.has_bias("v"))
        self.o = Linear(q, c.width, rng, c.has_bias("o"), std=residual_std(c))
        self.dropout = 0.0  # share of what a token attends to: see transformer.drop_attention
        if c.qk_norm:
            self.q_norm, self.k_norm = (
                make_norm(c, c.D if c.qk_norm == "head" else width) for width in (q, kv))

    def forward(self, x, mask=None, angles=None, cache=None):  # (B, T, C) -> (B, T, C)
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q = ops.split_heads(q, self.heads)  # (B, H, T, D)
        k = ops.split_heads(k, self.kv_heads)  # (B, K, T, D)
        v = ops.split_heads(v, self.kv_heads)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None and self.rotates:
            cos, sin = angles[-2:] if self.window else angles[:2]
            q, k = ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D), the cached ones first
        drop = self.dropped(q, k) if self.dropout else None
        y = ops.attention(q, k, v, mask=mask, causal=self.causal, window=self.window,
                          scale=self.scale, cap=self.cap, drop=drop)
        return self.o(ops.merge_heads(y))

    def dropped(self, q, k):  # (B, H, T, D), (B, K, S, D) -> (B, H, T, S)
        """0 for each weight that dropout leaves out, 1 / (1 - p) for the others; None if it rests.
        """
        drop = Dropout(self.dropout)
        drop.training = self.training
        if not drop.acts:
            return None
        ones = array_module(q.data).ones((*q.shape[:3], k.shape[2]), wide(q.data[:0]).dtype)
        return drop(ones).data


class MLP(Module):
    """down(act(up(x))), or down(act(gate(x)) up(x)): SwiGLU, GEGLU (Shazeer 2020, 2002.05202)."""

    tokenwise = True

    def __init__(self, c: Config, rng):
        self.activation = c.activation
        if c.gated:
            self.gate = Linear(c.width, c.hidden, rng, c.has_bias("gate"))
        self.up = Linear(c.width, c.hidden, rng, c.has_bias("up"))
        self.down = Linear(c.hidden, c.width, rng, c.has_bias("down"), std=residual_std(c))

    def forward(self, x):
        return self.down(self.inner(x))

    def inner(self, x):
        """The input of `down`: (..., C) -> (..., config.hidden)."""
        if self.activation == "swiglu":
            return ops.swiglu(self.gate(x), self.up(x))
        if self.activation == "geglu_tanh":
            return ops.gelu(self.gate(x), approximate="tanh") * self.up(x)
        form = "tanh" if self.activation == "gelu_tanh" else "none"
        return ops.gelu(self.up(x), approximate=form)


class Block(Module):
    """Attention and MLP, each in a residual branch, with a norm before, after or inside it, or with
    one at its start and one at its end."""

    def __init__(self, c: Config, rng, i: int = 0):  # i: the layer's number
        self.norm_first, self.norm_output, self.norm_both = (
            c.norm_first, c.norm_output, c.norm_both)
        self.norm1, self.norm2 = make_norm(c), make_norm(c)
        if c.norm_both:
            self.end1, self.end2 = make_norm(c), make_norm(c)
        self.attention, self.mlp = Attention(c, rng, i), MLP(c, rng)
        self.drop = Dropout(c.dropout)

    def forward(self, x, mask=None, angles=None, cache=None):
        if self.norm_output:
            x = x + self.drop(self.norm1(self.attention(x, mask, angles, cache)))
            return x + self.drop(self.norm2(self.mlp(x)))
        if self.norm_both:
            x = x + self.drop(self.end1(self.attention(self.norm1(x), mask, angles, cache)))
            return x + self.drop(self.end2(self.mlp(self.norm2(x))))
        if self.norm_first:
            x = x + self.drop(self.attention(self.norm1(x), mask, angles, cache))
            return x + self.drop(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.drop(self.attention(x, mask, angles, cache)))
        return self.norm2(x + self.drop(self.mlp(x)))


def residual_std(c: Config) -> float:
    """GPT-2's std for the 2 * layers projections whose results the residual stream adds up."""
    return 0.02 / math.sqrt(2 * c.layers)


def make_norm(c: Config, width: int | None = None) -> Module:
    """width: of its rows, by default those of the residual stream."""
    width = c.width if width is None else width
    if c.norm == "layer":
        return LayerNorm(width, c.norm_eps)
    return RMSNorm(width, c.norm_eps, c.norm_plus_one)
