"""Jobs that ranks do together, in turns, and how long messages take between them.

Every rank calls these functions, with the same jobs in the same order.
"""

import time
from functools import partial

import numpy as np


def in_turn(comm, jobs: dict, rounds: int) -> dict:
    """name -> medians of the seconds that each job tells, of the rank that is slowest each time.

    A job is a function that returns one number of seconds or several. The jobs take turns, so a
    change of the machine's speed affects all of them. All ranks begin a job together.
    """
    found = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            comm.barrier()
            found[name].append(comm.numbers(*job()).max(axis=0))
    return {name: np.median(some, axis=0).tolist() for name, some in found.items()}


def sweep(comm, sizes, rounds: int) -> list[tuple[int, int, float]]:
    """(messages, bytes, seconds) of collectives of many sizes, as collectives.fitted takes them.

    sizes: bytes of a shard, multiples of 4. Messages and bytes are those of a rank in a ring: a
    reduce_scatter and an all_gather have n - 1 shards, an all_reduce twice as many. One rank sends
    nothing, so of it there is nothing to tell.
    """
    jobs, n = {}, comm.size
    for size in sizes if n > 1 else ():
        shard, full = np.ones(size // 4, np.float32), np.ones(size // 4 * n, np.float32)
        jobs[n - 1, size, "scatter"] = partial(_timed, comm.reduce_scatter, full, shard)
        jobs[n - 1, size, "gather"] = partial(_timed, comm.all_gather, shard, full)
        jobs[2 * (n - 1), size, "both"] = partial(_timed, comm.all_reduce, full)
    times = in_turn(comm, jobs, rounds)
    return [(sent, sent * size, seconds) for (sent, size, _), (seconds,) in times.items()]


def _timed(call, *arrays) -> tuple[float]:
    begun = time.perf_counter()
    call(*arrays).wait()
    return (time.perf_counter() - begun,)
