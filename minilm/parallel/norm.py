"""A norm that has the same bits, however its numbers are spread over ranks.

A sum of rounded numbers depends on their order, so the sum of squares over n parts differs with n,
and so would all that a clipped gradient changes. Here nothing is rounded: a float32 number is an
integer M < 2^24 times a power of two, its square is M^2 < 2^48, and integers add up exactly. There
is a sum for each exponent, in two halves of 24 bits, so that float64 holds 2^29 terms of each.
"""

import math

import numpy as np

from minilm.arrays import BLOCK
from minilm.backend import array_module, to_device

LOWEST, EXPONENTS = -149, 280  # of float32 numbers, as frexp has them


def exact_squares(x):
    """What `norm_of` needs to know of a flat array: (2 * EXPONENTS + 1,) float64, to be added up.

    Other dtypes are rounded to float32. The last element counts what is not finite.
    """
    xp = array_module(x)
    bins = xp.zeros(2 * EXPONENTS + 1, np.float64)
    size = BLOCK if xp is np else max(1, x.size)
    for i in range(0, x.size, size):
        piece = x[i : i + size].astype(np.float32, copy=False)
        finite = xp.isfinite(piece)
        if not finite.all():
            bins[-1] += piece.size - finite.sum()
            continue
        mantissa, exponent = xp.frexp(piece)
        square = mantissa.astype(np.float64)
        square *= 2.0**24
        square *= square  # below 2^48: exact
        high = xp.floor(square * 2.0**-24)
        square -= high * 2.0**24
        exponent -= LOWEST
        bins[:EXPONENTS] += xp.bincount(exponent, high, EXPONENTS)
        bins[EXPONENTS:-1] += xp.bincount(exponent, square, EXPONENTS)
    return to_device(bins, "cpu")


def norm_of(bins) -> float:
    """The L2 norm of all arrays whose `exact_squares` were added up; NaN if one was not finite.

    >>> x = np.array([3.0, 4.0], np.float32)
    >>> norm_of(exact_squares(x[:1]) + exact_squares(x[1:]))
    5.0
    """
    if bins[-1]:
        return math.nan
    high, low = bins[:EXPONENTS], bins[EXPONENTS:-1]
    total = sum(((int(high[e]) << 24) + int(low[e])) << 2 * int(e)
                for e in np.flatnonzero(high + low))
    return math.ldexp(math.sqrt(total), LOWEST - 24)
