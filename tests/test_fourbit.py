"""minilm.quantize.fourbit: its codebooks, the bytes it packs, the laws of quantization in blocks,
what double quantization costs, and (marked peers) equal bits with bitsandbytes.
"""

import logging
import math
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.quantize import FourBit, fourbit, quantize_4bit, quantize_int8
from minilm.quantize.codebooks import NF4, dynamic_map, levels, normal_float
from minilm.quantize.fourbit import BLOCK_SIZES, double_quantize

CODEBOOKS = ("nf4", "fp4", "nf3", "nf2", "int4", "int3", "int2")
FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
codebooks = st.sampled_from(CODEBOOKS)
every_codebook = pytest.mark.parametrize("name", CODEBOOKS)
seeds = st.integers(0, 2**32 - 1)
sizes = st.one_of(st.integers(0, 70), st.sampled_from([96, 127, 128, 129, 1000, 4096, 4097, 9001]))
double = st.sampled_from([False, True, "int8"])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def varied(size, seed):
    """Numbers whose runs of 32 differ in size by powers of ten, some of them zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size) * np.repeat(10 ** rng.uniform(-6, 6, size // 32 + 1), 32)[:size]
    x[rng.random(size) < 0.2] = 0
    x[32:64] = 0
    return x.astype(np.float32)


def codes_of(q):
    """The codes one by one, read from the stream of bits."""
    k, n = fourbit.bits_of(q.codebook), math.prod(q.shape)
    bits = np.unpackbits(q.packed)[: n * k].reshape(n, k)
    return bits.astype(int) @ (1 << np.arange(k - 1, -1, -1))


def constants(q):
    """absmax of each number's block: in the shape of the tensor."""
    n = math.prod(q.shape)
    return np.repeat(q.absmax, q.block_size)[:n].reshape(q.shape)


def test_nf4_is_made_of_quantiles():
    """The printed constants are the formula's, to the digits that float32 arithmetic left them."""
    assert np.abs(np.array(normal_float(4)) - NF4).max() < 3e-7
    assert (levels("nf4") == np.float32(NF4)).all()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_normal_float_has_a_zero_and_one_level_more_above_it(k):
    """And between its sides' neighbours lies the same probability everywhere."""
    values = np.array(normal_float(k))
    assert len(values) == 2**k and (np.diff(values) > 0).all()
    assert (values < 0).sum() == 2 ** (k - 1) - 1 and (values > 0).sum() == 2 ** (k - 1)
    assert (values == 0).sum() == 1 and (values[0], values[-1]) == (-1, 1)
    p = 0.5 * (1 / 2 ** (k + 1) + 1 / (2 ** (k + 1) - 2))  # the tail that is left out
    edge = math.sqrt(2) * inverse_erf(1 - 2 * p)
    below = np.array([0.5 * (1 + math.erf(v * edge / math.sqrt(2))) for v in values])
    steps = np.diff(below)
    middle = 2 ** (k - 1) - 1
    assert np.ptp(steps[:middle]) < 1e-12 and np.ptp(steps[middle:]) < 1e-12
    assert abs(below[0] - p) < 1e-12 and abs(below[-1] - (1 - p)) < 1e-12


def inverse_erf(y):
    """By bisection."""
    low, high = 0.0, 6.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle) < y else (low, middle)
    return low


def test_fp4_is_a_sign_two_bits_of_exponent_and_one_of_mantissa():
    """1 or 1.5 times 2, 4 and 8, over 12, and for the exponent 0 the values 0 and 1/16; the order
    is that of bitsandbytes' bits."""
    values = 12 * levels("fp4").astype(np.float64)
    assert np.allclose(values[:8], [0, 0.0625, 8, 12, 4, 6, 2, 3], atol=1e-6)
    assert (values[8:] == -values[:8]).all()


@pytest.mark.parametrize("name, steps", [("int4", 7), ("int3", 3), ("int2", 1)])
def test_int_levels_are_equally_spaced_and_symmetric(name, steps):
    values = levels(name)
    assert (values == np.arange(-steps, steps + 1, dtype=np.float32) / np.float32(steps)).all()


