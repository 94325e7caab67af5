"""Outlier features: planting keeps the function; they are where it says, and can be taken away."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.decode import decodes
from minilm.quantize import QuantizedLinear, quantize_int8, quantize_model
from minilm.quantize.outliers import (
    Seen,
    Watched,
    other_features,
    places,
    plant_outliers,
    watched,
    zero_features,
)
from minilm.tensor import Tensor, no_grad
from minilm.transformer import Config, Transformer

CONFIGS = {
    "gpt2": Config.gpt2(17, 8, layers=2, heads=2, width=8),
    "layer norms and gates": Config.gpt2(17, 8, layers=1, heads=2, width=8, activation="swiglu"),
    "post-norm": Config.bert(17, 8, layers=2, heads=2, width=8, hidden=12),
    "llama": Config.llama(17, 8, 2, 4, 16, 24, kv_heads=2, bias=True),
    "wide heads": Config.llama(17, 8, 1, 4, 16, 24, kv_heads=1, bias=("v", "o"), head_width=6),
}
TOKENS = np.random.default_rng(0).integers(0, 17, (3, 8))


def model_of(name, seed=0, dtype=np.float64):
    """A model whose every number counts."""
    model, rng = Transformer(CONFIGS[name], seed), np.random.default_rng(seed)
    for _, t in model.named_tensors():
        t.data += rng.normal(0, 0.3, t.shape).astype(np.float32)
    return model.astype(dtype)


def inputs_of(model, paths):
    """path -> the input (N, I) that the layer there gets."""
    seen = {}

    class Seeing(Watched):
        def forward(self, x):
            seen[self.seen] = x.data.reshape(-1, x.shape[-1]).copy()
            return self.layer(x)

    layers = dict(model.named_modules())
    for path in paths:
        model.replace(path, Seeing(layers[path], path))
    with no_grad():
        model(TOKENS)
    for path in paths:
        model.replace(path, layers[path])
    return seen


@given(st.sampled_from([*CONFIGS]), st.floats(0, 1e4), st.integers(1, 3), st.integers(0, 99))
def test_planted_outliers_keep_the_function(name, size, count, seed):
    before, after = model_of(name, seed), model_of(name, seed)
    plant_outliers(after, size, count, seed)
    with no_grad():
        z, planted = before(TOKENS).data, after(TOKENS).data
    assert abs(planted - z).max() <= 1e-11 * (1 + size) * (1 + abs(z).max())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_in_float32_they_keep_it_to_rounding(name):
    before, after = model_of(name, 1, np.float32), model_of(name, 1, np.float32)
    plant_outliers(after, 100.0)
    with no_grad():
        z, planted = before(TOKENS).data, after(TOKENS).data
    assert planted.dtype == np.float32
    assert abs(planted - z).max() <= 1e-3 * abs(z).max()


@given(st.sampled_from([*CONFIGS]), st.floats(1, 1000), st.integers(1, 3), st.integers(0, 99))
def test_just_these_features_are_larger_by_the_size(name, size, count, seed):
    before, after = model_of(name, seed), model_of(name, seed)
    planted = plant_outliers(after, size, count, seed)
    x, y = inputs_of(before, planted), inputs_of(after, planted)
    for path, features in planted.items():
        expected = np.zeros(x[path].shape[1])
        expected[features] = size
        wrong = abs(y[path] - x[path] - expected).max()
        assert wrong <= 1e-10 * (1 + size) * (1 + abs(x[path]).max())
        assert len({*features.tolist()}) == len(features) and len(features) % count == 0


def test_where_they_can_be_planted():
    def paths(name): return [[p.split(".", 2)[2] for p in place.readers]
                             for place in places(model_of(name))]
    block = [["attention.q", "attention.k", "attention.v"], ["mlp.up"], ["attention.o"]]
    assert paths("gpt2") == 2 * block
    assert paths("layer norms and gates")[1] == ["mlp.gate", "mlp.up"]
    assert paths("llama") == paths("post-norm") == 2 * [["attention.o"]]
    # each of v's numbers comes to the heads of its group: two of four heads, 4 wide
    place, = places(model_of("llama"))[:1]
    assert place.bias.shape == (8,) and place.copies.tolist()[5] == [9, 13]


def test_what_cannot_carry_them_says_so():
    plain = Transformer(Config.llama(17, 8, 2, 4, 16, 24))
    with pytest.raises(ValueError, match="outliers are carried by biases"):
        plant_outliers(plain, 10.0)
    with pytest.raises(ValueError, match="outliers are carried by biases"):
        plant_outliers(quantize_model(model_of("llama", dtype=np.float32), "int8"), 10.0)
    with pytest.raises(ValueError, match="9 outliers do not fit among 8 features"):
        plant_outliers(model_of("gpt2"), 10.0, 9)
    with pytest.raises(ValueError, match="size must be finite"):
        plant_outliers(model_of("gpt2"), np.inf)


@given(st.sampled_from([*CONFIGS]), st.integers(1, 3), st.integers(0, 99))
def test_zeroed_features_are_not_seen(name, count, seed):
    model = model_of(name, seed)
    planted = plant_outliers(model, 50.0, count, seed)
    others = other_features(model, planted, seed)
    layers = dict(model.named_modules())
    for path, features in others.items():
        assert not {*features} & {*planted[path]} and len({*features}) == len(planted[path])
    rng = np.random.default_rng(seed)
    for features in (planted, others):
        zero_features(model, features)
        for path, zeroed in features.items():
            x = rng.normal(size=(4, layers[path].weight.shape[1]))
            y = x.copy()
            y[:, zeroed] = rng.normal(size=(4, len(zeroed)))
            assert (layers[path](Tensor(x)).data == layers[path](Tensor(y)).data).all()


def test_what_is_watched_is_what_is_in_O():
    model = model_of("gpt2", dtype=np.float32)
    planted = plant_outliers(model, 500.0)
    inputs = inputs_of(model, [f"blocks.{i}.{p}" for i in (0, 1) for p in (
        "attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down")])
    quantize_model(model, "llm.int8")
    for _, layer in model.named_modules():
        if hasattr(layer, "threshold"):
            layer.threshold = 100.0  # none of its own is as large
    before = dict(model.named_modules())
    with no_grad(), watched(model) as seen:
        assert decodes(model)  # who watches does not make it slow
        model(TOKENS)
    assert dict(model.named_modules()) == before
    columns = sum(x.shape[1] for x in inputs.values())
    assert seen.features == columns and seen.outliers == sum(map(len, planted.values()))
    assert seen.share == seen.outliers / columns and 400 < seen.largest < 600
    for _, layer in model.named_modules():
        if hasattr(layer, "threshold"):
            layer.threshold = seen.largest * 2
    with no_grad(), watched(model) as none:
        model(TOKENS)
    assert (none.features, none.outliers) == (columns, 0)
    with watched(quantize_model(model_of("gpt2", dtype=np.float32), "int8")) as nothing:
        assert nothing.share == 0


def test_a_feature_of_the_very_threshold_is_an_outlier():
    """As in int8_matmul_outliers."""
    seen, W = Seen(), quantize_int8(np.eye(3), axis=-1)
    Watched(QuantizedLinear(W, threshold=6.0), seen)(Tensor(np.float32([[6, -6, 5.9], [0, 1, 2]])))
    assert (seen.features, seen.outliers, seen.largest) == (3, 2, 6.0)
