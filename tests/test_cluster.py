"""The time of a step on many cards: rings that run, streams that are simulated, closed forms."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilm.config import Config
from minilm.measure.cluster import CLUSTERS, Cluster, network
from minilm.measure.collectives import (
    ALGORITHMS,
    Link,
    all_gather,
    all_reduce,
    fitted,
    reduce_scatter,
    ring,
)
from minilm.measure.step import parameters
from minilm.measure.step_time import Job, Unit, closed_form, simulate
from minilm.parallel.bucket import bytes_held, bytes_sent
from minilm.parallel.comm import ranks

seconds = st.floats(1e-6, 1.0)
units = st.builds(Unit, seconds, seconds, seconds, seconds)
stages = st.integers(0, 3)
LINKS = st.builds(Link, st.floats(0, 1e-3), st.floats(1e6, 1e12))


@given(st.integers(1, 16), st.integers(1, 5), st.integers(0, 99))
def test_a_ring_adds_up_and_sends_what_the_formula_says(n, part, seed):
    arrays = list(np.random.default_rng(seed).integers(-99, 99, (n, n * part)))
    before = [a.copy() for a in arrays]
    done = ring(arrays)
    for sums in done.sums:
        assert (sums == sum(arrays)).all()
    assert done.sent == [2 * (n - 1) * arrays[0].nbytes // n] * n
    assert done.messages == 2 * (n - 1)
    assert (np.array(before) == arrays).all()


def test_a_ring_of_many_ranks_sends_what_comm_counts():
    """Ranks of comm.py count the ring's bytes; the closed form has them, too."""
    arrays = [np.arange(64.0) * rank for rank in range(8)]
    done = ring(arrays)

    def run(comm):
        x = arrays[comm.rank].copy()
        comm.all_reduce(x).wait()
        return x, comm.sent["all_reduce"]

    for (x, sent), sums, mine in zip(ranks(8, run), done.sums, done.sent):
        assert (x == sums).all()
        assert sent == mine == all_reduce(8, 64 * 8, Link(0, 1))
    assert done.messages == all_reduce(8, 0, Link(1, 1))


def test_another_algorithm_is_refused():
    for call in (all_gather, reduce_scatter, all_reduce):
        with pytest.raises(ValueError, match=r"algorithm must be one of .*tree.*, got star"):
            call(4, 8, Link(1e-6, 1e9), "star")


def test_what_a_ring_cannot_take_is_refused():
    with pytest.raises(ValueError, match="2 flat arrays must have one size that 2 divides"):
        ring([np.zeros(3), np.zeros(3)])
    with pytest.raises(ValueError, match="one size"):
        ring([np.zeros(2), np.zeros(4)])


@given(st.integers(1, 10**6), st.floats(0, 1e12), LINKS)
def test_a_tree_has_fewer_messages_and_no_fewer_bytes(n, S, link):
    for call in (all_gather, reduce_scatter, all_reduce):
        tree, around = (call(n, S, link, algorithm) for algorithm in ALGORITHMS[::-1])
        assert tree <= around + 2 * S / link.B / n * (1 + 1e-9) + 1e-12
        assert call(1, S, link, "tree") == call(1, S, link) == 0
    assert math.isclose(all_reduce(n, S, link), 2 * reduce_scatter(n, S, link), rel_tol=1e-12)


@given(LINKS.filter(lambda link: link.a > 1e-7), st.integers(2, 8))
def test_the_link_that_made_the_times_is_found(link, n):
    S = np.geomspace(1e2, 1e8, 7)
    times = [all_gather(n, s, link) for s in S]
    found = fitted([n - 1] * 7, (n - 1) / n * S, times)
    for s, t in zip(S, times):
        assert math.isclose(all_gather(n, s, found), t, rel_tol=1e-3)


def test_a_negative_latency_is_none():
    found = fitted([1, 1], [1e3, 2e3], [1e-4, 4e-4])
    assert found.a == 0 and 2e6 < found.B < 1e7


@given(stages, st.integers(2, 40), units, units, seconds)
@example(3, 2, Unit(1, 1, 1, 1), Unit(0, 0, 0, 0), 1)
def test_the_closed_form_is_the_simulation_of_equal_units(stage, L, unit, root, update):
    """The bound of their difference is rounding, 1e-9."""
    simulated = simulate(stage, [unit] * L, root, update).total
    assert math.isclose(simulated, closed_form(stage, L, unit, root, update), rel_tol=1e-9)


