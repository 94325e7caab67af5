"""Full fine-tuning, LoRA and QLoRA on five small tasks: what each learns, and what it forgets.

    python scripts/experiments/adaptation_methods.py            # about 20 minutes on two cores
    python scripts/experiments/adaptation_methods.py --quick    # seconds; the numbers mean nothing
    python scripts/experiments/adaptation_methods.py --model runs/pretrain-*/model --seeds 0 1 2 3

Lecture 002 compares the methods on models of billions of parameters. Here a model of the size that
pretrain.py makes learns to reverse, upper and sort a word, to give the last word, and to add; then
it answers held-out records, and its loss on the text it was trained on says what it still knows.
An arm is a line of ARMS.
"""

import sys
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from minilm import data
from minilm.experiment import Experiment, conduct
from minilm.files import sha256
from minilm.interop import huggingface
from minilm.measure.answers import answers
from minilm.measure.losses import loss_of
from minilm.measure.verdict import compared
from minilm.optim import AdamW, cosine_schedule
from minilm.peft import add_lora, trainable_parameters
from minilm.picture import COLORS
from minilm.quantize import quantize_model
from minilm.run import newest_model
from minilm.train import Diverged, Trainer, default_workers, train
from minilm.transformer import Config, Transformer

QUESTION = "Do adapters learn as much as full fine-tuning, and do they forget less?"
TASKS = ("reverse", "upper", "sort", "last", "add")
RIGHT, KNOWN = "answered rightly, %", "loss on the old text"

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


class Size(NamedTuple):
    train: int  # records of each task
    test: int
    batch: int
    steps: int
    warmup: int
    text: int | None  # rows of the old text; None: all
    workers: int


FULL = Size(2000, 200, 16, 4000, 100, None, default_workers()[0])
QUICK = Size(16, 2, 4, 4, 1, 2, 1)


def main(seeds: tuple[int, ...] = (0, 1, 2), quick: bool = False, out: Path = Path("runs"),
         model: tuple[Path, ...] = (), resume: Path | None = None, keep: bool = False):
    """Full fine-tuning, LoRA and QLoRA on five small tasks: what each learns and forgets.

    Args:
        seeds: of records, adapters and batches; every arm runs on each.
        quick: end in seconds, with numbers that mean nothing.
        out: folder in which the run gets a folder of its own.
        model: base models, folders with a tokenizer.json; seed s adapts number s mod n of the n
            given. By default the newest runs/pretrain-*/model. Of one base the intervals say
            nothing about another.
        resume: folder of a run to go on with; arms and seeds that are done are not run again.
        keep: leave the result beside this program, for the page that report.py makes.
    """
    bases = [] if quick else list(model) or [newest_model(Path("runs"), "pretrain-*")]
    size = QUICK if quick else FULL
    for folder in bases:
        load(folder)  # what is wrong with it is to be said before a folder is made for the run
    files = [file for folder in bases for file in sorted(folder.glob("*.safetensors"))]
    settings = {"bases": [sha256(file) for file in files], **size._asdict()}
    options = f"--model {' '.join(map(str, bases))}" if bases else ""
    conduct(EXPERIMENT, partial(measured, bases=bases, size=size), seeds, settings, options, quick,
            out, resume, keep)


def measured(arm: str, seed: int, bases: list[Path], size: Size) -> dict:
    """Adapt a base model, and count what it answers rightly and what it still knows."""
    model, tokenizer = tiny() if not bases else load(bases[seed % len(bases)])
    text = old_text(tokenizer, model.config.context, size.text)
    records, test = data.make_tasks(TASKS, size.train, size.test, seed)
    lr, prepare = ARMS[arm]
    model = prepare(model, seed)
    if lr:
        fit(model, lr, data.InstructionBatches(records, tokenizer, size.batch, None, seed), size,
            seed, f"{arm}, seed {seed}")
    right = {task: [] for task in TASKS}
    for record, said in zip(test, answers(model, test, tokenizer)):
        right[record.task].append(100 * data.score(record, said))
    return {RIGHT: float(np.mean(list(right.values()))),
            **{f"{task}, %": float(np.mean(found)) for task, found in right.items()},
            KNOWN: loss_of(model, *text),
            "trained parameters": sum(p.size for p in trainable_parameters(model)) if lr else 0}


def fit(model, lr: float, batches, size: Size, seed: int, title: str):
    """Train what is to be trained."""
    optimizer = AdamW(trainable_parameters(model), lr, weight_decay=0.0)
    schedule = partial(cosine_schedule, steps=size.steps, lr=lr, warmup=size.warmup)
    processes = default_workers()[1] and size.workers > 1
    with Trainer(model, optimizer, size.workers, processes, seed) as trainer:
        steps = train(trainer, batches, size.steps, schedule)
        for _ in tqdm(steps, title, size.steps, leave=False, unit="step", disable=None):
            pass


def lora(model, seed: int):
    return add_lora(model, r=8, alpha=16, targets="all-linear", seed=seed)


def load(folder: Path):
    return huggingface.load_model(folder), data.load_tokenizer(folder / "tokenizer.json")


def tiny():
    """A model that knows nothing, and its tokenizer."""
    return Transformer(Config.gpt2(258, 48, layers=1, heads=2, width=16)), data.ByteTokenizer()


@cache
def held_out():
    """The text that pretrain.py does not train on."""
    return data.split(data.load_corpus("python-reference"), 0.1)[1]


def old_text(tokenizer, context: int, count: int | None):
    """Rows of it: (tokens, targets)."""
    tokens, targets = data.rows(data.pack(held_out(), tokenizer), context)
    return tokens[:count], targets[:count]


def draw(figure, rows):
    """Learning against forgetting: a small dot a seed, a large one the mean."""
    axes = figure.subplots()
    arms = dict.fromkeys(row["arm"] for row in rows)
    for i, (arm, color) in enumerate(zip(arms, COLORS)):
        x, y = np.array([(row[KNOWN], row[RIGHT]) for row in rows if row["arm"] == arm]).T
        axes.plot(x, y, "o", color=color, markersize=4, alpha=0.6, markeredgewidth=0)
        axes.plot(x.mean(), y.mean(), "o", color=color, markersize=9, markeredgewidth=0)
        axes.annotate(arm, (x.mean(), y.mean()), xytext=(0, -16 if i % 2 else 9), color=color,
                      textcoords="offset points", ha="center", weight="bold")
    axes.margins(0.14)
    axes.set(xlabel="loss on the old text, nats a token (right: forgets more)",
             ylabel="answered rightly, %")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)

if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError, ImportError, Diverged) as error:
        sys.exit(f"adaptation_methods.py: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
