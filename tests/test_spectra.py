"""Spectra: how many directions a matrix needs, and what is known of normal matrices."""

from dataclasses import replace

import numpy as np
import pytest
import spectra as experiment
from hypothesis import given
from hypothesis import strategies as st

from minilm.measure.spectra import (
    apart,
    likeness,
    noise_apart,
    noise_edge,
    noise_rank,
    rank_of,
    spectrum,
)
from minilm.peft import merge_lora, unload_lora
from minilm.peft.lora import add_lora
from minilm.transformer import Config, Transformer

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 9)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def orthogonal(seed, n):
    return np.linalg.qr(normal(seed, n, n))[0]


@given(seeds, sizes, sizes)
def test_the_spectrum_is_that_of_the_singular_value_decomposition(seed, O, I):
    W = normal(seed, O, I)
    found = spectrum(W)
    np.testing.assert_allclose(found, np.linalg.svd(W)[1], atol=1e-12)
    squares = np.linalg.eigvalsh(W @ W.T if O < I else W.T @ W)[::-1]
    np.testing.assert_allclose(found**2, squares, atol=1e-10)


@given(seeds, sizes, sizes)
def test_orthogonal_factors_change_nothing(seed, O, I):
    W = normal(seed, O, I)
    turned = orthogonal(seed + 1, O) @ W @ orthogonal(seed + 2, I)
    np.testing.assert_allclose(spectrum(turned), spectrum(W), atol=1e-12)
    np.testing.assert_allclose(spectrum(W.T), spectrum(W), atol=1e-12)


@given(seeds, sizes, st.floats(1e-3, 1e3), st.floats(0.01, 0.99))
def test_a_matrix_made_of_its_values_has_them(seed, n, size, share):
    s = np.sort(np.random.default_rng(seed).uniform(0.1, 1, n))[::-1] * size
    found = spectrum(orthogonal(seed, n) * s @ orthogonal(seed + 1, n).T)
    np.testing.assert_allclose(found, s, rtol=1e-9)
    k, whole = rank_of(s, share), (s**2).sum()
    assert (s[:k]**2).sum() >= share * whole * (1 - 1e-12)
    assert (s[: k - 1]**2).sum() < share * whole * (1 + 1e-12)
    assert rank_of(s[::-1] / size, share) in (k - 1, k, k + 1)  # at a border rounding decides
    assert rank_of(s, share) <= rank_of(s, (1 + share) / 2)


@given(seeds, st.integers(1, 4), st.integers(4, 9), st.integers(4, 9))
def test_a_low_rank_needs_no_more_directions_than_it_has(seed, r, O, I):
    update = normal(seed, O, r) @ normal(seed + 1, r, I)
    for share in (0.5, 0.9, 0.999999):
        assert 1 <= rank_of(spectrum(update.astype(np.float32)), share) <= r


def test_so_does_an_adapter():
    model = add_lora(Transformer(Config.llama(9, 4, 1, 2, 8, 8)), r=2, alpha=4)
    for path, adapter in model.named_modules():
        if path.endswith("adapters.default"):
            adapter.B.data[...] = normal(1, *adapter.B.shape)
            assert rank_of(spectrum(adapter.update())) <= 2


@given(seeds, sizes, st.floats(0.01, 100))
def test_likeness_is_blind_to_scale_alone(seed, n, scale):
    s, t = (spectrum(normal(seed + i, n, n)) for i in range(2))
    assert likeness(s, scale * s) == pytest.approx(1)
    assert 0 < likeness(s, t) <= 1 + 1e-12
    assert likeness(s, t) == pytest.approx(likeness(t, s * scale))
    one = np.eye(1, n)[0]
    assert likeness(s, one) == pytest.approx(s[0] / np.linalg.norm(s))
    assert apart(s, s) == 0 and apart(s, t) == apart(t, s) == pytest.approx(np.mean(abs(s - t)))


