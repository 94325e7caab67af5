"""minilm.peft.subspace and optim.inside: the transform and P against their matrices, the laws of a
projection, and training inside: the gradient, AdamW written out, workers, and what is refused."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_methods import CONFIGS, TARGETS, TOKENS, all_of, bits, logits, loss, make, t5

from minilm import ops
from minilm.generate import generate
from minilm.optim.adamw import plain_adamw
from minilm.optim.inside import Inside
from minilm.peft import (
    add_lora,
    add_subspace,
    degrees_of_freedom,
    merge_lora,
    subspace_of,
    unload_lora,
    use_adapter,
)
from minilm.peft.subspace import Dense, Fastfood, power_of_2, walsh_hadamard
from minilm.quantize import quantize_model
from minilm.shapes import tensor_shapes
from minilm.tensor import Tensor, no_grad
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

WIDE = np.zeros(1)  # P in float64, as this
families = pytest.mark.parametrize("family", CONFIGS)
kinds = pytest.mark.parametrize("kind", [
    dict(projection=projection, said=said) for projection in ("fastfood", "dense")
    for said in (False, True)], ids=str)
sizes = st.integers(1, 64).flatmap(lambda D: st.tuples(st.just(D), st.integers(1, D)))
seeds = st.integers(0, 2**32 - 1)


def sylvester(n):
    return np.ones((1, 1)) if n == 1 else np.kron([[1, 1], [1, -1]], sylvester(n // 2))


def inside(model, d=20, **settings):
    """(the model, its Subspace)."""
    return add_subspace(model, d, **settings), subspace_of(model)


def stirred(family="gpt2", dtype="float32", d=20, **settings):
    """The same away from theta = 0."""
    model, subspace = inside(make(family, dtype=dtype), d, **settings)
    subspace.theta += np.random.default_rng(4).standard_normal(d)
    subspace.place()
    return model, subspace


# The transform and P


@given(l=st.integers(0, 7), seed=seeds)
def test_the_transform_is_sylvesters_matrix(l, seed):
    x = np.random.default_rng(seed).integers(-99, 99, 1 << l).astype(float)
    before = x.copy()
    assert np.array_equal(walsh_hadamard(x), sylvester(1 << l) @ x)
    assert np.array_equal(walsh_hadamard(walsh_hadamard(x)), x * 2**l)  # H H = 2^l I
    assert np.array_equal(x, before)


@pytest.mark.parametrize("n", [0, 3, 12])
def test_another_length_has_no_transform(n):
    with pytest.raises(ValueError, match=rf"of 2\^l numbers, got {n}"):
        walsh_hadamard(np.zeros(n))


@given(sizes=sizes, seed=seeds)
def test_fastfood_is_its_formula(sizes, seed):
    (D, d), n = sizes, power_of_2(sizes[0])
    P = Fastfood(D, d, seed, WIDE)
    H, Pi = sylvester(n), np.eye(n)[np.argsort(P.back)]
    signs = np.diag(np.concatenate([P.B, np.ones(n - d)]))
    matrix = H @ np.diag(P.G) @ Pi @ H @ signs
    assert np.allclose(np.linalg.norm(matrix, axis=0), 1, rtol=1e-12)
    assert {*np.abs(P.B)} == {1.0} and sorted(P.back) == [*range(n)]
    found = np.array([P.up(e) for e in np.eye(d)]).T
    assert np.abs(found - matrix[:D, :d]).max() < 1e-12


@given(sizes=sizes, seed=seeds)
def test_a_dense_p_has_unit_columns(sizes, seed):
    P = Dense(*sizes, seed, WIDE)
    assert P.P.shape == sizes and np.allclose(np.linalg.norm(P.P, axis=0), 1, rtol=1e-12)
    assert np.allclose([P.up(e) for e in np.eye(sizes[1])], P.P.T, rtol=1e-12)


@pytest.mark.parametrize("kind", [Fastfood, Dense])
@given(sizes=sizes, seed=seeds)
def test_down_is_the_transpose_of_up(kind, sizes, seed):
    """<P x, y> = <x, P^T y>; and the seed decides P."""
    (D, d), rng = sizes, np.random.default_rng(seed)
    P, x, y = kind(D, d, seed, WIDE), rng.standard_normal(sizes[1]), rng.standard_normal(sizes[0])
    assert P.up(x).shape == (D,) and P.down(y).shape == (d,)
    assert P.up(x) @ y == pytest.approx(x @ P.down(y), rel=1e-9, abs=1e-9)
    assert np.array_equal(kind(D, d, seed, WIDE).up(x), P.up(x))
    assert D == 1 or not np.array_equal(kind(D, d, seed + 1, WIDE).up(x), P.up(x))


# The model


@families
@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_starts_as_the_model_and_the_base_stays(family, kind, dtype):
    model = make(family, dtype=dtype)
    before, own = logits(model), bits(model)
    model, subspace = inside(model, **kind)
    assert np.array_equal(logits(model), before)
    total = sum(np.prod(shape) for shape in tensor_shapes(CONFIGS[family]).values())
    assert subspace.D == sum(p.size for p in model.parameters()) == total
    assert degrees_of_freedom(model) == subspace.theta.size == 20
    subspace.theta += np.random.default_rng(0).standard_normal(20)
    subspace.place()
    after = logits(model)
    assert np.abs(after - before).max() > 0.01
    assert np.array_equal(logits(use_adapter(model, None)), before) and subspace_of(model) is None
    use_adapter(model, "default")
    assert np.array_equal(logits(merge_lora(model)), after)
    assert np.array_equal(logits(unload_lora(model)), after)
    base = make(family, dtype=dtype)
    assert bits(base) == own and model.state_dict().keys() == base.state_dict().keys()


@families
def test_the_point_is_the_formula(family):
    """Eq. (1) and (2), a layer at a time."""
    for said in (False, True):
        _, s = stirred(family, "float64", d=25, said=said, projection="dense")
        theta, at = s.P.P @ s.theta[: 25 - s.m], 0
        flat = np.concatenate([(new.data - old.data).ravel()
                               for new, old in zip(s.moved, s.still)])
        for i, (layer, size) in enumerate(s.layers.items()):
            part = theta[at : at + size] * (s.theta[25 - s.m + i] if said else 1)
            assert np.abs(flat[at : at + size] - part).max() < 1e-12, layer
            at += size
        assert at == s.D


def test_layers_are_blocks_and_what_is_beside_them():
    names = {family: [*inside(make(family))[1].layers] for family in CONFIGS}
    blocks = ["blocks.0", "blocks.1"]
    assert names["gpt2"] == ["embed", "position", *blocks, "norm"]  # the head is the embedding
    assert names["llama"] == ["embed", *blocks, "norm", "head"]
    assert names["bert"] == ["embed", "position", "segment", "embed_norm", *blocks, "head"]


@families
def test_a_tied_head_stays_tied(family):
    model, _ = stirred(family)
    head = getattr(model.head, "out", model.head) if model.config.shared else None
    if head:
        own, embed = (m.adapters["default"].layer.weight for m in (head, model.embed))
        assert own is embed and own is not model.embed.base.weight


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo"])
def test_generation_with_a_cache_is_generation_without(family):
    model, _ = stirred(family)
    ids = generate(model, TOKENS[:1, :3], 6, temperature=0)
    for n in range(3, 9):
        assert ids[0, n] == model(ids[:, :n]).data[0, -1].argmax()


def test_two_of_them_take_turns():
    def alone(seed): return stirred(seed=seed)[0]
    model, second = inside(alone(1), seed=2, name="b")
    second.theta += np.random.default_rng(4).standard_normal(20)
    second.place()
    assert np.array_equal(logits(model), logits(alone(2))) and subspace_of(model) is second
    assert np.array_equal(logits(use_adapter(model, "default")), logits(alone(1)))
    assert subspace_of(model).seed == 1 and subspace_of(model, "b") is second


# Training


@kinds
def test_the_gradient_is_that_of_finite_differences(kind):
    model, subspace = stirred(dtype="float64", **kind)
    loss(model).backward()
    slope, theta, h = subspace.gradient(), subspace.theta.copy(), 1e-6
    for i in (0, 7, 19):
        values = []
        for sign in (1, -1):
            subspace.theta[...] = theta + sign * h * np.eye(20)[i]
            subspace.place()
            values.append(float(loss(model).data))
        assert slope[i] == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5, abs=1e-8)


def test_all_directions_are_full_training():
    """If d = D and P is orthogonal, P P^T g = g: plain SGD takes the same steps."""
    def model(): return Transformer(Config.gpt2(5, 4, layers=1, heads=2, width=4)).astype("float64")
    def slope(m):
        for p in m.parameters():
            p.grad = None
        ops.cross_entropy(m(TOKENS[:, :4] % 5), TARGETS[:, :4] % 5).backward()
    full, D = model(), sum(p.size for p in model().parameters())
    inner, s = inside(model(), D, projection="dense")
    s.P.P = np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0]
    first = logits_of(full)
    for _ in range(5):
        for m in (full, inner):
            slope(m)
        for p in full.parameters():
            p.data -= 0.5 * p.grad
        s.theta -= 0.5 * s.gradient()
        s.place()
        assert np.abs(logits_of(inner) - logits_of(full)).max() < 1e-12
    assert np.abs(logits_of(full) - first).max() > 0.01


def logits_of(model):
    with no_grad():
        return model(TOKENS[:, :4] % 5).data


@pytest.mark.parametrize("dtype, accuracy", [("float64", 1e-12), ("bfloat16", 0)])
def test_a_step_is_adamws_on_theta(dtype, accuracy):
    """Written out with the dense P; 16-bit weights are the point, rounded."""
    model, s = inside(make("gpt2", dtype=dtype), projection="dense")
    optimizer = Inside(s, model.parameters(), lr=0.1)
    theta, m, v = (np.zeros(20, s.theta.dtype) for _ in range(3))
    for t in range(1, 4):
        optimizer.zero_grad()
        loss(model).backward()
        g = np.concatenate([np.asarray(p.grad, theta.dtype).ravel() for p in s.moved])
        theta, m, v = plain_adamw(theta, s.P.down(0.5 * g), m, v, t, 0.1, 0.9, 0.999, 1e-8, 0.0)
        optimizer.step(0.5)
        assert np.abs(s.theta - theta).max() < (accuracy or 1e-5)
        point = s.up()
        still = np.concatenate([np.asarray(p.data, theta.dtype).ravel() for p in s.still])
        found = np.concatenate([p.data.ravel() for p in s.moved])
        assert np.array_equal(found, (still + point).astype(found.dtype))
        assert np.array_equal(np.concatenate([a.ravel() for a in optimizer.masters]), still + point)


def test_it_learns_and_the_base_does_not():
    model, s = inside(make("gpt2"), 60)
    own = bits(model)
    optimizer = Inside(s, model.parameters(), lr=0.2)
    with Trainer(model, optimizer) as trainer:
        losses = [trainer.step(i, (TOKENS, TARGETS)).loss for i in range(20)]
    assert losses[-1] < losses[0] - 0.2 and bits(model) == own


@kinds
def test_workers_share_the_gradient_alone(kind):
    found = []
    for workers in (1, 2):
        model, s = inside(make("gpt2", dtype="float64"), **kind)
        optimizer = Inside(s, model.parameters(), lr=0.1)
        with Trainer(model, optimizer, workers) as trainer:
            for i in range(3):
                trainer.step(i, (TOKENS, TARGETS), clip=0.5)
        found.append(s.theta)
    assert np.abs(found[0] - found[1]).max() < 1e-9 < np.abs(found[0]).max()


@kinds
def test_states_go_on_bit_for_bit(kind):
    def trained(steps, states=None, data=None):
        model, s = inside(make("llama"), **kind)
        optimizer = Inside(s, model.parameters(), lr=0.1)
        if states:
            optimizer.flat.data[...] = data
            optimizer.put_back({name: a.copy() for name, a in states.items()})
            optimizer.steps = 2
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        return optimizer
    half, whole = trained(2), trained(5)
    again = trained(3, half.states(), half.flat.data)
    assert {*whole.states()} == {"m", "v", "theta"}
    assert all(np.array_equal(a, again.states()[n]) for n, a in whole.states().items())
    assert np.array_equal(whole.flat.data, again.flat.data)


# What is refused


@pytest.mark.parametrize("model, settings, error, text", [
    (partial(make, "gpt2"), dict(d=0), ValueError, "d must be at least 1, got 0"),
    (partial(make, "gpt2"), dict(d=7089), ValueError, "d must be 1 to 7,088; got 7089"),
    (partial(make, "gpt2"), dict(d=5, said=True), ValueError,
     "d must be 6 to 7,088, of which 5 scale a layer each; got 5"),
    (partial(make, "gpt2"), dict(d=2.0), TypeError, "d must be a whole number"),
    (partial(make, "gpt2"), dict(seed=-1), ValueError, "seed must be at least 0"),
    (partial(make, "gpt2"), dict(projection="sparse"), ValueError, "projection must be one of"),
    (partial(make, "gpt2", "nf4"), {}, ValueError, "is quantized, and a subspace moves every wei"),
    (partial(make, "gpt2", "int8"), {}, ValueError, "is quantized, and a subspace moves every we"),
    (lambda: quantize_model(make("gpt2"), skip=("head", "blocks.0")), {}, ValueError,
     r"blocks\.1\.attention\.q is quantized"),
    (lambda: add_lora(make("gpt2"), 2, 4), {}, ValueError, "already has an adapter 'default'"),
    (lambda: merge_lora(add_lora(make("gpt2"), 2, 4)), dict(name="b"), ValueError, "before adding"),
    (t5, {}, TypeError, "is for a Transformer, not for EncoderDecoder")])
def test_what_is_refused_leaves_the_model_as_it_was(model, settings, error, text):
    model = model()
    before = all_of(model)
    with pytest.raises(error, match=text):
        add_subspace(model, **dict(d=10) | settings)
    assert all_of(model) == before


def test_a_dense_p_that_is_too_large(monkeypatch):
    monkeypatch.setattr("minilm.peft.subspace.LARGEST", 70_000)
    with pytest.raises(ValueError, match="a dense P would have 7,088 x 10 numbers: take fastfood"):
        add_subspace(make("gpt2"), 10, projection="dense")


def test_nothing_else_is_trained_beside_it():
    model, s = inside(make("gpt2"))
    other = Tensor(np.zeros(3, np.float32), requires_grad=True)
    for params in (model.parameters() + [other], model.parameters()[1:]):
        with pytest.raises(ValueError, match="beside them nothing else is trained"):
            Inside(s, params)
