"""What adapters cost when a model is used: the time of a forward pass and of generation.

    python scripts/experiments/latency.py            # five minutes
    python scripts/experiments/latency.py --quick    # seconds; the numbers mean nothing

Lecture 002 shows table 1 of Hu et al. 2021, arXiv:2106.09685: GPT-2 medium with adapters of up to
11 million parameters, 3 % of the model, in milliseconds. Merged LoRA is the model itself, so its
line is that of full fine-tuning. Adapters after each MLP (L), or after attention too (H), take
longer, most at batch 1 with a short text. They add few operations, but more steps one after the
other.

Here a GPT-2 of 4 blocks of width 384 (7 million weights) takes texts a quarter as long. LoRA of
rank 8 on all linear layers and both adapters have about 220,000 parameters, again 3 %. Their
numbers are random, as time does not depend on them. "Merged" is what generate.py makes of LoRA:
plain layers with the weights W + (alpha / r) B A. "Beside" leaves A and B where they were trained,
in eq. (3) of the paper. Both compute the same, W x + (alpha / r) B A x, up to rounding: the tests
allow an op in float32 5 millionths of the largest number.

In each turn all arms run once, in an order drawn anew. A cost is the median of the turns' ratios.
The clock counts the seconds of this process on one core, so other processes do not count.
"""

import statistics
import time
from functools import lru_cache, partial

import numpy as np
from threadpoolctl import threadpool_limits

from minilm.backend import tune_allocator
from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.generate import generate
from minilm.graph import no_dropout
from minilm.measure.speed import in_turn, ratio
from minilm.measure.verdict import compared, single, verdict
from minilm.peft import add_bottleneck, add_lora, merge_lora, trainable_parameters, unload_lora
from minilm.peft.adapted import adapted_layers
from minilm.picture import COLORS
from minilm.tensor import Tensor, no_grad
from minilm.transformer import Config, Transformer

QUESTION = "What do LoRA and adapters cost at inference, and what is left of it after merging?"

SLIDE = {
    "lecture 002: 32 x 512, ms": {
        "base": 1449.4, "LoRA merged": 1449.4, "adapter L": 1482.0, "adapter H": 1492.2},
    "lecture 002: 16 x 256, ms": {
        "base": 338.0, "LoRA merged": 338.0, "adapter L": 354.8, "adapter H": 366.3},
    "lecture 002: 1 x 128, ms": {
        "base": 19.8, "LoRA merged": 19.8, "adapter L": 23.9, "adapter H": 25.8},
    "lecture 002: 32 x 512, over base, %": {"adapter L": 2.2, "adapter H": 3.0},
    "lecture 002: 16 x 256, over base, %": {"adapter L": 5.0, "adapter H": 8.4},
    "lecture 002: 1 x 128, over base, %": {"adapter L": 20.7, "adapter H": 30.3},
}
ARMS = ("base", "LoRA merged", "LoRA beside", "adapter L", "adapter H")
JOBS = {"32 x 128": 15, "16 x 64": 15, "1 x 32": 61, "64 tokens": 25}  # texts x tokens -> turns
NEW = "64 tokens"  # are generated for one text
LOGITS, LAYERS = "logits off those of LoRA beside, ppm", "layers off W x + B A x, ppm"
ADDED = "added parameters"


def ms(job: str) -> str:
    return f"{job}, ms"


def over(job: str) -> str:
    return f"{job}, over base, %"


MEASURES = {ms(job): 1 for job in JOBS} | {over(job): 1 for job in JOBS} | {
    ADDED: 0}  # LAYERS and LOGITS mean something for LoRA alone: the claims have them


TWICE = "adapter H costs more than adapter L: 1 x 32"
LIKELY = {
    TWICE: "adapter L has a LayerNorm of its own, which is half of its cost, and H has none. In "
           "101 other turns L took 5.8 % over base, 2.7 % without that norm (form P), and H, which "
           "stands in a block twice, 3.5 %",
}
CLAIMS = {
    f"merged LoRA adds no latency, up to 3 %: {job}":
        lambda rows, job=job: single(rows, over(job), "LoRA merged", at_most=3) for job in JOBS
} | {
    f"{arm} adds latency: {job}":
        lambda rows, arm=arm, job=job: single(rows, over(job), arm, at_least=0)
    for arm in ARMS[2:] for job in JOBS
} | {
    f"{arm} costs more than at 32 x 128, in %: {job}":
        lambda rows, arm=arm, job=job: verdict(
            [r[over(job)] - r[over("32 x 128")] for r in rows if r["arm"] == arm],
            f"{arm}: over base, {job} - 32 x 128, %", at_least=0)
    for arm in ARMS[2:] for job in ("1 x 32", NEW)
} | {
    TWICE:
        lambda rows: compared(rows, over("1 x 32"), "adapter H", "adapter L", at_least=0),
} | {
    f"each layer gives W x + B A x, up to 5 ppm in float32: {arm}":
        lambda rows, arm=arm: single(rows, LAYERS, arm, at_most=5) for arm in ARMS[1:3]
} | {
    "the logits of merged LoRA are those of LoRA beside, up to 5 ppm":
        lambda rows: single(rows, LOGITS, "LoRA merged", at_most=5),
}


