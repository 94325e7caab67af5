"""scripts/experiments/learning_and_forgetting.py: what is compared, and when it is measured."""

import learning_and_forgetting as experiment
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learning_and_forgetting import (
    ARMS,
    CHOICE,
    CLAIMS,
    KNOWN,
    SHARES,
    TARGET,
    Learning,
    at,
    forgot_more,
    measured,
    some_rows,
)

from minilm import data, loop, trial
from minilm.measure.losses import loss_of
from minilm.measure.verdict import FAILS, HOLDS
from minilm.peft import add_lora
from minilm.peft.adapted import adapted_layers, chosen
from minilm.run import RunDirectory

TINY = dict(batch=4, steps=8, warmup=1, workers=1, train=8, test=2, lr=0.1, save_every=3,
            method="full", tasks=("upper",))


def row(arm="x", seed=0, target=(4, 3, 2, 1), known=(2, 3, 4, 5), choice=50.0):
    """A row of an arm that has these losses after 1/8, 1/4, 1/2 and all of its steps."""
    points = {at(measure, share): float(x)
              for measure, numbers in ((TARGET, target), (KNOWN, known))
              for share, x in zip(SHARES, numbers, strict=True)}
    return {"arm": arm, "seed": seed, CHOICE: choice, experiment.RIGHT: choice, **points}


def test_what_full_had_lost_when_it_had_learned_as_much():
    """On lines from the base (5 of the target, 1 of the old text) through (4, 2) .. (1, 5)."""
    start = row(target=[5] * 4, known=[1] * 4)
    for target, known, expected in [(4, 2, 0), (4.5, 2, .5), (1.5, 4, -.5), (1, 7, 2), (0, 7, 2),
                                    (6, 1, 0)]:  # beyond its points the nearest one counts
        other = row(target=[9, 9, 9, target], known=[9, 9, 9, known])
        assert forgot_more(start, row(), other) == pytest.approx(expected)


def judged(claim, arms):
    """The verdict if each arm has its rows for two seeds, that differ a little."""
    rows = [row(arm, seed, [x + seed / 1e3 * i for x in of[0]], [x + seed / 1e3 * i for x in of[1]])
            for i, (arm, of) in enumerate(arms.items(), 1) for seed in (0, 1)]
    return CLAIMS[claim](rows).verdict


def test_claims_can_hold_and_fail():
    flat, base = (3, 3, 3, 3), ((5,) * 4, (1,) * 4)
    claim = "CPT: the gap of r = 8 to full widens with the tokens"
    full, slow = ((4, 3, 2, 1), flat), ((4, 3.2, 2.6, 2), flat)
    assert judged(claim, {"CPT, full": full, "CPT, r = 8": slow}) == HOLDS
    assert judged(claim, {"CPT, full": slow, "CPT, r = 8": full}) == FAILS
    claim = "IFT: r = 8 forgets less than full when that had learned as much"
    more, less = ((4, 3, 2, 1), (2, 3, 4, 5)), ((4, 3, 2, 1), (1, 2, 2, 2))
    arms = {"IFT, base model": base, "IFT, full": more, "IFT, r = 8": less}
    assert judged(claim, arms) == HOLDS
    assert judged(claim, arms | {"IFT, full": less, "IFT, r = 8": more}) == FAILS


@given(count=st.integers(1, 9), size=st.integers(1, 60))
def test_rows_lie_equally_far_apart(count, size):
    text, tokenizer = "".join(map(chr, range(33, 33 + size))), data.ByteTokenizer()
    whole = data.rows_of([text], tokenizer, 4)
    tokens, targets = some_rows([text], tokenizer, 4, count)
    n = min(count, len(whole[0]))
    places = [int((whole[0] == r).all(1).argmax()) for r in tokens]
    assert len(places) == n and places[0] == 0 and (n == 1 or places[-1] == len(whole[0]) - 1)
    assert n < 3 or np.ptp(np.diff(places)) <= 1
    assert (targets == whole[1][places]).all()


def run_in(path):
    path.mkdir()
    return RunDirectory(path)


@pytest.fixture
def small(monkeypatch):
    """Short texts, and few questions."""
    text = "".join(chr(33 + i * i % 90) for i in range(600))
    monkeypatch.setattr(experiment, "corpus", lambda: ((text[:400],), (text[400:],)))
    monkeypatch.setattr(experiment, "held_out", lambda share: (text[:300],))


@pytest.mark.parametrize("text", [True, False])
def test_a_run_is_looked_at_four_times(tmp_path, monkeypatch, small, text):
    """After 1, 2, 4 and 8 of 8 steps; the last numbers are those of the model that comes out."""
    looks, models = [], []

    def loss(model, *rows):
        models.append(model)
        looks.append(loss_of(model, *rows))
        return looks[-1]

    monkeypatch.setattr(experiment, "loss_of", loss)
    found = measured(s := Learning(**TINY, text=text), run_in(tmp_path / "a"), "")
    assert len(looks) == 8 and len({id(model) for model in models}) == 1
    assert [found[at(TARGET, share)] for share in SHARES] == [x / np.log(2) for x in looks[::2]]
    assert [found[at(KNOWN, share)] for share in SHARES] == [x / np.log(2) for x in looks[1::2]]
    assert len({*looks}) == 8
    rows = (some_rows(experiment.corpus()[1], data.ByteTokenizer(), models[0].room, 2) if text
            else data.encode(trial.records_of(s)[1], data.ByteTokenizer(), context=models[0].room))
    assert found[TARGET] == loss_of(models[0], *rows) / np.log(2)


@pytest.mark.parametrize("killed_at", [2, 5, 8])
def test_a_run_that_was_killed_finds_the_same(tmp_path, monkeypatch, small, killed_at):
    s = Learning(**TINY, text=True)
    expected, run = measured(s, run_in(tmp_path / "whole"), ""), run_in(tmp_path / "killed")

    def fit(*args, **settings):
        for trainer, done in loop.fit(*args, **settings):
            yield trainer, done
            if done.step == killed_at:
                raise SystemExit("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(trial, "fit", fit)
        measured(s, run, "")
    assert measured(s, run, "") == expected


def test_arms_differ_in_what_their_names_say():
    for arm, own in ARMS.items():
        assert own.get("text", False) == arm.startswith("CPT")
        assert own.get("attention_dropout", 0) == (0.1 if "dropout" in arm else 0)
        last = arm.rpartition(" ")[2]
        assert own.get("weight_decay", 0) == (float(last) if "decay" in arm else 0)
        assert "r = " not in arm or own["r"] == int(last)


def test_how_far_the_weights_moved():
    """Of LoRA its update counts, of full fine-tuning the difference; the base is where it was."""
    start, model = trial.base("")[0], trial.base("")[0]
    assert experiment.moved(model, start) == 0

    def norm(of): return np.sqrt(sum((W**2).sum() for W in of))
    own = {path: layer.weight.data for path, layer in chosen(model, "all-linear").items()}
    before = norm(own.values())
    own["blocks.1.mlp.up"] += 0.25
    way = 0.25 * own["blocks.1.mlp.up"].size ** 0.5
    assert experiment.moved(model, start) == pytest.approx(100 * way / before, rel=1e-4)
    adapted = add_lora(trial.base("")[0], 2, 4, "all-linear")
    for layer in adapted_layers(adapted).values():
        layer.adapters["default"].B.data += 0.1
    updates = [layer.adapters["default"].update() for layer in adapted_layers(adapted).values()]
    assert experiment.moved(adapted, start) == pytest.approx(100 * norm(updates) / before, rel=1e-4)