@given(stages, st.lists(units, min_size=1, max_size=12), units, seconds, st.integers(0, 12))
def test_a_step_takes_no_less_than_each_stream_and_no_more_than_both(stage, some, root, update,
                                                                     prefetch):
    step = simulate(stage, some, root, update, prefetch=prefetch)
    everything = step.computing + step.sending
    assert max(step.computing, step.sending) <= step.total * (1 + 1e-9)
    assert step.total <= everything * (1 + 1e-9)
    assert -1e-9 <= step.hidden <= 1
    serial = simulate(stage, some, root, update, overlap=False, prefetch=prefetch)
    assert math.isclose(serial.total, everything, rel_tol=1e-9) and abs(serial.hidden) < 1e-6


@given(stages, st.lists(units, min_size=1, max_size=12), units, st.floats(1.0, 5.0))
def test_twice_as_fast_a_machine_takes_half_the_time(stage, some, root, times):
    slower = [Unit(*(times * x for x in unit)) for unit in some]
    a = simulate(stage, some, root, 0.5).total
    b = simulate(stage, slower, Unit(*(times * x for x in root)), 0.5 * times).total
    assert math.isclose(a * times, b, rel_tol=1e-9)


def test_a_step_by_hand():
    """Two units, each second of the network drawn on paper."""
    unit, none = Unit(1, 2, 1.5, 2.5), Unit(0, 0, 0, 0)
    # gathers end at 1.5 3; forward 1.5-2.5 3-4; gathers 5.5 7; backward 5.5-7.5 7.5-9.5; the
    # gradients 7.5-10 10-12.5
    assert simulate(3, [unit] * 2, none, 0).total == 12.5
    # forward to 2, backward to 4 and 6; gradients 4-6.5 6.5-9
    assert simulate(0, [unit] * 2, none, 0).total == 9
    # gathers end at 1.5 3; forward 1.5-2.5 3-4; backward to 6 and 8; gradients 6-8.5 8.5-11
    assert simulate(1, [unit] * 2, none, 0.5).total == 11 + 0.5
    # gather to 1.5, forward to 2.5, gather to 4, forward to 5, gather to 6.5, backward to 8.5,
    # gradients to 11, gather to 12.5, backward to 14.5, gradients to 17
    assert simulate(3, [unit] * 2, none, 0, prefetch=0).total == 17


@given(stages, st.integers(1, 2**17), st.sampled_from([*CLUSTERS]), st.sampled_from(ALGORITHMS))
def test_one_card_is_the_most_efficient(stage, n, cluster, algorithm):
    job = Job(1e9, 1e8, 5e7, 16, 4096)
    how = CLUSTERS[cluster], 0.4, algorithm
    assert 0 < job.efficiency(stage, n, *how) <= 1
    if stage == 0:
        assert job.efficiency(0, n, *how) <= job.efficiency(0, 1, *how) + 1e-12


@given(stages, st.integers(2, 8))
def test_a_step_sends_the_bytes_of_the_formula(stage, n):
    """Without latency, seconds are bytes. The root is gathered once in stage 3, too."""
    base = CLUSTERS["H100, 1 x 100 Gb/s"]
    cluster = Cluster(base.card, 8, Link(0, 1e9), base.outside)
    job = Job(1e9, 1e8, 5e7, 10, 4096)
    sent = job.step(stage, n, cluster, 0.4).sending * 1e9
    expected = bytes_sent(stage, n, 2, 2) * job.P + bytes_sent(min(stage, 2), n, 2, 2) * job.root
    assert math.isclose(sent, expected, rel_tol=1e-9)


def test_the_units_of_a_model():
    c = Config.llama(32000, 4096, 32, 32, 4096, 11008)
    job = Job.of(c, 10)
    assert job.P + job.root == parameters(c) and job.L == 32
    assert job.root == 2 * job.head + 4096  # the last norm
    assert job.P == 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)


def test_zeros_table():
    """Rajbhandari et al. 2020, table 1: GB of 7.5B parameters on n cards in stages 1, 2, 3."""
    table = {1: (120, 120, 120), 4: (52.5, 41.3, 30), 16: (35.6, 21.6, 7.5), 64: (31.4, 16.6, 1.88),
             256: (30.4, 15.4, 0.47), 1024: (30.1, 15.1, 0.12)}
    for n, row in table.items():
        for stage, gb in enumerate(row, 1):
            rounded = 0.06 if gb > 2 else 0.006
            assert abs(7.5 * bytes_held(stage, n, 2, 2) - gb) < rounded


def test_links():
    cluster = CLUSTERS["A100, 8 x 200 Gb/s"]
    assert cluster.link(8) == cluster.inside
    assert cluster.link(16).B == network(200e9, 8).B == 160e9
    assert math.isclose(cluster.link(16).a, (7 * 3e-6 + 8e-6) / 8)
    with pytest.raises(ValueError, match="got 0"):
        cluster.link(0)
