"""minilm.peft.ia3: ones change nothing, the formula of section 3.3, gradients against finite
differences, merging into rows and columns, codes as a base, and what is refused. PEFT's files are
in test_interop_peft.py."""

import math

import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.nn import Linear
from minilm.optim import AdamW
from minilm.peft import add_ia3, add_lora, merge_lora, unload_lora, unmerge_lora, use_adapter
from minilm.peft.adapted import adapted_layers
from minilm.peft.ia3 import IA3
from minilm.quantize import quantize_model
from minilm.tensor import Tensor, no_grad
from minilm.transformer import Config, Transformer

V, LAYERS, SIZES = 19, 2, dict(vocab_size=19, context=12, layers=2, heads=2, width=16)
CONFIGS = {"gpt2": Config.gpt2(**SIZES), "bert": Config.bert(**SIZES, hidden=24),
           "llama": Config.llama(**SIZES, hidden=24, kv_heads=1)}
families = pytest.mark.parametrize("family", CONFIGS)
bases = pytest.mark.parametrize("base", ["plain", "nf4", "int8"])
TOKENS, TARGETS = np.random.default_rng(2).integers(0, V, (2, 3, 7))


def make(family, base="plain", dtype="float32"):
    """A tiny model; noise moves every parameter from its first value."""
    model, rng = Transformer(CONFIGS[family]), np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += 0.3 * rng.standard_normal(t.shape, dtype=np.float32)
    model.astype(dtype)
    return (model if base == "plain" else quantize_model(model, base)).eval()


def stir(model, seed=0):
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.data += (0.5 * rng.standard_normal(p.shape)).astype(p.dtype)
    return model


def logits(model):
    with no_grad():
        return model(TOKENS).data


@families
@bases
def test_ones_change_no_bit(family, base):
    model = make(family, base)
    before = logits(model)
    assert add_ia3(model) is model
    assert np.array_equal(logits(model), before)
    assert np.array_equal(logits(merge_lora(model)), before)


@families
def test_what_is_trained(family):
    """(I,) where the input is scaled, else (O,): d_k + d_v + d_ff numbers a block, no others."""
    c, model = CONFIGS[family], add_ia3(make(family))
    kv = c.width // c.heads * c.kv_heads
    shapes = {"attention.k": kv, "attention.v": kv, "mlp.down": c.hidden}
    assert {path: p.shape for path, p in model.named_parameters()} == {
        f"blocks.{i}.{path}.adapters.default.l": (n,)
        for i in range(LAYERS) for path, n in shapes.items()}
    assert all((p.data == 1).all() for p in model.parameters())


def test_the_formula():
    """Section 3.3 written out, on the first block of a pre-norm model with learned positions."""
    model = stir(add_ia3(make("gpt2", dtype="float64")))
    block = model.blocks[0]
    m, mlp, (C, H) = block.attention, block.mlp, (16, 2)
    x = np.random.default_rng(0).standard_normal((5, C))
    l_k, l_v, l_ff = (m.adapters["default"].l.data for m in (m.k, m.v, mlp.down))

    def layer(module, x):
        module = getattr(module, "base", module)
        return x @ module.weight.data.T + module.bias.data
    Q, K, V = layer(m.q, x), l_k * layer(m.k, x), l_v * layer(m.v, x)
    heads = []
    for q, k, v in zip(*(np.split(a, H, -1) for a in (Q, K, V))):
        S = np.where(np.tri(5), q @ k.T / math.sqrt(C / H), -np.inf)
        P = np.exp(S - S.max(-1, keepdims=True))
        heads.append(P / P.sum(-1, keepdims=True) @ v)
    close(m(Tensor(x[None])).data[0], layer(m.o, np.concatenate(heads, -1)), "float64")
    inner = ops.gelu(Tensor(layer(mlp.up, x)), approximate="tanh").data
    close(mlp(Tensor(x)).data, layer(mlp.down, l_ff * inner), "float64")


@families
@bases
def test_gradients_are_those_of_finite_differences(family, base):
    """Along a random direction in all vectors together."""
    model = stir(add_ia3(make(family, base, "float64")))
    def loss(): return ops.cross_entropy(model(TOKENS), TARGETS)
    loss().backward()
    rng, h, slope = np.random.default_rng(3), 1e-6, 0.0
    directions = [rng.standard_normal(p.shape) for p in model.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), directions))
    values = []
    for sign in (1, -1):
        for p, d in zip(model.parameters(), directions):
            p.data += sign * h * d
        values.append(float(loss().data))
        for p, d in zip(model.parameters(), directions):
            p.data -= sign * h * d
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


