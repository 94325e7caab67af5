"""Where a curve is lowest: exact for parabolas, near the lowest point for any curve."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.measure.optimum import lowest_at

numbers = st.floats(-100, 100).map(lambda x: round(x, 3))
curves = st.lists(st.tuples(st.floats(0.1, 3), numbers), min_size=3, max_size=9).map(
    lambda pairs: (np.cumsum([step for step, _ in pairs]), np.array([y for _, y in pairs])))


@given(st.floats(-5, 5), st.floats(0.1, 10), numbers, curves)
def test_of_a_parabola_it_is_the_vertex(vertex, width, height, curve):
    x = curve[0] + vertex - curve[0].mean()
    y = width * (x - vertex) ** 2 + height
    if 0 < y.argmin() < len(x) - 1:
        assert abs(lowest_at(x, y) - vertex) < 1e-8


@given(curves)
def test_it_lies_between_the_middles_around_the_lowest_point(curve):
    x, y = curve
    i = y.argmin()
    low, high = (x[max(i - 1, 0)] + x[i]) / 2, (x[i] + x[min(i + 1, len(x) - 1)]) / 2
    assert low - 1e-9 <= lowest_at(x, y) <= high + 1e-9


@given(curves, st.floats(0.5, 4), numbers, numbers)
def test_units_and_origins_do_not_matter(curve, scale, right, up):
    x, y = curve
    expected = lowest_at(x, y)
    if len(set(y)) == len(y):  # rounding may break a tie
        assert abs(lowest_at(x, scale * y + up) - expected) < 1e-6
    assert abs(lowest_at(scale * x + right, y) - (scale * expected + right)) < 1e-6


def test_by_hand():
    assert lowest_at([0, 1, 2], [3.0, 1.0, 3.0]) == 1.0
    assert lowest_at([0, 1, 2], [3.0, 1.0, 1.0]) == 1.5  # slopes -2 at 0.5 and 0 at 1.5
    assert lowest_at([0, 1, 3], [1.0, 2.0, 3.0]) == 0.0 and lowest_at([0, 1], [2.0, 1.0]) == 1.0


@pytest.mark.parametrize("x, y, complaint", [
    ([], [], "at least one"), ([1, 2], [1], "as many"), ([2, 1], [0, 0], "x must rise"),
    ([1, 2], [np.nan, 0], "must be finite"), ([1, np.inf], [0, 0], "must be finite"),
])
def test_what_is_no_curve_is_refused(x, y, complaint):
    with pytest.raises(ValueError, match=complaint):
        lowest_at(x, y)
