"""kernels/lora_matmul.cu by its launchers: exact on whole numbers, close to float64 on others, the
gradients of `add_low_rank` on `linear`, the same bits in every order of threads, wrong input.
"""

import emulator
import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.cuda import lora_backward, lora_forward
from minilm.peft.lora import add_low_rank
from minilm.tensor import Tensor

DTYPES = ["float32", "float16", "bfloat16"]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
edges = st.sampled_from([15, 16, 17, 63, 64, 65, 127, 128, 129])  # of tiles
sizes = st.tuples(*3 * [st.integers(1, 150) | edges], st.integers(1, 40) | edges)  # M, I, O, r
SIZES = 67, 70, 129, 17  # several tiles each way, none of them full


def draw(sizes, dtype, seed, numbers=np.random.Generator.standard_normal):
    """x, W, A, B and dy; `numbers` draws them."""
    (M, I, O, r), rng = sizes, np.random.default_rng(seed)
    shapes = (M, I), (O, I), (r, I), (O, r), (M, O)
    return [numbers(rng, shape).astype(dtype) for shape in shapes]


def whole(rng, shape):
    """Small integers, whose float32 sums are exact."""
    return rng.integers(-3, 4, shape)


def run(cupy, x, W, A, B, dy, scale):
    """y, h, dx, dA, dB of the kernels."""
    x, W, A, B, dy = (cupy.asarray(a) for a in (x, W, A, B, dy))
    y, h = lora_forward(x, W, A, B, scale)
    return [a.get() for a in (y, h, *lora_backward(dy, x, h, W, A, B, scale))]


def spec(x, W, A, B, dy, scale):
    """The same in float64, with h and dh rounded on the way, and how large each one's terms are."""
    dtype = x.dtype
    x, W, A, B, dy = (a.astype(np.float64) for a in (x, W, A, B, dy))
    def rounded(a): return a.astype(dtype).astype(np.float64)
    h, dh = rounded(scale * x @ A.T), rounded(scale * dy @ B)
    sums = [(x, W.T, h, B.T), (scale * x, A.T), (dy, W, dh, A), (dh.T, x), (dy.T, h)]
    values = [sum(P @ Q for P, Q in zip(s[::2], s[1::2])) for s in sums]
    squares = [sum(P**2 @ Q**2 for P, Q in zip(s[::2], s[1::2])) for s in sums]
    return values, [np.sqrt(s).max() for s in squares]


def bits(arrays):
    return [a.tobytes() for a in arrays]


@given(sizes, dtypes, st.sampled_from([0.5, 1.0, 2.0]), seeds, seeds)
def test_whole_numbers_come_out_exact_and_rounded_once(cupy, sizes, dtype, scale, seed, order):
    inputs = draw(sizes, dtype, seed, whole)
    with emulator.thread_order(order):
        found = run(cupy, *inputs, scale)
    for actual, expected in zip(found, spec(*inputs, scale)[0], strict=True):
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected.astype(dtype))


@given(sizes, dtypes, st.floats(0.01, 10), seeds)  # nothing beyond float16's largest, 65504
def test_forward_and_backward_are_float64s(cupy, sizes, dtype, scale, seed):
    inputs = draw(sizes, dtype, seed)
    for actual, expected, size in zip(run(cupy, *inputs, scale), *spec(*inputs, scale)):
        close(actual, expected, dtype, size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_those_of_the_ops(cupy, dtype):
    x, W, A, B, dy = draw(SIZES, dtype, 1)
    y, _, *gradients = run(cupy, x, W, A, B, dy, 0.5)
    variables = x, A, B = [Tensor(a, requires_grad=True) for a in (x, A, B)]
    adapted = add_low_rank(ops.linear(x, Tensor(W)), x, A, B, scale=0.5)
    adapted.backward(dy)
    close(y, adapted.data, dtype)
    for gradient, variable in zip(gradients, variables, strict=True):
        close(gradient, variable.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_order_of_threads_gives_the_same_bits(cupy, dtype):
    inputs = draw(SIZES, dtype, 2)
    expected = bits(run(cupy, *inputs, 0.3))
    for seed in range(5):
        with emulator.thread_order(seed):
            assert bits(run(cupy, *inputs, 0.3)) == expected


@given(st.integers(1, SIZES[0]))
def test_a_row_does_not_depend_on_the_others(cupy, n):
    x, W, A, B, dy = draw(SIZES, "float32", 3)
    y, h, dx, *_ = run(cupy, x, W, A, B, dy, 0.3)
    some = run(cupy, x[-n:], W, A, B, dy[-n:], 0.3)
    assert bits(some[:3]) == bits([y[-n:], h[-n:], dx[-n:]])


def test_no_rows_give_no_values_and_gradients_of_zero(cupy):
    y, h, dx, dA, dB = run(cupy, *draw((0, 5, 6, 2), "float32", 0), 0.5)
    assert (y.shape, h.shape, dx.shape) == ((0, 6), (0, 2), (0, 5))
    assert dA.shape == (2, 5) and dB.shape == (6, 2) and not dA.any() and not dB.any()


WRONG = [
    (TypeError, "GPU", lambda a: a.get()),
    (TypeError, "one dtype", lambda a: a.astype("float16")),
    (ValueError, "must be", lambda a: a[:, 1:].copy()),
    (ValueError, "matri|must be", lambda a: a.reshape(-1)),
    (ValueError, "contiguous", lambda a: a[:, ::2]),
    (ValueError, "contiguous", lambda a: a.T),
    (ValueError, "multiple of 16", lambda a: a.reshape(-1)[1:13].reshape(3, 4)),
]


@pytest.mark.parametrize("name", ["x", "W", "A", "B", "dy", "h"])
@pytest.mark.parametrize("error, message, change", WRONG)
def test_what_does_not_go_together_is_refused_before_a_launch(cupy, name, error, message, change):
    names = ["x", "W", "A", "B", "dy"]
    arrays = {n: cupy.asarray(a) for n, a in zip(names, draw((6, 8, 5, 4), "float32", 0))}
    arrays["h"] = cupy.asarray(np.zeros((6, 4), np.float32))
    arrays[name] = change(arrays[name])
    launches = emulator.launches.total()
    with pytest.raises(error, match=message):
        lora_backward(**arrays, scale=0.5)
    if name in "xWAB":
        with pytest.raises(error, match=message):
            lora_forward(*(arrays[n] for n in "xWAB"), scale=0.5)
    assert emulator.launches.total() == launches


def test_float64_is_refused(cupy):
    x, W, A, B, _ = (cupy.asarray(a) for a in draw((6, 8, 5, 4), "float64", 0))
    with pytest.raises(TypeError, match="float32, float16, bfloat16, got float64"):
        lora_forward(x, W, A, B, 0.5)
