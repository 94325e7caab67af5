"""Softmax, and the losses that compare a model's answers with the right ones.

Shapes: V vocabulary, C width, N rows, "..." any leading axes. Losses are scalars, in at least
float32.
"""

import numpy as np

from minilm.arrays import by_rows, described, floating, one_shape, row_dot, row_sum, rows, wide
from minilm.backend import array_module
from minilm.ranges import POSITIVE, check
from minilm.tensor import op


def of_text(targets, mask=None, ignore_index=-100):
    """The targets (B, T) with ignore_index where mask (B, T) is 0: padding is never counted.

    Targets (B,) are of whole texts, which all count.
    """
    if mask is None or getattr(targets, "ndim", 2) == 1:
        return targets
    xp, shape = array_module(targets), getattr(mask, "shape", None)
    if shape != targets.shape:
        raise ValueError(f"mask {shape} does not go with rows {targets.shape}")
    return xp.where(xp.asarray(mask) != 0, targets, ignore_index)


@op
def softmax(x):
    """exp(x) / sum(exp(x)) over the last axis. TypeError for integers."""
    floating("softmax", x=x)
    def formula(x):
        e = array_module(x).exp(wide(x) - x.max(-1, keepdims=True))
        return e / row_sum(e)

    p = by_rows(formula, x)
    # dp_j/dx_i = p_j (1[i = j] - p_i), so dx = p (dp - <dp, p>)
    def dx(dp): return by_rows(lambda dp, p: p * (dp - row_dot(wide(dp), p)), dp, p)
    return p.astype(x.dtype, copy=False), dx


@op
def log_softmax(x):
    """log(softmax(x)) over the last axis, exact even if softmax(x) underflows."""
    floating("log_softmax", x=x)
    y = by_rows(_log_softmax, x)
    def dx(dy): return dy - array_module(y).exp(y) * row_sum(wide(dy))
    return y.astype(x.dtype, copy=False), dx


def _log_softmax(x, temperature=1.0):
    z = wide(x) - x.max(-1, keepdims=True)
    z /= temperature
    xp = array_module(z)
    z -= xp.log(row_sum(xp.exp(z)))
    return z


def plain_cross_entropy(logits, targets):  # (N, V), (N,) -> ()
    """The mean of -log p[target] with p = softmax(logits): the formula of `cross_entropy`."""
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.log(p[np.arange(len(targets)), targets]).mean()


@op
def cross_entropy(logits, targets, ignore_index=-100, total=None):
    """Mean of -log softmax(logits)[target] over the targets that are not ignore_index.

    logits (..., V), targets integers (...) -> (), in nats, at least float32. total: divide by this
    number of targets instead, so that the parts of a split batch add up to the whole batch's loss.
    TypeError for targets that are no integers. ValueError if a target is out of range or none is
    left to average. If the logits are on a GPU, targets may stay NumPy's: checking them on the CPU
    does not wait for the card.

    What differs from the plain form: the largest logit is subtracted first, or exp would overflow.
    -log p is log(sum(exp(logits))) - logit, which is exact even if p underflows. p is kept, and
    dlogits is written into it, because it is the largest array of a model.

    >>> float(cross_entropy(np.zeros((3, 4)), np.array([2, 0, -100])).data.round(4))  # log 4
    1.3863
    """
    floating("cross_entropy", logits=logits)
    if targets.dtype.kind not in "iu":
        raise TypeError(f"cross_entropy: targets must be integers, got {described(targets)}")
    if logits.ndim == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(f"cross_entropy: logits {logits.shape} do not go with {targets.shape}")
    V, lead, z, t = logits.shape[-1], logits.shape, rows(logits), targets.reshape(-1)
    counted = t != ignore_index
    n = int(counted.sum()) if total is None else total
    if n == 0:
        raise ValueError(f"cross_entropy: every target is {ignore_index}; nothing to average")
    t = t * counted  # targets that are not counted become class 0
    if t.size and (t.min() < 0 or t.max() >= V):
        raise ValueError(f"cross_entropy: targets from {t.min()} to {t.max()}, but V is {V}")
    xp = array_module(z)
    t, counted = xp.asarray(t), xp.asarray(counted)  # they may be NumPy's

    p, losses = by_rows(surprise, z, t[:, None])

    def dlogits(dy):  # (p - onehot(target)) / n
        p[xp.arange(len(t)), t] -= 1
        p[...] *= (counted * (dy / n)).astype(p.dtype)[:, None]
        return p.reshape(lead)
    return (losses * counted).sum() / n, dlogits, None


def surprise(z, t):  # (N, V), (N, 1) -> (N, V), (N,)
    """(p, -log p[t]) with p = softmax(z), exact even if p underflows."""
    xp, z = array_module(z), wide(z) - z.max(-1, keepdims=True)
    zt = z[xp.arange(len(t)), t[:, 0]]
    p = xp.exp(z, out=z)
    l = row_sum(p)
    p /= l
    return p, xp.log(l[:, 0]) - zt


@op
def kl_divergence(student, teacher, temperature=1.0, mask=None, total=None):
    """Mean over rows of KL(p || q), p = softmax(teacher / T) and q = softmax(student / T), in nats.

    student, teacher: logits (..., V) -> (). Swap the two for KL(q || p). mask (...): the rows that
    count, by default all. total: divide by this number of rows instead, as in cross_entropy.
    The gradient shrinks like 1/T^2, so Hinton et al. 2015, arXiv:1503.02531, multiply by T^2.
    """
    floating("kl_divergence", student=student, teacher=teacher)
    one_shape("kl_divergence", student=student, teacher=teacher)
    check({"temperature": POSITIVE}, temperature=temperature)
    share = row_shares("kl_divergence", student, mask, total)

    def formula(s, t):
        log_q, log_p = (_log_softmax(z, temperature) for z in (s, t))
        p, xp = array_module(s).exp(log_p), array_module(s)
        log_p -= log_q
        gap = xp.exp(log_q, out=log_q)
        gap -= p
        return row_dot(p, log_p)[..., 0], gap

    def dteacher_rows(t, s, kl):  # computed only if asked for, which is rare
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

    1e-12 is added to squared lengths, as in PyTorch, so that a row of zeros has a gradient.
    """
    floating("cosine_embedding", x=x, y=y)
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
    """The weights of the rows of x (..., C) in a mean over those that mask (...) counts: (...)."""
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
    """Mean of (x - y)^2 over all elements, for x and y of one shape -> ()."""
    one_shape("mse", x=x, y=y)
    gap = wide(x) - wide(y)
    def dx(dy): return dy * (2 / gap.size) * gap
    def dy(d): return d * (-2 / gap.size) * gap
    return (gap * gap).mean(), dx, dy
