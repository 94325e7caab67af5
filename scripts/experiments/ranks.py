"""LoRA's rank and layers on four small tasks: how small a rank is enough?

    python scripts/experiments/ranks.py --model runs/pretrain-*/model
    python scripts/experiments/ranks.py --quick    # seconds; the numbers mean nothing
    python scripts/experiments/ranks.py --rates 1e-3 3e-3 1e-2 --arms "all, r = 64" --seeds 100

Lectures 000 and 002 show that GPT-3 needs no more than r = 1 if q and v are adapted (Hu et al.
2021, arXiv:2106.09685, table 6). Lecture 004 shows that the loss of GPT-2 medium on E2E, where q
and v are adapted, falls until r = 16 (table 18). Here a small model learns four tasks that are far
from its text, with adapters on q, on q and v, on q, k, v, o, or on all linear layers. Then it
learns what is near its text: to go on with documentation out of Python's source.

The update is (alpha / r) B A with alpha = 2 r, so its factor is 2 for every rank. rsLoRA
(Kalajdzievski 2023, arXiv:2312.03732) multiplies by alpha / sqrt(r), which is 16 at r = 64; with an
alpha of 16, which is 2 r at r = 8, it would be the 2 of the other arm. Each rank has a rate of
its own, the same on all layers, since a rank of 64 breaks at the rate of a rank of 8. The last
command is how to find them, arm by arm.

Arms of few numbers answer little rightly, and those near the text nothing, as no text can be
guessed to the letter. So the loss of the right answers is what is compared first. Two losses are
taken for equal if they differ by less than NEAR, which is what lies between r = 1 and r = 16 in
lecture 004. A seed takes about 17 minutes of one core.
"""

from functools import cache

import numpy as np

from minilm import data
from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import by_arm, compared, compared_best
from minilm.picture import COLORS, curve
from minilm.trial import KNOWN, LOSS, RIGHT, TRAINED, Trial, low_rank, program, tried

QUESTION = "How small a rank is enough, and on which layers?"

SLIDE = {
    "lecture 002: GPT-3, WikiSQL, %": {
        "q, r = 1": 68.8, "q, r = 8": 70.4, "q, r = 64": 70.0,
        "q v, r = 1": 73.4, "q v, r = 2": 73.3, "q v, r = 4": 73.7, "q v, r = 8": 73.8,
        "q v, r = 64": 73.5,
        "q k v o, r = 1": 74.1, "q k v o, r = 8": 74.0, "q k v o, r = 64": 73.9},
    "lecture 002: GPT-3, MultiNLI, %": {
        "q, r = 1": 90.7, "q, r = 8": 90.7, "q, r = 64": 90.7,
        "q v, r = 1": 91.3, "q v, r = 2": 91.4, "q v, r = 4": 91.3, "q v, r = 8": 91.6,  # 000: 91.7
        "q v, r = 64": 91.4,
        "q k v o, r = 1": 91.2, "q k v o, r = 8": 91.5, "q k v o, r = 64": 91.4},
    "lecture 004: GPT-2 M, E2E, val_loss": {
        "q v, r = 1": 1.23, "q v, r = 2": 1.21, "q v, r = 4": 1.18, "q v, r = 8": 1.17,
        "q v, r = 16": 1.16, "q v, r = 64": 1.16},
    "lecture 004: GPT-2 M, E2E, BLEU": {
        "q v, r = 1": 68.72, "q v, r = 2": 69.17, "q v, r = 4": 70.38, "q v, r = 8": 69.57,
        "q v, r = 16": 69.61, "q v, r = 64": 69.24},
}
NEAR = 0.07  # nats: 1.23 - 1.16 in lecture 004

RSLORA = 3e-4  # rate of r = 64 with rsLoRA: lower, as its factor is 8 times higher

LAYERS = {"q": ("q",), "q v": ("q", "v"), "q k v o": ("q", "k", "v", "o"), "all": ("all-linear",)}
SWEPT = {"q": (1, 8, 64), "q v": (1, 2, 4, 8, 16, 64), "q k v o": (1, 8, 64), "all": (1, 8, 64)}
DOCUMENTATION = ("documentation",)  # no task of data.TASKS: see continuations
NEAR_TEXT = {"tasks": DOCUMENTATION, "steps": 1000, "train": 16000, "targets": LAYERS["q v"]}
ASKED, ANSWERED = 32, 64  # characters of a record of it

