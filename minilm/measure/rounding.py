"""What numbers of few bits lose of gradients and of updates, as shares.

Micikevicius et al. 2017, arXiv:1710.03740, sections 3.1 and 3.2. Let fl(x) be x rounded to a format
of t bits of precision (float16: 11, bfloat16: 8), with the smallest number s and the largest L.

    underflow     fl(x) = 0         if |x| < s / 2: float16 below 3e-8                         (1)
    overflow      fl(x) = inf       if |x| > L, and a little more: float16 from 65520 on       (2)
    no effect     fl(p + u) = p     if |u| < |p| / 2^(t+1), never if |u| > |p| / 2^t           (3)

for a number p of the format that is not subnormal. In a network each step from the loss to a
gradient is rounded, so the functions take what came out, beside what would have been right.
"""

import numpy as np


def vanished(right, found) -> float:
    """The share of the numbers in `right` other than 0 that are 0 in `found`, (1).

    0 if none is other than 0. ValueError if the shapes differ.

    >>> x = np.array([1e-8, 1e-3, 0.0])
    >>> vanished(x, x.astype("float16")), vanished(x * 1024, (x * 1024).astype("float16"))
    (0.5, 0.0)
    """
    right, found = _alike(right, found)
    return _share(found[right != 0] == 0)


def not_finite(x) -> float:
    """The share of the numbers that are inf or nan, (2); 0 of none."""
    return _share(~np.isfinite(np.asarray(x)))


def unmoved(before, after, update) -> float:
    """The share of the updates other than 0 after which the number is what it was before, (3).

    0 if no update is other than 0. ValueError if the shapes differ.

    >>> p, u = np.float16([1.0, 1.0, 1.0]), np.array([1e-4, 1e-3, 0.0])
    >>> unmoved(p, (p + u).astype("float16"), u)
    0.5
    """
    before, after = _alike(before, after)
    before, update = _alike(before, update)
    return _share((before == after)[update != 0])


def _alike(*arrays):
    arrays = [np.asarray(a) for a in arrays]
    if len(shapes := {a.shape for a in arrays}) > 1:
        raise ValueError(f"expected arrays of one shape, got {sorted(shapes)}")
    return arrays


def _share(true) -> float:
    return float(true.mean()) if true.size else 0.0
