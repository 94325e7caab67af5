"""Matrix products that know 16-bit numbers: sums in float32, one rounding at the end.

NumPy's BLAS has no 16-bit product, so there it is computed in float32. CuPy multiplies matrices of
16-bit numbers but (in 14.2) not stacks of bfloat16, and never adds to what is there, which saves
LoRA a pass over its output: there cuBLAS is called by hand.
"""

import ctypes
import functools
import math

import ml_dtypes
import numpy as np

from minilm.arrays import wide
from minilm.backend import array_module, cublas

# cudaDataType: CUDA_R_16F, CUDA_R_16BF
CUDA_TYPES = {np.dtype(np.float16): 2, np.dtype(ml_dtypes.bfloat16): 14}


def matmul(a, b, alpha: float = 1.0, add_to=None):  # (..., I, K), (..., K, J) -> (..., I, J)
    """alpha a b, for a and b of one dtype, in that dtype.

    add_to, contiguous (I, J): the product of two matrices is added to it, and it is returned.
    """
    if a.dtype.itemsize == 2 and array_module(a) is not np:
        return _on_card(a, b, alpha, add_to)
    y = a @ b if a.dtype.itemsize > 2 else wide(a) @ wide(b)
    if alpha != 1:
        y *= y.dtype.type(alpha)
    if add_to is None:
        return y.astype(a.dtype, copy=False)
    y += add_to
    add_to[...] = y
    return add_to


def dot(a, b) -> float:  # (n,), (n,) -> a b
    """The inner product of contiguous float32 or float64 vectors.

    On a card by cuBLAS: CuPy's a @ b would first write all products into a new array.
    """
    if array_module(a) is np:
        return float(a @ b)
    blas, handle = cublas()
    dots = {"float32": blas.sdot, "float64": blas.ddot}[str(a.dtype)]
    total, y = 0.0, np.zeros((), a.dtype)
    for i in range(0, a.size, 1 << 30):  # cuBLAS counts in 32 bits
        x, z = a[i : i + (1 << 30)], b[i : i + (1 << 30)]
        dots(handle, x.size, x.data.ptr, 1, z.data.ptr, 1, y.ctypes.data)
        total += float(y)
    return total


def _on_card(a, b, alpha, add_to):
    """The product of 16-bit arrays by cuBLAS."""
    if a.shape[-1] != b.shape[-2] or a.dtype != b.dtype:
        raise ValueError(f"no product of {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    xp, (I, K), J = array_module(a), a.shape[-2:], b.shape[-1]
    if a.ndim == b.ndim == 2:
        c = xp.empty((I, J), a.dtype) if add_to is None else add_to
        if c.size and K:
            _gemm(a, b, alpha, c, 0.0 if add_to is None else 1.0)
        elif add_to is None:
            c[...] = 0
        return c
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    c, n = xp.zeros((*lead, I, J), a.dtype), math.prod(lead)
    if c.size and K:
        a = xp.ascontiguousarray(xp.broadcast_to(a, (*lead, I, K))).reshape(n, I, K)
        b = xp.ascontiguousarray(xp.broadcast_to(b, (*lead, K, J))).reshape(n, K, J)
        _gemm(a, b, alpha, c.reshape(n, I, J), 0.0)
    return c


def _gemm(a, b, alpha, c, beta):
    """c = alpha a b + beta c for matrices, or for stacks of them one after another.

    cuBLAS counts down columns, so it sees the transpose of each array: c^T = b^T a^T.
    """
    blas, handle = cublas()
    a, turn_a, lda = _layout(a)
    b, turn_b, ldb = _layout(b)
    (I, K), J, kind = a.shape[-2:], b.shape[-1], CUDA_TYPES[a.dtype]
    alpha, beta = _float32(alpha), _float32(beta)
    at_alpha, at_beta = ctypes.addressof(alpha), ctypes.addressof(beta)
    # op, op, sizes, alpha | b, type, ld, stride | a, ... | beta, c, ... and how to compute
    if c.ndim == 2:
        blas.gemmEx(handle, turn_b, turn_a, J, I, K, at_alpha,
                    b.data.ptr, kind, ldb, a.data.ptr, kind, lda, at_beta,
                    c.data.ptr, kind, J, blas.CUBLAS_COMPUTE_32F, blas.CUBLAS_GEMM_DEFAULT)
    else:
        blas.gemmStridedBatchedEx(
            handle, turn_b, turn_a, J, I, K, at_alpha,
            b.data.ptr, kind, ldb, K * J, a.data.ptr, kind, lda, I * K, at_beta,
            c.data.ptr, kind, J, I * J, len(c), blas.CUBLAS_COMPUTE_32F, blas.CUBLAS_GEMM_DEFAULT)


@functools.lru_cache(256)
def _float32(number):
    """The number in memory, where cuBLAS reads it; made once."""
    return ctypes.c_float(number)


def _layout(x):
    """(x, whether its columns are what is contiguous, distance of its rows or columns).

    A matrix that is neither, such as every second column of one, is copied.
    """
    (rows, columns), (row, column), size = x.shape[-2:], x.strides[-2:], x.itemsize
    row, column = row // size, column // size
    if (column == 1 and row == columns) or x.flags.c_contiguous:
        return x, 0, columns  # CUBLAS_OP_N
    if (row == 1 and column == rows) or x.flags.f_contiguous:
        return x, 1, rows  # CUBLAS_OP_T
    if column == 1 and row >= columns:
        return x, 0, row
    if row == 1 and column >= rows:
        return x, 1, column
    return array_module(x).ascontiguousarray(x), 0, columns
