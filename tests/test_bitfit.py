"""minilm.peft.bitfit and top: exactly the listed tensors are trained, in each family, and what has
none is refused. The laws of all methods are in test_methods.py."""

import numpy as np
import pytest
from test_methods import CONFIGS, SIZES, bits, logits, loss, make, stir

from minilm.nn import LayerNorm, Linear
from minilm.optim import AdamW
from minilm.peft import add_bitfit, add_lora, merge_lora, train_top
from minilm.peft.adapted import adapted_layers
from minilm.quantize import quantize_model
from minilm.shapes import tensor_shapes
from minilm.transformer import Config, Transformer


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_all_biases_and_nothing_else(family, base):
    model = add_bitfit(make(family, base))
    paths = [path.removesuffix(".bias") for path in tensor_shapes(CONFIGS[family])
             if path.endswith(".bias")]
    assert sorted(path for path, _ in model.named_parameters()) == sorted(
        f"{path}.adapters.default.layer.bias" for path in paths)
    assert all(type(m.base) in (LayerNorm, Linear) or base == "nf4"
               for m in adapted_layers(model).values())


def test_merging_is_exact():
    model = stir(add_bitfit(make("gpt2")))
    beside = logits(model)
    assert np.array_equal(logits(merge_lora(model)), beside)


def test_a_family_without_biases():
    config = Config.llama(**SIZES, hidden=24)
    for base in ("plain", "nf4"):
        model = Transformer(config)
        model = model if base == "plain" else quantize_model(model)
        trained = len(model.parameters())
        with pytest.raises(ValueError, match=r"has one \(Embedding, .*, RMSNorm\); GPT-2"):
            add_bitfit(model)
        assert len(model.parameters()) == trained and not adapted_layers(model)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("k", [1, 2])
def test_the_top_is_trained_and_nothing_else(family, k):
    model = make(family)
    before = {path: a.copy() for path, a in model.state_dict().items()}
    assert train_top(model, k) is model
    expected = {path for path in before if path.startswith(
        ("norm.", *(f"blocks.{i}." for i in range(2 - k, 2))))}
    assert {path for path, _ in model.named_parameters()} == expected
    optimizer = AdamW(model.parameters(), lr=0.01)
    first = loss(model)
    first.backward()
    optimizer.step()
    assert float(loss(model).data) < float(first.data)
    moved = {path for path, a in model.state_dict().items() if not np.array_equal(a, before[path])}
    assert moved == expected


def test_what_lies_below_may_be_quantized():
    model = quantize_model(make("gpt2"), skip=("head", "blocks.1"))
    paths = {path for path, _ in train_top(model, 1).named_parameters()}
    assert {path.split(".")[0] for path in paths} == {"blocks", "norm"}
    loss(model).backward()
    assert all(np.abs(p.grad).max() > 0 for p in model.parameters())


@pytest.mark.parametrize("change, k, error, text", [
    (lambda m: m, 0, ValueError, "k must be 1 to 2, got 0"),
    (lambda m: m, 3, ValueError, "k must be 1 to 2, got 3"),
    (lambda m: m, True, TypeError, "k must be a whole number"),
    (quantize_model, 1, ValueError, r"blocks\.1\.attention\.q is quantized.*skip=\('head', 'bl"),
    (lambda m: add_lora(m, 2, 4), 1, ValueError, r"blocks\.0\.attention\.q has adapters")])
def test_what_is_refused(change, k, error, text):
    model = change(make("gpt2"))
    before, trained = bits(model), [path for path, _ in model.named_parameters()]
    with pytest.raises(error, match=text):
        train_top(model, k)
    assert bits(model) == before
    assert [path for path, _ in model.named_parameters()] == trained
