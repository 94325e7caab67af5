"""The few array routines that differ between NumPy and CuPy, or that NumPy does slowly.

On a CPU every operator of a plain formula writes a new array. `by_rows` runs the formula on blocks
of rows, which keeps these arrays small. So formulas can stay as they are in a textbook.
"""

import functools
import math

import numpy as np

from minilm.backend import array_module

BLOCK = 1 << 16  # elements of a block: a few float32 temporaries of 256 KiB, for the L2 cache
# `by_rows` does not cut an array of so many elements: there, to copy the blocks' results into one
# array costs as much as the cache saves.
WHOLE = 8 * BLOCK


def described(x) -> str:
    """What x is, for a message: dtype and shape of an array, or else its type."""
    if isinstance(getattr(x, "dtype", None), np.dtype):
        return f"{x.dtype} {x.shape}"
    kind = type(x)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def explain(error: Exception, op: str, inputs, settings: dict):
    """Add to an op's error what it was given. TypeError if it failed at something that is no array.
    """
    given = [*map(described, inputs), *(f"{k}: {described(x)}" for k, x in settings.items())]
    known = [isinstance(getattr(x, "dtype", None), np.dtype) for x in (*inputs, *settings.values())]
    bare = isinstance(error, (AttributeError, TypeError)) and not str(error).startswith(op)
    if bare and not all(known):
        raise TypeError(f"{op} takes Tensors and arrays, got {', '.join(given)}") from error
    error.add_note(f"{op} was given {', '.join(given)}")


def floating(op: str, **arrays):
    """TypeError for integers and the like, which would be rounded without a word."""
    for array in arrays.values():
        if array.dtype.kind not in "fV":  # V: bfloat16
            found = ", ".join(f"{name} {described(a)}" for name, a in arrays.items())
            raise TypeError(f"{op} needs floating-point numbers, got {found}")


def is_basic(index) -> bool:
    """Whether an index consists of slices and numbers, and so names no element twice."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is ... or type(part) in (int, slice) for part in parts)


def one_dtype(op: str, **arrays):
    """TypeError if the arrays differ in dtype: NumPy would silently change the precision."""
    dtypes = [a.dtype for a in arrays.values()]
    if dtypes.count(dtypes[0]) < len(dtypes):
        found = ", ".join(f"{name} {a.dtype}" for name, a in arrays.items())
        raise TypeError(f"{op} needs one dtype, got {found}")


def one_shape(op: str, **arrays):
    """ValueError if the arrays differ in shape: broadcasting would hide it."""
    shapes = [a.shape for a in arrays.values()]
    if shapes.count(shapes[0]) < len(shapes):
        found = ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
        raise ValueError(f"{op} needs one shape, got {found}")


def by_rows(formula, *arrays):
    """formula(*arrays), an array or a tuple of arrays, computed in blocks of rows on the CPU.

    The arrays are (..., C) with equal leading axes. The formula must treat rows independently, and
    each result has one row per input row: (n, C) -> (n, ...). Up to WHOLE elements are one block.

    >>> x = np.array([[1.0, 2.0], [3.0, 5.0]])
    >>> by_rows(lambda x: (x - x.max(-1, keepdims=True), x.sum(-1)), x)
    (array([[-1.,  0.],
           [-2.,  0.]]), array([3., 8.]))
    """
    x = arrays[0]
    if x.size <= WHOLE or array_module(x) is not np:
        return formula(*arrays)
    lead = x.shape[:-1]
    arrays = [rows(a) for a in arrays]
    n, step, results = len(arrays[0]), max(1, BLOCK // x.shape[-1]), None
    for i in range(0, n, step):
        block = formula(*(a[i : i + step] for a in arrays))
        parts = block if isinstance(block, tuple) else (block,)
        if results is None:
            results = [np.empty((n, *p.shape[1:]), p.dtype) for p in parts]
        for result, part in zip(results, parts):
            result[i : i + step] = part
    results = tuple(r.reshape(*lead, *r.shape[1:]) for r in results)
    return results if isinstance(block, tuple) else results[0]


def rows(x):
    """(..., C) -> (N, C), a view if the memory layout allows it."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def wide(x):
    """x in at least float32, the precision of sums, norms and exponentials."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


def row_sum(x):
    """Sums over the last axis, kept: (..., C) -> (..., 1)."""
    if array_module(x) is not np:
        return x.sum(-1, keepdims=True)
    # BLAS adds faster than np.sum. OpenBLAS's kernel for AVX-512 multiplies what lies on the stack
    # as well, if there are 5 columns: the sums are right, but it may look as if one was invalid.
    with np.errstate(invalid="ignore"):
        return (x @ ones(x.shape[-1], x.dtype, np))[..., None]


def row_dot(a, b):
    """Sums of a * b over the last axis, kept: (..., C), (..., C) -> (..., 1)."""
    if array_module(a) is np:
        return np.vecdot(a, b)[..., None]
    return (a * b).sum(-1, keepdims=True)


def column_sum(x):
    """Sums over all axes but the last: (..., C) -> (C,)."""
    x = rows(wide(x))
    return ones(len(x), x.dtype, array_module(x)) @ x


@functools.lru_cache(64)
def ones(n, dtype, xp):
    """A vector of ones that all callers share: do not change it."""
    return xp.ones(n, dtype)


def scatter_add(ids, dy, n: int):
    """The sum of the rows of dy with each id, in at least float32: (N,), (N, C) -> (n, C)."""
    xp, dy = array_module(dy), wide(dy)
    total = xp.zeros((n, dy.shape[-1]), dy.dtype)
    if xp is np and len(ids):
        order = np.argsort(ids, kind="stable")  # sorted runs add up ten times as fast as np.add.at
        unique, starts = np.unique(ids[order], return_index=True)
        total[unique] = np.add.reduceat(dy[order], starts, axis=0)
    elif len(ids):
        xp.add.at(total, ids, dy)
    return total


def erf(x):
    """The error function for float32 or float64, accurate to the last bit or two (NumPy has none).

    It is a Taylor series around the nearest point of a table, whose values are math.erf's.
    """
    if array_module(x) is not np:
        from cupyx.scipy.special import erf

        return erf(x)
    step, coefficients = _erf_table()
    near = np.clip(x, -6, 6)  # beyond, erf is +-1 in float64
    index = np.rint(np.fmax(near, -6) / step).astype(np.intp)  # for nan any point will do
    d = near - (index * step).astype(x.dtype)
    index += len(coefficients[0]) // 2
    y = np.zeros_like(x)
    for c in reversed(coefficients):
        y = y * d + c.astype(x.dtype)[index]
    return y


@functools.cache
def _erf_table(step=1 / 32, order=8):
    """Coefficients erf^(n)(p) / n! at the points p of a grid over [-6, 6]."""
    p = np.arange(-round(6 / step), round(6 / step) + 1) * step
    series = [2 / math.sqrt(math.pi) * np.exp(-p * p)]  # of erf', whose derivative is -2 p erf'
    series.append(-2 * p * series[0])
    for n in range(1, order):
        series.append(-2 * (p * series[n] + series[n - 1]) / (n + 1))
    values = np.array([math.erf(v) for v in p])
    return step, [values] + [s / (n + 1) for n, s in enumerate(series)]
