"""The differentiable functions, from the simplest to the losses.

Attention and the activation functions have files of their own.

Shapes: C width, V vocabulary, I in, O out, N rows, "..." any leading axes. Each op takes Tensors or
arrays and returns a Tensor; it raises ValueError where shapes do not go together, and products
raise TypeError for two dtypes. Each is checked against its PyTorch twin.

>>> from minilm.tensor import Tensor
>>> W = Tensor(np.eye(2), requires_grad=True)
>>> loss = cross_entropy(linear(np.array([[0.0, 3.0]]), W), np.array([1]))
>>> loss.backward()
>>> W.grad.round(4)
array([[ 0.    ,  0.1423],
       [ 0.    , -0.1423]])
"""

import numpy as np

from minilm import cuda
from minilm.activations import gelu, relu, silu, swiglu
from minilm.arrays import by_rows, one_dtype, one_shape, row_dot, row_sum, rows, scatter_add, wide
from minilm.attention import attention, merge_heads, rotary, split_heads
from minilm.backend import array_module
from minilm.blas import matmul as product
from minilm.tensor import add, matmul, mul, op

__all__ = [
    "add", "attention", "cosine_embedding", "cross_entropy", "dropout", "embedding", "gelu",
    "kl_divergence", "layer_norm", "linear", "log_softmax", "matmul", "merge_heads", "mse", "mul",
    "relu", "rms_norm", "rotary", "silu", "softmax", "split_heads", "swiglu",
]


@op
def linear(x, W, b=None):
    """x W^T + b, with PyTorch's layout of W: (..., I), (O, I), (O,) -> (..., O)."""
    if x.shape[-1] != W.shape[1]:
        raise ValueError(f"linear: x has {x.shape[-1]} features, W {W.shape} takes {W.shape[1]}")
    one_dtype("linear", x=x, W=W)
    lead = x.shape[:-1]

    def dx(dy): return product(rows(dy), W).reshape(*lead, -1)
    def dW(dy): return product(rows(dy).T, rows(x))
    def db(dy): return dy
    y = product(rows(x), W.T)
    if b is not None:
        y += b
    return y.reshape(*lead, -1), dx, dW, db


@op
def embedding(ids, W):
    """W[ids], ids from 0 to V - 1: integers (...), (V, C) -> (..., C).

    With W on a GPU ids may stay NumPy's: to check those does not wait for the card.
    """
    V, xp = len(W), array_module(W)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"embedding: ids must be integers, got dtype {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= V):
        raise ValueError(f"ids from {ids.min()} to {ids.max()}, but the table has {V} rows")

    def dW(dy):
        if xp is not np and dy.dtype in cuda.COMPUTES:
            return cuda.scatter_add(ids.reshape(-1), cuda.aligned(rows(dy)), V)
        return scatter_add(xp.asarray(ids).reshape(-1), rows(dy), V)
    return W[xp.asarray(ids)], None, dW


@op
def softmax(x):
    """exp(x) / sum(exp(x)) over the last axis."""
    def formula(x):
        e = array_module(x).exp(wide(x) - x.max(-1, keepdims=True))
        return e / row_sum(e)

    p = by_rows(formula, x)
    # dp_j/dx_i = p_j (1[i = j] - p_i), so dx = p (dp - <dp, p>)
    def dx(dp): return by_rows(lambda dp, p: p * (dp - row_dot(wide(dp), p)), dp, p)
    return p.astype(x.dtype, copy=False), dx


@op
def log_softmax(x):
    """log(softmax(x)) over the last axis, exact where softmax(x) underflows."""
    y = by_rows(_log_softmax, x)
    def dx(dy): return dy - array_module(y).exp(y) * row_sum(wide(dy))
    return y.astype(x.dtype, copy=False), dx


def _log_softmax(x, temperature=1.0):
    z = wide(x) - x.max(-1, keepdims=True)
    z /= temperature
    xp = array_module(z)
    z -= xp.log(row_sum(xp.exp(z)))
    return z


