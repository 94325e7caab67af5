"""kernels/nf4_*.cu by their launchers: codes and numbers bit for bit those of the NumPy code, the
product within the rounding that its kernel declares, in every order of threads; wrong input.

Not tested: float32 numbers below 1.2e-38, which a card flushes to zero and NumPy does not.
"""

import copy
import dataclasses

import emulator
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilm import cuda
from minilm.backend import to_device
from minilm.quantize import QuantizedLinear, fourbit, quantize_4bit
from minilm.quantize.fourbit import BLOCK_SIZES, levels

BF16 = ml_dtypes.bfloat16
codebooks = st.sampled_from(["nf4", "fp4", "int4"])
block_sizes = st.sampled_from(BLOCK_SIZES)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(0, 300) | st.integers(4000, 9000) | st.sampled_from(
    [n + d for n in (4096, 8192, 16384) for d in (-33, -4, -3, -1, 0, 1, 2, 3, 5, 63)])
double = st.sampled_from([False, True, "int8"])


def on_card(cupy, q):
    """A FourBit with its arrays on the card."""
    arrays = {f.name: getattr(q, f.name) for f in dataclasses.fields(q)}
    return dataclasses.replace(q, **{name: cupy.asarray(a) for name, a in arrays.items()
                                     if isinstance(a, np.ndarray | np.generic)})


def on_host(x):
    return to_device(x, "cpu").tobytes()


