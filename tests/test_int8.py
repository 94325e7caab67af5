"""minilm.quantize.int8: the lectures' worked examples, the laws of absmax quantization, and
LLM.int8()'s product against one in integers and (marked peers) against bitsandbytes.
"""

import logging
import os

import ml_dtypes
import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st

from minilm.quantize import Int8, int8_matmul_outliers, quantize_int8
from minilm.quantize.int8 import integer_product
from minilm.tensor import Tensor

FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]
seeds = st.integers(0, 2**32 - 1)

W = np.array([[-0.7, -0.3, 0.0, -0.4, 0.3],
              [-1.0, 0.2, 0.7, 1.7, -0.9],
              [-0.1, -1.5, -0.1, 0.8, 0.5],
              [1.2, -1.7, -0.9, -0.3, 0.7],
              [0.4, 0.1, -1.4, 2.2, -1.1]])  # fmt: skip


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_the_lectures_ten_numbers():
    """c = 127 / 10.2 = 12.4509, and the codes 18 29 46 51 69 85 98 105 115 127.

    The slide cuts off c = 12.45098, and the codes of 1.5 and 5.6: c x is 18.68 and 69.73 there,
    which the slide's own formula rounds to 19 and 70.
    """
    q = quantize_int8(np.array([1.5, 2.3, 3.7, 4.1, 5.6, 6.8, 7.9, 8.4, 9.2, 10.2]))
    assert f"{q.c:.6f}" == "12.450980"
    slide = np.array([18, 29, 46, 51, 69, 85, 98, 105, 115, 127])
    assert (q.codes - slide).tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert q.absmax == np.float32(10.2) and q.codes.dtype == np.int8 and q.nbytes == 10 + 4


def test_a_matrix_is_dequantized_in_blocks(monkeypatch):
    q = quantize_int8(normal(7, 5), axis=-1)
    monkeypatch.setattr("minilm.quantize.int8.BLOCK", 10)  # two rows at a time
    assert np.array_equal(q.dequantize(), q.codes * (q.absmax * np.float32(1 / 127)))


def differing(codes, slide):
    """{(row, column): code} where the slide prints another number."""
    return {(int(i), int(j)): int(codes[i, j]) for i, j in np.argwhere(codes != slide)}


def test_the_lectures_matrix_with_one_constant():
    """127 / 2.2 for all: rows -4 -2 0 -22 16 / -60 10 40 99 -57 / ... on the slide.

    Only 5 of its 25 numbers are round(127 / 2.2 x), the formula beside them: 0, 40, 40, -81, 127.
    Those of the first two columns of the first row have lost a digit (-40, -17), and the others are
    off by 1 to 5.
    """
    codes = quantize_int8(W).codes
    slide = np.array([[-4, -2, 0, -22, 16],
                      [-60, 10, 40, 99, -57],
                      [-5, -88, -9, 48, 27],
                      [72, -100, -50, -18, 40],
                      [22, 8, -81, 127, -66]])  # fmt: skip
    assert differing(codes, slide) == {
        (0, 0): -40, (0, 1): -17, (0, 3): -23, (0, 4): 17,
        (1, 0): -58, (1, 1): 12, (1, 3): 98, (1, 4): -52,
        (2, 0): -6, (2, 1): -87, (2, 2): -6, (2, 3): 46, (2, 4): 29,
        (3, 0): 69, (3, 1): -98, (3, 2): -52, (3, 3): -17,
        (4, 0): 23, (4, 1): 6, (4, 4): -64,
    }  # fmt: skip


