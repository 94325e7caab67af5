"""Checks products of few rows: the formula's values, whoever computes which part of them."""

import multiprocessing
import os
import threading
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import vectors
from minilm.backend import use_huge_pages
from minilm.vectors import FEW, plain_product, product

DTYPES = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
dtypes = st.sampled_from(sorted(DTYPES))
seeds = st.integers(0, 2**32 - 1)


def draw(seed, dtype, *shapes):
    rng = np.random.default_rng(seed)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return [rng.standard_normal(shape).astype(kind) for shape in shapes]


def small(cores=3):
    """Parts of a few rows, which all threads share, on any machine."""
    return mock.patch.multiple(vectors, SMALL=0, PART=20, SHARED=50, _cores=lambda: cores)


@pytest.fixture(autouse=True, scope="module")
def helpers():
    """A pool as on a machine with cores enough."""
    vectors._pool.cache_clear()
    with small():
        vectors._pool()
    yield
    vectors._pool().shutdown()
    vectors._pool.cache_clear()


def agrees(x, W, dtype):
    found, expected = product(x, W), plain_product(x, W)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    size = np.linalg.norm(x.astype(float), axis=-1).max(initial=1) * np.sqrt(W.shape[1])
    assert abs(found.astype(float) - expected.astype(float)).max() <= DTYPES[dtype] * size


@given(seed=seeds, dtype=dtypes, lead=st.sampled_from([(), (1,), (2,), (2, 3), (FEW + 1,)]),
       O=st.integers(1, 30), I=st.integers(1, 12))
def test_it_is_the_formula(seed, dtype, lead, O, I):
    with small():
        agrees(*draw(seed, dtype, (*lead, I), (O, I)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 3])
def test_it_is_the_formula_at_a_real_size(dtype, B):
    agrees(*draw(0, dtype, (B, 768), (1500, 768)), dtype)


@given(seed=seeds, dtype=dtypes, O=st.integers(1, 30), I=st.integers(1, 12))
def test_a_row_has_the_same_bits_in_any_parts(seed, dtype, O, I):
    x, W = draw(seed, dtype, (I,), (O, I))
    with small():
        alone = np.concatenate([product(x, W[i : i + 1]) for i in range(O)])
        assert product(x, W).tobytes() == alone.tobytes()


def test_one_row_and_a_small_weight_go_to_blas():
    x, W, V = draw(0, "float32", (512,), (256, 512), (257, 512))
    assert product(x, W).tobytes() == plain_product(x, W).tobytes()
    with mock.patch.object(vectors, "plain_product", None):  # a larger one does not
        product(x, V)


@given(seed=seeds, dtype=dtypes)
def test_several_rows_have_the_same_bits_however_many_threads_help(seed, dtype):
    x, W = draw(seed, dtype, (3, 5), (60, 5))
    with small(cores=1):
        expected = product(x, W)
    with small(cores=3):
        assert product(x, W).tobytes() == expected.tobytes()


def test_each_part_is_done_once_and_others_help():
    done, both = [], threading.Barrier(2)

    def work(part):
        if part < 2:
            both.wait(10)  # until another thread has taken the other one
        done.append((part, threading.get_ident()))
    with small():
        vectors._each(work, range(50), 2)
    assert sorted(part for part, _ in done) == list(range(50))
    assert len({thread for _, thread in done}) == 2


def test_an_error_of_a_helper_is_raised():
    both, caller = threading.Barrier(2), threading.get_ident()

    def work(part):
        both.wait(10)
        if threading.get_ident() != caller:
            raise ValueError("the helper's")
    with small(), pytest.raises(ValueError, match="the helper's"):
        vectors._each(work, range(2), 2)


def test_nobody_waits_for_helpers_that_are_busy_elsewhere():
    release = threading.Event()
    with small():
        elsewhere = [vectors._pool().submit(release.wait, 10) for _ in range(vectors.THREADS)]
        try:
            agrees(*draw(0, "float32", (5,), (60, 5)), "float32")
            assert not any(future.done() for future in elsewhere)
        finally:
            release.set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_has_helpers_of_its_own():
    x, W = draw(0, "float32", (5,), (60, 5))
    with small():
        expected, before = product(x, W), vectors._pool()

        def child():
            assert vectors._pool() is not before and (product(x, W) == expected).all()
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(10)
        assert process.exitcode == 0


def test_dtypes_must_agree():
    with pytest.raises(TypeError, match="linear needs one dtype, got x float32, W float64"):
        product(np.zeros(3, np.float32), np.zeros((2, 3)))


def test_huge_pages_change_no_number():
    """Arrays of any size, and a view into another: 3 MiB hold a whole page of 2 MiB."""
    arrays = draw(0, "float32", (1,), (0,), (3 << 18,), (1024, 1024))
    arrays.append(arrays[-1][3:700, 5:])
    before = [(array.ctypes.data, array.copy()) for array in arrays]
    use_huge_pages(arrays)
    for array, (address, values) in zip(arrays, before):
        assert array.ctypes.data == address and np.array_equal(array, values)
