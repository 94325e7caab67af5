"""What does LoRA need to come within 4 points of full fine-tuning?

    python scripts/experiments/within_reach.py --model runs/pretrain-*/model
    python scripts/experiments/within_reach.py --quick    # seconds; the numbers mean nothing

The lectures say that LoRA equals full fine-tuning with a small share of its parameters. Here a
tenth of them is allowed. On a Llama of 8 x 64 that is a rank of 4 on all linear layers. The arms
change one thing at a time: the rank, the steps, the scale of B against A (LoRA+, by a larger alpha;
alpha.py has the law), the scale at a high rank (rsLoRA), the rows' magnitudes (DoRA). r = 8 and 64
are beyond a tenth.

What theory asks for is more: expressive_power.py computes which rank suffices for every target.

The arms "five tasks" learn what finetune.py teaches: words of 3 to 6 letters out of 26, and sums of
two numbers, 16 records in a step. There the question is also whether steps are what is missing.
"""

import numpy as np

from minilm import data
from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import by_arm, compared, single
from minilm.picture import COLORS, bars
from minilm.trial import LOSS, RIGHT, TASKS, TRAINED, Trial, base, low_rank, program, tried

QUESTION = "What does LoRA need to come within 4 points of full fine-tuning?"

SLIDE = {"lecture 002: GPT-3, WikiSQL, %": {"full": 73.8, "r = 1": 73.4, "r = 8": 74.0}}
FIVE = {"tasks": (*TASKS, "add"), "words": data.tasks.ALL, "batch": 16}
ARMS = {
    "full": {"method": "full", "lr": 1e-3},
    **{f"r = {r}": low_rank(r) for r in (1, 2, 4, 8, 64)},
    "r = 4, twice the steps": low_rank(4) | {"steps": 4000},
    "r = 4, LoRA+": low_rank(4) | {"alpha": 32.0, "lr": 2e-3},
    "r = 64, rsLoRA": low_rank(64) | {"rslora": True, "lr": 3e-4},
    "DoRA, r = 3": low_rank(3) | {"method": "dora"},
    **{f"five tasks: {name}, {steps} steps": FIVE | own | {"steps": steps} for steps in (2000, 6000)
       for name, own in (("full", {"method": "full", "lr": 1e-3}), ("r = 4", low_rank(4)))},
}
PART = "trained, % of the model"


def within(a: str, b: str = "full", measure: str = RIGHT):
    """Does a answer within 4 points of b?"""
    return lambda rows: compared(rows, measure, a, b, at_least=-4, at_most=4)


def small(arm: str):
    """Does an arm train less than a tenth of the model?"""
    return lambda rows: single(rows, PART, arm, at_most=10)


CLAIMS = {
    **{f"{arm} is within 4 points of full fine-tuning": within(arm)
       for arm in ARMS if arm != "full" and "five" not in arm},
    **{f"{arm} is less than a tenth of the model": small(arm) for arm in ("r = 4", "DoRA, r = 3")},
    **{f"five tasks, {steps} steps: r = 4 is within 4 points of full fine-tuning":
       within(f"five tasks: r = 4, {steps} steps", f"five tasks: full, {steps} steps")
       for steps in (2000, 6000)},
    **{f"five tasks, 6000 steps: r = 4 is within 4 points of full fine-tuning in {task!r}":
       within("five tasks: r = 4, 6000 steps", "five tasks: full, 6000 steps", f"{task}, %")
       for task in FIVE["tasks"]},
    "five tasks: r = 4 with three times the steps answers more than full fine-tuning":
        lambda rows: compared(rows, RIGHT, "five tasks: r = 4, 6000 steps",
                              "five tasks: full, 2000 steps", at_least=0),
}


def measured(s: Trial, run, title: str) -> dict:
    """The numbers of a trial, and the share of the model that it trains."""
    row = tried(s, run, title)
    whole = sum(p.size for p in base(s.model)[0].parameters())
    return row | {PART: 100 * row[TRAINED] / whole}


def draw(figure, rows):
    """A bar for the mean of each arm, a dot for each seed, a line 4 points below full."""
    axes = figure.subplots()
    found = by_arm(rows, RIGHT)
    bars(axes, found, lambda arm: COLORS[1 if "five" in arm else 0])
    if "full" in found:
        axes.axvline(np.mean(found["full"]) - 4, linestyle="--", linewidth=1, color=COLORS[2])
    axes.set(xlabel=f"{RIGHT} (line: full - 4 points)")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, {RIGHT: 1, LOSS: 3, TRAINED: 0, PART: 1}
                        | {f"{task}, %": 0 for task in TASKS}, CLAIMS, draw)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
