"""The activation functions of transformers, and SwiGLU's product of two layers.

All work element by element. They compute in at least float32 and return their input's dtype.
"""

import math

import numpy as np

from minilm import cuda
from minilm.arrays import by_rows, erf, floating, one_dtype, one_shape, wide
from minilm.backend import array_module
from minilm.graph import once
from minilm.tensor import op


@op
def relu(x):
    """max(x, 0)."""
    y = array_module(x).maximum(x, 0)
    return y, lambda dy: dy * (y > 0)


@op
def tanh(x):
    """(e^x - e^-x) / (e^x + e^-x)."""
    floating("tanh", x=x)
    y = array_module(x).tanh(wide(x))
    return y.astype(x.dtype, copy=False), lambda dy: dy * (1 - y * y)


@op
def silu(x):
    """x sigmoid(x) (Elfwing et al. 2017, arXiv:1702.03118)."""
    floating("silu", x=x)

    def formula(x):
        x = wide(x)
        s = 1 / (1 + _exp_of_minus(x))
        return x * s, s * (1 + x * (1 - s))

    y, slope = by_rows(formula, x)
    return y.astype(x.dtype, copy=False), lambda dy: dy * slope


@op
def swiglu(gate, up):
    """silu(gate) up (Shazeer 2020, arXiv:2002.05202).

    For the backward pass it keeps only its inputs. ValueError if they differ in shape, TypeError if
    they differ in dtype. On a GPU kernels/swiglu.cu computes it, except in float64.
    """
    floating("swiglu", gate=gate, up=up)
    one_shape("swiglu", gate=gate, up=up)
    one_dtype("swiglu", gate=gate, up=up)
    if array_module(gate) is not np and gate.dtype in cuda.COMPUTES:
        gate, up = cuda.aligned(gate), cuda.aligned(up)
        y = cuda.swiglu(gate, up)
        gradients = once(lambda dy: cuda.swiglu_backward(cuda.aligned(dy), gate, up))
    else:
        y = by_rows(_swiglu, gate, up)
        gradients = once(lambda dy: by_rows(_swiglu_backward, dy, gate, up))

    def dgate(dy): return gradients(dy)[0]
    def dup(dy): return gradients(dy)[1]
    return y, dgate, dup


def _exp_of_minus(x):
    """e^-x in a new array. It may be infinite without a warning: 1 / (1 + e^-x) is 0 then."""
    y = -x
    with np.errstate(over="ignore"):
        return array_module(y).exp(y, out=y)


def _swiglu(gate, up):
    """gate / (1 + exp(-gate)) * up, in one temporary array."""
    y = _exp_of_minus(wide(gate))
    y += 1
    array_module(y).divide(gate, y, out=y)
    y *= up
    return y.astype(gate.dtype, copy=False)


def _swiglu_backward(dy, gate, up):
    x = wide(gate)
    s = _exp_of_minus(x)
    s += 1
    array_module(x).divide(1, s, out=s)
    dup = x * s  # silu(x)
    dgate = 1 - s  # becomes silu's slope, s + silu(x) (1 - s)
    dgate *= dup
    dgate += s
    dgate *= up
    dgate *= dy
    dup *= dy
    return dgate.astype(gate.dtype, copy=False), dup.astype(gate.dtype, copy=False)


@op
def soft_cap(x, cap):
    """cap tanh(x / cap), which stays between -cap and cap (Riviere et al. 2024, arXiv:2408.00118,
    section 2). ValueError if cap is not positive."""
    floating("soft_cap", x=x)
    if not 0 < cap < math.inf:
        raise ValueError(f"soft_cap: cap must be positive and finite, got {cap}")

    def formula(x):
        xp, y = array_module(x), wide(x) / cap
        xp.tanh(y, out=y)
        slope = y * y
        xp.subtract(1, slope, out=slope)  # 1 - tanh^2
        y *= cap
        return y, slope

    y, slope = by_rows(formula, x)
    return y.astype(x.dtype, copy=False), lambda dy: dy * slope


def plain_gelu(x):
    """x P(Z <= x) for a standard normal Z, of an array. Section 2 of Hendrycks & Gimpel 2016."""
    return x * (1 + erf(x / math.sqrt(2))) / 2


def plain_gelu_tanh(x):
    """The approximation with tanh of the same paper, which GPT-2 uses."""
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@op
def gelu(x, approximate="none"):
    """x P(Z <= x) for a standard normal Z (Hendrycks & Gimpel 2016, arXiv:1606.08415).

    approximate: "none", or "tanh" for plain_gelu_tanh; ValueError for anything else.

    What differs from the plain forms: it works on blocks of elements that stay in the cache. It
    computes the slope together with the value, because they share work, and keeps the slope instead
    of x. The tanh form works in place, with x^3 as x x^2.
    """
    floating("gelu", x=x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f'gelu: approximate must be "none" or "tanh", got {approximate!r}')
    k0, k1 = math.sqrt(2 / math.pi), 0.044715

    def exact(x):
        x = wide(x)
        cdf = 0.5 + 0.5 * erf(x * math.sqrt(0.5))
        pdf = array_module(x).exp(-0.5 * x * x) * (k0 / 2)
        return x * cdf, cdf + x * pdf

    def tanh(x):
        x = wide(x)
        slope = x * x
        u = slope * (k0 * k1)
        u += k0
        u *= x
        cdf = array_module(x).tanh(u, out=u)
        cdf *= 0.5
        cdf += 0.5
        y = x * cdf
        slope *= 6 * k0 * k1  # slope = cdf + y (1 - cdf) du/dx * 2
        slope += 2 * k0
        slope *= y
        slope *= 1 - cdf
        slope += cdf
        return y, slope

    y, slope = by_rows(exact if approximate == "none" else tanh, x)
    return y.astype(x.dtype, copy=False), lambda dy: dy * slope
