"""The experiments on few bits: what is trained, rounded and recovered, and claims that can fail."""

import from_random_bits
import half_precision
import numpy as np
import pytest
import recovery
from from_random_bits import ALL, ARMS, FULL, HIGH, LORA, QLORA
from half_precision import STILL, ZERO
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.measure.verdict import FAILS, HOLDS
from minilm.results import Result
from minilm.trial import RIGHT


def rows(**of_arms):
    """Rows of three seeds whose arms have these numbers, a little apart by seed."""
    return [{"arm": arm, "seed": seed} | {m: x + seed / 1e4 for m, x in numbers.items()}
            for arm, numbers in of_arms.items() for seed in range(3)]


def verdict(experiment, words, rows):
    (judge,) = [judge for claim, judge in experiment.CLAIMS.items() if words in claim]
    return judge(rows).verdict


# Half precision.

def trained(dtype, masters, **settings):
    """(shares, the weights at the end) of three steps."""
    tokens = np.random.default_rng(0).integers(0, 258, 500).astype(np.int32)
    batches = data.Batches([tokens], [1], 2, 16, 0)
    model, twin = (half_precision.untrained(0, quick=True) for _ in range(2))
    found = half_precision.trained(model, twin, batches, dtype, masters, 1.0, False, 3, **settings)
    return found, np.concatenate([p.data.ravel() for p in twin.parameters()])


def test_small_updates_add_up_in_masters_alone():
    """Steps of 3e-7 are too small for a float16 above 6e-4; where no step counts, 3 do not."""
    start = np.concatenate([p.data.ravel() for p in half_precision.untrained(0, True).parameters()])
    found, end = trained("float16", masters=False, lr=3e-7)
    large = np.abs(start) > 0.01
    assert found[STILL] > 90 and (end == start.astype(np.float16))[large].all()
    found, end = trained("float16", masters=True, lr=3e-7)
    assert found[STILL] < 10
    found, end = trained("float16", masters=True, lr=3e-4)
    assert (end != start.astype(np.float16))[large].any()


def test_float32_is_its_own_master_and_loses_no_gradient():
    (with_masters, end), (without, same) = (trained("float32", m) for m in (True, False))
    assert with_masters == without and (end == same).all() and with_masters[ZERO] == 0


@given(st.integers(-20, 20))
def test_a_scale_of_the_loss_is_one_of_the_gradients(k):
    model = half_precision.untrained(0, quick=True)
    batch = tuple(np.random.default_rng(k + 20).integers(0, 258, (2, 2, 16)))
    plain, scaled = (half_precision.gradient(model, batch, scale) for scale in (1.0, 2.0**k))
    assert plain.any() and (scaled == plain * 2.0**k).all()


def test_a_gradient_of_float16_underflows_and_overflows():
    model = half_precision.untrained(0, quick=True).astype("float16")
    batch = tuple(np.random.default_rng(0).integers(0, 258, (2, 2, 16)))
    low, good, high = (half_precision.gradient(model, batch, 2.0**k) for k in (-12, 8, 30))
    assert np.mean(low == 0) > np.mean(good == 0) and np.isfinite(good).all()
    assert not np.isfinite(high).all()


@pytest.mark.parametrize("words, arm, measure, good, bad", [
    ("updates are imprecise", half_precision.SCALER, STILL, 10, 0.5),
    ("with masters 1 %", half_precision.MIXED, STILL, 0, 3),
    ("in a small batch", half_precision.PLAIN, ZERO, 5, 0),
    ("in a part of a large batch", half_precision.LARGE, ZERO, 5, 0),
    ("with a scaler 0.1", half_precision.MIXED, ZERO, 0, 1),
    ("gradients overflow", half_precision.MIXED, half_precision.INF, 80, 10)])
def test_a_claim_on_half_precision_may_fail(words, arm, measure, good, bad):
    for x, said in ((good, HOLDS), (bad, FAILS)):
        assert verdict(half_precision, words, rows(**{arm: {measure: x}})) == said


# Random weights.

def names(arm):
    how = {name: value for name, value in ARMS[arm].items() if name != "lr"}
    model = from_random_bits.untrained(0, quick=True, **how)
    trains = {name for name, t in model.named_tensors() if t.requires_grad}
    return trains, {name for name, _ in model.named_tensors()} - trains


def test_what_each_arm_trains():
    plain, frozen = names(FULL)
    assert not frozen
    adapters, frozen = names(LORA)
    assert names(QLORA)[0] == adapters
    assert all(name.endswith((".A", ".B")) for name in adapters)
    outside = {name for name in plain if ".attention." not in name and ".mlp." not in name}
    assert outside < frozen and {"embed.weight", "head.weight"} < outside
    assert names(ALL)[0] == names(HIGH)[0] == adapters | outside


