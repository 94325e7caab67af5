"""Where the time of our training step goes, by kind, for one worker and for two.

    python scripts/bench/profile_step.py
    python scripts/bench/profile_step.py --configs M --steps 30 --threads

It prints a table for each size: milliseconds of a step by kind, for one worker, and for both of
two. Each column adds up to the step. "Waiting" is for the other worker: for its gradients' turn, or
for its result; the second worker also waits while the first one does what only one does. Then it
prints the products by shape, with operations a second as a share of what large products reach.

The package is not changed: stopwatch.py is put around its functions from outside. Steps with it and
without take turns, and the last line says how much longer those with it take.
"""

import contextlib
import statistics
from typing import Literal

from contenders import CORES, SHAPES, our_config, our_trainer
from floor import operations, rates
from stopwatch import CLOCK, KINDS, PRODUCT, WAITING, around_the_package, report, switch
from tqdm import tqdm

from minilm.command import command
from minilm.ranges import check, whole

RANGES = {"steps": whole(1)}


def main(configs: tuple[Literal["S", "M", "L", "nanoGPT"], ...] = ("S", "M", "L"), steps: int = 10,
         threads: bool = False):
    """Print where the time of a training step goes.

    Args:
        configs: sizes of the model, as in benchmark.py.
        steps: how many steps are measured, beside as many without the stopwatch.
        threads: use threads as workers, not processes; then Python's kinds hold waiting for the
            interpreter's lock as well.
    """
    check(RANGES, steps=steps)
    with around_the_package():
        for name in configs:
            found = {workers: profiled(SHAPES[name], workers, steps, threads)
                     for workers in (1, CORES)}
            print(*table(name, found), "", *shapes_table(name, found), "", sep="\n", flush=True)


class Profile:
    """What some steps took.

    plain, watched: seconds of each step without the stopwatch and with it. spent, calls: for each
    worker, kind -> seconds and number in all watched steps. rate: operations a second of large
    products, all workers together.
    """

    def __init__(self, rate, shape):
        self.plain, self.watched, self.rate, self.shape = [], [], rate, shape
        self.spent, self.calls = [], []

    @property
    def step(self) -> float:
        """Mean seconds of a watched step, to which the kinds add up."""
        return statistics.fmean(self.watched)

    def add(self, reports):
        """What each worker says of a step."""
        if not self.spent:
            self.spent, self.calls = [{} for _ in reports], [{} for _ in reports]
        for worker, (spent, calls) in enumerate(reports):
            for sums, more in ((self.spent[worker], spent), (self.calls[worker], calls)):
                for kind, number in more.items():
                    sums[kind] = sums.get(kind, 0) + number

    def kinds(self, worker) -> dict[str, float]:
        """Kind -> mean seconds of a step; they add up to the step."""
        sums = dict.fromkeys(KINDS, 0.0)
        for kind, seconds in self.spent[worker].items():
            is_shape = not isinstance(kind, str)  # a product's kind, see stopwatch.py
            sums[PRODUCT if is_shape else kind] += seconds / len(self.watched)
        if worker:  # the second one: while no function of the package ran, it waited for work
            sums[WAITING] += self.step - sum(sums.values())
        return sums


def profiled(shape, workers: int, steps: int, threads: bool) -> Profile:
    """Measure our training step, with the stopwatch and without it in turn."""
    from threadpoolctl import threadpool_limits

    from minilm.transformer import Transformer

    with threadpool_limits(1, "blas"):  # as each of several workers has
        with contextlib.closing(rates(threads, workers)) as measured:  # its workers end here
            found = Profile(next(measured), shape)
        model, batch = Transformer(our_config(shape)), shape.tokens()
        with our_trainer(model, shape, threads, workers=workers) as trainer:
            def everywhere(method, *args):
                return trainer.workers.run(method, [args] * workers)
            for i in tqdm(range(-2, steps), unit="step", leave=False, disable=None):
                everywhere(switch, False)
                plain = trainer.step(0, batch).seconds
                everywhere(switch, True)
                watched = CLOCK.whole(lambda: trainer.step(0, batch))
                reports = everywhere(report)
                if i >= 0:  # the first two warm up
                    found.plain.append(plain)
                    found.watched.append(watched)
                    found.add(reports)
            everywhere(switch, False)
    return found


def table(name, found: dict[int, Profile]) -> list[str]:
    """Lines: milliseconds of a step by kind, and the share of it."""
    columns = [(profile, worker) for n, profile in found.items() for worker in range(n)]
    heads = [f"{'one worker' if n == 1 else f'worker {worker + 1} of {n}'}, ms | %"
             for n in found for worker in range(n)]
    lines = [f"| {name} | {' | '.join(heads)} |", "|---" + "|---" * 2 * len(heads) + "|"]
    kinds = [profile.kinds(worker) for profile, worker in columns]
    for kind in KINDS:
        cells = [f"{1e3 * k[kind]:.2f} | {100 * k[kind] / profile.step:.1f}"
                 for k, (profile, _) in zip(kinds, columns)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    sums = [f"{1e3 * sum(k.values()):.2f} | {100 * sum(k.values()) / p.step:.1f}"
            for k, (p, _) in zip(kinds, columns)]
    lines.append(f"| the step | {' | '.join(sums)} |")
    for n, profile in found.items():
        plain = statistics.median(profile.plain)
        more = statistics.median(profile.watched) / plain - 1
        floor = operations(profile.shape) / profile.rate
        lines.append(f"\n{n} worker{'s' * (n > 1)}: {1e3 * plain:.2f} ms without the stopwatch, "
                     f"{100 * more:+.1f} % with it; the floor is {1e3 * floor:.2f} ms, "
                     f"{100 * floor / plain:.0f} % of the step "
                     f"(at {profile.rate / 1e9:.0f} GFLOP/s)")
    return lines


def shapes_table(name, found: dict[int, Profile]) -> list[str]:
    """Lines: the first worker's products by shape, longest first."""
    lines = [f"| products, {name} | a step | ms | GFLOP/s | of large ones |", "|---" * 5 + "|"]
    for n, profile in found.items():
        spent, calls, steps = profile.spent[0], profile.calls[0], len(profile.watched)
        shapes = sorted((k for k in spent if not isinstance(k, str)), key=lambda k: -spent[k])
        for rows, inner, columns in shapes:
            count, seconds = calls[rows, inner, columns], spent[rows, inner, columns]
            rate = 2 * rows * inner * columns * count / seconds
            lines.append(f"| ({rows}, {inner}) ({inner}, {columns}), {n} worker{'s' * (n > 1)} | "
                         f"{count / steps:.0f} | {1e3 * seconds / steps:.2f} | {rate / 1e9:.0f} | "
                         f"{100 * rate * n / profile.rate:.0f} % |")
    return lines


if __name__ == "__main__":
    command(main)
