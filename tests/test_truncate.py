"""The nearest matrix of low rank: Eckart and Young's theorem."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.peft.truncate import truncate


@st.composite
def matrices(draw):
    """A matrix (O, I) of float64, often of less than full rank, and an rng."""
    O, I, n = (draw(st.integers(1, 9)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.normal(size=(O, n)) @ rng.normal(size=(n, I)), rng


@given(matrices(), st.integers(0, 10))
def test_what_is_lost_are_the_smallest_singular_values(matrix, r):
    W, _ = matrix
    B, A = truncate(W, r)
    s = np.linalg.svd(W, compute_uv=False)
    assert B.shape == (len(W), min(r, *W.shape)) and A.shape == (min(r, *W.shape), W.shape[1])
    lost = ((W - B @ A) ** 2).sum()
    assert abs(lost - (s[r:] ** 2).sum()) < 1e-12 * (s**2).sum() + 1e-300  # eq. (2)


@given(matrices(), st.integers(1, 4), st.floats(1e-3, 10))
def test_no_other_matrix_of_that_rank_is_nearer(matrix, r, far):
    W, rng = matrix
    B, A = truncate(W, r)
    nearest = np.linalg.norm(W - B @ A)
    others = [(B + far * rng.normal(size=B.shape), A), (B, A + far * rng.normal(size=A.shape)),
              (rng.normal(size=B.shape), rng.normal(size=A.shape))]
    best = np.linalg.lstsq(others[1][1].T, W.T, rcond=None)[0].T  # the best B for that A
    for b, a in [*others, (best, others[1][1])]:
        assert np.linalg.norm(W - b @ a) >= nearest - 1e-9 * np.linalg.norm(W)


@given(matrices(), st.integers(0, 5), st.integers(0, 5))
def test_a_matrix_of_low_rank_stays(matrix, r, more):
    W, _ = matrix
    low = np.matmul(*truncate(W, r))
    again = np.matmul(*truncate(low, r + more))
    assert abs(again - low).max() <= 1e-12 * abs(W).max()


@given(matrices(), st.integers(0, 5))
def test_rotations_and_transposes_pass_through(matrix, r):
    W, rng = matrix
    s = np.append(np.linalg.svd(W, compute_uv=False), 0)
    if r < len(s) - 1 and s[r - 1] - s[r] < 1e-3 * s[0]:  # two are as near
        return
    Q = np.linalg.qr(rng.normal(size=(len(W), len(W))))[0]
    low = np.matmul(*truncate(W, r))
    assert abs(np.matmul(*truncate(Q @ W, r)) - Q @ low).max() <= 1e-9 * s[0]
    assert abs(np.matmul(*truncate(W.T, r)).T - low).max() <= 1e-9 * s[0]


@given(matrices(), st.integers(1, 5))
def test_both_factors_have_the_size_of_the_root(matrix, r):
    W, _ = matrix
    B, A = truncate(W, r)
    s = np.linalg.svd(W, compute_uv=False)[:r]
    np.testing.assert_allclose(B.T @ B, np.diag(s), atol=1e-12 * s[0])
    np.testing.assert_allclose(A @ A.T, np.diag(s), atol=1e-12 * s[0])


@pytest.mark.parametrize("dtype, factors", [
    (np.float64, np.float64), (np.float32, np.float32), (np.float16, np.float32),
    (ml_dtypes.bfloat16, np.float32)])
def test_dtypes(dtype, factors):
    W = np.arange(12).reshape(3, 4).astype(dtype)  # of rank 2
    B, A = truncate(W, 2)
    assert B.dtype == A.dtype == factors
    np.testing.assert_allclose(B @ A, W.astype(factors), atol=1e-5)


def test_what_is_refused():
    with pytest.raises(ValueError, match=re.escape("matrix (O, I) of finite numbers, got shape (3,"
                                                   ")")):
        truncate(np.ones(3), 1)
    with pytest.raises(ValueError, match=re.escape("got shape (1, 2) with others")):
        truncate(np.array([[1, np.nan]]), 1)
    with pytest.raises(ValueError, match="r must be"):
        truncate(np.ones((2, 2)), -1)