def test_the_lectures_matrix_with_a_constant_a_row():
    """Rows -127 -54 0 -73 54 / -77 13 51 127 -74 / ... on the slide.

    11 of its 25 numbers are round(127 / absmax(row) x), among them the whole first row and every
    row's largest; the others are off by 1 to 7, -74 for -0.9 in a row of 1.7 (-67.2) the most.
    """
    q = quantize_int8(W, axis=-1)
    slide = np.array([[-127, -54, 0, -73, 54],
                      [-77, 13, 51, 127, -74],
                      [-9, -127, -12, 70, 40],
                      [93, -127, -64, -24, 52],
                      [22, 8, -81, 127, -66]])  # fmt: skip
    assert differing(q.codes, slide) == {
        (1, 0): -75, (1, 1): 15, (1, 2): 52, (1, 4): -67,
        (2, 0): -8, (2, 2): -8, (2, 3): 68, (2, 4): 42,
        (3, 0): 90, (3, 2): -67, (3, 3): -22,
        (4, 0): 23, (4, 1): 6, (4, 4): -64,
    }  # fmt: skip
    close(q.c, 127 / np.array([[0.7], [1.7], [1.5], [1.7], [2.2]]), "float32")


def test_100_bytes_become_34():
    """25 codes, their 5 constants as codes, and one constant for these."""
    q = quantize_int8(W, axis=-1)
    constants = quantize_int8(q.absmax)
    assert W.astype(np.float32).nbytes == 100
    assert (q.codes.nbytes, constants.codes.nbytes, constants.absmax.nbytes) == (25, 5, 4)
    assert constants.codes.ravel().tolist() == [40, 98, 87, 98, 127]
    twice = Int8(q.codes, constants.dequantize()).dequantize()
    assert np.abs(twice - W).max() < 2.2 / 127


def test_ties_go_to_the_even_code():
    x = np.float32([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5])
    assert quantize_int8(x).codes.tolist() == [127, 0, 2, 2, 0, -2, -126]


@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 40)),
    exponent=st.integers(-30, 30),
    axis=st.sampled_from([None, 0, -1]),
    dtype=st.sampled_from([*FLOATS, np.float64]),
    seed=seeds,
)
def test_the_error_is_half_a_step_at_most(sizes, exponent, axis, dtype, seed):
    """Of the group's own 1 / c = absmax / 127, and the largest number keeps its value."""
    x = normal(*sizes, seed=seed).astype(np.float64) * 2.0 ** (exponent / 2)
    x = np.clip(x, -60000, 60000).astype(dtype)
    x[::3] *= dtype(0.01)
    q = quantize_int8(x, axis)
    exact = x.astype(np.float64)
    absmax = np.abs(exact).max(axis, keepdims=axis is not None, initial=0)
    assert (q.absmax == absmax.astype(np.float32)).all() and q.absmax.shape == absmax.shape
    assert q.codes.shape == x.shape and q.codes.dtype == np.int8
    error = np.abs(q.dequantize().astype(np.float64) - exact)
    assert (error <= (0.5 + 127 * 2.0**-22) * absmax / 127).all()
    again = quantize_int8(q.dequantize(), axis)
    assert (again.codes == q.codes).all()
    assert np.allclose(again.absmax, q.absmax, rtol=2e-7, atol=0)


@given(sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), seed=seeds)
def test_groups_are_what_the_axis_says(sizes, seed):
    x = normal(*sizes, seed=seed)
    x[0, 0, 0] = 7
    rows, columns = quantize_int8(x, -1), quantize_int8(x, 0)
    for i in np.ndindex(*sizes[:2]):
        alone = quantize_int8(x[i])
        assert (rows.codes[i] == alone.codes).all() and rows.absmax[i] == alone.absmax
    for i in np.ndindex(*sizes[1:]):
        alone = quantize_int8(x[:, *i])
        assert (columns.codes[:, *i] == alone.codes).all() and columns.absmax[0, *i] == alone.absmax
    flat = quantize_int8(x.reshape(-1), -1)
    assert (quantize_int8(x).codes.reshape(-1) == flat.codes).all()


@pytest.mark.parametrize("size", [0, 1e-45, 1e-38, 9e-37])
def test_a_group_of_zeros_or_nearly_is_zeros(size):
    """127 / absmax would be too large for float32 there."""
    x = np.float32([[size, -size, 0], [1, 2, 4]])
    q = quantize_int8(x, axis=-1)
    assert q.codes.tolist() == [[0, 0, 0], [32, 64, 127]]
    assert (q.dequantize()[0] == 0).all()
    assert q.c[0] == np.inf or size > 1e-37


