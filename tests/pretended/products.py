"""cuBLAS's products by NumPy, on addresses: column-major, summed in float32 or float64."""

import ctypes

import ml_dtypes
import numpy as np

DTYPES = {0: np.dtype("float32"), 1: np.dtype("float64"), 2: np.dtype("float16"),
          14: np.dtype(ml_dtypes.bfloat16)}  # cudaDataType
SUCCESS, NOT_SUPPORTED = 0, 15  # cublasStatus_t


class Product(ctypes.Structure):
    """The struct `product` of cublas.c."""

    _fields_ = [
        *((name, ctypes.c_int) for name in
          "turn_a turn_b m n k count type_a type_b type_c lda ldb ldc".split()),
        *((name, ctypes.c_longlong) for name in ("step_a", "step_b", "step_c")),
        *((name, ctypes.c_void_p) for name in ("alpha", "a", "b", "beta", "c")),
        ("in_doubles", ctypes.c_int)]


PRODUCT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Product))
DOT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int,
                       ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
OTHER = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


def multiply(p: Product) -> int:
    """C = alpha op(A) op(B) + beta C, `count` times; cublasStatus_t."""
    if not {p.type_a, p.type_b, p.type_c} <= DTYPES.keys() or p.type_a != p.type_b:
        return NOT_SUPPORTED
    if not p.m or not p.n or not p.count:
        return SUCCESS
    inner = np.float64 if p.in_doubles else np.float32
    alpha, beta = (at(address, inner)[()] for address in (p.alpha, p.beta))
    a = matrices(p.a, p.type_a, p.m, p.k, p.lda, p.step_a, p.turn_a, p.count)
    b = matrices(p.b, p.type_b, p.k, p.n, p.ldb, p.step_b, p.turn_b, p.count)
    c = matrices(p.c, p.type_c, p.m, p.n, p.ldc, p.step_c, 0, p.count)
    y = alpha * (a.astype(inner) @ b.astype(inner))
    if beta:
        y += beta * c.astype(inner)
    c[...] = y.astype(c.dtype)
    return SUCCESS


def dot(is_double, n, x, dx, y, dy, out) -> int:
    """Write the inner product of n numbers, which lie dx and dy apart, to the host's `out`."""
    dtype = DTYPES[is_double]
    x, y = (at(p, dtype, (n,), (step * dtype.itemsize,)) for p, step in ((x, dx), (y, dy)))
    at(out, dtype)[...] = x @ y
    return SUCCESS


def matrices(address, kind, rows, columns, pitch, step, turned, count):
    """op(X) of column-major matrices as (count, rows, columns), a view of their memory."""
    dtype = DTYPES[kind]
    if turned:
        rows, columns = columns, rows
    strides = [dtype.itemsize * s for s in (step, 1, pitch)]
    x = at(address, dtype, (count, rows, columns), strides)
    return x.swapaxes(1, 2) if turned else x


def at(address: int, dtype, shape=(), strides=None) -> np.ndarray:
    """What lies at an address; `strides` may be 0 or negative. Nothing is checked."""
    dtype = np.dtype(dtype)
    if 0 in shape:
        return np.empty(shape, dtype)
    first = np.ndarray((), dtype, (ctypes.c_char * dtype.itemsize).from_address(address))
    return np.lib.stride_tricks.as_strided(first, shape, strides or [0] * len(shape))
