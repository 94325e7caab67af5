"""Similarity of subspaces and amplification: the laws of Hu et al. 2021, section 7."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.measure.subspaces import (
    along,
    amplification,
    directions,
    phi,
    similarities,
    singular,
)

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 8)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def regular(seed, n):
    """An invertible matrix whose singular values lie between .5 and 2."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in "UV")
    return U * rng.uniform(0.5, 2, n) @ V


@given(seeds, sizes, sizes, st.integers(0, 6), st.data())
def test_phi_lies_between_0_and_1(seed, r, s, more, data):
    I = max(r, s) + more
    A, other = normal(seed, r, I), normal(seed + 1, s, I)
    i, j = data.draw(st.integers(1, r)), data.draw(st.integers(1, s))
    found = phi(A, other, i, j)
    assert -1e-12 <= found <= 1 + 1e-12
    assert abs(found - phi(other, A, j, i)) < 1e-12
    assert abs(phi(A, A, i, i) - 1) < 1e-12
    if I == r:  # all directions hold any others
        assert abs(phi(A, other, r, j) - 1) < 1e-12


@given(seeds, sizes, st.integers(0, 6), st.data())
def test_at_full_rank_phi_knows_the_row_space_alone(seed, r, more, data):
    A, other = normal(seed, r, r + more), normal(seed + 1, 8, r + more)
    j, M = data.draw(st.integers(1, min(other.shape))), regular(seed, r)
    assert abs(phi(A, other, r, j) - phi(M @ A, other, r, j)) < 1e-9


@given(seeds, sizes, st.integers(0, 6), st.data())
def test_a_rotation_of_both_changes_nothing(seed, r, more, data):
    I, i = r + more, data.draw(st.integers(1, r))
    Q = np.linalg.qr(normal(seed + 2, I, I))[0]
    A, other = normal(seed, r, I), normal(seed + 1, r, I)
    assert abs(phi(A, other, i, r) - phi(A @ Q, other @ Q, i, r)) < 1e-9
    W = normal(seed + 3, r, I)
    assert np.isclose(amplification(A @ Q, W @ Q, i), amplification(A, W, i), rtol=1e-6)


@given(seeds, sizes, st.integers(0, 6))
def test_the_grid_is_phi(seed, n, more):
    A, other = normal(seed, n, n + more), normal(seed + 1, n + 1, n + more)
    grid = similarities(A, other, n)
    expected = [[phi(A, other, i, j) for j in range(1, n + 1)] for i in range(1, n + 1)]
    np.testing.assert_allclose(grid, expected, atol=1e-12)


def test_orthogonal_rows_share_nothing_and_an_angle_is_its_cosine():
    e = np.eye(4)
    assert phi(e[:2], e[2:], 2, 2) == 0
    assert phi(3 * e[:1], e[:3] * [[5], [1], [.5]], 1, 3) == 1
    c, s = np.cos(0.3), np.sin(0.3)
    assert abs(phi(e[:1], [[c, s, 0, 0]], 1, 1) - c * c) < 1e-15


def test_random_subspaces_overlap_by_chance_alone():
    found = [phi(normal(2 * k, 3, 12), normal(2 * k + 1, 5, 12), 3, 5) for k in range(2000)]
    assert abs(np.mean(found) - 5 / 12) < 0.01


@given(seeds, sizes, sizes, st.data())
def test_a_truncated_weight_is_amplified_by_1(seed, O, I, data):
    W, r = normal(seed, O, I), data.draw(st.integers(1, min(O, I)))
    U, S, V = singular(W, r)
    assert abs(amplification(U * S @ V.T, W, r) - 1) < 1e-9
    assert abs(amplification(W, W, r) - 1) < 1e-9
    assert abs(along(W, W, r) - np.linalg.norm(S)) < 1e-9


@given(seeds, sizes, sizes, st.floats(0.01, 100), st.data())
def test_for_an_update_of_rank_r_it_is_the_papers_factor(seed, O, I, scale, data):
    r = data.draw(st.integers(1, min(O, I)))
    dW, W = normal(seed, O, r) @ normal(seed + 1, r, I), normal(seed + 2, O, I)
    U, _, Vt = np.linalg.svd(dW)
    expected = np.linalg.norm(dW) / np.linalg.norm(U[:, :r].T @ W @ Vt[:r].T)
    assert np.isclose(amplification(dW, W, r), expected, rtol=1e-9)
    assert np.isclose(amplification(scale * dW, W, r), scale * expected, rtol=1e-9)
    assert along(W, dW, r) <= along(W, W, r) + 1e-9  # W's own directions have most of it


def test_float32_is_computed_in_float64():
    A, other = (normal(k, 3, 9).astype(np.float32) for k in (0, 1))
    assert phi(A, other, 2, 3) == phi(A.astype(float), other.astype(float), 2, 3)


@pytest.mark.parametrize("call, message", [
    (lambda: phi(np.eye(3), np.eye(4), 1, 1), "rows of 3 and of 4 numbers"),
    (lambda: directions(np.eye(3), 4), "i must be 1 to 3, got 4"),
    (lambda: directions(np.ones(3), 1), r"a matrix of finite numbers, got the shape \(3,\)"),
    (lambda: directions(np.full((2, 2), np.nan), 1), "a matrix of finite numbers"),
    (lambda: along(np.eye(3), np.eye(4), 1), r"the update is \(4, 4\), but W is \(3, 3\)"),
    (lambda: amplification(np.diag([1.0, 0]), np.diag([0.0, 1]), 1), "W has nothing along"),
])
def test_what_has_no_directions_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
