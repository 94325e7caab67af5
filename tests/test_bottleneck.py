"""minilm.peft.bottleneck: which layers get an adapter, the formula of each form written out, values
and gradients of PyTorch's modules, and what is refused. The laws of all methods are in
test_methods.py."""

import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st
from test_methods import logits, make, stir

from minilm import ops
from minilm.nn import LayerNorm, Linear
from minilm.peft import add_bottleneck, add_lora, use_adapter
from minilm.peft.adapted import adapted_layers
from minilm.peft.bottleneck import NONLINEAR, Bottleneck
from minilm.tensor import Tensor

C, F = 16, {"relu": lambda h: np.maximum(h, 0), "silu": lambda h: h / (1 + np.exp(-h)),
            "gelu": lambda h: ops.gelu(Tensor(h)).data}


def added(adapter, h):
    """Eq. (1) written out."""
    if adapter.norm:
        xhat = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        h = xhat * adapter.norm.weight.data + adapter.norm.bias.data
    middle = F[adapter.activation](h @ adapter.W_down.data.T + adapter.b_down.data)
    return middle @ adapter.W_up.data.T + adapter.b_up.data


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo", "bert"])
@pytest.mark.parametrize("form, skip, norms", [
    ("H", 0, False), ("H", 0, True), ("H", 1, True), ("P", 0, False), ("P", 1, False),
    ("L", 0, False), ("L", 1, False)])
def test_what_is_trained(family, form, skip, norms):
    m, model = 3, add_bottleneck(make(family), 3, form, skip, norms)
    places = {"H": ["attention.o", "mlp.down"], "L": ["mlp.down"],
              "P": ["norm2" if family == "bert" else "mlp.down"]}[form]
    own = {"W_down": (m, C), "b_down": (m,), "W_up": (C, m), "b_up": (C,)}
    own |= {"norm.weight": (C,), "norm.bias": (C,)} if form == "L" else {}
    expected = {f"blocks.{i}.{place}.adapters.default.{end}": shape for i in range(skip, 2)
                for place in places for end, shape in own.items()}
    kinds = ("weight", "bias") if family in ("gpt2", "bert") else ("weight",)
    expected |= {f"blocks.{i}.{norm}.adapters.default.layer.{kind}": (C,) for i in range(skip, 2)
                 for norm in ("norm1", "norm2") for kind in kinds if norms}
    assert {path: p.shape for path, p in model.named_parameters()} == expected


def test_first_numbers():
    model, other = add_bottleneck(make("gpt2"), 40), add_bottleneck(make("gpt2"), 40, seed=1)
    downs = [p.data for path, p in model.named_parameters() if path.endswith("W_down")]
    assert all(not p.data.any() for path, p in model.named_parameters() if "W_down" not in path)
    assert np.std(downs) == pytest.approx(0.01, rel=0.05) and len({d.tobytes() for d in downs}) == 4
    assert not np.array_equal(other.parameters()[0].data, model.parameters()[0].data)


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo", "bert"])
@pytest.mark.parametrize("form", ["H", "P", "L"])
def test_the_formula_in_a_block(family, form):
    """The output of the first block, put together from its parts."""
    model = stir(add_bottleneck(make(family, dtype="float64"), 3, form, activation="silu"))
    plain, block = make(family, dtype="float64").blocks[0], model.blocks[0]
    adapters = {path: m.adapters["default"] for path, m in adapted_layers(block).items()}
    x = np.random.default_rng(0).standard_normal((1, 5, C))
    angles = None
    if family in ("llama", "olmo"):
        angles = [np.ones((5, 4)), np.zeros((5, 4))]  # turned by nothing

    def attend(x):
        a = plain.attention(Tensor(x), None, angles).data
        return a + added(adapters["attention.o"], a) if form == "H" else a

    def mlp(x):
        h = plain.mlp(Tensor(x)).data
        return h + added(adapters["mlp.down"], h) if "mlp.down" in adapters else h

    def norm(n, x): return n(Tensor(x)).data
    if family == "olmo":
        y = x + norm(plain.norm1, attend(x))
        y = y + norm(plain.norm2, mlp(y))
    elif family == "bert":
        y = norm(plain.norm1, x + attend(x))
        s = y + mlp(y)
        y = norm(plain.norm2, s)
        if form == "P":
            y = norm(plain.norm2, s + added(adapters["norm2"], y))
    else:
        y = x + attend(norm(plain.norm1, x))
        y = y + mlp(norm(plain.norm2, y))
    close(block(Tensor(x), None, angles).data, y, "float64")


