"""8-bit integers: absmax quantization, and LLM.int8()'s product of two quantized matrices.

Dettmers, Lewis, Belkada & Zettlemoyer 2022, arXiv:2208.07339. A group of numbers shares one
constant c, which maps its largest magnitude to 127:

    X_i8 = round(127 / absmax(X) X) = round(c X)                              (1)
    dequant(c, X_i8) = X_i8 / c                                               (2)

One large number makes all others of its group coarse. Transformers have such outliers, in the same
few features h of many rows. LLM.int8() keeps those features O in 16 bits and the rest in 8:

    C ~ sum_{h in O} X_f16^h W_f16^h + S sum_{h not in O} X_i8^h W_i8^h       (3)

S = 1 / (c_x c_w) has one constant for each row of X and each output of W. (The paper numbers these
equations 1, 3 and 8.)

Shapes: N rows, I in, O out. W is (O, I), as everywhere here; the paper's is its transpose.
"""

from dataclasses import dataclass

import ml_dtypes  # noqa: F401  makes "bfloat16" the name of a dtype
import numpy as np

from minilm.arrays import BLOCK, rows, wide
from minilm.backend import array_module
from minilm.blas import matmul
from minilm.ranges import Range, check


@dataclass(frozen=True)
class Int8:
    """A tensor as 8-bit codes and constants; made by quantize_int8.

    codes: int8, in the tensor's shape.
    absmax: float32, () or with as many axes as codes; axes that share a constant have size 1.
    """

    codes: np.ndarray
    absmax: np.ndarray

    floats = None  # what dequantize gives, while kept.py keeps it
    shape = property(lambda self: self.codes.shape)
    nbytes = property(lambda self: self.codes.nbytes + self.absmax.nbytes)

    @property
    def c(self):
        """The constants 127 / absmax of eq. (1); infinite for a group of zeros."""
        with np.errstate(divide="ignore", over="ignore"):
            return 127 / self.absmax

    def dequantize(self, dtype="float32"):
        """X_i8 / c in float32, then rounded to dtype."""
        if self.floats is not None and self.floats.dtype == np.dtype(dtype):
            return self.floats
        scale = self.absmax * np.float32(1 / 127)
        if array_module(self.codes) is not np or not self.shape:
            return (self.codes * scale).astype(dtype, copy=False)  # eq. (2)
        # The same in blocks that stay in the cache; casting in the product would be slower.
        x, scale = np.empty(self.shape, np.float32), np.broadcast_to(scale, self.shape)
        step = max(1, BLOCK * len(x) // max(1, x.size))
        for i in range(0, len(x), step):
            part = x[i : i + step]
            part[...] = self.codes[i : i + step]
            part *= scale[i : i + step]
        return x.astype(dtype, copy=False)


def quantize_int8(x, axis=None) -> Int8:
    """Absmax quantization of floats x to codes from -127 to 127, ties to even.

    axis: what shares a constant, as in NumPy's reductions. None is the whole tensor; for a matrix
    -1 is each row and 0 each column. TypeError for integers, ValueError if x is not finite.

    >>> q = quantize_int8([[0.5, -2.0], [3.0, 1.0]], axis=-1)
    >>> q.codes.tolist(), q.absmax.tolist()
    ([[32, -127], [127, 42]], [[2.0], [3.0]])
    >>> q.dequantize()
    array([[ 0.503937, -2.      ],
           [ 3.      ,  0.992126]], dtype=float32)
    """
    x = finite(x, "quantize_int8")
    absmax = _largest(array_module(x).abs(x), axis)
    return Int8(_codes(x, absmax), absmax)


def int8_matmul_outliers(x, W, threshold: float = 6.0):
    """x W^T as LLM.int8() computes it: (..., I), (O, I) -> (..., O) in x's dtype.

    A feature with any |x| >= threshold is an outlier and is multiplied in 16 bits. Threshold 0
    makes all features outliers, infinity none. W: floats, or an Int8 quantized by row, whose
    outlier columns are dequantized. The 16-bit dtype is x's own if x has 16 bits, else float16.

    ValueError if x in 16 bits or W is not finite, if x and W differ in I, for an Int8 that is not
    quantized by row, and for a threshold below 0.
    """
    quantized = W if isinstance(W, Int8) else quantize_int8(W, axis=-1)
    check({"threshold": Range("at least 0", lambda x: x >= 0)}, threshold=threshold)
    x = x if hasattr(x, "dtype") else np.asarray(x, np.float32)
    O, I = quantized.shape
    if x.shape[-1:] != (I,) or quantized.absmax.shape != (O, 1):
        raise ValueError(f"int8_matmul_outliers needs x (..., I) and W (O, I) with absmax (O, 1), "
                         f"got {x.shape}, {(O, I)} and {quantized.absmax.shape}")
    x16 = finite(rows(x), "int8_matmul_outliers", x.dtype if x.dtype.itemsize == 2 else np.float16)
    xp, x32 = array_module(x16), wide(x16)
    outlier = xp.abs(x32) >= threshold
    h = outlier.any(0)  # the features in O: (I,)
    absmax = _largest(xp.where(outlier, 0, xp.abs(x32)), -1)
    x8 = _codes(xp.where(h, 0, x32), absmax)
    S = absmax * quantized.absmax.T * np.float32(1 / 127**2)
    y = S * integer_product(x8, quantized.codes)
    if h.any():
        columns = Int8(W.codes[:, h], W.absmax).dequantize() if W is quantized else W[:, h]
        y += wide(matmul(x16[:, h], columns.astype(x16.dtype).T))  # eq. (3)
    return y.astype(x.dtype).reshape(*x.shape[:-1], O)


def integer_product(a, b):
    """a b^T of int8 matrices as float32: (N, K), (M, K) -> (N, M), each partial sum exact.

    BLAS has no integers, but float32 holds them exactly up to 2^24. So a sum of products of codes
    <= 127 is exact over 1024 features, and float64 adds up such parts.
    """
    if a.shape[1] <= 1024:
        return a.astype(np.float32) @ b.astype(np.float32).T
    parts = range(0, a.shape[1], 1024)
    total = sum(integer_product(a[:, k : k + 1024], b[:, k : k + 1024]).astype(np.float64)
                for k in parts)
    return total.astype(np.float32)


def finite(x, name: str, dtype=np.float32):
    """x in dtype. TypeError if x has no floats, ValueError if it holds nan or inf, or would there.
    """
    if not hasattr(x, "dtype"):
        x = np.asarray(x, np.float32)
    if not hasattr(x, "astype"):  # a Tensor, or another library's
        raise TypeError(f"{name} needs an array, got {type(x).__name__}")
    if x.dtype.kind not in "fV":
        raise TypeError(f"{name} needs floating-point numbers, got dtype {x.dtype}")
    with np.errstate(over="ignore"):
        x = x.astype(dtype, copy=False)
    wrong = x.size - int(array_module(x).isfinite(x).sum())
    if wrong:
        raise ValueError(f"{name} needs numbers that are finite in {x.dtype}, but {wrong} of "
                         f"{x.size} are not")
    return x


def _largest(x, axis):
    """The largest of numbers >= 0, of all or along an axis, which is kept; 0 if there are none."""
    return (x.max if x.size else x.sum)(axis, keepdims=axis is not None)


def _codes(x, absmax):
    """round(127 / absmax x); zero where absmax is zero, or so small that c overflows."""
    c = 127 / array_module(x).where(absmax > 1e-36, absmax, np.inf)
    return array_module(x).rint(x * c.astype(np.float32)).astype(np.int8)  # eq. (1)
