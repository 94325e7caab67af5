"""The floor of a training step: what its products of matrices alone would take on this machine.

    floor = operations of the step's products / operations a second of large products        (1)

measure/flops.py counts the operations: 6 for each weight of a linear layer and each token, and
attention's tiles. The rate is that of square products, all workers at once, each a process (or a
thread) of its own with one thread of BLAS, as when we train. A step can hardly be faster: its
products are smaller, and there is more to it. So the floor's time over ours is the share of the
machine's speed that we use.
"""

import time

import numpy as np
from contenders import CORES, our_config

SIZE = 1536  # of the square products
SECONDS = 0.25  # of each answer


def operations(shape) -> int:
    """Of the products of matrices in a training step."""
    from minilm.measure.flops import flops
    from minilm.measure.step import Step

    return flops(Step(our_config(shape), "full", shape.batch, shape.context)).total


class Products:
    """What a worker does: products of square matrices."""

    def __init__(self, size):
        rng = np.random.default_rng(0)
        self.a, self.b = rng.standard_normal((2, size, size), dtype=np.float32)
        self.operations = 2 * size**3

    def rate(self, seconds) -> float:
        """Operations a second, measured for so many seconds at least."""
        out, count, start = np.empty_like(self.a), 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            np.matmul(self.a, self.b, out=out)
            count += 1
        return count * self.operations / spent


def rates(threads, workers=CORES, size=SIZE):
    """Operations a second of all workers together, again and again."""
    from minilm.optim.flat import FlatParameters
    from minilm.parallel.cores import Workers
    from minilm.tensor import Tensor

    # Workers share a model's parameters. Nothing is trained here, so they get one that is not used.
    unused = FlatParameters([Tensor(np.zeros(1, np.float32), requires_grad=True)])
    with Workers(unused, Products(size), workers, workers > 1 and not threads) as team:
        while True:
            yield sum(team.run(Products.rate, [(SECONDS,)] * workers))


def floor_side(shape, threads):
    """Seconds of the floor, eq. (1)."""
    for rate in rates(threads):
        yield operations(shape) / rate
