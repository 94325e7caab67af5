"""What makes instruction data good: many records, or clean, diverse, clear and consistent ones?

    python scripts/experiments/instruction_data.py --model runs/pretrain-*/model
    python scripts/experiments/instruction_data.py --quick    # seconds; the numbers mean nothing
    python scripts/experiments/instruction_data.py --rates 1e-3 3e-3 --seeds 100

Lecture 004 asks what makes a good instruction dataset: "clear specific instructions", a "diverse
set of topics / tasks", "consistent formatting". It names LIMA with 1k examples of high quality
beside sets of 15k to 800k. Zhou et al. 2023, arXiv:2305.11206, find that LIMA's 1k are enough for
a model of 65B parameters.

Here a model learns four kinds of tasks on words, each in 12 wordings, in equally many steps:

    clean, 2000         right answers, one format, every instruction says what is wanted
    clean, 1400         the records that are right in the next set, without the wrong ones
    30 % wrong, 2000    600 of them have the answer to another record
    clean, 250          quality instead of quantity: the first of the 2000
    mixed formats       the answers stand alone, or as "Answer: x", "x." and "[x]"
    half unclear        half of the instructions are "do it"
    one kind            2000 records that all ask for "reverse"

All are asked the same clean records. An answer counts as right in any of the formats; how many are
in the wanted one stands beside that. The records of a larger set begin with those of a smaller one.
A seed takes about 7 minutes of one core.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from minilm import data
from minilm.command import command
from minilm.data.faults import in_any_format, in_formats, unclear, with_wrong_answers
from minilm.data.wordings import distinct_words, worded
from minilm.experiment import Experiment
from minilm.measure.answers import answers
from minilm.measure.verdict import by_arm, compared, single
from minilm.picture import COLORS, bars
from minilm.ranges import one_of, whole
from minilm.trial import Trial, base, learned, loss_of_answers, program

QUESTION = "What makes instruction data good: many records, or clean, diverse and consistent ones?"

SLIDE = {}  # the lecture gives sizes of datasets, and no scores
KINDS = ("reverse", "upper", "sort", "double")
WRONG, UNCLEAR = 0.3, 0.5  # shares

RIGHT, ALONE, OWN = "answered rightly, %", "and in the wanted format, %", "reverse, %"
LOSS, LEARNED = "loss of answers, nats a token", "records to learn from"
MEASURES = {RIGHT: 1, ALONE: 1, OWN: 1, LOSS: 3, LEARNED: 0}


@dataclass(frozen=True)
class Dataset(Trial):
    """A trial on records with faults, or fewer without."""

    n: int = 2000
    """records to learn from, of all kinds in turn"""
    fault: Literal["none", "wrong", "left out", "formats", "unclear", "one kind"] = "none"
    """what is wrong with them; left out: the wrong ones are not there"""
    steps: int = 1200
    test: int = 60
    """other words that each kind is asked about"""

    RANGES: ClassVar = Trial.RANGES | {"n": whole(1), "fault": one_of(
        "none", "wrong", "left out", "formats", "unclear", "one kind")}


FULL = {"method": "full", "lr": 1e-3}
CLEAN, SMALL, SPOILED, REST = "clean, 2000", "clean, 250", "30 % wrong, 2000", "clean, 1400"
MIXED, VAGUE, NARROW = "mixed formats", "half unclear", "one kind"
ARMS = {name: FULL | own for name, own in {
    CLEAN: {}, REST: {"fault": "left out"}, SPOILED: {"fault": "wrong"}, SMALL: {"n": 250},
    MIXED: {"fault": "formats"}, VAGUE: {"fault": "unclear"},
    NARROW: {"fault": "one kind"}}.items()}


def records(s: Dataset) -> tuple[list, list]:
    """(to learn from, to be asked). A set with a fault has the words and kinds of the clean one."""
    words, rng = distinct_words(2000 + s.test, s.words, s.seed), np.random.default_rng([s.seed, 5])
    kinds = KINDS[:1] if s.fault == "one kind" else KINDS
    train = [worded([kinds[i % len(kinds)]], word, rng)
             for i, word in enumerate(words[s.test :][: s.n])]
    asked = np.random.default_rng([s.seed, 9])
    test = [worded([kind], word, asked) for kind in KINDS for word in words[: s.test]]
    return with_fault(train, s), test


def with_fault(train: list, s: Dataset) -> list:
    """The records with the fault that the settings name."""
    if s.fault == "formats":
        return in_formats(train, s.seed)
    if s.fault == "unclear":
        return unclear(train, UNCLEAR, s.seed)
    if s.fault in ("wrong", "left out"):
        spoiled = with_wrong_answers(train, WRONG, s.seed)
        return spoiled if s.fault == "wrong" else [a for a, b in zip(train, spoiled) if a == b]
    return train


def measured(s: Dataset, run, title: str) -> dict:
    """The numbers of MEASURES."""
    train, test = records(s)
    model, tokenizer = base(s.model)
    model = learned(model, tokenizer, train, s, run, title)[0]
    longest = max(test, key=lambda record: len(record.output))  # with room for every format
    room = replace(longest, output=max(in_any_format(longest).references, key=len))
    said = answers(model, [*test, room], tokenizer)[:-1]
    right = [data.score(in_any_format(record), x) for record, x in zip(test, said)]
    return {RIGHT: 100 * float(np.mean(right)),
            ALONE: 100 * float(np.mean([data.score(r, x) for r, x in zip(test, said)])),
            OWN: 100 * float(np.mean([x for x, r in zip(right, test) if r.task == KINDS[0]])),
            LOSS: loss_of_answers(model, tokenizer, test), LEARNED: len(train)}


def better(a: str, b: str, measure: str = RIGHT, points: float = 0):
    """Is a's number more than some points above b's?"""
    return lambda rows: compared(rows, measure, a, b, at_least=points)


CLAIMS = {
    "quality before quantity: 250 clean records are better than 2000 with 30 % wrong answers":
        better(SMALL, SPOILED),
    "250 clean records are enough, within 5 points of 2000 clean ones":
        better(SMALL, CLEAN, points=-5),
    "wrong answers harm: 2000 clean records are better than 2000 with 30 % wrong":
        better(CLEAN, SPOILED),
    "wrong answers are worse than none: they are better left out": better(REST, SPOILED),
    "consistent formatting: one format is better than mixed ones": better(CLEAN, MIXED),
    "consistent formatting: with one format more answers are in the wanted one":
        better(CLEAN, MIXED, ALONE),
    "clear instructions: all clear is better than half of them unclear": better(CLEAN, VAGUE),
    "diverse tasks: four kinds are better than as many records of one kind": better(CLEAN, NARROW),
    "diverse tasks have a price: of that one kind, its own records teach more":
        better(NARROW, CLEAN, OWN),
    "the clean records teach the tasks: 50 % or more":
        lambda rows: single(rows, RIGHT, CLEAN, at_least=50),
}
LIKELY = {
    "250 clean records are enough, within 5 points of 2000 clean ones":
        "LIMA's model of 65B parameters could do its tasks before, and had to learn how to be "
        "asked. This base can do none of them (the loss of answers is 2.2 nats after 250 records, "
        ".1 after 2000), so the records have to teach the tasks: 250 have about 60 of each",
}


def draw(figure, rows):
    """Right answers of each arm, and those in the wanted format."""
    for axes, measure, color in zip(figure.subplots(1, 2, sharey=True), (RIGHT, ALONE), COLORS):
        found = by_arm(rows, measure)
        bars(axes, {arm: found[arm] for arm in ARMS if arm in found}, lambda arm: color)
        axes.set(xlabel=measure)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw,
                        LIKELY)
main = program(EXPERIMENT, measured, Dataset)

if __name__ == "__main__":
    command(main)
