"""What does each stage of ZeRO keep, send and take on several ranks?

    python scripts/experiments/parallel_training.py            # a minute a seed, on two cores
    python scripts/experiments/parallel_training.py --quick    # a second; the numbers mean nothing

Lecture 004: DDP replicates the full model, feeds each copy a slice of the data and synchronizes
after each step; ZeRO distributes the model's states "with zero data overlap", in stages, which
trades memory for communication; FSDP is stage 3.

Here 1, 2 and 4 ranks train a Llama of 1.3 million parameters in each stage by minilm.parallel.zero,
every rank on 256 tokens of its own. Bytes are counted, and compared with the formulas of
minilm/parallel/bucket.py: they are exact. In stage 3 the root is gathered once a step.

Ranks are processes that mpiexec starts (extra `mpi`), each on one core. Where there is none, and in
a quick run, they are threads of one process: bytes are the same, but times mean nothing. A machine
with 2 cores runs 4 ranks by turns, so 4 ranks then show bytes, not speed.

Seconds are medians of steps. The communication of a stage is what a rank waits in its calls if each
is waited for at once. What overlap hides of it is told in two ways, by handles and by waiting less:
see minilm/parallel/clocked.py, by which scripts/bench/rank_speed.py measures a larger model. Calls
are those of the programs, with all that parallel/mpi.py does beside MPI. In order means that sums
run over ranks 0, 1, ..., as the programs have it: bits do not depend on the engine.

The simulator of minilm/measure/step_time.py is asked for the same steps. It gets the latency a and
the speed B of this machine's messages, fitted to collectives of many sizes, and the seconds of a
rank that trains alone while n - 1 others do so. many_cards.py asks it for a hundred thousand cards.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.extras import install
from minilm.measure.collectives import Link, all_gather, all_reduce, fitted, reduce_scatter
from minilm.measure.messages import in_turn, sweep
from minilm.measure.step_time import Unit, simulate
from minilm.measure.verdict import by_arm, by_seed, compared, each_seed, single, verdict
from minilm.parallel.bucket import bytes_held, bytes_sent
from minilm.parallel.clocked import Clocked
from minilm.parallel.comm import LAUNCHED, Local, connect, ranks
from minilm.parallel.zero import Zero
from minilm.picture import COLORS
from minilm.train import LabelLoss
from minilm.transformer import Config, Transformer

QUESTION = "What does each stage of ZeRO keep, send and take on several ranks?"

RANKS, STAGES = (1, 2, 4), range(4)
def arm_of(n, stage): return f"{n} ranks, stage {stage}" if n > 1 else f"1 rank, stage {stage}"


ARMS = {arm_of(n, stage): (n, stage) for n in RANKS for stage in STAGES}
MODES = {"engine": {}, "in order": {"ordered": True}, "at once": {"blocking": True}}
HELD, SENT = "kept, bytes a parameter", "sent a step, bytes a parameter"
OFF = "off the formulas, %"
MS, ORDERED = "ms a step", "ms, sums in order"
COMMUNICATION = "ms of communication"
HANDLES, LESS = "hidden by handles, %", "hidden by waiting less, %"
SERIAL, BESIDE = "predicted ms, one after another", "predicted ms, both at once"
MEASURES = {HELD: 2, SENT: 2, OFF: 4, MS: 1, ORDERED: 1, COMMUNICATION: 1, HANDLES: 0, LESS: 0,
            SERIAL: 1, BESIDE: 1}
LINK = "a, seconds, and B, bytes a second"  # in the row
TIMES = [name for name in MEASURES if name not in (HELD, SENT, OFF)]
SLIDE = {}  # it has words: "full model is replicated", "zero data overlap", "trade-off"
SOME = [arm_of(n, stage) for n in RANKS[1:] for stage in STAGES]


def ratio(rows, measure: str, a: str, b: str, about: str, scale: float = 1.0, **bounds):
    """The verdict on a's number over b's, times scale."""
    return verdict([scale * x / y for x, y in by_seed(rows, measure, (a, b))], about, **bounds)


def predicted(n: int, measure: str):
    """Is the prediction of each stage within 30 % of what was measured?"""
    def worst(rows):
        own = [row for row in rows if row["arm"] in SOME and ARMS[row["arm"]][0] == n]
        return each_seed(own, lambda row: abs(row[measure] / row[MS] - 1))
    return lambda rows: verdict(worst(rows), "largest difference, share", at_most=0.3)


CLAIMS = {
    "bytes kept and sent are those of the formulas": lambda rows: verdict(
        each_seed(rows, lambda row: row[OFF]), f"largest: {OFF}", at_most=1e-6),
    "DDP replicates the full model: 4 ranks keep as much as 1":
        lambda rows: compared(rows, HELD, arm_of(4, 0), arm_of(1, 0), -0.01, 0.01),
    "stage 3, zero overlap: 4 ranks together keep what 1 does": lambda rows: ratio(
        rows, HELD, arm_of(4, 3), arm_of(1, 0), "kept by 4 / kept by 1", 4, at_least=0.99,
        at_most=1.01),
    "stages 1 and 2 send no more than DDP": lambda rows: verdict(
        [max(b - a, c - a) for a, b, c in by_seed(rows, SENT, [arm_of(4, s) for s in range(3)])],
        "bytes more", at_least=-1e-6, at_most=1e-6),
    "stage 3 sends half as much again, but for the root": lambda rows: ratio(
        rows, SENT, arm_of(4, 3), arm_of(4, 0), "stage 3 / DDP", at_least=1.4, at_most=1.5),
    **{f"the trade-off: stage 3 communicates longer than DDP, {n} ranks":
        lambda rows, n=n: compared(rows, COMMUNICATION, arm_of(n, 3), arm_of(n, 0), at_least=0)
       for n in RANKS[1:]},
    "DDP speeds up training: 2 ranks take 1.5 times the tokens": lambda rows: ratio(
        rows, MS, arm_of(1, 0), arm_of(2, 0), "tokens a second, times", 2, at_least=1.5),
    **{f"overlap hides at least half of stage 2's communication, 2 ranks: {how}":
        lambda rows, how=how: single(rows, how, arm_of(2, 2), at_least=50)
       for how in (HANDLES, LESS)},
    **{f"sums in order make a step at most 25 % longer, {n} ranks": lambda rows, n=n: verdict(
        each_seed([row for row in rows if ARMS[row["arm"]][0] == n],
                  lambda row: row[ORDERED] / row[MS] - 1), "largest share", at_most=0.25)
       for n in RANKS[1:]},
    **{f"the simulator is right to 30 % in each stage, {n} ranks: {how}": predicted(n, how)
       for n in RANKS[1:] for how in (SERIAL, BESIDE)},
}

# What a rank does


def shape(quick: bool) -> tuple[Config, int, int]:
    """(model, rows, steps)."""
    if quick:
        return Config.llama(17, 8, layers=2, heads=2, width=16, hidden=24), 1, 1
    return Config.llama(257, 64, layers=6, heads=4, width=128, hidden=344), 4, 8


def training(comm, stage: int, seed: int, quick: bool):
    """(its Zero, a function that makes a step and gives the seconds of passes and of AdamW)."""
    config, rows, _ = shape(quick)
    model, loss = Transformer(config, seed), LabelLoss()
    zero = Zero(model, model.blocks, comm, stage, lr=1e-3)
    rng = np.random.default_rng((seed, comm.rank))
    tokens, targets = rng.integers(0, config.vocab_size, (2, rows, config.context))

    def step():
        begun = time.perf_counter()
        with zero.micro_batch():
            loss(model, tokens, targets, totals=(targets.size * comm.size,)).backward()
        zero.complete()
        passed = time.perf_counter()
        zero.step()
        return passed - begun, time.perf_counter() - passed
    return zero, step


def as_rank(comm, seed: int, quick: bool) -> dict:
    """All that one of n ranks measures."""
    zeros, clocks, steps = {}, {}, shape(quick)[2]
    jobs = {"alone": training(Local(), 0, seed, quick)[1]}
    for key in product(STAGES, MODES):
        clocks[key] = Clocked(comm, **MODES[key[1]])
        zeros[key], jobs[key] = training(clocks[key], key[0], seed, quick)
    if not quick:
        in_turn(comm, jobs, 1)  # warms up
    for clock in clocks.values():
        clock.restart()
    times, found = in_turn(comm, jobs, steps), [{} for _ in STAGES]
    for (stage, mode), clock in clocks.items():
        waited, under_way = comm.numbers(clock.waited, clock.under_way).mean(axis=0) / steps
        found[stage][mode] = {"seconds": sum(times[stage, mode]), "waited": waited,
                              "under way": under_way}
        zero = zeros[stage, mode]
        found[stage] |= {
            "held": sum(zero.held().values()),
            "sent": (clock.sent["gradients"] + clock.sent["parameters"]) / steps,
            "sizes": [sum(b.size for b in unit.buckets) for unit in (*zero.units, zero.root)]}
    sizes, rounds = ((1 << 10, 1 << 12), 1) if quick else ([1 << k for k in range(8, 21, 2)], 15)
    return {"alone": times["alone"], "sweep": sweep(comm, sizes, rounds), "stages": found}


# What is made of it


def launcher() -> str | None:
    """mpiexec of this Python's MPI, if there is one."""
    here = shutil.which("mpiexec", path=Path(sys.executable).parent)
    return here if here and importlib.util.find_spec("mpi4py") else None


