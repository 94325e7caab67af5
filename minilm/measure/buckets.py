"""Buckets: how full the values of a codebook are, and how many numbers they leave apart.

Each value has a share p_i of the numbers. Shannon 1948, A mathematical theory of communication:

    H = -sum_i p_i lg p_i        bits that a code says about its number: lg n if n values are used
                                 alike, 0 if one of them has all numbers                        (1)

Two numbers with one value collide: they cannot be told apart any more. Of N numbers, N_i of them in
bucket i, the share of pairs that collide is

    sum_i N_i (N_i - 1) / (N (N - 1))                                                           (2)

It is about 1 / n if n values are used alike, and more if they are not.

A codebook's values are counted once: FP4 has two codes for 0, and so 15 values, like int4.
"""

import numpy as np

from minilm.quantize.codebooks import levels
from minilm.ranges import check, whole


def values(codebook: str) -> np.ndarray:
    """What the codes of a codebook stand for, in ascending order, each once."""
    return np.unique(levels(codebook) + np.float32(0))  # -0 + 0 is 0


def blocks(x, size: int = 64):
    """(x in blocks (n, size), the largest magnitude of each (n, 1)); what is left over is dropped.

    ValueError for fewer than `size` numbers.
    """
    check({"size": whole(1)}, size=size)
    x = np.asarray(x).reshape(-1)
    if x.size < size:
        raise ValueError(f"{x.size} numbers are no block of {size}")
    x = x[: x.size // size * size].reshape(-1, size)
    return x, abs(x).max(-1, keepdims=True)


def nearest(x, codebook: str, constant=1.0) -> np.ndarray:
    """The place among `values` of the one that is nearest to x / constant, in x's shape.

    Halfway between two it is the lower one, as in quantize_4bit; beyond the ends it is the last.
    constant: positive; one number, or what broadcasts to x. Blocks of zeros may have 0.

    >>> nearest(np.array([-9.0, -0.2, 0.6, 2.0]), "int2", 2.0).tolist()
    [0, 1, 1, 2]
    """
    levels = values(codebook)
    scaled = x / np.where(np.asarray(constant) > 0, constant, 1)
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, scaled)


def counts(x, codebook: str, constant=1.0) -> np.ndarray:
    """How many numbers each value gets: (n,) integers, in the order of `values`."""
    return np.bincount(nearest(x, codebook, constant).ravel(), minlength=len(values(codebook)))


def entropy(counts) -> float:
    """Bits that a code says about its number, eq. (1). ValueError without a number.

    >>> entropy([3, 3, 3, 3]), entropy([7, 0, 0, 0])
    (2.0, 0.0)
    """
    p = np.asarray(counts) / total(counts, 1)
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum()) + 0.0


def colliding(counts) -> float:
    """The share of pairs of numbers that have one value, eq. (2). ValueError for fewer than two.

    >>> colliding([2, 2]) * 6  # of 6 pairs
    2.0
    """
    N, n = total(counts, 2), np.asarray(counts, np.float64)
    return float((n * (n - 1)).sum() / (N * (N - 1)))


def total(counts, least: int) -> float:
    """How many numbers there are; ValueError if they are fewer than `least`."""
    N = float(np.sum(counts))
    if N < least:
        raise ValueError(f"these buckets hold {N:g} numbers; {least} are needed")
    return N
