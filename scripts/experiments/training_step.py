"""Is a training step of LoRA faster or slower than one of full fine-tuning, and why?

    python scripts/experiments/training_step.py            # three minutes
    python scripts/experiments/training_step.py --quick    # seconds; the numbers mean nothing

Two slides contradict each other. Lecture 004 says of adapters of low rank: "the forward and
backward pass is approximately twice as slow, due to the additional matrix multiplications in the
adapter layers". Lecture 001 says of LoRA: "much faster" than full fine-tuning, with less memory.

The arithmetic says neither. On N rows and a layer of I to O, full training takes 6 N I O
operations: the output, the gradient of the input, that of the weight. LoRA leaves out the last and
takes 4 N I O + 6 N r (I + O). That is two thirds of full training, and a little. It is more than
full training only if r > I O / (3 (I + O)), for a square layer a sixth of its width.
minilm/measure/flops.py has the formulas, with attention and the head, and without what is no
product of matrices: norms, GELU, the loss, AdamW. The clock sees all of it. Much of AdamW's work is
the other thing that LoRA saves.

Here are two GPT-2s: S has 4 blocks of width 128 and a batch of 12 x 64 tokens, M has 6 of width
384 and 8 x 256. r is 8, float32. A step is what `Trainer.step` does, with the workers that
training programs have by default: every core, processes on Linux. In each turn all arms make one
step, in an order drawn anew. A share is the median of the turns' ratios. The memory is that of a
step in one process: weights, gradients, AdamW's states and all that is alive at the highest moment.
"""

import statistics
from contextlib import ExitStack
from functools import cache, lru_cache, partial

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.measure.flops import flops
from minilm.measure.memory import make_model
from minilm.measure.memory import measured as memory
from minilm.measure.speed import in_turn, ratio
from minilm.measure.step import Step
from minilm.measure.verdict import single, verdict
from minilm.optim import AdamW
from minilm.parallel.cores import default_workers
from minilm.picture import COLORS
from minilm.train import Trainer
from minilm.transformer import Config

QUESTION = "Is a training step of LoRA faster or slower than one of full fine-tuning?"

SLIDE = {"lecture 004: time of a step, % of full": {
    "full": 100, "LoRA, q v": 200, "LoRA, all-linear": 200}}
ARMS = {
    "full": {"method": "full"},
    "LoRA, q v": {"method": "lora", "targets": ("q", "v")},
    "LoRA, all-linear": {"method": "lora", "targets": "all-linear"},
}
SIZES = {  # (a GPT-2, texts and tokens of a batch, turns)
    "S": (Config.gpt2(256, 64, layers=4, heads=4, width=128), 12, 64, 61),
    "M": (Config.gpt2(512, 256, layers=6, heads=6, width=384), 8, 256, 15),
}
QUICK = Config.gpt2(64, 16, layers=1, heads=2, width=16), 2, 8, 3


def time(size): return f"{size}: time, % of full"
def work(size): return f"{size}: operations, % of full"


MEASURES = {}
for size in SIZES:
    MEASURES |= {f"{size}: ms a step": 1, time(size): 1, f"{size}: GFLOP a step": 2, work(size): 1,
                 f"{size}: memory, MB": 1, f"{size}: memory, % of full": 1}


def claims_at(size: str) -> dict:
    """The slides' claims, each for the arm that is the likeliest to fulfil it; then our own."""
    few, many = "LoRA, q v", "LoRA, all-linear"

    def as_counted(rows):
        apart = [r[time(size)] - r[work(size)] for r in rows if r["arm"] == many]
        return verdict(apart, f"{many}: {size}: time - operations, % of full", -10, 10)

    return {
        f"004: LoRA's step takes twice as long, 150 to 250 %: {many}, {size}":
            lambda rows: single(rows, time(size), many, at_least=150, at_most=250),
        f"001: LoRA's step is much faster, at most 50 %: {few}, {size}":
            lambda rows: single(rows, time(size), few, at_most=50),
        f"LoRA's step is faster at all: {few}, {size}":
            lambda rows: single(rows, time(size), few, at_most=100),
        f"LoRA's step is faster at all: {many}, {size}":
            lambda rows: single(rows, time(size), many, at_most=100),
        f"001: LoRA takes less memory: {many}, {size}":
            lambda rows: single(rows, f"{size}: memory, % of full", many, at_most=100),
        f"time goes with the operations, within 10 points: {many}, {size}": as_counted,
    }


