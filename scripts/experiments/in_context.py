"""Can a model learn a task from its prompt alone, and what is left of that afterwards?

    python scripts/experiments/in_context.py --model runs/pretrain-*/model
    python scripts/experiments/in_context.py --quick    # seconds; the numbers mean nothing
    python scripts/experiments/in_context.py --rates 1e-3 2e-3 4e-3 --arms "in context" --seeds 9

Lecture 001 says of in-context learning that "the model is shown task demonstrations as part of the
prompt", that there is "no change in model parameters", and that it is "ephemeral". Fine-tuning
changes the parameters, and "leads to a new model". Lecture 003 adds that fine-tuning "results in
huge performance gains when compared to [off-the-shelf LLMs, zero-shot]".

The tasks are those of minilm/data/shots.py: what is to be done with a word of three letters. No
prompt names it, so without a demonstration one can only guess. The words that are asked are held
out, and the demonstrations in front of them are of another task for each question.

    base         the pretrained model as it is
    in context   has learned from rows of demonstrations, each of a task of its own
    fine-tuned   a new model for one task of each kind, that has seen no demonstrations

A fifth of the rows of "in context" is old text, which is lost otherwise. Each arm is asked with k
= 0 to 5 demonstrations, then with none again. Beside it stands who has read them as well as one can
(minilm/measure/ideal.py). "One task" is the one that the fine-tuned model knows.

Then each word gets the demonstrations of another question in front: if the task decides, the answer
changes. "Parameters changed" are those that differ after all questions from what they were before,
and for the fine-tuned models from the base; result.json has the SHA-256 of both. A seed takes about
five minutes of one core.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import ClassVar

import numpy as np

from minilm import data
from minilm.command import command
from minilm.data.replay import most_old
from minilm.data.shots import (
    KINDS,
    SHOTS,
    Question,
    ShotBatches,
    draw_task,
    make_questions,
    prompt_of,
    rows_of_questions,
)
from minilm.experiment import Experiment
from minilm.measure.answers import written
from minilm.measure.ideal import ideal
from minilm.measure.losses import loss_of
from minilm.measure.verdict import compared, single, verdict
from minilm.picture import COLORS
from minilm.ranges import BELOW_1
from minilm.trial import Trial, base, old_text, prepared, program, share_of, taught

QUESTION = "Can a model learn a task from its prompt alone, and what is left of that afterwards?"
SLIDE = {}  # the slides give no numbers


@dataclass(frozen=True)
class InContext(Trial):
    """A trial on demonstrations, or on one task of each kind."""

    method: str = "full"
    alone: bool = False
    """learn one task of each kind, in a model of its own, without demonstrations"""
    replay: float = 0.0
    """share of the rows that are old text, beside the others"""
    test: int = 100
    """questions of each kind"""

    RANGES: ClassVar = Trial.RANGES | {"replay": BELOW_1}


ARMS = {
    "base": {"steps": 0},
    "in context": {"batch": 26, "replay": 6 / 32, "steps": 1800, "lr": 3e-3},
    "fine-tuned": {"alone": True, "batch": 32, "steps": 200, "lr": 1e-3},
}
BASE, SHOWN, TUNED = ARMS

RIGHT = [f"right, k = {k}, %" for k in range(SHOTS + 1)]
AGAIN = "right, k = 0 again, %"
SHORT = f"short of the ideal, k = {SHOTS}, points"
OF_KIND = {kind: [f"{kind}, k = {k}, %" for k in range(SHOTS + 1)] for kind in KINDS}
ONE = {k: f"one task, k = {k}, %" for k in (0, SHOTS)}
TWO, OTHER = "right in two contexts, %", "another answer in another, %"
LOSS = {k: f"loss of answers, k = {k}, nats a token" for k in (0, SHOTS)}
CHANGED, KNOWN = "parameters changed, %", "old text, bits a byte"
MEASURES = {**dict.fromkeys(RIGHT, 1), AGAIN: 1, SHORT: 1,
            **{OF_KIND[kind][k]: 1 for kind in KINDS for k in (1, SHOTS)},
            **dict.fromkeys(ONE.values(), 1), TWO: 1, OTHER: 1, **dict.fromkeys(LOSS.values(), 2),
            CHANGED: 3, KNOWN: 2}
CURVE, IDEAL = "by demonstrations", "ideal by demonstrations"  # for the picture: kind -> numbers


def rise(arm: str, before: str, after: str, at_least: float | None = 0,
         at_most: float | None = None):
    """Does an arm's second number lie so far above its first one?"""
    def judge(rows):
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["seed"])
        return verdict([row[after] - row[before] for row in own], f"{arm}: {after} - {before}",
                       at_least, at_most)
    return judge


