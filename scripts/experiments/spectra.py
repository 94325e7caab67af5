"""How many directions does an update of a weight need, and do they become more?

    python scripts/experiments/spectra.py --model runs/pretrain-*/model
    python scripts/experiments/spectra.py --quick            # seconds; the numbers mean nothing

Lecture 002 says twice what an update dW = W - W0 is. First, as the reason for LoRA (Hu et al.
2021): "The updated weights have a low 'intrinsic rank' during adaptation". Then, of Biderman et al.
2024: "the difference has a similar spectrum to the finetuned and base weight matrices (up to a
multiplicative scaling)", "similar spectra can be achieved by adding low-magnitude Gaussian i.i.d
noise to a weight matrix", and "the rank of the matrix continues to increase as fine-tuning
progresses". The paper puts the rank of full fine-tuning's updates at 10 to 100 times that of
typical LoRA configurations.

Here the whole model, or LoRA on all its linear layers, reads other text (continued pretraining on
python-docstrings), or learns four tasks. The rank is k90, how many directions hold 90 % of the sum
of squares (minilm/measure/spectra.py). The numbers are means over the 56 matrices of pretrain.py's
model; their full rank is 64. likeness is the cosine of two spectra, 1 if they are the same up to a
scaling. The arm `noise` has normal numbers in the place of the update of "full, text", in each
matrix as large as it; its loss says what that does to the model. So its k90 is the mark of no
structure at all (spectra_of_noise.py has it in closed form for a square matrix: .51 n, here 33).

A seed takes five to six minutes of one core. All arms of a seed that need an update share its
training; a run that goes on trains it again.
"""

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from minilm import data
from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.losses import loss_of
from minilm.measure.spectra import apart, likeness, rank_of, spectrum
from minilm.measure.verdict import compared, single, verdict
from minilm.peft.adapted import adapted_layers, chosen
from minilm.picture import COLORS, curve
from minilm.run import RunDirectory
from minilm.trial import (
    Trial,
    base,
    learned,
    loss_of_answers,
    low_rank,
    prepared,
    program,
    records_of,
    taught,
)

QUESTION = "How many directions does an update of a weight need, and do they become more?"
SLIDE = {}  # the slides give no numbers


@dataclass(frozen=True)
class Tuned(Trial):
    """What is learned, and how."""

    steps: int = 1000
    """updates in the whole run"""
    corpus: str | None = None
    """text that is read; None: the tasks are learned"""
    noise: bool = False
    """put normal numbers in the place of what was learned"""


TEXT = {"corpus": "python-docstrings", "steps": 800}
FULL, LORA, ONE = {"method": "full", "lr": 1e-3}, low_rank(8), low_rank(1)
ARMS = {
    "full, text": FULL | TEXT,
    "noise": FULL | TEXT | {"noise": True},
    "LoRA, r = 8, text": LORA | TEXT,
    "LoRA, r = 1, text": ONE | TEXT,
    "full, tasks": FULL,
    "LoRA, r = 8, tasks": LORA,
}
ROOM = 128  # tokens in a row of text
MARKS = (1 / 8, 1 / 4, 1 / 2, 1)  # parts of the steps after which the update is looked at

RANK0, RANKW, RANK, EARLY = "k90 of W0", "k90 of W", "k90 of dW", "k90 of dW after 1/8 of the steps"
LIKE, SIZE = "likeness of dW to W0", "size of dW, % of W0"
MOVED, NOISY = "spectrum moved, %", "spectrum apart from that of W0 + noise, %"
LOSS = "loss of what is learned, nats a token"
KINDS = ("q", "k", "v", "o", "gate", "up", "down")
MEASURES = {RANK0: 1, RANKW: 1, RANK: 1, EARLY: 1, LIKE: 3, SIZE: 1, MOVED: 2, NOISY: 2, LOSS: 3,
            **{f"{kind}: {RANK}": 1 for kind in KINDS}}
STEPS, CURVES = "k90 by step", "spectra"  # for the picture


def grows(arm: str):
    """Does an arm's update need more directions at the end than early on?"""
    about = f"{arm}: {RANK}, at the end - after 1/8 of the steps"
    return lambda rows: verdict(of_arm(rows, arm, lambda row: row[RANK] - row[EARLY]), about, 0)


def times(r: int):
    """Is the rank of full's update 10 to 100 times LoRA's r?"""
    about = f"full, text: {RANK} / {r}"
    return lambda rows: verdict(of_arm(rows, "full, text", lambda row: row[RANK] / r), about,
                                at_least=10, at_most=100)


