"""The side of rank_speed.py that mpiexec starts: ranks that train when they are told to.

    mpiexec -n 2 python scripts/bench/rank_side.py M 2 ranks

Each line on stdin is a turn: a few steps. Rank 0 then prints how long one took, how long it was
inside calls of the Comm, and how long the same calls take if nothing else runs, in seconds.
"""

import json
import sys
import time

import numpy as np
from contenders import SHAPES

from minilm.backend import tune_allocator
from minilm.parallel.comm import connect
from minilm.parallel.zero import Zero
from minilm.train import LabelLoss
from minilm.transformer import Config, Transformer

STEPS = 2  # of a turn: the first one's parameters travel while the second one begins


class Timed:
    """A Comm that counts the seconds inside its calls and its handles, and keeps what was called.
    """

    def __init__(self, comm):
        self.comm, self.inside, self.made = comm, 0.0, []

    def __getattr__(self, name):
        return getattr(self.comm, name)

    def timed(self, method, *args, **settings):
        start = time.perf_counter()
        try:
            return method(*args, **settings)
        finally:
            self.inside += time.perf_counter() - start

    def begun(self, name, arrays, *args, **settings):
        self.made.append((name, arrays, args, settings))
        return TimedHandle(self, self.timed(getattr(self.comm, name), *arrays, *args, **settings))

    def all_reduce(self, x, *args, **settings):
        return self.begun("all_reduce", [x], *args, **settings)

    def reduce_scatter(self, full, shard, *args, **settings):
        return self.begun("reduce_scatter", [full, shard], *args, **settings)

    def all_gather(self, shard, full, *args, **settings):
        return self.begun("all_gather", [shard, full], *args, **settings)

    def again(self) -> float:
        """Seconds of the calls made, one after another, with nothing beside them."""
        seconds, made, self.made = 0.0, self.made, []
        for name, arrays, args, settings in made:
            copies = [np.zeros_like(a) for a in arrays]
            for a in copies:
                a += 1  # its pages are there
            self.comm.barrier()
            start = time.perf_counter()
            getattr(self.comm, name)(*copies, *args, **settings).wait()
            seconds += time.perf_counter() - start
        return seconds


class TimedHandle:
    def __init__(self, comm, handle):
        self.comm, self.handle = comm, handle

    def test(self):
        return self.comm.timed(self.handle.test)

    def wait(self):
        return self.comm.timed(self.handle.wait)


def main(shape: str, stage: str, order: str):
    tune_allocator()
    comm, s, loss = Timed(connect(ordered=order == "ranks")), SHAPES[shape], LabelLoss()
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
        comm.barrier()
        comm.inside, comm.made = 0.0, []
        start = time.perf_counter()
        steps()
        seconds = time.perf_counter() - start
        answer = [x / STEPS for x in (seconds, comm.inside, comm.again())]
        if comm.rank == 0:
            print(json.dumps(answer), flush=True)


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
