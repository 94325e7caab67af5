"""Spectra: how many directions a matrix needs, and what noise would look like.

Biderman et al. 2024, LoRA learns less and forgets less, arXiv:2405.09673, section 4.6 and appendix.
For a matrix W (O, I) with singular values s_1 >= s_2 >= ... the rank that holds a share of it is

    k = least k with sum_{i <= k} s_i^2 >= share * sum_i s_i^2           k90: share = .9     (1)

A matrix A (n, n) of standard normal numbers has no structure, and needs half of its directions. For
large n its singular values, divided by sqrt(n), have the density of a quarter circle (Marchenko &
Pastur 1967; sin t = x / 2):

    rho(x) = sqrt(4 - x^2) / pi, 0 <= x <= 2                                                 (2)
    share of the values up to x:  F = (2 t + sin 2t) / pi                                    (3)
    share of their squares:       G = (2 t - sin(4t) / 2) / pi                               (4)

So the largest is 2 sqrt(n), the mean 8 sqrt(n) / (3 pi), and k90 = n (1 - F) at G = .1, .51 n. If B
is another such matrix, A + c B has normal numbers of the variance 1 + c^2, and its spectrum is A's
times sqrt(1 + c^2) (figure S8):

    s_1 = 2 sqrt(n (1 + c^2))                                                                (5)
    mean |s_i(A + c B) - s_i(A)| = (sqrt(1 + c^2) - 1) 8 sqrt(n) / (3 pi)                    (6)
"""

import math

import numpy as np

from minilm.ranges import check, whole


def spectrum(W) -> np.ndarray:
    """The singular values of W (O, I), the largest first: (min(O, I),) float64.

    ValueError if W is no matrix of finite numbers.
    """
    W = np.asarray(W, np.float64)
    if W.ndim != 2 or not W.size or not np.isfinite(W).all():
        raise ValueError(f"expected a matrix of finite numbers, got the shape {W.shape}")
    return np.linalg.svd(W, compute_uv=False)


def rank_of(s, share: float = 0.9) -> int:
    """How many of the singular values s hold this share of the sum of squares, eq. (1).

    ValueError if all are 0, or if share is not above 0 and below 1.

    >>> rank_of([3.0, 1.0]), rank_of([1.0, 1.0])
    (1, 2)
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    held = np.cumsum(np.sort(np.asarray(s, np.float64) ** 2)[::-1])
    if not held[-1] > 0:
        raise ValueError("a matrix of zeros has no share of anything")
    return int((held < share * held[-1]).sum()) + 1  # eq. (1)


def apart(s, t) -> float:
    """The mean |difference| of two spectra of one length: (n,), (n,)."""
    return float(np.abs(np.asarray(s) - t).mean())


def likeness(s, t) -> float:
    """The cosine of two spectra of one length, from 0 to 1.

    1: they are the same, up to a multiplicative scaling. ValueError if one is all 0.
    """
    sizes = float(np.linalg.norm(s) * np.linalg.norm(t))
    if not sizes:
        raise ValueError("a matrix of zeros is like no other")
    return float(np.dot(s, t)) / sizes


def noise_edge(n: int, c: float = 0.0) -> float:
    """The largest singular value of A + c B, normal (n, n), for large n: eq. (5)."""
    check({"n": whole(1)}, n=n)
    return 2 * math.sqrt(n * (1 + c * c))


def noise_apart(n: int, c: float) -> float:
    """The mean |difference| of the spectra of A and A + c B, normal (n, n), for large n: eq. (6).
    """
    check({"n": whole(1)}, n=n)
    return (math.sqrt(1 + c * c) - 1) * 8 * math.sqrt(n) / (3 * math.pi)


def noise_rank(share: float = 0.9) -> float:
    """rank_of a normal matrix (n, n), as a part of n, for large n.

    >>> round(noise_rank(0.9), 2)
    0.51
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves the interval
        t = (low + high) / 2
        if (2 * t - math.sin(4 * t) / 2) / math.pi < 1 - share:  # eq. (4)
            low = t
        else:
            high = t
    return 1 - (2 * low + math.sin(2 * low)) / math.pi  # eq. (3)
