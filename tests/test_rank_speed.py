"""bench/rank_speed.py: what it counts and what it prints is right."""

import time

import numpy as np
import pytest
from rank_side import Timed
from rank_speed import line

from minilm.parallel.comm import Local


class Slow(Local):
    """Calls take 30 ms if nothing else runs."""

    def _reduce_scatter(self, full, shard):
        time.sleep(0.03)
        super()._reduce_scatter(full, shard)


def test_calls_are_timed_and_made_again_with_nothing_beside_them():
    comm, x, part = Timed(Slow()), np.ones(4, np.float32), np.zeros(4, np.float32)
    for _ in range(2):
        comm.reduce_scatter(x, part, add=True).wait()
    comm.all_gather(part, x).wait()
    assert part.tolist() == x.tolist() == [2] * 4
    assert 0.06 <= comm.inside < 1
    assert 0.06 <= comm.again() < 1 and comm.made == []
    assert part.tolist() == x.tolist() == [2] * 4
    assert comm.again() == 0


def test_a_row_has_the_ratio_of_medians_and_the_share_that_is_hidden():
    workers = [0.9, 1.0, 1.1]
    good = [(1.0, 0.01, 0.04), (1.0, 0.02, 0.04), (2.0, 0.09, 0.04)]
    assert line("two ranks, stage 2", workers, good) == (
        "| two ranks, stage 2 | 1000.0 ms (1000.0 - 2000.0) | 1.00 | 0.55 - 1.00 | 20.0 ms | "
        "40.0 ms | 50% |")
    bad = [(1.25, 0.04, 0.04)] * 3
    assert line("two ranks, stage 3", workers, bad) == (
        "| two ranks, stage 3 | 1250.0 ms (1250.0 - 1250.0) | 0.80 (goal: 0.9) | 0.72 - 0.88 | "
        "40.0 ms | 40.0 ms | 0% (goal: 0.5) |")


@pytest.mark.ranks
def test_a_turn_of_two_ranks():
    pytest.importorskip("mpi4py", reason="the extra mpi is not installed")
    from rank_speed import Ranks

    ranks = Ranks("S", 2, "ranks")
    seconds, inside, alone = ranks.run()
    ranks.close()
    assert 0 < inside < seconds and 0 < alone
    assert ranks.process.returncode == 0
