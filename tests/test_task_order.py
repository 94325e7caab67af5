"""What is forgotten of tasks one after another: the numbers of a matrix, and the experiment."""

import numpy as np
import pytest
import task_order
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.measure.forgetting import average, backward_transfer, forgetting
from minilm.measure.verdict import FAILS, HOLDS
from minilm.run import RunDirectory
from minilm.train import Trainer
from minilm.trial import QUICK

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

scores = st.integers(0, 100)


@st.composite
def matrices(draw, least=2):
    n = draw(st.integers(least, 6))
    return draw(st.lists(st.lists(scores, min_size=n, max_size=n), min_size=n, max_size=n))


def test_a_matrix_by_hand():
    """Task 0 was at 90 after the second stage and ends at 40, task 1 at 70 and ends at 60."""
    R = [[80, 10, 0], [90, 70, 0], [40, 60, 50]]
    assert average(R) == 50
    assert forgetting(R) == (50 + 10) / 2
    assert backward_transfer(R) == (-40 - 10) / 2


@given(matrices())
def test_what_holds_of_every_matrix(R):
    n, F, B = len(R), forgetting(R), backward_transfer(R)
    assert -B <= F + 1e-9  # the highest earlier score is at least the one of its own stage
    assert -100 <= F <= 100
    by_hand = [max(R[i][j] for i in range(n - 1)) - R[-1][j] for j in range(n - 1)]
    assert abs(F - sum(by_hand) / (n - 1)) < 1e-9
    best = [[max(R[i][j] for i in range(k + 1)) for j in range(n)] for k in range(n)]
    assert forgetting(best) <= 0 <= backward_transfer(best)  # nothing falls


@given(matrices(), st.integers(1, 50), st.randoms(use_true_random=False))
def test_shifts_and_the_order_of_stages_in_between(R, more, rng):
    """More points at the end are as many fewer forgotten; which early stage was best is no matter.
    """
    better = [*R[:-1], [x + more for x in R[-1]]]
    assert abs(forgetting(better) - (forgetting(R) - more)) < 1e-9
    assert abs(average(better) - (average(R) + more)) < 1e-9
    early = R[:-1]
    rng.shuffle(early)
    assert abs(forgetting([*early, R[-1]]) - forgetting(R)) < 1e-9


@pytest.mark.parametrize("R", [[], [[1, 2]], [1, 2], [[[1]]]])
def test_what_is_no_matrix_of_stages_and_tasks_is_refused(R):
    for measure in (average, backward_transfer, forgetting):
        with pytest.raises(ValueError, match="a row a stage and a column a task"):
            measure(R)
    assert average([[7]]) == 7
    with pytest.raises(ValueError, match="at least 2"):
        forgetting([[7]])  # there is no earlier stage


# The experiment


def run_of(tmp_path, monkeypatch, **changes):
    """What an arm measures, and the tasks of each step's rows."""
    s = task_order.Ordered(**QUICK | {"method": "full", "steps": 8, "batch": 5, "documents": 1}
                           | changes)
    found, step = [], Trainer.step

    def looks(trainer, number, batch, *rest):
        said = [data.ByteTokenizer().decode(row) for row in batch[0]]
        found.append([text.partition("\n")[0].split()[0].lower() for text in said])
        return step(trainer, number, batch, *rest)

    monkeypatch.setattr(Trainer, "step", looks)
    return s, task_order.measured(s, RunDirectory(tmp_path), "x"), found


@pytest.mark.parametrize("seed", [0, 1, 6])
def test_a_stage_is_a_task_and_the_order_turns_with_the_seed(tmp_path, monkeypatch, seed):
    s, row, found = run_of(tmp_path, monkeypatch, seed=seed)
    order = task_order.order_of(s)
    assert order[0] == s.tasks[seed % 4] and sorted(order) == sorted(s.tasks)
    assert found == [[task] * 5 for task in order for _ in range(2)]
    assert np.shape(row[task_order.MATRIX]) == (4, 4) and row[task_order.ORDER] == [*order]


def test_earlier_tasks_come_again(tmp_path, monkeypatch):
    """A fifth of five rows is one, from the second stage on."""
    s, _, found = run_of(tmp_path, monkeypatch, earlier=0.2, seed=0)
    for step, tasks in enumerate(found):
        stage = step // 2
        assert [t == s.tasks[stage] for t in tasks] == [True] * 4 + [stage == 0]
        assert tasks[-1] in s.tasks[: max(1, stage)]


def test_mixed_tasks_are_asked_as_often(tmp_path, monkeypatch):
    s, row, found = run_of(tmp_path, monkeypatch, mixed=True, seed=0)
    assert len(found) == 8 and {task for tasks in found for task in tasks} == {*s.tasks}
    assert np.shape(row[task_order.MATRIX]) == (4, 4)


@pytest.mark.parametrize("changes", [{"earlier": 0.5}, {"mixed": True}])
def test_a_stopped_arm_goes_on_bit_for_bit(tmp_path, monkeypatch, changes):
    """In its third stage, at a step after a checkpoint."""
    s = task_order.Ordered(**QUICK | {"method": "lora", "steps": 8, "documents": 1, "save_every": 1}
                           | changes)
    whole, stopped = (RunDirectory(tmp_path / name) for name in ("whole", "stopped"))
    for run in (whole, stopped):
        run.path.mkdir()
    calls, step = [], Trainer.step

    def fails(trainer, *rest):
        calls.append(0)
        if len(calls) == 6:
            raise MemoryError("no room")
        return step(trainer, *rest)

    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", fails)
        with pytest.raises(MemoryError):
            task_order.measured(s, stopped, "x")
    assert task_order.measured(s, stopped, "x") == task_order.measured(s, whole, "x")


def test_the_claims_can_fail():
    def rows(turn, mixed):
        return [{"arm": arm, "seed": seed, task_order.FORGOTTEN: x + seed} for seed in (0, 1)
                for arm, x in ((task_order.TURN, turn), (task_order.MIXED, mixed))]

    forgets = task_order.CLAIMS["tasks that are learned in turn are forgotten"]
    less = task_order.CLAIMS["mixed tasks are forgotten less"]
    assert forgets(rows(60, 5)).verdict == less(rows(60, 5)).verdict == HOLDS
    assert forgets(rows(-60, 5)).verdict == less(rows(-60, 5)).verdict == FAILS