ARMS = {
    **{f"{layers}, r = {r}": {"targets": LAYERS[layers]} | low_rank(r)
       for layers, ranks in SWEPT.items() for r in ranks},
    "all, r = 64, rsLoRA": low_rank(64) | {"rslora": True, "lr": RSLORA},
    "full": {"method": "full", "lr": 1e-3},
    **{f"near text: q v, r = {r}": NEAR_TEXT | low_rank(r) for r in (1, 8, 64)},
}
CLAIMS = {
    "r = 1 on q and v is enough: its loss is that of r = 64":
        lambda rows: compared(rows, LOSS, "q v, r = 1", "q v, r = 64", at_most=NEAR),
    "r = 1 on q, k, v, o is enough: its loss is that of r = 64":
        lambda rows: compared(rows, LOSS, "q k v o, r = 1", "q k v o, r = 64", at_most=NEAR),
    "r = 1 on all layers answers within 4 points of r = 64":
        lambda rows: compared(rows, RIGHT, "all, r = 1", "all, r = 64", at_least=-4),
    "near its text r = 1 on q and v is enough: its loss is that of r = 64":
        lambda rows: compared(rows, LOSS, "near text: q v, r = 1", "near text: q v, r = 64",
                              at_most=NEAR),
    "from r = 16 on the loss is flat":
        lambda rows: compared(rows, LOSS, "q v, r = 16", "q v, r = 64", -NEAR, NEAR),
    "r = 4 answers better than r = 64":
        lambda rows: compared(rows, RIGHT, "q v, r = 4", "q v, r = 64", at_least=0),
    "a rank of 4 to 16 is enough: its loss is that of the best of the others":
        lambda rows: compared_best(rows, LOSS, [f"q v, r = {r}" for r in (4, 8, 16)],
                                   [f"q v, r = {r}" for r in (1, 2, 64)],
                                   "q v: best of r = 4, 8, 16 - best of 1, 2, 64", at_most=NEAR),
    "a higher rank is better: r = 8 on all layers has less loss than r = 1":
        lambda rows: compared(rows, LOSS, "all, r = 8", "all, r = 1", at_most=0),
    "a higher rank is better: r = 64 on all layers has less loss than r = 8":
        lambda rows: compared(rows, LOSS, "all, r = 64", "all, r = 8", at_most=0),
    "LoRA converges to full tuning: r = 64 on all layers has its loss":
        lambda rows: compared(rows, LOSS, "all, r = 64", "full", -NEAR, NEAR),
    "q alone is worse than q and v":
        lambda rows: compared(rows, LOSS, "q, r = 8", "q v, r = 8", at_least=0),
    "q alone with r = 64 is worse than q and v with r = 1":
        lambda rows: compared(rows, LOSS, "q, r = 64", "q v, r = 1", at_least=0),
    "rsLoRA has less loss than alpha / r at r = 64":
        lambda rows: compared(rows, LOSS, "all, r = 64, rsLoRA", "all, r = 64", at_most=0),
}


FAR = ("the tasks are far from what the model knows, and this model's weights are 64 wide: full "
       "fine-tuning's update has a fifth of its squares in its first direction, nine tenths in 16 "
       "(rank_compression.py)")
LIKELY = {
    "r = 1 on q and v is enough: its loss is that of r = 64": FAR,
    "r = 1 on q, k, v, o is enough: its loss is that of r = 64": FAR,
    "near its text r = 1 on q and v is enough: its loss is that of r = 64":
        "nearer, the rank matters less, by a fifth of the nats that it matters on the tasks, but "
        "it does",
    "r = 4 answers better than r = 64": "nothing overfits here, so each further rank helps",
}


def measured(s: Trial, run, title: str) -> dict:
    """The numbers of a trial on tasks, or on documentation."""
    return tried(s, run, title, continuations(s) if s.tasks == DOCUMENTATION else None)


def continuations(s: Trial) -> list[list[data.Record]]:
    """(to learn from, to be asked): pieces of documentation, the second part being the answer."""
    rng, both = np.random.default_rng(s.seed), []
    for texts, count in zip(documentation(), (s.train, s.test)):
        drawn = [texts[i] for i in rng.integers(len(texts), size=count)]
        starts = [rng.integers(len(text) - ASKED - ANSWERED) for text in drawn]
        both.append([data.Record("Go on", text[at : at + ASKED],
                                 text[at + ASKED : at + ASKED + ANSWERED], task=DOCUMENTATION[0])
                     for text, at in zip(drawn, starts)])
    return both


@cache
def documentation() -> list[list[str]]:
    """(to learn from, to be asked): what stands between triple quotes in Python's own source."""
    return [[text for document in documents for text in document.split('"""')[1::2]
             if len(text) > ASKED + ANSWERED and text.isascii()]
            for documents in data.split(data.load_corpus("python-source"))]


def draw(figure, rows):
    """Loss against rank, a line for each set of layers: its mean, with a dot for each seed."""
    axes, found = figure.subplots(), by_arm(rows, LOSS)
    lines = {f"{layers}, r = ": layers for layers in SWEPT}
    lines |= {"near text: q v, r = ": "q v, near text"}
    for (start, label), color in zip(lines.items(), COLORS):
        curve(axes, {int(rank): losses for arm, losses in found.items()
                     if (rank := arm.removeprefix(start)).isdigit()}, color, label)
    if "full" in found:
        axes.axhline(np.mean(found["full"]), color=COLORS[5], linestyle="--", label="full")
    axes.set_xscale("log", base=2)
    ticks = sorted({r for ranks in SWEPT.values() for r in ranks})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    highest = max(row[LOSS] for row in rows)
    axes.set(xlabel="rank r", ylabel=LOSS, ylim=(0, 1.35 * highest))  # with room for the legend
    axes.legend(frameon=False, ncols=2, fontsize=8)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, {LOSS: 3, RIGHT: 1, KNOWN: 2, TRAINED: 0},
                        CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
