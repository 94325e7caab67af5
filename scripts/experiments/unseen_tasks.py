"""Does a model that learned many kinds of tasks do what it was never taught?

    python scripts/experiments/unseen_tasks.py --model runs/pretrain-*/model
    python scripts/experiments/unseen_tasks.py --quick    # seconds; the numbers mean nothing
    python scripts/experiments/unseen_tasks.py --rates 1e-3 3e-3 --seeds 100

Lecture 004 says of FLAN, which is tuned on instructions of many tasks, that it "helps to generalize
to unseen tasks" and "improves usability via natural language". Wei et al. 2021, arXiv:2109.01652,
and Chung et al. 2022, arXiv:2210.11416, hold out whole kinds of tasks, and find that more kinds
help.

Here a model learns k = 1, 3, 6 or 9 kinds of tasks on a word ("reverse", "upper", "sort" ...), each
in 12 wordings, from equally many records in equally many steps. With k = 3 or more, half of the
records are compositions of two kinds ("turn around and sort"). It is asked about other words:

    as learned              its own kinds, in the wordings it learned
    new sentence            the same phrases in sentences that are new: "can you reverse?"
    new phrase              its own kinds by phrases that are new: "mirror" for "reverse"
    learned composition     "sort and upper"; k = 1 has not learned it
    unseen composition      "reverse and upper": both parts are learned alone and with others, but
                            never together
    unseen kind             "drop the first letter", in any phrase; no record has it

No letter comes twice in a word that is asked about, so no learned kind gives the answer of an
unseen one. The model of k = 1 need not read its instructions, so new wordings cannot trouble it. Of
the unseen, the loss of the right answers is measured, too, which shows what is not enough for a
whole answer. A seed takes about 10 minutes of one core.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from minilm import data
from minilm.command import command
from minilm.data.wordings import (
    KINDS,
    LEARNED,
    NEW_PHRASE,
    NEW_SENTENCE,
    distinct_words,
    done,
    pairs,
    pick,
    worded,
)
from minilm.experiment import Experiment
from minilm.measure.answers import answers
from minilm.measure.verdict import by_arm, compared, single, verdict
from minilm.picture import COLORS, curve
from minilm.ranges import whole
from minilm.trial import Trial, base, learned, loss_of_answers, program

QUESTION = "Does a model that learned many kinds of tasks do what it was never taught?"

SLIDE = {}  # the lecture gives no numbers
*TAUGHT, HELD = KINDS  # the last kind is never taught
UNSEEN, TOGETHER = ("reverse", "upper"), ("sort", "upper")
WORDS = 2000  # all that occur, learned and asked

OWN, SENTENCE, PHRASE = "as learned, %", "new sentence, %", "new phrase, %"
COMPOSED, NEW, KIND = "learned composition, %", "unseen composition, %", "unseen kind, %"
PART, OTHER = "unseen composition: only a part, %", "unseen kind: done as another kind, %"
LOSS_NEW, LOSS_KIND = "unseen composition, nats a token", "unseen kind, nats a token"
MEASURES = {OWN: 1, SENTENCE: 1, PHRASE: 1, COMPOSED: 1, NEW: 1, PART: 1, KIND: 1, OTHER: 1,
            LOSS_NEW: 2, LOSS_KIND: 2}


@dataclass(frozen=True)
class Unseen(Trial):
    """A trial on some kinds of tasks."""

    kinds: int = 1
    """how many of them are learned"""
    batch: int = 16
    steps: int = 2000
    train: int = 8000
    """records to learn from, of all kinds"""
    test: int = 120
    """words that are asked about in each way"""

    RANGES: ClassVar = Trial.RANGES | {"kinds": whole(1)}
    OWN: ClassVar = True


K = (1, 3, 6, 9)
FULL = {"method": "full", "lr": 1e-3}
ARMS = {"base": {"steps": 0}} | {f"k = {k}": FULL | {"kinds": k} for k in K}
MANY = [f"k = {k}" for k in K[1:]]


def records(s: Unseen) -> tuple[list, dict[str, list]]:
    """(records to learn from, those that are asked by the measure that they are for)."""
    rng, names = np.random.default_rng([s.seed, 5]), TAUGHT[: s.kinds]
    words = distinct_words(WORDS, s.words, s.seed)
    ask = [word for word in words if len({*word}) == len(word)][: s.test]
    learn = sorted({*words} - {*ask})
    ways = [[(name,) for name in names], pairs(names, UNSEEN)]

    train = [worded(pick(ways[rng.integers(2)] or ways[0], rng), pick(learn, rng), rng)
             for _ in range(s.train)]
    own = [pick(ways[0], rng) for _ in ask]
    asked = {OWN: (own, LEARNED), SENTENCE: (own, NEW_SENTENCE), PHRASE: (own, NEW_PHRASE),
             COMPOSED: ([TOGETHER] * s.test, LEARNED), NEW: ([UNSEEN] * s.test, LEARNED),
             KIND: ([(HELD,)] * s.test, LEARNED)}
    return train, {measure: [worded(names, word, rng, wording) for names, word in zip(kinds, ask)]
                   for measure, (kinds, wording) in asked.items()}


def measured(s: Unseen, run, title: str) -> dict:
    """The numbers of MEASURES."""
    train, asked = records(s)
    model, tokenizer = base(s.model)
    model = learned(model, tokenizer, train, s, run, title)[0]
    said = {measure: answers(model, own, tokenizer) for measure, own in asked.items()}
    show(title, asked, said)

    def share(measure, counts) -> float:
        return 100 * float(np.mean([counts(r, x) for r, x in zip(asked[measure], said[measure])]))

    def as_one_of(names):
        return lambda record, x: x in [done([name], record.context) for name in names]

    return {**{measure: share(measure, data.score) for measure in asked},
            PART: share(NEW, as_one_of(UNSEEN)), OTHER: share(KIND, as_one_of(TAUGHT)),
            LOSS_NEW: loss_of_answers(model, tokenizer, asked[NEW]),
            LOSS_KIND: loss_of_answers(model, tokenizer, asked[KIND])}


def show(title: str, asked: dict[str, list], said: dict[str, list]):
    """Print an answer of each sort."""
    print(f"{title}, the first answers:")
    for measure, own in asked.items():
        record, answer = own[0], said[measure][0]
        print(f"  {measure.removesuffix(', %')}: {record.instruction!r} {record.context!r} -> "
              f"{data.printable(answer)!r}, right: {record.output!r}")


def costs(arm: str, measure: str, beside: str, points: float):
    """Is an arm's measure at most some points below another of its measures?"""
    def judge(rows):
        d = [row[measure] - row[beside] for row in rows if row["arm"] == arm]
        return verdict(d, f"{arm}: {measure} - {beside}", at_least=-points)
    return judge