@pytest.mark.parametrize("words, arm, good, bad", [
    ("QLoRA is not for pre-training", QLORA, 3.5, 2.9), ("still behind", ALL, 3.1, 2.9)])
def test_adapters_may_be_enough(words, arm, good, bad):
    for x, said in ((good, HOLDS), (bad, FAILS)):
        found = rows(**{arm: {from_random_bits.TEXT: x}, FULL: {from_random_bits.TEXT: 3.0}})
        assert verdict(from_random_bits, words, found) == said


def test_the_frozen_head_may_be_no_reason():
    for bound, said in ((6.2, HOLDS), (3.2, FAILS), (0, FAILS)):
        found = rows(**{QLORA: {from_random_bits.BOUND: bound}, FULL: {from_random_bits.TEXT: 3}})
        assert verdict(from_random_bits, "the frozen head", found) == said


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 99), st.floats(0.01, 1))
def test_no_direction_is_better_than_the_best(V, C, seed, size):
    rng = np.random.default_rng(seed)
    W, x = size * rng.normal(size=(V, C)), rng.normal(size=(500, C))
    x *= np.sqrt(C) / np.linalg.norm(x, axis=1, keepdims=True)
    bits = from_random_bits.least_bits(W)
    logits = x @ W.T
    tried = (np.log2(np.exp(logits).sum(1, keepdims=True)) - logits / np.log(2)).min(0)
    assert (bits <= tried + 1e-9).all()


def test_the_best_direction_by_hand():
    """Two tokens, w = +-1, |x| <= 1: the best x is w, with logits +-1."""
    bits = from_random_bits.least_bits(np.array([[1.0], [-1.0]]))
    assert np.allclose(bits, np.log2(1 + np.exp(-2)))


# Recovery.

@given(st.floats(1, 50), st.floats(-50, 50))
def test_what_is_recovered_is_a_share_of_what_was_lost(lost, left):
    assert abs(recovery.recovered(lost, left, 1) - 100 * (lost - left) / lost) < 1e-9
    assert recovery.recovered(lost, 0, 1) == 100 and recovery.recovered(lost, lost, 1) == 0
    assert recovery.recovered(0.9, left, 1) == 100


def test_an_arm_alone_has_the_numbers_that_it_has_among_others(tmp_path, monkeypatch):
    """The base in 16 bits is tuned once a seed, or again in the run of another arm."""
    for arms in (("full", "LoRA", "NF2"), ("NF2",)):
        monkeypatch.setattr(recovery, "TUNED", {})
        recovery.main(seeds=(0,), quick=True, out=tmp_path, arms=arms)
    many, one = (Result.load(tmp_path / f"recovery-{i}" / "result.json") for i in (1, 2))
    assert many.rows[2] == one.rows[0]
    full, lora, few = many.rows
    assert lora[recovery.PUT] == lora[RIGHT] and full[recovery.BEFORE] == lora[recovery.BEFORE]
    assert few[recovery.BEFORE] != lora[recovery.BEFORE]


def test_an_adapter_of_another_base_is_put_on_this_one(tmp_path, monkeypatch):
    """The model that is asked has this base's codes, and the adapter that 16 bits have."""
    asked, right = [], recovery.right
    monkeypatch.setattr(recovery, "TUNED", {})
    monkeypatch.setattr(recovery, "right", lambda model, *rest: asked.append(
        {name: t.data.copy() for name, t in model.named_tensors()}) or right(model, *rest))
    recovery.main(seeds=(0,), quick=True, out=tmp_path, arms=("NF2",))
    control, own, put = asked
    adapters = [name for name in own if name.endswith((".A", ".B"))]
    assert len(adapters) > 3
    for name in adapters:
        assert (put[name] == control[name]).all()
    assert any((own[name] != control[name]).any() for name in adapters)
    assert put.keys() == own.keys() != control.keys()


@pytest.mark.parametrize("words, arm, measure, good, bad", [
    ("old text on NF3", "NF3", recovery.BACK, 99, 80),
    ("50 % or more: the answers on NF2", "NF2", recovery.ANSWERS, 70, 30)])
def test_recovery_may_fail(words, arm, measure, good, bad):
    for x, said in ((good, HOLDS), (bad, FAILS)):
        assert verdict(recovery, words, rows(**{arm: {measure: x}})) == said


@pytest.mark.parametrize("words, measure, good, bad", [
    ("FP4 is behind NF4 before", recovery.BEFORE, 0.1, -0.1),
    ("FP4 is behind NF4 after tuning, on the old text", recovery.AFTER, 0.1, -0.1),
    ("FP4 does after tuning", RIGHT, 0.5, -5)])
def test_fp4_may_be_ahead(words, measure, good, bad):
    for x, said in ((good, HOLDS), (bad, FAILS)):
        found = rows(**{"FP4": {measure: 2 + x}, "NF4 + DQ": {measure: 2}, "LoRA": {measure: 2}})
        assert verdict(recovery, words, found) == said
