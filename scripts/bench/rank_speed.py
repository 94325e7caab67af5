"""Two ranks of mpiexec against two workers of one process, and how much of their traffic is hidden.

    python scripts/bench/rank_speed.py                 # M in stages 0, 2, 3: six minutes
    python scripts/bench/rank_speed.py --configs S --rounds 5 --stages 2

Each contender waits while another one runs, and they take turns. A ratio is the time of a step by
`Trainer(..., workers=2)` over that of the ranks: above 1 the ranks are faster. The lowest and the
highest ratio of neighbouring turns stand beside it. The goal is 0.9.

What is hidden is told in two ways, those of minilm/parallel/clocked.py and of
experiments/parallel_training.py: by handles it is the share of the time in which calls are under
way that a rank does not wait; by waiting less it is what a rank waits less than if each call is
waited for at once, as a share of that. All that a rank waits for the other one counts. The goal is
a half.

Needs the extra `mpi` with MPICH.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Literal

from benchmark import Contender
from contenders import SHAPES, our_side
from tqdm import tqdm

from minilm.extras import install

GOAL, HIDDEN = 0.9, 0.5
HEAD = ["a step (lowest - highest)", "ratio", "lowest - highest", "under way", "waited",
        "at once: a step", "waited", "hidden by handles", "by waiting less"]


def main(configs: tuple[Literal["S", "M", "L"], ...] = ("M",),
         stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 2, 3), rounds: int = 15,
         order: Literal["ranks", "engine"] = "ranks"):
    """Print a table for each config.

    Args:
        configs: sizes of the model.
        stages: of the ranks.
        rounds: turns of each contender.
        order: of sums; that of ranks, as training programs have it, or MPI's own.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for name in configs:
        workers, ranks = turns(name, stages, rounds + 1, order)
        print(f"\nA step of {name}: two cores, BLAS with one thread on each, {rounds} turns\n\n"
              f"{' | '.join(['|', *HEAD])} |\n|{'---|' * (len(HEAD) + 1)}\n"
              f"| two workers | {spread(workers)} |" + " |" * (len(HEAD) - 1), flush=True)
        for stage, answers in zip(stages, ranks):
            print(line(f"two ranks, stage {stage}", workers, answers), flush=True)


def turns(name, stages, rounds, order):
    """(seconds of a step by workers, for each stage what Ranks.run gives, in each turn)."""
    ranks = [Ranks(name, stage, order) for stage in stages]
    try:
        with Contender(our_side, "train", SHAPES[name], False) as workers:
            found = [(workers.run(), [r.run() for r in ranks])
                     for _ in tqdm(range(rounds), unit="turn", leave=False, disable=None)]
    finally:
        for r in ranks:
            r.close()
    return [a for a, _ in found[1:]], [*zip(*(b for _, b in found[1:]))]  # the first one warms up


def line(title, workers, answers) -> str:
    """A row of the table."""
    seconds, waited, under_way, blocked, at_once = (list(column) for column in zip(*answers))
    ratios = [a / b for a, b in zip(workers, seconds)]
    ratio = statistics.median(workers) / statistics.median(seconds)
    middle = [statistics.median(column) for column in (under_way, waited, blocked, at_once)]
    hidden = [1 - middle[1] / whole for whole in (middle[0], middle[3])]
    cells = [title, spread(seconds), f"{ratio:.2f}{mark(ratio, GOAL)}",
             f"{min(ratios):.2f} - {max(ratios):.2f}", *(f"{1e3 * x:.1f} ms" for x in middle),
             *(f"{share:.0%}{mark(share, HIDDEN)}" for share in hidden)]
    return f"| {' | '.join(cells)} |"


def mark(value, goal) -> str:
    return "" if value >= goal else f" (goal: {goal:g})"


def spread(seconds) -> str:
    low, middle, high = (1e3 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:.1f} ms ({low:.1f} - {high:.1f})"


class Ranks:
    """Two ranks that wait, and make a turn when asked to."""

    def __init__(self, name, stage, order):
        here = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
        if here is None:
            raise ImportError(f"there is no mpiexec: {install('mpi')}")
        program = Path(__file__).with_name("rank_side.py")
        self.process = subprocess.Popen(
            [here, "-n", "2", sys.executable, program, name, str(stage), order],
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True)

    def run(self) -> list[float]:
        """Seconds: (of a step; that it waited; that calls were under way; of a step whose calls are
        waited for at once; that this one waited).
        """
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        if not (said := self.process.stdout.readline()):
            raise RuntimeError("the ranks have ended; their message is above")
        return json.loads(said)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


if __name__ == "__main__":
    from minilm.command import command  # here, so that the others' processes do not load it

    command(main)