def above(arm: str, measure: str, points: float):
    """Is an arm's measure above some points?"""
    return lambda rows: single(rows, measure, arm, at_least=points)


def more(measure: str, arm: str, other: str):
    """Has an arm more of a measure than another?"""
    return lambda rows: compared(rows, measure, arm, other, at_least=0)


CLAIMS = {
    **{f"{arm}: a new sentence around learned phrases costs at most 10 points":
       costs(arm, SENTENCE, OWN, 10) for arm in MANY},
    **{f"{arm}: a new phrase for a learned kind costs at most 10 points":
       costs(arm, PHRASE, OWN, 10) for arm in MANY},
    **{f"{arm} does an unseen composition, in 5 % or more": above(arm, NEW, 5) for arm in MANY},
    **{f"{arm}: an unseen composition costs at most 10 points beside a learned one":
       costs(arm, NEW, COMPOSED, 10) for arm in MANY},
    "more kinds help with an unseen composition: k = 9 does more than k = 3":
        more(NEW, "k = 9", "k = 3"),
    **{f"{arm} does an unseen kind, in 5 % or more": above(arm, KIND, 5) for arm in MANY},
    "more kinds help with an unseen kind: k = 9 has a lower loss than k = 3":
        more(LOSS_KIND, "k = 3", "k = 9"),
    "other kinds help with an unseen kind: k = 9 has a lower loss than the base":
        more(LOSS_KIND, "base", "k = 9"),
}
WHY = {
    "a new sentence": "the learned wordings are all the instructions that it has ever read, so it "
                      "cannot know which words of a sentence say nothing. It is above a guess: "
                      "37 % with 6 kinds, 39 % with 9",
    "a new phrase": "that two phrases mean the same would have to come from the base, which has "
                    "read a manual alone. With 3 kinds 34 % is what a guess gives; with 6 and 9 "
                    "kinds 28 and 29 % are more than a sixth and a ninth",
    "an unseen composition": "a learned composition is one more kind to it, not two that it puts "
                             "together. With 9 kinds 61 % of the answers are one part alone; with "
                             "3 kinds there are but four compositions to learn from",
    "does an unseen kind": "no record and no text that it has read says what the phrase means, so "
                           "it does another kind: in 82, 70 and 49 %. The right answer becomes "
                           "likelier with more kinds, from 7.4 nats a token before to 4.1",
}
LIKELY = {claim: why for claim in CLAIMS for what, why in WHY.items()
          if what in claim and "more kinds" not in claim}


def draw(figure, rows):
    """Right answers by the number of kinds that were learned: a dot a seed, a line of means."""
    axes = figure.subplots()
    for measure, color in zip((OWN, SENTENCE, PHRASE, COMPOSED, NEW, KIND), COLORS):
        found = by_arm(rows, measure)
        curve(axes, {k: found.get(f"k = {k}", []) for k in K}, color, measure.removesuffix(", %"))
    axes.set_xticks(K, K)
    axes.set(xlabel="kinds of tasks that were learned", ylabel="answered rightly, %")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=7)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw,
                        LIKELY)
main = program(EXPERIMENT, measured, Unseen)

if __name__ == "__main__":
    command(main)
