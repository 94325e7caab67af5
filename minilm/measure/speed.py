"""How fast models evaluate and generate, side by side."""

import statistics
import time

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from minilm.generate import generate
from minilm.graph import no_dropout
from minilm.tensor import no_grad


def speeds(models: dict, tokens, rounds: int = 7) -> dict[str, list[float]]:
    """Tokens a second on one core: evaluating 16 rows and, if the model is causal, generating one.

    tokens: (R, T). The models take turns in `rounds` rounds. Returns the medians by name: one
    number for each job.
    """
    rows, T = tokens[:16], tokens.shape[1]
    jobs = [(rows.size, lambda model: model(rows))]
    if next(iter(models.values())).config.causal:
        jobs.append((T - 1, lambda model: generate(model, rows[:1, :1], T - 1)))
    times = {name: [[] for _ in jobs] for name in models}
    with threadpool_limits(1, "blas"), no_grad(), no_dropout():
        for _ in tqdm(range(rounds), desc="speeds", unit="turn", leave=False, disable=None):
            for name, model in models.items():
                for (_, job), found in zip(jobs, times[name]):
                    start = time.perf_counter()
                    job(model)
                    found.append(time.perf_counter() - start)
    return {name: [n / statistics.median(t) for (n, _), t in zip(jobs, found)]
            for name, found in times.items()}
