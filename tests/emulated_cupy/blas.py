"""cuBLAS products on raw pointers, as cupy_backends.cuda.libs.cublas offers them.

Column-major, C = alpha op(A) op(B) + beta C, summed in the compute type and rounded once. alpha and
beta are addresses of host numbers; with beta = 0 what C held is not read, so it may be nan.
"""

import ctypes

import ml_dtypes
import numpy as np

from emulated_cupy import arrays, memory

CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_OP_C = 0, 1, 2
CUBLAS_GEMM_DEFAULT, CUBLAS_GEMM_DEFAULT_TENSOR_OP = -1, 99
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F = 68, 70

# cudaDataType
DTYPES = {0: np.dtype("float32"), 1: np.dtype("float64"), 2: np.dtype("float16"),
          14: np.dtype(ml_dtypes.bfloat16)}
SUPPORTED = {  # compute type -> (dtype of A and B, dtype of C)
    CUBLAS_COMPUTE_32F: {("float32", "float32"), ("float16", "float16"), ("float16", "float32"),
                         ("bfloat16", "bfloat16"), ("bfloat16", "float32")},
    CUBLAS_COMPUTE_64F: {("float64", "float64")},
}
HANDLE = 1
math_mode = 0  # cublasMath_t


class CUBLASError(RuntimeError):
    pass


def setMathMode(handle, mode):
    """Only recorded: here sums are never rounded on the way."""
    global math_mode
    math_mode = mode


def gemmEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype,
           ldc, computeType, algo):
    """One product."""
    _gemm("gemmEx", handle, transa, transb, m, n, k, alpha, (A, Atype, lda, 0), (B, Btype, ldb, 0),
          beta, (C, Ctype, ldc, 0), 1, computeType, algo)


def gemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype,
                         ldb, strideB, beta, C, Ctype, ldc, strideC, batchCount, computeType, algo):
    """batchCount products, whose operands lie strideA, strideB and strideC elements apart."""
    _gemm("gemmStridedBatchedEx", handle, transa, transb, m, n, k, alpha, (A, Atype, lda, strideA),
          (B, Btype, ldb, strideB), beta, (C, Ctype, ldc, strideC), batchCount, computeType, algo)


def sdot(handle, n, x, incx, y, incy, result):
    """The inner product of n float32 numbers each, into the host's number at `result`."""
    _dot("sdot", np.float32, ctypes.c_float, handle, n, x, incx, y, incy, result)


def ddot(handle, n, x, incx, y, incy, result):
    """As sdot, in float64."""
    _dot("ddot", np.float64, ctypes.c_double, handle, n, x, incx, y, incy, result)


def _dot(name, dtype, kind, handle, n, x, incx, y, incy, result):
    if handle != HANDLE:
        raise CUBLASError("CUBLAS_STATUS_INVALID_VALUE")
    size = np.dtype(dtype).itemsize
    x, y = (memory.view(place, (n,), [step * size], dtype)
            for place, step in ((x, incx), (y, incy)))
    kind.from_address(result).value = x @ y
    arrays.count(name, [x, y])
    arrays.to_host[name] += 1


def _gemm(name, handle, transa, transb, m, n, k, alpha, A, B, beta, C, batch, compute, algo):
    known = {CUBLAS_GEMM_DEFAULT, CUBLAS_GEMM_DEFAULT_TENSOR_OP}
    if handle != HANDLE or algo not in known or min(m, n, k, batch) < 0:
        raise CUBLASError("CUBLAS_STATUS_INVALID_VALUE")
    kinds = [str(DTYPES.get(kind)) for _, kind, _, _ in (A, B, C)]
    if kinds[0] != kinds[1] or (kinds[0], kinds[2]) not in SUPPORTED.get(compute, ()):
        raise CUBLASError("CUBLAS_STATUS_NOT_SUPPORTED")
    if not m or not n or not batch:
        return
    inner = np.float64 if compute == CUBLAS_COMPUTE_64F else np.float32
    alpha, beta = (inner(_number(p, compute)) for p in (alpha, beta))
    a, b = _operand(A, m, k, transa, batch), _operand(B, k, n, transb, batch)
    c = _operand(C, m, n, CUBLAS_OP_N, batch)
    y = alpha * (a.astype(inner) @ b.astype(inner))
    if beta:
        y += beta * c.astype(inner)
    c[...] = y.astype(c.dtype)
    arrays.count(name, [a, b, c])


def _operand(given, rows, columns, turned, batch):
    """op(X) of column-major matrices as (batch, rows, columns), a view of their memory."""
    address, kind, pitch, stride = given
    dtype = DTYPES[kind]
    if turned:
        rows, columns = columns, rows
    if pitch < max(1, rows):
        raise CUBLASError("CUBLAS_STATUS_INVALID_VALUE")
    steps = [dtype.itemsize * step for step in (stride, 1, pitch)]
    x = memory.view(address, (batch, rows, columns), steps, dtype)
    return x.swapaxes(1, 2) if turned else x


def _number(address, compute):
    kind = ctypes.c_double if compute == CUBLAS_COMPUTE_64F else ctypes.c_float
    return kind.from_address(address).value
