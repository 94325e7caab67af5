"""Codebooks: the numbers that few-bit codes stand for.

NormalFloat is from QLoRA, section 3 and appendix E (Dettmers et al. 2023, arXiv:2305.14314). The
8-bit dynamic map is from Dettmers et al. 2022, arXiv:2110.02861. A codebook's range is -1 to 1;
fourbit.py multiplies its values by a constant for each block.
"""

import functools
import math
from statistics import NormalDist

import numpy as np

# normal_float(4) as QLoRA published it, which differs by up to 2e-7
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)
FP4 = tuple(sign * v / 12 for sign in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3))


@functools.cache
def levels(name: str) -> np.ndarray:
    """What the codes 0, 1, ... of a codebook stand for: (2^k,) float32, from -1 to 1.

    int<k> has one level less, since it is symmetric around zero. ValueError for an unknown name.
    """
    values = {"nf4": lambda: NF4, "fp4": lambda: FP4,
              "nf3": lambda: normal_float(3), "nf2": lambda: normal_float(2),
              "int4": lambda: np.arange(-7, 8) / 7, "int3": lambda: np.arange(-3, 4) / 3,
              "int2": lambda: (-1, 0, 1)}
    if name not in values:
        raise ValueError(f"codebook must be one of {tuple(values)}, got {name!r}")
    return np.array(values[name](), np.float32)


def normal_float(k: int) -> list[float]:
    """k-bit NormalFloat: quantiles of N(0, 1) over the outermost one, and an exact zero.

    The steps from each tail to the median are equally probable: 2^(k-1) - 1 of them on the negative
    side and one more on the positive side (QLoRA, section 3 and appendix E).

    >>> [round(q, 3) for q in normal_float(3)]
    [-1.0, -0.535, -0.247, 0.0, 0.183, 0.382, 0.623, 1.0]
    """
    half, tail = 2 ** (k - 1), outermost(k)

    def side(n):  # n quantiles, outermost first
        probabilities = [tail + (0.5 - tail) * i / n for i in range(n)]
        return [NormalDist().inv_cdf(p) / NormalDist().inv_cdf(tail) for p in probabilities]
    return [*(-q for q in side(half - 1)), 0.0, *reversed(side(half))]


def outermost(k: int) -> float:
    """The probability below k-bit NormalFloat's largest quantile; bitsandbytes' 0.9677083 for 4."""
    return 1 - (1 / 2 ** (k + 1) + 1 / (2 ** (k + 1) - 2)) / 2


@functools.cache
def bits_of(name: str) -> int:
    """Bits of a code of this codebook."""
    return math.ceil(math.log2(len(levels(name))))


@functools.cache
def steps(name: str):
    """(midpoints between neighbouring levels, ascending; the levels' codes, in the same order)."""
    values = levels(name)
    order = np.argsort(values, kind="stable")
    return (values[order][1:] + values[order][:-1]) / 2, order.astype(np.uint8)


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """bitsandbytes' 8-bit floats: (256,) float32 in ascending order, from -0.993 or from 0 to 1.

    A code holds a sign, zeros that choose the scale 10^(i - 6), and a fraction in the i bits that
    are left. The fraction is the midpoint of one of 2^i equal parts of [0.1, 1]. Without a sign it
    has one bit more (Dettmers et al. 2022, arXiv:2110.02861).
    """
    values = [np.float32([0, 1])]
    for i in range(7):
        n, low, high = 2**i if signed else 2 ** (i + 1), np.float32(0.1), np.float32(1)
        step, place = np.float64((high - low) / np.float32(n)), np.arange(n + 1)
        # from both ends and rounded once, like torch.linspace
        edges = np.where(place < (n + 1) // 2, low + step * place, high - step * (n - place))
        edges = edges.astype(np.float32)
        middles = (edges[1:] + edges[:-1]) / 2 * np.float32(10.0 ** (i - 6))
        values += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(values))
