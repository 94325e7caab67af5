"""Out of an answer, what was asked: can small changes learn it, and how is it scored?

    python scripts/experiments/reverse_instructions.py --model runs/pretrain-*/model
    python scripts/experiments/reverse_instructions.py --quick    # seconds; numbers mean nothing

Lecture 003 builds "an uno reverse card application": "Given: Response (LLM Output). Predict:
Instruction (Prompt/LLM Input)". Mistral 7B learns it from instructions that were written for other
models, with the two fields swapped, by QLoRA with r = 64 on q and v. Another slide sets "update all
weights" against "update a small representation". There is no number of how well it went. What it
trained is arithmetic: `python scripts/plan_memory.py --lectures`.

Here a small model learns it from records of four tasks, swapped by minilm/data/reversal.py:

    table      a sentence about a restaurant: its name, food and price
    reverse    a word backwards                             one question each has this answer
    upper      a word in capitals; the letters that were asked may be capitals already
    sort       a word's letters in order                    several questions have this answer

No answer that is asked about is among those that are learned from. What the model says is compared
with the question that was asked, to the letter. Where several questions have one answer this
punishes the model for another right question, so there is a second score, the round trip: a forward
model, which has learned to answer questions from the same records, is given what was said, and has
to give the answer. A sentence about a table counts if it is one of the three about that table.

r = 64 is all of this model's width; on Mistral it is a 64th of it, which is r = 1 here. Rates are
those of ranks.py, but for r = 64 on q and v alone. A seed takes about 7 minutes of one core.

The same on records of your own, or on the tasks of finetune.py (table and sql for a model of
`pretrain.py --context 192`):

    python scripts/finetune.py --data mine.jsonl --reverse --method qlora --r 64 --targets q v
    python scripts/finetune.py --data table sql --reverse
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
from tqdm import tqdm

from minilm import data
from minilm.command import command
from minilm.data.tasks import FOODS, NAMES, PRICES
from minilm.experiment import Experiment
from minilm.measure.answers import answers
from minilm.measure.verdict import compared, single, verdict
from minilm.picture import COLORS
from minilm.run import RunDirectory
from minilm.trial import QUICK, TRAINED, Trial, base, learned, low_rank, program

QUESTION = "Can a model learn what was asked, out of an answer?"
SLIDE = {}  # the slide gives no score
TASKS = ("table", "reverse", "upper", "sort")
ONE, SEVERAL = TASKS[:2], TASKS[2:]  # questions that have the same answer
SENTENCES = ("{} serves {} {} food.", "{} is a {} {} restaurant.", "For {1} {2} food, go to {0}.")
SHOWN = 2  # records of each task, of the first seed


@dataclass(frozen=True)
class Reverse(Trial):
    """A trial on swapped records."""

    tasks: tuple[str, ...] = TASKS
    train: int = 1000
    test: int = 60

    OWN: ClassVar = True


FULL = {"method": "full", "lr": 1e-3}
QV = {"targets": ("q", "v")}
RATE = {"lr": 2e-3}  # all layers' 1.2e-3 gave 43 % on a seed of its own, this 60, 3e-3 62
ARMS = {
    "base": {"steps": 0},
    "full": FULL,
    "LoRA, q v, r = 64": low_rank(64) | QV | RATE,
    "QLoRA, q v, r = 64": low_rank(64) | QV | RATE | {"method": "qlora"},
    "QLoRA, q v, r = 1": low_rank(1) | QV | {"method": "qlora"},
}
LORA, CARD, SHARE = [*ARMS][2:]

EXACT, TRIP, FORWARD = "to the letter, %", "round trip, %", "forward model, %"
MEASURES = {EXACT: 1, TRIP: 1, FORWARD: 1, TRAINED: 0,
            **{f"{task}: {measure}": 0 for task in TASKS for measure in (EXACT, TRIP)}}


def gap(task: str, **bounds):
    """How much more the round trip finds right than the letters do, of the slide's arm."""
    def judge(rows):
        d = [row[f"{task}: {TRIP}"] - row[f"{task}: {EXACT}"] for row in rows if row["arm"] == CARD]
        return verdict(d, f"{CARD}, {task}: {TRIP} - {EXACT}", **bounds)
    return judge


def within(points: float, a: str, b: str):
    """Is a at most some points below b?"""
    return lambda rows: compared(rows, TRIP, a, b, at_least=-points)


CLAIMS = {
    "full fine-tuning learns it: 80 % or more make the round trip":
        lambda rows: single(rows, TRIP, "full", at_least=80),
    "QLoRA on q and v, r = 64, learns it: 80 % or more":
        lambda rows: single(rows, TRIP, CARD, at_least=80),
    "before, the model cannot do it: 5 % at most": lambda rows: single(rows, TRIP, "base", None, 5),
    "LoRA is at most 5 points below full fine-tuning": within(5, LORA, "full"),
    "QLoRA is at most 5 points below LoRA": within(5, CARD, LORA),
    "the slide's share of the width, r = 1, is at most 5 points below r = 64":
        within(5, SHARE, CARD),
    **{f"{task}: the letters are as good as the round trip, up to 5 points":
       gap(task, at_least=-5, at_most=5) for task in ONE},
    **{f"{task}: the letters miss 30 points or more of what is right": gap(task, at_least=30)
       for task in SEVERAL},
}
ALONE = ("r = 64 is all of the width, so it is not the rank: what is missing are other matrices "
         "than q and v, or steps. A table misses most (28 and 22 %, full fine-tuning 83)")
