"""bench/rank_speed.py: what it counts and what it prints is right."""

import io
import json

import pytest
import rank_side
from contenders import Shape
from rank_speed import added, line


def test_a_row_has_the_ratio_of_medians_and_the_shares_that_are_hidden():
    workers = [0.9, 1.0, 1.1]
    good = [(1.0, 0.01, 0.08, 1.5, 0.04), (1.0, 0.02, 0.08, 1.5, 0.04),
            (2.0, 0.09, 0.08, 1.5, 0.04)]
    assert line("two ranks, stage 2", workers, good) == (
        "| two ranks, stage 2 | 1000.0 ms (1000.0 - 2000.0) | 1.00 | 0.55 - 1.00 | 80.0 ms | "
        "20.0 ms | 1500.0 ms | 40.0 ms | 75% | 50% |")
    bad = [(1.25, 0.04, 0.05, 1.25, 0.04)] * 3
    assert line("two ranks, stage 3", workers, bad) == (
        "| two ranks, stage 3 | 1250.0 ms (1250.0 - 1250.0) | 0.80 (goal: 0.9) | 0.72 - 0.88 | "
        "50.0 ms | 40.0 ms | 1250.0 ms | 40.0 ms | 20% (goal: 0.5) | 0% (goal: 0.5) |")


def test_a_row_has_what_nccl_adds():
    found = added("stage 2", [0.1, 0.2, 0.1], [0.101, 0.102, 0.3])
    assert found == ("| stage 2 | 100.0 ms (100.0 - 200.0) | 102.0 ms (101.0 - 300.0) | 1.020 |")
    assert added("stage 2", [0.1], [0.103]).endswith(" | 1.030 (goal: 1.02) |")


def test_a_turn_on_a_gpu(cupy, monkeypatch, capsys):
    """What is printed has the time of a step alone."""
    monkeypatch.setattr(rank_side, "STEPS", {"cuda": 1})
    monkeypatch.setitem(rank_side.SHAPES, "tiny", Shape(1, 2, 8, 4, 2, 16))
    monkeypatch.setattr("sys.stdin", io.StringIO("go\n"))
    rank_side.main("tiny", "2", "ranks", "cuda")
    (seconds,) = json.loads(capsys.readouterr().out)
    assert seconds > 0


@pytest.mark.ranks
def test_a_turn_of_two_ranks():
    pytest.importorskip("mpi4py", reason="the extra mpi is not installed")
    from rank_speed import Ranks

    with Ranks(2, "S", 2, "ranks", "cpu") as ranks:
        seconds, waited, under_way, blocked, at_once = ranks.run()
    assert 0 < waited < seconds and 0 < under_way < seconds and 0 < at_once < blocked
    assert ranks.process.returncode == 0
