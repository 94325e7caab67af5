"""Few-bit numbers in blocks: NormalFloat, FP4 and equally spaced levels, and double quantization.

Dettmers, Pagnoni, Holtzman & Zettlemoyer 2023, arXiv:2305.14314 (QLoRA). A tensor is cut into
blocks of 64 numbers. Each block is divided by its largest magnitude, its constant c2. Then each
number is replaced by the nearest of 2^k values, the codebook:

    W^4bit = nearest(W / c2),    dequant(c2, W^4bit) = c2 codebook[W^4bit]

    codebook     values
    nf4 nf3 nf2  quantiles of a normal distribution, so that weights use all codes alike
    fp4          a sign, two bits of exponent, one of mantissa
    int4 .. 2    equally spaced: absmax quantization as in int8.py with fewer levels

The constants cost 32 bits a block, half a bit a weight. Double quantization stores them in 8 bits,
with constants c1 of their own for every 256: 8/64 + 32/(64 256) = 0.127 bits a weight, and

    doubleDequant(c1, c2, W^4bit) = dequant(dequant(c1, c2), W^4bit)          (6)

Codes and constants equal bitsandbytes' on the CPU bit for bit, ties included. (Its CUDA code
treats blocks of zeros, ties of fp4 and a few 8-bit ties differently.)
"""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np

from minilm import cuda
from minilm.arrays import BLOCK
from minilm.backend import array_module
from minilm.quantize.codebooks import bits_of, dynamic_map, levels, steps
from minilm.quantize.int8 import finite, quantize_int8

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP = 256  # constants c2 that share one c1
DOUBLE = ("bitsandbytes", "int8")  # the ways to quantize the constants


