"""How long things take, side by side: jobs that take turns, and how fast models evaluate and write.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from minilm.generate import generate
from minilm.graph import no_dropout
from minilm.tensor import no_grad


def in_turn(jobs: dict[str, Callable], rounds: int, rng=None, clock: Callable | None = None,
            title: str = "speeds") -> dict[str, list[float]]:
    """Seconds that each job takes in each round.

    In a round every job runs once, so a change of the machine's speed affects all of them. rng: a
    Generator that draws the order of each round; without it the order is that of jobs. clock: gives
    seconds, by default time.perf_counter. title: of the progress bar.
    """
    clock, times = clock or time.perf_counter, {name: [] for name in jobs}
    for _ in tqdm(range(rounds), desc=title, unit="turn", leave=False, disable=None):
        names = list(jobs)
        if rng:
            rng.shuffle(names)
        for name in names:
            start = clock()
            jobs[name]()
            times[name].append(clock() - start)
    return times


def ratio(times: list[float], base: list[float]) -> float:
    """How many times as long as `base`: the median of the rounds' ratios.

    >>> ratio([2.0, 40.0, 9.0], [1.0, 10.0, 9.0])  # 2, 4 and 1 times as long
    2.0
    """
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def speeds(models: dict, tokens, rounds: int = 7) -> dict[str, list[float]]:
    """Tokens a second on one core: evaluating 16 rows and, if the model is causal, generating one.

    tokens: (R, T). The models take turns in `rounds` rounds. Returns the medians by name: one
    number for each job.
    """
    rows, T = tokens[:16], tokens.shape[1]
    jobs = [(rows.size, lambda model: model(rows))]
    if next(iter(models.values())).config.causal:
        jobs.append((T - 1, lambda model: generate(model, rows[:1, :1], T - 1)))
    calls = {(name, i): partial(job, model) for name, model in models.items()
             for i, (_, job) in enumerate(jobs)}
    with threadpool_limits(1, "blas"), no_grad(), no_dropout():
        times = in_turn(calls, rounds)
    return {name: [n / statistics.median(times[name, i]) for i, (n, _) in enumerate(jobs)]
            for name in models}
