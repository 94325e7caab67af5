"""Sentences about restaurants out of tables: the E2E table in small.

    python scripts/experiments/table_to_text.py --model runs/pretrain-*/model
    python scripts/experiments/table_to_text.py --quick    # seconds; the numbers mean nothing
    python scripts/experiments/table_to_text.py --rates 1e-3 3e-3 --arms "LoRA, 9k" --seeds 9

Lectures 001 and 004 compare the methods on GPT-2 medium, which learns to describe restaurants (Hu
et al. 2021, arXiv:2106.09685, table 3; the data are Novikova et al. 2017, arXiv:1706.09254). Here a
small model, made by pretrain.py, learns

    name: Anna's | food: soup | price: cheap | area: harbour  ->  a sentence that says so

from four ways to say it, all of which are right. Of the 1536 tables there are, 1300 are learned
from. The arms train about 9 or 74 thousand numbers, where the slide has 0.35 or 11.09 million.
Their rates are those of adaptation_methods.py.

Lecture 000 has GPT-3 summarise SAMSum's dialogues, judged by ROUGE-1, -2 and -L; here these three
are of the same sentences about tables. E2E has five columns. They are counted here as
minilm/measure/text/ says: METEOR has no synonyms, and ROUGE-L and CIDEr are COCO's, as there.

A record takes up to 158 bytes, more than a row of the default model has room for:

    python scripts/pretrain.py --bias --context 192 --seed 0
    python scripts/pretrain.py --bias --context 192 --seed 1
"""

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import by_arm, compared, compared_best
from minilm.picture import COLORS, bars
from minilm.tables import COLUMNS, E2E_COLUMNS, MEASURES, TABLE, measured
from minilm.trial import LOSS, RIGHT, low_rank, program

QUESTION = "Which small change is enough to describe what a table says?"

E2E = {  # GPT-2 M
    "full": (68.2, 8.62, 46.2, 71.0, 2.47), "adapter L, 9k": (66.3, 8.41, 45.0, 69.8, 2.40),
    "adapter L, 74k": (68.9, 8.71, 46.1, 71.3, 2.47),
    "adapter H, 74k": (67.3, 8.50, 46.0, 70.7, 2.44), "top 2": (68.1, 8.59, 46.0, 70.8, 2.41),
    "PrefixLayer, 9k": (69.7, 8.81, 46.1, 71.4, 2.49), "LoRA, 9k": (70.4, 8.85, 46.8, 71.8, 2.53)}
SLIDE = {f"lecture 001: GPT-2 M, E2E, {column}": {arm: row[i] for arm, row in E2E.items()}
         for i, column in enumerate(E2E_COLUMNS)}
SAMSUM = {
    "full": (52.0, 28.0, 44.5), "BitFit": (51.3, 27.4, 43.5), "PrefixEmbed": (48.3, 24.2, 40.5),
    "PrefixLayer, 9k": (50.8, 27.3, 43.5), "LoRA, 9k": (52.1, 28.3, 44.3),
    "LoRA, 74k": (53.2, 29.2, 45.0)}
SLIDE |= {f"lecture 000: GPT-3, SAMSum, {column}": {arm: row[i] for arm, row in SAMSUM.items()}
          for i, column in enumerate(("R1", "R2", "RL"))}
ARMS = {
    "base model": TABLE | {"steps": 0},
    "full": TABLE | {"method": "full", "lr": 1e-3},
    "top 2": TABLE | {"method": "top", "k": 2, "lr": 3e-3},
    "BitFit": TABLE | {"method": "bitfit", "lr": 3e-2},
    "PrefixEmbed": TABLE | {"method": "prompt", "length": 32, "lr": 1e-1},
    "PrefixLayer, 9k": TABLE | {"method": "prefix", "length": 9, "lr": 1e-1},
    "adapter L, 9k": TABLE | {"method": "bottleneck", "form": "L", "m": 9, "lr": 1e-2},
    "adapter L, 74k": TABLE | {"method": "bottleneck", "form": "L", "m": 71, "lr": 3e-3},
    "adapter H, 74k": TABLE | {"method": "bottleneck", "form": "H", "m": 35, "lr": 1e-2},
    "LoRA, 9k": TABLE | low_rank(1),
    "LoRA, 74k": TABLE | low_rank(8),
}
OTHERS = [arm for arm in ARMS if arm != "base model" and "LoRA" not in arm]


def better(a: str, b: str):
    """Has a less loss than b?"""
    return lambda rows: compared(rows, LOSS, a, b, at_most=0)


BEST, SAME_SIZE = ("LoRA with 9k is better than everything that is not LoRA",
                   "PrefixLayer is better than adapter L of its size")
ONE = "one rank is too little here: LoRA's loss is .10, with eight ranks .04"
LIKELY = {
    BEST: f"{ONE}; full fine-tuning's is .03",
    "LoRA with 9k is better than full": f"{ONE}, and full fine-tuning's .03",
    "LoRA with 9k is better than top 2":
        f"{ONE}, and the two top blocks', with ten times the numbers, .05",
    SAME_SIZE: "not known. A longer prefix does not mend it: with 74k numbers in the place of 9k "
               "its loss falls from 1.57 to 1.47 on the tasks of adaptation_methods.py, where that "
               "of LoRA with 9k is .26",
}
CLAIMS = {
    BEST:
        lambda rows: compared_best(rows, LOSS, ["LoRA, 9k"], OTHERS,
                                   "LoRA, 9k - best of the others", at_most=0),
    **{f"LoRA with 9k is better than {arm}": better("LoRA, 9k", arm) for arm in OTHERS},
    SAME_SIZE: better("PrefixLayer, 9k", "adapter L, 9k"),
    "the larger adapter L is better": better("adapter L, 74k", "adapter L, 9k"),
    "the two top blocks are as good as all: at most 1 point below":
        lambda rows: compared(rows, RIGHT, "top 2", "full", at_least=-1),
    **{f"LoRA with 9k has the highest {column.split(',')[0]}": lambda rows, column=column:
       compared_best(rows, column, ["LoRA, 9k"], OTHERS, "LoRA, 9k - best of the others",
                     at_least=0, best=max) for column in COLUMNS},
}


def draw(figure, rows):
    """What is learned: a bar for the mean of each arm, a dot for each seed."""
    sides = figure.subplots(1, 2, sharey=True)
    for axes, measure, color in zip(sides, (RIGHT, LOSS), COLORS):
        bars(axes, by_arm(rows, measure), lambda arm, color=color: color)
        axes.set_xlabel(measure, fontsize=8)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
