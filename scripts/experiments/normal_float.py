"""The sixteen levels of NormalFloat: how they are made, and how full their buckets are.

    python scripts/experiments/normal_float.py            # seconds
    python scripts/experiments/normal_float.py --quick    # fewer numbers; they mean nothing

Lecture 002 has the table of levels, and says: asymmetry, negative and positive. Lecture 001 says:
equally sized buckets in the place of equally spaced ones, since precision around the mean is
valuable. An arm is a code, in ascending order.

The recipe is QLoRA's (section 3; the numbers are from bitsandbytes): the probability between the
outermost quantile and the median is cut into 7 equal steps on the left and 8 on the right; the
quantiles, over the outermost one, are the levels. So 7 levels are negative, the median is an exact
0, and 8 are positive.

The shares are of normal numbers in blocks of 64. int4 and fp4 have 15 values, and none at the last
code. `python scripts/quantize.py` prints them for the weights of a model.
"""

from statistics import NormalDist

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.measure.buckets import blocks, counts, values
from minilm.measure.verdict import verdict
from minilm.picture import COLORS
from minilm.quantize.codebooks import NF4, normal_float, outermost

QUESTION = "How are the levels of NormalFloat made, and are its buckets equally full?"

ARMS = tuple(f"code {i}" for i in range(16))
SLIDE = {"lecture 002: level": dict(zip(ARMS, (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0)))}
LEVEL, RECIPE, BELOW = "level", "by the recipe", "probability below, %"
SHARE = {kind: f"share in {kind}, %" for kind in ("nf4", "int4", "fp4")}
MEASURES = {LEVEL: 16, RECIPE: 7, BELOW: 2} | dict.fromkeys(SHARE.values(), 2)


def columns(rows, *measures) -> list[list[np.ndarray]]:
    """For each seed that has all codes, the columns of these measures in the codes' order."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        of = {row["arm"]: row for row in rows if row["seed"] == seed}
        if of.keys() >= {*ARMS}:
            found.append([np.array([of[arm][m] for arm in ARMS]) for m in measures])
    return found


def judged(rows, about: str, value, *measures, **bounds):
    """The verdict on value(a column of each measure), a number a seed."""
    return verdict([float(value(*c)) for c in columns(rows, *measures)], about, **bounds)


def uneven(below):
    """How far the steps of each side are from one another, in points."""
    left, right = np.diff(below[:8]), np.diff(below[7:])
    return max(np.ptp(left), np.ptp(right))


def far_from_slide(level):
    return abs(level - list(SLIDE["lecture 002: level"].values())).max()


EQUAL = "the buckets are equally full: the fullest has less than 1.5 times the emptiest"
LIKELY = {EQUAL: "the levels are quantiles from -1.85 to 1.85 spreads, but the largest of 64 "
                 "numbers is at 2.6 on average: see buckets.py"}
CLAIMS = {
    "the levels are the slide's":
        lambda rows: judged(rows, "largest difference", far_from_slide, LEVEL, at_most=1e-12),
    "the recipe gives them, to 2e-7":
        lambda rows: judged(rows, "largest difference", lambda a, b: abs(a - b).max(), LEVEL,
                            RECIPE, at_most=2e-7),
    "7 are negative, one is 0, 8 are positive":
        lambda rows: judged(rows, "how far the counts are from that",
                            lambda x: abs((x < 0).sum() - 7) + abs((x > 0).sum() - 8), LEVEL,
                            at_most=0.5),
    "the steps of a side are equally probable":
        lambda rows: judged(rows, "largest difference of steps of one side, points", uneven, BELOW,
                            at_most=1e-3),
    "asymmetry: a step is likelier on the left than on the right, by .5 points or more":
        lambda rows: judged(rows, "step of the left - of the right, points",
                            lambda p: np.diff(p[:8]).mean() - np.diff(p[7:]).mean(), BELOW,
                            at_least=0.5),
    EQUAL: lambda rows: judged(rows, "fullest / emptiest", lambda x: x.max() / x.min(),
                               SHARE["nf4"], at_most=1.5),
    "nf4's fullest bucket is less full than int4's":
        lambda rows: judged(rows, "fullest of int4 - of nf4, points",
                            lambda a, b: b.max() - a.max(), SHARE["nf4"], SHARE["int4"],
                            at_least=0),
    "near 0 nf4's levels are nearer to each other than int4's":
        lambda rows: judged(rows, "largest step within a fourth of the range, of int4's",
                            lambda x: np.diff(x[abs(x) < 0.25]).max() * 7, LEVEL, at_most=1),
}


def measured(arm: str, seed: int, quick: bool) -> dict:
    """One level, and the share of normal numbers that gets it."""
    i, normal = ARMS.index(arm), NormalDist()
    x, largest = blocks(np.random.default_rng(seed).standard_normal(1 << (12 if quick else 20)))
    shares = {}
    for kind, name in SHARE.items():
        found = counts(x, kind, largest)
        shares[name] = 100 * float(found[i] / x.size) if i < len(found) else 0.0
    return {LEVEL: float(NF4[i]), RECIPE: normal_float(4)[i],
            BELOW: 100 * normal.cdf(NF4[i] * normal.inv_cdf(outermost(4)))} | shares


def draw(figure, rows):
    """The normal density over the range, the levels of two codebooks, and how full they are."""
    top, bottom = figure.subplots(2, 1, sharex=True)
    x = np.linspace(-1, 1, 201)
    z = x * NormalDist().inv_cdf(outermost(4))
    top.fill_between(x, np.exp(-z * z / 2), color=COLORS[5], alpha=0.3, linewidth=0)
    top.set(ylabel="normal density", yticks=[])
    for kind, color, shift in zip(("nf4", "int4"), COLORS, (-0.012, 0.012)):
        levels = values(kind)
        top.vlines(levels, 0, 1 if kind == "nf4" else 0.3, color=color, linewidth=1)
        shares = [np.mean([row[SHARE[kind]] for row in rows if row["arm"] == arm] or [0])
                  for arm in ARMS[: len(levels)]]
        bottom.bar(levels + shift, shares, width=0.024, color=color, label=kind)
    bottom.axhline(100 / 16, color=COLORS[4], linewidth=1, linestyle="--", label="equal shares")
    bottom.set(xlabel="level", ylabel="share in blocks of 64, %")
    bottom.legend(frameon=False, fontsize=7)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
