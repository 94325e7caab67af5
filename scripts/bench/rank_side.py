"""The side of rank_speed.py that mpiexec starts: ranks that train when they are told to.

    mpiexec -n 2 python scripts/bench/rank_side.py M 2 ranks cpu

Each line on stdin is a turn: a few steps as the programs make them, and on a CPU once more with
each call waited for at once. Rank 0 then prints what `turn` gives.
"""

import json
import sys
import time

import numpy as np
from contenders import SHAPES, our_config

from minilm.backend import tune_allocator
from minilm.parallel.clocked import Clocked
from minilm.parallel.comm import connect
from minilm.parallel.nccl import on_cards
from minilm.parallel.zero import Zero
from minilm.ranks import RankTrainer
from minilm.transformer import Transformer

STEPS = {"cpu": 2, "cuda": 20}  # of a turn: a step's parameters travel while the next one begins


def main(shape: str, stage: str, order: str, device: str):
    tune_allocator()
    host = connect(ordered=order == "ranks")
    comm, s = Clocked(host) if device == "cpu" else on_cards(host), SHAPES[shape]
    model = Transformer(our_config(s)).to(device)
    zero = Zero(model, model.blocks, comm, int(stage), 1e-3, (0.9, 0.95), weight_decay=0.1,
                undecayed=[p for p in model.parameters() if p.ndim < 2])
    tokens = s.tokens()
    with RankTrainer(model, zero) as trainer:
        while told(host):
            answer = turn(trainer, tokens, STEPS[device])
            if device == "cpu":
                comm.blocking = True
                answer += turn(trainer, tokens, STEPS[device])[:2]
                comm.blocking = False
            if comm.rank == 0:
                print(json.dumps(answer), flush=True)


def turn(trainer, tokens, steps) -> list[float]:
    """Seconds of a step; on a CPU also those that it waited, and those that calls were under way.
    """
    comm, optimizer = trainer.comm, trainer.optimizer
    comm.barrier()
    if clocked := isinstance(comm, Clocked):
        comm.restart()
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step(0, tokens, accumulate=comm.size)
    with optimizer.gathered(units=optimizer.stage < 3):
        pass  # what is under way belongs to these steps
    float(trainer.model.embed.weight.data[0, 0])  # what a GPU has been given, too
    found = [time.perf_counter() - start, *([comm.waited, comm.under_way] if clocked else [])]
    return [x / steps for x in found]


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