def test_input_of_any_layout_and_dtype():
    x = normal(6, 8)
    for view in (x.T, x[::-1], x[:, ::2]):
        copy = np.ascontiguousarray(view)
        assert (quantize_int8(view, -1).codes == quantize_int8(copy, -1).codes).all()
    assert quantize_int8([1.0, -2.0]).codes.tolist() == [64, -127]
    for dtype in ("float16", "bfloat16", "float64"):
        y = quantize_int8(x).dequantize(dtype)
        assert y.dtype == np.dtype(dtype)
        assert (y == quantize_int8(x).dequantize().astype(dtype)).all()


@pytest.mark.parametrize("x, kind, message", [
    (np.float32([1, np.nan, np.inf]), ValueError, "2 of 3"),
    (np.array([1, 1e300]), ValueError, "float32, but 1 of 2"),
    (np.arange(3), TypeError, "int64"),
    (np.array([True]), TypeError, "bool"),
    (np.array([1j]), TypeError, "complex128"),
], ids=["nan", "too large", "int", "bool", "complex"])  # fmt: skip
def test_bad_numbers_are_refused(x, kind, message):
    with pytest.raises(kind, match=f"quantize_int8 needs .*{message}"):
        quantize_int8(x)


@pytest.mark.parametrize("K", [1, 1023, 1024, 1025, 4096, 5000])
def test_the_product_of_integers_is_exact(K):
    """Rounded to float32 only at the end: with codes of one sign, sums soon pass 2^24."""
    a, b = np.random.default_rng(K).integers(100, 128, (2, 30, K)).astype(np.int8)
    a[0], a[1:9], b[0] = 127, -a[1:9], 127
    exact = a.astype(np.int64) @ b.astype(np.int64).T
    assert (integer_product(a, b) == exact.astype(np.float32)).all()
    assert integer_product(a, b)[0, 0] == np.float32(K * 127**2)


def in_integers(x, W, threshold):
    """Eq. (8) of LLM.int8() once more: int64 and float64, W dequantized for outliers if Int8."""
    x64 = x.astype(np.float64)
    large = np.abs(x64) >= threshold
    h = large.any(0)
    quantized = W if isinstance(W, Int8) else quantize_int8(W, axis=-1)
    absmax = np.where(large, 0, np.abs(x64)).max(1, keepdims=True)
    c = np.float32(127) / np.where(absmax == 0, np.inf, absmax).astype(np.float32)
    codes = np.rint((np.where(h, 0, x64) * c).astype(np.float32)).astype(np.int64)
    exact = codes[:, ~h] @ quantized.codes[:, ~h].astype(np.int64).T
    y = exact * absmax * quantized.absmax.T.astype(np.float64) / 127**2
    rest = W.dequantize()[:, h] if isinstance(W, Int8) else W[:, h]
    return y + x64[:, h] @ rest.astype(x.dtype).astype(np.float64).T


@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 50), st.integers(1, 6)),
    threshold=st.sampled_from([0.0, 0.5, 2.0, 6.0, np.inf]),
    dtype=st.sampled_from(FLOATS),
    frozen=st.booleans(),
    seed=seeds,
)
def test_the_mixed_product_is_that_of_integers_and_outliers(sizes, threshold, dtype, frozen, seed):
    N, I, O = sizes
    x, W = normal(N, I, seed=seed).astype(dtype), normal(O, I, seed=seed + 1).astype(dtype)
    x[:, 0] *= dtype(10)
    x[0] = 0
    W = quantize_int8(W, axis=-1) if frozen else W
    y = int8_matmul_outliers(x, W, threshold)
    assert y.dtype == dtype and y.shape == (N, O) and (y[0] == 0).all()
    x16 = x.astype(np.float16) if dtype == np.float32 else x
    scale = np.sqrt(I) * 3
    close(y, in_integers(x16, W, threshold), "bfloat16" if dtype not in FLOATS[:2] else "float16",
          scale)  # fmt: skip
    if threshold == np.inf and dtype == np.float32:  # nothing is rounded to 16 bits but x
        close(y, in_integers(x16, W, threshold), "float32", scale)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_threshold_0_is_the_16_bit_product(dtype):
    x, W = normal(5, 70).astype(dtype), normal(9, 70, seed=1).astype(dtype)
    product = (x.astype(np.float32) @ W.astype(np.float32).T).astype(dtype)
    assert (int8_matmul_outliers(x, W, threshold=0) == product).all()


