"""How many random directions are enough to learn a task, and does pre-training make them fewer?

    python scripts/experiments/intrinsic_dimension.py --model runs/pretrain-*/model
    python scripts/experiments/intrinsic_dimension.py --quick    # seconds; the numbers mean nothing

Lectures 002 to 004 cite it for LoRA: "The learned over-parametrized models in fact reside on a low
intrinsic dimension" (Li et al. 2018, arXiv:1804.08838; Aghajanyan et al. 2020, arXiv:2012.13255).
None of them has a number for it. Here all weights move, but only along d random directions
(minilm/peft/subspace.py). d90 is the least d that gets 90 % of the score of full fine-tuning of the
pre-trained model, in as many steps. The score is the share of tokens of held-out answers that are
right, each after the right ones before it: whole answers are still rare where tokens begin to tell.

One training learns three tasks: put a word in upper case, sort its letters, find the last word. The
values of d rise until each task has reached its 90 %; between two of them d90 is interpolated along
log d. If the last one has not reached it, d90 is larger, but counts as that d, in favour of the
arm; if the first one has, it may be smaller. The arms begin at

    random weights              the model's Config, new weights
    N steps                     the same after N steps of pre-training, as pretrain.py does it
    the model                   the folder's, pre-trained to the end
    the model, SAID             the same; each layer has a scale, which counts as one of d

The directions have length 1 and are nearly orthogonal, so AdamW's step along d of them has length
lr sqrt(d). Therefore lr is that of d = 1000, and falls as 1 / sqrt(d). Full fine-tuning has its own
rate. A seed takes at most 10 minutes of one core.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from minilm import data
from minilm.command import command
from minilm.experiment import Experiment
from minilm.loop import fit
from minilm.measure.verdict import by_seed, single, verdict
from minilm.optim import AdamW
from minilm.picture import COLORS, curve
from minilm.ranges import each, optional, whole
from minilm.transformer import Transformer
from minilm.trial import Trial, base, learned, program, records_of, share_of

QUESTION = ("How many random directions are enough to learn a task, and does pre-training make "
            "them fewer?")
SLIDE = {}  # the lectures have no number for it


@dataclass(frozen=True)
class Inside(Trial):
    """Trials in subspaces of several d, from one start."""

    method: str = "subspace"
    lr: float = 0.3
    tasks: tuple[str, ...] = ("upper", "sort", "last")
    steps: int = 400
    warmup: int = 40
    test: int = 100
    ds: tuple[int, ...] = (300, 1000, 3000, 10000, 30000)
    """numbers that are trained, in the order in which they are tried"""
    pretrained: int | None = None
    """steps of pre-training, 0 for random weights; None: the model of the folder"""

    RANGES: ClassVar = Trial.RANGES | {"ds": each(whole(1)), "pretrained": optional(whole(0))}


STARTS = {"random weights": 0, "150 steps": 150, "600 steps": 600, "the model": None}
ARMS = {name: {"pretrained": steps} for name, steps in STARTS.items()}
ARMS["the model, SAID"] = {"said": True}
ALL = "all tasks"
D90, SHARE, FULL = "d90", "d90, % of D", "full fine-tuning: right tokens, %"
REACHED = "right tokens at the last d, %"
MEASURES = {D90: 0, SHARE: 2, **{f"{task}: d90": 0 for task in Inside.tasks}, REACHED: 1, FULL: 1}
SCORE = "d = {}: right tokens, %"  # of all tasks; for the picture


def fewer(a: str, b: str, measure: str = D90):
    """Has a a smaller d90 than b? By the logarithm, as d rises by factors."""
    return lambda rows: verdict([math.log10(x / y) for x, y in by_seed(rows, measure, (a, b))],
                                f"{a} - {b}: lg {measure}", at_most=0)


CLAIMS = {
    "the pre-trained model needs fewer directions than random weights":
        fewer("the model", "random weights"),
    **{f"the same for {task}": fewer("the model", "random weights", f"{task}: d90")
       for task in Inside.tasks},
    "150 steps of pre-training make them fewer": fewer("150 steps", "random weights"),
    "600 steps make them fewer than 150": fewer("600 steps", "150 steps"),
    "2400 steps make them fewer than 600": fewer("the model", "600 steps"),
    "d90 is less than 2 % of the model's numbers":
        lambda rows: single(rows, SHARE, "the model", at_most=2),
    "a scale for each layer makes them fewer": fewer("the model, SAID", "the model"),
}
STARTED = {}  # (settings that decide a start) -> its weights, or a full fine-tuning's scores


def measured(s: Inside, run, title: str) -> dict:
    """d90 of all tasks and of each, by scores at rising d until all have reached 90 % of full's."""
    full = once(full_scores, replace(s, pretrained=None), run, title)
    weights, scores, row = once(started, s, run, title), {}, {}
    for d in s.ds if s.model else s.ds[:2]:  # quick: few
        scores[d] = in_subspace(replace(s, d=d), weights, run, f"{title}, d = {d}")
        row[SCORE.format(d)] = scores[d][ALL]
        if all(score >= 0.9 * full[task] for task, score in scores[d].items()):
            break
    D = sum(a.size for a in weights.values())
    found = {task: d90({d: score[task] for d, score in scores.items()}, 0.9 * full[task])
             for task in full}
    return row | {D90: found[ALL], SHARE: 100 * found[ALL] / D, REACHED: scores[d][ALL],
                  FULL: full[ALL], **{f"{task}: d90": found[task] for task in s.tasks}}


