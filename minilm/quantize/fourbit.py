"""Few-bit numbers in blocks: NormalFloat, FP4 and equally spaced levels, and double quantization.

Dettmers, Pagnoni, Holtzman & Zettlemoyer 2023, arXiv:2305.14314 (QLoRA). A tensor is cut into
blocks of 64 numbers. Each block is divided by its largest magnitude, its constant c2, and each
number replaced by the nearest of 2^k values, the codebook:

    W^4bit = nearest(W / c2),    dequant(c2, W^4bit) = c2 codebook[W^4bit]

    codebook     values
    nf4 nf3 nf2  quantiles of a normal distribution, so that weights use all codes alike
    fp4          a sign, two bits of exponent, one of mantissa
    int4 .. 2    equally spaced: absmax quantization as in int8.py with fewer levels

The constants cost 32 bits a block, half a bit a weight. Double quantization stores them in 8 bits,
with constants c1 of their own for every 256: 8/64 + 32/(64 256) = 0.127 bits a weight, and

    doubleDequant(c1, c2, W^4bit) = dequant(dequant(c1, c2), W^4bit)          (6)

Codes and constants equal bitsandbytes' on the CPU bit for bit, ties included. (Its CUDA code
treats blocks of zeros, ties of fp4 and a few 8-bit ties otherwise.)
"""

import functools
import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from minilm.backend import BLOCK, array_module
from minilm.quantize.int8 import finite, quantize_int8

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP = 256  # constants c2 that share one c1

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)
FP4 = tuple(sign * v / 12 for sign in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3))
DOUBLE = ("bitsandbytes", "int8")  # the ways to quantize the constants


@functools.cache
def levels(name: str) -> np.ndarray:
    """What the codes 0, 1, ... of a codebook stand for: (2^k,) float32, from -1 to 1.

    int<k> has one level less, for it is symmetric around zero. ValueError for an unknown name.
    """
    values = {"nf4": lambda: NF4, "fp4": lambda: FP4,
              "nf3": lambda: normal_float(3), "nf2": lambda: normal_float(2),
              "int4": lambda: np.arange(-7, 8) / 7, "int3": lambda: np.arange(-3, 4) / 3,
              "int2": lambda: (-1, 0, 1)}
    if name not in values:
        raise ValueError(f"codebook must be one of {tuple(values)}, got {name!r}")
    return np.array(values[name](), np.float32)


def normal_float(k: int) -> list[float]:
    """k-bit NormalFloat: quantiles of N(0, 1) over the outermost one, and an exact zero.

    Equally probable steps from the tail to the median, 2^(k-1) - 1 on the negative side and one
    more on the positive (QLoRA, section 3 and appendix E).
    """
    half, tail = 2 ** (k - 1), 1 - (1 / 2 ** (k + 1) + 1 / (2 ** (k + 1) - 2)) / 2

    def side(n):  # n quantiles, outermost first
        steps = [tail + (0.5 - tail) * i / n for i in range(n)]
        return [NormalDist().inv_cdf(p) / NormalDist().inv_cdf(tail) for p in steps]
    return [*(-q for q in side(half - 1)), 0.0, *reversed(side(half))]


def bits_of(name: str) -> int:
    """Bits of a code of this codebook."""
    return math.ceil(math.log2(len(levels(name))))


