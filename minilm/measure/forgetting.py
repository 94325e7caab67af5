"""Tasks one after another: what a model can do after each, and what it has forgotten at the end.

R[i, j] is the score on task j after stage i, in which task i was learned; there are n of both.

    ACC = 1/n sum_j R[n, j]                                                                      (1)
    BWT = 1/(n - 1) sum_{j < n} R[n, j] - R[j, j]                                                (2)
    F   = 1/(n - 1) sum_{j < n} max_{i < n} R[i, j] - R[n, j]                                    (3)

ACC and backward transfer BWT are Lopez-Paz & Ranzato 2017, arXiv:1706.08840, equations 2 and 3.
Forgetting F is Chaudhry et al. 2018, arXiv:1801.10112, section 3: the highest earlier score less
the final one. It is negative if the scores go on rising. -BWT is at most F. The last task has no
stage after it in which it could be forgotten.

The same numbers serve for tasks that are learned mixed, after each n-th of the steps.
"""

import numpy as np


def average(R) -> float:
    """Eq. (1): the mean of the final scores. R: (n, n), stages down, tasks across in their order.

    >>> average([[90, 0], [30, 80]])
    55.0
    """
    return float(_square(R)[-1].mean())  # eq. (1)


def backward_transfer(R) -> float:
    """Eq. (2): how much later stages gave to earlier tasks, negative if they took.

    >>> backward_transfer([[90, 0], [30, 80]])
    -60.0
    """
    R = _square(R, 2)
    return float((R[-1] - R.diagonal())[:-1].mean())  # eq. (2)


def forgetting(R) -> float:
    """Eq. (3): the highest earlier score less the final one, mean of all tasks but the last.

    >>> forgetting([[90, 0], [30, 80]])
    60.0
    """
    R = _square(R, 2)
    return float((R[:-1].max(axis=0) - R[-1])[:-1].mean())  # eq. (3)


def _square(R, least=1):
    R = np.asarray(R, np.float64)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or len(R) < least:
        raise ValueError(f"R must have a row a stage and a column a task, as many of both, and at "
                         f"least {least}; got shape {R.shape}")
    return R
