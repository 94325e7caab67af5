"""minilm.peft.dora: eq. (5) written out on one layer, m at the start, the gradient with the norm as
a constant, LoRA as the case of m = ||W0 + s B A||, and what is refused. The laws of all methods are
in test_methods.py, PEFT's files in test_interop_peft.py and test_peft_whole.py."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_methods import logits, make, stir

from minilm.nn import Linear
from minilm.peft import add_dora, add_lora, merge_lora, requantize_lora
from minilm.peft.adapted import adapted_layers
from minilm.peft.dora import DoRA, at_rest
from minilm.peft.lora import LoRA
from minilm.tensor import Tensor


def layer(rng, O=4, I=3, r=2, alpha=3.0, bias=True, rslora=False):
    """(a base, its adapter), in float64, of which no part is zero."""
    base = Linear(I, O, rng, bias, std=1.0).astype("float64")
    if bias:
        base.bias.data[...] = rng.standard_normal(O)
    lora = LoRA(rng.standard_normal((r, I)), rng.standard_normal((O, r)), alpha, rslora=rslora)
    return base.freeze(), DoRA(lora, rng.standard_normal(O))


@given(I=st.integers(1, 5), O=st.integers(1, 5), r=st.integers(1, 3), bias=st.booleans(),
       rslora=st.booleans(), lead=st.lists(st.integers(1, 3), max_size=3), seed=st.integers(0, 99))
def test_the_formula(I, O, r, bias, rslora, lead, seed):
    """m (W0 + s B A) / ||W0 + s B A|| by rows, beside and merged, for any shape."""
    rng = np.random.default_rng(seed)
    base, adapter = layer(rng, O, I, r, 3.0, bias, rslora)
    x, s = rng.standard_normal((*lead, I)), 3.0 / (np.sqrt(r) if rslora else r)
    W = base.weight.data + s * adapter.lora.B.data @ adapter.lora.A.data
    W = adapter.m.data[:, None] * W / np.sqrt((W * W).sum(1, keepdims=True))
    expected = x @ W.T + (base.bias.data if bias else 0)
    size = max(1.0, np.abs(expected).max())
    assert np.abs(adapter(Tensor(x), base).data - expected).max() < 1e-12 * size
    merged = adapter.merged(base)
    assert np.abs(merged(Tensor(x)).data - expected).max() < 1e-12 * size
    assert np.abs(np.linalg.norm(merged.weight.data, axis=1) - abs(adapter.m.data)).max() < 1e-12


@given(seed=st.integers(0, 99), k=st.floats(0.1, 10))
def test_m_is_the_magnitude(seed, k):
    """At rest it is LoRA; k m gives k times the layer without its bias."""
    rng = np.random.default_rng(seed)
    base, other = layer(rng)
    adapter, x = at_rest(other.lora, base), Tensor(rng.standard_normal((5, 3)))
    expected = other.lora(x, base).data
    assert np.abs(adapter(x, base).data - expected).max() < 1e-12
    adapter.m.data *= k
    b = base.bias.data
    assert np.abs(adapter(x, base).data - (b + k * (expected - b))).max() < 1e-11


def test_the_norm_is_a_constant_in_the_backward_pass():
    rng = np.random.default_rng(0)
    base, adapter = layer(rng)
    x, dy, lora = rng.standard_normal((5, 3)), rng.standard_normal((5, 4)), adapter.lora
    adapter(Tensor(x), base).backward(dy)
    V = base.weight.data + lora.scale * lora.B.data @ lora.A.data
    n = np.linalg.norm(V, axis=1)
    dV = adapter.m.data[:, None] / n[:, None] * (dy.T @ x)
    assert np.allclose(adapter.m.grad, (dy * (x @ V.T)).sum(0) / n, rtol=1e-12)
    assert np.allclose(lora.A.grad, lora.scale * lora.B.data.T @ dV, rtol=1e-12)
    assert np.allclose(lora.B.grad, lora.scale * dV @ lora.A.data.T, rtol=1e-12)


@pytest.mark.parametrize("base", ["plain", "nf4", "int8"])
def test_what_is_trained_and_its_first_numbers(base):
    model, lora = add_dora(make("llama", base), 2, 4), add_lora(make("llama", base), 2, 4)
    for path, m in adapted_layers(model).items():
        adapter, twin = m.adapters["default"], adapted_layers(lora)[path].adapters["default"]
        assert np.array_equal(adapter.lora.A.data, twin.A.data) and not adapter.lora.B.data.any()
        W = m.base.plain().weight.data
        assert np.allclose(adapter.m.data, np.sqrt((W.astype(float) ** 2).sum(1)), rtol=1e-6)
    ends = {path.partition(".default.")[2] for path, _ in model.named_parameters()}
    assert ends == {"m", "lora.A", "lora.B"}
    assert adapted_layers(model).keys() == adapted_layers(lora).keys()


def test_what_is_refused():
    model = make("gpt2")
    before, trained = logits(model), len(model.parameters())
    for settings, text in ((dict(r=0), "r must be 1 to 16"), (dict(targets="w"), "match no layer"),
                           (dict(alpha=np.nan), "alpha must be finite"),
                           (dict(dropout=1.0), "dropout must be at least 0 and below 1")):
        with pytest.raises(ValueError, match=text):
            add_dora(model, **dict(r=2, alpha=4) | settings)
    model.blocks[1].attention.q.weight.data[3:5] = 0
    with pytest.raises(ValueError, match=r"2 rows of blocks\.1\.attention\.q are zero"):
        add_dora(model, 2, 4)
    assert len(model.parameters()) == trained and not adapted_layers(model)
    assert not np.array_equal(logits(model), before)
    with pytest.raises(ValueError, match=r"m must be \(4,\), a number for each row of B, got \(3,"):
        DoRA(LoRA(np.ones((2, 3)), np.ones((4, 2)), 1), np.ones(3))
    with pytest.raises(ValueError, match="has DoRA merged, not LoRA"):
        requantize_lora(merge_lora(stir(add_dora(make("gpt2", "nf4"), 2, 4))))
    with pytest.raises(TypeError, match="x float64, m float32"):
        add_dora(make("gpt2"), 2, 4).blocks[0].attention.q(Tensor(np.ones((1, 16))))
