"""The rank that is enough: closed forms of Zeng & Lee 2023 against singular values."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from minilm.measure.expressive import (
    adapted,
    closed_form,
    closed_form_of_nets,
    independent_columns,
    least_rank,
    product,
    relu_net,
)

seeds = st.integers(0, 2**32 - 1)


def regular(rng, n):
    """An invertible matrix whose singular values lie between .5 and 2."""
    U, V = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in "UV")
    return U * rng.uniform(0.5, 2, n) @ V


def drawn(seed, D, L):
    """Frozen weights and a target of which everything that must be invertible clearly is."""
    rng = np.random.default_rng(seed)
    Ws, W = [regular(rng, D) for _ in range(L)], rng.standard_normal((D, D))
    P = product(Ws)
    U, S, Vt = np.linalg.svd(W - P)
    steps = [P + U[:, :r] * S[:r] @ Vt[:r] for r in range(D + 1)]
    assume(max(map(np.linalg.cond, steps[:-1])) < 1e3)
    return Ws, W, S


@given(seeds, st.integers(2, 9), st.integers(1, 4), st.data())
def test_the_error_is_the_next_singular_value(seed, D, L, data):
    """And in Frobenius' norm it is that of all later ones."""
    R = data.draw(st.integers(1, D))
    Ws, W, S = drawn(seed, D, L)
    adapters = closed_form(Ws, W, R)
    assert all(B.shape[1] <= R and B.shape == A.T.shape for B, A in adapters)
    error = W - product(adapted(Ws, adapters))
    left = [*S[R * L :], 0.0]
    assert abs(np.linalg.norm(error, 2) - left[0]) < 1e-8 * (1 + S[0])
    assert abs(np.linalg.norm(error) - np.linalg.norm(left)) < 1e-8 * (1 + S[0])


@given(seeds, st.integers(2, 8), st.integers(1, 4), st.integers(1, 3))
def test_no_adapters_do_better(seed, D, L, R):
    """Of the same rank, whatever their numbers are: those of the closed form, moved a little."""
    Ws, W, S = drawn(seed, D, L)
    rng, adapters = np.random.default_rng(seed), closed_form(Ws, W, R)
    least = [*S[R * L :], 0.0][0]
    for size in (1e-3, 1e-1, 1):
        moved = [(B + size * rng.standard_normal(B.shape), A + size * rng.standard_normal(A.shape))
                 for B, A in adapters]
        error = W - product(adapted(Ws, moved))
        assert np.linalg.norm(error, 2) >= least * (1 - 1e-9)


@example(0, 4, 4, 2).via("parts of two layers, the second with large inputs")
@given(seeds, st.integers(2, 6), st.integers(1, 5), st.integers(1, 5))
def test_a_smaller_net_is_reached_at_the_rank_of_the_theorem(seed, D, L, depth):
    assume(depth <= L)
    rng = np.random.default_rng(seed)
    Ws = [regular(rng, D) for _ in range(L)]
    targets = [(rng.standard_normal((D, D)) / np.sqrt(D), 20 * rng.standard_normal(D))
               for _ in range(depth)]
    R = least_rank(D, L, depth)
    try:
        adapters, biases = closed_form_of_nets(Ws, targets, R, radius=3.0)
    except ValueError:  # not invertible, by chance
        assume(False)
    assert len(adapters) == len(biases) == L
    layers = adapted(Ws, adapters)
    assume(max(map(np.linalg.cond, layers)) < 1e4)
    x = rng.standard_normal((D, 40))
    x *= 3.0 * rng.uniform(0, 1, 40) / np.linalg.norm(x, axis=0)
    expected = relu_net(*zip(*targets), x)
    assert np.abs(relu_net(layers, biases, x) - expected).max() < 1e-6 * (1 + expected.max())
    np.testing.assert_array_equal(relu_net(layers, biases, x[:, 0]),  # one input alone
                                  relu_net(layers, biases, x[:, :1])[:, 0])


def test_beyond_the_radius_a_net_may_differ():
    rng = np.random.default_rng(0)
    Ws = [regular(rng, 4) for _ in range(2)]
    target = rng.standard_normal((4, 4)), rng.standard_normal(4)
    adapters, biases = closed_form_of_nets(Ws, [target], 2, radius=1.0)
    x = rng.standard_normal((4, 200))
    x /= np.linalg.norm(x, axis=0)
    def gap(x):
        expected = relu_net([target[0]], [target[1]], x)
        return np.abs(relu_net(adapted(Ws, adapters), biases, x) - expected).max()
    assert gap(x) < 1e-12 and gap(100 * x) > 1


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_the_rank_that_is_enough(width, depth, data):
    ranks = [least_rank(width, depth, t) for t in range(1, depth + 1)]
    assert ranks[0] == -(-width // depth) and ranks[-1] == width
    assert all(a <= b for a, b in pairwise(ranks))
    assert all(R >= width * t / depth for t, R in enumerate(ranks, 1))
    t = data.draw(st.sampled_from([t for t in range(1, depth + 1) if depth % t == 0]))
    assert ranks[t - 1] == -(-width * t // depth)  # the abstract's formula, in whole numbers


@given(seeds, st.integers(1, 8), st.integers(1, 8), st.data())
def test_independent_columns_are_as_many_as_the_rank(seed, O, I, data):
    r = data.draw(st.integers(1, min(O, I)))
    rng = np.random.default_rng(seed)
    M = regular(rng, O)[:, :r] @ regular(rng, I)[:r]
    found = independent_columns(M)
    assert len(found) == np.linalg.matrix_rank(M) == r
    twice = np.hstack([M, 2 * M, M[:, :1] - M[:, -1:]])  # nothing new
    assert independent_columns(twice) == found
    rest = M - M[:, found] @ np.linalg.lstsq(M[:, found], M, rcond=None)[0]
    assert np.abs(rest).max() < 1e-7


def test_columns_by_hand():
    assert independent_columns([[0, 1, 2, 0], [0, 0, 0, 3]]) == [1, 3]
    assert independent_columns(np.zeros((2, 2))) == []
    for tolerance, found in (0.5, [0, 1]), (0.6, [0]):  # 0.6 is left of a column of length 1.17
        assert independent_columns([[1, 1], [0, 0.6]], tolerance) == found


@pytest.mark.parametrize("call, message", [
    (lambda: closed_form([np.eye(3)], np.eye(4), 1), r"got \[\(3, 3\)\] and \(4, 4\)"),
    (lambda: closed_form([], np.eye(4), 1), "must be square and of one size"),
    (lambda: closed_form([np.eye(3)], np.eye(3), 0), "R must be at least 1, got 0"),
    (lambda: closed_form([np.eye(3), np.diag([1.0, 1, 0])], np.ones((3, 3)), 1), "singular"),
    (lambda: closed_form_of_nets([np.eye(2)], [(np.eye(2), np.zeros(2))] * 2, 1, 1.0),
     "1 layers cannot be 2"),
    (lambda: least_rank(8, 2, 3), "target_depth must be 1 to 2, got 3"),
])
def test_what_the_theorem_does_not_cover_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
