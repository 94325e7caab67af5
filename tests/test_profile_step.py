"""bench/profile_step.py: kinds add up to the step, products are all there, and nothing changes."""

import profile_step
import pytest
import stopwatch
from contenders import Shape, our_config, our_trainer
from stopwatch import CLOCK, KINDS, PRODUCT, WAITING, Clock, around_the_package, timed

from minilm import ops, tensor
from minilm.optim.flat import FlatParameters
from minilm.train import Trainer
from minilm.transformer import Transformer

TINY = Shape(layers=2, heads=2, width=16, context=12, batch=4, vocab=23)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    def wait(seconds): now[0] += seconds
    yield wait
    CLOCK.on = False


def test_a_kind_has_its_own_time_alone(clock):
    inner = timed("inner", lambda: clock(2))
    def work():
        clock(1)
        inner()
        inner()
        clock(4)
        return "done"
    outer = timed("outer", work)
    assert outer() == "done" and not CLOCK.spent
    CLOCK.on = True
    assert CLOCK.whole(outer) == 9
    assert CLOCK.spent == {"outer": 5, "inner": 4} and CLOCK.calls == {"outer": 1, "inner": 2}
    assert stopwatch.report(None) == ({"outer": 5, "inner": 4}, {"outer": 1, "inner": 2})
    outer()
    assert CLOCK.spent["outer"] == 5, "report stops the stopwatch"


def test_what_raises_is_timed_too(clock):
    def fail():
        clock(3)
        raise KeyError
    CLOCK.on = True
    CLOCK.spent.clear()
    with pytest.raises(KeyError):
        timed("fails", fail)()
    assert CLOCK.spent == {"fails": 3} and len(CLOCK.inside) == 1


@pytest.fixture(scope="module")
def profiles():
    """Of one worker, of two processes, of two threads."""
    with pytest.MonkeyPatch.context() as patch, around_the_package():
        patch.setattr(profile_step, "rates", lambda threads, workers: (r for r in [workers * 1e9]))
        return {(n, threads): profile_step.profiled(TINY, n, 3, threads)
                for n, threads in ((1, False), (2, False), (2, True))}


@pytest.mark.parametrize("team", [(1, False), (2, False), (2, True)])
def test_the_kinds_add_up_to_the_step(profiles, team):
    found = profiles[team]
    assert len(found.plain) == len(found.watched) == 3 and len(found.spent) == team[0]
    for worker in range(team[0]):
        kinds = found.kinds(worker)
        assert tuple(kinds) == KINDS and min(kinds.values()) >= 0
        assert sum(kinds.values()) == pytest.approx(found.step, rel=1e-9)
    assert found.kinds(0)["attention"] > 0 and found.kinds(0)["optimizer: AdamW"] > 0


@pytest.mark.parametrize("team", [(1, False), (2, False), (2, True)])
def test_every_product_of_a_linear_layer_is_there(profiles, team):
    """6 for each weight and each token, all workers together."""
    products, found = 0, profiles[team]
    for calls in found.calls:
        for shape, count in calls.items():
            if not isinstance(shape, str):
                products += 2 * shape[0] * shape[1] * shape[2] * count
    weights = TINY.layers * 12 * TINY.width**2 + TINY.vocab * TINY.width
    assert products == 3 * 6 * weights * TINY.batch * TINY.context  # in three steps


def test_what_is_printed(profiles):
    found = {1: profiles[1, False], 2: profiles[2, False]}
    head, rule, *lines = profile_step.table("S", found)
    assert head == "| S | one worker, ms | % | worker 1 of 2, ms | % | worker 2 of 2, ms | % |"
    assert rule.count("|") == head.count("|")
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[:-2]}
    assert list(rows) == [*KINDS, "the step"]
    for column in range(3):
        cells = [float(row[2 * column]) for row in rows.values()]
        assert sum(cells[:-1]) == pytest.approx(cells[-1], abs=0.005 * len(cells))
        assert rows["the step"][2 * column + 1].strip(" |") == "100.0"
    one, two = lines[-2:]
    assert one.startswith("\n1 worker: ") and "at 1 GFLOP/s" in one
    assert two.startswith("\n2 workers: ") and "at 2 GFLOP/s" in two
    # Two in each block: up's forward pass, and the gradient of down's input.
    _, _, *shapes = profile_step.shapes_table("S", found)
    assert any(line.startswith("| (48, 16) (16, 64), 1 worker | 4 |") for line in shapes)
    assert any(line.startswith("| (24, 16) (16, 64), 2 workers | 4 |") for line in shapes)


def test_a_second_worker_waits_for_what_the_first_does_alone():
    found = profile_step.Profile(1e9, TINY)
    found.watched.append(10.0)
    found.add([({"attention": 7.0, "Python: the trainer": 3.0}, {}), ({(2, 3, 4): 6.0}, {})])
    assert found.kinds(0)[WAITING] == 0
    assert found.kinds(1)[WAITING] == 4 and found.kinds(1)[PRODUCT] == 6


def trained(workers):
    model = Transformer(our_config(TINY))
    with our_trainer(model, TINY, threads=True, workers=workers) as trainer:
        stopwatch.switch(None, True)
        losses = [trainer.step(i, TINY.tokens()).loss for i in range(3)]
        stopwatch.switch(None, False)
    return losses, {name: array.tobytes() for name, array in model.state_dict().items()}


def test_the_stopwatch_changes_no_bit_and_is_taken_away():
    before = ops.linear, ops.product, tensor.Node, Trainer.step, FlatParameters._receiver
    plain = trained(1)
    with around_the_package():
        assert ops.linear is not before[0] and Trainer.step is not before[3]
        assert trained(1) == plain
    assert before == (ops.linear, ops.product, tensor.Node, Trainer.step,
                      FlatParameters._receiver)


def test_every_thread_has_a_clock_of_its_own():
    assert isinstance(CLOCK, Clock) and Clock.__mro__[1].__name__ == "_local"


def test_the_program(monkeypatch, capsys):
    monkeypatch.setattr(profile_step, "rates", lambda threads, workers: (r for r in [1e9]))
    monkeypatch.setitem(profile_step.SHAPES, "S", TINY)
    profile_step.main(("S",), steps=1, threads=True)
    out = capsys.readouterr().out
    assert out.startswith("| S | one worker, ms |") and "| products, S | a step | ms |" in out
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        profile_step.main(steps=0)
