"""Launchers of the reference kernel for LoRA's products."""

from minilm.arrays import one_dtype
from minilm.backend import array_module
from minilm.cuda.raw import kernel


def lora_forward(x, W, A, B, scale):
    """y = x W^T + h B^T and h = scale x A^T, for x (M, I), W (O, I), A (r, I), B (O, r).

    All float32, float16 or bfloat16, with sums in float32. Returns (y, h); lora_backward needs h.
    """
    _check_lora("lora_forward", x=x, W=W, A=A, B=B)
    h = _lora_matmul(x, A, scale=scale)
    return _lora_matmul(x, W, (h, B)), h


def lora_backward(dy, x, h, W, A, B, scale):
    """(dx, dA, dB) of lora_forward, for dy (M, O) and the h that it returned, (M, r)."""
    _check_lora("lora_backward", x=x, W=W, A=A, B=B, dy=dy, h=h)
    dh = _lora_matmul(dy, B, turned=(False, True), scale=scale)
    dx = _lora_matmul(dy, W, (dh, A), turned=(False, True))
    dA, dB = (_lora_matmul(*pair, turned=(True, True)) for pair in ((dh, x), (dy, h)))
    return dx, dA, dB


def _check_lora(what, x, W, A, **others):
    """Check that all arrays fit together, before the first of several launches."""
    arrays = {"x": x, "W": W, "A": A, **others}
    one_dtype(what, **arrays)
    matmul = kernel("lora_matmul.cu", "lora_matmul", x.dtype)
    for name, a in arrays.items():
        matmul.check(a, name, x.dtype)
    if not x.ndim == W.ndim == A.ndim == 2:
        raise ValueError(f"{what} takes matrices, got x {x.shape}, W {W.shape}, A {A.shape}")
    (M, I), O, r = x.shape, len(W), len(A)
    fits = {"x": (M, I), "W": (O, I), "A": (r, I), "B": (O, r), "dy": (M, O), "h": (M, r)}
    for name, a in arrays.items():
        if a.shape != fits[name]:
            raise ValueError(f"{what}: {name} must be {fits[name]}, got {a.shape}")


def _lora_matmul(P, Q, more=None, turned=(False, False), scale=1.0):
    """scale (P Q^T + P2 Q2^T) if more = (P2, Q2), and scale P Q^T if more is None.

    turned: whether P and P2 lie in memory as their transposes, and whether Q and Q2 do.
    """
    p, q = (-1 if t else 1 for t in turned)
    P2, Q2 = more or (P, Q)
    (M, K), N, R = P.shape[::p], Q.shape[::q][0], P2.shape[::p][1] if more else 0
    C = array_module(P).empty((M, N), P.dtype)
    if C.size:
        kernel("lora_matmul.cu", "lora_matmul", C.dtype)(
            (-(-M // 64) * -(-N // 64),), (256,), P, Q, P2, Q2, C, M, N, K, R, *turned, scale)
    return C
