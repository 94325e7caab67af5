"""Does a claim about two arms of an experiment hold? A verdict from a few seeds.

Both arms run on the same seeds and share records and batches, so each seed gives one difference d.
For n seeds let s be the standard deviation of d, and t Student's quantile for n - 1. The interval

    mean(d) - t s / sqrt(n)  to  mean(d) + t s / sqrt(n)                                     (1)

covers the mean over all seeds in 95 of 100 experiments, if the d are normal (Student 1908, The
probable error of a mean). A bootstrap assumes less. But with three seeds it never leaves the range
from the lowest to the highest, which covers the median in only 75 of 100 experiments.

The interval says what to expect of other seeds. It says nothing about other models, data or
settings.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"

# Student's quantile of .975 for 1, 2, ... 20 degrees of freedom. The last one serves for more, too:
# it makes the interval a little wider.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


@dataclass(frozen=True)
class Verdict:
    """What the seeds say about the claim that a quantity lies between two bounds."""

    verdict: str  # HOLDS, FAILS or OPEN
    about: str  # the quantity
    at_least: float | None  # what is claimed; None: no bound
    at_most: float | None
    seeds: int
    mean: float | None = None  # None without a seed, or if it is not finite
    low: float | None = None  # the interval; None with fewer than two seeds
    high: float | None = None


def difference(rows: Iterable[dict], measure: str, a: str, b: str) -> list[float]:
    """Arm a's number minus arm b's, for each seed that has both."""
    return [x - y for x, y in by_seed(rows, measure, (a, b))]


def by_seed(rows: Iterable[dict], measure: str, arms: Iterable[str]) -> list[list[float]]:
    """The arms' numbers, in their order, for each seed that has all of them."""
    arms = tuple(arms)
    of = {(r["seed"], r["arm"]): r[measure] for r in rows if r["arm"] in arms}
    seeds = sorted({seed for seed, _ in of})
    return [[of[s, a] for a in arms] for s in seeds if all((s, a) in of for a in arms)]


def by_arm(rows: Iterable[dict], measure: str) -> dict[str, list[float]]:
    """arm -> its numbers, arms and numbers in the order of the rows."""
    found = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row[measure])
    return found


def interval(d: list[float]) -> tuple[float, float]:
    """The 95 % interval (low, high) of eq. (1). ValueError for fewer than two numbers."""
    if len(d) < 2:
        raise ValueError(f"an interval needs at least two numbers, got {len(d)}")
    n, mean = len(d), math.fsum(d) / len(d)  # fsum: the same bits in any order
    s = math.sqrt(math.fsum((x - mean) ** 2 for x in d) / (n - 1))
    half = T975[min(n - 1, len(T975)) - 1] * s / math.sqrt(n)  # eq. (1)
    return mean - half, mean + half


def verdict(d: list[float], about: str, at_least: float | None = None,
            at_most: float | None = None) -> Verdict:
    """Does the mean of d lie between the bounds?

    The claim holds if all of the interval lies inside them. It does not hold if all of the interval
    lies outside. Otherwise it cannot be told, nor with fewer than two numbers, nor if one of them
    is not finite. ValueError if there is no bound.
    """
    if at_least is None and at_most is None:
        raise ValueError(f"a claim about {about} needs at_least, at_most or both")
    if not all(map(math.isfinite, d)):
        return Verdict(OPEN, about, at_least, at_most, len(d))
    if len(d) < 2:
        return Verdict(OPEN, about, at_least, at_most, len(d), *d)
    low, high = interval(d)
    bottom = -math.inf if at_least is None else at_least
    top = math.inf if at_most is None else at_most
    said = OPEN
    if bottom < low and high < top:
        said = HOLDS
    elif high < bottom or top < low:
        said = FAILS
    return Verdict(said, about, at_least, at_most, len(d), math.fsum(d) / len(d), low, high)


def compared(rows: Iterable[dict], measure: str, a: str, b: str, at_least: float | None = None,
             at_most: float | None = None) -> Verdict:
    """The verdict on arm a's number minus arm b's."""
    about = f"{a} - {b}: {measure}"
    return verdict(difference(rows, measure, a, b), about, at_least, at_most)


def single(rows: Iterable[dict], measure: str, arm: str, at_least: float | None = None,
           at_most: float | None = None) -> Verdict:
    """The verdict on one arm's number."""
    d = [x for x, in by_seed(rows, measure, (arm,))]
    return verdict(d, f"{arm}: {measure}", at_least, at_most)


def each_seed(rows: Iterable[dict], value: Callable[[dict], float], pick: Callable = max
              ) -> list[float]:
    """One number a seed: the largest value(row) of its rows, or what `pick` takes of them.

    Rows of one seed have much in common, so an interval over all rows would be too narrow. A seed
    with a value that is NaN gives NaN.
    """
    found = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(value(row))
    return [_known(pick, values) for _, values in sorted(found.items())]


def _known(pick: Callable, values: list[float]) -> float:
    """pick(values), or NaN if one of them is NaN, which max and min see or not by its place."""
    return math.nan if any(map(math.isnan, values)) else pick(values)


def compared_best(rows: Iterable[dict], measure: str, some: Iterable[str], others: Iterable[str],
                  about: str, at_least: float | None = None, at_most: float | None = None,
                  best=min) -> Verdict:
    """The verdict on the best number of some arms minus the best of others, on each seed.

    about: what the groups are called, as in "some - others". best: min or max. The best of more
    arms is the luckier one. If an arm has NaN, nobody knows which is best.
    """
    some, others = tuple(some), tuple(others)
    d = [_known(best, numbers[: len(some)]) - _known(best, numbers[len(some) :])
         for numbers in by_seed(rows, measure, some + others)]
    return verdict(d, f"{about}: {measure}", at_least, at_most)
