"""What collectives cost: seconds by closed forms, and the ring itself, message by message.

A message of S bytes takes a + S / B seconds: a before it begins to arrive, B bytes a second
(Hockney 1994, The communication challenge for MPP). With S the bytes of a full array and n ranks:

    reduce_scatter, all_gather    ring    (n-1) a + (n-1)/n S/B                           (1)
                                  tree    ceil(log2 n) a + (n-1)/n S/B                    (2)
    all_reduce                    ring    2 (n-1) a + 2 (n-1)/n S/B                       (3)
                                  tree    2 ceil(log2 n) a + 2 S/B                        (4)

    (1), (3)   Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002; no way sends fewer bytes
    (2)        halving and doubling: Thakur, Rabenseifner & Gropp 2005,
               doi:10.1177/1094342005051521; for n that is no power of 2 it is a little too low
    (4)        two trees in a pipeline: Sanders, Speck & Traff 2009,
               doi:10.1016/j.parco.2009.09.001; filling the pipeline is left out

Assumed: every rank sends and receives at once, at full speed; no two messages share a wire that is
too narrow; adding numbers takes no time; nobody is late.
"""

from typing import NamedTuple

import numpy as np

from minilm.ranges import check, one_of

ALGORITHMS = "ring", "tree"


class Link(NamedTuple):
    """How messages travel."""

    a: float  # seconds before a message begins to arrive
    B: float  # bytes a second


def reduce_scatter(n: int, S: float, link: Link, algorithm: str = "ring") -> float:
    """Seconds until each of n ranks has its part of the sum of arrays of S bytes.

    algorithm: one of ALGORITHMS, or it is a ValueError.

    >>> reduce_scatter(4, 8e9, Link(1e-6, 2e9))
    3.000003
    """
    check({"algorithm": one_of(*ALGORITHMS)}, algorithm=algorithm)
    messages = n - 1 if algorithm == "ring" else _doublings(n)
    return messages * link.a + (n - 1) / n * S / link.B  # eqs. (1), (2)


all_gather = reduce_scatter  # the same messages, backwards


def all_reduce(n: int, S: float, link: Link, algorithm: str = "ring") -> float:
    """Seconds until each of n ranks has the sum of arrays of S bytes."""
    if algorithm != "tree" or n == 1:
        return 2 * reduce_scatter(n, S, link, algorithm)  # eq. (3)
    return 2 * _doublings(n) * link.a + 2 * S / link.B  # eq. (4)


def _doublings(n: int) -> int:
    """ceil(log2 n)."""
    return (n - 1).bit_length()


class Ring(NamedTuple):
    """What a ring has done."""

    sums: list[np.ndarray]  # of each rank
    sent: list[int]  # bytes, by each rank
    messages: int  # that each rank has sent, one after another


def ring(arrays: list[np.ndarray]) -> Ring:
    """Add n flat arrays up by (3): each rank sends to the next one, n - 1 times, twice.

    In the first round a part grows on its way around; in the second its sum goes around.
    ValueError for arrays that n does not divide or that differ in size.

    >>> ring([np.array([1, 2]), np.array([10, 20])])
    Ring(sums=[array([11, 22]), array([11, 22])], sent=[16, 16], messages=2)
    """
    n = len(arrays)
    if len(sizes := {a.shape for a in arrays}) != 1 or arrays[0].ndim != 1 or arrays[0].size % n:
        raise ValueError(f"{n} flat arrays must have one size that {n} divides, got {sizes}")
    parts = [np.split(a.copy(), n) for a in arrays]  # by rank
    sent, messages = [0] * n, 0
    for gathers in (False, True):
        for step in range(n - 1):
            which = [(rank - step + gathers) % n for rank in range(n)]
            under_way = [parts[rank][k].copy() for rank, k in enumerate(which)]
            for rank, (k, message) in enumerate(zip(which, under_way)):
                place = parts[(rank + 1) % n][k]
                place[...] = message if gathers else place + message
                sent[rank] += message.nbytes
            messages += 1
    return Ring([np.concatenate(mine) for mine in parts], sent, messages)


def fitted(messages, volumes, seconds) -> Link:
    """The link for which messages a + volume / B is nearest to what was measured.

    messages, volumes (bytes), seconds: of each measurement, such as (n-1) and (n-1)/n S of (1). The
    squares of errors relative to the seconds are least. a is 0 if it would be less.

    >>> a, B = fitted([1, 1, 1], [0, 1e3, 1e6], [2e-6, 3e-6, 1.002e-3])
    >>> f"{a:.3g} {B:.3g}"
    '2e-06 1e+09'
    """
    x = np.stack([messages, volumes], axis=1) / np.asarray(seconds)[:, None]
    (a, per_byte), *_ = np.linalg.lstsq(x, np.ones(len(x)), rcond=None)
    if a < 0:
        a, per_byte = 0.0, x[:, 1].sum() / (x[:, 1] @ x[:, 1])
    return Link(float(a), float(1 / max(per_byte, 1e-15)))