def once(make, s: Inside, run, title: str):
    """make(s, run, title), which several arms may need."""
    key = make.__name__, replace(s, said=False, ds=(), lr=0.0)
    if key not in STARTED:
        STARTED[key] = make(s, run, title)
    return STARTED[key]


def d90(scores: dict[int, float], target: float) -> float:
    """Where the scores reach the target, along log d; the last d if they do not."""
    points = sorted(scores.items())
    for (d, low), (D, high) in zip([(None, None), *points], points):
        if high >= target:
            return D if d is None else d * (D / d) ** ((target - low) / (high - low))
    return points[-1][0]


def full_scores(s: Inside, run, title: str) -> dict:
    """Right tokens of full fine-tuning of the model."""
    return scores_of(*base(s.model), replace(s, method="full", lr=1e-3), run.inside("full"),
                     f"{title}, full")


def in_subspace(s: Inside, weights: dict, run, title: str) -> dict:
    """Right tokens after training d numbers."""
    model, tokenizer = base(s.model)
    model.load_state_dict(weights)
    s = replace(s, lr=s.lr * math.sqrt(1000 / s.d))
    return scores_of(model, tokenizer, s, run.inside(f"d-{s.d}"), title)


def scores_of(model, tokenizer, s: Inside, run, title: str) -> dict:
    """After training, the per cent of held-out answers' tokens that are right, each after the right
    ones before it: of each task, and of all."""
    train, test = records_of(s)
    rows = {task: data.encode([record for record in test if record.task == task], tokenizer,
                              context=model.room) for task in s.tasks}
    found = {}

    def watch(trainer, done):
        if done.step == s.steps:
            found.update({task: 100 * trainer.evaluate(*rows[task])[1] for task in rows})
    learned(model, tokenizer, train, s, run, title, watch)
    return found | {ALL: float(np.mean([*found.values()]))}


def started(s: Inside, run, title: str) -> dict:
    """The weights that an arm begins with."""
    model, tokenizer = base(s.model)
    if s.pretrained is None:
        return model.state_dict()
    model = Transformer(model.config, seed=s.seed)
    steps = s.pretrained if s.model else min(s.pretrained, s.steps)
    if steps:
        pretrain(model, tokenizer, replace(s, steps=steps, warmup=steps // 20, batch=8, lr=5e-3),
                 run.inside("pretrain"), f"{title}, pre-training")
    return model.state_dict()


def pretrain(model, tokenizer, s: Inside, run, title: str):
    """As pretrain.py does it, with a schedule that ends after these steps."""
    corpus = data.load_corpus("python-reference")
    parts = data.split(corpus, share_of(s))
    batches, _ = data.batches_of([parts], tokenizer, s.batch, model.config.context, s.seed)
    params = model.parameters()
    optimizer = AdamW(params, s.lr, (0.9, 0.95), weight_decay=0.1,
                      undecayed=[p for p in params if p.ndim < 2])
    *_, (_, done) = fit(run, model, batches, s, optimizer=optimizer, min_lr=s.lr / 20, title=title)
    if done.step < s.steps:  # by Ctrl-C
        raise KeyboardInterrupt


def draw(figure, rows):
    """Right tokens by d: a dot for each seed, a line through the means; and full's 90 %."""
    axes = figure.subplots()
    for name, color in zip(ARMS, COLORS):
        own = [row for row in rows if row["arm"] == name]
        curve(axes, {d: [row[SCORE.format(d)] for row in own if SCORE.format(d) in row]
                     for d in Inside.ds}, color, name)
    axes.axhline(0.9 * np.mean([row[FULL] for row in rows]), color="grey", linestyle="--",
                 linewidth=1, label="90 % of full fine-tuning")
    axes.set_xscale("log")
    axes.set_xticks(Inside.ds, [f"{d:,}" for d in Inside.ds])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=7)
    axes.set(xlabel="d, numbers trained", ylabel="tokens of held-out answers, right, %")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured, Inside)

if __name__ == "__main__":
    command(main)
