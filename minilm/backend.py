"""Where arrays live, and the few array routines that differ between NumPy and CuPy.

An array decides by itself where work on it runs: code asks `array_module(x)` for the module's
functions and uses operators and methods elsewhere. CuPy is imported here only, and only when used.

On a CPU every operator of a plain formula writes a new array. `by_rows` runs the formula on blocks
of rows, which bounds these temporaries, so that formulas can stay as the textbook has them.
"""

import contextlib
import ctypes
import functools
import math
import sys

import numpy as np

BLOCK = 1 << 18  # elements of a block: a few float32 temporaries of 1 MiB each


def array_module(x):
    """numpy or cupy, whichever x belongs to."""
    on_cpu = type(x) is np.ndarray or isinstance(x, (np.ndarray, np.generic))
    return np if on_cpu else sys.modules["cupy"]


def to_device(array, device: str):
    """The array on `device`, "cpu" or "cuda"; the same object where it is there already.

    ValueError for another device; RuntimeError that says why "cuda" cannot be used.
    """
    if device == "cpu":
        return array if array_module(array) is np else array.get()
    if device != "cuda":
        raise ValueError(f'device must be "cpu" or "cuda", got {device!r}')
    return cupy().asarray(array)


@functools.cache
def cupy():
    """The cupy module; RuntimeError with the reason where it cannot be used."""
    try:
        import cupy as cp
    except ImportError as error:
        message = f'device "cuda" needs CuPy: pip install "minilm[gpu]" ({error})'
        raise RuntimeError(message) from None
    if not cp.is_available():
        raise RuntimeError('device "cuda" needs an NVIDIA GPU and its driver; CuPy finds none')
    return cp


def cublas():
    """(CuPy's cuBLAS functions, the current device's handle, which adds up in float32 only).

    By default cuBLAS may cut a long sum of 16-bit products in parts and round each to 16 bits.
    """
    from cupy_backends.cuda.libs import cublas

    handle = cupy().cuda.device.get_cublas_handle()
    disallow_reduced_precision_reduction = 16  # of cublasMath_t; CuPy has no name for it
    cublas.setMathMode(handle, disallow_reduced_precision_reduction)
    return cublas, handle


def pointer(x) -> int:
    """The address of an array's first element."""
    return x.ctypes.data if array_module(x) is np else x.data.ptr


@contextlib.contextmanager
def memory_limit(size: int):
    """Inside, arrays on the GPU may take `size` bytes together, as on a smaller card.

    More raises CuPy's OutOfMemoryError, a MemoryError, which says what was asked, held and allowed.
    The limit does not count what CUDA itself and cuBLAS hold, about half a GB.
    """
    pool = cupy().get_default_memory_pool()
    before = pool.get_limit()
    pool.free_all_blocks()  # what it keeps for later would count
    pool.set_limit(size=size)
    try:
        yield
    finally:
        pool.set_limit(size=before)


def peak_memory():
    """`with peak_memory() as peak:` measures arrays on the GPU made by this thread.

    peak.bytes is the most that they took at once, those from before included.
    """
    cp = cupy()

    class Peak(cp.cuda.MemoryHook):
        name = "peak_memory"

        def __init__(self):
            self.held = self.bytes = cp.get_default_memory_pool().used_bytes()

        def malloc_postprocess(self, **block):
            if block["mem_ptr"]:  # 0 where there was no room
                self.held += block["mem_size"]
                self.bytes = max(self.bytes, self.held)

        def free_postprocess(self, **block):
            self.held -= block["mem_size"]

    return Peak()


def tune_allocator():
    """Keep freed memory in the process, so that a fresh array costs no page faults (glibc only).

    Without it each large temporary is mapped and unmapped by the kernel, which on a small model
    costs more than the arithmetic. Process-wide, so it is a call and not an effect of importing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def one_dtype(op: str, **arrays):
    """TypeError where the arrays differ in dtype: a product would quietly change its precision."""
    first, *others = arrays.values()
    if any(a.dtype != first.dtype for a in others):
        found = ", ".join(f"{name} {a.dtype}" for name, a in arrays.items())
        raise TypeError(f"{op} needs one dtype, got {found}")


def one_shape(op: str, **arrays):
    """ValueError where the arrays differ in shape: broadcasting would hide it."""
    first, *others = arrays.values()
    if any(a.shape != first.shape for a in others):
        found = ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
        raise ValueError(f"{op} needs one shape, got {found}")


def by_rows(formula, *arrays):
    """formula(*arrays), an array or a tuple of arrays, computed in blocks of rows on the CPU.

    The arrays are (..., C) with equal leading axes; formula must treat rows independently, and
    each result has one row per row of its input: (n, C) -> (n, ...).

    >>> x = np.array([[1.0, 2.0], [3.0, 5.0]])
    >>> by_rows(lambda x: (x - x.max(-1, keepdims=True), x.sum(-1)), x)
    (array([[-1.,  0.],
           [-2.,  0.]]), array([3., 8.]))
    """
    x = arrays[0]
    if x.size <= 2 * BLOCK or array_module(x) is not np:
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
    """(..., C) -> (N, C), a view where the memory allows it."""
    return x.reshape(-1, x.shape[-1])


def wide(x):
    """x in at least float32, the precision of sums, norms and exponentials."""
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


def row_sum(x):
    """Sums over the last axis, kept: (..., C) -> (..., 1)."""
    if array_module(x) is not np:
        return x.sum(-1, keepdims=True)
    return (x @ ones(x.shape[-1], x.dtype, np))[..., None]  # BLAS adds faster than np.sum


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
    """A vector of ones that everybody shares: not to be changed."""
    return xp.ones(n, dtype)


def scatter_add(ids, dy, n: int):
    """Rows of dy added up by their id, in at least float32: (N,), (N, C) -> (n, C)."""
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
    """The error function, float32 or float64, to the last bit or two (NumPy has none).

    A Taylor series around the nearest of a table of points, whose values are math.erf's.
    """
    if array_module(x) is not np:
        from cupyx.scipy.special import erf

        return erf(x)
    step, coefficients = _erf_table()
    near = np.clip(x, -6, 6)  # beyond, erf is +-1 in float64
    index = np.rint(np.fmax(near, -6) / step).astype(np.intp)  # any point will do for nan
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
