"""Full fine-tuning, LoRA and QLoRA on five small tasks: what each learns, and what it forgets.

    python scripts/experiments/adaptation_methods.py            # about 20 minutes on two cores
    python scripts/experiments/adaptation_methods.py --quick    # seconds; the numbers mean nothing
    python scripts/experiments/adaptation_methods.py --model runs/pretrain-*/model --seeds 0 1 2 3

Lecture 002 compares the methods on models with billions of parameters. Here a small model, made by
pretrain.py, learns five tasks: reverse a word, put it in upper case, sort its letters, find the
last word, add two numbers. Then it answers held-out records. Its loss on the text that it was
trained on says what it still knows. An arm is a line of ARMS.
"""

from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from minilm import data
from minilm.command import Given, command
from minilm.experiment import Experiment, conduct
from minilm.interop import huggingface
from minilm.loop import Training, fit, refuse_unused
from minilm.measure.answers import answers
from minilm.measure.losses import bits_per_byte, loss_of
from minilm.measure.verdict import compared
from minilm.optim import AdamW
from minilm.parallel.cores import default_workers
from minilm.peft import add_lora, trainable_parameters
from minilm.picture import COLORS
from minilm.quantize import quantize_model
from minilm.run import newest_model, share_held_out
from minilm.transformer import Config, Transformer
from minilm.versions import fingerprints

QUESTION = "Do adapters learn as much as full fine-tuning, and do they forget less?"
TASKS = ("reverse", "upper", "sort", "last", "add")
RIGHT, KNOWN = "answered rightly, %", "old text, bits a byte"

SLIDE = {  # "Experiments" of LoRA's part, and table 3 of QLoRA's
    "lecture 002: GPT-3, WikiSQL, %": {"full": 73.8, "LoRA": 73.4},
    "lecture 002: T5-11B, RougeL": {"full": 62.0, "LoRA": 60.7, "QLoRA": 60.9},
}
ARMS = {  # name: (learning rate, what is done to the model before it trains)
    "base model": (0.0, lambda model, seed: model),
    "full": (1e-3, lambda model, seed: model),
    "LoRA": (3e-3, lambda model, seed: lora(model, seed)),
    "QLoRA": (3e-3, lambda model, seed: lora(quantize_model(model, "nf4"), seed)),
}
MEASURES = {RIGHT: 1, **{f"{task}, %": 0 for task in TASKS}, KNOWN: 2, "trained parameters": 0}
CLAIMS = {
    "QLoRA is within 2 points of LoRA":
        lambda rows: compared(rows, RIGHT, "QLoRA", "LoRA", at_least=-2, at_most=2),
    "LoRA is within 4 points of full fine-tuning":
        lambda rows: compared(rows, RIGHT, "LoRA", "full", at_least=-4, at_most=4),
    "LoRA forgets less than full fine-tuning":
        lambda rows: compared(rows, KNOWN, "LoRA", "full", at_most=0),
}


@dataclass(frozen=True)
class Settings(Training):
    """What decides an arm's numbers, together with the seed and the base model."""

    steps: int = 4000
    lr: float = 0.0  # each arm has its own
    warmup: int = 100
    save_every: int = 1000
    train: int = 2000  # records of each task
    test: int = 200
    documents: int | None = None  # of the old text; None: all


QUICK = Settings(batch=4, steps=4, warmup=1, workers=1, train=16, test=2, documents=1)


def main(seeds: tuple[int, ...] = (0, 1, 2), quick: bool = False, out: Path = Path("runs"),
         model: tuple[Path, ...] = (), resume: Path | None = None, keep: bool = False,
         given: Given = frozenset()):
    """Full fine-tuning, LoRA and QLoRA on five small tasks: what each learns and forgets.

    Args:
        seeds: of records, adapters and batches; every arm runs on each seed.
        quick: end in seconds, on a tiny model that knows nothing; the numbers mean nothing.
        out: the run gets a folder of its own in here.
        model: folders of n base models, with a tokenizer.json each; seed s adapts number s mod n.
            By default the newest runs/pretrain-*/model. The intervals from one base say nothing
            about another base.
        resume: folder of a run to go on with; arms and seeds that are done are not run again.
        keep: leave the result beside this program, for the page that report.py makes.
        given: names of the options on the command line.
    """
    if resume:
        refuse_unused(given, ("out",), "the run keeps its folder: give --resume or --out, not both")
    if quick:
        refuse_unused(given, ("model",), "a quick run makes a tiny model of its own")
    bases = [] if quick else list(model) or [newest_model(Path("runs"), "pretrain-*")]
    for folder in bases:  # if it is of no use, fail before the run gets a folder
        if not load(folder)[0].config.causal:
            raise ValueError(f"{folder} fills in masked tokens; only a causal model gives answers")
    s = QUICK if quick else Settings(workers=default_workers()[0])
    settings = {"bases": [fingerprints(folder) for folder in bases], **asdict(s)}
    options = ["--model", *map(str, bases)] if bases else []
    conduct(EXPERIMENT, partial(measured, bases, s), seeds, settings, options, quick, out, resume,
            keep)


