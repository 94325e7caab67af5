"""Adam's moments in 8 bits, block by block: 2.03 bytes a parameter instead of 8.

Dettmers, Lewis, Shleifer & Zettlemoyer 2022, arXiv:2110.02861. Each of m and v is cut into blocks
of 256 numbers. A block has one constant N, its largest magnitude. Each of its numbers T_i has the
code of the nearest of 256 values Q, the dynamic map. (v is never negative and has its own map.)

    q_i = argmin_j |Q_j - T_i / N|         (quantize)
    T_i = Q[q_i] N                         (dequantize)

A step dequantizes a block to float32, updates it and the parameters by `adamw`, and quantizes it
again. The parameters see the new m and v before they are rounded.

The format is bitsandbytes': codes, constants and maps can be exchanged. It has the same limits. Q
begins at -0.993, so a block loses 0.7 % of its largest number if that is negative. A v below 1.6e-7
of its block's largest becomes zero, though its m may not. If the gradient stops then, what is left
of m is divided by eps alone. So keep embeddings in float32: their gradients come and go.
"""

import functools

import numpy as np

from minilm.arrays import BLOCK
from minilm.backend import array_module
from minilm.optim.adamw import adamw
from minilm.quantize.codebooks import dynamic_map

BLOCK_SIZE = 256  # numbers that share a constant
CARD_BLOCK = 1 << 20  # numbers that a GPU dequantizes at a time; a CPU takes BLOCK of them
TABLES = 1 << 18  # bytes of _tables, signed and not
TINY = np.finfo(np.float32).tiny


class EightBit:
    """The states m and v of n parameters as four arrays, see `names`.

    Codes are uint8, one a parameter. absmax is float32, one a block of 256; the last block may be
    shorter.
    """

    block = BLOCK_SIZE  # elements that always stay together
    names = "m", "v", "m_absmax", "v_absmax"  # the first two are codes

    def zeros(self, n: int, xp=np) -> tuple:
        """The arrays for n parameters before the first step, made by the module xp: all zeros."""
        blocks = -(-n // BLOCK_SIZE)
        return (xp.zeros(n, np.uint8), xp.zeros(n, np.uint8),
                xp.zeros(blocks, np.float32), xp.zeros(blocks, np.float32))

    def spare(self, n: int) -> int:
        """Extra bytes that an update of n parameters takes on a GPU: about 20 MiB at most."""
        return 24 * min(-(-n // BLOCK_SIZE) * BLOCK_SIZE, CARD_BLOCK) + TABLES

    def update(self, p, g, arrays, t: int, lr: float, beta1: float, beta2: float, eps: float,
               weight_decay: float, scale: float = 1.0):
        """Step t of AdamW for gradients g * scale, all finite; p and the arrays change in place.

        Parts of the parameters can be updated one by one, with the same bits, if each part is whole
        blocks.
        """
        m_codes, v_codes, m_absmax, v_absmax = arrays
        step = BLOCK if array_module(p) is np else CARD_BLOCK
        for i in range(0, p.size, step):
            part, blocks = slice(i, i + step), slice(i // BLOCK_SIZE, -(-(i + step) // BLOCK_SIZE))
            m = dequantize(m_codes[part], m_absmax[blocks], signed=True)
            v = dequantize(v_codes[part], v_absmax[blocks], signed=False)
            adamw(p[part], g[part], m, v, t, lr, beta1, beta2, eps, weight_decay, scale)
            m_codes[part], m_absmax[blocks] = quantize(m, signed=True)
            v_codes[part], v_absmax[blocks] = quantize(v, signed=False)


def quantize(x, signed: bool):
    """(codes (n,) uint8, absmax (blocks,) float32) of finite numbers x: (n,) float32.

    Each number is divided by absmax in float32. Halfway between two values the lower one is taken.
    A block below 1.2e-38 becomes zeros, since a GPU takes so small a divisor for zero.
    """
    n, x = x.size, _blocks(x)
    absmax = array_module(x).abs(x).max(-1)
    absmax *= absmax >= TINY
    s = x / (absmax + (absmax == 0))[:, None]
    return _nearest(s.reshape(-1), signed)[:n], absmax


def dequantize(codes, absmax, signed: bool):
    """The numbers that codes stand for: (n,) float32."""
    values, _, _ = _tables(signed, array_module(codes))
    x = _blocks(values.take(codes))
    x *= absmax[:, None]
    return x.reshape(-1)[: codes.size]


def _blocks(x):  # (n,) -> (blocks, 256)
    short = -x.size % BLOCK_SIZE
    return (array_module(x).pad(x, (0, short)) if short else x).reshape(-1, BLOCK_SIZE)


def _nearest(s, signed):  # (n,) from -1 to 1 -> (n,) uint8
    """The code of the nearest value, exactly.

    Among numbers with the same upper 16 bits there is at most one midpoint of two values. So a
    table of those bits and one comparison give the code, twenty times as fast as a search.
    """
    _, lowest, middles = _tables(signed, array_module(s))
    codes = lowest.take(s.view(np.uint16)[1::2])
    codes += s > middles.take(codes)
    return codes


@functools.lru_cache(8)
def _tables(signed, xp):
    """(the map; by upper 16 bits, the code of the lowest such number; the midpoint above a code).
    """
    values = dynamic_map(signed)
    exact = (values[1:].astype(np.float64) + values[:-1]) / 2
    middles = exact.astype(np.float32)  # next rounded down, to miss no s > middle
    middles = np.where(middles > exact, np.nextafter(middles, np.float32(-1)), middles)
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    bits[1 << 15 :] |= 0xFFFF  # among negative numbers, the highest bits make the lowest number
    lowest = np.searchsorted(middles, bits.view(np.float32)).astype(np.uint8)
    middles = np.append(middles, np.float32(np.inf))
    return xp.asarray(values), xp.asarray(lowest), xp.asarray(middles)
