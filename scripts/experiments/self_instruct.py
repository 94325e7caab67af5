"""Can a model write the records that another one learns from, and what is lost?

    python scripts/experiments/self_instruct.py --model runs/pretrain-*/model
    python scripts/experiments/self_instruct.py --quick    # seconds; the numbers mean nothing

Lecture 004 calls it imitation learning: Alpaca, Vicuna, GPT4All, WizardLM and Orca learn from what
another model has written; Alpaca used self-instruct. Wang et al. 2022, arXiv:2212.10560, let a
model write instructions and answers, drop bad ones by a rule, and tune the model on the rest.

Here the teacher learns to answer 1000 records of three kinds of tasks on words, in 12 wordings.
A copy of the base learns to write such records, and writes 3000 texts, sampled at temperature 1.
The teacher answers what they ask, sampled too. The rule of minilm/data/selfmade.py keeps what is
readable, new, and answered alike when the teacher is asked once more for its likeliest answer;
texts about the words of the questions are left out before. Each arm is the same base, tuned on

    teacher           the 1000 records
    student           what the rule has kept
    student, no rule  as many readable texts, as they were answered first
    student and seeds what the rule has kept, and the 1000 records, as in Self-Instruct
    gold              as many records as were kept, with right answers: the gap to them is what
                      imitation loses

and is asked the same held-out records. The texts stay in the run's folder, written-SEED.json. A
seed takes about 7 minutes of one core.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from minilm import data
from minilm.command import command
from minilm.data.selfmade import agreed, new, read, rows_to_write, text_of
from minilm.data.wordings import distinct_words, done, meaning, worded
from minilm.experiment import Experiment
from minilm.files import read_json, write_json
from minilm.generate import generate
from minilm.measure.answers import ROWS, answers
from minilm.measure.verdict import by_arm, compared, single
from minilm.picture import COLORS, bars
from minilm.ranges import one_of, whole
from minilm.trial import (
    RIGHT,
    Trial,
    base,
    learned,
    loss_of_answers,
    prepared,
    program,
    right,
    taught,
)

QUESTION = "Can a model write the records that another one learns from, and what is lost?"

SLIDE = {}  # the lecture gives sizes of datasets, and no scores
KINDS = ("reverse", "upper", "sort")
LOSS, COUNT = "loss of answers, nats a token", "records"
TRUE, SHARE = "right among its records, %", "texts that the rule keeps, %"
MEASURES = {RIGHT: 1, LOSS: 3, COUNT: 0, TRUE: 1, SHARE: 1}


@dataclass(frozen=True)
class Imitation(Trial):
    """A trial on right records, or on those that a model has written."""

    source: Literal["teacher", "kept", "readable", "both", "gold"] = "teacher"
    """what is learned from"""
    steps: int = 1200
    n: int = 1000
    """records that the teacher learns from"""
    texts: int = 3000
    """what it writes"""
    test: int = 60
    """words that each kind is asked about"""

    RANGES: ClassVar = Trial.RANGES | {"n": whole(1), "texts": whole(1), "source": one_of(
        "teacher", "kept", "readable", "both", "gold")}


FULL = {"method": "full", "lr": 1e-3}
TEACHER, STUDENT, NO_RULE, GOLD = "teacher", "student", "student, no rule", "gold"
BOTH = "student and seeds"
ARMS = {arm: FULL | {"source": source} for arm, source in {
    TEACHER: "teacher", STUDENT: "kept", NO_RULE: "readable", BOTH: "both", GOLD: "gold"}.items()}


def better(a: str, b: str, measure: str = RIGHT, points: float = 0):
    """Is a's number more than some points above b's?"""
    return lambda rows: compared(rows, measure, a, b, at_least=points)


CLAIMS = {
    "imitation: the student is at most 5 points below its teacher":
        better(STUDENT, TEACHER, points=-5),
    "self-instruct: the student is better than its teacher": better(STUDENT, TEACHER),
    "self-instruct: what the model has written helps beside its seeds": better(BOTH, TEACHER),
    "imitation loses something: as many gold records are better": better(GOLD, STUDENT),
    "the rule keeps records that are right more often": better(STUDENT, NO_RULE, TRUE),
    "the rule makes a better student": better(STUDENT, NO_RULE),
    "gold records teach the tasks: 50 % or more":
        lambda rows: single(rows, RIGHT, GOLD, at_least=50),
}


def gold(s: Imitation) -> tuple[list, list, list[str]]:
    """(right records to learn from, those that are asked, and the words that these are about).

    The teacher learns from the first n of them.
    """
    words, rng = distinct_words(2000 + s.test, s.words, s.seed), np.random.default_rng([s.seed, 5])
    ask, learn = words[: s.test], words[s.test :]
    train = [worded([KINDS[(i + i // len(learn)) % len(KINDS)]], learn[i % len(learn)], rng)
             for i in range(max(s.n, s.texts))]
    return train, [worded([kind], word, rng) for kind in KINDS for word in ask], ask


def writer(seeds: list, s: Imitation, run, title: str):
    """A model that has learned to write the records.

    It is not the teacher: one that learned both answered a third rightly in twice the steps.
    """
    model, tokenizer = base(s.model)
    model = prepared(model, s)
    batches = data.RowBatches(rows_to_write(seeds, tokenizer), s.batch, None, s.seed)
    return taught(model, batches, s, run, title)[0]


def written(model, tokenizer, seeds: list, s: Imitation) -> list[str]:
    """What the writer writes if nothing is asked; a text that does not end is empty."""
    longest, found = max(len(tokenizer.encode(text_of(record))) for record in seeds) + 1, []
    while len(found) < s.texts:
        rows = min(ROWS, s.texts - len(found))
        begun = np.full((rows, 1), tokenizer.end)
        drawn = generate(model, begun, longest, seed=[s.seed, len(found)], eos=tokenizer.end)
        for ids in drawn[:, 1:]:
            end = np.flatnonzero(ids == tokenizer.end)
            found.append(tokenizer.decode(ids[: end[0]]) if len(end) else "")
    return found


def texts_and_answers(seeds: list, s: Imitation, run, title: str, model=None) -> list[dict]:
    """What was written, with the teacher's answer, and what it answers once more.

    It is made once in a run, by the arm that is first.
    """
    file = run.path.parent / f"written-{s.seed}.json"
    if file.exists():
        return read_json(file)
    def own(name):
        return run.inside(name), f"{title}, {name}"

    start, tokenizer = base(s.model)
    model = model or learned(start, tokenizer, seeds, s, *own("teacher"))[0]
    texts = written(writer(seeds, s, *own("writer")), tokenizer, seeds, s)
    asked = [record for text in texts if (record := read(text))]
    first, again = (iter(answers(model, asked, tokenizer, *how) if asked else ())
                    for how in ((1.0, s.seed), ()))
    found = [{"text": data.prompt(record) + next(first), "again": next(again)}
             if (record := read(text)) else {"text": text, "again": ""} for text in texts]
    write_json(file, found)
    return found


def sifted(found: list[dict], seeds: list, ask: list[str]) -> tuple[list, list]:
    """(the readable records, those that the rule keeps). None is about a word that is asked."""
    pairs = [(record, pair["again"]) for pair in found if (record := read(pair["text"]))]
    readable = [(record, again) for record, again in pairs if record.context not in {*ask}]
    fresh = {id(record) for record in new([record for record, _ in readable], seeds)}
    novel = [(record, again) for record, again in readable if id(record) in fresh]
    kept = agreed(*zip(*novel)) if novel else []
    print(f"  of {len(found)} texts {len(pairs)} are readable, {len(readable)} of them about other "
          f"words than are asked, {len(novel)} of them new, {len(kept)} of them agreed")
    return [record for record, _ in readable], kept


def measured(s: Imitation, run, title: str) -> dict:
    """The numbers of MEASURES."""
    train, test, ask = gold(s)
    seeds = train[: s.n]
    model, tokenizer = base(s.model)
    if taught_by_seeds := s.source == "teacher":
        model = learned(model, tokenizer, seeds, s, run, title)[0]
    found = texts_and_answers(seeds, s, run, title, model if taught_by_seeds else None)
    readable, kept = sifted(found, seeds, ask)
    chosen = {"teacher": seeds, "kept": kept, "readable": readable[: len(kept)],
              "both": seeds + kept, "gold": train[: len(kept)]}[s.source]
    if not taught_by_seeds and chosen:
        model = learned(model, tokenizer, chosen, s, run, title)[0]
    return {RIGHT: right(model, tokenizer, test)[RIGHT],
            LOSS: loss_of_answers(model, tokenizer, test), COUNT: len(chosen),
            TRUE: 100 * float(np.mean([is_right(r) for r in chosen] or [0.0])),
            SHARE: 100 * len(kept) / len(found)}


def is_right(record: data.Record) -> bool:
    """Does the output do what the instruction asks for? False if that is nothing known."""
    names = meaning(record.instruction)
    return names is not None and done(names, record.context) == record.output


def draw(figure, rows):
    """What is right: of the answers of each arm, and of the records that it has learned from."""
    for axes, measure, color in zip(figure.subplots(1, 2, sharey=True), (RIGHT, TRUE), COLORS):
        found = by_arm(rows, measure)
        bars(axes, {arm: found[arm] for arm in ARMS if arm in found}, lambda arm: color)
        axes.set(xlabel=measure)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured, Imitation)

if __name__ == "__main__":
    command(main)