def of_arm(rows, arm: str, value) -> list[float]:
    """value(row) of an arm's rows."""
    return [value(row) for row in rows if row["arm"] == arm]


LOW_TEXT = "text: the update has a low rank (k90 at most 8 of 64)"
LOW_TASKS = "tasks: the update has a low rank (k90 at most 8 of 64)"
CLAIMS = {
    LOW_TEXT:
        lambda rows: single(rows, RANK, "full, text", at_most=8),
    LOW_TASKS:
        lambda rows: single(rows, RANK, "full, tasks", at_most=8),
    "text: the spectrum of dW is like that of W0 (cosine above .9)":
        lambda rows: single(rows, LIKE, "full, text", at_least=0.9),
    "tasks: the spectrum of dW is like that of W0 (cosine above .9)":
        lambda rows: single(rows, LIKE, "full, tasks", at_least=0.9),
    "text: it is more like it than noise's is":
        lambda rows: compared(rows, LIKE, "full, text", "noise", at_least=0),
    "text: it is more like it than LoRA's is":
        lambda rows: compared(rows, LIKE, "full, text", "LoRA, r = 8, text", at_least=0),
    "text: noise as large as dW gives a similar spectrum (apart by less than 10 %)":
        lambda rows: single(rows, NOISY, "full, text", at_most=10),
    "text: W's spectrum is nearer to that of W0 + noise than to that of W0":
        lambda rows: verdict(of_arm(rows, "full, text", lambda row: row[NOISY] - row[MOVED]),
                             f"full, text: {NOISY} - {MOVED}", at_most=0),
    "text: but noise is nothing that was learned: its loss is 0.1 nats above that of dW, or more":
        lambda rows: compared(rows, LOSS, "noise", "full, text", at_least=0.1),
    "text: dW is of a lower rank than noise":
        lambda rows: compared(rows, RANK, "full, text", "noise", at_most=0),
    "text: the rank of dW grows while it is tuned": grows("full, text"),
    "tasks: the rank of dW grows while it is tuned": grows("full, tasks"),
    "LoRA's k90 is at most r = 8 (text)":
        lambda rows: single(rows, RANK, "LoRA, r = 8, text", at_most=8),
    "LoRA's k90 is at most r = 8 (tasks)":
        lambda rows: single(rows, RANK, "LoRA, r = 8, tasks", at_most=8),
    "text: full's rank is 10 to 100 times LoRA's r = 1, 1/64 of the width": times(1),
    "text: full's rank is 10 to 100 times LoRA's r = 8, 1/8 of the width": times(8),
}
LIKELY = {
    LOW_TEXT: "nothing keeps full fine-tuning to few directions: its update takes as many as the "
              "weights, 24, and noise 38. That few are enough is another question: it wins about "
              ".4 nats over a base, of which r = 8 lacks .05 and r = 1 .15",
    LOW_TASKS: "nothing keeps full fine-tuning to few directions: its update takes 16, where the "
               "weights take 24. That few are enough is another question: of the 7.3 nats that the "
               "base has, r = 8 leaves .11, full fine-tuning .04",
    "text: W's spectrum is nearer to that of W0 + noise than to that of W0":
        "dW needs fewer directions than noise, and its spectrum is more like W0's than noise's is",
    "text: full's rank is 10 to 100 times LoRA's r = 8, 1/8 of the width":
        "a matrix of rank 64 cannot have more than 8 times as many; the paper's are of 4096, where "
        "r = 16 is 1/256",
}


@cache
def tuned(s: Tuned) -> tuple[dict[str, np.ndarray], dict[int, dict[str, int]], float]:
    """(path -> dW, step -> path -> its k90, loss) of a training, which is run once."""
    (model, tokenizer), by_step = base(s.model), {}
    W0 = weights(model)

    def watch(trainer, done):
        if done.step in {round(mark * s.steps) for mark in MARKS} - {0}:
            now = updates(trainer.model, W0)
            by_step[done.step] = {path: rank_of(spectrum(dW)) for path, dW in now.items()}

    title = f"{s.method}, {s.corpus or 'tasks'}, seed {s.seed}"
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        if s.corpus:
            batches, held_out = text(s, tokenizer)
            model = taught(prepared(model, s), batches, s, run, title, watch)[0]
            loss = loss_of(model, *held_out)
        else:
            records, test = records_of(s)
            model = learned(model, tokenizer, records, s, run, title, watch)[0]
            loss = loss_of_answers(model, tokenizer, test)
    return updates(model, W0), by_step, loss


