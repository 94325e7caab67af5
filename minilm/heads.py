"""What stands around attention: heads apart and together, and rotary positions.

Shapes: B batch, T tokens, H heads, D head width.
"""

import numpy as np

from minilm import cuda
from minilm.arrays import floating
from minilm.backend import array_module
from minilm.tensor import op


@op
def split_heads(x, heads):
    """(B, T, H D) -> (B, H, T, D)."""
    if x.ndim != 3 or heads < 1:
        raise ValueError(f"split_heads needs x (B, T, H D) and heads >= 1, got {x.shape}, {heads}")
    B, T, C = x.shape
    if C % heads:
        raise ValueError(f"split_heads: width {C} is not a multiple of {heads} heads")
    y = x.reshape(B, T, heads, C // heads).transpose(0, 2, 1, 3)
    return y, lambda dy: dy.transpose(0, 2, 1, 3).reshape(B, T, C)


@op
def merge_heads(x):
    """(B, H, T, D) -> (B, T, H D)."""
    if x.ndim != 4:
        raise ValueError(f"merge_heads needs x (B, H, T, D), got {x.shape}")
    B, H, T, D = x.shape
    y = x.transpose(0, 2, 1, 3).reshape(B, T, H * D)
    return y, lambda dy: dy.reshape(B, T, H, D).transpose(0, 2, 1, 3)


@op
def rotary(x, cos, sin):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), as Hugging Face's Llama lays them out.

    The pair (x_i, x_{i + D/2}) turns by the i-th angle of its position; the gradient turns back.
    (..., T, D), (T, D/2), (T, D/2) -> (..., T, D).

    On a GPU kernels/rotary.cu turns (B, H, T, D), except in float64.
    """
    floating("rotary", x=x, cos=cos, sin=sin)
    if x.ndim < 2:
        raise ValueError(f"rotary needs x (..., T, D), got {x.shape}")
    half = x.shape[-1] // 2
    if x.shape[-1] % 2 or cos.shape != (x.shape[-2], half) or sin.shape != cos.shape:
        raise ValueError(f"rotary: x {x.shape} needs tables {(x.shape[-2], half)}, got {cos.shape}")

    by_kernel = array_module(x) is not np and x.ndim == 4 and x.dtype in cuda.COMPUTES
    if by_kernel and cos.dtype == sin.dtype == x.dtype:
        return _rotary_by_kernel(x, cos, sin)

    def turn(x, sin):
        y, a, b = array_module(x).empty_like(x), x[..., :half], x[..., half:]
        y[..., :half] = a * cos - b * sin
        y[..., half:] = b * cos + a * sin
        return y

    return turn(x, sin), lambda dy: turn(dy, -sin)


def _rotary_by_kernel(x, cos, sin):
    """The same in one pass. It takes split_heads' view of (B, T, H, D) and writes (B, H, T, D)."""
    cos, sin = cuda.aligned(cos), cuda.aligned(sin)
    y = cuda.rotary(cuda.aligned(x.transpose(0, 2, 1, 3)), cos, sin)

    def dx(dy): return cuda.rotary(cuda.aligned(dy), cos, sin, back=True).transpose(0, 2, 1, 3)
    return y, dx
