"""The lecture's 5 x 5 matrix in 8 bits: its codes, and what an outlier does to one constant.

    python scripts/experiments/outlier_in_a_matrix.py            # a second
    python scripts/experiments/outlier_in_a_matrix.py --quick

Lecture 001 puts a matrix in 8 bits with one constant, round(127 / absmax(W) W), and asks: do you
see a problem? The largest weight is unbounded, an outlier. Its answer is blocks with a constant
each. Here a weight that the seed draws becomes 10 or 100 times as large as the largest one, and a
block is a row.

The slide's codes are not those of the weights that it prints: 1.7 has 99, where 127 / 2.2 times 1.7
is 98. "Possible" counts the codes of weights that are printed like these, if the largest may be
whatever is printed as 2.2. (-0.7 and -0.3 stand above -4 and -2, which seem to lack a digit.) The
error is that of the other 24 weights.
"""

from typing import NamedTuple

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.measure.verdict import by_seed, compared, single, verdict
from minilm.picture import COLORS
from minilm.quantize import quantize_int8

QUESTION = "What does an outlier do to a matrix in 8 bits, by who shares a constant?"
HALF = 0.05  # half a digit of what the slide prints

W = np.array([[-0.7, -0.3, 0.0, -0.4, 0.3], [-1.0, 0.2, 0.7, 1.7, -0.9],
              [-0.1, -1.5, -0.1, 0.8, 0.5], [1.2, -1.7, -0.9, -0.3, 0.7],
              [0.4, 0.1, -1.4, 2.2, -1.1]])
CODES = np.array([[-4, -2, 0, -22, 16], [-60, 10, 40, 99, -57], [-5, -88, -9, 48, 27],
                  [72, -100, -50, -18, 40], [22, 8, -81, 127, -66]])


class Case(NamedTuple):
    """Who shares a constant, and how many times the largest weight the outlier is."""

    axis: int | None = None  # None: all; -1: each row
    factor: int = 1  # 1: none is an outlier


ARMS = {f"{who}{f', outlier x {factor}' if factor > 1 else ''}": Case(axis, factor)
        for who, axis in (("one constant", None), ("a constant a row", -1))
        for factor in (1, 10, 100)}
ONE, ROWS = "one constant", "a constant a row"
SLIDE = {"lecture 001: codes": {ONE: CODES.size}}
SAME, POSSIBLE, USED = "codes of the slide", "possible", "codes in use"
ERROR, TAKEN = "mean |error|", "bytes of constants"
MEASURES = {SAME: 0, POSSIBLE: 0, USED: 1, ERROR: 4, TAKEN: 0}

PRINTED = "the slide's codes are those of the weights that it prints"
ALL = "all 25 are codes of such weights"
LIKELY = {
    PRINTED: "the slide's weights are rounded to one digit, and its codes are not made of these: "
             "22 of them are possible",
    ALL: "the slide is wrong in three: -0.7 and -0.3 have -4 and -2, a tenth of what they should "
         "have, and the -0.9 of the second row has -57, where -0.95 / 2.15 gives -56",
}


def ratio(rows, measure: str, a: str, b: str, **bounds):
    """The verdict on a's number over b's."""
    d = [x / y for x, y in by_seed(rows, measure, (a, b))]
    return verdict(d, f"{a} / {b}: {measure}", **bounds)


CLAIMS = {
    PRINTED: lambda rows: single(rows, SAME, ONE, at_least=CODES.size - 0.5),
    "20 or more of the 25 are codes of weights that are printed like these":
        lambda rows: single(rows, POSSIBLE, ONE, at_least=19.5),
    ALL:
        lambda rows: single(rows, POSSIBLE, ONE, at_least=CODES.size - 0.5),
    "an outlier biases all: 10 times the largest weight makes the others' error 5 times as large":
        lambda rows: ratio(rows, ERROR, f"{ONE}, outlier x 10", ONE, at_least=5),
    "with a constant a row, 10 times the largest makes less than half of that error":
        lambda rows: ratio(rows, ERROR, f"{ROWS}, outlier x 10", f"{ONE}, outlier x 10",
                           at_most=0.5),
    "100 times the largest weight leaves less than a third of the codes":
        lambda rows: ratio(rows, USED, f"{ONE}, outlier x 100", ONE, at_most=0.33),
    "a constant a row costs more bytes":
        lambda rows: compared(rows, TAKEN, ROWS, ONE, at_least=0),
}


def possible(X, axis) -> int:
    """How many of the slide's codes are round(127 / m w), if w and m may be whatever is printed as
    in X and as the largest number of its group: both within half a digit, and one m a group."""
    found = 0
    for printed, codes in [(X, CODES)] if axis is None else zip(X, CODES):
        largest = abs(printed).max()
        m = np.linspace(largest - HALF, largest + HALF, 201).reshape(-1, *[1] * printed.ndim)
        low, high = (codes - 0.5) * m / 127, (codes + 0.5) * m / 127  # of w with this code
        fits = (low <= printed + HALF) & (high >= printed - HALF)
        found += int(fits.reshape(len(m), -1).sum(1).max())
    return found


def measured(arm: str, seed: int, quick: bool) -> dict:
    """The codes of one arm, and the error of all weights but the outlier."""
    (axis, factor), place = ARMS[arm], np.random.default_rng(seed).integers(W.size)
    X = with_outlier(place, factor)
    quantized = quantize_int8(X, axis)
    error = np.delete(abs(quantized.dequantize() - X), place)
    return {SAME: float((quantized.codes == CODES).sum()), POSSIBLE: float(possible(X, axis)),
            USED: float(np.unique(quantized.codes).size), ERROR: float(error.mean()),
            TAKEN: float(quantized.absmax.nbytes)}


def with_outlier(place: int, factor: int) -> np.ndarray:
    """The matrix, in float32, if the weight at this place is so many times the largest one."""
    X = W.astype(np.float32)
    if factor > 1:
        X.flat[place] = factor * abs(X).max()
    return X


def draw(figure, rows):
    """All weights of the first seed as points, and where their codes put them."""
    seed, axes = min(row["seed"] for row in rows), figure.subplots()
    place = np.random.default_rng(seed).integers(W.size)
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)][::-1]
    axes.plot([-2.2, 2.2], [-2.2, 2.2], color=COLORS[5], linewidth=0.8)
    for arm, color in zip(arms, COLORS[len(arms) - 1 :: -1]):
        axis, factor = ARMS[arm]
        if axis is None:
            X = with_outlier(place, factor)
            back = quantize_int8(X, axis).dequantize()
            axes.plot(np.delete(X, place), np.delete(back, place), "o", color=color, markersize=4,
                      alpha=0.7, label=arm)
    axes.set(xlabel="weight", ylabel="the same, back from 8 bits")
    axes.legend(frameon=False, fontsize=7)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
