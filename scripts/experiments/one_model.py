"""Can one model do what needed a model a task, if all tasks are text to text?

    python scripts/experiments/one_model.py --model runs/pretrain-*/model
    python scripts/experiments/one_model.py --quick          # seconds; the numbers mean nothing
    python scripts/experiments/one_model.py --rates 5e-4 1e-3 2e-3 --seeds 100

Lecture 004 says that T5 "was the first model that enabled multi-task capabilities from a single
model. Previously, needed a specific fine-tuned model per task", and shows figure 1 of Raffel et al.
2020, arXiv:1910.10683: "Every task we consider - including translation, question answering, and
classification - is cast as feeding our model text as input and training it to generate some target
text. This allows us to use the same model, loss function, hyperparameters, etc."

Here are five tasks. Three write letters (upper, sort, last). One is classification, a piece of
prose or of code: the answer is the word "text" or "code". One is regression, the similarity of two
words, written as "3.8". One model learns all of them; or five models, each from the same base,
learn one each. They learn the same records, each four times, so they see the same tokens in all.
The loss is always that of the next token, and the settings are the same. The instruction says which
task it is: the same word is sorted or put in upper case.

A similarity is judged by how far off it is, too, on a scale of 0 to 5; an answer that is no such
number counts as the farther end. As GLUE has it, classes have Matthews' correlation beside the
share that is right, and similarities Pearson's. The bar to pass is one number for all, the best
there is. This is the hardest of the five, and decided how many steps there are: alone, it was not
under the bar after 500. A seed takes about 5 minutes of one core.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from minilm import data
from minilm.command import command
from minilm.data.text_to_text import graded, off
from minilm.experiment import Experiment
from minilm.measure.answers import answers
from minilm.measure.text.agreement import matthews, pearson
from minilm.measure.verdict import by_arm, by_seed, compared, verdict
from minilm.picture import COLORS
from minilm.trial import (
    KEPT,
    KNOWN,
    Trial,
    base,
    kept,
    old_text,
    prepared,
    program,
    share_of,
    taught,
)

QUESTION = "Can one model do what needed a model a task, if all tasks are text to text?"

SLIDE = {}  # the lecture has no number for it
LETTERS, KIND, SIMILARITY = ("upper", "sort", "last"), "kind", "similarity"
TASKS = (*LETTERS, KIND, SIMILARITY)
CORPORA = {"text": "python-reference", "code": "python-source"}  # class -> what it is of
RIGHT = "answered rightly, mean of 5 tasks, %"
OFF, BAR = "similarity, off by", "one number for all, off by"
MATTHEWS, PEARSON = f"{KIND}, Matthews x 100", f"{SIMILARITY}, Pearson x 100"
MEASURES = {RIGHT: 1, **{f"{task}, %": 0 for task in TASKS}, MATTHEWS: 1, PEARSON: 1, OFF: 2,
            BAR: 2, KNOWN: 2, KEPT: 0}


@dataclass(frozen=True)
class Together(Trial):
    """A trial in which one model learns all tasks, or a model each."""

    tasks: tuple[str, ...] = TASKS
    steps: int = 5000
    test: int = 100
    apart: bool = False
    """a model a task"""
    size: int = 32
    """characters of a piece of text or code"""


FULL = {"method": "full", "lr": 1e-3}
BASE, ONE, EACH = "base model", "one model", "a model a task"
ARMS = {BASE: {"steps": 0}, ONE: FULL, EACH: FULL | {"apart": True}}


def records_of(s: Together) -> dict[str, tuple[list, list]]:
    """task -> (to learn from, to be asked)."""
    def pieces(part, count): return data.classified(
        data.make_examples("corpus", part, count, s.size, s.seed), [*CORPORA], "Kind")
    made = {task: data.make_tasks([task], s.train, s.test, s.seed, s.words)
            for task in s.tasks if task != KIND}
    learn, ask = texts(share_of(s))
    made[KIND] = pieces(learn, s.train), pieces(ask, s.test)
    return {task: made[task] for task in s.tasks}


@cache
def texts(share: float) -> tuple[dict, dict]:
    """The documents of both classes, (to learn from, held out)."""
    parts = {kind: data.split(data.load_corpus(name), share) for kind, name in CORPORA.items()}
    return tuple({kind: part[side] for kind, part in parts.items()} for side in (0, 1))


def measured(s: Together, run, title: str) -> dict:
    """The numbers of MEASURES."""
    records, said, known, size = records_of(s), {}, [], 0.0
    groups = [(task,) for task in s.tasks] if s.apart else [s.tasks]
    for group in groups:
        own = replace(s, steps=s.steps // len(groups) or min(1, s.steps))
        model, tokenizer = base(s.model)
        if s.steps:
            model = prepared(model, s)
            learned = [record for task in group for record in records[task][0]]
            batches = data.InstructionBatches(learned, tokenizer, s.batch, None, s.seed, model.room)
            taught(model, batches, own, run.inside("-".join(group)), f"{title}, {', '.join(group)}")
        asked = [record for task in group for record in records[task][1]]
        said |= dict(zip(asked, answers(model, asked, tokenizer)))
        known.append(old_text(model, tokenizer, s))
        size += kept(model, tokenizer, s, run.path / "kept")[KEPT]
    asked = {task: ask for task, (_, ask) in records.items()}
    return {**judged(asked, said), BAR: best_constant(asked[SIMILARITY]),
            KNOWN: float(np.mean(known)), KEPT: size}


def judged(asked: dict, said: dict) -> dict:
    """How right the answers are: asked, task -> records; said, record -> answer."""
    found = {f"{task}, %": 100 * float(np.mean([data.score(record, said[record])
                                                for record in records]))
             for task, records in asked.items()}
    kinds, pairs = asked[KIND], asked[SIMILARITY]
    return {RIGHT: float(np.mean([*found.values()])), **found,
            MATTHEWS: 100 * matthews([said[one] for one in kinds], [one.output for one in kinds]),
            PEARSON: 100 * pearson([graded(one, said[one]) for one in pairs],
                                   [float(one.output) for one in pairs]),
            OFF: float(np.mean([off(one, said[one]) for one in pairs]))}


def best_constant(records) -> float:
    """How far off the best single number is: the median."""
    right = np.array([float(record.output) for record in records])
    return float(np.abs(right - np.median(right)).mean())


def behind(measure: str, points: float):
    """Is one model at most some points behind a model a task?"""
    return lambda rows: compared(rows, measure, ONE, EACH, at_least=-points)


def above_chance(rows):
    """Are classes told better than by one word for all?"""
    return verdict([x for x, in by_seed(rows, f"{KIND}, %", (ONE,))], f"{ONE}: {KIND}, %",
                   at_least=50)


def nearer(rows):
    """Are similarities nearer than one number for all?"""
    d = [a - b for (a,), (b,) in zip(by_seed(rows, OFF, (ONE,)), by_seed(rows, BAR, (ONE,)))]
    return verdict(d, f"{ONE}: {OFF} - {BAR}", at_most=0)


CLAIMS = {
    "one model is at most 4 points behind a model a task, of equal tokens in all": behind(RIGHT, 4),
    "so it is in classification, written as a word": behind(f"{KIND}, %", 4),
    "in regression, written as a number, it is at most 0.2 farther off": lambda rows: compared(
        rows, OFF, ONE, EACH, at_most=0.2),
    "one model tells the classes better than by chance": above_chance,
    "one model's similarities are nearer than one number for all": nearer,
    "one model takes a quarter of the memory, or less": lambda rows: verdict(
        [one / each for one, each in by_seed(rows, KEPT, (ONE, EACH))],
        f"{ONE} / {EACH}: {KEPT}", at_most=0.25),
    **{f"{arm} answers more than 30 points more than the base model, zero-shot":
       lambda rows, arm=arm: compared(rows, RIGHT, arm, BASE, at_least=30) for arm in (ONE, EACH)},
    **{f"{arm} forgets old text": lambda rows, arm=arm: compared(
        rows, KNOWN, arm, BASE, at_least=0) for arm in (ONE, EACH)},
    "one model of many tasks forgets less of the old text than a model of one": lambda rows:
        compared(rows, KNOWN, ONE, EACH, at_most=0),
}
LIKELY = {
    "one model of many tasks forgets less of the old text than a model of one":
        "they see equal tokens in all, so the one model has made 5000 steps away from the base, "
        "and each of the five 1000; that many tasks hold a model back would have to outweigh it",
}


def draw(figure, rows):
    """What is answered rightly, task by task: a bar for the mean of an arm, a dot for each seed."""
    axes, arms = figure.subplots(), (BASE, ONE, EACH)
    for number, (arm, color) in enumerate(zip(arms, COLORS)):
        for i, task in enumerate(TASKS):
            x, found = i + 0.27 * (number - 1), by_arm(rows, f"{task}, %").get(arm, [])
            if found:
                axes.bar(x, np.mean(found), 0.25, color=color, alpha=0.45,
                         label=arm if not i else None)
                axes.plot([x] * len(found), found, "o", color=color, markersize=3,
                          markeredgewidth=0)
    axes.set_xticks(range(len(TASKS)), TASKS)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("answered rightly, %")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw,
                        LIKELY)
main = program(EXPERIMENT, measured, Together)

if __name__ == "__main__":
    command(main)