def models(seed: int, quick: bool) -> dict[str, Transformer]:
    """Each arm's model. All have the same base weights, and both LoRAs the same A and B."""
    config = Config.gpt2(512, 256, 4, 6, 384) if not quick else Config.gpt2(64, 32, 2, 2, 16)
    r, in_L, in_H = (8, 71, 35) if not quick else (2, 4, 2)
    def base(): return Transformer(config, seed)
    def lora(): return numbers_for(add_lora(base(), r, 2 * r, "all-linear", seed=seed), seed)
    found = {"base": base(), "LoRA merged": unload_lora(merge_lora(lora())), "LoRA beside": lora(),
             "adapter L": numbers_for(add_bottleneck(base(), in_L, "L", seed=seed), seed),
             "adapter H": numbers_for(add_bottleneck(base(), in_H, "H", seed=seed), seed)}
    return {arm: found[arm].eval() for arm in ARMS}


def numbers_for(model, seed: int):
    """Random numbers for what starts as zeros, of a size that makes B A as large as W."""
    rng = np.random.default_rng([seed, 1])
    for p in trainable_parameters(model):
        if not p.data.any():
            p.data[...] = 0.05 * rng.standard_normal(p.shape, dtype=p.dtype)
    return model


def jobs_of(seed: int, quick: bool) -> dict:
    """Job -> (what a model has to do, turns)."""
    rng, found = np.random.default_rng([seed, 2]), {}
    for job, turns in JOBS.items():
        if job == NEW:
            start, count = rng.integers(0, 64, (1, 1)), 4 if quick else 64
            work = partial(generate, tokens=start, max_new_tokens=count, temperature=0)
        else:
            B, T = (2, 4) if quick else map(int, job.split(" x "))
            work = partial(Transformer.__call__, tokens=rng.integers(0, 64, (B, T)))
        found[job] = work, 3 if quick else turns
    return found


@lru_cache(1)
def all_arms(seed: int, quick: bool) -> dict[str, dict]:
    """arm -> its row. The arms take turns, so they are measured together."""
    tune_allocator()
    arms, rng = models(seed, quick), np.random.default_rng([seed, 3])
    rows = {arm: {ADDED: sum(p.size for p in trainable_parameters(model))
                  if adapted_layers(model) else 0} for arm, model in arms.items()}
    with threadpool_limits(1, "blas"), no_grad(), no_dropout():
        for job, (work, turns) in jobs_of(seed, quick).items():
            calls = {arm: partial(work, model) for arm, model in arms.items()}
            times = in_turn(calls, turns, rng, time.process_time, title=job)
            for arm, found in times.items():
                rows[arm][ms(job)] = 1e3 * statistics.median(found)
                rows[arm][over(job)] = 100 * (ratio(found, times["base"]) - 1)
        for arm, model in arms.items():
            rows[arm][LAYERS] = layers_off(model, arms["LoRA beside"], rng)
            rows[arm][LOGITS] = logits_off(model, arms["LoRA beside"], seed)
    return rows


def layers_off(model, beside, rng) -> float:
    """The largest distance of a layer's output from W x + b + (alpha / r) B A x in float64, in
    millionths of the largest number."""
    modules, worst = dict(model.named_modules()), 0.0
    for path, layer in adapted_layers(beside).items():
        lora, base = layer.adapters["default"], layer.base
        W, b, A, B = (t.data.astype(float) for t in (base.weight, base.bias, lora.A, lora.B))
        x = rng.standard_normal((64, W.shape[1]), dtype=np.float32)
        h = x @ W.T + b + lora.scale * (x @ A.T) @ B.T
        worst = max(worst, np.abs(modules[path](Tensor(x)).data - h).max() / np.abs(h).max())
    return float(1e6 * worst)


def logits_off(model, beside, seed: int) -> float:
    """The largest distance of the logits, in millionths of the largest one."""
    tokens = np.random.default_rng([seed, 4]).integers(0, 64, (4, 32))
    a, b = model(tokens).data, beside(tokens).data
    return float(1e6 * np.abs(a - b).max() / np.abs(b).max())


def measured(arm: str, seed: int, quick: bool) -> dict:
    """The numbers of one arm."""
    return all_arms(seed, quick)[arm]


def draw(figure, rows):
    """The cost of each arm by job: bars for the mean, dots for seeds, rings for the slide."""
    axes, width = figure.subplots(), 0.2
    slide = [SLIDE[source] for source in SLIDE if "over" in source]
    for i, (arm, color) in enumerate(zip(ARMS[1:], COLORS)):
        x = np.arange(len(JOBS)) + (i - 1.5) * width
        y = np.array([[r[over(job)] for job in JOBS] for r in rows if r["arm"] == arm])
        axes.bar(x, y.mean(0), 0.9 * width, color=color, alpha=0.6, label=arm)
        axes.plot(x, y.T, "o", color=color, markersize=3, markeredgewidth=0)
        for place, numbers in zip(x, slide):
            if arm in numbers:
                axes.plot(place, numbers[arm], "o", color=color, markersize=6, fillstyle="none")
    axes.plot([], [], "o", color=COLORS[5], markersize=6, fillstyle="none",
              label="slide, 4 x the tokens")
    axes.set_xticks(range(len(JOBS)), [*list(JOBS)[:-1], f"{NEW}\nafter one"])
    axes.set(xlabel="texts x tokens; generation", ylabel="time over base, %")
    axes.legend(frameon=False)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
