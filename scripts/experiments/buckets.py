"""How four bits are used: how many values, how many collisions, by the range and with an outlier.

    python scripts/experiments/buckets.py            # seconds
    python scripts/experiments/buckets.py --quick    # fewer numbers; they mean nothing

Lecture 000 says of quantizing to 4 bits: an integer of 4 bits covers only a small portion of the
range (of half precision, +-65504); but most weights are small, so it makes no sense to use only
part of the mapping; let's restrict the range: fewer collisions. This does not work with outliers: a
uniform mapping would be mostly wasted, with lots of collisions. Lecture 001 adds buckets of equal
size, NormalFloat's, in the place of equal steps.

Here the weights are normal numbers of spread 1, drawn from the seed. An arm is a codebook and what
its largest value stands for: a number of spreads, or the largest number of each block of 64. The
outlier, one number of 30 spreads, then decides the range of all numbers, or of its block.
`python scripts/quantize.py` prints the same for the weights of a model.
minilm/measure/buckets.py has the equations. Beyond the range are numbers that are cut off.
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.measure.buckets import blocks, colliding, counts, entropy, nearest, values
from minilm.measure.formats import FORMATS
from minilm.measure.verdict import compared, single
from minilm.picture import COLORS
from minilm.quantize.codebooks import outermost

QUESTION = "How are four bits used best, and what does an outlier do to it?"


class Case(NamedTuple):
    """How numbers are mapped to codes."""

    codebook: str
    constant: float | None = None  # the range, in spreads; None: the largest number of a block
    block: int | None = None  # numbers in it; None: all
    outlier: bool = False


FAR = 30.0  # spreads
FIT = "nf4, range 1.85"  # its largest value is the quantile that it was made as
HALF = FORMATS["float16"].largest
ARMS = {
    "int4, range of float16": Case("int4", HALF),
    **{f"int4, range {n}": Case("int4", float(n)) for n in (10, 3, 1)},
    "int4, one constant": Case("int4"),
    "int4, one constant, outlier": Case("int4", outlier=True),
    "nf4, one constant, outlier": Case("nf4", outlier=True),
    "int4, blocks": Case("int4", block=64),
    "int4, blocks, outlier": Case("int4", block=64, outlier=True),
    "fp4, blocks": Case("fp4", block=64),
    "nf4, blocks": Case("nf4", block=64),
    FIT: Case("nf4", NormalDist().inv_cdf(outermost(4))),
}
SLIDE = {"lecture 001: buckets of 4 bits": {"nf4, blocks": 16}}
USED, FULLEST, BITS = "values in use", "fullest, %", "bits of entropy"
COLLIDE, BEYOND, ERROR = "pairs that collide, %", "beyond the range, %", "mean |error|, spreads"
MEASURES = {USED: 0, FULLEST: 1, BITS: 2, COLLIDE: 2, BEYOND: 2, ERROR: 4}

EQUAL = "nf4's 16 buckets are nearly equal in blocks: 3.9 of 4 bits or more"
NARROW = "a range of 1 spread errs less than one of 3"
CUT = "over that range, with one number in 15 cut off, nf4 errs less than in blocks"
LIKELY = {
    EQUAL: "the largest value is made as the quantile at 1.85 spreads, but the largest of 64 "
           "numbers is at 2.6 on average: in blocks the numbers lie nearer to the middle",
    NARROW: "a third of the numbers is beyond the range, and is cut off",
    CUT: "the numbers beyond the range, one in 15, make .025 of the error of .083 spreads, and "
         ".009 of the .073 in blocks; the others make .058, and .064 in blocks. Equally full "
         "buckets are not those of the least error",
}
CLAIMS = {
    "over the range of float16 all weights have one code":
        lambda rows: single(rows, USED, "int4, range of float16", at_most=1.5),
    "a range of 3 spreads has fewer collisions than one of 10":
        lambda rows: compared(rows, COLLIDE, "int4, range 3", "int4, range 10", at_most=0),
    "a range of 1 spread has fewer than one of 3":
        lambda rows: compared(rows, COLLIDE, "int4, range 1", "int4, range 3", at_most=0),
    NARROW:
        lambda rows: compared(rows, ERROR, "int4, range 1", "int4, range 3", at_most=0),
    "with an outlier equal steps are mostly wasted: less than half of the 15 values are used":
        lambda rows: single(rows, USED, "int4, one constant, outlier", at_most=7.5),
    "with an outlier there are lots of collisions: more than half of the pairs":
        lambda rows: single(rows, COLLIDE, "int4, one constant, outlier", at_least=50),
    "a constant a block keeps an outlier apart: collisions rise by less than .1 points":
        lambda rows: compared(rows, COLLIDE, "int4, blocks, outlier", "int4, blocks", at_most=0.1),
    "nf4 uses its codes more alike than int4":
        lambda rows: compared(rows, BITS, "nf4, blocks", "int4, blocks", at_least=0),
    "nf4 uses its codes more alike than fp4":
        lambda rows: compared(rows, BITS, "nf4, blocks", "fp4, blocks", at_least=0),
    EQUAL: lambda rows: single(rows, BITS, "nf4, blocks", at_least=3.9),
    "nf4's buckets are equal over the range they were made for: 3.9 bits or more":
        lambda rows: single(rows, BITS, FIT, at_least=3.9),
    CUT:
        lambda rows: compared(rows, ERROR, FIT, "nf4, blocks", at_most=0),
    "nf4 has fewer collisions than int4":
        lambda rows: compared(rows, COLLIDE, "nf4, blocks", "int4, blocks", at_most=0),
    "nf4 errs less than int4":
        lambda rows: compared(rows, ERROR, "nf4, blocks", "int4, blocks", at_most=0),
}


def numbers_of(c: Case, seed: int, quick: bool):
    """(x, what its largest values stand for, one number or one a block)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(1 << (12 if quick else 20))
    if c.outlier:
        x[rng.integers(x.size)] = FAR
    if c.constant is not None:
        return x, c.constant
    return blocks(x, c.block or x.size)


def measured(arm: str, seed: int, quick: bool) -> dict:
    """How full the buckets of one arm are, and what is lost."""
    c = ARMS[arm]
    x, constant = numbers_of(c, seed, quick)
    found = counts(x, c.codebook, constant)
    error = x - values(c.codebook)[nearest(x, c.codebook, constant)] * constant
    return {USED: float((found > 0).sum()), FULLEST: 100 * float(found.max() / x.size),
            BITS: entropy(found), COLLIDE: 100 * colliding(found),
            BEYOND: 100 * float((abs(x) > constant).mean()), ERROR: float(abs(error).mean())}


def draw(figure, rows):
    """How full each bucket is, for five of the arms and the first seed, on 65536 numbers."""
    seed = min(row["seed"] for row in rows)
    arms = [arm for arm in ("int4, range 10", "int4, range 3", "int4, one constant, outlier",
                            "int4, blocks", "nf4, blocks") if any(r["arm"] == arm for r in rows)]
    grid = figure.subplots(len(arms), sharex=True, squeeze=False)[:, 0]
    for axes, arm, color in zip(grid, arms, COLORS):
        x, constant = numbers_of(ARMS[arm], seed, True)
        shares = 100 * counts(x, ARMS[arm].codebook, constant) / x.size
        axes.bar(values(ARMS[arm].codebook), shares, width=0.05, color=color)
        axes.set_title(arm, fontsize=8, loc="left", pad=2)
    grid[len(grid) // 2].set_ylabel("share of the numbers, %")
    grid[-1].set_xlabel("value / largest value")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