CLAIMS = claims_at("S") | claims_at("M")


def steps_of(size: str, quick: bool) -> dict[str, Step]:
    """Each arm's step, for the formulas."""
    config, batch, T, _ = QUICK if quick else SIZES[size]
    return {arm: Step(config, batch=batch, T=T, r=2 if quick else 8, **settings)
            for arm, settings in ARMS.items()}


@lru_cache(1)
def times(seed: int, quick: bool) -> dict[str, dict[str, list[float]]]:
    """size -> arm -> seconds of a step in each turn."""
    rng = np.random.default_rng(seed)
    return {size: turns_of(steps_of(size, quick), (QUICK if quick else SIZES[size])[-1], rng,
                           *((1, False) if quick else default_workers())) for size in SIZES}


def turns_of(steps: dict[str, Step], turns: int, rng, cores: int, processes: bool):
    """arm -> seconds of a step in each turn."""
    with ExitStack() as stack:
        jobs = {}
        for arm, step in steps.items():
            model, vocabulary = make_model(step), step.config.vocab_size
            optimizer = AdamW(model.parameters(), 1e-3, weight_decay=0.0)
            trainer = stack.enter_context(Trainer(model, optimizer, cores, processes))
            batch = tuple(rng.integers(0, vocabulary, (2, step.batch, step.T)))
            jobs[arm] = partial(trainer.step, 0, batch)
        for job in jobs.values():
            job()  # fills caches
        return in_turn(jobs, turns, rng, title="steps")


@cache
def megabytes(step: Step) -> float:
    """The memory of a step."""
    return sum(memory(step).values()) / 1e6


def measured(arm: str, seed: int, quick: bool) -> dict:
    """The numbers of one arm."""
    row = {}
    for size in SIZES:
        steps, seconds = steps_of(size, quick), times(seed, quick)[size]
        step, full = steps[arm], steps["full"]
        row |= {
            f"{size}: ms a step": 1e3 * statistics.median(seconds[arm]),
            time(size): 100 * ratio(seconds[arm], seconds["full"]),
            f"{size}: GFLOP a step": flops(step).total / 1e9,
            work(size): 100 * flops(step).total / flops(full).total,
            f"{size}: memory, MB": megabytes(step),
            f"{size}: memory, % of full": 100 * megabytes(step) / megabytes(full)}
    return row


def draw(figure, rows):
    """Time and operations of each arm, as shares of full training's, beside the slide's."""
    axes, width = figure.subplots(), 0.25
    names = [f"{arm}\n{size}" for size in SIZES for arm in list(ARMS)[1:]]
    places = np.arange(len(names))
    for i, (name, what, color) in enumerate([("time", time, COLORS[0]),
                                             ("operations", work, COLORS[1])]):
        y = np.array([[r[what(size)] for r in rows if r["arm"] == arm]
                      for size in SIZES for arm in list(ARMS)[1:]])
        axes.bar(places + (i - 0.5) * width, y.mean(1), 0.9 * width, color=color, alpha=0.6,
                 label=name)
        axes.plot(places + (i - 0.5) * width, y, "o", color=color, markersize=3,
                  markeredgewidth=0)
    for height, label in ((100, "full"), (200, "lecture 004")):
        axes.axhline(height, color=COLORS[5], linewidth=1, linestyle="--")
        axes.text(0.99, height + 2, label, color=COLORS[5], ha="right",
                  transform=axes.get_yaxis_transform())
    axes.set_xticks(places, [name.replace("LoRA, ", "") for name in names])
    axes.set(xlabel="LoRA on these layers, size of the model", ylabel="of full training, %",
             ylim=(0, 225))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.66))


FEWER = ("full training multiplies three times for a weight, LoRA twice and a little, so its step "
         "takes two thirds or more")
LIKELY = {claim: FEWER for claim in CLAIMS if claim.startswith(("004", "001: LoRA's step"))}
EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