def measured(bases: list[Path], s: Settings, arm: str, seed: int, run) -> dict:
    """Adapt a base model, and count what it answers rightly and what it still knows."""
    s, (lr, prepare) = replace(s, seed=seed), ARMS[arm]
    folder = bases[seed % len(bases)] if bases else None
    model, tokenizer = load(folder) if folder else tiny()
    share = (share_held_out(folder) if folder else None) or 0.1
    records, test = data.make_tasks(TASKS, s.train, s.test, seed)
    model = prepare(model, seed)
    if lr:
        batches = data.InstructionBatches(records, tokenizer, s.batch, None, seed)
        adapt(run, model, batches, replace(s, lr=lr), f"{arm}, seed {seed}")
    right = {task: [] for task in TASKS}
    for record, said in zip(test, answers(model, test, tokenizer)):
        right[record.task].append(100 * data.score(record, said))
    return {RIGHT: float(np.mean(list(right.values()))),
            **{f"{task}, %": float(np.mean(found)) for task, found in right.items()},
            KNOWN: old_text(model, tokenizer, held_out(share)[: s.documents]),
            "trained parameters": sum(p.size for p in trainable_parameters(model)) if lr else 0}


def adapt(run, model, batches, s: Settings, title: str):
    """Train the parameters that are not frozen."""
    optimizer = AdamW(trainable_parameters(model), s.lr, weight_decay=0.0)
    for _, done in fit(run, model, batches, s, optimizer=optimizer, title=title):
        stopped = done.step < s.steps  # by Ctrl-C
    if stopped:
        raise KeyboardInterrupt


def lora(model, seed: int):
    return add_lora(model, r=8, alpha=16, targets="all-linear", seed=seed)


def load(folder: Path):
    """A base and its tokenizer, which ends a text as the base does."""
    model, tokenizer = (huggingface.load_model(folder),
                        data.load_tokenizer(folder / "tokenizer.json"))
    data.adopt_end(tokenizer, model.ends.eos)
    return model, tokenizer


def tiny():
    """An untrained model and its tokenizer."""
    return Transformer(Config.gpt2(258, 48, layers=1, heads=2, width=16)), data.ByteTokenizer()


@cache
def held_out(share: float):
    """The text that pretrain.py does not train on."""
    return data.split(data.load_corpus("python-reference"), share)[1]


def old_text(model, tokenizer, documents) -> float:
    """The model's bits a byte on the documents."""
    tokens, targets = data.rows_of(documents, tokenizer, model.config.context)
    size = sum(len(document.encode()) for document in documents)
    loss = loss_of(model, tokens, targets)
    return bits_per_byte(loss, int((targets != data.IGNORED).sum()), size)


def draw(figure, rows):
    """Learning against forgetting: a small dot for each seed, a large one for the mean."""
    axes = figure.subplots()
    arms = dict.fromkeys(row["arm"] for row in rows)
    for i, (arm, color) in enumerate(zip(arms, COLORS)):
        x, y = np.array([(row[KNOWN], row[RIGHT]) for row in rows if row["arm"] == arm]).T
        axes.plot(x, y, "o", color=color, markersize=4, alpha=0.6, markeredgewidth=0)
        axes.plot(x.mean(), y.mean(), "o", color=color, markersize=9, markeredgewidth=0)
        axes.annotate(arm, (x.mean(), y.mean()), xytext=(0, -16 if i % 2 else 9), color=color,
                      textcoords="offset points", ha="center", weight="bold")
    axes.margins(0.14)
    axes.set(xlabel=f"{KNOWN} (right: forgets more)", ylabel=RIGHT)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)

if __name__ == "__main__":
    command(main)