LIKELY = {
    "QLoRA on q and v, r = 64, learns it: 80 % or more": ALONE,
    "LoRA is at most 5 points below full fine-tuning": ALONE,
    "the slide's share of the width, r = 1, is at most 5 points below r = 64":
        "a 64th of the width is 27 million numbers of Mistral, and a base that has read much. Here "
        "it is 2,048, and a base that has to learn the tasks, too (0 % before)",
}


def made(task: str, s: Reverse) -> list[data.Record]:
    """Records of a task in random order; of tables all that there are."""
    rng = np.random.default_rng([s.seed, *task.encode()])
    if task == "table":
        rows = [(n, p, f) for n in NAMES for p in PRICES for f in FOODS]
        return [record for i in rng.permutation(len(rows)) for record in tables(rows[i])]
    records = data.make_tasks([task], 2 * (s.train + s.test), 0, s.seed, s.words)[0]
    if task == "upper":
        return [mixed(record, rng) for record in records]
    # a word that is in order backwards would be an answer to Sort, too
    return [r for r in records if task != "reverse" or [*r.output] != sorted(r.output)]


def tables(row: tuple) -> list[data.Record]:
    """Each sentence about a restaurant, with the others as references. They are data.tasks' in
    short: both ways round a record has to fit the model's rows."""
    said = [sentence.format(*row) for sentence in SENTENCES]
    return [data.Record("Describe", " | ".join(row), one, tuple(s for s in said if s != one),
                        task="table") for one in said]


def mixed(record: data.Record, rng) -> data.Record:
    """A word in which each letter may be a capital."""
    word = "".join(c.upper() if rng.random() < 0.5 else c for c in record.context)
    return replace(record, context=word)


def drawn(s: Reverse) -> tuple[list[data.Record], list[data.Record]]:
    """(to learn from, to be asked), not yet swapped. Each answer is asked about once, and none is
    learned from, nor another sentence about its table."""
    train, test = [], []
    for task in s.tasks:
        def key(record, table=task == "table"): return record.context if table else record.output
        records = made(task, s)
        different = [*{key(record): record for record in records}.values()]
        held = data.split_records(different, s.test, None, key)[1]
        keys = {*map(key, held)}
        train += [record for record in records if key(record) not in keys][: s.train]
        test += held
    return train, test


def measured(s: Reverse, run, title: str) -> dict:
    """The numbers of MEASURES."""
    train, test = drawn(s)
    model, tokenizer = base(s.model)
    model, trained, _ = learned(model, tokenizer, [*map(data.swap, train)], s, run, title)
    asked = [*map(data.swap, test)]
    said = answers(model, asked, tokenizer)
    back, knows = round_trip(forward(forwards(s)), tokenizer, test, asked, said)
    hits = {EXACT: [record.output == text for record, text in zip(asked, said)],
            TRIP: [data.score(record, text) for record, text in zip(test, back)]}
    if s.seed == 0:
        show(title, asked, said, back)
    found = {f"{task}: {name}": 100 * float(np.mean([
        right for record, right in zip(test, rights) if record.task == task]))
        for task in s.tasks for name, rights in hits.items()}
    means = {name: float(np.mean([found[f"{task}: {name}"] for task in s.tasks])) for name in hits}
    return found | means | {FORWARD: knows, TRAINED: trained}


def round_trip(model, tokenizer, test, asked, said) -> tuple[list[str], float]:
    """(what the forward model answers to what was said, how much of the true questions it answers
    rightly). Nothing is answered by nothing."""
    questions = [data.question(record, text) for record, text in zip(asked, said)]
    known = iter(answers(model, [q for q in questions if q] + test, tokenizer))
    back = [next(known) if q else "" for q in questions]
    return back, 100 * float(np.mean([data.score(r, text) for r, text in zip(test, known)]))


@lru_cache(maxsize=1)
def forward(s: Reverse):
    """The model that has learned to answer, from the same records."""
    model, tokenizer = base(s.model)
    train = drawn(s)[0]
    with TemporaryDirectory() as folder:
        return learned(model, tokenizer, train, s, RunDirectory(Path(folder)), "forward")[0]


def forwards(s: Reverse) -> Reverse:
    """The settings of the forward model, the same for all arms of a seed."""
    steps = Reverse.steps if s.model else QUICK["steps"]
    return Reverse(**FULL, model=s.model, seed=s.seed, workers=s.workers, batch=s.batch,
                   warmup=s.warmup, train=s.train, test=s.test, steps=steps)


def show(title: str, asked, said, back):
    """Some answers, what the model takes for the question, and what that is answered by."""
    tqdm.write(f"{title}: answer <- what the model says was asked -> what the forward model says")
    for task in dict.fromkeys(record.task for record in asked):
        rows = [row for row in zip(asked, said, back) if row[0].task == task][:SHOWN]
        for record, *texts in rows:
            given, text, answer = (data.printable(t).replace("\n", " ")[:60]
                                   for t in (record.context, *texts))
            tqdm.write(f"    {given} <- {text} -> {answer}")


def draw(figure, rows):
    """A panel a task, a line an arm: both scores, means of the seeds."""
    sides = figure.subplots(1, len(TASKS), sharey=True)
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)][::-1]
    for axes, task in zip(sides, TASKS):
        for measure, color, size in zip((TRIP, EXACT), COLORS, (9, 5)):
            means = [np.mean([row[f"{task}: {measure}"] for row in rows if row["arm"] == arm])
                     for arm in arms]
            axes.plot(means, range(len(arms)), "o", color=color, markersize=size, label=measure)
        axes.set(xlabel=f"{task}, %", xlim=(-5, 105))
        axes.set_yticks(range(len(arms)), arms)
    handles, labels = sides[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw,
                        LIKELY)
main = program(EXPERIMENT, measured, Reverse)

if __name__ == "__main__":
    command(main)