@op
def layer_norm(x, g, b, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * g + b over the last axis. Ba et al. 2016, arXiv:1607.06450.

    (..., C), (C,), (C,) -> (..., C).
    """
    C, dtype = x.shape[-1], x.dtype

    def formula(x):
        x = wide(x)
        xhat = x - row_sum(x) / C
        rstd = 1 / array_module(x).sqrt(row_dot(xhat, xhat) / C + eps)
        xhat *= rstd
        return (xhat * g + b).astype(dtype, copy=False), xhat, rstd

    y, xhat, rstd = by_rows(formula, x)

    # xhat has mean 0 and variance 1, so dx is what is left of dxhat across both: (..., C)
    def dx_rows(dy, xhat, rstd):
        dxhat = dy * g
        dxhat -= row_sum(dxhat) / C + xhat * (row_dot(dxhat, xhat) / C)
        dxhat *= rstd
        return dxhat

    def dx(dy): return by_rows(dx_rows, wide(dy), xhat, rstd)
    def dg(dy): return dy * xhat
    def db(dy): return dy
    return y, dx, dg, db


@op
def rms_norm(x, g, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * g over the last axis. Zhang & Sennrich 2019, arXiv:1910.07467.

    (..., C), (C,) -> (..., C). On a GPU this is kernels/rms_norm.cu, but for float64.
    """
    if array_module(x) is not np and x.dtype in cuda.COMPUTES and g.dtype == x.dtype:
        return _rms_norm_by_kernel(x, g, eps)
    C, dtype = x.shape[-1], x.dtype

    def formula(x):
        x = wide(x)
        rstd = 1 / array_module(x).sqrt(row_dot(x, x) / C + eps)
        xhat = x * rstd
        return (xhat * g).astype(dtype, copy=False), xhat, rstd

    y, xhat, rstd = by_rows(formula, x)

    def dx_rows(dy, xhat, rstd):
        dxhat = dy * g
        dxhat -= xhat * (row_dot(dxhat, xhat) / C)
        dxhat *= rstd
        return dxhat

    def dx(dy): return by_rows(dx_rows, wide(dy), xhat, rstd)
    def dg(dy): return dy * xhat
    return y, dx, dg


def _rms_norm_by_kernel(x, g, eps):
    """The same in one pass, which keeps x in its own dtype instead of xhat in float32."""
    x, g = cuda.aligned(x), cuda.aligned(g)
    y, rstd = cuda.rms_norm(x, g, eps)

    def dx(dy): return cuda.rms_norm_backward(cuda.aligned(dy), x, g, rstd)
    def dg(dy): return wide(dy) * wide(x) * rstd[..., None]
    return y, dx, dg


@op
def dropout(x, p, rng):
    """x with each element zeroed with probability p and the rest divided by 1 - p.

    rng: the numpy Generator that draws them. ValueError unless 0 <= p < 1.
    Source: Srivastava et al. 2014, JMLR 15, in the form that scales while training.
    On a GPU rng draws a seed, and kernels/dropout.cu the rest, but for float64.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p must be in [0, 1), got {p}")
    if p == 0:
        return x, lambda dy: dy
    if array_module(x) is not np and x.dtype in cuda.COMPUTES:
        seed = int(rng.integers(2**63))
        def dx(dy): return cuda.dropout(cuda.aligned(dy), p, seed)
        return cuda.dropout(cuda.aligned(x), p, seed), dx
    kept = array_module(x).asarray(drawn(rng, x.shape, p))
    scale = 1 / (1 - p)
    y = (x * kept * scale).astype(x.dtype, copy=False)
    return y, lambda dy: dy * kept * scale


def drawn(rng, shape, p):
    """True with probability 1 - p."""
    return rng.random(shape, dtype=np.float32) >= p


@op
def cross_entropy(logits, targets, ignore_index=-100, total=None):
    """Mean of -log softmax(logits)[target] over the targets that are not ignore_index.

    logits (..., V), targets integers (...) -> (), in nats, at least float32. total: divide by this
    number of targets instead, so that the parts of a split batch add up to the whole batch's loss.
    ValueError where a target is out of range or none is left to average. With logits on a GPU
    targets may stay NumPy's: to check those does not wait for the card.

    >>> float(cross_entropy(np.zeros((3, 4)), np.array([2, 0, -100])).data.round(4))  # log 4
    1.3863
    """
    V = logits.shape[-1]
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"cross_entropy: logits {logits.shape} do not go with {targets.shape}")
    lead, z, t = logits.shape, rows(logits), targets.reshape(-1)
    counted = t != ignore_index
    n = int(counted.sum()) if total is None else total
    if n == 0:
        raise ValueError(f"cross_entropy: every target is {ignore_index}; nothing to average")
    t = t * counted  # any class will do where nothing is counted
    if t.size and (t.min() < 0 or t.max() >= V):
        raise ValueError(f"cross_entropy: targets from {t.min()} to {t.max()}, {V} classes")
    xp = array_module(z)
    t, counted = xp.asarray(t), xp.asarray(counted)  # they may come from the host

    def formula(z, t):
        z = wide(z) - z.max(-1, keepdims=True)
        zt = z[xp.arange(len(t)), t[:, 0]]
        p = xp.exp(z, out=z)
        l = row_sum(p)
        p /= l
        return p, xp.log(l[:, 0]) - zt

    p, losses = by_rows(formula, z, t[:, None])

    def dlogits(dy):  # (p - onehot(target)) / n
        p[xp.arange(len(t)), t] -= 1
        p[...] *= (counted * (dy / n)).astype(p.dtype)[:, None]
        return p.reshape(lead)
    return (losses * counted).sum() / n, dlogits, None


@op
def kl_divergence(student, teacher, temperature=1.0, mask=None, total=None):
    """Mean over rows of KL(p || q), p = softmax(teacher / T) and q = softmax(student / T), in nats.

    student, teacher: logits (..., V) -> (). Exchange the two for KL(q || p). mask (...): the rows
    that count, by default all. total: divide by this number of rows instead, as in cross_entropy.
    The gradient shrinks like 1/T^2: Hinton et al. 2015, arXiv:1503.02531, multiply by T^2.
    """
    one_shape("kl_divergence", student=student, teacher=teacher)
    share = row_shares("kl_divergence", student, mask, total)

    def formula(s, t):
        log_q, log_p = (_log_softmax(z, temperature) for z in (s, t))
        p, xp = array_module(s).exp(log_p), array_module(s)
        log_p -= log_q
        gap = xp.exp(log_q, out=log_q)
        gap -= p
        return row_dot(p, log_p)[..., 0], gap

    def dteacher_rows(t, s, kl):  # computed when it is asked for, which is seldom
        log_q, log_p = (_log_softmax(z, temperature) for z in (s, t))
        return array_module(s).exp(log_p) * (log_p - log_q - kl)

    kl, gap = by_rows(formula, student, teacher)

    def dstudent(dy):  # (q - p) / T, Hinton's eq. (2)
        gap[...] *= (share * (dy / temperature))[..., None]
        return gap
    def dteacher(dy):  # p (log p - log q - KL) / T
        dt = by_rows(dteacher_rows, teacher, student, kl[..., None])
        dt *= (share * (dy / temperature))[..., None]
        return dt
    return (kl * share).sum(), dstudent, dteacher


@op
def cosine_embedding(x, y, mask=None, total=None):
    """Mean over rows of 1 - cos(x, y): (..., C), (..., C) -> (). mask, total as in kl_divergence.

    Squared lengths are taken 1e-12 larger, as in PyTorch, so that a row of zeros has a gradient.
    """
    one_shape("cosine_embedding", x=x, y=y)
    share = row_shares("cosine_embedding", x, mask, total)
    x, y = wide(x), wide(y)
    norm_x, norm_y = (array_module(z).sqrt(row_dot(z, z) + 1e-12) for z in (x, y))
    cos = row_dot(x, y) / (norm_x * norm_y)

    # d cos/dx = (yhat - cos xhat) / |x|
    def dx(dy): return (share * -dy)[..., None] * (y / norm_y - cos * x / norm_x) / norm_x
    def dy(d): return (share * -d)[..., None] * (x / norm_x - cos * y / norm_y) / norm_y
    return ((1 - cos[..., 0]) * share).sum(), dx, dy


def row_shares(name, x, mask, total):
    """What each row of x (..., C) weighs in a mean over those that mask (...) counts: (...)."""
    xp, lead, dtype = array_module(x), x.shape[:-1], wide(x[:0]).dtype
    counted = xp.ones(lead, bool) if mask is None else xp.asarray(mask) != 0
    if counted.shape != lead:
        raise ValueError(f"{name}: mask {counted.shape} does not go with rows {lead}")
    n = int(counted.sum()) if total is None else total
    if n == 0:
        raise ValueError(f"{name}: no row counts; nothing to average")
    return counted.astype(dtype) / n


@op
def mse(x, y):
    """Mean of (x - y)^2 over all elements: two of one shape -> ()."""
    one_shape("mse", x=x, y=y)
    gap = wide(x) - wide(y)
    def dx(dy): return dy * (2 / gap.size) * gap
    def dy(d): return d * (-2 / gap.size) * gap
    return (gap * gap).mean(), dx, dy
