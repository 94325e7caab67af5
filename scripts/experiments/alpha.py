"""LoRA's alpha at a fixed rate, and at a rate that falls as alpha rises.

    python scripts/experiments/alpha.py --model runs/pretrain-*/model
    python scripts/experiments/alpha.py --quick    # seconds; the numbers mean nothing

Lecture 004 advises an alpha of 2 to 4 ranks. Here the update (alpha / r) B A has r = 8 and an alpha
of half a rank to 8 ranks, on all linear layers and four small tasks.

What alpha does under Adam: let B' = c B be what c times alpha makes of B. The gradient of B is c
times that of B', but the size of Adam's steps does not depend on the size of the gradients. So B
steps by about the rate, and B' by c times the rate; and B' starts from zeros, as B does. Hence

    c alpha at the rates (lr of A, lr of B)  =  alpha at the rates (lr of A, c lr of B)      (1)

which is LoRA+ with lambda = c (Hayou et al. 2024, arXiv:2402.12354), up to Adam's eps and the
clipping of the gradient's norm. tests/test_alpha.py checks it. So alpha is a second learning rate:
the arms "rate x" and "rate /" undo its effect on B, and only A's rate is left to differ.

The fixed rate was found for alpha = 2 r, which favours this alpha and its neighbours. The arms at
scaled rates show how much of their lead is left without that. A seed takes about 8 minutes of one
core.
"""

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import Verdict, by_arm, by_seed, compared, compared_best, verdict
from minilm.picture import COLORS, curve
from minilm.trial import KNOWN, LOSS, RIGHT, program

QUESTION = "Which alpha is best, and is it more than a learning rate?"

SLIDE = {}  # the lecture has no number of an arm
R, LR = 8, 3.5e-3  # what low_rank gives for alpha = 2 r
NEAR = 0.07  # nats: what lies between r = 1 and r = 16 in lecture 004's table of ranks
ALPHAS = {"alpha = r/2": 0.5, "alpha = r": 1, "alpha = 2r": 2, "alpha = 4r": 4, "alpha = 8r": 8}
RATES = dict(zip(ALPHAS, ("rate x 4", "rate x 2", "", "rate / 2", "rate / 4")))
FIXED = list(ALPHAS)
SCALED = [f"{arm}, {rate}" if rate else arm for arm, rate in RATES.items()]
ARMS = {
    **{arm: {"r": R, "alpha": float(R * k), "lr": LR} for arm, k in ALPHAS.items()},
    **{scaled: {"r": R, "alpha": float(R * k), "lr": LR * 2 / k}
       for scaled, k in zip(SCALED, ALPHAS.values())},
}
ADVISED, OTHERS = FIXED[2:4], FIXED[:2] + FIXED[4:]
BESTS = "best of 2r and 4r - best of the others"


def spread_less(rows) -> Verdict:
    """The verdict on highest - lowest loss at the scaled rates, minus the same at the fixed one."""
    d = [np.ptp(numbers[len(FIXED) :]) - np.ptp(numbers[: len(FIXED)])
         for numbers in by_seed(rows, LOSS, FIXED + SCALED)]
    about = f"highest - lowest at scaled rates, minus that at the fixed rate: {LOSS}"
    return verdict([float(x) for x in d], about, at_most=0)


CLAIMS = {
    "an alpha of 2 to 4 ranks is best: no other one has less loss by more than a little":
        lambda rows: compared_best(rows, LOSS, ADVISED, OTHERS, BESTS, at_most=NEAR),
    "an alpha of 2 to 4 ranks answers within 4 points of the best of the others":
        lambda rows: compared_best(rows, RIGHT, ADVISED, OTHERS, BESTS, at_least=-4, best=max),
    "an alpha of 2 ranks is better than one of half a rank at the same rate":
        lambda rows: compared(rows, LOSS, "alpha = 2r", "alpha = r/2", at_most=0),
    "an alpha of 4 ranks is better than one of 8 ranks at the same rate":
        lambda rows: compared(rows, LOSS, "alpha = 4r", "alpha = 8r", at_most=0),
    "alpha matters less if the rate falls as it rises": spread_less,
}


def draw(figure, rows):
    """Loss against alpha: a line for the mean, a dot for each seed."""
    axes, found = figure.subplots(), by_arm(rows, LOSS)
    groups = {f"rate {LR:g}": FIXED, f"rate {LR:g} x 2r / alpha": SCALED}
    for (label, arms), color in zip(groups.items(), COLORS):
        curve(axes, {k: found.get(arm, []) for k, arm in zip(ALPHAS.values(), arms)}, color, label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ALPHAS.values()), [f"{k:g}" for k in ALPHAS.values()])
    axes.set(xlabel="alpha / r", ylabel=LOSS, ylim=(0, None))
    axes.legend(frameon=False)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, {LOSS: 3, RIGHT: 1, KNOWN: 2}, CLAIMS,
                        draw)
main = program(EXPERIMENT)

if __name__ == "__main__":
    command(main)
