"""Layers that are trained whole beside a method: the base acts again without them, they merge and
come off as any adapter does, on any module, plain or quantized, and generation knows them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.generate import generate
from minilm.interop import load_model, save_model
from minilm.interop.peft import load_adapter, save_adapter
from minilm.peft import (
    add_bitfit,
    add_lora,
    merge_lora,
    retrain,
    unload_lora,
    unmerge_lora,
    use_adapter,
)
from minilm.peft.adapted import Adapter, adapted_layers, chosen, insert_adapters, unadapted
from minilm.peft.ia3 import IA3
from minilm.peft.lora import LoRA
from minilm.peft.retrained import Retrained, with_tensors
from minilm.quantize import quantize_model
from minilm.tensor import Tensor
from minilm.transformer import Config, Transformer

TOKENS = np.random.default_rng(5).integers(0, 23, (3, 9))
SMALL = dict(vocab_size=23, context=16, layers=2, heads=2, width=8)
MODELS = {"gpt2": Config.gpt2(**SMALL), "llama": Config.llama(**SMALL, hidden=12, bias=True)}
WHOLE = ("embed", "head", "norm", "blocks.0.norm1", "blocks.1.mlp.up", "blocks.0.attention.q")


def base(name="llama", quantized=False):
    model = Transformer(MODELS[name], seed=3)
    return (quantize_model(model) if quantized else model).eval()


def own(layer, rng, *names):
    """The layer with noise on these tensors, which are trained."""
    def noisy(t): return t.data + rng.normal(0, 0.3, t.shape).astype(t.dtype)
    return with_tensors(layer, **{name: Tensor(noisy(getattr(layer, name)), requires_grad=True)
                                  for name in names})


def retrained(model, whole, biased=(), seed=0):
    """The model with LoRA on k, with whole layers and with biases of its own."""
    rng, bases, adapters = np.random.default_rng(seed), unadapted(model), {}
    for path in whole:
        adapters[path] = Retrained(own(bases[path], rng, "weight"))
    for path in chosen(model, "k"):
        A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 8), (8, 2)))
        adapters[path] = LoRA(A, B, 1)
    for path in biased:
        adapters[path] = Retrained(own(bases[path], rng, "bias"), adapters.get(path))
    return insert_adapters(model, "whole", adapters).eval()


@pytest.mark.parametrize("whole", [["head"], ["embed"], ["head", "embed"]])
def test_merged_and_taken_off_it_is_saved_with_a_head_of_its_own(tmp_path, whole):
    """Before, the error says what to do."""
    model = retrained(base("gpt2"), whole)
    expected = model(TOKENS).data
    with pytest.raises(ValueError, match="save_adapter saves the adapters, or merge_lora and unl"):
        save_model(model, tmp_path / "x")
    save_model(unload_lora(merge_lora(model)), tmp_path)
    assert not load_model(tmp_path).config.tied
    assert np.abs(load_model(tmp_path)(TOKENS).data - expected).max() < 1e-5


@given(name=st.sampled_from([*MODELS]), whole=st.sets(st.sampled_from(WHOLE)),
       biased=st.sets(st.sampled_from(["blocks.0.attention.k", "blocks.0.mlp.down"])))
def test_on_off_merged_and_taken_off(name, whole, biased):
    plain = base(name)(TOKENS).data
    model = retrained(base(name), sorted(whole), sorted(biased))
    changed = model(TOKENS).data
    assert np.abs(changed - plain).max() > 1e-4
    assert np.array_equal(use_adapter(model, None)(TOKENS).data, plain)
    assert not model.parameters()
    assert np.array_equal(use_adapter(model, "whole")(TOKENS).data, changed)
    parts = {path.rpartition(".")[2] for path, _ in model.named_parameters()}
    assert parts == {"A", "B"} | ({"weight"} if whole else set()) | ({"bias"} if biased else set())
    merged = merge_lora(model)(TOKENS).data
    assert np.abs(merged - changed).max() < 1e-5
    assert np.array_equal(unmerge_lora(model)(TOKENS).data, changed)
    assert np.array_equal(unload_lora(merge_lora(model))(TOKENS).data, merged)
    assert not adapted_layers(model) and not model.parameters()


class NoMerge(Adapter):
    pass


def test_what_the_parts_compute():
    """x W'^T + b' + scale x A^T B^T, with the base's W or b if there is no other."""
    model, rng = base(), np.random.default_rng(0)
    layer, x = model.blocks[0].mlp.up, Tensor(rng.standard_normal((4, 8)).astype(np.float32))
    lora = LoRA(*(rng.standard_normal(s).astype(np.float32) for s in ((2, 8), (12, 2))), 3)
    new = own(layer, rng, "bias")
    y = Retrained(new, lora)(x, layer).data
    expected = x.data @ (layer.weight.data + 1.5 * lora.B.data @ lora.A.data).T + new.bias.data
    assert np.abs(y - expected).max() < 1e-5
    assert new.weight is layer.weight and new.bias is not layer.bias
    assert np.array_equal(Retrained(new)(x, layer).data, new(x).data)
    merged = Retrained(new, lora).merged(layer)
    assert np.array_equal(merged.bias.data, new.bias.data) and not merged.bias.requires_grad
    assert Retrained(new, NoMerge()).merged(layer) is None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("whole", [("embed", "head", "norm"), ("blocks.0.norm1",)])
