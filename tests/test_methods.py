"""The laws that all methods of adaptation keep, on each family and on plain and quantized bases:
they start as the model, leave its weights as they are, merge into the same function or say that
they cannot, and their gradients are those of finite differences. Each formula has a file apart."""

from functools import partial

import numpy as np
import pytest

from minilm import ops
from minilm.generate import generate
from minilm.optim import AdamW
from minilm.peft import (
    Budget,
    add_adalora,
    add_bitfit,
    add_bottleneck,
    add_dora,
    add_ia3,
    add_lora,
    add_prefix,
    add_prompt,
    merge_lora,
    requantize_lora,
    retrain,
    settle_prefix,
    train_top,
    unload_lora,
    unmerge_lora,
    use_adapter,
)
from minilm.peft.adapted import adapted_layers
from minilm.peft.dora import DoRA
from minilm.quantize import quantize_model
from minilm.seq2seq import T5, EncoderDecoder
from minilm.tensor import no_grad
from minilm.transformer import Config, Transformer

V, SIZES = 19, dict(vocab_size=19, context=12, layers=2, heads=2, width=16)
CONFIGS = {
    "gpt2": Config.gpt2(**SIZES),
    "llama": Config.llama(**SIZES, hidden=24, kv_heads=1, bias=("q", "k", "v")),
    "olmo": Config.llama(**SIZES, hidden=24, norm_output=True, qk_norm="width", bias=("down",)),
    "bert": Config.bert(**SIZES, hidden=24),
}
METHODS = {
    "H": partial(add_bottleneck, m=3, norms=True), "P": partial(add_bottleneck, m=3, form="P"),
    "L": partial(add_bottleneck, m=3, form="L", activation="gelu"),
    "D": partial(add_bottleneck, m=3, form="P", skip=1, activation="silu"),
    "bitfit": add_bitfit,
    "dora": partial(add_dora, r=2, alpha=4, targets=("q", "o", "down")),
    "adalora": partial(add_adalora, r=3, alpha=6),
}
MERGES = {"bitfit", "dora", "adalora"}
FIXED = {"dora": (DoRA, "norm")}  # (class, method): what a gradient takes as a constant
methods = pytest.mark.parametrize("method", METHODS)
families = pytest.mark.parametrize("family", CONFIGS)
bases = pytest.mark.parametrize("base", ["plain", "nf4", "int8", "llm.int8"])
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
        p.data += (0.2 * rng.standard_normal(p.shape)).astype(p.dtype)
    return model


def logits(model):
    with no_grad():
        return model(TOKENS).data


def loss(model):
    return ops.cross_entropy(model(TOKENS), TARGETS)


def bits(model):
    """The model's own tensors, without those of adapters."""
    return {path.replace(".base", ""): a.tobytes() for path, a in model.state_dict().items()
            if ".adapters." not in path}


@methods
@families
@bases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_starts_as_the_model(method, family, base, dtype):
    model = make(family, base, dtype)
    before = logits(model)
    assert METHODS[method](model) is model
    assert np.array_equal(logits(model), before)
    assert {p.dtype.name for p in model.parameters()} == {dtype}


@methods
@families
@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_it_learns_and_the_base_does_not_move(method, family, base):
    model = make(family, base)
    before, plain = bits(model), logits(model)
    METHODS[method](model)
    optimizer, losses = AdamW(model.parameters(), lr=0.03), []
    for _ in range(12):
        optimizer.zero_grad()
        L = loss(model)
        L.backward()
        optimizer.step()
        losses.append(float(L.data))
    assert losses[-1] < losses[0] - 0.03
    after = bits(model)
    assert after == before
    tuned = logits(model)
    assert np.array_equal(logits(use_adapter(model, None)), plain) and not model.parameters()
    assert np.array_equal(logits(use_adapter(model, "default")), tuned)
    assert np.array_equal(logits(unload_lora(model)), plain)
    assert bits(model) == before and not adapted_layers(model)


@methods
@families
@bases
def test_merged_is_beside_or_refused(method, family, base):
    """LLM.int8() is left out of the comparison: merged weights are multiplied in full."""
    model = stir(METHODS[method](make(family, base)))
    beside = logits(model)
    if method not in MERGES:
        with pytest.raises(ValueError, match=r"cannot be merged"):
            merge_lora(model)
        assert not any(m.merged for m in adapted_layers(model).values())
        assert np.array_equal(logits(model), beside)
        return
    merged = logits(merge_lora(model))
    if base != "llm.int8":
        assert np.abs(merged - beside).max() < 2e-5 * np.abs(beside).max()
    assert np.array_equal(logits(unmerge_lora(model)), beside)
    assert np.array_equal(logits(unload_lora(merge_lora(model))), merged)


@methods
@families
@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_gradients_are_those_of_finite_differences(method, family, base, monkeypatch):
    """Along a random direction in all trained tensors together."""
    model = stir(METHODS[method](make(family, base, "float64")))
    if method in FIXED:
        kind, name = FIXED[method]
        fixed, real = {}, getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda a, b: fixed.setdefault(id(a), real(a, b)))
    loss(model).backward()
    rng, h = np.random.default_rng(3), 1e-6
    directions = [rng.standard_normal(p.shape) for p in model.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), directions))
    values = []
    for sign in (1, -2):
        for p, d in zip(model.parameters(), directions):
            p.data += sign * h * d
        values.append(float(loss(model).data))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


