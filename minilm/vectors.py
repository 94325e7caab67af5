"""x W^T for a few rows x and a large W, as generation needs it: memory sets the pace.

A weight is used only once for each row, so what counts is how it comes from memory.

* One row: a dot product for each row of W, which reads W in order. BLAS's matrix-vector product
  walks along several rows of W side by side, which memory serves more slowly. It also splits over
  threads that wait for each other in loops. On a busy machine each of them waits until another
  process has used up its time slice, many times for each token.
* Several rows, or 16-bit weights: a part of W is fetched in order and kept in the L3 cache, as
  float32 if it had 16 bits. BLAS would copy all of W through memory, into an order of its own,
  which pays only if there are many rows.

Shapes: B rows, I in, O out, "..." any leading axes.
"""

import numpy as np

from minilm.arrays import one_dtype, rows, wide

FEW = 16  # rows; a product of more is bound by arithmetic
FETCHED = 512 << 10  # weights of a part: 2 MiB in float32. Smaller ones interrupt the reading
USED = 96 << 10  # weights that are multiplied at once: 384 KiB, which the L2 cache holds


def plain_product(x, W):
    """The formula: x W^T in at least float32, rounded once."""
    return (wide(x) @ wide(W).T).astype(x.dtype, copy=False)


def product(x, W):  # (..., I), (O, I) -> (..., O)
    """plain_product of NumPy arrays, up to the order of the sums. TypeError if dtypes differ.

    The result for one row is the same, bit for bit, for any number of BLAS's threads.

    >>> product(np.array([1.0, 2.0]), np.array([[3.0, 4.0], [5.0, 6.0]]))
    array([11., 17.])
    """
    one_dtype("linear", x=x, W=W)
    X = wide(rows(x))
    if len(X) > FEW:
        return plain_product(x, W)
    if len(X) == 1 and W.dtype.itemsize > 2:
        y = np.vecdot(W, X)
    else:
        y = _by_parts(lambda part: _near(X, part.astype(X.dtype)), W, FETCHED // W.shape[1])
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype, copy=False)


def _near(X, W):  # (B, I), (O, I) -> (B, O)
    """X W^T for a W in the cache."""
    if len(X) == 1:
        return np.vecdot(W, X)[None]
    # OpenBLAS multiplies where the numbers lie, on one thread, up to 10^6 products and 1200 sums.
    most = min(USED // W.shape[1], 10**6 // X.size, 1200 // len(X))
    return _by_parts(lambda part: X @ part.T, W, most)


def _by_parts(multiply, W, count):
    """The results for parts of so many rows of W, side by side."""
    count = max(count, 1)
    return np.concatenate([multiply(W[i : i + count]) for i in range(0, len(W), count)], axis=-1)
