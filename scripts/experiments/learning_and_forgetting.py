"""What does a model learn, and what does it forget for it: full fine-tuning beside LoRA.

    python scripts/experiments/learning_and_forgetting.py --model runs/pretrain-*/model
    python scripts/experiments/learning_and_forgetting.py --quick    # the numbers mean nothing
    python scripts/experiments/learning_and_forgetting.py --rates 1e-3 3e-3 --seeds 100

Lecture 002 tells what Biderman et al. 2024, arXiv:2405.09673, "LoRA learns less and forgets less",
found for Llama 2 7B. There are two settings. In continued pretraining (CPT) the model goes on with
other text, here the source code of Python's library. In instruction fine-tuning (IFT) it learns to
answer, here the tasks of trial.py.

What is learned is the loss of held-out source code, or of held-out answers. What is forgotten is
measured on the text that the model was trained on, held out then: by its loss, and by a
multiple-choice score in HellaSwag's way (minilm/measure/choices.py; chance is 25 %). Both are
measured after 1/8, 1/4, 1/2 and all of the steps of one run, and the picture has a curve an arm.
As the learning rate falls until the end, the points before it are not what shorter runs would give.

Equal rates would favour one arm. LoRA's fall with the rank (trial.low_rank); they and those of full
fine-tuning were the best of several a factor of 3 apart, found by the last command.
"""

import math
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from minilm import data
from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.choices import chosen_rightly, questions
from minilm.measure.losses import loss_of
from minilm.run import share_held_out
from minilm.trial import (
    RIGHT,
    TRAINED,
    Trial,
    base,
    held_out,
    learned,
    low_rank,
    prepared,
    program,
    records_of,
    right,
    taught,
)

QUESTION = "What does a model learn, and what does it forget for it?"

SLIDE = {}  # the lecture shows curves, and has no number for them
TARGET, KNOWN = "target, bits a token", "old text, bits a token"
CHOICE = "old text, chosen rightly, %"
BEGINNING, ENDING = 32, 16  # bytes of a question
SHARES = {"1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2, "1": 1}  # of the steps


def at(measure: str, share: str) -> str:
    """A measure after a share of the steps."""
    return measure if share == "1" else measure.replace(",", f" at {share},", 1)


MEASURES = {TARGET: 3, KNOWN: 3, CHOICE: 1, RIGHT: 1, TRAINED: 0} | {
    at(measure, share): decimals for share in SHARES
    for measure, decimals in ((TARGET, 3), (KNOWN, 3), (CHOICE, 1))}


@dataclass(frozen=True)
class Learning(Trial):
    """A trial that goes on with text, or learns to answer."""

    text: bool = False
    """learn Python's source code, not the tasks"""
    steps: int = 1000
    warmup: int = 50
    test: int = 100
    questions: int = 200
    """of the multiple choice"""
    rows: int = 100
    """of held-out source code"""


RANKS = (2, 8, 32)
FULL = {"method": "full", "lr": 1e-3}
LORA = {f"r = {r}": low_rank(r) for r in RANKS}
REGULAR = {"attention dropout": FULL | {"attention_dropout": 0.1},
           "decay 1e-2": FULL | {"weight_decay": 1e-2}, "decay 1e-1": FULL | {"weight_decay": 1e-1}}
CPT = {"base model": {"steps": 0}, "full": FULL, **LORA}
IFT = CPT | REGULAR
ARMS = ({f"CPT, {name}": own | {"text": True} for name, own in CPT.items()}
        | {f"IFT, {name}": own for name, own in IFT.items()})


def measured(s: Learning, run, title: str) -> dict:
    """The numbers of MEASURES."""
    model, tokenizer = base(s.model)
    train, test = records_of(s)
    look = partial(looked_at, tokenizer=tokenizer, s=s, test=test)
    steps = {share: max(1, round(part * s.steps)) for share, part in SHARES.items()}

    def watch(trainer, done):
        if done.targets and done.step in steps.values():
            run.log(step=done.step, **look(trainer.model))

    if s.text and s.steps:
        model = prepared(model, s)
        stream = data.Batches([data.pack(corpus()[0], tokenizer)], [1], s.batch, model.room,
                              s.seed)
        model, trained, _ = taught(model, stream, s, run, title, watch)
    else:
        model, trained, _ = learned(model, tokenizer, train, s, run, title, watch)
    found = {record["step"]: record for record in run.records()} if s.steps else {}
    last = found.get(s.steps) or look(model)
    return {RIGHT: right(model, tokenizer, test)[RIGHT], TRAINED: trained,
            **{at(measure, share): found.get(step, last)[measure]
               for share, step in steps.items() for measure in (TARGET, KNOWN, CHOICE)}}


def looked_at(model, tokenizer, s: Learning, test) -> dict:
    """What the model has learned, and what it still knows."""
    old = held_out((share_held_out(s.model) if s.model else None) or 0.1)
    rows = (some_rows(corpus()[1], tokenizer, model.room, s.rows) if s.text
            else data.encode(test, tokenizer, context=model.room))
    asked = questions(old, s.questions, s.seed, BEGINNING, ENDING)
    return {TARGET: loss_of(model, *rows) / math.log(2),
            KNOWN: loss_of(model, *some_rows(old, tokenizer, model.room, s.rows)) / math.log(2),
            CHOICE: chosen_rightly(model, tokenizer, asked)}


@cache
def corpus():
    """(to learn from, held out) of Python's source code."""
    return data.split(data.load_corpus("python-source"), 0.1)


def some_rows(documents, tokenizer, context: int, count: int):
    """So many rows of the documents, or all, equally far apart."""
    tokens, targets = data.rows_of(documents, tokenizer, context)
    places = np.linspace(0, len(tokens) - 1, min(count, len(tokens))).astype(int)
    return tokens[places], targets[places]


CLAIMS = {}


def draw(figure, rows):
    """Forgetting against learning: a curve an arm through the means of its points."""


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, None)
main = program(EXPERIMENT, measured, Learning)

if __name__ == "__main__":
    command(main)
