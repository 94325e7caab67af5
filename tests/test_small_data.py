"""scripts/experiments/small_data.py: its records, and the state of a run that answers."""

from dataclasses import replace

import numpy as np
import pytest
import small_data
from hypothesis import given
from hypothesis import strategies as st
from small_data import BEST, GAP, HELD, LEARNED, Small, drawn, measured

from minilm import data, loop, trial
from minilm.run import RunDirectory

TINY = Small(batch=4, steps=9, warmup=1, workers=1, train=8, test=2, n=6, eval_every=1, lr=0.5,
             method="full", save_every=4)


@given(n=st.integers(1, 24), seed=st.integers(0, 99), letters=st.sampled_from("mz"))
def test_fewer_records_are_the_first_of_more(n, seed, letters):
    s = replace(TINY, n=n, seed=seed, words=data.Words(last=letters))
    train, held, test = drawn(s)
    most, *others = drawn(replace(s, n=24))
    assert train == most[:n] and [held, test] == others
    assert [record.task for record in train] == (["upper", "last", "sort"] * 8)[:n]
    made = [record.instruction + record.context for record in most + held + test]
    assert len(made) == len(set(made)) == 24 + 6 + 6
    assert max(max(record.context) for record in most + held + test) <= letters


def run_in(path):
    path.mkdir()
    return RunDirectory(path)


def test_the_best_state_answers(tmp_path, monkeypatch):
    """It is the first of those with most right tokens, and its numbers are back in the model."""
    kept, run = [], run_in(tmp_path / "a")

    def learned(model, tokenizer, records, s, run, title, watch):
        def both(trainer, done):
            watch(trainer, done)
            kept.append(trainer.optimizer.flat.data.copy())
        return trial.learned(model, tokenizer, records, s, run, title, both)

    def right(model, *rest):
        kept.append(np.concatenate([p.data.ravel() for p in model.parameters()]))
        return trial.right(model, *rest)

    monkeypatch.setattr(small_data, "learned", learned)
    monkeypatch.setattr(small_data, "right", right)
    found = measured(TINY, run, "a")
    held = [record["held"] for record in run.records()]
    assert len(held) == 9 and found[BEST] == 1 + held.index(max(held)) < 9
    *states, used = kept  # before the first step, after each, and when it answered
    assert len(states) == 10 and (used == states[found[BEST]]).all()
    assert (states[9] != used).any() and found[GAP] == found[HELD] - found[LEARNED]


@pytest.mark.parametrize("killed_at", [1, 3, 5, 7])
def test_a_run_that_was_killed_finds_the_same_state(tmp_path, monkeypatch, killed_at):
    expected = measured(TINY, run_in(tmp_path / "whole"), "")
    run = run_in(tmp_path / "killed")

    def fit(*args, **settings):
        for trainer, done in loop.fit(*args, **settings):
            yield trainer, done
            if done.step == killed_at:
                raise SystemExit("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(trial, "fit", fit)
        measured(TINY, run, "")
    assert measured(TINY, run, "") == expected
