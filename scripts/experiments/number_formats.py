"""What formats of numbers can hold: floats of 32 and 16 bits, and integers.

    python scripts/experiments/number_formats.py            # a second
    python scripts/experiments/number_formats.py --quick

Lecture 000: an integer from -n to n needs lg(2n) bits; half-precision floats have 16, the range
+-65504, and 1 + 1/1024 as the next number above 1. Lecture 003: full precision is 32 bits. Lecture
004: the largest number of fp32 is 340,282 and 33 more digits, that of fp16 65,504. Lecture 001:
bfloat16 has the wide range of 32-bit floats, but lower precision.

The numbers follow from the bits of exponent and fraction (minilm/measure/formats.py). Beside them
stands what NumPy's and ml_dtypes' numbers do, found by rounding other numbers to them: powers of 2,
and sums of these. Nothing is random, so all seeds give the same.
"""

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.measure.buckets import nearest
from minilm.measure.formats import FORMATS, Whole, by_rounding
from minilm.measure.verdict import by_seed, compared, each_seed, single, verdict
from minilm.picture import COLORS
from minilm.quantize import quantize_int8

QUESTION = "What do formats of numbers hold, and in how many bits?"
SLIDE = {
    "lecture 000: bits": {"float16": 16},
    "lecture 000: largest": {"float16": 65504},
    "lecture 000: step above 1": {"float16": 1 / 1024},
    "lecture 003: bits": {"float32": 32},
    "lecture 004: largest": {"float32": 340_282e33, "float16": 65_504},
}
ARMS = tuple(FORMATS)
BITS, LARGEST, STEP = "bits", "largest", "step above 1"
LEAST, LG = "least normal, power of 2", "lg(2n), n positive numbers"
FOUND = "off what rounding shows, %"
MEASURES = {BITS: 0, LARGEST: 0, STEP: 10, LEAST: 0, LG: 3, FOUND: 1}


def near(arm: str, measure: str, wanted: float, to: float):
    """Is the number of the slide right, to a share `to` of it?"""
    return lambda rows: single(rows, measure, arm, at_least=wanted * (1 - to),
                               at_most=wanted * (1 + to))


def ratio(rows, measure: str, a: str, b: str, **bounds):
    """The verdict on a's number over b's."""
    d = [x / y for x, y in by_seed(rows, measure, (a, b))]
    return verdict(d, f"{a} / {b}: {measure}", **bounds)


CLAIMS = {
    "half-precision floats go to +-65504": near("float16", LARGEST, 65504, 1e-9),
    "the next one above 1 is 1 + 1/1024": near("float16", STEP, 1 / 1024, 1e-9),
    "the largest of fp32 is 340282 and 33 zeros, to its 6 digits":
        near("float32", LARGEST, 340_282e33, 2e-6),
    "bfloat16 has the range of float32: its largest is within 1 %":
        lambda rows: ratio(rows, LARGEST, "bfloat16", "float32", at_least=0.99, at_most=1.01),
    "bfloat16 has the range of float32: the least normal numbers are equal":
        lambda rows: compared(rows, LEAST, "bfloat16", "float32", at_least=-0.5, at_most=0.5),
    "bfloat16 is less precise than float16: its step is 8 times as large":
        lambda rows: ratio(rows, STEP, "bfloat16", "float16", at_least=7.9, at_most=8.1),
    **{f"int{bits} from -{n} to {n} needs lg(2n) bits, rounded up to {bits}":
        lambda rows, bits=bits: verdict([np.ceil(x) - b for b, x in pairs(rows, f"int{bits}")],
                                        "difference in bits", at_least=-0.5, at_most=0.5)
        for bits, n in ((8, 127), (4, 7))},
    "the formulas say what NumPy's numbers and this package's codes are":
        lambda rows: verdict(each_seed(rows, lambda row: row[FOUND]), f"largest: {FOUND}",
                             at_most=1e-6),
}


def pairs(rows, arm: str):
    """(bits, lg(2n)) of an arm, by seed."""
    return [(row[BITS], row[LG]) for row in rows if row["arm"] == arm]


def measured(arm: str, seed: int, quick: bool) -> dict:
    """What a format holds by the formulas, and how far that is from what is found."""
    held = FORMATS[arm]
    if isinstance(held, Whole):
        x = np.linspace(-1, 1, 10001, dtype=np.float32)
        codes = quantize_int8(x).codes if arm == "int8" else nearest(x, arm)
        found = {held.largest: (len(np.unique(codes)) - 1) / 2}
    else:
        found = dict(zip((held.largest, held.least, held.step), by_rounding(arm)))
    return {BITS: float(held.bits), LARGEST: held.largest, STEP: held.step,
            LEAST: float(np.log2(held.least)), LG: float(np.log2(2 * held.positive)),
            FOUND: 100 * max(abs(is_ / should - 1) for should, is_ in found.items())}


def draw(figure, rows):
    """The numbers of each format on a scale of powers of 2: range as a bar, steps by its colour."""
    axes = figure.subplots()
    names = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)][::-1]
    for i, arm in enumerate(names):
        held = FORMATS[arm]
        low, high = np.log2(held.least), np.log2(held.largest)
        axes.barh(i, high - low, left=low, color=COLORS[ARMS.index(arm)], alpha=0.6)
        axes.text(high + 4, i, f"{held.bits} bits, step above 1: 2^{np.log2(held.step):.0f}"
                  if held.step < 1 else f"{held.bits} bits, step 1", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="from the least normal number to the largest, powers of 2", xlim=(-135, 250))


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
