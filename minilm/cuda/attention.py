"""Launchers of fused attention, forward and backward."""

import math

from minilm.backend import array_module
from minilm.cuda.raw import kernel


def attention_forward(q, k, v, causal: bool, scale: float | None = None):
    """(y, lse) of softmax(q k^T / sqrt(D)) v: q (B, H, T, D), k and v (B, K, S, D), all bfloat16.

    H is a multiple of K. D is a multiple of 16, up to 128. causal: the last query sees every key,
    each earlier query one key fewer. scale: a positive number in place of 1 / sqrt(D).
    lse (B, H, T) float32 is the logarithm of the softmax's denominator; attention_backward needs
    it.
    """
    _check_attention("attention_forward", q, k, v, causal)
    xp, (B, H, T, D), (K, S) = array_module(q), q.shape, k.shape[1:3]
    scale = 1 / math.sqrt(D) if scale is None else scale
    y, lse = xp.empty((B, H, T, D), "bfloat16"), xp.empty((B, H, T), "float32")
    kernel("attention.cu", "attention_forward", "bfloat16", HEAD_WIDTH=D)(
        (B * H, -(-T // _rows(D))), (128,), q, k, v, y, lse, T, S, H // K, causal, scale)
    return y, lse


def attention_backward(dy, q, k, v, y, lse, causal: bool, scale: float | None = None):
    """(dq, dk, dv) of attention_forward, for dy shaped like its y; the same bits every time."""
    _check_attention("attention_backward", q, k, v, causal, dy=dy, y=y, lse=lse)
    xp, (B, H, T, D), (K, S) = array_module(q), q.shape, k.shape[1:3]
    dq, dk, dv = (xp.empty(a.shape, "bfloat16") for a in (q, k, v))
    scale = 1 / math.sqrt(D) if scale is None else scale
    delta, sizes = xp.empty((B, H, T), "float32"), (T, S, H // K, causal, scale)
    kernel("attention_backward.cu", "attention_dq", "bfloat16", HEAD_WIDTH=D)(
        (B * H, -(-T // _rows(D))), (128,), dy, q, k, v, y, lse, delta, dq, *sizes)  # writes delta
    kernel("attention_backward.cu", "attention_dk_dv", "bfloat16", HEAD_WIDTH=D)(
        (B * K, -(-S // 64)), (256,), dy, q, k, v, lse, delta, dk, dv, *sizes)
    return dq, dk, dv


def _rows(D):
    """The queries of a block, which the kernels call ROWS."""
    return 128 if D <= 64 else 64


def _check_attention(what, q, k, v, causal, **others):
    """ValueError if the shapes do not fit together."""
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and 0 not in q.shape + k.shape
    if fits:
        (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
        fits = k.shape == (B, K, S, D) and H % K == 0 and not (causal and T > S)
    if not fits:
        raise ValueError(f"{what}: q {q.shape} does not go with k {k.shape} and v {v.shape}")
    if D % 16 or D > 128:
        raise ValueError(f"{what} takes heads of width 16, 32 .. 128, got {D}")
    for name, a in others.items():
        if a.shape != (q.shape[:3] if name == "lse" else q.shape):
            raise ValueError(f"{what}: {name} {a.shape} does not go with q {q.shape}")
