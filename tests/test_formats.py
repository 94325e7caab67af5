"""Formats of numbers: the formulas against every number of 16 bits, finfo, and rounding."""

import math

import ml_dtypes
import numpy as np
import pytest

from minilm.measure.formats import FORMATS, Float, Whole, by_rounding

NARROW = {"float16": Float(5, 10), "bfloat16": Float(8, 7), "float8_e5m2": Float(5, 2),
          "float8_e3m4": Float(3, 4)}


@pytest.mark.parametrize("name", NARROW)
def test_the_formulas_are_those_of_every_number(name):
    dtype, held = np.dtype(name), NARROW[name]
    codes = np.arange(1 << 8 * dtype.itemsize, dtype=np.uint64)
    with np.errstate(invalid="ignore"):  # among them are signaling nans
        x = codes.astype(f"u{dtype.itemsize}").view(dtype).astype(np.float64)
    x = np.unique(x[np.isfinite(x) & (x > 0)])
    assert held.bits == 8 * dtype.itemsize and held.positive == len(x)
    assert held.largest == x[-1]
    above = x[x > 1][0]
    assert held.step == above - 1
    normal = x[x >= held.least]  # from there on 2^m numbers a power of 2, and below it fewer
    assert ((normal >= held.least) & (normal < 2 * held.least)).sum() == 2**held.m
    assert ((x >= held.least / 2) & (x < held.least)).sum() == 2 ** (held.m - 1)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_rounding_shows_the_same(name):
    held, info = FORMATS[name], ml_dtypes.finfo(name)
    assert by_rounding(name) == (held.largest, held.least, held.step)
    assert (held.largest, held.least, held.step) == tuple(
        map(float, (info.max, info.smallest_normal, info.eps)))


def test_the_lectures_numbers():
    half, single = FORMATS["float16"], FORMATS["float32"]
    assert (half.bits, half.largest, half.step) == (16, 65504, 1 / 1024)
    assert (single.bits, f"{single.largest:.4e}") == (32, "3.4028e+38")
    assert FORMATS["bfloat16"].least == single.least
    assert [(FORMATS[k].bits, FORMATS[k].largest) for k in ("int8", "int4")] == [(8, 127), (4, 7)]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 127, 128])
def test_integers_need_the_next_whole_bits(n):
    bits = Whole(n).bits
    assert 2 ** (bits - 1) < 2 * n + 1 <= 2**bits
    assert bits in (math.ceil(math.log2(2 * n)), math.log2(2 * n) + 1)
