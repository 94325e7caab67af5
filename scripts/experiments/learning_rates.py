"""Full fine-tuning and LoRA over a grid of learning rates: how far apart are the best ones?

    python scripts/experiments/learning_rates.py --model runs/pretrain-*/model
    python scripts/experiments/learning_rates.py --quick    # seconds; the numbers mean nothing

Lecture 004 advises a rate for LoRA that is 10 to 100 times that of full fine-tuning. Here both
learn four small tasks at each rate, LoRA with r = 8 and alpha = 16 on all linear layers. On each
seed a parabola through the lowest loss and its neighbours, over the logarithm of the rate, says
which rate is best; see minilm/measure/optimum.py. The claim is about the ratio of the two.

A best rate at an end of the grid is only a bound: look at the picture. LoRA's rate depends on alpha
and on how A starts, so the ratio is one of this LoRA: see alpha.py. A seed takes about 13 minutes
of one core.
"""

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.optimum import lowest_at
from minilm.measure.verdict import Verdict, by_arm, by_seed, compared_best, verdict
from minilm.picture import COLORS, curve
from minilm.trial import KNOWN, LOSS, RIGHT, program

QUESTION = "How much higher is LoRA's learning rate than that of full fine-tuning?"

SLIDE = {}  # the lecture has no number of an arm
SLIDE_RATIO = (10, 100)  # lecture 004: LoRA's rate over that of full fine-tuning
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
NEAR = 0.07  # nats: what lies between r = 1 and r = 16 in lecture 004's table of ranks


def named(method: str) -> list[str]:
    """The method's arms, in the order of RATES."""
    return [f"{method}, {lr:g}" for lr in RATES]


METHODS = {"full": {"method": "full"}, "LoRA": {"r": 8, "alpha": 16.0}}
ARMS = {arm: own | {"lr": lr} for method, own in METHODS.items()
        for arm, lr in zip(named(method), RATES)}


def log_ratio(rows, at_least: float | None = None, at_most: float | None = None) -> Verdict:
    """The verdict on log10 of LoRA's best rate over that of full fine-tuning, on each seed."""
    def best(losses):
        return lowest_at(np.log10(RATES), losses) if np.isfinite(losses).all() else np.nan
    found = [(best(numbers[: len(RATES)]), best(numbers[len(RATES) :]))
             for numbers in by_seed(rows, LOSS, named("LoRA") + named("full"))]
    lora, full = 10 ** np.mean(found or [(np.nan, np.nan)], axis=0)
    about = f"log10 of LoRA's best rate, {lora:.2g}, over that of full fine-tuning, {full:.2g}"
    return verdict([a - b for a, b in found], about, at_least, at_most)


CLAIMS = {
    "LoRA's best rate is 10 to 100 times that of full fine-tuning":
        lambda rows: log_ratio(rows, *np.log10(SLIDE_RATIO).tolist()),
    "LoRA's best rate is the higher one": lambda rows: log_ratio(rows, at_least=0),
    "at the best rates LoRA's loss is that of full fine-tuning":
        lambda rows: compared_best(rows, LOSS, named("LoRA"), named("full"),
                                   "LoRA - full, each at its best", -NEAR, NEAR),
}


LIKELY = {
    "LoRA's best rate is 10 to 100 times that of full fine-tuning":
        "AdamW's best rate for whole matrices falls as their width rises (Yang et al. 2022, "
        "arXiv:2203.03466), and 4096, Llama 2's, is 64 times the width of this one. Below the best "
        "rates LoRA needs about 3 times the rate for the same loss",
}


def draw(figure, rows):
    """Loss against rate: a line for the mean, a dot for each seed."""
    axes, found = figure.subplots(), by_arm(rows, LOSS)
    for method, color in zip(METHODS, COLORS):
        curve(axes, {lr: found.get(arm, []) for arm, lr in zip(named(method), RATES)}, color,
              method)
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel=LOSS, ylim=(0, None))
    axes.legend(frameon=False)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, {LOSS: 3, RIGHT: 1, KNOWN: 2}, CLAIMS,
                        draw, LIKELY)
main = program(EXPERIMENT)

if __name__ == "__main__":
    command(main)