def text(s: Tuned, tokenizer):
    """(batches of the text, every eighth row of what is held out of it)."""
    corpus = data.load_corpus(s.corpus) if s.model else data.Corpus("quick", ("a few words " * 99,))
    batches, held_out = data.batches_of([data.split(corpus)], tokenizer, s.batch, ROOM, s.seed)
    return batches, [rows[::8] for rows in held_out]


def weights(model) -> dict[str, np.ndarray]:
    """path -> W (O, I) of each linear layer but the head, in float64."""
    return {path: np.array(layer.weight.data, np.float64)
            for path, layer in chosen(model, "all-linear").items()}


def updates(model, W0) -> dict[str, np.ndarray]:
    """path -> dW (O, I): LoRA's, or what has been added to W0."""
    if layers := adapted_layers(model):
        return {path: np.array(layer.adapters["default"].update(), np.float64)
                for path, layer in layers.items()}
    return {path: W - W0[path] for path, W in weights(model).items()}


def normal(like: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Matrices of normal numbers, each as large as that of `like`."""
    rng, found = np.random.default_rng([seed, 1]), {}
    for path, dW in like.items():
        N = rng.standard_normal(dW.shape)
        found[path] = N * (np.linalg.norm(dW) / np.linalg.norm(N))
    return found


def measured(s: Tuned, run, title: str) -> dict:
    """The numbers of one arm, means over the matrices."""
    W0 = weights(base(s.model)[0])
    found, by_step, loss = tuned(replace(s, noise=False))
    ranks = {step: float(np.mean([*of.values()])) for step, of in by_step.items()}
    if s.noise:
        found, ranks = normal(found, s.seed), {}
        loss = loss_with(s, found)
    noise, rows, curves = normal(found, s.seed + 1), {}, []
    for path, dW in found.items():
        before, d, after = (spectrum(X) for X in (W0[path], dW, W0[path] + dW))
        rows[path] = {
            RANK0: rank_of(before), RANKW: rank_of(after), RANK: rank_of(d),
            LIKE: likeness(before, d), SIZE: 100 * np.linalg.norm(d) / np.linalg.norm(before),
            MOVED: 100 * apart(before, after) / before.mean(),
            NOISY: 100 * apart(after, spectrum(W0[path] + noise[path])) / before.mean()}
        curves.append([x / np.linalg.norm(x) for x in (before, d)])
    row = {m: float(np.mean([of[m] for of in rows.values()])) for m in rows[path]}
    row |= {f"{kind}: {RANK}": mean_of(rows, kind) for kind in KINDS}
    early = ranks[min(ranks)] if ranks else row[RANK]
    return row | {EARLY: early, LOSS: loss, STEPS: {str(k): x for k, x in ranks.items()},
                  CURVES: np.mean(curves, axis=0).tolist()}


def loss_with(s: Tuned, noise: dict[str, np.ndarray]) -> float:
    """The loss on the text of the base with noise in its weights."""
    model, tokenizer = base(s.model)
    for path, layer in chosen(model, "all-linear").items():
        layer.weight.data = layer.weight.data + noise[path].astype(layer.weight.data.dtype)
    return loss_of(model, *text(s, tokenizer)[1])


def mean_of(rows: dict[str, dict], kind: str) -> float:
    """The mean k90 of the layers q, or k ...; 0 if the model has none of them."""
    found = [of[RANK] for path, of in rows.items() if path.endswith(f".{kind}")]
    return float(np.mean(found)) if found else 0.0


def draw(figure, rows):
    """Left the mean spectra of W0 and of the updates, right k90 by step."""
    left, right = figure.subplots(1, 2)
    shown = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    for number, arm in enumerate(shown):
        of = [row for row in rows if row["arm"] == arm]
        before, after = np.mean([row[CURVES] for row in of], axis=0)
        if not number:
            left.plot(np.arange(1, len(before) + 1), before, "--", color=COLORS[7], label="W0")
        left.plot(np.arange(1, len(after) + 1), after, color=COLORS[number], label=f"dW: {arm}")
        if of[0][STEPS]:
            curve(right, {int(step): [row[STEPS][step] for row in of] for step in of[0][STEPS]},
                  COLORS[number], arm)
    if "noise" in shown:
        level = np.mean([row[RANK] for row in rows if row["arm"] == "noise"])
        right.axhline(level, color=COLORS[shown.index("noise")], linestyle=":", label="noise")
    left.set(xlabel="place in the spectrum", ylabel="singular value / size of the matrix")
    right.set(xlabel="step", ylabel="k90 of dW, directions",
              ylim=(0, 1.6 * right.get_ylim()[1]))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=6.5, loc="upper right")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured, Tuned)

if __name__ == "__main__":
    command(main)
