"""Every method on four tasks of understanding: an encoder that learns to tell texts apart.

    python scripts/experiments/understanding.py --model runs/pretrain-*/model
    python scripts/experiments/understanding.py --quick    # seconds; the numbers mean nothing
    python scripts/experiments/understanding.py --rates 1e-3 3e-3 1e-2 --arms "LoRA, 8k" --seeds 9

Lectures 002 and 004 compare the methods on GLUE, with RoBERTa and DeBERTa. Here a small encoder
that pretrain.py has taught to fill in masked tokens learns four tasks, each alone: from which
corpus a text is (corpus), whether its words are written backwards (words), whether a second text
goes on where the first ends (next), and how much of it a second text shares (similar, a grade from
0 to 5 by least squares). Then it is asked about texts that were held out, from it and from
pretrain.py. As in RoBERTa, what stands between two texts is an end; there are no segments. GLUE has
Matthews' correlation for one task (CoLA) and Pearson's for one (STS-B); so have words and similar.

Each task has a new head: a pooler of the first token, and a linear layer. It is trained whole with
every method, as it must be, and counted apart; the slide's counts are without it, too. Its share is
large, since the model is small. The arm "head alone" shows what it can do without a method.

Adapter D is AdapterDrop: adapters P without those in the lowest blocks, here in one of two. The
sizes are the slide's in proportion: its 0.3M or 0.8M are 8k here. LoRA is on q and v, as there; "on
all layers" is the other choice.

Single bytes are hard to fill in. An encoder first learns how frequent they are, then for long
nothing, and then what stands beside them; the more blocks, the later, and not with every seed. So
look at the loss that pretrain.py prints: it must have left the plateau.

    python scripts/pretrain.py --family bert --corpus python-reference python-source \\
        --weights 1 1 --layers 2 --heads 8 --context 48 --batch 24 --steps 4000 --lr 3e-3 \\
        --warmup 400 --seed 0
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from minilm import adapting, data, ops
from minilm.adapting import optimizer_and_loss
from minilm.command import command
from minilm.experiment import Experiment
from minilm.loop import fit
from minilm.measure.text.agreement import accuracy, matthews, pearson
from minilm.measure.verdict import compared
from minilm.peft import retrain
from minilm.peft.adapted import insert_adapters, unadapted
from minilm.peft.retrained import retrained
from minilm.picture import COLORS
from minilm.ranges import whole
from minilm.tensor import no_grad
from minilm.transformer import Config, Transformer, with_classes
from minilm.trial import Trial, base, low_rank, program, share_of

QUESTION = "Which small change is enough to understand texts, beside a new head?"

SLIDE = {  # of MNLI, SST-2, MRPC, CoLA (Matthews), QNLI, QQP, RTE and STS-B (Pearson)
    "lecture 002: RoBERTa base, mean of 8, %": {
        "full": 86.4, "BitFit": 85.2, "adapter D, 8k": 84.4, "adapter D, 24k": 85.4,
        "LoRA, 8k": 87.2},
    "lecture 002: RoBERTa large, mean of 8, %": {"full": 88.9, "LoRA, 8k": 89.0},
    "lecture 002: RoBERTa large, Houlsby's setup, mean of 8, %": {
        "adapter P, 8k": 87.9, "adapter P, 31k": 88.4, "adapter H, 8k": 86.4,
        "adapter H, 61k": 87.8, "LoRA, 8k": 88.6},
    "lecture 002: DeBERTa XXL, mean of 8, %": {"full": 91.1, "LoRA, 8k": 91.3},
}

TASKS = {"corpus": (accuracy, "%"), "words": (matthews, "Matthews x 100"),
         "next": (accuracy, "%"), "similar": (pearson, "Pearson x 100")}
HEAD = ("pooler.dense", "head")
AVERAGE = "average, %"
TRAINED, OF_HEAD = "trained parameters of the method", "and of the head"
COLUMNS = {task: f"{task}, {unit}" for task, (_, unit) in TASKS.items()}
MEASURES = {column: 1 for column in COLUMNS.values()} | {AVERAGE: 1, TRAINED: 0, OF_HEAD: 0}


@dataclass(frozen=True)
class Understanding(Trial):
    """A trial on texts and their classes."""

    tasks: tuple[str, ...] = (*TASKS,)
    batch: int = 32
    steps: int = 500
    warmup: int = 50
    train: int = 16000
    test: int = 600
    size: int = 44
    """characters of an example"""
    alone: bool = False
    """train the new head alone"""

    RANGES: ClassVar = Trial.RANGES | {"size": whole(8)}


def bottleneck(form: str, m: int, skip: int = 0) -> dict:
    """Settings of adapters."""
    return {"method": "bottleneck", "form": form, "m": m, "skip": skip, "lr": 3e-3}


ARMS = {
    "head alone": {"alone": True, "lr": 3e-3},
    "full": {"method": "full", "lr": 5e-4},
    "BitFit": {"method": "bitfit", "lr": 1e-2},
    "adapter D, 8k": bottleneck("P", 61, skip=1),
    "adapter D, 24k": bottleneck("P", 184, skip=1),
    "adapter P, 8k": bottleneck("P", 30),
    "adapter P, 31k": bottleneck("P", 120),
    "adapter H, 8k": bottleneck("H", 15),
    "adapter H, 61k": bottleneck("H", 118),
    "LoRA, 8k": low_rank(16) | {"targets": ("q", "v"), "lr": 1e-3},
    "LoRA on all layers, 9k": low_rank(4) | {
        "targets": ("q", "k", "v", "o", "up", "down"), "lr": 1e-3},
}
BEST = "LoRA, 8k"


def better(a: str, b: str, points: float = 0):
    """Is a better than b, or at most some points below it?"""
    return lambda rows: compared(rows, AVERAGE, a, b, at_least=-points)


CLAIMS = {
    "LoRA is at most 1 point below full fine-tuning": better(BEST, "full", 1),
    **{f"LoRA is better than {arm}": better(BEST, arm) for arm in ARMS if "adapter" in arm},
    "BitFit is at most 2 points below full fine-tuning": better("BitFit", "full", 2),
    "LoRA is better than BitFit": better(BEST, "BitFit"),
    **{f"larger adapters {form} are better": better(f"adapter {form}, {large}k",
                                                    f"adapter {form}, 8k")
       for form, large in (("D", 24), ("P", 31), ("H", 61))},
    "LoRA is better than the new head alone": better(BEST, "head alone"),
}


def measured(s: Understanding, run, title: str) -> dict:
    """The numbers of MEASURES."""
    found, (learn, ask) = {}, texts(share_of(s))
    for task in s.tasks:
        model, tokenizer = encoder(s.model)
        model = prepared(with_classes(model, data.classes_of(task, learn), s.seed), s)
        rows, asked = (data.rows_of_examples(
            data.make_examples(task, part, count, s.size, s.seed), tokenizer, model.room)
            for part, count in ((learn, s.train), (ask, s.test)))
        optimizer, loss = optimizer_and_loss(model, s)
        loss = GradeLoss() if asked[1].dtype.kind == "f" else loss
        batches = data.EpochBatches(rows, s.batch, s.seed)
        *_, (_, done) = fit(run.inside(task), model, batches, s, loss, optimizer=optimizer,
                            title=f"{title}, {task}")
        if done.step < s.steps:  # by Ctrl-C
            raise KeyboardInterrupt
        found[COLUMNS[task]] = 100 * TASKS[task][0](answers(model, *asked), asked[1].tolist())
    trained = {path: p.size for path, p in model.named_parameters() if p.requires_grad}
    of_head = sum(size for path, size in trained.items() if path.startswith(HEAD))
    return {**found, AVERAGE: float(np.mean([*found.values()])),
            TRAINED: sum(trained.values()) - of_head, OF_HEAD: of_head}


class GradeLoss:
    """Mean squared error of the grades (B,) that the model gives to texts (B, T)."""

    def totals(self, tokens, grades, mask) -> tuple[int]:
        """The texts."""
        return (len(grades),)

    def __call__(self, model, tokens, grades, mask, totals=(None,)):
        share = len(grades) / (totals[-1] or len(grades))
        return share * ops.mse(model(tokens, mask), grades[:, None])


def answers(model, tokens, labels, mask) -> list:
    """What the model says of each text: the number of a class, or a grade."""
    model.eval()
    with no_grad():
        said = np.concatenate([model(tokens[i : i + 100], mask[i : i + 100]).data
                               for i in range(0, len(tokens), 100)])
    return said[:, 0].tolist() if labels.dtype.kind == "f" else said.argmax(-1).tolist()


def prepared(model, s: Understanding):
    """The model, ready to train: the method's numbers and the head."""
    if s.alone:
        layers = unadapted(model)
        return insert_adapters(model, "default", {path: retrained(layers[path]) for path in HEAD})
    model = adapting.prepared(model, s)
    return model if s.method == "full" else retrain(model, HEAD)