def test_an_outlier_is_a_feature_with_a_number_of_6_or_more():
    """One of exactly 6 (or -6) leaves its row's constant alone, one of 5.99 makes it.

    The 2 below the 6 is multiplied in 16 bits, being of the feature, but counts in its row's
    constant, not being so large: as bitsandbytes has it.
    """
    x, W = np.float16([[0.5, 6, 1], [0.25, 2, -1]]), np.float16([[1, 1, 1]])
    apart = int8_matmul_outliers(x, W)
    expected = [6 + (64 + 127) / 127, 2 + 2 * (16 - 64) / 127]
    assert (apart[:, 0] == np.float16(expected)).all()
    assert (int8_matmul_outliers(-x, W) == -apart).all()
    x[0, 1] = 5.99
    expected = [float(x[0, 1]) * (11 + 127 + 21) / 127, 2 * (16 + 127 - 64) / 127]
    assert (int8_matmul_outliers(x, W)[:, 0] == np.float16(expected)).all()


def test_one_outlier_feature_spoils_8_bits_and_not_the_mixture():
    x, W = normal(32, 256), normal(48, 256, seed=1)
    x[:, 17] = 60
    exact = x.astype(np.float64) @ W.T

    def error(threshold):
        y = int8_matmul_outliers(x, W, threshold)
        return np.linalg.norm(y - exact) / np.linalg.norm(exact - np.outer(x[:, 17], W[:, 17]))

    assert error(6.0) < 0.02 and error(np.inf) > 0.1 and error(np.inf) > 10 * error(6.0)


@pytest.mark.parametrize("shape", [(3, 4, 10), (2, 1, 2, 10), (10,), (0, 10)])
def test_leading_axes_stay(shape):
    x, W = normal(*shape), normal(7, 10, seed=1)
    y = int8_matmul_outliers(x, W)
    assert y.shape == (*shape[:-1], 7)
    assert (y.reshape(-1, 7) == int8_matmul_outliers(x.reshape(-1, 10), W)).all()


def test_a_frozen_weight_has_the_codes_of_the_float_one():
    x, W = normal(6, 40).astype(np.float16), normal(7, 40, seed=1).astype(np.float16)
    q = quantize_int8(W, axis=-1)
    assert (int8_matmul_outliers(x, q, np.inf) == int8_matmul_outliers(x, W, np.inf)).all()
    x[2, 3] = 20  # where the float one has its column still, and the frozen one its codes
    with_floats, frozen = int8_matmul_outliers(x, W), int8_matmul_outliers(x, q)
    rounded = 20 * (q.dequantize()[:, 3] - W[:, 3].astype(np.float32))
    assert np.abs(frozen[2] - with_floats[2] - rounded).max() < 0.03 < np.abs(rounded).max()


BAD = {
    "x: nan": (np.float32([[np.nan, 1]]), np.ones((3, 2)), ValueError, "float16, but 1 of 2"),
    "x: too large for float16": (np.full((1, 2), 7e4), np.ones((3, 2)), ValueError, "2 of 2"),
    "x: int": (np.ones((1, 2), int), np.ones((3, 2)), TypeError, "int64"),
    "W: inf": (np.ones((1, 2)), np.full((3, 2), np.inf), ValueError, "6 of 6"),
    "W: int": (np.ones((1, 2)), np.ones((3, 2), int), TypeError, "int64"),
    "I": (np.ones((4, 1500)), np.ones((3, 2000)), ValueError, r"\(4, 1500\), \(3, 2000\)"),
    "W by column": (np.ones((1, 2)), quantize_int8(W, 0), ValueError, r"\(1, 5\)"),
    "W with one constant": (np.ones((1, 5)), quantize_int8(W), ValueError, r"\(5, 5\) and \(\)"),
}


