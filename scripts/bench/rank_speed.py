"""Two ranks of mpiexec against two workers of one process, and how much of their traffic is hidden.

    python scripts/bench/rank_speed.py                 # M in stages 0, 2, 3: ten minutes
    python scripts/bench/rank_speed.py --configs S --rounds 5 --stages 2
    python scripts/bench/rank_speed.py --device cuda --stages 0 2      # what NCCL adds

Each contender waits while another one runs, and they take turns. A ratio is the time of a step by
`Trainer(..., workers=2)` over that of the ranks: above 1 the ranks are faster. The lowest and the
highest ratio of neighbouring turns stand beside it. The goal is 0.9.

What is hidden is told in two ways, those of minilm/parallel/clocked.py and of
experiments/parallel_training.py: by handles it is the share of the time in which calls are under
way that a rank does not wait; by waiting less it is what a rank waits less than if each call is
waited for at once, as a share of that. All that a rank waits for the other one counts. The goal is
a half.

With --device cuda one rank of mpiexec, which calls NCCL, takes turns with the same program without
mpiexec, which needs no NCCL. The goal is a step that is at most 2 % longer.

Needs the extra `mpi` with MPICH, for a GPU `nccl`.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from benchmark import Contender
from contenders import SHAPES, our_side
from tqdm import tqdm

from minilm.extras import install

GOAL, HIDDEN, LONGER = 0.9, 0.5, 1.02
HEAD = ["a step (lowest - highest)", "ratio", "lowest - highest", "under way", "waited",
        "at once: a step", "waited", "hidden by handles", "by waiting less"]


def main(configs: tuple[Literal["S", "M", "L"], ...] = ("M",),
         stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 2, 3), rounds: int = 15,
         order: Literal["ranks", "engine"] = "ranks", device: Literal["cpu", "cuda"] = "cpu"):
    """Print a table for each config.

    Args:
        configs: sizes of the model.
        stages: of the ranks.
        rounds: turns of each contender.
        order: of sums; that of ranks, as training programs have it, or MPI's own.
        device: cuda is one GPU, on which stage 3 is none.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for name in configs:
        (on_cards if device == "cuda" else on_cores)(name, stages, rounds, order)


def on_cores(name, stages, rounds, order):
    workers, ranks = turns(name, stages, rounds + 1, order)
    print(f"\nA step of {name}: two cores, BLAS with one thread on each, {rounds} turns\n\n"
          f"{' | '.join(['|', *HEAD])} |\n|{'---|' * (len(HEAD) + 1)}\n"
          f"| two workers | {spread(workers)} |" + " |" * (len(HEAD) - 1), flush=True)
    for stage, answers in zip(stages, ranks):
        print(line(f"two ranks, stage {stage}", workers, answers), flush=True)


def on_cards(name, stages, rounds, order):
    print(f"\nA step of {name} on a GPU, {rounds} turns\n\n"
          "| | without NCCL | one rank, with NCCL | ratio |\n|---|---|---|---|", flush=True)
    for stage in stages:
        with Ranks(0, name, stage, order, "cuda") as one, Ranks(1, name, stage, order,
                                                                "cuda") as rank:
            found = [(*one.run(), *rank.run()) for _ in range(rounds + 1)][1:]
        print(added(f"stage {stage}", *zip(*found)), flush=True)


def added(title, without, with_nccl) -> str:
    """A row of the GPU's table."""
    ratio = statistics.median(with_nccl) / statistics.median(without)
    missed = "" if ratio <= LONGER else f" (goal: {LONGER:g})"
    return f"| {title} | {spread(without)} | {spread(with_nccl)} | {ratio:.3f}{missed} |"


def turns(name, stages, rounds, order):
    """(seconds of a step by workers, for each stage what Ranks.run gives, in each turn)."""
    with ExitStack() as stack:
        ranks = [stack.enter_context(Ranks(2, name, stage, order, "cpu")) for stage in stages]
        workers = stack.enter_context(Contender(our_side, "train", SHAPES[name], False))
        found = [(workers.run(), [r.run() for r in ranks])
                 for _ in tqdm(range(rounds), unit="turn", leave=False, disable=None)]
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
    """Ranks that wait, and make a turn when asked to. With n = 0 it is one, without mpiexec."""

    def __init__(self, n, name, stage, order, device):
        here = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
        if n and here is None:
            raise ImportError(f"there is no mpiexec: {install('mpi')}")
        program = Path(__file__).with_name("rank_side.py")
        self.process = subprocess.Popen(
            [*([here, "-n", str(n)] if n else ()), sys.executable, program, name, str(stage), order,
             device],
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True)

    def run(self) -> list[float]:
        """Seconds: (of a step; that it waited; that calls were under way; of a step whose calls are
        waited for at once; that this one waited). On a GPU only the first.
        """
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        if not (said := self.process.stdout.readline()):
            raise RuntimeError("the ranks have ended; their message is above")
        return json.loads(said)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


if __name__ == "__main__":
    from minilm.command import command  # here, so that the others' processes do not load it

    command(main)
