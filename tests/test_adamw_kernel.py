"""kernels/adamw.cu by its launcher: the bits of `minilm.optim.adamw`, over several steps, at any
size, in one piece or in pages, and in every order of threads; what is too small; wrong input.
"""

import emulator
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import cuda
from minilm.optim.adamw import adamw

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 3000) | st.sampled_from([3, 4, 5, 1023, 1024, 1025, 2047, 2048, 2049])
settings = st.fixed_dictionaries({
    "lr": st.sampled_from([0.0, 1e-3, 0.1, 7.0]), "beta1": st.sampled_from([0.0, 0.8, 0.9]),
    "beta2": st.sampled_from([0.0, 0.95, 0.999]), "eps": st.sampled_from([1e-8, 1e-2]),
    "weight_decay": st.sampled_from([0.0, 0.01, 0.3])})
scales = st.sampled_from([1.0, 0.25, 0.3, 17.0])
SETTINGS = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def gradients(rng, n):
    """Of any size from 1e-12 to 1e12, of either sign, and zeros."""
    g = rng.choice([-1, 1], n) * rng.uniform(1, 10, n) * 10.0 ** rng.integers(-12, 12, n)
    return np.where(rng.random(n) < 0.2, 0, g).astype(np.float32)


def start(rng, n):
    """p, m and v, where an optimizer starts."""
    return [rng.standard_normal(n, dtype=np.float32), *np.zeros((2, n), np.float32)]


def bits(arrays):
    return [a.tobytes() for a in arrays]


@given(sizes, settings, scales, st.integers(1, 1000), seeds, seeds)
def test_steps_are_numpys_bit_for_bit(cupy, n, settings, scale, first, seed, order):
    rng = np.random.default_rng(seed)
    p, m, v = start(rng, n)
    ours = [cupy.asarray(a) for a in (p, m, v)]
    for t in range(first, first + 3):
        g = gradients(rng, n)
        adamw(p, g, m, v, t, **settings, scale=scale)
        given = cupy.asarray(g)
        with emulator.thread_order(order):
            cuda.adamw(ours[0], given, *ours[1:], t, **settings, scale=scale)
        assert bits(a.get() for a in ours) == bits([p, m, v])
        np.testing.assert_array_equal(given.get(), g)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=4), st.integers(0, 3), seeds)
def test_pages_give_the_bits_of_the_whole(cupy, fours, rest, seed):
    ends = 4 * np.cumsum(fours)
    ends[-1] += rest
    rng = np.random.default_rng(seed)
    p, m, v = start(rng, ends[-1])
    g = gradients(rng, ends[-1])
    whole, parts = ([cupy.asarray(a.copy()) for a in (p, g, m, v)] for _ in range(2))
    for t in (1, 2):
        cuda.adamw(*whole, t, **SETTINGS)
        for begin, end in zip([0, *ends], ends):
            cuda.adamw(*(a[begin:end] for a in parts), t, **SETTINGS)
    assert bits(a.get() for a in parts) == bits(a.get() for a in whole)


def test_what_is_too_small_for_the_card_is_zero(cupy):
    small = np.array([1e-12, 1e-18, 1e-20, -1e-20], np.float32)
    p, m, v = start(np.random.default_rng(0), 4)
    ours = [cupy.asarray(a) for a in (p, small, m, v)]
    cuda.adamw(*ours, 1, **SETTINGS)
    adamw(p, small, m, v, 1, **SETTINGS)
    assert bits([ours[0].get(), ours[2].get()]) == bits([p, m])  # eps hides it
    np.testing.assert_array_equal(ours[3].get(), np.where(v < np.finfo(np.float32).tiny, 0, v))
    assert (v != 0).all() and (ours[3].get() == 0).sum() == 3


def test_no_parameters_are_no_launch(cupy):
    launches = emulator.launches.total()
    cuda.adamw(*(cupy.asarray(np.zeros(0, np.float32)) for _ in range(4)), 1, **SETTINGS)
    assert emulator.launches.total() == launches


WRONG = [
    (TypeError, "GPU", lambda a: a.get()),
    (TypeError, "float32", lambda a: a.astype("float16")),
    (TypeError, "float32", lambda a: a.astype("float64")),
    (ValueError, "one size", lambda a: a[:-1]),
    (ValueError, "contiguous", lambda a: a[::2]),
    (ValueError, "multiple of 16", lambda a: a[1:]),
]


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize("error, message, change", WRONG)
def test_wrong_arrays_are_refused_and_nothing_changes(cupy, i, error, message, change):
    n = 40
    arrays = [cupy.asarray(np.full(2 * n + 1, 0.5, np.float32)) for _ in range(4)]
    sizes = {"contiguous": n + 1, "multiple of 16": 2 * n, "one size": 2 * n + 1}
    given = [a[: sizes.get(message, 2 * n + 1)] for a in arrays]
    given[i] = change(arrays[i])
    launches = emulator.launches.total()
    with pytest.raises(error, match=message):
        cuda.adamw(*given, 1, **SETTINGS)
    assert emulator.launches.total() == launches
    assert all((a.get() == 0.5).all() for a in arrays)
