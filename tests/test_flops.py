"""minilm.measure.flops: the formula counts what the engine multiplies, operation by operation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from minilm import ops
from minilm.measure.flops import Flops, flops, pairs
from minilm.measure.memory import make_model
from minilm.measure.step import Step
from minilm.tensor import no_grad
from minilm.transformer import Config

FAMILIES = {
    "gpt2": Config.gpt2(20, 160, layers=2, heads=2, width=12),
    "llama": Config.llama(20, 160, layers=2, heads=4, width=16, hidden=24, kv_heads=2),
    "window": Config.llama(20, 160, layers=2, heads=2, width=8, hidden=24, window=30,
                           unwindowed=(1,)),
    "bert": Config.bert(20, 160, layers=2, heads=2, width=12, hidden=24),
}
LAYERS = ("q", "k", "v", "o", "up", "down")


class Counted(np.ndarray):
    """An array that counts the operations of each product of matrices that it is part of."""

    found = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **settings):
        if ufunc is np.matmul and min(a.ndim for a in inputs) > 1:  # the others are sums of rows
            a, b = inputs
            lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
            Counted.found += 2 * math.prod(lead) * a.shape[-2] * math.prod(b.shape[-2:])
        plain = [a.view(np.ndarray) if isinstance(a, Counted) else a for a in inputs]
        if out:
            settings["out"] = tuple(a.view(np.ndarray) for a in out)
        y = getattr(ufunc, method)(*plain, **settings)
        return y.view(Counted) if isinstance(y, np.ndarray) else y


def counting(step):
    """The step's model, whose products are counted from now on."""
    model, Counted.found = make_model(step), 0
    for _, t in model.named_tensors():
        t.become(t.data.view(Counted))
    return model


def counted(step) -> Flops:
    """What the engine multiplies in a step, without the q k^T that attention makes again."""
    model = counting(step)
    tokens = np.random.default_rng(0).integers(0, 20, (step.batch, step.T))
    with threadpool_limits(1, "blas"):
        loss = ops.cross_entropy(model(tokens), tokens)
        forward, Counted.found = Counted.found, 0
        loss.backward()
    c, qkv = step.config, [f"attention.{name}" for name in "qkv"]
    again = sum(2 * step.batch * c.heads * c.D * pairs(step, i) for i in range(c.layers)
                if step.reaches(i) or step.trains(*qkv))
    return Flops(forward, Counted.found - again)


@pytest.mark.parametrize("family", FAMILIES)
@given(st.integers(1, 3), st.sampled_from([1, 7, 64, 65, 150]))
def test_full_training_is_counted(family, batch, T):
    step = Step(FAMILIES[family], "full", batch, T)
    assert flops(step) == counted(step)


@pytest.mark.parametrize("family", FAMILIES)
@given(st.sets(st.sampled_from(LAYERS), min_size=1), st.integers(1, 4), st.sampled_from([7, 65]))
def test_lora_is_counted_whatever_it_adapts(family, targets, r, T):
    step = Step(FAMILIES[family], "lora", 2, T, r, tuple(targets))
    assert flops(step) == counted(step)


def test_the_forward_pass_alone_needs_no_more():
    step = Step(FAMILIES["gpt2"], "lora", 2, 9, 3, "all-linear")
    model = counting(step)
    with no_grad():
        model(np.zeros((2, 9), int))
    assert Counted.found == flops(step).forward


def test_shares_of_a_large_layer():
    """Where the linear layers are nearly all: 6 I O and 4 I O + 6 r (I + O), and LoRA's bound."""
    c = Config.gpt2(1, 8, layers=400, heads=1, width=4096)
    full = flops(Step(c, "full", 1, 8)).total
    for r in (1, 64):
        lora = flops(Step(c, "lora", 1, 8, r, "all-linear")).total
        sizes = 12 * 4096**2
        expected = (4 * sizes + 6 * r * 18 * 4096) / (6 * sizes)  # I + O: 4 x 2 C + 2 x 5 C
        assert lora / full == pytest.approx(expected, rel=1e-3)
        assert lora / full > 2 / 3 - 1e-3


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match="full and lora are known, not those of dora"):
        flops(Step(FAMILIES["gpt2"], "dora", 1, 8))
