"""Checks the open sequence: rows and keys in front of the text, trained, masked, and cached."""

import dataclasses

import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.cache import Buffer, Cache
from minilm.generate import generate
from minilm.tensor import Tensor, no_grad
from minilm.transformer import Config, Transformer

V, P, T = 13, 3, 4
CONFIGS = {
    "gpt2": Config.gpt2(V, P + T, layers=2, heads=2, width=8),
    "llama": Config.llama(V, P + T, 2, heads=4, width=16, hidden=12, kv_heads=2),
}
families = pytest.mark.parametrize("family", CONFIGS)
seeds = st.integers(0, 2**32 - 1)


def make(family):
    """A frozen float64 model with preferences."""
    model, rng = Transformer(CONFIGS[family]).astype("float64"), np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += 0.3 * rng.standard_normal(t.shape)
    return model.freeze()


def draw(seed, B=2):
    """tokens and targets: integers (B, T) each."""
    return np.random.default_rng(seed).integers(0, V, (2, B, T))


def leaves(seed, count, *shape):
    rng = np.random.default_rng(seed)
    return [Tensor(rng.standard_normal(shape), requires_grad=True) for _ in range(count)]


def prefix(family, seed, batch=1):
    """Keys and values to train: (k, v) for each of the two blocks."""
    c = CONFIGS[family]
    k1, v1, k2, v2 = leaves(seed, 4, batch, c.kv_heads, P, c.width // c.heads)
    return [(k1, v1), (k2, v2)]


def slope_is_gradient(loss, parameters, seed):
    """Along a random direction, which moves every number of every parameter."""
    loss().backward()
    rng, h, values = np.random.default_rng(seed), 1e-5, []
    direction = [rng.standard_normal(p.shape) for p in parameters]
    expected = sum((p.grad * d).sum() for p, d in zip(parameters, direction))
    size = np.sqrt(sum((p.grad**2).sum() for p in parameters))
    for step in (h, -2 * h):
        for p, d in zip(parameters, direction):
            p.data = p.data + step * d
        values.append(float(loss().data))
    assert size > 1e-3 and all(p.grad.any() for p in parameters)
    assert abs((values[0] - values[1]) / (2 * h) - expected) < 1e-7 * size


@families
@given(seed=seeds, B=st.integers(1, 3), alone=st.booleans())
def test_a_prefix_of_keys_and_values_trains(family, seed, B, alone):
    """One for the whole batch, whose gradient is the sum over it, or one for each row."""
    model, (tokens, targets) = make(family), draw(seed, B)
    pairs = prefix(family, seed, B if alone else 1)

    def loss(): return ops.cross_entropy(model(tokens, cache=Cache.of(pairs)), targets)
    slope_is_gradient(loss, [x for pair in pairs for x in pair], seed)


@families
@given(seed=seeds)
def test_rows_in_front_of_the_text_train(family, seed):
    model, (tokens, targets) = make(family), draw(seed)
    prompt, = leaves(seed, 1, 2, P, CONFIGS[family].width)

    def loss():
        x = ops.concat(prompt, model.embedded(tokens, start=P), axis=1)
        return ops.cross_entropy(model.head(model.run(x)[:, P:]), targets)
    slope_is_gradient(loss, [prompt], seed)


@families
@given(seed=seeds)
def test_every_token_sees_the_whole_prefix_and_no_later_token(family, seed):
    model, (tokens, _), pairs = make(family), draw(seed), prefix(family, seed)
    tokens[:, 0] = 0

    def logits(row=None, token=0):
        changed = [[Tensor(x.data.copy()) for x in pair] for pair in pairs]
        if row is not None:
            changed[0][1].data[:, :, row] += 1  # of the first block, so that the second sees it too
        again = tokens.copy()
        again[:, 2] = (again[:, 2] + token) % V
        return model(again, cache=Cache.of(changed)).data

    before = logits()
    for row in range(P):
        assert (logits(row) != before).any(-1).all()
    later = logits(token=1)
    assert np.array_equal(later[:, :2], before[:, :2]) and (later[:, 2:] != before[:, 2:]).any()


@families
@given(seed=seeds)
def test_a_prefix_may_be_masked(family, seed):
    """The mask speaks of all keys; a masked prefix, whatever it holds, changes no bit."""
    model, (tokens, _) = make(family), draw(seed)
    mask = np.ones((2, P + T))
    mask[0, :P] = 0
    one, two = (model(tokens, mask, Cache.of(prefix(family, s))).data for s in (seed, seed + 1))
    assert np.array_equal(one[0], two[0]) and (one[1] != two[1]).any(-1).all()
    with pytest.raises(ValueError, match=r"mask \(2, 4\) must have the shape \(2, 7\)"):
        model(tokens, np.ones((2, T)), Cache.of(prefix(family, seed)))


@families
@given(seed=seeds, kind=st.sampled_from(["rows", "buffer", "tensors", "one by one"]))
def test_tokens_in_front_are_what_they_were(family, seed, kind):
    """As rows, or as the keys and values that a run left: positions and masks go on from there."""
    model, whole = make(family), np.random.default_rng(seed).integers(0, V, (2, P + T))
    mask = np.ones(whole.shape)
    mask[1, 1] = 0
    expected = model.hidden(whole, mask).data
    if kind == "rows":
        x = ops.concat(model.embedded(whole[:, :P]), model.embedded(whole[:, P:], P), axis=1)
        close(model.run(x, mask).data, expected, "float64")
        return
    cache = Cache.empty(model)
    with no_grad():
        model.hidden(whole[:, :P], mask[:, :P], cache)
        if kind == "tensors":
            layers = cache.layers
            cache = Cache.of([(Tensor(m.k[:, :, :P]), Tensor(m.v[:, :, :P])) for m in layers])
        step = 1 if kind == "one by one" else T
        for t in range(P, P + T, step):
            assert cache.length == t
            y = model.hidden(whole[:, t : t + step], mask[:, : t + step], cache)
            close(y.data, expected[:, t : t + step], "float64")


def test_what_a_cache_refuses():
    model, tokens = make("gpt2"), draw(0)[0]
    (k, v), second = prefix("gpt2", 0)
    with pytest.raises(ValueError, match=r"one length in all blocks, got \[1, 3\]"):
        Cache.of([(k, v[:, :, :1]), second])
    with pytest.raises(ValueError, match="T must be 1 to 7, the model's context; got 8"):
        cache = Cache.of([(ops.concat(*pair, axis=2)[:, :, :4],) * 2 for pair in ((k, v), second)])
        model(tokens, cache=cache)
    for layers in (1, 3):
        with pytest.raises(ValueError, match=f"a cache of {layers} layers .* with 2 blocks"):
            model(tokens, cache=Cache.of([(k, v)] * layers))
    trained = Transformer(dataclasses.replace(CONFIGS["gpt2"], layers=1))
    with pytest.raises(ValueError, match=r"run the model inside no_grad\(\)"):
        trained(tokens, cache=Cache.empty(trained))
    with no_grad():
        assert trained(tokens, cache=Cache.empty(trained)).shape == (2, T, V)


@pytest.mark.parametrize("inputs, axis, kind, given", [
    ([(2, 3), (2, 4)], 0, ValueError, r"\(2, 4\)"), ([(2, 3), (3,)], 0, ValueError, r"\(3,\)"),
    ([(2, 3), (2, 3)], 2, IndexError, "range"),
])
def test_concat_refuses(inputs, axis, kind, given):
    with pytest.raises(kind, match=given):
        ops.concat(*map(np.ones, inputs), axis=axis)
    with pytest.raises(TypeError, match="input 1 float32"):
        ops.concat(np.ones(2), np.ones(2, np.float32), axis=0)


@families
@pytest.mark.parametrize("first", [1, 2, 5])
def test_room_that_grows_changes_no_bit(family, first, monkeypatch):
    model, tokens = make(family), draw(3)[0]
    def logits():
        cache = Cache.empty(model)
        with no_grad():
            return [model(tokens[:, i : i + 1], cache=cache).data for i in range(T)], cache
    whole, _ = logits()
    monkeypatch.setattr(Buffer, "FIRST", first)
    grown, cache = logits()
    assert np.array_equal(whole, grown)
    assert cache.layers[0].k.shape[2] <= max(first, 2 * T)


@pytest.mark.parametrize("context", [10**12, 10**20])
def test_a_context_that_no_memory_holds_is_not_asked_for(context):
    small = Config.llama(V, 12, 2, heads=4, width=16, hidden=12, kv_heads=2)
    vast = dataclasses.replace(small, context=context)
    near, far = (generate(Transformer(c), [[1, 2]], 8, seed=5) for c in (small, vast))
    assert near.tolist() == far.tolist()


@families
@pytest.mark.parametrize("every", [1, 2])
def test_a_prefix_under_checkpoint(family, every):
    """The same bits; the cache is used up, because no block has kept the text's keys in it."""
    model, (tokens, targets), found = make(family), draw(4), []
    for model.checkpoint_every in (0, every):
        pairs = prefix(family, 4)
        cache = Cache.of(pairs)
        ops.cross_entropy(model(tokens[:, :3], cache=cache), targets[:, :3]).backward()
        found.append([x.grad for pair in pairs for x in pair])
    assert all(np.array_equal(a, b) and a.any() for a, b in zip(*found))
    with pytest.raises(ValueError, match="a cache of 0 layers"):
        model(tokens[:, :1], cache=cache)
