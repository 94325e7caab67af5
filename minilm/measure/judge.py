"""A judge of answers that likes the first one better, and what that does to scores.

QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 5 and table 6: GPT-4 reads a question, the
answer of ChatGPT and the answer of a system, and gives each one to ten points. A system's score is
its points as a share of ChatGPT's. GPT-4 gives more to what it reads first, so each pair is judged
in both orders, and the mean of both shares is reported.

Here a program is the judge. It knows the right answer, and it adds a *known* bonus to the points of
the answer that it reads first. So one can see what both orders cure. With P prompts, points x_k of
a system and y_k of a reference, and a bonus b:

    reference first   r_1 = sum_k x_k / sum_k (y_k + b)                                          (1)
    system first      r_2 = sum_k (x_k + b) / sum_k y_k                                          (2)
    without the bonus r   = sum_k x_k / sum_k y_k = r_1 (1 + r_2) / (1 + r_1)                    (3)

In the *sum* of both orders the bonus cancels: each gets it once. In the mean of the two *shares* it
does not. If the reference has y points a prompt on average, let beta = b / y; then

    (r_1 + r_2) / 2 - r = beta / 2 (1 - r / (1 + beta))                                          (4)

which is nearly nothing for a system as good as the reference, and up to half of beta for one that
is much worse. Eq. (3) needs no knowledge of b: both orders tell it, if it is the same for all.

A share is a ratio of sums. Its 95 % interval is Student's (verdict.py) of the numbers

    r + (x_k - r y_k) / mean(y)                                                                  (5)

whose mean is r (Cochran 1977, Sampling techniques, section 6: linearised). It says what other
prompts of the same kind would give. Eqs. (3) and (4) are this file's own, from (1) and (2).
"""

from typing import NamedTuple

import numpy as np

from minilm.data import Record
from minilm.measure.elo import Games
from minilm.measure.text.rouge import subsequence
from minilm.measure.verdict import interval

LEAST, MOST = 1.0, 10.0  # points


class Share(NamedTuple):
    """Points of a system in points of a reference."""

    value: float
    low: float  # the 95 % interval, by prompts
    high: float


class Shares(NamedTuple):
    """The share in both orders, the mean of both, and what it would be without a bonus."""

    reference_first: Share
    system_first: Share
    mean: Share
    unbiased: Share


def points(record: Record, answer: str) -> float:
    """1 to 10, by the share of letters that the answer has in common with the right one, in order.

    The share is 2 l / (letters of both), with l letters in the longest common subsequence. Only an
    answer that is right to the letter gets 10. Of several right ones the nearest counts.

    >>> points(Record("Reverse", "abc", "cba"), "cab")
    7.0
    """
    def near(right: str) -> float:
        return 2 * subsequence(right, answer) / (len(right) + len(answer))
    share = max(near(right) for right in (record.output, *record.references))
    return LEAST + (MOST - LEAST) * share


def verdicts(first, second, bonus: float) -> np.ndarray:
    """S of the first answer, from the points of both: 1 if it is better, 0.5, 0.

    >>> verdicts([4.0, 4.0, 4.0], [4.0, 5.0, 6.0], bonus=1.0).tolist()
    [1.0, 0.5, 0.0]
    """
    return (1 + np.sign(np.asarray(first) + bonus - np.asarray(second))) / 2


def tournament(x, bonus: float = 0.0, first=None) -> Games:
    """Everybody against everybody about every prompt, in both orders. x: points, (N, P).

    first: a player whose games are judged in one order only, it being the first. ValueError for
    fewer than two players.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x must be points (N, P) of two players or more, got shape {x.shape}")
    N, P = x.shape
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j and j != first]
    a, b = np.repeat(pairs, P, axis=0).T
    S = np.concatenate([verdicts(x[i], x[j], bonus) for i, j in pairs])
    return Games(a, b, S, np.tile(np.arange(P), len(pairs)))


def shares(x, y, bonus: float = 0.0) -> Shares:
    """A system's share of the reference's points. x, y: the points of both, (P,).

    ValueError for fewer than two prompts, and for a reference without a point.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    one, two, none = ratios(x, y + bonus), ratios(x + bonus, y), ratios(x, y)  # eqs. (1), (2), (3)
    return Shares(*(Share(float(of.mean()), *interval(of.tolist()))
                    for of in (one, two, (one + two) / 2, none)))


def ratios(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The numbers of eq. (5), (P,)."""
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError("both must have points for each of two prompts or more, got shapes "
                         f"{x.shape} and {y.shape}")
    if not y.sum() > 0:
        raise ValueError("the reference has no point, so nothing is a share of its points")
    r = x.sum() / y.sum()
    return r + (x - r * y) / y.mean()  # eq. (5)


def without_bonus(r_1: float, r_2: float) -> float:
    """Eq. (3): a share, from those of both orders.

    >>> round(without_bonus(0.370, 0.596), 3)  # of table 6: FLAN v2, 65B; the mean is .483
    0.431
    """
    return r_1 * (1 + r_2) / (1 + r_1)  # eq. (3)
