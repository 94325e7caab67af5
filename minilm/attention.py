"""Attention: softmax(q k^T / sqrt(D)) v, as one op that goes by tiles.

Shapes: B batch, T tokens (queries), S tokens (keys), H heads, K key/value heads, D head width.

If all scores are equal, each token gets the mean of the values that it can see:

>>> qk, v = np.zeros((1, 1, 4, 1)), np.array([1.0, 3.0, 5.0, 7.0]).reshape(1, 1, 4, 1)
>>> attention(qk, qk, v, causal=True).data.ravel()
array([1., 2., 3., 4.])
"""

import functools
import math

import numpy as np

from minilm import cuda
from minilm.arrays import BLOCK, floating, one_dtype, row_dot, row_sum, wide
from minilm.backend import array_module
from minilm.graph import once
from minilm.tensor import op

FUSED = range(16, 129, 16)  # head widths that kernels/attention.cu takes
TILE = 64  # queries of a tile on a CPU; a GPU has them all in one


def plain_attention(q, k, v, mask=None, causal=False, window=None, scale=None, cap=None, bias=None,
                    drop=1):
    """softmax(q k^T / sqrt(D)) v, eq. (1) of Vaswani et al. 2017, for arrays as in `attention`.

    A query that may see no key gives nan, because its softmax is 0 / 0.
    """
    (H, T, D), (K, S) = q.shape[1:], k.shape[1:3]
    k, v = k.repeat(H // K, axis=1), v.repeat(H // K, axis=1)
    scores = q @ k.swapaxes(-1, -2)  # (B, H, T, S)
    scores = scores / math.sqrt(D) if scale is None else scores * scale
    if cap:  # Riviere et al. 2024, arXiv:2408.00118, section 2
        scores = cap * np.tanh(scores / cap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + (np.where(mask, 0, -np.inf) if mask.dtype == bool else mask)
    if causal:  # the last query sees every key
        scores = np.where(np.tri(T, S, S - T, dtype=bool), scores, -np.inf)
    if window:  # Beltagy et al. 2020, arXiv:2004.05150: of those the last ones
        scores = np.where(np.tri(T, S, S - T - window, dtype=bool), -np.inf, scores)
    P = np.exp(scores)
    return P / P.sum(-1, keepdims=True) * drop @ v  # eq. (1)


# The fast version goes by tiles of 64 queries, so that a tile's scores may stay in the cache. A
# causal tile leaves out the keys that none of its queries sees, with a window those in front of
# them too. It has all other keys at once, so that its maxima and sums are final; FlashAttention's
# are not. Each query's largest score is subtracted, or exp would overflow. The query heads of a
# group lie beside their key/value head, which is not repeated.
#
# The factor 1 / sqrt(D) goes to q and the division of the softmax to P v, because both are smaller
# than the scores. So P is exp(scores) alone, and the softmax is P rsum, with rsum = 1 / P.sum(-1).
# The backward pass makes P again, as kernels/attention.cu does: the P of all tiles would be B H T S
# numbers.
@op
def attention(q, k, v, mask=None, bias=None, causal=False, window=None, scale=None, cap=None,
              drop=None):
    """softmax(q k^T / sqrt(D) + mask) v, eq. (1) of Vaswani et al. 2017, arXiv:1706.03762.

    q (B, H, T, D), k and v (B, K, S, D), of one dtype -> (B, H, T, D). H is a multiple of K: each
    key/value head serves H / K query heads. mask broadcasts to (B, H, T, S): booleans (True may be
    seen) or numbers added to the scores. causal: the last query sees every key, each earlier query
    one key fewer. window: each sees only the last so many of those. If there are none it gives 0.
    scale: a positive number in place of 1 / sqrt(D). cap: the scores become cap tanh(scores / cap)
    before the mask, and stay between -cap and cap. bias (1 or B, H, T, S), of q's dtype, is added
    to the scores as such a mask is, and has a gradient: T5's positions. drop (1 or B, H, T, S): the
    weights of the values are multiplied by it. Dropout gives 0, or 1 / (1 - p) to those it keeps.

    On a GPU kernels/attention.cu takes bfloat16 without a mask, a bias, a window, a cap or a drop,
    if D is 16, 32 .. 128.
    """
    _check(q, k, v, bias, drop, causal, window, scale=scale, cap=cap)
    D, S = k.shape[3], k.shape[2]
    window = None if window and window >= S else window
    xp, scale = array_module(q), 1 / math.sqrt(D) if scale is None else float(scale)
    plain = mask is bias is window is cap is drop is None
    if xp is not np and q.dtype == "bfloat16" and plain and D in FUSED:
        return _fused(q, k, v, causal, scale)
    return _tiled(q, k, v, mask, bias, drop, causal, window, scale, cap)


def _tiled(q, k, v, mask, bias, drop, causal, window, scale, cap):
    """The same by tiles."""
    xp, (B, H, T, D), (K, S) = array_module(q), q.shape, k.shape[1:3]
    y = xp.empty_like(q)
    held = (q, k, v) if q.dtype.itemsize == 2 else (q * scale, k, v)  # until the backward pass
    grouped = (B, K, H // K, T, D)  # query heads beside the key/value head that serves them
    qg, kg, vg, yg = *_operands(*held, scale, grouped), y.reshape(grouped)
    maskg, biasg, dropg = (_spread(a, (B, H, T, S), grouped, qg.dtype) for a in (mask, bias, drop))

    def weights(qg, kg, b, t, s):
        """_weights of a tile. A closure over qg and kg would keep float32 copies of 16 bits."""
        scores = qg[b, :, :, t] @ kg[b, :, :, s].swapaxes(-1, -2)  # (b, K, H/K, t, s)
        old = window and t.start + S - T - window - s.start  # the last key too old for row 0
        parts = (None if a is None else a[b, :, :, t, s] for a in (biasg, maskg, dropg))
        return _weights(scores, cap, causal, old, *parts, xp)

    tiles = [(b, t, _keys(t, S - T, S, causal, window)) for b, t in _tiles(q, S)]
    for b, t, s in tiles:
        _, PM, rsum, _ = weights(qg, kg, b, t, s)
        yg[b, :, :, t] = PM @ vg[b, :, :, s] * rsum  # eq. (1)

    @once
    def gradients(dy):
        """dV = P^T dy;  dS = P (dy V^T - <dy, y>);  dK = dS^T Q / sqrt(D);  dQ = dS K / sqrt(D).
        With drop M: dV = (P M)^T dy;  dS = P (M dy V^T - <dy, y>)."""
        qg, kg, vg = _operands(*held, scale, grouped)
        fresh = xp.zeros_like if window else xp.empty_like  # if windowed, the last tile lacks keys
        dq, dk, dv = (fresh(x, dtype=qg.dtype) for x in held)
        dbias = None if bias is None else xp.zeros((len(bias), *grouped[1:4], S), qg.dtype)
        dqg, dyg = dq.reshape(grouped), wide(dy).reshape(grouped)
        for b, t, s in reversed(tiles):  # a text's last tile writes dk and dv, the others add
            P, PM, rsum, slope = weights(qg, kg, b, t, s)
            g = dyg[b, :, :, t] * rsum  # in dy's place, as the softmax is P rsum
            dS = g @ vg[b, :, :, s].swapaxes(-1, -2)
            if dropg is not None:
                dS *= dropg[b, :, :, t, s]
            dS -= row_dot(g, yg[b, :, :, t])
            dS *= P
            if bias is not None:
                _add(dbias[b if len(bias) == B else slice(1), :, :, t, s], dS)
            if cap:  # after the bias, which is added to capped scores
                dS *= slope
            _into(dv[b, :, s], PM.swapaxes(-1, -2) @ g, t.stop == T)
            _into(dk[b, :, s], dS.swapaxes(-1, -2) @ qg[b, :, :, t], t.stop == T)
            dqg[b, :, :, t] = dS @ kg[b, :, :, s]
            del P, PM, dS, slope  # or they would stay beside the next tile's
        dq *= scale  # dk needs no factor: qg has it
        return dq, dk, dv, None, None if bias is None else dbias.reshape(bias.shape)

    return y, *(lambda dy, i=i: gradients(dy)[i] for i in range(5))  # dq, dk, dv, none, dbias


def _check(q, k, v, bias, drop, causal, window, **positive):
    """ValueError or TypeError if the operands do not go together."""
    floating("attention", q=q, k=k, v=v)
    one_dtype("attention", q=q, k=k, v=v)
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError("attention needs q (B, H, T, D), k and v (B, K, S, D), got "
                         f"{q.shape}, {k.shape} and {v.shape}")
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if k.shape != v.shape or k.shape != (B, K, S, D) or H % K or (causal and T > S):
        raise ValueError(f"attention: q {q.shape} does not go with k {k.shape} and v {v.shape}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"attention: window {window} must be None, or 1, 2 .. if causal")
    for name, x in (("bias", bias), ("drop", drop)):
        if x is not None:
            floating("attention", **{name: x})
            if x.shape not in ((1, H, T, S), (B, H, T, S)):
                raise ValueError(f"attention: {name} {x.shape} must be {(B, H, T, S)}, or 1 for B")
    if bias is not None:
        one_dtype("attention", q=q, bias=bias)
    for name, x in positive.items():
        if x is not None and not 0 < x < math.inf:
            raise ValueError(f"attention: {name} {x} must be None or a positive number")


def _fused(q, k, v, causal, scale):
    """The same in kernels that never write the scores to memory, forward or backward."""
    q, k, v = cuda.aligned(q), cuda.aligned(k), cuda.aligned(v)
    y, lse = cuda.attention_forward(q, k, v, causal, scale)

    @once
    def gradients(dy):
        return cuda.attention_backward(cuda.aligned(dy), q, k, v, y, lse, causal, scale)
    return y, *(lambda dy, i=i: gradients(dy)[i] for i in range(3))  # dq, dk, dv


def _operands(q, k, v, scale, grouped):
    """q / sqrt(D), k and v by groups of heads, in at least float32.

    16-bit inputs are widened here in the forward pass and again in the backward pass, so that only
    16 bits are kept between them. For wider inputs q is already divided by sqrt(D).
    """
    if q.dtype.itemsize == 2:
        q, k, v = wide(q) * scale, wide(k), wide(v)
    return q.reshape(grouped), k[:, :, None], v[:, :, None]


def _capped(scores, cap, xp):
    """Turn the scores into cap tanh(scores / cap), and return its slope, 1 - tanh^2."""
    scores /= cap
    xp.tanh(scores, out=scores)
    slope = 1 - scores * scores
    scores *= cap
    return slope


def _weights(scores, cap, causal, old, bias, mask, drop, xp):
    """(P, P times drop, rsum, the cap's slope): softmax(scores) = P rsum, for scores (..., t, s).

    rsum (..., t, 1) is 1 / P.sum(-1). The scores' own array becomes P. old: row i may not see the
    keys up to old + i; None: there is no window.
    """
    (t, s), dtype = scores.shape[-2:], scores.dtype
    slope = _capped(scores, cap, xp) if cap else None
    if bias is not None:
        scores += bias
    if old is not None:
        scores += _past(t, s, old, dtype, xp)
    if causal and t > 1:  # the last t keys are the queries' own
        scores[..., s - t :] += _future(t, dtype, xp)
    if mask is not None:
        scores += mask
    top = scores.max(-1, keepdims=True)  # -inf if a mask hides all of a row's keys
    scores -= top if mask is None else xp.maximum(top, xp.finfo(dtype).min)
    P = xp.exp(scores, out=scores)
    total = row_sum(P)  # at least 1, but 0 if a row may see no key
    rsum = 1 / (total if mask is None else xp.maximum(total, 1))
    return P, P if drop is None else P * drop, rsum, slope


def _tiles(q, S):
    """(Slice over the batch, slice over the queries) of each tile, text after text.

    A tile has as many texts as have up to BLOCK scores together, but at least one; on a GPU all.
    """
    B, H, T, _ = q.shape
    if array_module(q) is not np:
        return [(slice(0, B), slice(0, T))]
    t = min(T, TILE)
    b = max(1, BLOCK // (H * t * S))
    return [(slice(i, min(i + b, B)), slice(j, min(j + t, T)))
            for i in range(0, B, b) for j in range(0, T, t)]


def _keys(t, before, S, causal, window):
    """The keys that a tile of queries t sees; `before` keys are in front of the first query's."""
    first = max(0, before + t.start + 1 - window) if window else 0
    return slice(first, before + t.stop if causal else S)


@functools.lru_cache(64)
def _past(t, s, old, dtype, xp):
    """-inf for row i's keys up to old + i, which are in front of its window: (t, s)."""
    return xp.where(xp.tri(t, s, old, dtype=bool), xp.asarray(-xp.inf, dtype), xp.asarray(0, dtype))


@functools.lru_cache(64)
def _future(t, dtype, xp):
    """-inf above the diagonal, for keys behind a row's own: (t, t)."""
    return xp.triu(xp.full((t, t), -xp.inf, dtype), 1)


def _spread(mask, shape, grouped, dtype):
    """A mask, bias or drop as numbers of dtype, broadcast to the scores' shape without a copy, with
    heads by groups. None stays None. The shape of bias and drop is known to fit, see _check."""
    if mask is None:
        return None
    xp = array_module(mask)
    mask = xp.where(mask, 0, -xp.inf) if mask.dtype == bool else mask
    try:
        whole = xp.broadcast_to(mask.astype(dtype, copy=False), shape)
    except ValueError:
        raise ValueError(f"attention: mask {mask.shape} does not broadcast to {shape}") from None
    return whole.reshape(*grouped[:4], shape[3])


def _add(out, dS):
    """Add dS (b, K, H/K, t, s) to out, or its sum over b to the one that all texts share."""
    out += dS if len(out) == len(dS) else dS.sum(0, keepdims=True)


def _into(out, dx, first):
    """Sum dx (b, K, H/K, s, D) over a group's query heads; write (first) or add it to out."""
    dx = dx[:, :, 0] if dx.shape[2] == 1 else dx.sum(2)
    if first:
        out[...] = dx
    else:
        out += dx
