"""Dropout on the card, with random numbers that need no state: each is computed from its place.

Philox 4x32-10 of Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3",
section 4, mixes a counter of four 32-bit words with a key of two, in ten rounds. Number i does not
depend on the numbers before it. So every thread of kernels/dropout.cu computes its own numbers, in
the forward pass and again in the backward pass. `kept` is the specification.
"""

import numpy as np

from minilm.backend import array_module
from minilm.cuda.raw import kernel


def dropout(x, p: float, seed: int):
    """x / (1 - p) for the elements of kept(x.shape, p, seed), else 0. seed: 0 to 2^63 - 1."""
    y = array_module(x).empty(x.shape, x.dtype)
    if x.size:
        kernel("dropout.cu", "dropout", x.dtype)(
            (-(-x.nbytes // 4096),), (256,), x, y, x.size, seed, threshold(p), 1 / (1 - p))
    return y


def kept(shape, p: float, seed: int) -> np.ndarray:
    """Which elements dropout keeps: booleans, True with probability 1 - p."""
    n = int(np.prod(shape))
    counter = np.zeros((4, -(-n // 4)), np.uint64)
    counter[0] = np.arange(counter.shape[1])
    return (philox(counter, seed).T.reshape(-1)[:n] >= threshold(p)).reshape(shape)


def threshold(p):
    """How many of the 2^32 random numbers drop an element."""
    return int(p * 2**32)


def philox(counter, seed: int):
    """Four 32-bit numbers for each counter of four words, the lowest first: uint64, (4, ...) each.

    seed: the key; its low 32 bits are the first word.
    """
    low, word = np.uint64(2**32 - 1), np.uint64(32)
    c0, c1, c2, c3 = counter
    k0, k1 = seed % 2**32, seed >> 32
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = ((q >> word) ^ c1 ^ np.uint64(k0), q & low,
                          (p >> word) ^ c3 ^ np.uint64(k1), p & low)
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3])
