"""One model in memory and a small adapter for each task, which take turns.

    python scripts/experiments/swapping.py --model runs/pretrain-*/model
    python scripts/experiments/swapping.py --quick    # seconds; the numbers mean nothing

Lecture 002 says that one pre-trained model can be shared, and many small LoRA modules be built for
different tasks; to switch between tasks, A and B are replaced. Lectures 000 and 004 add what it
saves: fine-tuning stores all parameters for every task.

Here each of three tasks has an adapter of its own. It is trained alone and saved in a folder. Then
one model loads all of them, and each arm switches to one. A switch is timed beside what it
replaces: reading the model's folder again.
"""

import itertools
import time
from dataclasses import replace

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment
from minilm.interop import load_adapter, load_model, save_adapter
from minilm.measure.verdict import compared, each_seed, verdict
from minilm.peft import use_adapter
from minilm.picture import COLORS
from minilm.tensor import no_grad
from minilm.trial import (
    KEPT,
    QUICK,
    SHARE,
    Trial,
    base,
    kept,
    learned,
    low_rank,
    program,
    records_of,
    right,
)

QUESTION = "Can one model serve many tasks, if only adapters change places?"

SLIDE = {}  # the lectures give no numbers
ADAPTERS = ("reverse", "upper", "last")
LORA = low_rank(4)
ARMS = {"base model": {"tasks": ADAPTERS, "steps": 0}} | {
    task: LORA | {"tasks": (task,), "steps": 1000} for task in ADAPTERS}
SWITCH, LOAD = "ms to switch", "ms to load the model"
MOVED = "base's logits after all switches, moved by"
MEASURES = {f"{task}, %": 1 for task in ADAPTERS} | {
    KEPT: 0, SHARE: 1, SWITCH: 2, LOAD: 1, MOVED: 0}


def largest(rows, what: str, value, at_most: float):
    """The verdict on the largest value(row) of the adapters, on each seed."""
    rows = [row for row in rows if row["arm"] in ADAPTERS]
    return verdict(each_seed(rows, value), f"largest {what}", at_most=at_most)


CLAIMS = {
    **{f"{task}: its own adapter is better than that of {other}":
       lambda rows, task=task, other=other: compared(rows, f"{task}, %", task, other, at_least=0)
       for task, other in itertools.permutations(ADAPTERS, 2)},
    "a switch takes less than a tenth of loading the model": lambda rows: largest(
        rows, f"{SWITCH} / {LOAD}", lambda row: row[SWITCH] / row[LOAD], at_most=0.1),
    "an adapter is less than a fifth of the model": lambda rows: largest(
        rows, SHARE, lambda row: row[SHARE], at_most=20),
    "the base is what it was, bit for bit": lambda rows: largest(
        rows, MOVED, lambda row: row[MOVED], at_most=1e-9),
}
LIKELY = {"a switch takes less than a tenth of loading the model":
          "so small a model is read in 10 to 15 ms; a switch visits each layer, whatever its size, "
          "and takes 2 to 3"}
SERVED = {}  # settings of a seed -> the model with all adapters, its tokenizer, sizes


def measured(s: Trial, run, title: str) -> dict:
    """What the model answers to each task after a switch, and what the switch takes."""
    own = s.tasks[0] if s.steps else None
    model, tokenizer, sizes = served(s, run)
    seconds = []
    for _ in range(9):
        use_adapter(model, None)
        start = time.perf_counter()
        use_adapter(model, own)
        seconds.append(time.perf_counter() - start)
    found = {}
    for task in ADAPTERS:
        found |= right(model, tokenizer, records_of(replace(s, tasks=(task,)))[1])
    return {**{f"{task}, %": found[f"{task}, %"] for task in ADAPTERS}, **sizes[own],
            SWITCH: 1e3 * float(np.median(seconds)), LOAD: 1e3 * loading(s.model),
            MOVED: moved(model, s)}


def served(s: Trial, run):
    """(a model with the adapter of every task, its tokenizer, the sizes of what each keeps)."""
    lr = s.lr if s.steps else LORA["lr"]
    key = s.model, s.seed, lr
    if key not in SERVED:
        SERVED.clear()
        (model, tokenizer), sizes = base(s.model), {None: {KEPT: 0.0, SHARE: 0.0}}
        for task in ADAPTERS:
            steps = s.steps or (ARMS[task]["steps"] if s.model else QUICK["steps"])
            arm = replace(s, **ARMS[task] | {"steps": steps, "lr": lr})
            alone, own = base(s.model)[0], run.inside(task)
            alone, *_ = learned(alone, tokenizer, records_of(arm)[0], arm, own,
                                f"{task}, seed {s.seed}")
            sizes[task] = kept(alone, tokenizer, arm, own.path / "kept")
            save_adapter(alone, own.path / "adapter")
            load_adapter(model, own.path / "adapter", task)
        SERVED[key] = model, tokenizer, sizes
    return SERVED[key]


def loading(folder: str) -> float:
    """Seconds to read the model's folder, the median of three times."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        load_model(folder) if folder else base("")
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def moved(model, s: Trial) -> float:
    """The largest difference of the base's logits from those of a model that had no adapter."""
    tokens = np.arange(1, 33)[None]
    use_adapter(model, None)
    with no_grad():
        return float(np.abs(model(tokens).data - base(s.model)[0](tokens).data).max())


def draw(figure, rows):
    """What each adapter answers rightly, by task."""
    axes = figure.subplots()
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    for i, (task, color) in enumerate(zip(ADAPTERS, COLORS)):
        scores = [np.mean([row[f"{task}, %"] for row in rows if row["arm"] == arm]) for arm in arms]
        axes.bar(np.arange(len(arms)) + 0.27 * (i - 1), scores, 0.25, color=color, label=task)
    axes.set_xticks(range(len(arms)), [arm if arm == "base model" else f"adapter of {arm}"
                                       for arm in arms])
    axes.set(ylabel="answered rightly, %", ylim=(0, 125))
    axes.legend(frameon=False, ncols=3, title="asked for")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
