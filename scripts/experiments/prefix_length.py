"""Rows in front of the text: how many are best, and what they take from it.

    python scripts/experiments/prefix_length.py --model runs/pretrain-*/model
    python scripts/experiments/prefix_length.py --quick    # seconds; the numbers mean nothing
    python scripts/experiments/prefix_length.py --rates 3e-2 1e-1 3e-1 --seeds 100

Lecture 002 says of prefix tuning: "hard optimization, reduces the sequence length available to
process a downstream task". Hu et al. 2021, arXiv:2106.09685, section 3, add that what it reaches
does not always rise with the number of parameters; their figure 2 shows it for GPT-3.

Here l rows go in front of each layer's keys and values (PrefixLayer), or in front of the embedded
text (PrefixEmbed), and learn the four tasks of adaptation_methods.py. If optimisation were easy,
more rows would never be worse: the model could pass over the ones that it does not need. Few rows
give no whole answers, so losses are compared. LoRA of rank 1 has fewer numbers than PrefixLayer of
16 rows.
"""

import itertools

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import by_arm, compared
from minilm.picture import COLORS, curve
from minilm.trial import LOSS, RIGHT, ROOM, TRAINED, low_rank, program

QUESTION = "Is a longer prefix always better, and what does it take from the text?"

SLIDE = {
    "lecture 002: GPT-3, WikiSQL, %": {"PrefixLayer, l = 16": 70.1, "LoRA, r = 1": 73.4},
}
STEPS = {"steps": 1000}  # longer ones take three times as long a step
LENGTHS = (1, 4, 16, 64)
METHODS = {"PrefixLayer": "prefix", "PrefixEmbed": "prompt"}
ARMS = {f"{name}, l = {l}": {"method": method, "length": l, "lr": 1e-1} | STEPS
        for name, method in METHODS.items() for l in LENGTHS}
ARMS["LoRA, r = 1"] = low_rank(1) | STEPS
MEASURES = {ROOM: 0, RIGHT: 1, LOSS: 3, TRAINED: 0}


def taken(rows, name: str):
    """Does each of the 63 rows more take one token's place?"""
    return compared(rows, ROOM, f"{name}, l = 64", f"{name}, l = 1", -63.5, -62.5)


CLAIMS = {
    **{f"{name}: a row takes a token's place from the text": lambda rows, name=name:
       taken(rows, name) for name in METHODS},
    **{f"{name}: {more} rows are better than {less}": lambda rows, name=name, more=more, less=less:
       compared(rows, LOSS, f"{name}, l = {more}", f"{name}, l = {less}", at_most=0)
       for name in METHODS for less, more in itertools.pairwise(LENGTHS)},
    "a prefix is hard to optimise: LoRA learns more with fewer numbers":
        lambda rows: compared(rows, LOSS, "LoRA, r = 1", "PrefixLayer, l = 16", at_most=0),
}


def draw(figure, rows):
    """The loss by l: a dot for each seed, a line through the means."""
    axes, found = figure.subplots(), by_arm(rows, LOSS)
    for name, color in zip((*METHODS, "LoRA, r = 1"), COLORS):  # LoRA has no l: a level line
        curve(axes, {l: found.get(f"{name}, l = {l}", found.get(name, [])) for l in LENGTHS}, color,
              name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, LENGTHS)
    axes.legend(frameon=False)
    axes.set(xlabel="l, rows in front of the text", ylabel=LOSS)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT)

if __name__ == "__main__":
    command(main)