@dataclass(frozen=True)
class FourBit:
    """A tensor as codes of k bits and constants; made by quantize_4bit.

    packed: uint8, the codes as one stream of bits, first code in the highest bits.
    c2: one constant a block, in float32. With double quantization it is a code instead: uint8 for
    the dynamic map, int8 for equal steps.
    c1: float32, one constant for each 256 of c2; None without double quantization.
    offset: float32, added to every c2; None without double quantization or with equal steps.
    """

    packed: np.ndarray
    c2: np.ndarray
    shape: tuple[int, ...]
    codebook: str = "nf4"
    block_size: int = 64
    c1: np.ndarray | None = None
    offset: np.ndarray | None = None

    floats = None  # what dequantize gives, while kept.py keeps it

    @property
    def nbytes(self) -> int:
        """Bytes of codes and constants."""
        return sum(a.nbytes for a in (self.packed, self.c2, self.c1, self.offset) if a is not None)

    @property
    def absmax(self):
        """The constants c2 as they are used: float32, one a block."""
        if self.c1 is None:
            return self.c2
        xp, n = array_module(self.c2), self.c2.size
        if self.offset is None:
            return self.c2 * xp.repeat(self.c1 * np.float32(1 / 127), GROUP)[:n]
        return xp.asarray(dynamic_map()).take(self.c2) * xp.repeat(self.c1, GROUP)[:n] + self.offset

    def dequantize(self, dtype="float32"):
        """The numbers in self.shape: eq. (6) in float32, rounded once to dtype."""
        dtype = np.dtype(dtype)
        if self.floats is not None and self.floats.dtype == dtype:
            return self.floats
        if _has_kernels(self.packed, self.codebook):
            if dtype in cuda.COMPUTES:
                return cuda.nf4_dequantize(self.on_card(), dtype)
            return cuda.nf4_dequantize(self.on_card(), "float32").astype(dtype, copy=False)
        k, size = bits_of(self.codebook), self.block_size
        c2 = self.absmax  # eq. (6), the inner dequant
        xp, n = array_module(c2), math.prod(self.shape)
        x = xp.empty(len(self.packed) * 8 // k, np.float32)  # up to 7 more than n
        step = BLOCK if xp is np else max(x.size, 1)
        for i in range(0, x.size, step):
            part = x[i : i + step]
            _look_up(self.packed[i * k // 8 :][: part.size * k // 8], self.codebook, part)
            constants = c2[i // size :][: -(-part.size // size)]
            part *= xp.repeat(constants, size)[: part.size]  # the last block may be short
        return x[:n].reshape(self.shape).astype(dtype, copy=False)

    def on_card(self) -> cuda.Codes:
        """The arrays as CUDA kernels take them; they must be on the GPU, with codes of 4 bits.

        They are these very arrays, gathered once, so the kernels see what is written into them
        later. Equal steps need c1 / 127, which is computed in each call.
        """
        lectures = self.c1 is not None and self.offset is None
        return self._make_codes() if lectures else self._codes

    _codes = functools.cached_property(lambda self: self._make_codes())

    def _make_codes(self):
        xp = array_module(self.packed)
        def none(dtype): return xp.empty(0, dtype)
        if self.c1 is None:
            constants = (self.c2, none("uint8"), none("float32"), none("float32"), none("float32"))
        elif self.offset is None:  # the lectures' form: 256 equal steps
            constants = (none("float32"), self.c2.view(np.uint8), self.c1 * np.float32(1 / 127),
                         _map_on("int8", xp), xp.zeros(1, np.float32))
        else:
            constants = (none("float32"), self.c2, self.c1, _map_on("dynamic", xp), self.offset)
        return cuda.Codes(self.packed, _levels_on(self.codebook, xp), *constants, self.shape,
                          self.block_size)


def _has_kernels(x, codebook):
    """Do kernels/nf4_*.cu do the work? They do on a GPU, for codes of 4 bits."""
    return array_module(x) is not np and bits_of(codebook) == 4


@functools.lru_cache(64)
def _levels_on(name, xp):
    return xp.asarray(np.resize(levels(name), 16))


@functools.lru_cache(64)
def _map_on(form, xp):
    """The numbers that the 256 codes of a constant stand for."""
    equal = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)
    return xp.asarray(equal if form == "int8" else dynamic_map())


def quantize_4bit(x, codebook: str = "nf4", block_size: int = 64,
                  double_quant: bool | str = True) -> FourBit:
    """x, floats of any shape, in 4 bits (or as many as the codebook's name says).

    double_quant: True or "bitsandbytes" subtracts the mean of the constants and quantizes the rest
    to a signed 8-bit floating-point map. "int8" is the lectures' simpler form,
    c2_i8 = round(127 / absmax(c2) c2): it never uses its sign, and constants below
    absmax(c2) / 254 become zero. False keeps the constants in float32.

    TypeError for integers; ValueError for an unknown codebook or block size, and if x is not
    finite.

    >>> q = quantize_4bit(np.array([0.5, -1.0, 2.0, 0.0]), double_quant=False)
    >>> q.absmax.tolist(), [f"{byte:08b}" for byte in q.packed]  # two codes a byte
    ([2.0], ['10100010', '11110111'])
    >>> q.dequantize()  # 1 and 0 are levels of nf4, 0.25 and -0.5 are not
    array([ 0.4922246, -1.0501461,  2.       ,  0.       ], dtype=float32)

    The bits of a number, constants included, with and without double quantization:

    >>> x = np.random.default_rng(0).standard_normal((256, 256))
    >>> [8 * quantize_4bit(x, double_quant=d).nbytes / x.size for d in (True, False)]
    [4.12744140625, 4.5]
    """
    levels(codebook)  # ValueError for an unknown one
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}")
    if double_quant not in (False, True, *DOUBLE):
        raise ValueError(f"double_quant must be a bool or one of {DOUBLE}, got {double_quant!r}")
    x = finite(x, "quantize_4bit")
    xp, shape, x = array_module(x), x.shape, x.reshape(-1)
    if _has_kernels(x, codebook):
        packed, c2 = cuda.nf4_quantize(cuda.aligned(x), *_steps_on(codebook, xp), block_size)
    else:
        packed, c2 = _quantize(x, codebook, block_size)
    quantized = FourBit(packed, c2, shape, codebook, block_size)
    return double_quantize(quantized, double_quant) if double_quant else quantized


def _quantize(x, codebook, block_size):  # (n,) -> (bytes,), (blocks,)
    xp, whole = array_module(x), x.size // block_size * block_size
    step = BLOCK if xp is np else max(whole, 1)
    parts = [_quantize_blocks(x[i : min(i + step, whole)].reshape(-1, block_size), codebook)
             for i in range(0, whole, step)]
    if whole < x.size:
        parts.append(_quantize_short_block(x[whole:], codebook))
    return tuple(xp.concatenate(arrays) for arrays in zip(*parts)) if parts else (
        xp.empty(0, np.uint8), xp.empty(0, np.float32))


def _quantize_blocks(x, name):  # (n, block) -> (bytes,), (n,)
    xp = array_module(x)
    c2 = xp.abs(x).max(-1)
    s = x * (1 / _not_zero(xp.maximum(c2, np.float32(1e-38))))[:, None]
    return _pack(_nearest(s.reshape(-1), name), name), c2


def _quantize_short_block(x, name):  # (less than a block,) -> (bytes,), (1,)
    """Like bitsandbytes, divides by the constant here, and stores no constant below 1e-38."""
    xp, per_group = array_module(x), 8 // math.gcd(8, bits_of(name))
    c2 = xp.maximum(xp.abs(x).max(keepdims=True), np.float32(1e-38))
    s = xp.zeros(-(-x.size // per_group) * per_group, np.float32)  # codes of whole bytes
    s[: x.size] = x / _not_zero(c2)
    return _pack(_nearest(s, name), name), c2


def _not_zero(c2):
    """c2, with 1 in place of 0: a GPU turns every number below 1.2e-38 into 0, even our 1e-38."""
    return array_module(c2).where(c2 > 0, c2, np.float32(1))


def _nearest(s, name):  # (n,) -> (n,) uint8
    """The code of the nearest level; halfway between two, that of the lower one."""
    xp, (middles, order) = array_module(s), steps(name)
    codes, above = xp.zeros(s.size, np.uint8), xp.empty(s.size, bool)
    for middle in middles:
        codes += xp.greater(s, middle, out=above).view(np.uint8)
    return codes if (order[1:] > order[:-1]).all() else xp.asarray(order)[codes]


@functools.lru_cache(64)
def _steps_on(name, xp):
    """What `steps` returns, padded for the kernel to 16 levels: (15,), (16,)."""
    middles, order = steps(name)
    middles = np.pad(middles, (0, 15 - len(middles)), constant_values=np.inf)
    return xp.asarray(middles), xp.asarray(np.resize(order, 16))


def _pack(codes, name):
    """Codes one after another in a stream of bits, the highest bit first."""
    xp, k = array_module(codes), bits_of(name)
    if k == 4:  # two codes are the bytes of a little-endian number
        pairs = codes.view(np.uint16)
        return (pairs << 4 | pairs >> 8).astype(np.uint8)
    return xp.packbits(codes[:, None] >> xp.arange(k, dtype=np.uint8)[::-1] & 1)


def _look_up(packed, name, out):
    """Write the levels that packed codes stand for into out."""
    xp, k = array_module(packed), bits_of(name)
    if 8 % k:
        places = 1 << xp.arange(k, dtype=np.uint8)[::-1]
        codes = xp.unpackbits(packed).reshape(-1, k) @ places
        out[...] = xp.asarray(levels(name))[codes]
    elif xp is np:  # "clip" lets take write into out without a copy
        _levels_of_bytes(name).take(packed, axis=0, out=out.reshape(-1, 8 // k), mode="clip")
    else:
        out[...] = xp.asarray(_levels_of_bytes(name))[packed].reshape(-1)


@functools.cache
def _levels_of_bytes(name):
    """The 8 / k levels that each byte stands for: (256, 8 / k)."""
    k = bits_of(name)
    codes = np.arange(256)[:, None] >> np.arange(8 - k, -1, -k) & (1 << k) - 1
    return np.resize(levels(name), 1 << k)[codes]


def double_quantize(x: FourBit, form: bool | str = True, offset=None) -> FourBit:
    """x with its constants in 8 bits, see quantize_4bit. offset: by default the constants' mean."""
    xp, groups = array_module(x.c2), -(-x.c2.size // GROUP)
    if offset is None:
        offset = x.c2.mean(dtype=np.float64) if x.c2.size else 0.0
    offset = xp.asarray(0 if form == "int8" else offset, np.float32)
    centred = xp.zeros(groups * GROUP, np.float32)
    centred[: x.c2.size] = x.c2 - offset
    centred = centred.reshape(groups, GROUP)
    if form == "int8":
        constants = quantize_int8(centred, axis=-1)
        codes, c1, offset = constants.codes, constants.absmax, None
    else:
        c1 = xp.abs(centred).max(-1, keepdims=True)
        codes = _nearest_dynamic(centred, c1)
    return replace(x, c2=codes.reshape(-1)[: x.c2.size], c1=c1[:, 0], offset=offset)


def _nearest_dynamic(x, c1):  # (groups, 256), (groups, 1) -> (groups, 256) uint8
    """Nearest codes of the dynamic map, as bitsandbytes finds them on the CPU: x / c1 is first
    rounded to 65536 steps between -1 and 1. A group gets code 0 if 1 / c1 would be infinite."""
    xp, values = array_module(x), dynamic_map()
    dead = c1 <= 2.0**-128  # a GPU reads both sides as 0, so < would find no dead group
    s = x * (1 / xp.where(dead, np.inf, c1))  # a unit beyond 1 at most, which trunc takes away
    s[dead[:, 0]] = -1
    step = (((s + 1) * np.float32(0.5)).astype(np.float64) * 65535 + 0.5).astype(np.float32)
    s = (xp.trunc(step).astype(np.float64) * (2 / 65535) - 1).astype(np.float32)
    return xp.searchsorted(xp.asarray((values[1:] + values[:-1]) / 2), s).astype(np.uint8)
