"""Every method on four small tasks: what it learns and forgets, and what it takes.

    python scripts/experiments/adaptation_methods.py --model runs/pretrain-*/model
    python scripts/experiments/adaptation_methods.py --quick    # seconds; the numbers mean nothing
    python scripts/experiments/adaptation_methods.py --rates 1e-3 3e-3 1e-2 --seeds 100

Lectures 000, 001 and 002 compare the methods on models with billions of parameters. Here a small
model, made by pretrain.py, learns four tasks: reverse a word, put it in upper case, sort its
letters, find the last word. Then it answers held-out records. Its loss on the text that it was
trained on says what it still knows.

The arms have about 9 or about 74 thousand parameters, as far as a method can. The last command is
how their rates were found. BitFit needs a model with biases: pretrain.py --family gpt2.
"""

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import compared
from minilm.picture import COLORS
from minilm.trial import KNOWN, MEASURES, RIGHT, TASKS, program

QUESTION = "Which small change is enough, what does it forget, and what does it take?"

SLIDE = {
    "lecture 002: GPT-3, WikiSQL, %": {
        "full": 73.8, "BitFit": 71.3, "PrefixEmbed, 9k": 63.1, "PrefixLayer, 9k": 70.1,
        "adapter H, 9k": 71.9, "adapter H, 74k": 73.2, "LoRA, 9k": 73.4, "LoRA, 74k": 74.0},
    "lecture 002: T5-11B, RougeL": {"full": 62.0, "LoRA, 74k": 60.7, "QLoRA, 74k": 60.9},
}
ARMS = {
    "base model": {"steps": 0},
    "full": {"method": "full", "lr": 1e-3},
    "top 2": {"method": "top", "k": 2, "lr": 3e-3},
    "BitFit": {"method": "bitfit", "lr": 1e-2},
    "IA3": {"method": "ia3", "lr": 3e-2},
    "PrefixEmbed, 9k": {"method": "prompt", "length": 72, "lr": 1e-1},
    "PrefixLayer, 9k": {"method": "prefix", "length": 9, "lr": 1e-1},
    "PrefixLayer, 74k": {"method": "prefix", "length": 72, "lr": 1e-1},
    "adapter H, 9k": {"method": "bottleneck", "form": "H", "m": 3, "lr": 1e-2},
    "adapter H, 74k": {"method": "bottleneck", "form": "H", "m": 35, "lr": 1e-2},
    "adapter P, 74k": {"method": "bottleneck", "form": "P", "m": 71, "lr": 1e-2},
    "adapter L, 74k": {"method": "bottleneck", "form": "L", "m": 71, "lr": 1e-2},
    "LoRA, 9k": {"method": "lora", "r": 1, "alpha": 2.0, "lr": 3e-3},
    "LoRA, 37k": {"method": "lora", "r": 4, "alpha": 8.0, "lr": 3e-3},
    "LoRA, 74k": {"method": "lora", "r": 8, "lr": 3e-3},
    "QLoRA, 74k": {"method": "qlora", "r": 8, "lr": 3e-3},
    "DoRA, 74k": {"method": "dora", "r": 8, "lr": 3e-3},
    "AdaLoRA, 74k": {"method": "adalora", "r": 12, "last": 8, "alpha": 24.0, "lr": 1e-2},
    "LoRA and prefix, 74k": {"method": "lora", "r": 7, "alpha": 14.0, "beside": 9, "lr": 3e-3},
}
CLAIMS = {
    "LoRA is within 4 points of full fine-tuning":
        lambda rows: compared(rows, RIGHT, "LoRA, 74k", "full", at_least=-4, at_most=4),
    "LoRA forgets less than full fine-tuning":
        lambda rows: compared(rows, KNOWN, "LoRA, 74k", "full", at_most=0),
    "QLoRA is within 2 points of LoRA":
        lambda rows: compared(rows, RIGHT, "QLoRA, 74k", "LoRA, 74k", at_least=-2, at_most=2),
}


def draw(figure, rows):
    """Learning against forgetting: a small dot for each seed, a large one for the mean."""
    axes = figure.subplots()
    arms = dict.fromkeys(row["arm"] for row in rows)
    for i, (arm, color) in enumerate(zip(arms, COLORS)):
        x, y = np.array([(row[KNOWN], row[RIGHT]) for row in rows if row["arm"] == arm]).T
        axes.plot(x, y, "o", color=color, markersize=4, alpha=0.6, markeredgewidth=0)
        axes.plot(x.mean(), y.mean(), "o", color=color, markersize=9, markeredgewidth=0)
        axes.annotate(arm, (x.mean(), y.mean()), xytext=(0, -16 if i % 2 else 9), color=color,
                      textcoords="offset points", ha="center", weight="bold")
    axes.margins(0.14)
    axes.set(xlabel=f"{KNOWN} (right: forgets more)", ylabel=RIGHT)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS,
                        MEASURES | {f"{task}, %": 0 for task in TASKS}, CLAIMS, draw)
main = program(EXPERIMENT)

if __name__ == "__main__":
    command(main)