@pytest.mark.parametrize("c", [0.0, 0.1, 0.5, 1.0])
def test_sums_of_normal_matrices_are_as_the_quarter_circle_says(c):
    """Fluctuations of a spectrum of n values are of the order 1 / n."""
    n, A, B = 300, normal(1, 300, 300), normal(2, 300, 300)
    before, after = spectrum(A), spectrum(A + c * B)
    assert after[0] == pytest.approx(noise_edge(n, c), rel=0.02)
    assert rank_of(after) == pytest.approx(noise_rank() * n, abs=3)
    assert rank_of(after, 0.5) == pytest.approx(noise_rank(0.5) * n, abs=3)
    assert apart(before, after) == pytest.approx(noise_apart(n, c), abs=0.02 * np.sqrt(n))


def test_the_part_of_a_normal_matrix_is_the_integral():
    """The sums of eqs. (3) and (4), on a fine grid of the density."""
    x = (np.arange(200_000) + 0.5) * 1e-5
    rho = np.sqrt(4 - x**2) / np.pi * 1e-5
    assert rho.sum() == pytest.approx(1, abs=1e-6)
    assert (x * rho).sum() == pytest.approx(8 / (3 * np.pi), abs=1e-6)
    for share in (0.1, 0.5, 0.9, 0.99):
        above = np.cumsum((x**2 * rho)[::-1]) <= share
        assert noise_rank(share) == pytest.approx(rho[::-1][above].sum(), abs=1e-4)


@pytest.mark.parametrize("call, said", [
    (lambda: spectrum([1.0]), "matrix of finite numbers"),
    (lambda: spectrum([[np.nan]]), "matrix of finite numbers"),
    (lambda: spectrum(np.zeros((0, 2))), "matrix of finite numbers"),
    (lambda: rank_of([0.0, 0.0]), "matrix of zeros"), (lambda: likeness([0.0], [1.0]), "zeros"),
    (lambda: rank_of([1.0], 1.0), "share must lie between"), (lambda: noise_rank(0.0), "share"),
    (lambda: noise_edge(0), "n must be"), (lambda: noise_apart(0, 1.0), "n must be")])
def test_bad_input_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# The experiment


def test_an_update_is_what_merging_adds():
    model = experiment.base("")[0]
    W0 = experiment.weights(model)
    assert len(W0) == 2 * 6 and not any(W.any() for W in experiment.updates(model, W0).values())
    model = add_lora(model, r=2, alpha=4, targets="all-linear")
    for path, adapter in model.named_modules():
        if path.endswith("adapters.default"):
            adapter.B.data[...] = normal(1, *adapter.B.shape) * 0.1
    found = experiment.updates(model, W0)
    merged = experiment.updates(unload_lora(merge_lora(model)), W0)
    assert found.keys() == merged.keys() == W0.keys()
    for path, dW in found.items():
        np.testing.assert_allclose(dW, merged[path], atol=1e-5)
        assert rank_of(spectrum(dW)) <= 2 and dW.any()


def test_the_numbers_of_an_arm_are_those_of_its_updates(monkeypatch):
    W0 = experiment.weights(experiment.base("")[0])
    made = {path: 0.5 * W for path, W in W0.items()}
    by_step = {1: dict.fromkeys(W0, 3), 4: dict.fromkeys(W0, 5)}
    monkeypatch.setattr(experiment, "tuned", lambda s: (made, by_step, 1.5))
    s = experiment.Tuned(seed=2)
    row = experiment.measured(s, None, "")
    ranks = [rank_of(spectrum(W)) for W in W0.values()]
    for name in (experiment.RANK0, experiment.RANKW, experiment.RANK):
        assert row[name] == np.mean(ranks)
    assert row[experiment.LIKE] == pytest.approx(1) and row[experiment.SIZE] == pytest.approx(50)
    assert row[experiment.MOVED] == pytest.approx(50)
    assert 0 < row[experiment.NOISY] < 50  # W0 is normal: noise adds to it at right angles
    assert row[experiment.EARLY] == 3 and row[experiment.STEPS] == {"1": 3, "4": 5}
    assert row[experiment.LOSS] == 1.5 and row["gate: k90 of dW"] == 0
    monkeypatch.setattr(experiment, "loss_with", lambda s, noise: 2.5)
    noise = experiment.measured(replace(s, noise=True), None, "")
    assert noise[experiment.SIZE] == pytest.approx(50) and noise[experiment.MOVED] < 20
    assert noise[experiment.LOSS] == 2.5
    assert noise[experiment.RANK] == noise[experiment.EARLY] and noise[experiment.STEPS] == {}
