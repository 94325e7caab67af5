"""How sure is a score? The interval that other examples of the same kind would give.

Efron 1979, Bootstrap methods: another look at the jackknife; for BLEU Koehn 2004, Statistical
significance tests for machine translation evaluation, section 3. Draw as many examples as there
are, each from all of them, so that some come twice and some not at all; score what was drawn; do so
a thousand times. The middle 95 of 100 of these scores are the interval (the percentile method).

It covers chance in the choice of examples. It does not cover chance in the training of the model:
that is what seeds are for, see verdict.py. With few examples it is too narrow: it knows no others.
What weighs n-grams, NIST's information and CIDEr's rareness, stays that of all references.
"""

from collections.abc import Callable

import numpy as np

from minilm.ranges import check, whole


def interval(rows: np.ndarray, of_sums: Callable[[np.ndarray], float], seed: int = 0,
             draws: int = 1000) -> tuple[float, float]:
    """The 95 % interval (low, high) of of_sums(rows.sum(0)), by examples.

    rows: a row for each example, (S, K), whose sums over examples decide the score. Draws whose
    score is NaN do not count; (NaN, NaN) if all are. The same seed gives the same interval.
    ValueError without an example.

    >>> interval(np.array([[0, 1], [1, 1]]), lambda sums: sums[0] / sums[1])
    (0.0, 1.0)
    """
    check({"seed": whole(0), "draws": whole(1)}, seed=seed, draws=draws)
    if not len(rows):
        raise ValueError("there is no example to draw")
    rng, size = np.random.default_rng(seed), len(rows)
    scores = np.array([of_sums(rows[rng.integers(size, size=size)].sum(0)) for _ in range(draws)])
    known = scores[~np.isnan(scores)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)