@pytest.mark.parametrize("x, W, kind, message", BAD.values(), ids=BAD)
def test_bad_factors_are_refused(x, W, kind, message):
    with pytest.raises(kind, match=message):
        int8_matmul_outliers(x, W)


@pytest.fixture(scope="module")
def bitsandbytes():
    """The module; it warns of a missing GPU library by logging."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    yield pytest.importorskip("bitsandbytes")
    logging.disable(logging.NOTSET)


def same_codes(ours, theirs, scaled):
    """Equal, but that theirs is the other neighbour of a number on (or next to) the middle of two.

    On the CPU bitsandbytes rounds twice on the way to 127 / absmax: it takes 1 / absmax times 127.
    """
    ours, theirs = ours.astype(int), theirs.astype(int)
    middle = np.abs(scaled - np.floor(scaled) - 0.5) < 127 * 2.0**-22
    assert (np.abs(ours - theirs) <= middle).all()


@pytest.mark.peers
@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
def test_codes_are_bitsandbytes(bitsandbytes, threshold):
    """Rows of float16 x, outliers apart (0 means none to bitsandbytes), and a row of zeros."""
    import torch

    for seed in range(20):
        x = (normal(13, 96, seed=seed) * (1 + seed)).astype(np.float16)
        x[3], x[4, 5] = 0, threshold
        theirs = bitsandbytes.functional.int8_vectorwise_quant(torch.tensor(x), threshold)
        codes, absmax, _ = [t if t is None else t.numpy() for t in theirs]
        large = np.abs(x) >= (threshold or np.inf)
        small = np.where(large, 0, x.astype(np.float64))
        ours = quantize_int8(small, axis=-1)
        assert (ours.absmax[:, 0] == absmax).all()
        scaled = 127 * small / np.maximum(ours.absmax, 1e-9)
        same_codes(np.where(large.any(0), 0, ours.codes), codes, scaled)


@pytest.mark.peers
@pytest.mark.parametrize("I", [32, 96, 2048])
@pytest.mark.parametrize("outlier", [1.0, 6.0, 60.0])
def test_the_product_is_bitsandbytes(bitsandbytes, I, outlier):
    """Linear8bitLt in evaluation; its constant for 1 / 127^2 has only five right digits."""
    import torch

    x, W = normal(11, I).astype(np.float16), normal(24, I, seed=1).astype(np.float16)
    x[2, 7] = outlier
    layer = bitsandbytes.nn.Linear8bitLt(I, 24, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(torch.tensor(W), False, has_fp16_weights=False)
    layer = layer.to("cpu").eval()
    with torch.no_grad():
        theirs = layer(torch.tensor(x)).numpy().astype(np.float64)
    q = quantize_int8(W, axis=-1)
    codes = layer.weight.data.numpy()
    assert (layer.state.SCB.numpy() == q.absmax[:, 0]).all()
    same_codes(q.codes, codes, 127 * W.astype(np.float64) / q.absmax)
    ours = int8_matmul_outliers(x, Int8(codes, q.absmax))
    assert np.abs(ours - theirs).max() <= 1e-3 * np.abs(theirs).max()


def test_what_is_no_array_is_named():
    with pytest.raises(TypeError, match="quantize_int8 needs an array, got Tensor"):
        quantize_int8(Tensor(np.ones(4)))
    found = int8_matmul_outliers([[1.0, 2.0]], [[3.0, 0.0]])
    np.testing.assert_allclose(found, [[3.0]], atol=0.05)


@pytest.mark.parametrize("threshold, error", [(-1.0, ValueError), (np.nan, ValueError),
                                              ("6", TypeError), (None, TypeError)])
def test_a_threshold_is_at_least_0(threshold, error):
    with pytest.raises(error, match=r"^threshold must be "):
        int8_matmul_outliers(np.ones((2, 3)), np.ones((4, 3)), threshold)