@cache
def found(n: int, seed: int, quick: bool) -> dict:
    """What rank 0 of n found."""
    if quick or not launcher():
        return ranks(n, lambda comm: as_rank(comm, seed, quick), ordered=False)[0]
    return launched(n, seed, quick)


def launched(n: int, seed: int, quick: bool) -> dict:
    """What rank 0 of n processes found. RuntimeError if they do not end well."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        done = subprocess.run(
            [launcher(), "-n", str(n), sys.executable, __file__, str(out), str(seed),
             *["quick"] * quick],
            env=os.environ | one | {"MPIEXEC_TIMEOUT": "600"}, capture_output=True, text=True)
        if done.returncode or not out.exists():
            raise RuntimeError(f"{n} ranks ended with {done.returncode}: {done.stderr[-2000:]}")
        return json.loads(out.read_text())


def predict(ran: dict, stage: int, n: int, overlap: bool) -> float:
    """Seconds of a step by the simulator."""
    passes, update = ran["alone"]
    link = link_of(ran)
    *units, root = ran["stages"][stage]["sizes"]
    reduce = all_reduce if stage == 0 else reduce_scatter

    def unit(size):
        seconds = passes * size / (sum(units) + root)
        return Unit(seconds / 3, seconds * 2 / 3, all_gather(n, 4 * size, link),
                    reduce(n, 4 * size, link))
    return simulate(stage, [unit(size) for size in units], unit(root),
                    update / (n if stage else 1), overlap).total


def link_of(ran: dict) -> Link:
    return fitted(*zip(*ran["sweep"])) if ran["sweep"] else Link(0.0, np.inf)


def measured(arm: str, seed: int, quick: bool) -> dict:
    """The numbers of a stage on n ranks."""
    n, stage = ARMS[arm]
    if not launcher() and not quick and arm == next(iter(ARMS)):
        print(f"no mpiexec beside this python, so ranks are threads and times are left out: "
              f"{install('mpi')}")
    ran = found(n, seed, quick)
    if stage == 0 and n > 1:
        a, B = link_of(ran)
        print(f"{n} ranks, seed {seed}: a = {1e6 * a:.1f} us, B = {B / 1e9:.2f} GB/s")
    row = numbers(ran["stages"][stage], stage, n, ran)
    return row if quick or launcher() else row | dict.fromkeys(TIMES, np.nan)


def numbers(own: dict, stage: int, n: int, ran: dict) -> dict:
    """What a stage has measured, by the names of MEASURES."""
    *units, root = own["sizes"]
    P = sum(units) + root
    should = bytes_sent(stage, n) * sum(units) + bytes_sent(min(stage, 2), n) * root
    off = max(abs(own["held"] / (bytes_held(stage, n) * P) - 1), abs(own["sent"] - should) / P)
    engine, at_once, waited = own["engine"], own["at once"], own["engine"]["waited"]
    return {HELD: own["held"] / P, SENT: own["sent"] / P, OFF: 100 * off,
            MS: 1e3 * engine["seconds"], ORDERED: 1e3 * own["in order"]["seconds"],
            COMMUNICATION: 1e3 * at_once["waited"],
            HANDLES: 100 * (1 - waited / engine["under way"]) if n > 1 else 100.0,  # of nothing
            LESS: 100 * (1 - waited / at_once["waited"]) if n > 1 else 100.0,
            SERIAL: 1e3 * predict(ran, stage, n, overlap=False),
            BESIDE: 1e3 * predict(ran, stage, n, overlap=True),
            LINK: [*link_of(ran)] if n > 1 else []}


def draw(figure, rows):
    """Milliseconds a step of each arm, measured and predicted; bytes beside them."""
    left, right = figure.subplots(1, 2, sharey=True)
    names = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)][::-1]
    for axes, measure, others in ((left, HELD, ((SENT, "D"),)),
                                  (right, MS, ((SERIAL, "D"), (BESIDE, "s")))):
        values = by_arm(rows, measure)
        for i, name in enumerate(names):
            axes.barh(i, np.mean(values[name]), color=COLORS[RANKS.index(ARMS[name][0])],
                      alpha=0.45)
        for k, (other, marker) in enumerate(others):
            values = by_arm(rows, other)
            axes.plot([np.mean(values[name]) for name in names], range(len(names)), marker,
                      color=COLORS[3 + k], markersize=4, label=other.split(", ")[-1])
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="bytes a parameter\n(dots: sent)")
    right.set(xlabel="ms a step\n(dots: predicted)")
    right.legend(fontsize=6, loc="upper right")


TURNS = "if there are fewer cores, ranks run by turns, and a message waits until its rank has one"
LIKELY = {f"the simulator is right to 30 % in each stage, 4 ranks: {how}": TURNS
          for how in (SERIAL, BESIDE)}
LIKELY[f"overlap hides at least half of stage 2's communication, 2 ranks: {LESS}"] = (
    "on CPUs the cores that compute also copy and add up, which takes its time wherever it is")
EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    if any(os.environ.get(name) for name in LAUNCHED):  # one of the ranks that `launched` started
        mine = connect()
        result = as_rank(mine, int(sys.argv[2]), quick="quick" in sys.argv)
        if mine.rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(result))
    else:
        command(main)
