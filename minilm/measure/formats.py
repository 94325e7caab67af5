"""Formats of numbers: what floats of so many bits can hold, and integers.

IEEE 754, section 3. A float has a sign, e bits of an exponent and m bits of a fraction f. All zeros
and all ones of the exponent are kept for small numbers, and for infinity and nan; the others stand
for the powers 2^(2 - 2^(e-1)) to 2^(2^(e-1) - 1), times 1 + f / 2^m:

    largest            (2 - 2^-m) 2^(2^(e-1) - 1)                                         (1)
    least normal       2^(2 - 2^(e-1))                                                    (2)
    step above 1       2^-m                                                               (3)

Integers from -n to n are 2 n + 1 numbers. The lectures count lg(2 n) bits for them; lg(2 n + 1) is
exact. Either way the next whole number of bits is needed.
"""

import math
from typing import NamedTuple

import ml_dtypes  # noqa: F401  makes "bfloat16" the name of a dtype
import numpy as np


class Float(NamedTuple):
    """A format of floats, by its bits.

    >>> half = Float(5, 10)
    >>> half.bits, half.largest, 1 / half.step
    (16, 65504.0, 1024.0)
    """

    e: int  # bits of the exponent
    m: int  # and of the fraction

    bits = property(lambda self: 1 + self.e + self.m)
    largest = property(lambda self: (2 - 2.0**-self.m) * 2.0 ** (2 ** (self.e - 1) - 1))  # eq. (1)
    least = property(lambda self: 2.0 ** (2 - 2 ** (self.e - 1)))  # eq. (2)
    step = property(lambda self: 2.0**-self.m)  # eq. (3)
    positive = property(lambda self: (2**self.e - 1) * 2**self.m - 1)  # how many are


class Whole(NamedTuple):
    """Integers from -n to n.

    >>> Whole(127).bits, Whole(7).bits
    (8, 4)
    """

    n: int

    bits = property(lambda self: math.ceil(math.log2(2 * self.n + 1)))
    largest = property(lambda self: float(self.n))
    least = step = property(lambda self: 1.0)
    positive = property(lambda self: self.n)


FORMATS = {"float32": Float(8, 23), "float16": Float(5, 10), "bfloat16": Float(8, 7),
           "int8": Whole(127), "int4": Whole(7)}


def by_rounding(dtype) -> tuple[float, float, float]:
    """(largest, least normal, step above 1) of a dtype of floats, as rounding to it shows them.

    float64 is too narrow to try it on float64 itself.
    """
    dtype = np.dtype(dtype)
    def rounded(x): return float(np.float64(x).astype(dtype))
    with np.errstate(over="ignore"):
        step = 1.0
        while rounded(1 + step / 2) > 1:
            step /= 2
        power = 1.0
        while math.isfinite(rounded(2 * power)):
            power *= 2
        largest, more = power, power / 2
        while rounded(largest + more) == largest + more:
            largest, more = largest + more, more / 2
        least = 1.0
        while rounded(least / 2 * (1 + step)) == least / 2 * (1 + step):
            least /= 2
    return largest, least, step
