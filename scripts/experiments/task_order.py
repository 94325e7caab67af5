"""Does a model forget the tasks that it has learned, one after another or mixed?

    python scripts/experiments/task_order.py --model runs/pretrain-*/model
    python scripts/experiments/task_order.py --quick          # seconds; the numbers mean nothing

Lecture 001 says that a model which learns new tasks "loses its ability to perform previously
learned tasks", and that multi-task fine-tuning mitigates that. It also says that methods which
train few parameters are "less prone to catastrophic forgetting since the original model weights are
kept the same". Lecture 004 says of single-task fine-tuning: "Possibility for catastrophic
forgetting (aka alignment tax). This may not be a bad thing!"

Here a model learns four tasks, each in a stage of its own, or all of them mixed, in as many steps.
With "a fifth of earlier tasks" a fifth of a stage's rows are of tasks that came before. After each
quarter of the steps all tasks are asked, which gives a matrix: stages down, tasks across. What is
forgotten is the highest earlier score less the final one (minilm/measure/forgetting.py). The order
turns with the seed, so that no task is always last. Each stage has its own warmup and its own
falling rate, as if nobody had known of the next. A seed takes about 5 minutes of one core.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from minilm import data
from minilm.command import command
from minilm.data.replay import most_old
from minilm.experiment import Experiment
from minilm.measure.forgetting import average, backward_transfer, forgetting
from minilm.measure.verdict import by_seed, compared, single, verdict
from minilm.ranges import BELOW_1
from minilm.trial import KNOWN, Trial, base, low_rank, old_text, prepared, program, taught
from minilm.trial import right as scores_of

QUESTION = "Does a model forget the tasks that it has learned, one after another or mixed?"

SLIDE = {}  # the lectures have no number for it
ALL, FORGOTTEN = "all tasks at the end, %", "forgotten, points"
TRANSFER, LEARNED = "backward transfer, points", "right after its stage, %"
MEASURES = {ALL: 1, FORGOTTEN: 1, TRANSFER: 1, LEARNED: 1, KNOWN: 2}
MATRIX, ORDER = "matrix", "order"  # of a row, for the picture


@dataclass(frozen=True)
class Ordered(Trial):
    """A trial that learns its tasks in stages, or mixed."""

    steps: int = 1600
    warmup: int = 50
    test: int = 60
    mixed: bool = False
    """learn all tasks at once"""
    earlier: float = 0.0
    """share of a stage's rows that are of earlier tasks"""

    RANGES: ClassVar = Trial.RANGES | {"earlier": BELOW_1}


FULL = {"method": "full", "lr": 1e-3}
TURN, FIFTH, MIXED = "in turn", "in turn, a fifth of earlier tasks", "mixed"
ARMS = {TURN: FULL, FIFTH: FULL | {"earlier": 0.2}, MIXED: FULL | {"mixed": True},
        f"LoRA, {TURN}": low_rank(8), f"LoRA, {MIXED}": low_rank(8) | {"mixed": True}}


def order_of(s: Ordered) -> tuple[str, ...]:
    """The tasks, turned by the seed."""
    first = s.seed % len(s.tasks)
    return s.tasks[first:] + s.tasks[:first]


def measured(s: Ordered, run, title: str) -> dict:
    """The numbers of MEASURES, the order of the tasks and the matrix."""
    order, (model, tokenizer) = order_of(s), base(s.model)
    model = prepared(model, s)
    records = {task: data.make_tasks([task], s.train, s.test, s.seed, s.words) for task in order}

    def asked(model) -> list[float]:
        found = scores_of(model, tokenizer, [r for _, test in records.values() for r in test])
        return [found[f"{task}, %"] for task in order]

    def batches(tasks, size):
        learned = [record for task in tasks for record in records[task][0]]
        return data.InstructionBatches(learned, tokenizer, size, None, s.seed, model.room)

    learn = all_at_once if s.mixed else one_by_one
    R = learn(model, order, batches, asked, s, run, title)
    return {ALL: average(R), FORGOTTEN: forgetting(R), TRANSFER: backward_transfer(R),
            LEARNED: float(np.diagonal(R).mean()), KNOWN: old_text(model, tokenizer, s),
            ORDER: list(order), MATRIX: R}


