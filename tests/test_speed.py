"""minilm.measure.speed: jobs that take turns, by a clock that only they move on."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.measure.speed import in_turn, ratio

NAMES = st.lists(st.text("abc", max_size=2), min_size=1, max_size=5, unique=True)
SECONDS = st.floats(1e-3, 1e3)


@given(NAMES, st.integers(1, 6), st.integers(0, 9))
def test_each_job_runs_once_a_round_and_keeps_its_own_seconds(names, rounds, seed):
    clock, turns = [0], []

    def job(name):
        turns.append(name)
        clock[0] += 1 << names.index(name)

    jobs = {name: partial(job, name) for name in names}
    times = in_turn(jobs, rounds, np.random.default_rng(seed), clock=lambda: clock[0])
    assert times == {name: [1 << i] * rounds for i, name in enumerate(names)}
    starts = range(0, len(turns), len(names))
    assert [sorted(turns[i : i + len(names)]) for i in starts] == [sorted(names)] * rounds
    drawn, turns[:] = list(turns), []
    in_turn(jobs, rounds, np.random.default_rng(seed))
    assert turns == drawn  # the seed's order
    turns.clear()
    in_turn(jobs, rounds)
    assert turns == names * rounds


def test_orders_differ():
    turns = []
    in_turn({i: partial(turns.append, i) for i in range(4)}, 9, np.random.default_rng(0))
    assert len({tuple(turns[i : i + 4]) for i in range(0, 36, 4)}) > 4


@given(st.lists(SECONDS, min_size=1, max_size=9), st.floats(0.1, 10), st.data())
def test_a_ratio_does_not_feel_the_machines_speed(base, factor, data):
    speed = data.draw(st.lists(SECONDS, min_size=len(base), max_size=len(base)))
    times = [factor * s * b for s, b in zip(speed, base)]
    assert ratio(times, [s * b for s, b in zip(speed, base)]) == pytest.approx(factor)


def test_a_ratio_is_of_rounds_not_of_medians():
    assert ratio([2.0, 40.0, 9.0], [1.0, 10.0, 9.0]) == 2.0


def test_a_ratio_needs_the_same_rounds():
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])
