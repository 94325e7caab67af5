"""Do answers agree with what is right? Accuracy of classes, and correlations.

    accuracy    share of the answers that are right
    Matthews    Pearson's r of the 0/1 of two classes, which guessing the larger one does not raise;
                of more classes Gorodkin's R_K
    Pearson     r = cov(x, y) / sqrt(var(x) var(y)) of two lists of numbers

Matthews 1975, Comparison of the predicted and observed secondary structure of T4 phage lysozyme,
eq. (1); Gorodkin 2004, Comparing two K-category assignments by a K-category correlation
coefficient, eq. (8). With the counts C_kl of (answer k, right l), c = sum C_kk, s = sum C_kl,
p_k = sum_l C_kl and t_k = sum_l C_lk,

    R_K = (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2))                      (1)

GLUE has Matthews for CoLA and Pearson for STS-B. If all answers, or all that is right, are of one
class, Matthews is 0 by convention, as in scikit-learn. Pearson is then NaN: a constant says nothing
about a correlation, neither that there is one nor that there is none.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from minilm.measure.text.tokens import mean


def accuracy(answers: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """Share of answers that are equal to what is right. ValueError if there is none, and if there
    are not as many of both.

    >>> accuracy(["yes", "no", "no", "yes"], ["yes", "no", "yes", "yes"])
    0.75
    """
    return mean(hits(answers, [(one,) for one in _paired(answers, right)]).sum(0))


def hits(answers: Sequence[Hashable], right: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """(is the answer one of those that are right, 1): (S, 2). Equal means to the letter."""
    return np.array([(answer in some, 1) for answer, some in zip(answers, _paired(answers, right))],
                    float)


def matthews(answers: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """Matthews' correlation of classes, -1 to 1. ValueError as in accuracy.

    >>> matthews([1, 1, 1, 1], [1, 1, 1, 0]), matthews([1, 1, 1, 0], [1, 1, 1, 0])
    (0.0, 1.0)
    """
    return matthews_of_sums(confusion(answers, right).sum(0))


def confusion(answers, right) -> np.ndarray:
    """For each example a 1 at the place of (answer, right) among all pairs of K classes: (S, K K).
    """
    right = _paired(answers, right)
    place = {name: k for k, name in enumerate(dict.fromkeys([*right, *answers]))}
    rows = np.zeros((len(answers), len(place), len(place)))
    for row, said, wanted in zip(rows, answers, right):
        row[place[said], place[wanted]] = 1
    return rows.reshape(len(answers), -1)


def matthews_of_sums(sums: np.ndarray) -> float:
    """R_K from the counts (K K,)."""
    K = round(len(sums) ** 0.5)
    C = sums.reshape(K, K)
    c, s, p, t = np.trace(C), C.sum(), C.sum(1), C.sum(0)
    spread = (s**2 - p @ p) * (s**2 - t @ t)
    return float((c * s - p @ t) / np.sqrt(spread)) if spread else 0.0  # eq. (1)


def pearson(answers: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's correlation of numbers, -1 to 1; NaN if all of one side are the same. ValueError as
    in accuracy, and for numbers that are not finite.

    >>> pearson([1, 2, 3], [10, 20, 30])
    1.0
    """
    return pearson_of_sums(moments(answers, right).sum(0))


def moments(answers, right) -> np.ndarray:
    """x, y, x x, y y, x y and 1 of each example: (S, 6). x and y are first shifted to mean 0 and
    scaled to size 1, which changes no correlation, and keeps the digits."""
    x, y = np.asarray(answers, float), np.asarray(_paired(answers, right), float)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("numbers must be finite")
    x, y = (v / (np.abs(v).max() or 1) for v in (x, y))  # so that no square overflows
    x, y = (np.zeros_like(v) if (v == v[0]).all() else v - v.mean() for v in (x, y))
    x, y = (v / (np.abs(v).max() or 1) for v in (x, y))
    return np.stack([x, y, x * x, y * y, x * y, np.ones_like(x)], axis=1)


def pearson_of_sums(sums: np.ndarray) -> float:
    """r from the sums of rows (6,)."""
    x, y, xx, yy, xy, n = sums
    spread = (n * xx - x * x) * (n * yy - y * y)
    if spread <= 1e-24 * n**4:  # no more than rounding leaves of equal numbers
        return float("nan")
    return float(np.clip((n * xy - x * y) / np.sqrt(spread), -1, 1))


def _paired(answers, right):
    if len(answers) != len(right):
        raise ValueError(f"there are {len(answers)} answers, but {len(right)} that are right")
    if not len(answers):
        raise ValueError("there is no answer to judge")
    return right