def test_generation_with_a_cache_is_generation_without(name, whole):
    model = retrained(base(name), whole, ["blocks.0.mlp.down"])
    text = generate(model, TOKENS[:1, :3], 8, temperature=0)
    expected = TOKENS[:1, :3]
    for _ in range(8):
        expected = np.append(expected, model(expected).data[:, -1:].argmax(-1), axis=1)
    assert np.array_equal(np.asarray(text).reshape(1, -1)[:, -8:], expected[:, -8:])


def test_on_a_quantized_base(tmp_path):
    """A head in full, biases beside codes; the codes stay as they are, and so do their arrays."""
    model = retrained(base(quantized=True), ["head"], ["blocks.0.attention.k", "blocks.0.mlp.up"])
    layer = adapted_layers(model)["blocks.0.mlp.up"]
    assert layer.adapters["whole"].layer.weight is layer.base.weight
    changed = model(TOKENS).data
    assert np.array_equal(use_adapter(model, None)(TOKENS).data, base(quantized=True)(TOKENS).data)
    merge_lora(use_adapter(model, "whole"))
    assert np.abs(model(TOKENS).data - changed).max() < 1e-4
    unmerge_lora(model)
    with pytest.raises(ValueError, match=r"PEFT trains all biases or .*mlp\.up_proj"):
        save_adapter(model, tmp_path / "x", "whole")
    model = retrained(base(quantized=True), ["head"], [*chosen(base(), "k")])
    save_adapter(model, tmp_path / "a", "whole")
    for skip in ("head", ()):  # also where the head that is trained in full has codes below
        loaded = load_adapter(quantize_model(base(), skip=skip), tmp_path / "a").eval()
        assert np.array_equal(loaded(TOKENS).data, model(TOKENS).data)


def test_adapters_with_and_without_whole_layers_take_turns(tmp_path):
    model = retrained(base(), ["head", "embed"])
    changed = model(TOKENS).data
    save_adapter(model, tmp_path, "whole")
    add_lora(model, 2, 4, ("q", "head"), name="b", seed=1)
    assert np.array_equal(model(TOKENS).data, base()(TOKENS).data)  # B is zero
    assert np.array_equal(use_adapter(model, "whole")(TOKENS).data, changed)
    load_adapter(model, tmp_path, "c")
    assert np.array_equal(model.eval()(TOKENS).data, changed)
    whole = [p for path, p in model.named_parameters() if path.startswith(("head", "embed"))]
    assert sorted(p.shape for p in whole) == [(23, 8), (23, 8)]