@given(I=st.integers(1, 5), O=st.integers(1, 5), m=st.integers(1, 4), normed=st.booleans(),
       lead=st.lists(st.integers(1, 3), max_size=3), f=st.sampled_from([*F]),
       seed=st.integers(0, 99))
def test_one_layer(I, O, m, normed, lead, f, seed):
    rng = np.random.default_rng(seed)
    def draw(*shape): return rng.standard_normal(shape)
    norm = LayerNorm(O, 1e-5).astype("float64") if normed else None
    adapter = Bottleneck(draw(m, O), draw(m), draw(O, m), draw(O), f, norm)
    base, x = Linear(I, O, rng, std=1.0).astype("float64"), draw(*lead, I)
    h = x @ base.weight.data.T
    expected = h + added(adapter, h)
    assert adapter.shape == (O, None)
    assert np.abs(adapter(Tensor(x), base).data - expected).max() < 1e-12 * max(
        1, np.abs(expected).max())


@pytest.mark.peers
@pytest.mark.parametrize("form", ["H", "L"])
@pytest.mark.parametrize("f", F)
def test_values_and_gradients_are_pytorchs(form, f):
    """The same as nn.Sequential with a residual connection."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    def draw(*shape): return rng.standard_normal(shape)
    norm = LayerNorm(6, 1e-5).astype("float64") if form == "L" else None
    ours = Bottleneck(draw(4, 6), draw(4), draw(6, 4), draw(6), f, norm)
    base, x, dy = Linear(5, 6, rng, std=1.0).astype("float64"), draw(3, 5), draw(3, 6)
    layers = {"relu": torch.nn.ReLU, "gelu": torch.nn.GELU, "silu": torch.nn.SiLU}
    theirs = torch.nn.Sequential(torch.nn.Linear(6, 4), layers[f](), torch.nn.Linear(4, 6))
    tensors = [ours.W_down, ours.b_down, ours.W_up, ours.b_up]
    if norm:
        theirs.insert(0, torch.nn.LayerNorm(6))
        tensors = [norm.weight, norm.bias, *tensors]
    theirs.double()
    with torch.no_grad():
        for p, t in zip(theirs.parameters(), tensors, strict=True):
            p.copy_(torch.tensor(t.data))
    base.freeze()
    inputs = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    h = torch.nn.functional.linear(inputs[1], torch.tensor(base.weight.data))
    y, expected = ours(inputs[0], base), h + theirs(h)
    close(y.data, expected.detach().numpy(), "float64")
    y.backward(dy)
    expected.backward(torch.tensor(dy))
    for t, p in zip([inputs[0], *tensors], [inputs[1], *theirs.parameters()], strict=True):
        close(t.grad, p.grad.numpy(), "float64")


def test_beside_lora():
    """On one layer, each by its name."""
    model = stir(add_bottleneck(make("gpt2"), 3, name="a"), 1)
    model = stir(add_lora(model, 2, 4, ("o", "down"), name="b"), 2)
    alone = stir(add_lora(make("gpt2"), 2, 4, ("o", "down")), 2)
    assert np.array_equal(logits(model), logits(alone))
    assert np.array_equal(logits(use_adapter(model, "a")),
                          logits(stir(add_bottleneck(make("gpt2"), 3), 1)))


@pytest.mark.parametrize("settings, error, text", [
    (dict(m=0), ValueError, "m must be at least 1, got 0"),
    (dict(m=2.0), TypeError, "m must be a whole number"),
    (dict(form="houlsby"), ValueError, r"form must be one of \('H', 'P', 'L'\), got houlsby"),
    (dict(skip=2), ValueError, "skip must be 0 to 1, got 2"),
    (dict(skip=-1), ValueError, "skip must be 0 to 1, got -1"),
    (dict(form="P", norms=True), ValueError, "norms are trained with form H, got form P"),
    (dict(activation="tanh"), ValueError, r"activation must be one of .* got tanh")])
def test_what_is_refused(settings, error, text):
    model = make("gpt2")
    trained = len(model.parameters())
    with pytest.raises(error, match=text):
        add_bottleneck(model, **{"m": 3} | settings)
    assert len(model.parameters()) == trained and not adapted_layers(model)


def test_arrays_that_do_not_fit():
    one = np.ones
    with pytest.raises(ValueError, match=r"W_down \(2, 4\) goes with b_down \(2,\), W_up \(4, 2\)"):
        Bottleneck(one((2, 4)), one(2), one((2, 4)), one(4))
    with pytest.raises(ValueError, match=r"activation must be one of"):
        Bottleneck(one((2, 4)), one(2), one((4, 2)), one(4), "tanh")
    assert set(NONLINEAR) == set(F)
