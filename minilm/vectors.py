"""x W^T for a few rows x and a large W, as generation needs it: memory sets the pace.

A weight is used only once for each row, so what counts is how it comes from memory.

* One row: a dot product for each row of W, which reads W in order. BLAS's matrix-vector product
  walks along several rows of W side by side, which memory serves more slowly; if W is so small that
  a cache may have it, that is faster, and BLAS takes no thread for it.
* Several rows, or 16-bit weights: part after part of W, so small that BLAS multiplies where the
  numbers lie. It would copy a larger W through memory, into an order of its own, which pays only if
  there are many rows. 16-bit weights become float32 part by part, and are used while a core's L2
  cache has them.
* Threads: the parts of a very large W lie ready for all. BLAS's threads wait for each other in
  loops: on a busy machine each of them waits until another process has used up its time slice, at
  every product. Here nobody waits for a thread that has not begun. Who computes a part does not
  change its bits.

Shapes: B rows, I in, O out, "..." any leading axes.
"""

import functools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from minilm.arrays import one_dtype, rows, wide

FEW = 16  # rows; a product of more is bound by arithmetic
PART = 128 << 10  # weights that are used at once: 512 KiB in float32
SMALL = 128 << 10  # weights that BLAS multiplies with one row
SHARED = 1 << 20  # weights from which on it pays to wake another thread
THREADS = 4  # at most; memory serves more of them no faster


def plain_product(x, W):
    """The formula: x W^T in at least float32, rounded once."""
    return (wide(x) @ wide(W).T).astype(x.dtype, copy=False)


def product(x, W):  # (..., I), (O, I) -> (..., O)
    """plain_product of NumPy arrays, up to the order of the sums. TypeError if dtypes differ.

    The result for one row is the same, bit for bit, for any number of threads.

    >>> product(np.array([1.0, 2.0]), np.array([[3.0, 4.0], [5.0, 6.0]]))
    array([11., 17.])
    """
    if x.dtype == W.dtype and W.itemsize > 2:  # nothing to widen
        if x.ndim == 1:
            return W @ x if W.size <= SMALL else np.vecdot(W, x)
        if x.ndim == 2 and 1 < len(x) <= FEW and len(W) <= _at_once(*x.shape):  # one part, at once
            return x @ W.T
    one_dtype("linear", x=x, W=W)
    X, O = wide(rows(x)), len(W)
    if len(X) > FEW:
        return plain_product(x, W)
    y, step = np.empty((len(X), O), X.dtype), _at_once(*X.shape)

    def part(i):
        some, out = wide(W[i : i + step]), y[:, i : i + step]
        if len(X) == 1:
            np.vecdot(some, X, out=out[0])
        else:
            np.matmul(X, some.T, out=out)
    _each(part, range(0, O, step), THREADS if W.size >= SHARED else 1)
    return y.reshape(*x.shape[:-1], O).astype(x.dtype, copy=False)


def _at_once(B, I) -> int:
    """How many rows of W a part has.

    At most PART weights, which the L2 cache holds. Up to 10^6 products of two numbers, for up to
    1200 results, OpenBLAS copies no part of W and wakes no thread.
    """
    return max(1, min(PART // I, 10**6 // (B * I), 1200 // B))


def _each(work, parts, threads):
    """work(part) for all parts, by this thread and by those that come to help."""
    left, helpers = deque(parts), []
    if threads > 1 and _cores() > 1:
        count = min(threads, _cores(), len(left)) - 1
        helpers = [_pool().submit(_take, work, left) for _ in range(count)]
    _take(work, left)
    for helper in helpers:
        if not helper.cancel():  # it has begun
            helper.result()


def _take(work, left):
    while True:
        try:
            part = left.popleft()
        except IndexError:  # all are taken
            return
        work(part)


@functools.cache
def _pool():
    return ThreadPoolExecutor(min(THREADS, _cores()) - 1)


@functools.cache
def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
