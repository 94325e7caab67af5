"""Launchers of what a model does between its products: SwiGLU, RMSNorm, rotary positions, sums.

Arrays are all float32, all float16 or all bfloat16, else TypeError. ValueError if shapes do not fit
together.
"""

from minilm.arrays import one_shape
from minilm.backend import array_module
from minilm.cuda.raw import kernel


def swiglu(gate, up):
    """silu(gate) up."""
    return _swiglu("swiglu", 1, gate=gate, up=up)[0]


def swiglu_backward(dy, gate, up):
    """(dgate, dup) of swiglu."""
    return _swiglu("swiglu_backward", 2, dy=dy, gate=gate, up=up)


def _swiglu(name, results, **arrays):
    one_shape(name, **arrays)
    up = arrays["up"]
    made = [array_module(up).empty(up.shape, up.dtype) for _ in range(results)]
    _launch("swiglu.cu", name, -(-up.nbytes // 4096), 256, *arrays.values(), *made, up.size)
    return made


def rms_norm(x, g, eps: float):
    """(y, rstd) for x (..., C) and g (C,): y = x rstd g with rstd = 1 / sqrt(mean(x^2) + eps).

    rstd (...) is float32; rms_norm_backward needs it.
    """
    xp = array_module(x)
    y, rstd = xp.empty(x.shape, x.dtype), xp.empty(x.shape[:-1], "float32")
    _rms_norm("rms_norm", x, g, rstd, x, g, y, rstd, x.shape[-1], eps)
    return y, rstd


def rms_norm_backward(dy, x, g, rstd):
    """dx of rms_norm."""
    one_shape("rms_norm_backward", dy=dy, x=x)
    dx = array_module(x).empty(x.shape, x.dtype)
    _rms_norm("rms_norm_backward", x, g, rstd, dy, x, g, rstd, dx, x.shape[-1])
    return dx


def _rms_norm(name, x, g, rstd, *args):
    if g.shape != x.shape[-1:] or rstd.shape != x.shape[:-1]:
        raise ValueError(f"{name}: x {x.shape} needs g {x.shape[-1:]} and rstd {x.shape[:-1]}, "
                         f"got {g.shape} and {rstd.shape}")
    _launch("rms_norm.cu", name, rstd.size if x.size else 0, 128, *args)


def rotary(x, cos, sin, back: bool = False):
    """x (B, T, H, D) turned, with its heads in front: (B, H, T, D). cos and sin are (T, D / 2).

    back: the gradient, which turns back from (B, H, T, D) to (B, T, H, D).
    """
    B, (T, H), D = len(x), x.shape[2:0:-1] if back else x.shape[1:3], x.shape[-1]
    if D % 2 or cos.shape != (T, D // 2) or sin.shape != cos.shape:
        raise ValueError(f"rotary: x {x.shape} needs tables {(T, D // 2)}, got {cos.shape} and "
                         f"{sin.shape}")
    y = array_module(x).empty((B, T, H, D) if back else (B, H, T, D), x.dtype)
    n = B * T * H * -(-(D // 2 * x.itemsize) // 16)  # vectors of 16 bytes in a half of every head
    _launch("rotary.cu", "rotary", -(-n // 256), 256, x, cos, sin, y, n, T, H, D // 2, back)
    return y


def scatter_add(ids, dy, n: int):
    """The sum of the rows of dy with each id, in their order: (N,), (N, C) -> (n, C) float32.

    ids: integers from 0 to n - 1, NumPy's or on the card.
    """
    if dy.ndim != 2 or ids.shape != dy.shape[:1]:
        raise ValueError(f"scatter_add: ids {ids.shape} do not go with rows {dy.shape}")
    xp, places, (N, C) = array_module(dy), array_module(ids), dy.shape
    total = xp.zeros((n, C), "float32")
    if dy.size:
        keys = xp.asarray(places.sort(ids.astype("int64") * 2**32 + places.arange(N)))
        kernel("scatter_add.cu", "scatter_add", dy.dtype)(
            (N, -(-C * dy.itemsize // 1024)), (64,), keys, dy, total, N, C)
    return total


def _launch(file, name, blocks, threads, first, *rest):
    launch = kernel(file, name, first.dtype)
    if blocks:
        launch((blocks,), (threads,), first, *rest)