@dataclass(frozen=True)
class FourBit:
    """A tensor as codes of k bits and constants; made by quantize_4bit.

    packed: uint8, the codes as one stream of bits, first code in the highest bits.
    c2: one constant a block: float32, or with double quantization uint8 (codes of the dynamic map)
    or int8. c1, offset: float32 constants of each 256 of them and what is added to all; else None.
    """

    packed: np.ndarray
    c2: np.ndarray
    shape: tuple[int, ...]
    codebook: str = "nf4"
    block_size: int = 64
    c1: np.ndarray | None = None
    offset: np.ndarray | None = None

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
        return xp.asarray(dynamic_map())[self.c2] * xp.repeat(self.c1, GROUP)[:n] + self.offset

    def dequantize(self, dtype="float32"):
        """The numbers, float32 products of code and constant rounded once to dtype: eq. (6)."""
        c2, k, size = self.absmax, bits_of(self.codebook), self.block_size  # the inner dequant
        xp, n = array_module(c2), math.prod(self.shape)
        x = xp.empty(len(self.packed) * 8 // k, np.float32)  # up to 7 more than n
        step = BLOCK if xp is np else max(x.size, 1)
        for i in range(0, x.size, step):
            part = x[i : i + step]
            _look_up(self.packed[i * k // 8 :][: part.size * k // 8], self.codebook, part)
            whole, constants = part.size // size * size, c2[i // size :]
            blocks = part[:whole].reshape(-1, size)
            blocks *= constants[: len(blocks), None]
            part[whole:] *= constants[len(blocks) :][:1]  # the last block may be short
        return x[:n].reshape(self.shape).astype(dtype, copy=False)


def quantize_4bit(x, codebook: str = "nf4", block_size: int = 64,
                  double_quant: bool | str = True) -> FourBit:
    """x, floats of any shape, in 4 bits (or as many as the codebook's name says).

    double_quant: True or "bitsandbytes" quantizes the constants less their mean to a signed 8-bit
    floating-point map; "int8" is the lectures' simpler c2_i8 = round(127 / absmax(c2) c2), which
    never uses its sign and makes zeros of constants below absmax(c2) / 254; False leaves them be.

    ValueError for an unknown codebook or block size, and where x is not finite.
    """
    levels(codebook)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}")
    if double_quant not in (False, True, *DOUBLE):
        raise ValueError(f"double_quant must be a bool or one of {DOUBLE}, got {double_quant!r}")
    x = finite(x, "quantize_4bit")
    xp, shape, x = array_module(x), x.shape, x.reshape(-1)
    whole = x.size // block_size * block_size
    step = BLOCK if xp is np else max(whole, 1)
    parts = [_quantize_blocks(x[i : min(i + step, whole)].reshape(-1, block_size), codebook)
             for i in range(0, whole, step)]
    if whole < x.size:
        parts.append(_quantize_short_block(x[whole:], codebook))
    packed, c2 = (xp.concatenate(arrays) for arrays in zip(*parts)) if parts else (
        xp.empty(0, np.uint8), xp.empty(0, np.float32))
    quantized = FourBit(packed, c2, shape, codebook, block_size)
    return double_quantize(quantized, double_quant) if double_quant else quantized


def _quantize_blocks(x, name):  # (n, block) -> (bytes,), (n,)
    xp = array_module(x)
    c2 = xp.abs(x).max(-1)
    s = x * (1 / xp.maximum(c2, np.float32(1e-38)))[:, None]
    return _pack(_nearest(s.reshape(-1), name), name), c2


def _quantize_short_block(x, name):  # (less than a block,) -> (bytes,), (1,)
    """bitsandbytes divides here, and stores no constant below 1e-38."""
    xp, per_group = array_module(x), 8 // math.gcd(8, bits_of(name))
    c2 = xp.maximum(xp.abs(x).max(keepdims=True), np.float32(1e-38))
    s = xp.zeros(-(-x.size // per_group) * per_group, np.float32)  # codes of whole bytes
    s[: x.size] = x / c2
    return _pack(_nearest(s, name), name), c2


def _nearest(s, name):  # (n,) -> (n,) uint8
    """The code of the nearest level; in the middle of two, of the lower one."""
    xp, values = array_module(s), levels(name)
    order = np.argsort(values, kind="stable")
    middles = (values[order][1:] + values[order][:-1]) / 2
    codes, above = xp.zeros(s.size, np.uint8), xp.empty(s.size, bool)
    for middle in middles:
        codes += xp.greater(s, middle, out=above).view(np.uint8)
    return codes if (order[1:] > order[:-1]).all() else xp.asarray(order.astype(np.uint8))[codes]


def _pack(codes, name):
    """Codes one after another in a stream of bits, the highest bit first."""
    xp, k = array_module(codes), bits_of(name)
    if k == 4:  # two codes are the bytes of a little-endian number
        pairs = codes.view(np.uint16)
        return (pairs << 4 | pairs >> 8).astype(np.uint8)
    return xp.packbits(codes[:, None] >> xp.arange(k - 1, -1, -1, dtype=np.uint8) & 1)


def _look_up(packed, name, out):
    """Write the levels that packed codes stand for into out."""
    xp, k = array_module(packed), bits_of(name)
    if 8 % k:
        places = 1 << xp.arange(k - 1, -1, -1, dtype=np.uint8)
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
    """x with its float32 constants in 8 bits; see quantize_4bit. offset: by default their mean."""
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
    """Nearest codes of the dynamic map. As in bitsandbytes on the CPU, x / c1 is first rounded to
    65536 steps between -1 and 1, and a group gets code 0 where 1 / c1 would be infinite."""
    xp, values, dead = array_module(x), dynamic_map(), c1 < 3e-39
    s = xp.clip(x * (1 / xp.where(dead, np.inf, c1)), -1, 1)
    s[dead[:, 0]] = -1
    step = (((s + 1) * np.float32(0.5)).astype(np.float64) * 65535 + 0.5).astype(np.float32)
    s = (xp.trunc(step).astype(np.float64) * (2 / 65535) - 1).astype(np.float32)
    return xp.searchsorted(xp.asarray((values[1:] + values[:-1]) / 2), s).astype(np.uint8)


@functools.cache
def dynamic_map() -> np.ndarray:
    """bitsandbytes' signed 8-bit floats: (256,) float32 in ascending order, from -0.993 to 1.

    A sign, i leading zeros that scale by 10^(i - 6), and a fraction of as many bits as are left:
    the middles of 2^i equal parts of [0.1, 1] (Dettmers et al. 2022, arXiv:2110.02861).
    """
    values = [np.float32([0, 1])]
    for i in range(7):
        n, low, high = 2**i, np.float32(0.1), np.float32(1)
        step, place = np.float64((high - low) / np.float32(n)), np.arange(n + 1)
        # from both ends and rounded once, like torch.linspace
        edges = np.where(place < (n + 1) // 2, low + step * place, high - step * (n - place))
        edges = edges.astype(np.float32)
        middles = (edges[1:] + edges[:-1]) / 2 * np.float32(10.0 ** (i - 6))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))
