"""Shares of what numbers of 16 bits lose: equations (1) to (3), and what a scale changes."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.measure.rounding import not_finite, unmoved, vanished

FORMATS = {"float16": (np.float16, 11), "bfloat16": (ml_dtypes.bfloat16, 8)}  # bits of precision
weights = st.builds(lambda m, e, sign: sign * m * 2.0**e, st.floats(1, 1.999), st.integers(-10, 10),
                    st.sampled_from([1, -1]))


@given(st.lists(st.floats(-1e-3, 1e-3).filter(lambda x: abs(x) > 1e-12), min_size=1))
def test_float16_loses_what_is_below_half_of_its_smallest_number(x):
    x = np.array(x)
    assert vanished(x, x.astype(np.float16)) == np.mean(np.abs(x) <= 2.0**-25)  # eq. (1)
    assert vanished(x, x.astype(ml_dtypes.bfloat16)) == 0


@given(st.lists(weights, min_size=1), st.integers(0, 30), st.integers(0, 10))
def test_a_larger_scale_loses_fewer_and_overflows_more(x, small, more):
    x = np.array(x) * 2.0**-35
    shares = []
    with np.errstate(over="ignore"):
        for scale in (2.0**small, 2.0 ** (small + more), 2.0**70):
            half = (x * scale).astype(np.float16)
            shares.append((vanished(x, half), not_finite(half)))
    (low, under), (high, over), last = shares
    assert low >= high and under <= over and last == (0, 1)


@pytest.mark.parametrize("name", FORMATS)
@given(st.lists(weights, min_size=1), st.floats(1.001, 8), st.sampled_from([1, -1]))
def test_when_an_update_has_no_effect(name, x, factor, sign):
    """eq. (3), on both sides of the borders."""
    dtype, t = FORMATS[name]
    p = np.array(x).astype(dtype)
    wide = p.astype(np.float64)
    for u, share in [(wide / 2 ** (t + 1) / factor, 1), (wide / 2**t * factor, 0)]:
        assert unmoved(p, (wide + sign * u).astype(dtype), u) == share


def test_shares_by_hand():
    assert vanished([1.0, 2.0, 0.0, 4.0], [0.0, 2.0, 0.0, 0.0]) == 2 / 3
    assert not_finite([1.0, np.inf, np.nan, -np.inf]) == 3 / 4
    assert unmoved([1.0, 2.0, 3.0, 4.0], [1.0, 2.5, 3.0, 4.0], [9.0, 9.0, 0.0, -9.0]) == 2 / 3
    assert vanished([0.0], [0.0]) == not_finite([]) == unmoved([1.0], [1.0], [0.0]) == 0


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \[\(1,\), \(2,\)\]"):
        vanished([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="arrays of one shape"):
        unmoved([1.0], [1.0], [[1.0]])
