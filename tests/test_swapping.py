"""scripts/experiments/swapping.py: a run that goes on, rates, and claims on one number a seed."""

from dataclasses import replace

import numpy as np
import pytest
import swapping
from swapping import ADAPTERS, CLAIMS, KEPT, LOAD, LORA, MOVED, SHARE, SWITCH, measured

from minilm import loop, trial
from minilm.run import RunDirectory

TINY = trial.trial_of(swapping.ARMS["upper"], quick=True)


@pytest.fixture(autouse=True)
def nothing_is_served(monkeypatch):
    monkeypatch.setattr(swapping, "SERVED", {})


def in_folder(path):
    path.mkdir(exist_ok=True)
    return RunDirectory(path)


def numbers_of(model):
    return np.concatenate([t.data.ravel() for _, t in model.named_tensors()])  # of all adapters


def test_a_run_that_was_stopped_goes_on_with_the_same_adapters(tmp_path, monkeypatch):
    whole = measured(TINY, in_folder(tmp_path / "whole"), "")
    learned = numbers_of(*[model for model, *_ in swapping.SERVED.values()])
    swapping.SERVED.clear()

    def fit(*args, title, **settings):
        for trainer, done in loop.fit(*args, title=title, **settings):
            yield trainer, done
            if title.startswith(ADAPTERS[1]) and done.step == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trial, "fit", fit)
        measured(TINY, in_folder(tmp_path / "stopped"), "")
    again = measured(TINY, in_folder(tmp_path / "stopped"), "")
    assert (numbers_of(*[model for model, *_ in swapping.SERVED.values()]) == learned).all()
    assert again | {SWITCH: 0, LOAD: 0} == whole | {SWITCH: 0, LOAD: 0} and whole[KEPT] > 0


def test_each_rate_has_its_adapters(tmp_path):
    for i, s in enumerate([TINY, replace(TINY, lr=0.5), replace(TINY, tasks=ADAPTERS, steps=0)]):
        swapping.served(s, in_folder(tmp_path / str(i)))
        [key] = swapping.SERVED
        assert key[2] == (0.5 if i == 1 else LORA["lr"])


def test_claims_on_all_adapters_take_the_worst_of_each_seed():
    rows = [{"arm": arm, "seed": seed, SWITCH: 1.0, LOAD: 20.0, SHARE: 10.0 + seed, MOVED: 0.0}
            for seed in (0, 1) for arm in swapping.ARMS]
    switch, small, same = list(CLAIMS.values())[-3:]
    assert switch(rows).seeds == small(rows).seeds == same(rows).seeds == 2
    rows[-1] |= {SWITCH: 3.0, SHARE: 40.0, MOVED: 1.0}  # the last adapter of seed 1
    assert switch(rows).mean == pytest.approx((0.05 + 0.15) / 2)
    assert small(rows).mean == 25 and same(rows).mean == 0.5
