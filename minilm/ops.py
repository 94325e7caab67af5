"""The differentiable functions: linear layers, tables, norms, dropout, and the names of all others.

Attention, the activation functions and the losses have files of their own. If speed made an op
long, its formula stands in front of it as a plain function of arrays: the op's specification.

Shapes: C width, V vocabulary, I in, O out, N rows, "..." any leading axes. Each op takes Tensors or
arrays and returns a Tensor. It raises ValueError if shapes do not fit together, and products raise
TypeError if dtypes differ. Tests compare each op with its PyTorch twin.

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
from minilm.activations import gelu, relu, silu, soft_cap, swiglu, tanh
from minilm.arrays import (
    by_rows,
    described,
    floating,
    one_dtype,
    row_dot,
    row_sum,
    rows,
    scatter_add,
    wide,
)
from minilm.attention import attention
from minilm.backend import array_module
from minilm.blas import matmul as product
from minilm.heads import merge_heads, rotary, split_heads
from minilm.losses import cosine_embedding, cross_entropy, kl_divergence, log_softmax, mse, softmax
from minilm.tensor import add, concat, matmul, mul, op

__all__ = [
    "add", "attention", "concat", "cosine_embedding", "cross_entropy", "dropout", "embedding",
    "gelu", "kl_divergence", "layer_norm", "linear", "log_softmax", "matmul", "merge_heads", "mse",
    "mul", "relu", "rms_norm", "rotary", "silu", "soft_cap", "softmax", "split_heads", "swiglu",
    "tanh",
]


@op
def linear(x, W, b=None):
    """x W^T + b, with PyTorch's layout of W: (..., I), (O, I), (O,) -> (..., O)."""
    if x.ndim == 0 or W.ndim != 2:
        raise ValueError(f"linear needs x (..., I) and W (O, I), got {x.shape} and {W.shape}")
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
def embedding(ids, W, padding=None):
    """W[ids], ids from 0 to V - 1: integers (...), (V, C) -> (..., C).

    padding: an id that stands for no token. As in PyTorch, its row gets no gradient from here.
    If W is on a GPU, ids may stay NumPy's: checking them on the CPU does not wait for the card.
    """
    if W.ndim != 2:
        raise ValueError(f"embedding: W must be (V, C), got {W.shape}")
    V, xp = len(W), array_module(W)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"embedding: ids must be integers, got {described(ids)}")
    if ids.size and (ids.min() < 0 or ids.max() >= V):
        raise ValueError(f"ids from {ids.min()} to {ids.max()}, but the table has {V} rows")

    def dW(dy):
        if xp is not np and dy.dtype in cuda.COMPUTES:
            total = cuda.scatter_add(ids.reshape(-1), cuda.aligned(rows(dy)), V)
        else:
            total = scatter_add(xp.asarray(ids).reshape(-1), rows(dy), V)
        if padding is not None:
            total[padding] = 0
        return total
    return W[xp.asarray(ids)], None, dW


def plain_layer_norm(x, g, b, eps=1e-5):
    """(x - mean) / sqrt(var + eps) g + b, for arrays; eqs. (3) and (4) of Ba et al. 2016."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)  # eq. (3)
    return (x - mean) / np.sqrt(var + eps) * g + b  # eq. (4)


@op
def layer_norm(x, g, b, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * g + b over the last axis. Ba et al. 2016, arXiv:1607.06450.

    (..., C), (C,), (C,) -> (..., C).

    What differs from the plain form: it works on blocks of rows that stay in the cache, BLAS adds
    up each row, and sums are in at least float32. dx needs xhat = (x - mean) rstd and
    rstd = 1 / sqrt(var + eps), so both are kept.
    """
    check_norm("layer_norm", x, g=g, b=b)
    C, dtype = x.shape[-1], x.dtype

    def formula(x):
        x = wide(x)
        xhat = x - row_sum(x) / C
        rstd = 1 / array_module(x).sqrt(row_dot(xhat, xhat) / C + eps)
        xhat *= rstd
        return (xhat * g + b).astype(dtype, copy=False), xhat, rstd

    y, xhat, rstd = by_rows(formula, x)

    # xhat has mean 0 and variance 1, so dx is dxhat without its mean and its part along xhat, times
    # rstd: (..., C)
    def dx_rows(dy, xhat, rstd):
        dxhat = dy * g
        dxhat -= row_sum(dxhat) / C + xhat * (row_dot(dxhat, xhat) / C)
        dxhat *= rstd
        return dxhat

    def dx(dy): return by_rows(dx_rows, wide(dy), xhat, rstd)
    def dg(dy): return dy * xhat
    def db(dy): return dy
    return y, dx, dg, db


def check_norm(name, x, **vectors):
    """TypeError for integers, ValueError if a vector has not the width of x."""
    floating(name, x=x, **vectors)
    if x.ndim == 0 or any(vector.shape != x.shape[-1:] for vector in vectors.values()):
        found = ", ".join(f"{key} {vector.shape}" for key, vector in vectors.items())
        raise ValueError(f"{name}: x {x.shape} does not go with {found}")


def plain_rms_norm(x, g, eps=1e-6):
    """x / RMS(x) g with RMS(x) = sqrt(mean(x^2) + eps); eq. (4) of Zhang & Sennrich 2019."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * g  # eq. (4)


@op
def rms_norm(x, g, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * g over the last axis. Zhang & Sennrich 2019, arXiv:1910.07467.

    (..., C), (C,) -> (..., C). On a GPU kernels/rms_norm.cu computes it, except in float64. On a
    CPU it works on blocks of rows, as layer_norm does.
    """
    check_norm("rms_norm", x, g=g)
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
    """The same in one pass. It keeps x in its own dtype instead of xhat in float32."""
    x, g = cuda.aligned(x), cuda.aligned(g)
    y, rstd = cuda.rms_norm(x, g, eps)

    def dx(dy): return cuda.rms_norm_backward(cuda.aligned(dy), x, g, rstd)
    def dg(dy): return wide(dy) * wide(x) * rstd[..., None]
    return y, dx, dg


@op
def dropout(x, p, rng):
    """x with each element zeroed with probability p and the rest divided by 1 - p.

    rng: the NumPy Generator that draws which. ValueError unless 0 <= p < 1.
    Source: Srivastava et al. 2014, JMLR 15, in the variant that scales during training.
    On a GPU rng draws only a seed and kernels/dropout.cu does the rest, except in float64.
    """
    floating("dropout", x=x)
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p must be in [0, 1), got {p}")
    if p == 0:
        return x, lambda dy: dy
    if not hasattr(rng, "random"):
        raise TypeError(f"dropout: rng must be a NumPy Generator, got {described(rng)}")
    if array_module(x) is not np and x.dtype in cuda.COMPUTES:
        seed = int(rng.integers(2**63))
        def dx(dy): return cuda.dropout(cuda.aligned(dy), p, seed)
        return cuda.dropout(cuda.aligned(x), p, seed), dx
    kept = array_module(x).asarray(drawn(rng, x.shape, p))
    scale = 1 / (1 - p)
    y = (x * kept * scale).astype(x.dtype, copy=False)
    return y, lambda dy: dy * kept * scale


def drawn(rng, shape, p):
    """Which elements to keep: True with probability 1 - p."""
    return rng.random(shape, dtype=np.float32) >= p
