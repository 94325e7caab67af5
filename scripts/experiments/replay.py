"""What does old text among the rows of new tasks save, and what does it cost?

    python scripts/experiments/replay.py --model runs/pretrain-*/model
    python scripts/experiments/replay.py --quick          # seconds; the numbers mean nothing
    python scripts/experiments/replay.py --rates 5e-4 1e-3 2e-3 --arms "0 %" "20 %" --seeds 100

Lecture 001 says that a model which learns new tasks may overwrite what it learned before, and that
"to mitigate the problem of catastrophic forgetting, we need to do multi-task finetuning. This
requires a lot of data, and training resources." It has no numbers for that.

Here all of a model learns three tasks. A share p of a step's rows is old text: 0, 5, 20 or 50 %, of
the part of its corpus on which it was trained; the held-out part says what it still knows. Its
task is the old one, to predict what comes next. An old row is as long as a record of the tasks.
Old rows cost one of two things:

    p          in the place of task rows: equal steps, so fewer of the tasks' rows are learned
    p, beside  beside all task rows: the tasks' batches are the same, but steps take longer

See minilm/data/replay.py; finetune.py --replay does the same with your own data. A seed takes about
4 minutes of one core.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import floor
from typing import ClassVar

from minilm import data
from minilm.command import command
from minilm.data.replay import old_a_step
from minilm.experiment import Experiment
from minilm.measure.verdict import by_arm, by_seed, compared, verdict
from minilm.picture import COLORS, curve
from minilm.ranges import BELOW_1
from minilm.trial import (
    KNOWN,
    LOSS,
    MS,
    RIGHT,
    Trial,
    base,
    loss_of_answers,
    old_text,
    prepared,
    program,
    records_of,
    right,
    share_of,
    taught,
)

QUESTION = "What does old text among the rows of new tasks save, and what does it cost?"

SLIDE = {}  # the lecture has no number for it
ROWS, OLD = "rows of tasks", "old text, thousand tokens"
MEASURES = {RIGHT: 1, LOSS: 3, KNOWN: 2, ROWS: 0, OLD: 0, MS: 0}


@dataclass(frozen=True)
class Replaying(Trial):
    """A trial with old text among its rows."""

    tasks: tuple[str, ...] = ("upper", "sort", "last")
    steps: int = 1000
    warmup: int = 50
    share: float = 0.0
    """of a step's rows that are old text"""
    added: bool = False
    """let old rows come beside all task rows, not in the place of some"""

    RANGES: ClassVar = Trial.RANGES | {"share": BELOW_1}


FULL, BASE, NONE = {"method": "full", "lr": 1e-3}, "base model", "0 %"
SHARES = (0.05, 0.2, 0.5)
PLACE = {f"{share:.0%}".replace("%", " %"): share for share in SHARES}
BESIDE = {f"{name}, beside": share for name, share in PLACE.items()}
ARMS = {BASE: {"steps": 0}, NONE: FULL,
        **{name: FULL | {"share": share} for name, share in PLACE.items()},
        **{name: FULL | {"share": share, "added": True} for name, share in BESIDE.items()}}


def measured(s: Replaying, run, title: str) -> dict:
    """The numbers of MEASURES."""
    train, test = records_of(s)
    model, tokenizer = base(s.model)
    rows, old, seconds = 0, 0, 0.0
    if s.steps:
        model = prepared(model, s)
        batches = data.InstructionBatches(train, tokenizer, s.batch, None, s.seed, model.room)
        if s.share:
            texts = known(share_of(s))
            batches = data.replay_text(batches, texts, tokenizer, s.share, s.added)
            old = floor(old_a_step(s.batch, s.share, s.added) * s.steps)
        rows = s.steps * s.batch - old * (not s.added)
        old *= batches.old.length if s.share else 0
        model, _, seconds = taught(model, batches, s, run, title)
    return {**right(model, tokenizer, test), LOSS: loss_of_answers(model, tokenizer, test),
            KNOWN: old_text(model, tokenizer, s), ROWS: rows, OLD: old / 1e3, MS: 1e3 * seconds}


@cache
def known(share: float) -> tuple[str, ...]:
    """The part of the old text that pretrain.py trains on."""
    return data.split(data.load_corpus("python-reference"), share)[0]


def forgets_less(a: str, b: str):
    """Has an arm lost less of the old text than another?"""
    return lambda rows: compared(rows, KNOWN, a, b, at_most=0)


def saved(name: str, part: float):
    """Is at least this part of what is forgotten without old text not forgotten with it?"""
    def judge(rows):
        d = [(some - start) - (1 - part) * (none - start)
             for start, none, some in by_seed(rows, KNOWN, (BASE, NONE, name))]
        about = f"what {name} forgets - {1 - part:.0%} of what {NONE} forgets: {KNOWN}"
        return verdict(d, about, at_most=0)
    return judge


CLAIMS = {
    "fine-tuning on tasks alone forgets old text":
        lambda rows: compared(rows, KNOWN, NONE, BASE, at_least=0),
    **{f"{a} of old text forgets less than {b}": forgets_less(a, b)
       for b, a in pairwise([NONE, *PLACE])},
    **{f"{name} of old text takes away most of the forgetting": saved(name, 0.5)
       for name in PLACE},
    **{f"{name} costs learning: with fewer rows of the tasks their loss is higher":
       lambda rows, a=name: compared(rows, LOSS, a, NONE, at_least=0) for name in PLACE},
    **{f"{name} costs at most 4 points": lambda rows, a=name:
       compared(rows, RIGHT, a, NONE, at_least=-4) for name in (*PLACE, *BESIDE)},
    **{f"{name} costs time: a step takes longer": lambda rows, a=name:
       compared(rows, MS, a, NONE, at_least=0) for name in BESIDE},
}
OUTWEIGHED = ("an old row has 36 targets, an answer 4 or 5, and all weigh the same: nine tenths of "
              "the loss are old text's")
LIKELY = {"50 % costs at most 4 points": f"half of the tasks' rows are gone, and {OUTWEIGHED}",
          "50 %, beside costs at most 4 points": OUTWEIGHED}


def draw(figure, rows):
    """By the share of old rows: bits a byte of the old text, and what is answered rightly."""
    kinds = {"in the place of task rows": PLACE, "beside all task rows": BESIDE}
    for axes, measure in zip(figure.subplots(1, 2), (KNOWN, RIGHT)):
        found = by_arm(rows, measure)
        for color, (title, arms) in zip(COLORS, kinds.items()):
            points = {NONE: 0.0, **arms}
            curve(axes, {100 * x: found.get(arm, []) for arm, x in points.items()}, color, title)
        if measure == KNOWN and BASE in found:
            axes.axhline(sum(found[BASE]) / len(found[BASE]), linestyle="--", linewidth=1,
                         color=COLORS[5], label="base model")
        axes.set_xlabel("old rows, % of a step's", fontsize=8)
        axes.set_ylabel(measure, fontsize=8)
        axes.tick_params(labelsize=7)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False, fontsize=6.5)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured, Replaying)

if __name__ == "__main__":
    command(main)
