"""Calls whose times are told: what is counted as waiting, and that nothing else changes."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from minilm.measure.messages import in_turn, sweep
from minilm.parallel import clocked
from minilm.parallel.clocked import Clocked
from minilm.parallel.comm import Local, ranks


class Slow(Local):
    """Posting takes 1 second, asking 2, waiting 4; by then, or when asked twice, it is done."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def _all_reduce(self, x):
        self.clock.now += 1
        return SimpleNamespace(Test=self.test, Wait=self.wait, asked=Counter())

    def test(self):
        self.clock.now += 2
        self.clock.asked += 1
        return self.clock.asked == 2

    def wait(self):
        self.clock.now += 4


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0, asked=0)
    monkeypatch.setattr(clocked.time, "perf_counter", lambda: clock.now)
    return clock


def test_what_is_computed_meanwhile_is_hidden(clock):
    comm = Clocked(Slow(clock))
    handle = comm.all_reduce(np.zeros(1))
    clock.now += 10
    assert not handle.test()
    clock.now += 20
    handle.wait()
    assert (comm.under_way, comm.waited) == (1 + 10 + 2 + 20 + 4, 1 + 2 + 4)
    clock.now += 50
    handle.wait()
    assert (comm.under_way, comm.waited) == (37, 7)


def test_a_call_that_is_found_done_was_under_way_until_then(clock):
    comm = Clocked(Slow(clock))
    handle = comm.all_reduce(np.zeros(1))
    assert not handle.test()
    clock.now += 10
    assert handle.test()
    clock.now += 10
    handle.wait()
    assert (comm.under_way, comm.waited) == (1 + 2 + 10 + 2, 1 + 2 + 2)


def test_a_call_that_another_thread_finds_done_is_under_way_no_longer(clock):
    """As the mover of mpi.py does, which knows the engine's own handle."""
    slow, handles = Slow(clock), []
    call = slow._call
    slow._call = lambda *how, **then: handles.append(call(*how, **then)) or handles[-1]
    comm = Clocked(slow)
    handle = comm.all_reduce(np.zeros(1))
    clock.now += 10
    handles[0].wait()
    clock.now += 100
    handle.wait()
    assert (comm.under_way, comm.waited) == (1 + 10 + 4, 1)


def test_what_is_under_way_beside_others_counts_once(clock):
    comm = Clocked(Slow(clock))
    first, second = (comm.all_reduce(np.zeros(1)) for _ in range(2))
    clock.now += 10
    second.wait()
    clock.now += 20
    first.wait()
    clock.now += 100
    comm.all_reduce(np.zeros(1)).wait()
    assert (comm.under_way, comm.waited) == (2 + 10 + 4 + 20 + 4 + 5, 2 + 8 + 5)
    comm.restart()
    assert (comm.under_way, comm.waited, comm.sent) == (0, 0, {})


def test_blocking_hides_nothing(clock):
    comm = Clocked(Slow(clock), blocking=True)
    handle = comm.all_reduce(np.zeros(1))
    clock.now += 10
    handle.wait()
    assert (comm.under_way, comm.waited) == (5, 5)


@pytest.mark.parametrize("how", [{}, {"ordered": True}, {"blocking": True}])
def test_results_and_bytes_are_the_engines(how):
    def calls(comm):
        x, full = np.arange(4.0) * comm.rank, np.arange(6.0) + comm.rank
        shard = np.empty(3)
        comm.all_reduce(x).wait()
        comm.reduce_scatter(full, shard).wait()
        comm.all_gather(shard, full).wait()
        comm.broadcast(x, 1).wait()
        return [x.tolist(), full.tolist(), comm.numbers(comm.rank).tolist()], comm.sent

    def run(comm):
        timed = Clocked(comm, **how)
        timed.begin(7)
        assert calls(timed) == calls(comm)
        assert timed.under_way > 0 and timed.waited > 0
        assert timed.step == comm.step == 7
        return timed.rank, timed.size

    assert ranks(2, run) == [(0, 2), (1, 2)]


def test_the_slowest_rank_counts_and_of_its_rounds_the_median():
    """Rank r tells 1 + r, 10 + r, 100 + r and of a second thing -r."""
    def run(comm):
        told, begun = iter([1.0, 100.0, 10.0]), []

        def job():
            begun.append(comm.rank)
            return next(told) + comm.rank, -comm.rank
        return in_turn(comm, {"job": job, "other": lambda: (0,)}, 3), len(begun)

    assert ranks(3, run) == [({"job": [12, 0], "other": [0]}, 3)] * 3


def test_a_sweep_has_the_messages_and_bytes_of_a_ring():
    for n in (2, 4):
        for found, sent in ranks(n, lambda comm: (sweep(comm, [8, 400], rounds=1), comm.sent)):
            m = n - 1
            assert sum(row[1] for row in found) == sum(
                sent[call] for call in ("reduce_scatter", "all_gather", "all_reduce"))
            assert [row[:2] for row in found] == [
                (m, 8 * m), (m, 8 * m), (2 * m, 16 * m), (m, 400 * m), (m, 400 * m),
                (2 * m, 800 * m)]
            assert all(seconds > 0 for *_, seconds in found)
    assert sweep(Local(), [8], rounds=1) == []
