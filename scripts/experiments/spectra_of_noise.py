"""What does the spectrum of a matrix look like if noise is added to it?

    python scripts/experiments/spectra_of_noise.py           # ten seconds
    python scripts/experiments/spectra_of_noise.py --quick   # a second; the numbers mean nothing

Lecture 002 shows figure S8 of Biderman et al. 2024: A and B are 1000 x 1000 matrices of independent
standard normal numbers. (a) has the spectra of A, c B and A + c B for c = .1, all of high rank. (b)
has the mean |difference| of the spectra of A and A + c B for various c. With it the paper argues
that a low-magnitude update of high rank, such as that of full fine-tuning, leaves a spectrum as it
was.

Both are made again here, beside what large matrices have in closed form: the largest singular value
is 2 sqrt(n (1 + c^2)), k90 (how many directions hold 90 % of the sum of squares) is .51 n, and the
mean difference (sqrt(1 + c^2) - 1) 8 sqrt(n) / (3 pi). minilm/measure/spectra.py derives them. So
.51 n is the mark to set beside each k90 of spectra.py: what noise of the same shape would need.
"""

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.measure.spectra import apart, noise_apart, noise_edge, noise_rank, rank_of, spectrum
from minilm.measure.verdict import single, verdict
from minilm.picture import COLORS, curve

QUESTION = "What does the spectrum of a matrix look like if noise is added to it?"
SLIDE = {}  # the slide shows curves without numbers
SIZE, FEW = 1000, 50  # n; in a quick run

ARMS = {"A": (1, 0.0), "0.1 B": (0, 0.1)} | {
    f"A + {c:g} B": (1, c) for c in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)}  # (a, c) of a A + c B
FIRST, EDGE = "largest singular value", "in closed form"
RANK, SHARE = "k90", "k90, % of n"
AWAY, FORM = "mean |difference| to A", "the same in closed form"
SMALL = "the same, % of A's mean"
MEASURES = {FIRST: 2, EDGE: 2, RANK: 0, SHARE: 1, AWAY: 3, FORM: 3, SMALL: 2}
SPECTRUM = "spectrum"  # every 20th value, for the picture
SUMS = [arm for arm, (a, c) in ARMS.items() if a and c]


def ratio(arm: str, measure: str, closed: str, near: float):
    """Is the measure near its closed form? That is for infinite matrices; the largest value of a
    finite one varies by parts of n^(-2/3), 1 % (Tracy & Widom 1994)."""
    return lambda rows: verdict(
        [row[measure] / row[closed] for row in rows if row["arm"] == arm],
        f"{arm}: {measure} / closed form", 1 - near, 1 + near)


CLAIMS = {
    **{f"{arm} is of high rank: 90 % of it takes half of n or more":
       lambda rows, arm=arm: single(rows, SHARE, arm, at_least=50) for arm in [*ARMS][:3]},
    "k90 of A + 1 B is .51 n, within .01 n":
        lambda rows: single(rows, SHARE, "A + 1 B", 100 * noise_rank() - 1, 100 * noise_rank() + 1),
    **{f"{arm}: the largest value is 2 sqrt(n (1 + c^2)), within 2 %":
       ratio(arm, FIRST, EDGE, 0.02)
       for arm in ("A", "A + 0.3 B", "A + 1 B")},
    **{f"{arm}: the mean difference to A is its closed form, within 5 %":
       ratio(arm, AWAY, FORM, 0.05)
       for arm in ("A + 0.3 B", "A + 1 B")},
    "noise of a tenth changes the spectrum by less than 1 %":
        lambda rows: single(rows, SMALL, "A + 0.1 B", at_most=1),
    "noise as large as the matrix changes it by more than 40 %":
        lambda rows: single(rows, SMALL, "A + 1 B", at_least=40),
}


def measured(arm: str, seed: int, quick: bool) -> dict:
    """The spectrum of an arm's matrix, and its numbers. All arms of a seed have the same A and B.
    """
    n, (a, c) = FEW if quick else SIZE, ARMS[arm]
    A, B = np.random.default_rng(seed).standard_normal((2, n, n))
    before, s = spectrum(A), spectrum(a * A + c * B)
    edge = noise_edge(n, c) if a else c * noise_edge(n)
    form = noise_apart(n, c) if a else (1 - c) * (noise_apart(n, 1.0) / (2**0.5 - 1))
    return {FIRST: float(s[0]), EDGE: edge, RANK: rank_of(s), SHARE: 100 * rank_of(s) / n,
            AWAY: apart(before, s), FORM: form, SMALL: 100 * apart(before, s) / before.mean(),
            SPECTRUM: s[:: n // 50].tolist()}


def draw(figure, rows):
    """Left the spectra of A, c B and their sum for c = .1, right the mean difference by c."""
    left, right = figure.subplots(1, 2)
    seed = min(row["seed"] for row in rows)
    for arm, color in zip([*ARMS][:3], COLORS):
        for row in rows:
            if (row["arm"], row["seed"]) == (arm, seed):
                places = np.linspace(0, 1, len(row[SPECTRUM]), endpoint=False)
                left.plot(places, row[SPECTRUM], "--" if arm == "A" else "-", color=color,
                          label=arm, linewidth=2 if arm == "A" else 1)
    left.axvline(noise_rank(), color=COLORS[5], linewidth=0.8, linestyle=":", label="k90 = .51 n")
    left.set(xlabel="place in the spectrum, i / n", ylabel="singular value")
    found = {0.0: [row[SMALL] for row in rows if row["arm"] == "A"]} | {
        ARMS[arm][1]: [row[SMALL] for row in rows if row["arm"] == arm] for arm in SUMS}
    curve(right, found, COLORS[2], "measured")
    c = np.linspace(0, 1, 30)
    right.plot(c, 100 * (np.sqrt(1 + c * c) - 1), "--", color=COLORS[5], label="closed form")
    right.set(xlabel="c", ylabel="|difference| of A + c B to A, % of A's mean")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=7)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
