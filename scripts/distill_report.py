"""What distill.py shows: a table of all models, their curves, and one prediction of the teacher."""

import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from minilm import ops
from minilm.generate import generate
from minilm.tensor import no_grad
from minilm.transformer import Transformer

TEMPERATURES = (1, 2, 4)


class Arm(NamedTuple):
    """A model, and the records of its held-out loss and accuracy."""

    model: Transformer
    curve: list[dict]


def speeds(arms: dict[str, Arm], tokens, rounds: int = 7) -> dict[str, list[float]]:
    """Tokens a second on one core, evaluating 16 rows and, if causal, generating one row.

    Medians of rounds, in which the models take turns.
    """
    rows, T = tokens[:16], tokens.shape[1]
    jobs = [(rows.size, lambda model: model(rows))]
    if next(iter(arms.values())).model.config.causal:
        jobs.append((T - 1, lambda model: generate(model, rows[:1, :1], T - 1)))
    times = {name: [[] for _ in jobs] for name in arms}
    with threadpool_limits(1, "blas"), no_grad():
        for _ in tqdm(range(rounds), desc="speeds", unit="turn", leave=False, disable=None):
            for name, arm in arms.items():
                for (_, job), found in zip(jobs, times[name]):
                    start = time.perf_counter()
                    job(arm.model.eval())
                    found.append(time.perf_counter() - start)
    return {name: [n / statistics.median(t) for (n, _), t in zip(jobs, found)]
            for name, found in times.items()}


def size(model) -> int:
    return sum(p.size for p in model.parameters())


def print_table(arms: dict[str, Arm], speed: dict[str, list[float]], student: str):
    """One line a model, and what this student kept."""
    verbs = ["evaluates", "generates"][: len(speed[student])]
    print(f"\n{'':30}{'held out:':>9}{'tokens':>9}{'of the':>10}{'':19}"
          + "".join(f"{verb:>11}" for verb in verbs)
          + f"\n{'':30}{'loss':>9}{'right':>9}{'teacher':>10}{'parameters':>12}{'MB':>7}"
          + len(verbs) * f"{'tokens/s':>11}")
    top = arms["teacher"].curve[-1]["validation_accuracy"] or math.nan
    for name, arm in arms.items():
        end, n = arm.curve[-1], size(arm.model)
        right = end["validation_accuracy"]
        print(f"{name:30}{end['validation_loss']:>9.4f}{right:>9.2%}{right / top:>10.1%}{n:>12,}"
              f"{4 * n / 1e6:>7.2f}" + "".join(f"{v:>11,.0f}" for v in speed[name]))
    kept = arms[student].curve[-1]["validation_accuracy"] / top
    faster = [f"{verb} {mine / its:.2f} times as fast"
              for verb, mine, its in zip(verbs, speed[student], speed["teacher"])]
    print(f"\nThe distilled student keeps {kept:.1%} of the teacher's accuracy with "
          f"{size(arms[student].model) / size(arms['teacher'].model):.1%} of its parameters, and\n"
          f"{' and '.join(faster)}, on one core.")


def prediction(teacher, tokenizer, prompt: str, count: int = 8):
    """(the prompt, the likeliest tokens after it, their probabilities at each temperature)."""
    ids = tokenizer.encode(prompt)[-teacher.config.context + 1 :]
    ids = ids if teacher.config.causal else np.append(ids, tokenizer.mask)
    with no_grad():
        logits = teacher.eval()(ids[None]).data[0, -1]
    first = np.argsort(-logits[: tokenizer.vocab_size])[:count]  # there may be more, unused
    def name(id): return "end" if id == tokenizer.end else repr(tokenizer.decode([id]))[1:-1]
    p = {T: ops.softmax(logits / T).data[first] for T in TEMPERATURES}
    return prompt, [name(id).replace(" ", "\u2423") for id in first], p


def draw(path: Path, arms: dict[str, Arm], prompt: str, tokens, p) -> Path | None:
    """Curves of the teacher and of the students, and a prediction; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    teacher, *students = arms
    left.plot(*points(arms[teacher], "validation_loss"), ".-", color="black", linewidth=1)
    end = arms[teacher].curve[-1]["validation_loss"]
    left.set(title="the teacher", xlabel="step", ylabel="held-out loss (nats a token)",
             ylim=(0.9 * end, 1.8 * end))
    level, *_ = ends = [arm.curve[-1]["validation_accuracy"] for arm in arms.values()]
    middle.axhline(level, color="black", linewidth=1, label="teacher")
    middle.axhline(0.97 * level, color="black", linewidth=1, linestyle=":", label="97 % of it")
    for name in students:
        middle.plot(*points(arms[name], "validation_accuracy"), ".-", linewidth=1, label=name)
    middle.legend(loc="lower right", fontsize="small")
    middle.set(title="students", xlabel="step", ylabel="held-out tokens right",
               ylim=(min(0.7 * level, *ends), 1.03 * max(ends) or 1))
    places, width = np.arange(len(tokens)), 0.8 / len(p)
    for i, (T, heights) in enumerate(p.items()):
        right.bar(places + (i - (len(p) - 1) / 2) * width, heights, width, label=f"T = {T}")
    right.set_xticks(places, tokens, family="monospace", parse_math=False)
    right.legend(frameon=False)
    right.set_title(f"the teacher after {prompt!r}", parse_math=False)
    right.set(xlabel="next token", ylabel="probability")
    figure.savefig(path, dpi=110)
    return path


def points(arm: Arm, what: str):
    """Steps, and the records' values."""
    return [r["step"] for r in arm.curve], [r[what] for r in arm.curve]
