"""Matrix products that also take 16-bit numbers: sums in float32, one rounding at the end.

NumPy's BLAS has no 16-bit product, so on a CPU the product is computed in float32. CuPy multiplies
matrices of 16-bit numbers but (in 14.2) not stacks of bfloat16. It also cannot add a product to an
array, which saves LoRA a pass over its output. So on a GPU cuBLAS is called by hand.
"""

import ctypes
import functools
import math

import ml_dtypes
import numpy as np

from minilm.arrays import wide
from minilm.backend import array_module, cublas, cupy

# cudaDataType: CUDA_R_16F, CUDA_R_16BF
CUDA_TYPES = {np.dtype(np.float16): 2, np.dtype(ml_dtypes.bfloat16): 14}


def matmul(a, b, alpha: float = 1.0, add_to=None):  # (..., I, K), (..., K, J) -> (..., I, J)
    """alpha a b, for a and b of one dtype, in that dtype.

    add_to: a contiguous (I, J) array. The product of two matrices is added to it; it is returned.
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

    On a GPU cuBLAS computes it: CuPy's a @ b would first write all products into a new array.
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
    xp, (I, K), J = cupy(), a.shape[-2:], b.shape[-1]
    if a.ndim == b.ndim == 2:
        c = xp.ndarray((I, J), a.dtype) if add_to is None else add_to  # xp.empty only calls this
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
    """c = alpha a b + beta c, for matrices or for stacks of matrices.

    cuBLAS stores matrices by columns, so it sees the transpose of each array: c^T = b^T a^T.
    """
    blas, handle = cublas()
    a, turn_a, lda = _layout(a)
    b, turn_b, ldb = _layout(b)
    (I, K), J, kind = a.shape[-2:], b.shape[-1], CUDA_TYPES[a.dtype]
    _kept, at_alpha, at_beta = _factors(alpha, beta)
    # The arguments: op, op, sizes, alpha | b, type, ld, stride | a, ... | beta, c, ... | settings.
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
def _factors(alpha, beta):
    """(both as C floats, the address of each, which cuBLAS takes); made once per pair."""
    factors = (ctypes.c_float * 2)(alpha, beta)
    return factors, ctypes.addressof(factors), ctypes.addressof(factors) + 4


def _layout(x):
    """(x, 0 if its rows are contiguous or 1 if its columns are, elements from one to the next).

    If neither are, as in every second column of a matrix, x is copied.
    """
    (rows, columns), (row, column), size = x.shape[-2:], x.strides[-2:], x.itemsize
    if column == size and row == columns * size:
        return x, 0, columns  # CUBLAS_OP_N
    if row == size and column == rows * size:
        return x, 1, rows  # CUBLAS_OP_T
    if x.flags.c_contiguous:  # a single row or column may have any stride
        return x, 0, columns
    if x.flags.f_contiguous:
        return x, 1, rows
    if column == size and row >= columns * size:
        return x, 0, row // size
    if row == size and column >= rows * size:
        return x, 1, column // size
    return cupy().ascontiguousarray(x), 0, columns
