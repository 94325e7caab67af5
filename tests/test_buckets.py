"""How full buckets are: against the codes of quantize_4bit, by hand, and the laws of entropy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.measure.buckets import blocks, colliding, counts, entropy, nearest, values
from minilm.quantize import quantize_4bit

KINDS = ("nf4", "fp4", "int4", "nf3", "int3", "nf2", "int2")
full = st.lists(st.integers(0, 50), min_size=1, max_size=16).filter(lambda n: sum(n) > 1)


@given(st.sampled_from(KINDS), st.integers(1, 9), st.integers(0, 999))
def test_the_values_are_those_of_the_quantized_numbers(kind, n, seed):
    x = np.random.default_rng(seed).standard_normal(64 * n).astype(np.float32)
    X, largest = blocks(x)
    back = quantize_4bit(x, kind, double_quant=False).dequantize().reshape(X.shape)
    mine = values(kind)[nearest(X, kind, largest)] * largest
    assert abs(mine - back).max() <= 1e-6 * abs(x).max()
    found = counts(X, kind, largest)
    assert found.sum() == x.size and len(found) == len(values(kind))


def test_values_are_counted_once():
    assert [len(values(kind)) for kind in KINDS] == [16, 15, 15, 8, 7, 4, 3]
    assert all((np.diff(values(kind)) > 0).all() for kind in KINDS)


def test_blocks_leave_the_rest():
    X, largest = blocks(np.array([3.0, -4, 0, 1, 9]), 2)
    assert X.tolist() == [[3, -4], [0, 1]] and largest.tolist() == [[4], [1]]
    with pytest.raises(ValueError, match="3 numbers are no block of 64"):
        blocks(np.ones(3))
    assert nearest(np.zeros((1, 64)), "int4", np.zeros((1, 1))).tolist() == [[7] * 64]


@given(full)
def test_entropy_is_between_0_and_that_of_equal_shares(n):
    used = sum(1 for x in n if x)
    assert -1e-12 <= entropy(n) <= math.log2(used) + 1e-12
    assert entropy([7] * used) == pytest.approx(math.log2(used))
    assert entropy(n) == pytest.approx(entropy([*n[::-1], 0])) == entropy(np.multiply(n, 3))


@given(full)
def test_pairs_that_collide_are_counted(n):
    codes = np.repeat(np.arange(len(n)), n)
    pairs = codes[:, None] == codes
    N = len(codes)
    assert colliding(n) == pytest.approx((pairs.sum() - N) / (N * (N - 1)))


@given(full, st.data())
def test_merging_two_buckets_loses_bits_and_adds_collisions(n, data):
    i = data.draw(st.integers(0, len(n) - 1))
    j = data.draw(st.integers(0, len(n) - 1).filter(lambda j: j != i or len(n) == 1))
    if i == j:
        return
    merged = [x for k, x in enumerate(n) if k not in (i, j)] + [n[i] + n[j]]
    assert entropy(merged) <= entropy(n) + 1e-12
    assert colliding(merged) >= colliding(n) - 1e-12


def test_nothing_has_no_entropy():
    for of, n in ((entropy, [0, 0]), (colliding, [0, 1])):
        with pytest.raises(ValueError, match="these buckets hold"):
            of(n)