@methods
@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo"])
def test_generation_with_a_cache_is_generation_without(method, family):
    model = stir(METHODS[method](make(family)))
    ids = generate(model, TOKENS[:1, :3], 6, temperature=0)
    for n in range(3, 9):
        assert ids[0, n] == model(ids[:, :n]).data[0, -1].argmax()


@methods
def test_two_of_a_kind_take_turns(method):
    """Each alone is what it is without the other."""
    def alone(seed): return stir(METHODS[method](make("gpt2")), seed)
    model = stir(METHODS[method](alone(1), name="b"), 2)
    assert np.array_equal(logits(model), logits(alone(2)))
    assert np.array_equal(logits(use_adapter(model, "default")), logits(alone(1)))


def all_of(model):
    """What must not change if something is refused: tensors, modules, and what acts."""
    tensors = {p: (t.data.tobytes(), t.requires_grad) for p, t in model.named_tensors()}
    slots = {p: (m.active, m.merged) for p, m in adapted_layers(model).items()}
    return tensors, {p: id(m) for p, m in model.named_modules()}, slots, model.training


lora, adalora = partial(add_lora, r=2, alpha=4), partial(add_adalora, r=2, alpha=4)
EVERY = METHODS | {"lora": lora, "ia3": add_ia3, "prompt": partial(add_prompt, length=3),
                   "prefix": partial(add_prefix, length=3), "top": partial(train_top, k=1)}


@pytest.mark.parametrize("first", [*METHODS, "lora", "ia3", "prompt", "prefix"])
def test_two_methods_cannot_have_one_name(first):
    """Unless one is in front of the text and the other is not: they act together. top trains the
    model's own tensors, and takes no adapters beside it."""
    front = {"prompt", "prefix"}
    for second, add in EVERY.items():
        model = EVERY[first](make("gpt2"))
        if (first in front) != (second in front) and second != "top":
            assert np.isfinite(logits(add(model))).all()
            continue
        before = all_of(model)
        with pytest.raises(ValueError, match="has adapters" if second == "top" else "already has"):
            add(model)
        assert all_of(model) == before


def t5():
    return EncoderDecoder(T5(vocab_size=V, layers=1, decoder_layers=1, heads=2, width=16, hidden=24,
                             head_width=8))


def merged(add, base="plain"):
    return lambda: merge_lora(stir(add(make("gpt2", base))))


def budget(model, **settings):
    return Budget(model, AdamW(model.parameters()), **dict(last=1, steps=10) | settings)


@pytest.mark.parametrize("model, change, error, text", [
    *((t5, EVERY[name], TypeError, "is for a Transformer, not for EncoderDecoder")
      for name in ("H", "prompt", "prefix", "top")),
    (t5, add_bitfit, ValueError, "no layer of this model has one"),
    (t5, settle_prefix, ValueError, "there is no prefix 'default' with an MLP"),
    (t5, partial(lora, targets="all-linear", r=17), ValueError, "r must be 1 to 16, the size of"),
    *((partial(make, family), partial(add, r=9, alpha=4, targets="all-linear"), ValueError,
       r"r must be 1 to 8, the size of blocks\.0\.attention\.k \(8, 16\); got 9")
      for add in (add_lora, add_dora, add_adalora) for family in ("llama",)),
    *((partial(make, "bert"), partial(add, targets=targets), error, text)
      for add in (lora, adalora, partial(add_ia3, feedforward=())) for targets, error, text in (
          (None, TypeError, "targets must be a word or several words, got None"),
          (["q", 3], TypeError, "targets must be a word or several words, got 3"),
          (["q", "w"], ValueError, r"targets \['w'\] match no layer; there are \['down', "),
          ((), ValueError, r"targets \[\] match no layer"))),
    (partial(make, "gpt2"), partial(add_ia3, feedforward=2), TypeError, "feedforward must be a wo"),
    (lambda: lora(make("gpt2")), partial(retrain, paths=[]), ValueError, "there are no paths"),
    (lambda: lora(make("gpt2")), partial(retrain, paths=[3]), TypeError, "paths must be a word"),
    (lambda: adalora(make("gpt2")), partial(budget, last=3), ValueError, "at most the first rank"),
    (merged(adalora), budget, ValueError, "no AdaLoRA adapter acts .* takes merged ones out"),
    *((merged(add), merge_lora, ValueError, "call unmerge_lora before merging again")
      for add in (lora, adalora, add_ia3, add_bitfit)),
    *((merged(lora), partial(EVERY[name], name="b"), ValueError, "before adding an adapter")
      for name in (*METHODS, "ia3", "prompt", "prefix")),
    (merged(add_bitfit, "nf4"), requantize_lora, ValueError, "norm1 is not quantized"),
    (merged(add_ia3, "int8"), requantize_lora, ValueError, "has IA3 merged, not LoRA")])
def test_what_is_refused_leaves_the_model_as_it_was(model, change, error, text):
    model = model()
    before = all_of(model)
    with pytest.raises(error, match=text):
        change(model)
    assert all_of(model) == before


@methods
@pytest.mark.parametrize("settings, text", [
    (dict(name="a.b"), "word without dots"), (dict(name="first"), "already")])
def test_a_name_that_cannot_be(method, settings, text):
    model = stir(METHODS[method](make("gpt2"), name="first"))
    before, trained = logits(model), [path for path, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=text):
        METHODS[method](model, **settings)
    assert np.array_equal(logits(model), before)
    assert [path for path, _ in model.named_parameters()] == trained
