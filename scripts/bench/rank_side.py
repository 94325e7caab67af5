"""The side of rank_speed.py that mpiexec starts: ranks that train when they are told to.

    mpiexec -n 2 python scripts/bench/rank_side.py M 2 ranks

Each line on stdin is a turn: a few steps, and once more with each call waited for at once. Rank 0
then prints the seconds of a step: how long it took, how long it waited in calls of the Comm, how
long calls were under way, and how long it took and waited the second time.
"""

import json
import sys
import time

import numpy as np
from contenders import SHAPES

from minilm.backend import tune_allocator
from minilm.parallel.clocked import Clocked
from minilm.parallel.comm import connect
from minilm.parallel.zero import Zero
from minilm.train import LabelLoss
from minilm.transformer import Config, Transformer

STEPS = 2  # of a turn: the first one's parameters travel while the second one begins


def main(shape: str, stage: str, order: str):
    tune_allocator()
    comm = Clocked(connect(ordered=order == "ranks"))
    s, loss = SHAPES[shape], LabelLoss()
    model = Transformer(Config.gpt2(s.vocab, s.context, s.layers, s.heads, s.width)).train()
    zero = Zero(model, model.blocks, comm, int(stage), 1e-3, (0.9, 0.95), weight_decay=0.1,
                undecayed=[p for p in model.parameters() if p.ndim < 2])
    batch = s.tokens()
    mine = [np.array_split(a, comm.size)[comm.rank] for a in batch]

    def steps():
        for _ in range(STEPS):
            with zero.micro_batch():
                loss(model, *mine, totals=loss.totals(*batch)).backward()
            zero.norm()
            zero.step()
        with zero.gathered(units=stage != "3"):
            pass  # what is under way belongs to these steps

    while told(comm):
        answer = []
        for comm.blocking in (False, True):
            comm.barrier()
            comm.restart()
            start = time.perf_counter()
            steps()
            answer += [time.perf_counter() - start, comm.waited, comm.under_way]
        if comm.rank == 0:
            print(json.dumps([x / STEPS for x in answer[:5]]), flush=True)


def told(comm) -> bool:
    """Wait, without work, until rank 0 is told to go on."""
    word = np.zeros(1)
    if comm.rank == 0:
        word[0] = bool(sys.stdin.readline())
    handle = comm.broadcast(word)
    while not handle.test():
        time.sleep(0.002)
    return bool(word[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
