"""What distill.py shows: a table of all models, their curves, and one prediction of the teacher."""

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
    """A model, what it learned, and how fast it is."""

    model: Transformer
    curve: list[dict]  # records of held-out loss and accuracy
    evaluates: float = 0.0  # tokens a second on one core
    generates: float = 0.0


def with_speeds(arms: dict[str, Arm], tokens, rounds: int = 7) -> dict[str, Arm]:
    """The arms with their speeds: medians of `rounds`, the models in turn, on one core."""
    tokens, times = tokens[:16], {name: [] for name in arms}
    jobs = [lambda model: model(tokens)]
    sizes = [tokens.size]
    if next(iter(arms.values())).model.config.causal:
        jobs.append(lambda model: generate(model, tokens[:1, :1], tokens.shape[1] - 1))
        sizes.append(tokens.shape[1] - 1)
    with threadpool_limits(1, "blas"), no_grad():
        for _ in tqdm(range(rounds), desc="speeds", unit="turn", leave=False, disable=None):
            for name, arm in arms.items():
                times[name].append([seconds(job, arm.model.eval()) for job in jobs])
    return {name: arm._replace(**dict(zip(("evaluates", "generates"), (
        size / statistics.median(t) for size, t in zip(sizes, zip(*times[name]))))))
        for name, arm in arms.items()}


def seconds(job, *arguments) -> float:
    start = time.perf_counter()
    job(*arguments)
    return time.perf_counter() - start


def size(model) -> int:
    return sum(p.size for p in model.parameters())


def print_table(arms: dict[str, Arm], best: str):
    """One line a model, and what the best student kept."""
    print(f"\n{'':30}{'held out:':>10}{'next token':>12}{'of the':>11}{'':>12}{'':>7}"
          f"{'evaluates':>11}{'generates':>11}\n{'':30}{'loss':>10}{'right':>12}{'teacher':>11}"
          f"{'parameters':>12}{'MB':>7}{'tokens/s':>11}{'tokens/s':>11}")
    top = arms["teacher"].curve[-1]["validation_accuracy"]
    for name, arm in arms.items():
        end, n = arm.curve[-1], size(arm.model)
        right = end["validation_accuracy"]
        print(f"{name:30}{end['validation_loss']:>10.4f}{right:>12.2%}{right / top:>11.1%}{n:>12,}"
              f"{4 * n / 1e6:>7.2f}{arm.evaluates:>11,.0f}{arm.generates:>11,.0f}")
    teacher, student = arms["teacher"], arms[best]
    kept = student.curve[-1]["validation_accuracy"] / top
    faster = [f"{verb} {getattr(student, verb) / getattr(teacher, verb):.2f} times as fast"
              for verb in ("evaluates", "generates") if getattr(teacher, verb)]
    print(f"\nThe student {best} keeps {kept:.1%} of the teacher's accuracy with "
          f"{size(student.model) / size(teacher.model):.1%} of its\nparameters, and "
          f"{' and '.join(faster)}.")


def prediction(teacher, tokenizer, prompt: str, count: int = 8):
    """(the prompt, the likeliest tokens after it, their probabilities at each temperature)."""
    ids = tokenizer.encode(prompt)[-teacher.config.context + 1 :]
    ids = ids if teacher.config.causal else np.append(ids, tokenizer.mask)
    with no_grad():
        logits = teacher.eval()(ids[None]).data[0, -1]
    first = np.argsort(-logits)[:count]
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
    left.set(title="the teacher", xlabel="step", ylabel="held-out loss (nats a token)")
    level = arms[teacher].curve[-1]["validation_accuracy"]
    middle.axhline(level, color="black", linewidth=1, label="teacher")
    middle.axhline(0.97 * level, color="black", linewidth=1, linestyle=":", label="97 % of it")
    for name in students:
        middle.plot(*points(arms[name], "validation_accuracy"), ".-", linewidth=1, label=name)
    middle.legend(frameon=False, fontsize="small")
    middle.set(title="students", xlabel="step", ylabel="held-out tokens right")
    places, width = np.arange(len(tokens)), 0.8 / len(p)
    for i, (T, heights) in enumerate(p.items()):
        right.bar(places + (i - (len(p) - 1) / 2) * width, heights, width, label=f"T = {T}")
    right.set_xticks(places, tokens, family="monospace")
    right.legend(frameon=False)
    right.set(title=f"the teacher after {prompt!r}", xlabel="next token", ylabel="probability")
    figure.savefig(path, dpi=110)
    return path


def points(arm: Arm, what: str):
    """Steps, and the records' values."""
    return [r["step"] for r in arm.curve], [r[what] for r in arm.curve]
