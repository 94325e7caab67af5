"""x W^T for a few rows x and a large W, as generation needs it: memory sets the pace.

Each weight is used only B times, so what counts is to read W once, in order.

* One row: a dot product for each row of W. BLAS's matrix-vector product gives the same, but walks
  along several rows of W side by side, which memory serves more slowly. It also splits over
  threads that wait for each other in loops: beside other busy processes they take turns, each
  waiting out the other's time slice.
* Several rows: a product for each block of W, which is fetched once and used B times. BLAS would
  first copy W into an order of its own, which pays only if there are many rows.
* 16-bit weights: each block is widened to float32 in the L2 cache, not all of W through memory.

Shapes: B rows, I in, O out, "..." any leading axes.
"""

import numpy as np

from minilm.arrays import one_dtype, rows, wide

BLOCK = 96 << 10  # weights: 384 KiB in float32, which the L2 cache of a core holds
FEW = 16  # rows; a product of more is bound by arithmetic


def plain_product(x, W):
    """The formula: x W^T in at least float32, rounded once."""
    return (wide(x) @ wide(W).T).astype(x.dtype, copy=False)


def product(x, W):  # (..., I), (O, I) -> (..., O)
    """plain_product of NumPy arrays, up to the order of the sums. TypeError if dtypes differ.

    The bits of one row's result depend neither on BLAS's threads nor on BLOCK.

    >>> product(np.array([1.0, 2.0]), np.array([[3.0, 4.0], [5.0, 6.0]]))
    array([11., 17.])
    """
    one_dtype("linear", x=x, W=W)
    (O, I), X = W.shape, wide(rows(x))
    if len(X) > FEW:
        return plain_product(x, W)
    y, step = np.empty((len(X), O), X.dtype), max(1, BLOCK // I)
    if len(X) == 1 and W.dtype.itemsize > 2:  # nothing is widened or used again: one block
        step = O
    for i in range(0, O, step):
        block = wide(W[i : i + step])
        if len(X) == 1:
            np.vecdot(block, X, out=y[0, i : i + step])
        else:
            np.matmul(X, block.T, out=y[:, i : i + step])
    return y.reshape(*x.shape[:-1], O).astype(x.dtype, copy=False)