def test_shared_tensors_rest_and_wake_once():
    """One A of three layers, as a joined layer has it, keeps its gradient's place."""
    def shared():
        rng, A = np.random.default_rng(0), np.ones((2, 8), np.float32)
        parts = {p: LoRA(A, rng.standard_normal((8, 2)).astype(np.float32), 1)
                 for p in chosen(base("gpt2"), ("q", "k", "v")) if p.startswith("blocks.0")}
        for part in parts.values():
            part.A = next(iter(parts.values())).A
        return insert_adapters(base("gpt2"), "a", parts)

    model = shared()
    add_lora(model, 2, 2, "o", name="b")
    assert {path.rpartition("o.adapters")[1] for path, _ in model.named_parameters()} == {
        "o.adapters"}
    model.astype("float64")
    use_adapter(model, "a")
    assert len(model.parameters()) == 4 and {p.dtype.name for p in model.parameters()} == {
        "float64"}
    ops.cross_entropy(model(TOKENS).reshape(-1, 23), TOKENS.reshape(-1)).backward()
    grad = model.parameters()[0].grad
    apart = shared().astype("float64")
    for layer in adapted_layers(apart).values():
        adapter = layer.adapters["a"]
        adapter.A = Tensor(adapter.A.data.copy(), requires_grad=True)
    ops.cross_entropy(apart(TOKENS).reshape(-1, 23), TOKENS.reshape(-1)).backward()
    parts = [p.grad for path, p in apart.named_parameters() if path.endswith("A")]
    assert len(parts) == 3 and np.abs(grad - sum(parts)).max() < 1e-12 * np.abs(grad).max() + 1e-18


def test_other_methods_want_linear_layers():
    model = retrained(base(), ["norm", "embed"])
    assert "norm" not in chosen(model, "all-linear") and "embed" not in chosen(model, "all-linear")
    for path in ("norm", "embed", "blocks.0", "nowhere"):
        with pytest.raises(ValueError, match="is no linear layer"):
            insert_adapters(model, "x", {path: IA3(np.ones(8, np.float32))})
    with pytest.raises(ValueError, match="is no linear layer"):
        insert_adapters(model, "x", {"nowhere": Retrained(model.norm.base)})


@pytest.mark.parametrize("paths", [["head"], ["embed", "blocks.0.attention.q"], ["norm"], "head"])
def test_layers_that_are_trained_whole_begin_as_they_are(paths):
    model = add_lora(base("gpt2"), 2, 4)
    expected, trained = model(TOKENS).data, {p for p, _ in model.named_parameters()}
    retrain(model, paths)
    assert np.array_equal(model(TOKENS).data, expected)
    new = {p for p, _ in model.named_parameters()} - trained
    first = paths if type(paths) is str else paths[0]
    assert f"{first}.adapters.default.layer.weight" in new
    assert all(".adapters.default." in p for p in new)
    for t in model.parameters():
        t.data += 0.5
    assert np.abs(model(TOKENS).data - expected).max() > 1e-2
    assert np.array_equal(use_adapter(model, None)(TOKENS).data, base("gpt2")(TOKENS).data)


@pytest.mark.parametrize("paths, name, said", [
    (["heads"], "default", "heads is no layer whose weight"), (["blocks.0"], "default", "no layer"),
    (["blocks.0.mlp.up"], "default", "no layer"), (["head"], "other", "no adapter 'other'")])
def test_what_cannot_be_trained_whole(paths, name, said):
    model = add_lora(base(quantized=True), 2, 4)
    before = [p for p, _ in model.named_tensors()]
    with pytest.raises(ValueError, match=said):
        retrain(model, ["norm", *paths], name)
    assert [p for p, _ in model.named_tensors()] == before
    retrain(model, ["head"])
    with pytest.raises(ValueError, match="head is trained whole already"):
        retrain(model, "head")


def test_a_layer_of_bitfits_is_trained_whole():
    """Its bias stays what it has become; the weight joins it, and the base keeps both."""
    model, plain = add_bitfit(base()), base()(TOKENS).data
    for t in model.parameters():
        t.data += 0.5
    expected, biases = model(TOKENS).data, len(model.parameters())
    retrain(model, "blocks.0.mlp.up")
    assert np.array_equal(model(TOKENS).data, expected)
    assert len(model.parameters()) == biases + 1
    layer = adapted_layers(model)["blocks.0.mlp.up"]
    own = layer.adapters["default"].layer
    assert own.weight.requires_grad and own.weight is not layer.base.weight
    assert np.array_equal(own.bias.data, layer.base.bias.data + 0.5)
    with pytest.raises(ValueError, match=r"mlp\.up is trained whole already"):
        retrain(model, ["blocks.0.mlp.up"])
    assert np.array_equal(use_adapter(model, None)(TOKENS).data, plain)