@cache
def texts(share: float) -> tuple[dict, dict]:
    """The corpora's documents, (to learn from, held out), each by the corpus's name."""
    corpora = data.load_corpora(("python-reference", "python-source"))
    parts = {corpus.name: data.split(corpus, share) for corpus in corpora}
    return tuple({name: part[side] for name, part in parts.items()} for side in (0, 1))


def encoder(folder: str):
    """A model that fills in masked tokens, and its tokenizer; tiny ones without a folder."""
    if folder:
        return base(folder)
    tiny = Config.bert(258, 128, layers=2, heads=2, width=16, hidden=16)
    return Transformer(tiny), data.ByteTokenizer()


def require_encoder(config: Config, folder):
    """ValueError unless the model fills in masked tokens."""
    config.require_language(folder)
    if config.causal:
        raise ValueError(f"{folder} predicts next tokens; this needs a model that fills in masked "
                         "ones: pretrain.py --family bert")


def draw(figure, rows):
    """For each arm a small dot for each task, and a large one for the average; means of seeds."""
    axes = figure.subplots()
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)][::-1]
    for measure, color in zip([*COLUMNS.values(), AVERAGE], COLORS):
        means = [np.mean([row[measure] for row in rows if row["arm"] == arm]) for arm in arms]
        axes.plot(means, range(len(arms)), "o", color=color, markeredgewidth=0,
                  markersize=9 if measure == AVERAGE else 4, label=measure.split(",")[0])
    axes.set_yticks(range(len(arms)), arms)
    axes.set(xlabel="right or correlated, %")
    figure.legend(loc="outside upper right", ncols=5, frameon=False, fontsize=8,
                  columnspacing=1)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured, Understanding, require_encoder)

if __name__ == "__main__":
    command(main)
