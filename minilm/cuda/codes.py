"""Launchers of the kernels for 4-bit codes."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minilm.backend import array_module
from minilm.cuda.raw import kernel


@dataclass(frozen=True)
class Codes:
    """What the kernels take of a FourBit: its arrays and two tables, all on the GPU.

    c2 holds the constants in float32. If they are in 8 bits, c2 is empty, and c2_codes, c1, map and
    offset hold them. The sizes are checked once, here: ValueError if an array does not fit the
    shape.
    """

    packed: object  # uint8 (n / 2,)
    levels: object  # float32 (16,)
    c2: object  # float32 (blocks,) or (0,)
    c2_codes: object  # uint8 (blocks,) or (0,)
    c1: object  # float32 (blocks / 256,) or (0,)
    map: object  # float32 (256,) or (0,)
    offset: object  # float32 (1,) or (0,)
    shape: tuple
    block_size: int

    def __post_init__(self):
        n, size = math.prod(self.shape), self.block_size
        if size < 32 or size & (size - 1):
            raise ValueError(f"Codes: block_size must be 32, 64, 128 ..., got {size}")
        blocks, doubled = -(-n // size), self.map.size > 0
        wanted = {"packed": -(-n // 2), "levels": 16, "c2": 0 if doubled else blocks,
                  "c2_codes": blocks if doubled else 0, "c1": -(-blocks // 256) if doubled else 0,
                  "map": 256 if doubled else 0, "offset": 1 if doubled else 0}
        for name, expected in wanted.items():
            if (found := getattr(self, name).size) != expected:
                raise ValueError(f"Codes: {name} of {self.shape} in blocks of {size} has "
                                 f"{expected} elements, got {found}")

    @cached_property
    def arrays(self):
        """The arrays, in the order in which the kernels take them."""
        return (self.packed, self.levels, self.c2, self.c2_codes, self.c1, self.map, self.offset)

    @cached_property
    def numbers(self):
        """n, log2(block_size) and whether constants are in 8 bits, as the kernels take them."""
        return (np.int64(math.prod(self.shape)), np.int32(self.block_size.bit_length() - 1),
                np.int32(self.map.size > 0))


def nf4_dequantize(W: Codes, dtype):
    """The numbers that 4-bit codes stand for, in W's shape: float32, float16 or bfloat16."""
    out, numbers = array_module(W.packed).ndarray(W.shape, dtype), W.numbers
    if out.size:
        kernel("nf4_dequantize.cu", "nf4_dequantize", out.dtype)(
            (-(-out.nbytes // 16384),), (256,), *W.arrays, out, *numbers)
    return out


def nf4_quantize(x, middles, order, block_size: int):
    """(packed, c2) of float32 numbers: 4-bit codes, two a byte, and the absmax of every block.

    middles: (15,) float32, the ascending numbers between the levels. order: (16,) uint8, the codes
    of the levels from the lowest up. block_size: 32 to 4096.
    """
    if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"nf4_quantize: block_size must be 32, 64 .. 4096, got {block_size}")
    if (middles.size, order.size) != (15, 16):
        raise ValueError("nf4_quantize: middles and order must have 15 and 16 elements, got "
                         f"{middles.size} and {order.size}")
    xp, n = array_module(x), x.size
    packed, c2 = xp.empty(-(-n // 2), "uint8"), xp.empty(-(-n // block_size), "float32")
    if n:
        kernel("nf4_quantize.cu", "nf4_quantize")(
            (-(-n // 4096),), (256,), x, middles, order, packed, c2, n, block_size.bit_length() - 1)
    return packed, c2


def nf4_matmul(x, W: Codes, h=None, B=None):
    """y = x W^T + h B^T for 1 to 16 rows: x (M, K), W (N, K), h (M, r), B (N, r) -> (M, N).

    All but W are bfloat16. W has blocks of 64 and K is a multiple of 64. The levels of W and the
    result are rounded to bfloat16; the sums are float32.
    """
    xp, (N, K) = array_module(x), W.shape
    if h is None:
        h, B = (xp.empty((rows, 0), "bfloat16") for rows in (len(x), N))
    if x.ndim != 2 or x.shape[1] != K or K % 64 or W.block_size != 64 or not 1 <= len(x) <= 16:
        raise ValueError("nf4_matmul takes x of (1 to 16, K) and W of (N, K) in blocks of 64, K a "
                         f"multiple of 64; got {x.shape} and {W.shape} in {W.block_size}")
    if h.shape[:-1] != (len(x),) or B.shape != (N, h.shape[-1]):
        raise ValueError(f"nf4_matmul takes h of ({len(x)}, r) and B of ({N}, r), got {h.shape} "
                         f"and {B.shape}")
    y = xp.empty((len(x), N), "bfloat16")
    if y.size:
        kernel("nf4_matmul.cu", "nf4_matmul", TILES=-(-len(x) // 8))(
            (-(-N // 32),), (256,), x, *W.arrays, h, B, y, len(x), N, K, h.shape[1],
            W.numbers[-1])
    return y