@families
@bases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_and_taken_back(family, base, dtype):
    model = stir(add_ia3(make(family, base, dtype), "all-linear", ("o", "down")))
    apart = logits(model)
    merge_lora(model)
    for layer in adapted_layers(model).values():
        adapter, plain = layer.adapters["default"], layer.base.plain()
        W, l = plain.weight.data, adapter.l.data
        expected = W * l if adapter.feedforward else (W.T * l).T
        assert type(layer.merged) is Linear
        assert np.array_equal(layer.merged.weight.data, expected.astype(dtype))
        if plain.bias is not None:
            b = plain.bias.data
            assert np.array_equal(layer.merged.bias.data, b if adapter.feedforward else b * l)
        assert (layer.merged.bias is None) == (plain.bias is None)
        x = Tensor(np.random.default_rng(0).standard_normal((9, W.shape[1])).astype(dtype))
        close(layer.merged(x).data, adapter(x, layer.base).data, dtype)
    assert {t.dtype.name for path, t in model.named_tensors() if ".merged." in path} == {dtype}
    if dtype == "float32":  # in 16 bits the roundings of all layers add up
        close(logits(model), apart, dtype)
    assert np.array_equal(logits(unmerge_lora(model)), apart)
    merged = logits(merge_lora(model))
    assert np.array_equal(logits(unload_lora(model)), merged)


@given(I=st.integers(1, 5), O=st.integers(1, 5), feedforward=st.booleans(), bias=st.booleans(),
       lead=st.lists(st.integers(1, 3), max_size=3), seed=st.integers(0, 99))
def test_one_layer(I, O, feedforward, bias, lead, seed):
    """l * (W x + b) or W (l * x) + b, apart and merged, for any shape."""
    rng = np.random.default_rng(seed)
    base = Linear(I, O, rng, bias, std=1.0).astype("float64")
    l, x = rng.standard_normal(I if feedforward else O), rng.standard_normal((*lead, I))
    W, b = base.weight.data, rng.standard_normal(O) if bias else 0
    if bias:
        base.bias.data[...] = b
    adapter = IA3(l, feedforward)
    expected = (x * l) @ W.T + b if feedforward else (x @ W.T + b) * l
    size = max(1.0, np.abs(expected).max())
    assert adapter.shape == ((None, I) if feedforward else (O, None))
    assert np.abs(adapter(Tensor(x), base).data - expected).max() < 1e-13 * size
    assert np.abs(adapter.merged(base)(Tensor(x)).data - expected).max() < 1e-13 * size


def test_it_learns_and_the_base_does_not_move():
    model = add_ia3(make("llama", "nf4"))
    frozen = {k: a.copy() for k, a in model.state_dict().items() if ".adapters." not in k}
    optimizer, losses = AdamW(model.parameters(), lr=0.1), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = ops.cross_entropy(model(TOKENS), TARGETS)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.data))
    assert losses[-1] < losses[0] - 0.3
    assert all((p.data != 1).all() for p in model.parameters())
    state = model.state_dict()
    assert all(np.array_equal(state[k], a) for k, a in frozen.items())


def test_beside_lora():
    """Two methods in one model: each alone is what it is without the other."""
    model = stir(add_lora(stir(add_ia3(make("gpt2"), name="a"), 1), 2, 4, ("k", "up"), name="b"), 2)
    alone = stir(add_ia3(make("gpt2")), 1)
    assert np.array_equal(logits(use_adapter(model, "a")), logits(alone))
    merged = logits(merge_lora(model))
    assert np.array_equal(merged, logits(merge_lora(alone)))
    other = stir(add_lora(make("gpt2"), 2, 4, ("k", "up")), 2)
    assert np.array_equal(logits(use_adapter(unmerge_lora(model), "b")), logits(other))


@pytest.mark.parametrize("settings, text", [
    (dict(targets="w"), r"\['w'\] match no layer"), (dict(targets=()), "match no layer"),
    (dict(feedforward=("o", "down")), r"feedforward \['o'\] names none of the targets"),
    (dict(targets=("k", "v")), r"feedforward \['down'\] names none"),
    (dict(name="a.b"), "word without dots"), (dict(name="first"), "already")])
def test_what_is_refused(settings, text):
    model = stir(add_lora(make("gpt2"), 2, 4, name="first"))
    before, trained = logits(model), [path for path, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=text):
        add_ia3(model, **settings)
    assert np.array_equal(logits(model), before)
    assert [path for path, _ in model.named_parameters()] == trained


def test_vectors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"l must be a vector, got \(2, 3\)"):
        IA3(np.ones((2, 3)))
    model = add_ia3(make("gpt2"))
    with pytest.raises(TypeError, match="x float64, l float32"):
        model.blocks[0].mlp.down(Tensor(np.ones((1, 64))))