def one_by_one(model, order, batches, asked, s: Ordered, run, title: str) -> list[list[float]]:
    """The scores after each stage, if a stage is a task."""
    R = []
    for n, task in enumerate(order):
        stage, new = replace(s, steps=max(1, s.steps // len(order))), batches([task], s.batch)
        if s.earlier and n:
            old = batches(order[:n], most_old(s.batch, s.earlier))
            new = data.Replay(new, old, s.earlier, s.seed)
        taught(model, new, stage, run.inside(task), f"{title}, {task}")
        R.append(asked(model))
    return R


def all_at_once(model, order, batches, asked, s: Ordered, run, title: str) -> list[list[float]]:
    """The scores after each n-th of the steps, if all tasks are learned at once."""
    stage = max(1, s.steps // len(order))

    def watch(trainer, done):
        if done.targets and done.step % stage == 0:
            run.log(step=done.step, right=dict(zip(order, asked(trainer.model))))

    taught(model, batches(order, s.batch), s, run, title, watch)
    R = {record["step"]: record["right"] for record in run.records()}
    return [[*R[step].values()] for step in sorted(R)][: len(order)]


CLAIMS = {
    "tasks that are learned in turn are forgotten":
        lambda rows: single(rows, FORGOTTEN, TURN, at_least=0),
    "mixed tasks are forgotten less": lambda rows: compared(
        rows, FORGOTTEN, MIXED, TURN, at_most=0),
    "the model that learned mixed tasks does more of them at the end": lambda rows: compared(
        rows, ALL, MIXED, TURN, at_least=0),
    "a fifth of earlier tasks takes away more than half of the forgetting": lambda rows: verdict(
        [some - none / 2 for some, none in by_seed(rows, FORGOTTEN, (FIFTH, TURN))],
        f"{FIFTH} - half of {TURN}: {FORGOTTEN}", at_most=0),
    "a task alone is learned as well as among others, within 4 points": lambda rows: verdict(
        [alone - among for (alone, _), (_, among) in zip(
            by_seed(rows, LEARNED, (TURN, MIXED)), by_seed(rows, ALL, (TURN, MIXED)))],
        f"{TURN}, {LEARNED} - {MIXED}, {ALL}", at_least=-4),
    "LoRA, too, forgets tasks that are learned in turn":
        lambda rows: single(rows, FORGOTTEN, f"LoRA, {TURN}", at_least=0),
    "LoRA is less prone to forget tasks than full fine-tuning": lambda rows: compared(
        rows, FORGOTTEN, f"LoRA, {TURN}", TURN, at_most=0),
    "LoRA is less prone to forget old text than full fine-tuning": lambda rows: compared(
        rows, KNOWN, f"LoRA, {TURN}", TURN, at_most=0),
    "mixed tasks leave more of the old text than tasks in turn": lambda rows: compared(
        rows, KNOWN, MIXED, TURN, at_most=0),
}


def draw(figure, rows):
    """The matrix of each way of full fine-tuning: a task a line, in the order of learning."""
    arms = [arm for arm in (TURN, FIFTH, MIXED) if any(row["arm"] == arm for row in rows)]
    for axes, arm in zip(np.atleast_1d(figure.subplots(1, len(arms))) if arms else (), arms):
        R = np.mean([row[MATRIX] for row in rows if row["arm"] == arm], axis=0)
        places, stages = np.arange(len(R)) + 0.5, range(1, len(R) + 1)
        axes.pcolormesh(R, cmap="Blues", vmin=0, vmax=100)  # shapes: a page takes no pixels
        for i, j in np.ndindex(R.shape):
            axes.text(j + 0.5, i + 0.5, f"{R[i, j]:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if R[i, j] > 60 else "black")
        axes.set_xticks(places, stages)
        axes.set_yticks(places, stages)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.grid(visible=False)
        axes.set_title(arm.replace(", a", ",\na"), fontsize=8)
        axes.set_xlabel("task", fontsize=8)
    if arms:
        figure.axes[0].set_ylabel("after stage", fontsize=8)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured, Ordered)

if __name__ == "__main__":
    command(main)