BYTES = {  # codes 1 2 3 ... that these numbers get, over a largest of 1; the rest is the level 0
    "nf4": ([-1, 1, 0, 0.2461123], [0b0000_1111, 0b0111_1010]),
    "fp4": ([1, -1, 0.25, 0], [0b0011_1011, 0b0111_0000]),
    "int4": ([1, -1, 2 / 7], [0b1110_0000, 0b1001_0111]),
    "int3": ([1, -1, 1 / 3, 0, 0, -1 / 3], [0b110_000_10, 0b0_011_011_0, 0b10_011_011]),
    "int2": ([1, -1, 0, 1, 0], [0b10_00_01_10, 0b01_01_01_01]),
    "nf2": ([1, -1, 0, 1, 0.4], [0b11_00_01_11, 0b10_01_01_01]),
}


@pytest.mark.parametrize("name", BYTES)
def test_packed_bytes(name):
    """The first code is in the highest bits; what fills up the last byte stands for zero."""
    x, packed = BYTES[name]
    x, size = np.float32(x), {"int3": 3}.get(name, 2)
    assert quantize_4bit(x, name).packed.tolist() == packed[:size]
    whole = quantize_4bit(np.concatenate([x, np.zeros(64 - len(x), np.float32)]), name)
    assert whole.packed[: len(packed)].tolist()[: len(x) // 2] == packed[: len(x) // 2]
    assert len(whole.packed) == 64 * fourbit.bits_of(name) // 8


@given(
    name=codebooks, block=st.sampled_from(BLOCK_SIZES), size=sizes, seed=seeds, form=double,
)  # fmt: skip
def test_the_error_is_half_the_widest_gap_at_most(name, block, size, seed, form):
    """Times the constant as it is stored, where the block's true one is not above it."""
    x = varied(size, seed)
    q = quantize_4bit(x, name, block, form)
    assert q.shape == x.shape and q.c2.size == -(-size // block)
    y, gap = q.dequantize(), np.diff(np.sort(levels(name))).max()
    assert y.shape == x.shape and y.dtype == np.float32
    exact = quantize_4bit(x, name, block, False)
    for i in range(0, size, block):
        part, absmax = slice(i, i + block), np.abs(x[i : i + block]).max()
        assert exact.absmax[i // block] == max(absmax, np.float32(1e-38) * (i + block > size))
        moved = abs(float(q.absmax[i // block]) - float(absmax))
        allowed = gap / 2 * absmax * (1 + 1e-6) + moved * 1.0001
        assert np.abs(y[part].astype(np.float64) - x[part]).max() <= allowed
    assert (codes_of(q) == codes_of(exact)).all()
    assert (y == levels(name)[codes_of(q)] * constants(q)).all()


@given(name=codebooks, block=st.sampled_from(BLOCK_SIZES), size=sizes, seed=seeds)
def test_every_number_gets_the_nearest_level(name, block, size, seed):
    x = varied(size, seed)
    q = quantize_4bit(x, name, block, False)
    scaled = x.astype(np.float64) / np.maximum(constants(q), 1e-30)
    values = levels(name).astype(np.float64)
    best = np.abs(scaled[:, None] - values).min(1, initial=np.inf)
    assert (np.abs(scaled - values[codes_of(q)]) <= best + 3e-7).all()


@given(name=codebooks, block=st.sampled_from(BLOCK_SIZES), size=sizes, seed=seeds)
def test_dequantized_numbers_are_a_fixed_point(name, block, size, seed):
    q = quantize_4bit(varied(size, seed), name, block, False)
    y = q.dequantize()
    again = quantize_4bit(y, name, block, False)
    assert (again.absmax == q.absmax).all()
    assert (again.dequantize() == y).all()
    if name != "fp4":  # it has two zeros
        assert (again.packed == q.packed).all()


@given(
    name=codebooks, size=sizes, exponent=st.integers(-60, 60), seed=seeds, form=double,
)  # fmt: skip
def test_a_power_of_two_scales_the_result(name, size, exponent, seed, form):
    """Bit for bit, unless products become subnormal."""
    x, factor = varied(size, seed), np.float32(2.0**exponent)
    q, scaled = quantize_4bit(x, name, 32, form), quantize_4bit(x * factor, name, 32, form)
    assert (scaled.dequantize() == q.dequantize() * factor).all()
    assert (scaled.packed == q.packed).all()


@given(name=codebooks, seed=seeds, form=double)
def test_blocks_do_not_mix(name, seed, form):
    """Other numbers in block 3 change only its own codes and, before the second level, constant."""
    x = varied(6 * 64 + 13, seed)
    q, block = quantize_4bit(x, name, 64, form), slice(3 * 64, 4 * 64)
    x[block] = normal(64, seed=seed + 1) * 1e4
    other = quantize_4bit(x, name, 64, form)
    changed = codes_of(q) != codes_of(other)
    assert changed[block].any() and not np.delete(changed, block).any()
    if not form:
        assert np.flatnonzero(q.absmax != other.absmax).tolist() == [3]


@every_codebook
@pytest.mark.parametrize("form", [False, True, "int8"])
def test_zeros_stay_zeros(name, form):
    for shape in [(0,), (1,), (3, 5), (2, 64), (300, 64)]:
        q = quantize_4bit(np.zeros(shape, np.float32), name, 64, form)
        assert q.dequantize().shape == shape and (q.dequantize() == 0).all()
    assert (q.c2 == 0).all()
    x = normal(40, 64)
    x[7] = 0
    y = quantize_4bit(x, name, 64, form).dequantize()
    assert (y[7] == 0).all() and (y[8] != 0).any()


@given(name=codebooks, block=st.sampled_from(BLOCK_SIZES), seed=seeds, form=double)
def test_chunks_change_nothing(name, block, seed, form):
    x = varied(3 * 4096 + 777, seed)
    whole = quantize_4bit(x, name, block, form)
    expected = whole.dequantize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fourbit, "BLOCK", 4096)
        parts = quantize_4bit(x, name, block, form)
        assert (parts.packed == whole.packed).all() and (parts.c2 == whole.c2).all()
        assert (whole.dequantize() == expected).all()


@every_codebook
def test_more_than_a_chunk(name):
    """2^18 numbers go at a time: around that border every code is where it belongs."""
    x = normal((1 << 18) + 100)
    y, border = quantize_4bit(x, name).dequantize(), 1 << 18
    part = slice(border - 640, border + 100)
    single = quantize_4bit(x, name, double_quant=False).dequantize()
    assert (single[part] == quantize_4bit(x[part], name, double_quant=False).dequantize()).all()
    assert np.abs(y - single).max() < 0.06


@pytest.mark.parametrize("dtype", FLOATS)
@every_codebook
def test_dtypes_in_and_out(name, dtype):
    """Any float in, as if it were float32; any float out, rounded once."""
    x = normal(3, 70).astype(dtype)
    q = quantize_4bit(x, name)
    wide = quantize_4bit(x.astype(np.float32), name)
    assert (q.packed == wide.packed).all() and (q.c2 == wide.c2).all() and q.c1 == wide.c1
    y = q.dequantize(dtype)
    assert y.dtype == dtype and (y == q.dequantize().astype(dtype)).all()
    assert (q.dequantize(np.dtype(dtype).name) == y).all()


def test_layouts_and_lists():
    x = normal(70, 6)
    for view in (x.T, x[::-1], x[::2, 1:], x.reshape(5, 14, 6).transpose(2, 0, 1)):
        q, copy = quantize_4bit(view), quantize_4bit(np.ascontiguousarray(view))
        assert (q.packed == copy.packed).all() and (q.c2 == copy.c2).all()
        assert q.shape == view.shape and (q.dequantize() == copy.dequantize()).all()
    assert quantize_4bit([[1.0, -1.0]]).packed.tolist() == [0xF0]
    assert quantize_4bit(np.float32(3)).dequantize() == 3
    x.flags.writeable = False
    quantize_4bit(x)


BAD = {
    "nan": (dict(x=np.float32([1, np.nan])), ValueError, "float32, but 1 of 2"),
    "inf": (dict(x=np.float32([np.inf, -np.inf])), ValueError, "2 of 2"),
    "too large": (dict(x=np.array([1e39, 1])), ValueError, "float32, but 1 of 2"),
    "int": (dict(x=np.arange(4)), TypeError, "int64"),
    "bool": (dict(x=np.array([True])), TypeError, "bool"),
    "codebook": (dict(codebook="nf5"), ValueError, "nf4.*'nf5'"),
    "codebook of nothing": (dict(x=normal(0), codebook="nf5"), ValueError, "'nf5'"),
    "block size": (dict(block_size=48), ValueError, "64.*48"),
    "block size 0": (dict(block_size=0), ValueError, "64.* 0"),
    "double_quant": (dict(double_quant="int4"), ValueError, "int8.*'int4'"),
    "double_quant None": (dict(double_quant=None), ValueError, "None"),
}


@pytest.mark.parametrize("settings, kind, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused(settings, kind, message):
    with pytest.raises(kind, match=message):
        quantize_4bit(**(dict(x=normal(4)) | settings))


@given(blocks=st.integers(1, 700), spread=st.floats(0, 3), seed=seeds)
def test_double_quantized_constants_are_near(blocks, spread, seed):
    """Half a gap of the 8-bit map, at most .0071 of the group's largest less the mean, and 1/65535
    for the steps that it is looked up in; int8 has half of 1/127 of the group's largest."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((blocks, 64)) * np.exp(spread * rng.standard_normal((blocks, 1))))
    q = quantize_4bit(x, double_quant=False)
    dynamic, lecture = double_quantize(q), double_quantize(q, "int8")
    mean = q.c2.mean(dtype=np.float64)
    assert dynamic.offset == np.float32(mean) and lecture.offset is None
    assert dynamic.c2.dtype == np.uint8 and lecture.c2.dtype == np.int8
    assert dynamic.c1.dtype == lecture.c1.dtype == dynamic.absmax.dtype == np.float32
    for i in range(0, blocks, 256):
        c2, group = q.c2[i : i + 256].astype(np.float64), slice(i, i + 256)
        largest = np.abs(c2 - mean).max()
        allowed = (0.0071 + 2e-5) * largest + 1e-6 * c2.max()
        assert np.abs(dynamic.absmax[group] - c2).max() <= allowed
        assert np.abs(lecture.absmax[group] - c2).max() <= 0.5001 * c2.max() / 127
        by_hand = quantize_int8(q.c2[group])
        assert (lecture.c2[group] == by_hand.codes).all() and lecture.c1[i // 256] == by_hand.absmax


def test_the_dynamic_map_has_a_zero_a_one_and_254_floats():
    values = dynamic_map()
    assert len(values) == 256 and (np.diff(values) > 0).all() and values[-1] == 1
    positive, negative = values[values > 0][:-1], -values[values < 0][::-1]
    assert len(positive) == 127 and (positive == negative).all()
    assert abs(negative[-1] - 0.99297) < 1e-5 and abs(positive[0] - 0.55e-6) < 1e-12
    for i in range(7):  # i bits of fraction between 10^(i-7) and 10^(i-6)
        inside = (positive > 10.0 ** (i - 7)) & (positive < 10.0 ** (i - 6))
        assert inside.sum() == 2**i


def test_the_lectures_form_loses_constants_below_a_254th():
    """A block so small beside the largest of its group becomes zeros; one just above does not."""
    x = normal(4, 64)
    x /= np.abs(x).max(1, keepdims=True)
    x *= np.float32([[1], [1 / 253], [1 / 255], [1e-3]])
    dead = quantize_4bit(x, double_quant="int8")
    assert dead.c2.tolist() == [127, 1, 0, 0]
    assert (dead.dequantize()[2:] == 0).all() and (dead.dequantize()[1] != 0).any()
    assert (quantize_4bit(x, double_quant=True).dequantize()[2:] != 0).any(1).all()


def test_tiny_constants_do_not_overflow():
    """Their reciprocals would."""
    x = np.repeat(np.float32([1e-38, 1.1e-38, 1.2e-38]), 64)
    for form in (True, "int8"):
        assert np.abs(quantize_4bit(x, double_quant=form).dequantize() - x).max() < 2e-38


def test_a_group_is_dead_once_the_reciprocal_of_its_constant_overflows():
    """That is at 2^-128. Its codes are 0; one just above still has the code of 1, which is 255."""
    tiny = np.float32(2.0**-128)
    for c1, code in (tiny, 0), (np.nextafter(tiny, np.float32(1)), 255):
        x = FourBit(np.zeros(32, np.uint8), np.float32([c1]), (64,))
        assert double_quantize(x, offset=0).c2.tolist() == [code]


def test_quantizing_takes_memory_for_a_few_blocks_at_a_time():
    """A copy of x divided by its constants would take as much as x."""
    x = normal(1024, 4096)
    tracemalloc.start()
    quantize_4bit(x, double_quant=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.6 * x.nbytes


@pytest.mark.parametrize("groups", [1, 3])
def test_bits_a_weight(groups):
    """The lectures' 32/64 = 0.5 becomes 8/64 + 32/(64 256) = 0.127: 3 GB of a model of 65B.

    bitsandbytes' form has 4 bytes a tensor besides, for the mean.
    """
    n = 64 * 256 * groups
    x = normal(n)
    bits = {form: 8 * quantize_4bit(x, double_quant=form).nbytes / n
            for form in (False, True, "int8")}  # fmt: skip
    assert bits[False] == 4 + 0.5
    assert bits["int8"] == 4 + 8 / 64 + 32 / (64 * 256) == bits[True] - 32 / n
    assert f"{bits['int8']:.3f}" == "4.127"
    assert f"{(bits[False] - bits['int8']) * 65e9 / 8 / 1e9:.2f}" == "3.03"
    for name, k in [("nf3", 3), ("nf2", 2), ("int2", 2)]:
        assert 8 * quantize_4bit(x, name, 64, "int8").nbytes / n == bits["int8"] - 4 + k


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 16384, 16385])
def test_nbytes_of_any_size(size):
    """Codes to the next whole byte, a constant for each block begun, one for each 256 of them."""
    blocks = -(-size // 64)
    q = quantize_4bit(normal(size))
    assert q.nbytes == -(-size // 2) + blocks + 4 * -(-blocks // 256) + 4
    assert quantize_4bit(normal(size), double_quant=False).nbytes == -(-size // 2) + 4 * blocks


def error_on_normals(name, block_size=64, form=False):
    x = np.random.default_rng(3).standard_normal((512, 4096), dtype=np.float32)
    y = quantize_4bit(x, name, block_size, form).dequantize()
    return float(np.linalg.norm(y - x) / np.linalg.norm(x))


@pytest.mark.parametrize("name, block_size, expected", [
    ("nf4", 32, 0.0873), ("nf4", 64, 0.0920), ("nf4", 128, 0.0956), ("nf4", 256, 0.0986),
    ("nf4", 4096, 0.1100), ("fp4", 32, 0.1142), ("fp4", 64, 0.1220), ("fp4", 128, 0.1287),
    ("fp4", 256, 0.1347), ("fp4", 4096, 0.1579),
])  # fmt: skip
def test_relative_error_on_normal_numbers(name, block_size, expected):
    """As measured of bitsandbytes' dequantized numbers, in the 2-norm."""
    assert abs(error_on_normals(name, block_size) - expected) < 5e-4


def test_normal_float_is_the_best_on_normal_numbers():
    errors = {name: error_on_normals(name) for name in CODEBOOKS}
    assert errors["nf4"] < errors["int4"] < errors["fp4"]
    assert errors["nf3"] < errors["int3"] and errors["nf2"] < errors["int2"]
    assert 2 * errors["nf4"] < errors["nf3"] * 1.1 and 1.8 * errors["nf3"] < errors["nf2"]
    once = errors["nf4"]
    assert once < error_on_normals("nf4", form=True) < once + 1e-4
    assert once < error_on_normals("nf4", form="int8") < once + 3e-4


@pytest.fixture(scope="module")
def peer():
    """bitsandbytes.functional; it warns of a missing GPU library by logging."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    yield pytest.importorskip("bitsandbytes.functional")
    logging.disable(logging.NOTSET)


def to_torch(x):
    import torch

    return torch.tensor(x.astype(np.float32)).to(getattr(torch, x.dtype.name))


def bits(x):
    """Floats as integers, so that -0 differs from 0."""
    return x.astype(np.float32).view(np.uint32)


def hard(rng, shape, name, block_size):
    """Numbers of all sizes, with ties between levels, their neighbours, zeros and outliers."""
    x = rng.standard_normal(shape).astype(np.float32) * np.float32(10 ** rng.uniform(-4, 4))
    flat, values = x.reshape(-1), np.sort(levels(name))
    middles = np.repeat((values[1:] + values[:-1]) / 2, 3)
    middles[::3], middles[2::3] = np.nextafter(middles[::3], -9), np.nextafter(middles[2::3], 9)
    ties = rng.choice(middles, block_size)
    ties[rng.integers(block_size)] = rng.choice([-1, 1])
    blocks = flat[: flat.size // block_size * block_size].reshape(-1, block_size)
    for row in (ties, ties * np.float32(2**20), ties * np.float32(0.3), 0 * ties, 1e-40 * ties,
                1e37 * ties, np.where(ties == 1, 1e6, 1e-3)):  # fmt: skip
        if len(blocks):
            blocks[rng.integers(len(blocks))] = row
    return x


@pytest.mark.peers
@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bits_are_bitsandbytes(peer, block_size, name, dtype):
    """Codes, constants and numbers; the mean, which torch adds up otherwise, is bitsandbytes'.

    Rows are whole blocks: else its AVX-512 code takes the constants of other blocks.
    """
    rng = np.random.default_rng(block_size)
    width = block_size * int(rng.integers(1, 4))
    x = hard(rng, (1 + 2**14 // width, width), name, block_size)
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    x[~np.isfinite(x)] = 0  # 1e37 in float16
    compare(peer, x, name, block_size, whole_rows=True)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_short_blocks_are_bitsandbytes(peer, name):
    """Codes and constants of tensors that end within a block."""
    rng = np.random.default_rng(0)
    for shape in [(1, 2), (3, 6), (1, 62), (1, 66), (7, 98), (33, 130)]:
        for block_size in (32, 64, 4096):
            x = hard(rng, shape, name, block_size)
            compare(peer, x, name, block_size, whole_rows=False)
            compare(peer, 0 * x, name, block_size, whole_rows=False)


def compare(peer, x, name, block_size, whole_rows):
    for form in (False, True):
        packed, state = peer.quantize_4bit(
            to_torch(x), blocksize=block_size, quant_type=name, compress_statistics=form
        )
        ours = quantize_4bit(x, name, block_size, double_quant=False)
        if form:
            ours = double_quantize(ours, True, state.offset.numpy())
            assert (bits(state.state2.absmax.numpy()) == bits(ours.c1)).all()
        assert (packed.numpy().ravel() == ours.packed).all()
        assert state.absmax.numpy().dtype == ours.c2.dtype
        assert (state.absmax.numpy().ravel() == ours.c2).all()
        if whole_rows:
            theirs = peer.dequantize_4bit(packed, state)
            assert theirs.shape == x.shape
            assert (bits(theirs.float().numpy()) == bits(ours.dequantize(x.dtype))).all()


@pytest.mark.peers
def test_the_dynamic_map_is_bitsandbytes(peer):
    assert (bits(dynamic_map()) == bits(peer.create_dynamic_map(signed=True).numpy())).all()


@pytest.mark.peers
def test_the_mean_is_bitsandbytes_but_for_its_last_digit(peer):
    for seed in range(5):
        x = normal(37 + seed, 64, seed=seed)
        _, state = peer.quantize_4bit(to_torch(x), quant_type="nf4", compress_statistics=True)
        theirs, ours = state.offset.numpy(), quantize_4bit(x).offset
        assert abs(theirs - ours) <= 2 * np.spacing(ours)
