"""A step beside what its gradient promises: exact for parabolas, Taylor's law for a model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.measure.descent import Fall, falls, watched
from minilm.optim import SGD
from minilm.tensor import no_grad
from minilm.transformer import Config, Transformer

CONFIGS = [Config.gpt2(20, 8, 1, 2, 8), Config.llama(20, 8, 2, 2, 8, 12)]
seeds, etas = st.integers(0, 999), st.floats(1e-4, 10)


@given(seeds, st.integers(1, 6), etas)
def test_of_a_parabola_the_difference_is_exactly_that_of_its_curvature(seed, n, eta):
    rng = np.random.default_rng(seed)
    A, b, w, d = rng.normal(size=(n, n)), *rng.normal(size=(3, n))
    A = A @ A.T
    (fall,) = falls(lambda: w @ A @ w / 2 + b @ w, w, A @ w + b, d, [eta])
    half = d @ A @ d / 2
    rounding = 1e-13 * (1 + abs(fall.expected) + eta**2 * half + abs(w @ A @ w) + abs(b @ w))
    assert abs(fall.expected - fall.measured - eta**2 * half) < rounding
    assert np.isclose(fall.expected, -eta * (A @ w + b) @ d)


def example(config, seed):
    """(loss, the optimizer that holds its weights) of a model in float64, after its backward pass.
    """
    rng = np.random.default_rng(seed)
    model = Transformer(config, seed).astype(np.float64)
    tokens, targets = rng.integers(0, config.vocab_size, (2, 3, 8))
    step = SGD(model.parameters(), 1.0)

    def loss() -> float:
        with no_grad():
            return float(ops.cross_entropy(model(tokens), targets).data)

    def gradient():
        step.zero_grad()
        ops.cross_entropy(model(tokens), targets).backward()
        step.flat.complete()
        return step.flat.grad.copy()

    return loss, gradient, step.flat.data


@given(st.sampled_from(CONFIGS), seeds, st.booleans())
def test_the_difference_falls_as_eta_squared(config, seed, down):
    """Taylor's law in float64, along -g and along any other direction. The curvature is told apart
    from the losses, by gradients on both sides."""
    loss, gradient, W = example(config, seed)
    g = gradient()
    d = -g if down else np.random.default_rng(seed).normal(size=g.size) * np.linalg.norm(g) / 30
    start, h = W.copy(), 1e-5
    ends = []
    for side in (1, -1):
        W[...] = start + side * h * d
        ends.append(gradient())
    W[...] = start
    half = d @ (ends[0] - ends[1]) / (2 * h) / 2  # d.H d / 2
    scale = abs(half) + 0.01 * d @ d
    (near,), (there,), (back,) = (falls(loss, W, g, side * d, [eta]) for side, eta in (
        (1, 1e-5), (1, 3e-5), (-1, 3e-5)))
    assert abs((there.bend + back.bend) / 2 - half) < 1e-3 * scale  # without the cubic term
    cubic = (there.bend - back.bend) / 2 / there.eta
    assert abs(near.bend - half - cubic * near.eta) < 0.02 * scale
    assert abs(near.ratio - 1) < 0.05 or not down


@given(st.sampled_from(CONFIGS), seeds)
def test_gradient_descent_promises_eta_times_the_square_of_the_gradient(config, seed):
    loss, gradient, W = example(config, seed)
    g = gradient()
    for fall in falls(loss, W, g, -g, [1e-4, 0.1]):
        assert np.isclose(fall.expected, fall.eta * np.linalg.norm(g) ** 2)


def test_the_weights_are_put_back_even_after_an_error():
    W = np.array([1.0, 2.0])
    assert falls(lambda: W @ W, W, 2 * W, -2 * W, [0.5, 0.25])[0] == Fall(0.5, 10.0, 5.0)
    assert W.tolist() == [1, 2]
    losses = iter([5.0])
    with pytest.raises(StopIteration):
        falls(lambda: next(losses), W, W, W, [1.0])
    assert W.tolist() == [1, 2]


def test_a_flat_place_promises_nothing():
    assert np.isnan(Fall(0.1, 0.0, 0.0).ratio)


@pytest.mark.parametrize("config", CONFIGS)
def test_watching_notes_every_module_in_order_and_changes_nothing(config):
    model, tokens = Transformer(config), np.array([[1, 2, 3]])
    with watched(model) as seen:
        logits = model(tokens)
    assert np.array_equal(logits.data, model(tokens).data)
    assert not any("forward" in vars(module) for _, module in model.named_modules())
    paths = [path for path, _ in model.named_modules()]
    assert set(seen) == set(paths) and list(seen)[:3] == ["", "front", "embed"]
    order = [f"blocks.0.{p}" for p in ("norm1", "attention.q", "attention.o", "norm2", "mlp.down")]
    assert [path for path in seen if path in order] == order
    assert seen["blocks.0.mlp.up"].shape == (1, 3, config.hidden)
    assert np.isclose(seen["head"].rms, np.linalg.norm(logits.data) / np.sqrt(logits.size))


def test_after_an_error_nothing_is_watched_any_more():
    model = Transformer(CONFIGS[0])
    with pytest.raises(ValueError, match="ids from 99"), watched(model):
        model(np.array([[99]]))
    assert not any("forward" in vars(module) for _, module in model.named_modules())