def numbers(rng, n, codebook):
    """Blocks of all sizes, blocks of zeros, and numbers in and beside the middle of two levels."""
    x = rng.standard_normal(n) * np.repeat(10 ** rng.uniform(-6, 6, n // 32 + 1), 32)[:n]
    x[rng.random(n) < 0.1] = 0
    x[64 : 64 + 32 * rng.integers(5)] = 0
    part = x[rng.integers(n + 1) :]
    part[...] = beside_middles(rng, part.size, codebook, rng.choice([1, rng.uniform(0.5, 1)]))
    return np.float32(x * 2.0 ** rng.integers(-60, 90))


def beside_middles(rng, n, codebook, absmax):
    """Numbers whose code depends on how exactly they are divided by absmax, and +-absmax."""
    ordered, absmax = np.sort(levels(codebook)), np.float32(absmax)
    middles = np.append((ordered[1:] + ordered[:-1]) / 2, [1, -1]).astype(np.float32)
    x = absmax * rng.choice(middles, n)
    towards = rng.choice([absmax, -absmax, 0], n).astype(np.float32)
    return np.where(x == 0, 0, np.nextafter(x, towards))  # beside zero are denormals


@given(codebooks, block_sizes, sizes, seeds, st.integers(0, 9))
def test_codes_and_constants_are_numpys(cupy, codebook, block_size, n, seed, order):
    x = numbers(np.random.default_rng(seed), n, codebook)
    expected = quantize_4bit(x, codebook, block_size, double_quant=False)
    with emulator.thread_order(order):
        found = quantize_4bit(cupy.asarray(x), codebook, block_size, double_quant=False)
    assert found.c2.get().tobytes() == expected.c2.tobytes()
    assert found.packed.get().tobytes() == expected.packed.tobytes()


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("n", [64, 63])
def test_a_number_between_two_levels_gets_the_lower_one(cupy, codebook, n):
    """And its neighbours the nearest; whole blocks and short ones."""
    ordered = np.sort(levels(codebook))
    middles = (ordered[1:] + ordered[:-1]) / 2
    x = np.zeros(n, np.float32)
    steps = np.maximum(np.spacing(middles), np.float32(1e-37))  # fp4 has a middle at zero
    x[: 3 * len(middles)] = np.concatenate([middles - steps, middles, middles + steps])
    x[-1] = 1
    expected = quantize_4bit(x, codebook, 64, False)
    assert quantize_4bit(cupy.asarray(x), codebook, 64, False).packed.get().tobytes() == (
        expected.packed.tobytes())


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
def test_a_short_block_divides_where_others_multiply_by_the_reciprocal(cupy, codebook):
    rng, differ = np.random.default_rng(0), 0
    for absmax in rng.uniform(0.5, 1, 20):
        x = beside_middles(rng, 64, codebook, absmax)
        whole, short = (quantize_4bit(part, codebook, 64, False).packed for part in (x, x[:62]))
        for part, expected in ((x, whole), (x[:62], short)):
            found = quantize_4bit(cupy.asarray(part), codebook, 64, False)
            assert found.packed.get().tobytes() == expected.tobytes()
        differ += (whole[:31] != short).sum()
    assert differ > 5


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
def test_blocks_of_zeros(cupy, codebook):
    """A short one gets the constant 1e-38, as in bitsandbytes."""
    x = np.zeros(165, np.float32)
    x[::3] = -0.0
    expected = quantize_4bit(x, codebook, 64, False)
    found = quantize_4bit(cupy.asarray(x), codebook, 64, False)
    assert found.c2.get().tolist() == expected.c2.tolist() == [0, 0, np.float32(1e-38)]
    assert found.packed.get().tobytes() == expected.packed.tobytes()


@pytest.mark.parametrize("largest", [2.0**126, 2.0**127, float(np.finfo(np.float32).max)])
def test_numbers_near_the_largest_float(cupy, largest):
    """Whose reciprocal a card takes for zero."""
    x = np.float32(largest) * np.random.default_rng(0).uniform(-1, 1, (50, 64)).astype(np.float32)
    x[:, 7] = largest
    q = quantize_4bit(cupy.asarray(x), "nf4", 64, False)
    assert q.c2.get().tolist() == [np.float32(largest)] * 50
    assert (q.packed.get() != quantize_4bit(x, "nf4", 64, False).packed).sum() <= 1


@given(codebooks, block_sizes, sizes, double, st.sampled_from(list(cuda.REAL)), seeds,
       st.integers(0, 9))
def test_dequantized_numbers_are_numpys(cupy, codebook, block_size, n, form, dtype, seed, order):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * np.repeat(rng.uniform(0, 9, n // 32 + 1), 32)[:n]
    q = quantize_4bit(x.astype(np.float32), codebook, block_size, form)
    with emulator.thread_order(order):
        found = on_card(cupy, q).dequantize(dtype)
    assert found.dtype == dtype
    assert found.get().tobytes() == q.dequantize(dtype).tobytes()


def weight(rng, N, K, codebook="nf4", form=False):
    """(N, K) random codes, with constants of different sizes."""
    x = rng.standard_normal((N, K // 64, 64)) * rng.uniform(0.01, 4, (N, K // 64, 1))
    return quantize_4bit(x.reshape(N, K).astype(np.float32), codebook, 64, form)


def rounded(q):
    """What nf4_matmul multiplies with: levels of bfloat16 times constants, in float64."""
    bytes_of = fourbit.levels(q.codebook).astype(BF16).astype(np.float64)
    codes = np.stack([q.packed >> 4, q.packed & 15], -1).reshape(-1, 64)
    return (bytes_of[codes] * q.absmax[:, None].astype(np.float64)).reshape(q.shape)


def product(cupy, x, q, h=None, B=None):
    low_rank = () if h is None else (cupy.asarray(h), cupy.asarray(B))
    return cuda.nf4_matmul(cupy.asarray(x), on_card(cupy, q).on_card(), *low_rank).get()


rows = st.integers(1, 16)
outputs = st.integers(1, 40)
blocks = st.integers(1, 10) | st.sampled_from([16, 31, 32, 33, 40, 64, 65])
ranks = st.sampled_from([0, 1, 2, 3, 8, 15, 16, 17, 32, 50, 128, 129, 256, 300])


@given(rows, outputs, blocks, ranks, codebooks, double, seeds, seeds)
def test_the_product(cupy, M, N, blocks, r, codebook, form, seed, order):
    """To half a last place of bfloat16, and what float32 sums of so many terms may lose."""
    rng, K = np.random.default_rng(seed), 64 * blocks
    q = weight(rng, N, K, codebook, form)
    x, h, B = (rng.standard_normal(shape).astype(BF16) for shape in ((M, K), (M, r), (N, r)))
    low_rank = (h, B) if r else ()
    y = product(cupy, x, q, *low_rank)
    assert y.dtype == BF16 and y.shape == (M, N)

    X, H, B64, W = (a.astype(np.float64) for a in (x, h, B, rounded(q)))
    sums = np.abs(X) @ np.abs(W).T + np.abs(H) @ np.abs(B64).T
    expected = X @ W.T + H @ B64.T
    allowed = 2**-8 * np.abs(expected) + 1.01 * 2**-23 * (K + r) * sums
    assert (np.abs(y.astype(np.float64) - expected) <= allowed).all()
    with emulator.thread_order(order):
        assert product(cupy, x, q, *low_rank).tobytes() == y.tobytes()


@given(rows, outputs, blocks, st.sampled_from([0, 5, 16, 130]), seeds)
def test_a_product_of_small_integers_is_exact(cupy, M, N, blocks, r, seed):
    """Sums of whole numbers below 2^24 round nowhere before the end."""
    rng, K = np.random.default_rng(seed), 64 * blocks
    codes, c2 = rng.integers(0, 16, (N, K)), 2.0 ** rng.integers(0, 4, (N, blocks))
    x, h, B = (rng.integers(-9, 10, shape).astype(BF16) for shape in ((M, K), (M, r), (N, r)))
    W = cuda.Codes(*map(cupy.asarray, (
        (codes[:, ::2] << 4 | codes[:, 1::2]).astype(np.uint8).ravel(),
        np.arange(-8, 8, dtype=np.float32), c2.astype(np.float32).ravel(), np.empty(0, np.uint8),
        *np.empty((3, 0), np.float32))), (N, K), 64)
    y = cuda.nf4_matmul(cupy.asarray(x), W, cupy.asarray(h), cupy.asarray(B)).get()
    X, H, B64 = (a.astype(np.float64) for a in (x, h, B))
    expected = X @ ((codes - 8) * np.repeat(c2, 64, 1)).T + H @ B64.T
    assert y.tobytes() == expected.astype(BF16).tobytes()


@given(outputs, st.integers(1, 9), double, seeds)
def test_each_column_of_the_weight(cupy, N, blocks, form, seed):
    """Rows of the unit matrix give W itself, rounded once after the constant: no other is met."""
    rng = np.random.default_rng(seed)
    q = weight(rng, N, 64 * blocks, form=form)
    columns = rng.choice(64 * blocks, 16, replace=False)
    x = np.eye(64 * blocks)[columns].astype(BF16)
    W = rounded(q).astype(np.float32)[:, columns]
    assert (product(cupy, x, q) == W.T.astype(BF16)).all()  # up to the sign of zeros


def test_an_infinity_stays_in_its_row(cupy):
    """Also where a warp has fewer blocks of columns than it loads."""
    rng = np.random.default_rng(0)
    q, x = weight(rng, 16, 192), rng.standard_normal((3, 192)).astype(BF16)
    expected = product(cupy, x, q)
    x[1, 190] = np.inf
    y = product(cupy, x, q)
    assert not np.isfinite(y[1].astype(float)).any()
    assert y[[0, 2]].tobytes() == expected[[0, 2]].tobytes()


def test_a_view_that_begins_anywhere_is_quantized(cupy):
    x = np.random.default_rng(0).normal(size=(3, 65)).astype("float32")
    expected, found = quantize_4bit(x[1:]), quantize_4bit(cupy.asarray(x)[1:])
    assert found.packed.get().tobytes() == expected.packed.tobytes()


@pytest.mark.parametrize("form", [True, "int8"])
@pytest.mark.parametrize("n", [1, 64, 300 * 64])
def test_equal_constants_have_the_codes_of_numpy(cupy, form, n):
    """Less their mean they are 0, and so is the constant of their group: a number to compare with
    others that a card takes for 0."""
    x = np.ones(n, "float32")
    expected = quantize_4bit(x, double_quant=form)
    torch.set_flush_denormal(True)  # of NumPy too: the stand-in computes as CuPy does
    try:
        found = quantize_4bit(cupy.asarray(x), double_quant=form)
    finally:
        torch.set_flush_denormal(False)
    assert found.c2.get().tobytes() == expected.c2.tobytes()
    assert (found.dequantize().get() == expected.dequantize()).all()


@pytest.mark.parametrize("form", [False, True, "int8"])
def test_a_weight_on_the_card_is_prepared_once_and_sees_what_is_loaded(cupy, form):
    rng = np.random.default_rng(0)
    one, two = (QuantizedLinear(quantize_4bit(rng.standard_normal((6, 64)), double_quant=form))
                for _ in range(2))
    layer = QuantizedLinear(one.weight).to("cuda")
    assert layer.weight.dequantize().get().tobytes() == one.weight.dequantize().tobytes()
    if form != "int8":  # whose c1 / 127 is made anew
        assert layer.weight.on_card() is layer.weight.on_card()
    assert layer.weight.on_card().packed is layer.weight.packed is layer.packed.data
    layer.load_state_dict(two.state_dict())
    again = copy.deepcopy(layer)
    again.load_state_dict(one.state_dict())
    for found, expected in (again, one), (layer, two), (layer.to("cpu"), two):
        assert on_host(found.weight.dequantize()) == expected.weight.dequantize().tobytes()


@pytest.mark.parametrize("form", [False, True, "int8"])
def test_nothing_to_do_is_no_launch(cupy, form):
    before = emulator.launches.total()
    empty = quantize_4bit(cupy.empty((0, 64), "float32"), double_quant=form)
    assert empty.packed.size == empty.c2.size == 0
    assert empty.dequantize("bfloat16").shape == (0, 64)
    y = cuda.nf4_matmul(cupy.zeros((2, 64), "bfloat16"), empty.on_card())
    assert y.shape == (2, 0) and y.dtype == "bfloat16"
    assert emulator.launches.total() == before


def refused(error, message, call, *args):
    """Raises before any launch."""
    before = emulator.launches.total()
    with pytest.raises(error, match=message):
        call(*args)
    assert emulator.launches.total() == before


def test_quantize_refuses(cupy):
    x, middles, order = cupy.zeros(256, "float32"), cupy.zeros(15, "float32"), cupy.zeros(16, "u1")
    quantize = cuda.nf4_quantize
    for size in (0, 16, 48, 8192):
        refused(ValueError, f"block_size must be .* got {size}", quantize, x, middles, order, size)
    refused(ValueError, "15 and 16 elements, got 14 and 16", quantize, x, middles[1:], order, 64)
    refused(ValueError, "15 and 16 elements, got 15 and 15", quantize, x, middles, order[1:], 64)
    refused(TypeError, "x must be float32, got float64", quantize, x.astype("float64"), middles,
            order, 64)
    refused(TypeError, "order must be uint8, got int8", quantize, x, middles, order.view("int8"),
            64)
    refused(ValueError, "x must be contiguous", quantize, x[::2], middles, order, 64)
    refused(ValueError, "x must begin at a multiple of 16", quantize, x[1:], middles, order, 64)
    refused(TypeError, "array on the GPU, got ndarray", quantize, x.get(), middles, order, 64)


def changed(W, name, value):
    return dataclasses.replace(W, **{name: value})


def test_dequantize_refuses(cupy):
    W = quantize_4bit(cupy.ones((4, 64), "float32")).on_card()
    call = cuda.nf4_dequantize
    for name in ("packed", "c2_codes", "c1", "map", "levels", "offset"):
        whole = getattr(W, name)
        more = cupy.zeros(whole.size + 16, whole.dtype)
        refused(ValueError, f"{name} of .*{whole.size + 16}", changed, W, name, more)
        wrong = changed(W, name, whole.astype("float64"))
        refused(TypeError, "must be (uint8|float32), got float64", call, wrong, "float32")
    refused(ValueError, "block_size must be", changed, W, "block_size", 16)
    refused(TypeError, "array on the GPU, got ndarray", call, changed(W, "c1", W.c1.get()),
            "float16")


def test_matmul_refuses(cupy):
    def zeros(*shape): return cupy.zeros(shape, "bfloat16")
    def quantized(*shape, size=64):
        return quantize_4bit(cupy.ones(shape, "float32"), "nf4", size).on_card()
    W, call = quantized(8, 128), cuda.nf4_matmul
    for x in (zeros(17, 128), zeros(0, 128), zeros(2, 64), zeros(128), zeros(1, 2, 128)):
        refused(ValueError, "1 to 16, K", call, x, W)
    refused(ValueError, "multiple of 64", call, zeros(1, 96), quantized(8, 96))
    refused(ValueError, "multiple of 64; got .* in 128", call, zeros(1, 128),
            quantized(8, 128, size=128))
    x = zeros(4, 128)
    for h, B in [((4, 3), (8, 4)), ((3, 4), (8, 4)), ((4, 4), (4, 4)), ((4,), (8, 4))]:
        refused(ValueError, r"h of \(4, r\) and B of \(8, r\)", call, x, W, zeros(*h), zeros(*B))
    refused(TypeError, "x must be bfloat16, got float16", call, x.astype("float16"), W)
    refused(TypeError, "h must be bfloat16, got float32", call, x, W,
            zeros(4, 2).astype("float32"), zeros(8, 2))
    refused(ValueError, "x must be contiguous", call, zeros(128, 4).T, W)
    refused(ValueError, "B must be contiguous", call, x, W, zeros(4, 2), zeros(2, 8).T)
    refused(ValueError, "x must begin at a multiple of 16", call, zeros(4 * 128 + 1)[1:].reshape(
        4, 128), W)
    refused(TypeError, "array on the GPU, got ndarray", call, x.get(), W)
