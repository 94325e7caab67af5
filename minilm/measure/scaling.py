"""Scaling laws: the loss of N parameters after D tokens, and the best N for C operations.

    L(N, D) = E + A / N^alpha + B / D^beta                                                (1)
    C = 6 N D                                                                             (2)

A token takes 2 N operations in the forward pass and 4 N in the backward pass. Among all N and D
with the same C, the loss (1) is least at

    N_opt = G (C / 6)^a      a = beta / (alpha + beta)
    D_opt = (C / 6)^b / G    b = alpha / (alpha + beta)
    G = (alpha A / (beta B))^(1 / (alpha + beta))                                         (3)

Hoffmann et al. 2022, arXiv:2203.15556, section 3, find a and b in three ways:

    1  envelope    which N has the least loss when C have been spent, of curves of training
    2  isoflop     models of several N, each trained until C are spent: ln L is lowest at the
                   vertex of a parabola in ln N
    3  law.py      (1) itself, fitted to the last losses

The first two give N_opt for several C. `power` puts N_opt = k C^a through them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


def operations(N, D):
    """Eq. (2).

    >>> f"{operations(280e9, 300e9):.3g}"  # Gopher
    '5.04e+23'
    """
    return 6 * N * D


def per_second(N, D, hours):
    """Operations a second of each card, if training took so many hours of one card.

    >>> f"{per_second(70e9, 2e12, 1_720_320):.3g}"  # Llama-2 70B
    '1.36e+14'
    """
    return operations(N, D) / (3600 * hours)


class Law(NamedTuple):
    """The constants of eq. (1)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def a(self) -> float:
        """How N_opt grows with C."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """How D_opt grows with C."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def G(self) -> float:
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def loss(self, N, D):
        """Eq. (1), of numbers or arrays."""
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    def optimum(self, C):
        """(N_opt, D_opt) of eq. (3).

        >>> N, D = HOFFMANN.optimum(5.76e23)
        >>> f"{N:.3g} {D:.3g}"
        '4.04e+10 2.38e+12'
        """
        N = self.G * (C / 6) ** self.a
        return N, C / 6 / N


ROUNDED = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # as Hoffmann et al. print them, (10)
HOFFMANN = Law(1.6934, 406.40, 410.72, 0.33917, 0.28491)  # as the source of their paper has them
BESIROGLU = Law(1.8172, 477.8, 2143.9, 0.3473, 0.3672)  # refitted: Besiroglu et al. 2024,
# arXiv:2404.10102, from the points of Hoffmann's figure 4


class Power(NamedTuple):
    """y = k x^a."""

    k: float
    a: float

    def at(self, x):
        return self.k * x**self.a


def power(x: Sequence[float], y: Sequence[float]) -> Power:
    """The power law of least squares in ln x and ln y.

    ValueError for fewer than two different x, and for numbers that are not positive.

    >>> power([1, 10, 100], [3, 30, 300])
    Power(k=3.0, a=1.0)
    """
    x, y = _positive(x, y)
    if len(set(x)) < 2:
        raise ValueError(f"a power law needs two different x at least, got {x}")
    u, v = np.log(x), np.log(y)
    u0, v0 = u.mean(), v.mean()
    a = ((u - u0) * (v - v0)).sum() / ((u - u0) ** 2).sum()
    return Power(round(float(np.exp(v0 - a * u0)), 12), round(float(a), 12))


class Parabola(NamedTuple):
    """ln L = low + bend (ln N - ln best)^2, through models that took the same C."""

    best: float  # N_opt; NaN if the parabola has no lowest place
    low: float  # ln L there; NaN, too
    bend: float
    inner: bool  # does N_opt lie between the smallest and the largest N?
    fitted: np.ndarray  # ln L at each N


def isoflop(N: Sequence[float], L: Sequence[float]) -> Parabola:
    """The parabola of least squares in ln N, of three different N or more.

    ValueError for fewer, and for numbers that are not positive.
    """
    N, L = _positive(N, L)
    if len(set(N)) < 3:
        raise ValueError(f"a parabola needs three different N at least, got {N}")
    x = np.log(N)
    middle = x.mean()  # the squares of x itself are nearly parallel to x
    bend, slope, height = np.polyfit(x - middle, np.log(L), 2)
    fitted = np.polyval((bend, slope, height), x - middle)
    if bend <= 0:
        return Parabola(np.nan, np.nan, float(bend), False, fitted)
    vertex = -slope / (2 * bend)
    inner = x.min() < middle + vertex < x.max()
    return Parabola(float(np.exp(np.clip(middle + vertex, -99, 99))),
                    float(height - slope**2 / (4 * bend)), float(bend), bool(inner), fitted)


class Curve(NamedTuple):
    """The loss of a model while it is trained."""

    N: float
    C: np.ndarray  # spent so far, rising
    L: np.ndarray


def envelope(curves: Iterable[Curve], C: Sequence[float]) -> np.ndarray:
    """The N with the least loss after each C have been spent; NaN where no curve has been or gone.

    Between two points of a curve L is linear in ln C.
    """
    curves = list(curves)
    def loss(curve): return np.interp(np.log(C), np.log(curve.C), curve.L, np.inf, np.inf)
    found = np.array([loss(curve) for curve in curves])  # (curves, C)
    N = np.array([curve.N for curve in curves], float)
    return np.where(np.isfinite(found).any(0), N[found.argmin(0)], np.nan)


def _positive(x, y) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"there must be as many x as y, got {x.shape} and {y.shape}")
    if not ((0 < x) & (x < np.inf)).all() or not ((0 < y) & (y < np.inf)).all():
        raise ValueError(f"numbers must be positive and finite, got {x} and {y}")
    return x, y