CLAIMS = {
    f"{SHOTS} demonstrations improve the answers of a model that has learned from such rows by 5 "
    "points": rise(SHOWN, RIGHT[0], RIGHT[SHOTS], 5),
    f"{SHOTS} demonstrations improve the answers of the base by 5 points":
        rise(BASE, RIGHT[0], RIGHT[SHOTS], 5),
    f"{SHOTS} demonstrations make the right answers likelier to the base":
        rise(BASE, LOSS[SHOTS], LOSS[0]),
    "one demonstration is better than none": rise(SHOWN, RIGHT[0], RIGHT[1]),
    f"more demonstrations help: {SHOTS} against 1": rise(SHOWN, RIGHT[1], RIGHT[SHOTS]),
    **{f"more demonstrations help with {kind}: {SHOTS} against 1":
       rise(SHOWN, OF_KIND[kind][1], OF_KIND[kind][SHOTS]) for kind in ("letter", "shift", "map")},
    f"one demonstration tells all of upper: {SHOTS} are within 5 points of 1":
        rise(SHOWN, OF_KIND["upper"][1], OF_KIND["upper"][SHOTS], -5, 5),
    f"after {SHOTS} demonstrations it is within 20 points of what can be told":
        lambda rows: single(rows, SHORT, SHOWN, at_most=20),
    "no parameter changes while the model learns from a prompt":
        lambda rows: single(rows, CHANGED, SHOWN, at_most=1e-6),
    "fine-tuning leads to a new model: it changes more than 90 % of the parameters":
        lambda rows: single(rows, CHANGED, TUNED, at_least=90),
    "ephemeral: without demonstrations the model answers as it did before them":
        rise(SHOWN, RIGHT[0], AGAIN, -0.01, 0.01),
    f"ephemeral: 5 points or more of what {SHOTS} demonstrations gave are lost without them":
        rise(SHOWN, AGAIN, RIGHT[SHOTS], 5),
    "the same question gets another answer in another context, in more than half":
        lambda rows: single(rows, OTHER, SHOWN, at_least=50),
    "more answers are right in two contexts than those of fine-tuned models, by 10 points":
        lambda rows: compared(rows, TWO, SHOWN, TUNED, at_least=10),
    "fine-tuning is a huge gain over the base, zero-shot: 50 points or more":
        lambda rows: compared(rows, ONE[0], TUNED, BASE, at_least=50),
    "so it is over the model that learns from demonstrations, zero-shot":
        lambda rows: compared(rows, ONE[0], TUNED, SHOWN, at_least=50),
}


def measured(s: InContext, run, title: str) -> dict:
    """The numbers of MEASURES."""
    new, one = (make_questions(KINDS, s.test, s.seed, fixed) for fixed in (False, True))
    models, tokenizer = learned(s, run, title, one)
    begin = [parameters(base(s.model)[0] if s.alone else model) for model in models.values()]
    curve = [right(models, tokenizer, new, k) for k in range(SHOTS + 1)]
    own = {ONE[k]: mean(right(models, tokenizer, one, k)) for k in ONE}
    both, other = in_two_contexts(models, tokenizer, new)
    losses = {LOSS[k]: mean({kind: loss_of(model, *rows_of_questions(of(kind, new), k, tokenizer))
                             for kind, model in models.items()}) for k in LOSS}
    again = mean(right(models, tokenizer, new, 0))
    end = [parameters(model) for model in models.values()]
    best = [told(new, k) for k in range(SHOTS + 1)]
    different = {id(model): model for model in models.values()}.values()
    return {**{name: mean(x) for name, x in zip(RIGHT, curve)}, AGAIN: again,
            SHORT: mean(best[SHOTS]) - mean(curve[SHOTS]),
            **{name: x[kind] for kind, names in OF_KIND.items() for name, x in zip(names, curve)},
            **own, TWO: both, OTHER: other, **losses,
            CHANGED: 100 * float(np.mean([a != b for a, b in zip(begin, end)])),
            KNOWN: float(np.mean([old_text(model, tokenizer, s) for model in different])),
            CURVE: {kind: [x[kind] for x in curve] for kind in KINDS},
            IDEAL: {kind: [x[kind] for x in best] for kind in KINDS},
            "SHA-256 before": digest(begin), "SHA-256 after": digest(end)}


def learned(s: InContext, run, title: str, one: list[Question]):
    """(kind -> the model that answers its questions, tokenizer)."""
    model, tokenizer = base(s.model)
    if s.alone and s.steps:
        models = {}
        for kind in KINDS:
            task = of(kind, one)[0].task
            batches = ShotBatches(lambda rng, task=task: task, tokenizer, s.batch, s.seed, shots=0)
            models[kind] = taught(prepared(base(s.model)[0], s), batches, s, run.inside(kind),
                                  f"{title}, {kind}")[0]
        return models, tokenizer
    if s.steps:
        batches = ShotBatches(draw_task, tokenizer, s.batch, s.seed)
        if s.replay:
            stream = data.pack(texts(share_of(s))[: s.documents], tokenizer)
            old = data.Batches([stream], [1], most_old(s.batch, s.replay, beside=True),
                               batches[0][0].shape[1], s.seed)
            batches = data.Replay(batches, old, s.replay, s.seed, beside=True)
        model = taught(prepared(model, s), batches, s, run, title)[0]
    return dict.fromkeys(KINDS, model), tokenizer


