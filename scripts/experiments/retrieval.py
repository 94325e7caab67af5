"""What retrieval teaches a model, and what tuning does: what to know against how to act.

    python scripts/experiments/retrieval.py --model runs/pretrain-*/model
    python scripts/experiments/retrieval.py --quick    # seconds; the numbers mean nothing

Lecture 003 draws the optimisation flow on two axes. Prompt engineering is where it begins. From
there retrieval (RAG) goes along "what the model needs to know", fine-tuning along "how the model
needs to act", and "all of the above" is at the far corner. There is no number on it.

Here a base model first learns to read: the whole of it is trained to answer questions about some
3000 people from a text that stands between the question and its answer. Then it is asked about
people of whom it has never seen a text. The answer that is wanted is an object of JSON, which it
has never seen, either. So to know is to say the right value in any form, and to act is to answer in
the form that is wanted, whatever the value.

    closed           the question alone
    example          an example of a question and its answer in the form stands before it
    retrieved        the text that BM25 finds, among those of all people
    right, wrong     their own text; somebody else's
    tuned: form      on questions about the first people, with their texts, answered in the form
    tuned: texts     on the texts of the new people in every wording, and on questions about half of
                     them, answered in the form. The other half is asked
    tuned: questions the same, and questions about the asked half, too, but in other words

Each arm shows its answer to one question. A seed takes about 5 minutes of one core.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from textwrap import indent
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from minilm import data
from minilm.command import command
from minilm.data.facts import (
    QUESTIONS,
    TEXTS,
    WORDINGS,
    Fact,
    as_json,
    asked,
    is_json,
    make_facts,
    plain,
    says,
)
from minilm.data.retrieval import BM25
from minilm.experiment import Experiment
from minilm.files import remove
from minilm.measure.answers import answers
from minilm.measure.verdict import by_arm, compared, single
from minilm.picture import COLORS
from minilm.ranges import one_of, whole
from minilm.run import RunDirectory
from minilm.trial import QUICK, Trial, base, prepared, program, taught

QUESTION = "What does retrieval teach a model, and what does tuning?"
SLIDE = {}  # a drawing without numbers


@dataclass(frozen=True)
class Reading(Trial):
    """A trial on made-up facts."""

    tasks: tuple[str, ...] = ("facts",)
    train: int = 3000
    """people to learn to read from"""
    test: int = 24
    """other people who are asked about, and as many whom a tuned model may be told about"""
    reading: int = 1500
    """updates in which it learns to read"""
    shown: Literal["nothing", "example", "retrieved", "right", "wrong"] = "nothing"
    """what stands beside a question"""
    tuned: Literal["nothing", "form", "texts", "questions"] = "nothing"
    """what it is tuned on after it has learned to read"""

    RANGES: ClassVar = Trial.RANGES | {
        "reading": whole(1), "shown": one_of("nothing", "example", "retrieved", "right", "wrong"),
        "tuned": one_of("nothing", "form", "texts", "questions")}


READER = Reading(method="full", lr=2e-3, batch=16)
NOT = {"steps": 0}
ON_FORM = {"tuned": "form", "method": "full", "lr": 1e-3, "steps": 300}
ON_TEXTS = {"tuned": "texts", "method": "full", "lr": 1e-3, "steps": 1000}
ON_QUESTIONS = ON_TEXTS | {"tuned": "questions"}
RETRIEVED = {"shown": "retrieved"}

ARMS = {
    "closed": NOT,
    "example": NOT | {"shown": "example"},
    "retrieved": NOT | RETRIEVED,
    "right text": NOT | {"shown": "right"},
    "wrong text": NOT | {"shown": "wrong"},
    "tuned: form": ON_FORM,
    "tuned: texts": ON_TEXTS,
    "tuned: questions": ON_QUESTIONS,
    "tuned: form, retrieved": ON_FORM | RETRIEVED,
    "tuned: questions, retrieved": ON_QUESTIONS | RETRIEVED,
}
ALL = "tuned: form, retrieved"
DRAWN = ("closed", "example", "retrieved", "tuned: form", "tuned: questions", ALL,
         "tuned: questions, retrieved")

KNOWS, ACTS, BOTH = "knows, %", "acts, %", "both, %"
FOUND, SHOWN = "its own text is shown, %", "says what the shown text says, %"
OF = {what: f"knows: {what}, %" for what in QUESTIONS}  # a trade can be guessed, one out of 16
MEASURES = dict.fromkeys((KNOWS, ACTS, BOTH, *OF.values(), FOUND, SHOWN), 1)


def more(measure: str, a: str, b: str, points: float = 0):
    """Has arm a more of it than b, or at most some points less?"""
    return lambda rows: compared(rows, measure, a, b, at_least=-points)


def most(measure: str, arm: str, percent: float):
    """Has the arm at least so much of it?"""
    return lambda rows: single(rows, measure, arm, at_least=percent)


def few(measure: str, arm: str, percent: float):
    """Has the arm at most so much of it?"""
    return lambda rows: single(rows, measure, arm, at_most=percent)


CLAIMS = {
    "to know: a retrieved text gives most answers": most(KNOWS, "retrieved", 50),
    "to know: a retrieved text gives more than tuning on the texts":
        more(KNOWS, "retrieved", "tuned: texts"),
    "to know: a retrieved text gives more than tuning on the questions, too":
        more(KNOWS, "retrieved", "tuned: questions"),
    "to know: tuning on the form gives at most 10 %": few(KNOWS, "tuned: form", 10),
    "to act: tuning on the form gives it in 90 % or more": most(ACTS, "tuned: form", 90),
    "to act: a retrieved text gives it in at most 5 %": few(ACTS, "retrieved", 5),
    "to act: an example in the prompt gives it in most answers": most(ACTS, "example", 50),
    "both: retrieval and tuning give more than retrieval": more(BOTH, ALL, "retrieved"),
    "both: retrieval and tuning give more than tuning": more(BOTH, ALL, "tuned: questions"),
    "both: tuning on the form takes at most 5 points of what retrieval gives to know":
        more(KNOWS, ALL, "retrieved", 5),
    "both: tuning on facts takes at most 5 points of what retrieval gives to know":
        more(KNOWS, "tuned: questions, retrieved", "retrieved", 5),
    "BM25 finds the right text in 95 % or more": most(FOUND, "retrieved", 95),
    "with the right text 90 % or more are right": most(KNOWS, "right text", 90),
    "with a wrong text at most 10 % are right": few(KNOWS, "wrong text", 10),
}


class Asked(NamedTuple):
    """A question, whom it is about, and whose text stands beside it."""

    record: data.Record
    fact: Fact
    shown: Fact | None


def measured(s: Reading, run, title: str) -> dict:
    """The numbers of MEASURES. The first question is printed with its answer."""
    found = {name: [] for name in MEASURES}
    model, tokenizer = tuned(replace(s, shown="nothing"), run.path.parent)
    questions = asked_of(s)
    records = [q.record for q in questions]
    answered = answers(model, records, tokenizer)
    first = f"{data.prompt(records[0])}{answered[0]}\n(wanted: {records[0].output})"
    print(f"{title}:\n{indent(first, '    ')}")
    for q, said in zip(questions, answered):
        what = q.record.task
        knows, acts = says(getattr(q.fact, what), said), is_json(what, said)
        repeats = q.shown is not None and says(getattr(q.shown, what), said)
        for name, so in {KNOWS: knows, ACTS: acts, BOTH: knows and acts, OF[what]: knows,
                         FOUND: q.shown == q.fact, SHOWN: repeats}.items():
            found[name].append(100 * so)
    return {name: float(np.mean(numbers)) for name, numbers in found.items()}


def people(s: Reading) -> tuple[list[Fact], list[Fact], list[Fact]]:
    """Those to learn to read from; of the new ones, those to be told about and those to be asked
    about."""
    others, new = make_facts(s.train, 2 * s.test, s.seed)
    return others, new[: s.test], new[s.test :]


def asked_of(s: Reading) -> list[Asked]:
    """The questions, in words in which no tuned model was told about these people."""
    others, told, new = people(s)
    everybody, rng = [*others, *told, *new], np.random.default_rng([s.seed, 1])
    texts = [fact.text(rng.integers(len(TEXTS))) for fact in everybody]
    index, found = BM25(texts), []
    for fact in new:
        for what in QUESTIONS:
            q = asked(fact, what, WORDINGS - 1, form=as_json)
            if s.shown == "example":
                example = asked(others[0], what, form=as_json)
                before = f"{data.prompt(example)}{example.output}\n"
                q = replace(q, instruction=before + q.instruction)
            place = beside(s.shown, everybody.index(fact), index, q.instruction)
            found.append(Asked(q, fact, None) if place is None else Asked(
                replace(q, context=texts[place]), fact, everybody[place]))
    return found


def beside(shown: str, own: int, index: BM25, question: str) -> int | None:
    """The number of the text that stands beside a question about the person of number `own`."""
    if shown == "retrieved":
        return index.best(question)[0]
    return {"right": own, "wrong": own - 1}.get(shown)


@lru_cache(maxsize=1)
def reader(s: Reading, folder: Path):
    """(the base model after it has learned to answer from a text, its tokenizer)."""
    model, tokenizer = base(s.model)
    records = about(people(s)[0], [s.seed, 2])
    return learned(model, rows_of(records, tokenizer), s, folder / f"reader-{s.seed}"), tokenizer


@lru_cache(maxsize=8)  # the tunings of a seed, of which several arms ask the same model
def tuned(s: Reading, folder: Path):
    """(the reader after it was tuned, its tokenizer)."""
    same = {name: getattr(s, name)
            for name in ("model", "seed", "train", "test", "workers", "save_every")}
    small = {} if s.model else QUICK
    read, tokenizer = reader(replace(READER, **same | {"steps": s.reading} | small), folder)
    if s.tuned == "nothing":
        return read, tokenizer
    model, _ = base(s.model)
    model.load_state_dict(read.state_dict())
    rows = rows_to_tune_on(s, tokenizer)
    return learned(prepared(model, s), rows, s, folder / f"{s.tuned}-{s.seed}"), tokenizer


def rows_to_tune_on(s: Reading, tokenizer) -> list:
    """Questions with answers in the form that is wanted, and texts of the new people."""
    others, told, new = people(s)
    if s.tuned == "form":
        return rows_of(about(others, [s.seed, 3], as_json), tokenizer)
    whom = told if s.tuned == "texts" else told + new
    records = [asked(fact, what, wording, form=as_json)
               for fact in whom for what in QUESTIONS for wording in range(WORDINGS - 1)]
    texts = [np.array([*tokenizer.prompt(fact.text(i)), tokenizer.end], np.int32)
             for fact in told + new for i in range(len(TEXTS))]
    return rows_of(records, tokenizer) + [(ids[:-1], ids[1:]) for ids in texts]


def about(facts: list[Fact], seed: list[int], form: Callable = plain) -> list[data.Record]:
    """A question about each part of each fact beside its text, in words that are drawn."""
    rng = np.random.default_rng(seed)
    return [asked(fact, what, rng.integers(WORDINGS), fact.text(rng.integers(len(TEXTS))), form)
            for fact in facts for what in QUESTIONS]


def rows_of(records, tokenizer) -> list:
    """Tokens and targets of each."""
    return data.InstructionBatches(records, tokenizer, 1, None, 0).rows


def learned(model, rows, s: Reading, folder: Path):
    """The model after it has learned the rows. Checkpoints are in the folder meanwhile."""
    folder.mkdir(exist_ok=True)
    batches = data.RowBatches(rows, s.batch, None, s.seed)
    taught(model, batches, s, RunDirectory(folder), folder.name)
    remove(folder)
    return model


def draw(figure, rows):
    """The slide's plane: how it acts against what it knows; means of seeds."""
    axes, acts, knows = figure.subplots(), by_arm(rows, ACTS), by_arm(rows, KNOWS)
    for i, (arm, color) in enumerate(zip(DRAWN, COLORS)):
        if arm in acts:  # those that lie on one another show as rings
            axes.plot(np.mean(acts[arm]), np.mean(knows[arm]), "o", markersize=15 - 2 * i,
                      markerfacecolor="none", markeredgewidth=2, color=color, label=arm)
    axes.set(xlim=(-8, 108), ylim=(-8, 108), xlabel="how to act: answers in the form, %",
             ylabel="what to know: right values, %")
    if {*acts} & {*DRAWN}:
        figure.legend(loc="outside upper center", ncols=3, markerscale=0.6, frameon=False,
                      fontsize=7, columnspacing=1, handletextpad=0.3)


LIKELY = {
    "to act: an example in the prompt gives it in most answers":
        "so small a model has to learn to follow examples first: see in_context.py",
    "both: tuning on facts takes at most 5 points of what retrieval gives to know":
        "its questions stand without a text while it is tuned, and it forgets how to read one: "
        "with the right text there it says what that says in 13 %, before the tuning in all",
}
EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured, Reading)

if __name__ == "__main__":
    command(main)
