"""Where a curve is lowest, from a few of its points.

The parabola through three points x1 < x2 < x3, of which the middle one is the lowest, has the slope
s12 = (y2 - y1) / (x2 - x1) halfway between the first two, and s23 halfway between the last two. Its
slope is linear between these places, so it vanishes at

    x = m12 - s12 (m23 - m12) / (s23 - s12),   m12 = (x1 + x2) / 2,  m23 = (x2 + x3) / 2     (1)

This is successive parabolic interpolation (Brent 1973, Algorithms for minimization without
derivatives, chapter 5), one step of it.
"""

from collections.abc import Sequence

import numpy as np


def lowest_at(x: Sequence[float], y: Sequence[float]) -> float:
    """The x where y is lowest, by the parabola through the lowest point and its neighbours.

    x rises. If the first or the last point is the lowest, it is the answer, though the curve may
    fall on beyond it. ValueError without a point, for numbers that are not finite, and for x that
    do not rise or are not as many as y.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"x and y must be as many numbers, at least one, got {x.shape}, {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (np.diff(x) > 0).all()):
        raise ValueError(f"x must rise, and x and y must be finite, got {x} and {y}")
    i = int(y.argmin())
    if i in (0, len(x) - 1):
        return float(x[i])
    middles = (x[i : i + 2] + x[i - 1 : i + 1]) / 2
    slopes = np.diff(y[i - 1 : i + 2]) / np.diff(x[i - 1 : i + 2])
    return float(middles[0] - slopes[0] * np.diff(middles)[0] / np.diff(slopes)[0])  # eq. (1)