@cache
def texts(held_out: float):
    """The text that the base was trained on."""
    return data.split(data.load_corpus("python-reference"), held_out)[0]


def of(kind: str, questions: list[Question]) -> list[Question]:
    """The questions of a kind."""
    return [question for question in questions if question.kind == kind]


def mean(numbers: dict[str, float]) -> float:
    """Of all kinds."""
    return float(np.mean([*numbers.values()]))


def said(model, tokenizer, questions: list[Question], k: int) -> list[str]:
    """What a model answers after k demonstrations: the likeliest tokens, to the line's end."""
    prompts = [prompt_of(question, k, tokenizer) for question in questions]
    longest = max(len(tokenizer.encode(f"{question.answer}\n")) for question in questions)
    return [text.partition("\n")[0] for text in written(model, prompts, longest, tokenizer)]


def right(models, tokenizer, questions: list[Question], k: int) -> dict[str, float]:
    """kind -> per cent of its questions that are answered rightly after k demonstrations."""
    found = {}
    for kind, model in models.items():
        own = of(kind, questions)
        found[kind] = 100 * float(np.mean([
            text == q.answer for q, text in zip(own, said(model, tokenizer, own, k))]))
    return found


def told(questions: list[Question], k: int) -> dict[str, float]:
    """The same for who tells as much as one can."""
    return {kind: 100 * float(np.mean([ideal(q.shown[:k], q.asked) == q.answer
                                       for q in of(kind, questions)])) for kind in KINDS}


def in_two_contexts(models, tokenizer, questions: list[Question]) -> tuple[float, float]:
    """Per cent of the questions that are answered rightly after their own demonstrations and after
    those of the next kind, and per cent where the two answers differ. Only those count for which
    the right answers differ."""
    away = len(questions) // len(KINDS) + 1
    both, differ = [], []
    for kind, model in models.items():
        pairs = [(q, replace(q, task=other.task, shown=other.shown))
                 for i, q in enumerate(questions) if q.kind == kind
                 for other in [questions[(i + away) % len(questions)]]]
        pairs = [(a, b) for a, b in pairs if a.answer != b.answer]
        answers = [said(model, tokenizer, [*side], SHOTS) for side in zip(*pairs)]
        for (a, b), x, y in zip(pairs, *answers):
            both.append(x == a.answer and y == b.answer)
            differ.append(x != y)
    return 100 * float(np.mean(both)), 100 * float(np.mean(differ))


def parameters(model) -> np.ndarray:
    """A copy of all numbers of a model, end to end."""
    return np.concatenate([tensor.data.ravel() for _, tensor in model.named_tensors()])


def digest(numbers: list[np.ndarray]) -> str:
    """The SHA-256 of these bytes, the first 16 digits."""
    return hashlib.sha256(b"".join(part.tobytes() for part in numbers)).hexdigest()[:16]


def draw(figure, rows):
    """Right answers by demonstrations, means over the seeds: of each arm, then of each kind."""
    def averages(arm, name, kinds):
        found = [np.mean([row[name][kind] for kind in kinds], axis=0) for row in rows
                 if row["arm"] == arm]
        return np.mean(found, axis=0) if found else None

    arms, kinds = figure.subplots(1, 2, sharey=True)
    plot = partial(plotted, range(SHOTS + 1))
    for arm, color in zip(ARMS, COLORS):
        plot(arms, averages(arm, CURVE, KINDS), color, label=arm)
    shown = SHOWN if any(row["arm"] == SHOWN for row in rows) else rows[0]["arm"]
    plot(arms, averages(shown, IDEAL, KINDS), COLORS[5], "--", label="ideal")
    for kind, color in zip(KINDS, COLORS[3:5] + COLORS[6:]):
        plot(kinds, averages(shown, CURVE, [kind]), color, label=kind)
        plot(kinds, averages(shown, IDEAL, [kind]), color, "--")
    kinds.set_title(f"{shown} (dashed: ideal)", fontsize=8)
    for axes in (arms, kinds):
        axes.set(xlabel="demonstrations", ylim=(-3, 103))
        axes.legend(frameon=False, fontsize=7)
    arms.set_ylabel("right answers, %")


def plotted(x, axes, y, color: str, line: str = "o-", label: str | None = None):
    """A curve, if there is one."""
    if y is not None:
        axes.plot(x, y, line, color=color, label=label, linewidth=1.2, markersize=3)


LIKELY = {"5 demonstrations improve the answers of the base by 5 points":
          "so small a model has to learn from such rows first: in context it does, with the same "
          "demonstrations"}
EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured, InContext)

if __name__ == "__main__":
    command(main)
