"""minilm.peft.front, what prompts and prefixes share: logits, masks and losses are the text's;
gradients, checkpoints, generation, names, LoRA beside them, and what is refused."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st
from test_transformer import checkpoints

from minilm import ops
from minilm.cache import Cache
from minilm.dialogue import Dialogue
from minilm.distill import student_from_teacher
from minilm.generate import generate
from minilm.interop.huggingface import save_model
from minilm.optim import AdamW
from minilm.peft import (
    add_lora,
    add_prefix,
    add_prompt,
    merge_lora,
    unload_lora,
    unmerge_lora,
    use_adapter,
)
from minilm.peft.adapted import adapted_layers
from minilm.quantize import quantize_model
from minilm.rope import Dynamic
from minilm.tensor import no_grad, randomness
from minilm.train import Trainer
from minilm.transformer import Config, Front, Transformer

V, P, T, CONTEXT = 19, 3, 6, 12
SIZES = dict(vocab_size=V, context=CONTEXT, layers=2, heads=2, width=16)
CONFIGS = {"gpt2": Config.gpt2(**SIZES), "llama": Config.llama(**SIZES, hidden=24, kv_heads=1),
           "bert": Config.bert(**SIZES, hidden=24)}
ADD = {"prompt": add_prompt, "prefix": add_prefix, "projected": partial(add_prefix, hidden=5)}
families = pytest.mark.parametrize("family", CONFIGS)
causal = pytest.mark.parametrize("family", ["gpt2", "llama"])
methods = pytest.mark.parametrize("method", ADD)
bases = pytest.mark.parametrize("base", ["plain", "nf4", "int8"])
TOKENS, TARGETS = np.random.default_rng(2).integers(0, V, (2, 3, T))


def make(family, base="plain", dtype="float32", **changes):
    """A tiny model; noise moves every parameter from its first value."""
    model, rng = Transformer(dataclasses.replace(CONFIGS[family], **changes)), \
        np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += 0.3 * rng.standard_normal(t.shape, dtype=np.float32)
    model.astype(dtype)
    return (model if base == "plain" else quantize_model(model, base)).eval()


def stir(model, seed=0):
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.data += (0.5 * rng.standard_normal(p.shape)).astype(p.dtype)
    return model


def logits(model, tokens=TOKENS, mask=None):
    with no_grad():
        return model(tokens, mask).data


def same(state, model):
    now = model.state_dict()
    return state.keys() == now.keys() and all(np.array_equal(a, now[k]) for k, a in state.items())


def copied(model):
    return {k: a.copy() for k, a in model.state_dict().items()}


@families
@bases
@methods
def test_what_is_trained_and_what_comes_out(family, base, method):
    model = make(family, base)
    before, frozen = logits(model), copied(model)
    assert ADD[method](model, P) is model and model.room == CONTEXT - P
    after = logits(model)
    assert after.shape == before.shape and after.dtype == np.float32
    assert (after != before).any(-1).all()
    assert all(path.startswith("front.adapters.default.") for path, _ in model.named_parameters())
    assert logits(model, TOKENS.tolist()).tolist() == after.tolist()
    unload_lora(model)
    assert type(model.front) is Front and model.room == CONTEXT
    assert same(frozen, model) and np.array_equal(logits(model), before)


@families
@methods
@given(seed=st.integers(0, 999), length=st.integers(1, T - 1))
def test_padding_changes_nothing(family, method, seed, length):
    """On either side: what is in it, and on the right that it is there."""
    model, rng = stir(ADD[method](make(family), P), seed), np.random.default_rng(seed)
    for right in (True, False):
        mask = np.zeros((3, T), int)
        text = slice(0, length) if right else slice(T - length, T)
        mask[:, text] = 1
        other = np.where(mask, TOKENS, rng.integers(0, V, TOKENS.shape))
        one, two = logits(model, TOKENS, mask), logits(model, other, mask)
        assert np.array_equal(one[:, text], two[:, text])
        if right:
            close(one[:, text], logits(model, TOKENS[:, text]), "float32")
    full = logits(model, TOKENS, np.ones((3, T), int))
    close(full, logits(model), "float32")


@families
@methods
def test_gradients_are_those_of_finite_differences(family, method):
    model = stir(ADD[method](make(family, dtype="float64"), P))
    mask = np.ones((3, T), int)
    mask[1, 4:] = 0
    def loss(): return ops.cross_entropy(model(TOKENS, mask), TARGETS)
    loss().backward()
    rng, h, values = np.random.default_rng(3), 1e-6, []
    directions = [rng.standard_normal(p.shape) for p in model.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), directions))
    for sign in (1, -1):
        for p, d in zip(model.parameters(), directions):
            p.data += sign * h * d
        values.append(float(loss().data))
        for p, d in zip(model.parameters(), directions):
            p.data -= sign * h * d
    assert all(p.grad.any() for p in model.parameters())
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


@families
@methods
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("lora", [False, True])
def test_checkpoints_give_the_same_bits(family, method, every, lora):
    """Also with dropout, and with LoRA on top; a prefix's MLP is one graph for all segments."""
    model = ADD[method](make(family, dropout=0.2), P)
    model = stir(add_lora(model, 2, 4, dropout=0.1) if lora else model).train()

    def run(every):
        model.checkpoint_every = every
        for p in model.parameters():
            p.grad = None
        with randomness(np.random.default_rng(7)):
            loss = ops.cross_entropy(model(TOKENS), TARGETS)
        assert checkpoints(loss) == (math.ceil(2 / every) if every else 0)
        loss.backward()
        return [loss.data, *(p.grad for p in model.parameters())]
    plain, again = run(0), run(every)
    assert all(np.array_equal(a, b) for a, b in zip(plain, again)) and plain[1].any()


@bases
@methods
def test_it_learns_and_the_base_does_not_move(base, method):
    model = ADD[method](make("llama", base), P)
    frozen = {k: a for k, a in copied(model).items() if ".adapters." not in k}
    before = {k: a for k, a in copied(model).items() if ".adapters." in k}
    with Trainer(model, AdamW(model.parameters(), lr=0.1), workers=2) as trainer:
        losses = [trainer.step(i, (TOKENS, TARGETS)).loss for i in range(30)]
        assert trainer.evaluate(TOKENS, TARGETS)[0] < losses[0] - 0.3
    state = model.state_dict()
    assert losses[-1] < losses[0] - 0.3
    assert all(np.array_equal(state[k], a) for k, a in frozen.items())
    assert all((state[k] != a).any() for k, a in before.items())


@causal
@methods
@given(seed=st.integers(0, 999), start=st.integers(1, 14), B=st.integers(1, 2))
def test_generation_with_a_cache_is_that_without(family, method, seed, start, B):
    """From one token on, or from more than there is room for; in a batch; until it slides."""
    model = stir(ADD[method](make(family, dtype="float64"), P), seed)
    tokens = np.random.default_rng(seed).integers(0, V, (B, start))
    ids = generate(model, tokens, 12, temperature=0)
    for n in range(start, ids.shape[1]):
        last = logits(model, ids[:, max(0, n - model.room) : n])[:, -1]
        assert ids[:, n].tolist() == last.argmax(-1).tolist()


@causal
@methods
def test_a_dialogue_reads_nothing_twice(family, method):
    model = stir(ADD[method](make(family, dtype="float64"), P))
    dialogue, text = Dialogue(model, temperature=0), [4, 9]
    for said in ([], [7], [1, 2]):
        text += said
        answer = dialogue.answer(text)
        text = [*text, next(answer)]
        assert text == generate(model, [text[:-1]], 1, temperature=0)[0].tolist()
    assert dialogue.ran == 2 + 2 + 3
    whole = [*dialogue.answer(text[:3])]
    assert len(whole) == model.room - 3 + 1
    with pytest.raises(ValueError, match="takes 10 tokens, but the model's context is 9"):
        dialogue.answer([1] * 10)


@causal
@methods
def test_a_cache_goes_on_and_its_mask_is_the_texts(family, method):
    model, mask = stir(ADD[method](make(family, dtype="float64"), P)), np.ones((3, T), int)
    mask[1, 1] = 0
    expected, cache = logits(model, TOKENS, mask), Cache.empty(model)
    with no_grad():
        first = model(TOKENS[:, :4], mask[:, :4], cache).data
        assert cache.length == P + 4
        rest = model(TOKENS[:, 4:], mask, cache).data
    close(np.concatenate([first, rest], 1), expected, "float64")
    with pytest.raises(ValueError, match="a buffer keeps no graph"):
        model(TOKENS, cache=Cache.empty(model))


@methods
def test_methods_are_switched_by_name(method):
    """One at a time if their names differ; each comes back bit for bit, and trains alone."""
    alone = {"a": stir(ADD[method](make("llama"), P), 1),
             "b": stir(add_prompt(make("llama"), 2), 2),
             "c": stir(add_lora(make("llama"), 2, 4), 3)}
    model = stir(ADD[method](make("llama"), P, name="a"), 1)
    trained = model.parameters()
    model = stir(add_prompt(model, 2, name="b"), 2)
    model = stir(add_lora(model, 2, 4, name="c"), 3)
    for name, room in [*zip("abc", (CONTEXT - P, CONTEXT - 2, CONTEXT))] * 2:
        use_adapter(model, name)
        assert np.array_equal(logits(model), logits(alone[name])) and model.room == room
        assert all(f".adapters.{name}." in path for path, _ in model.named_parameters())
    assert np.array_equal(logits(use_adapter(model, None)), logits(make("llama")))
    assert not model.parameters() and model.room == CONTEXT
    assert [id(p) for p in use_adapter(model, "a").parameters()] == [id(p) for p in trained]


@bases
@methods
@pytest.mark.parametrize("first", ["rows", "lora"])
def test_with_lora_under_one_name_both_act(base, method, first):
    """Lecture 002: LoRA goes with prefixes. Both have gradients, and neither is the other's."""
    model = make("gpt2", base)
    adds = [lambda: ADD[method](model, P), lambda: add_lora(model, 2, 4, ("q", "v", "up"))]
    for add in adds if first == "rows" else adds[::-1]:
        add()
    stir(model)
    paths = [path for path, _ in model.named_parameters()]
    assert {path.split(".")[0] for path in paths} == {"front", "blocks"}
    ops.cross_entropy(model(TOKENS), TARGETS).backward()
    assert all(p.grad.any() for p in model.parameters())
    both = logits(model)
    state = copied(model)
    for layer in adapted_layers(model).values():
        layer.use("default" if layer is model.front else None)
    rows = logits(model)
    for layer in adapted_layers(model).values():
        layer.use(None if layer is model.front else "default")
    lora = logits(model)
    assert (both != rows).any() and (both != lora).any() and (rows != lora).any()
    assert np.array_equal(logits(use_adapter(model, "default")), both) and same(state, model)
    if first == "rows":
        ids = generate(model, TOKENS[:1, :2], 4, temperature=0)
        for n in range(2, 6):
            assert ids[0, n] == logits(model, ids[:, :n])[0, -1].argmax()


@methods
def test_what_cannot_be_merged(method, tmp_path):
    """Nor may a student or a folder leave the rows out; the model is as it was."""
    model = stir(add_lora(ADD[method](make("gpt2"), P), 2, 4))
    before, kind = logits(model), {"prompt": "Prompt"}.get(method, "Prefix")
    for verb in (merge_lora, student_from_teacher):
        with pytest.raises(ValueError, match=f"{kind} cannot be merged"):
            verb(model)
    with pytest.raises(ValueError, match="front"):
        save_model(unload_lora(use_adapter(model, None)) and ADD[method](model, P), tmp_path / "x")
    model = stir(add_lora(ADD[method](make("gpt2"), P), 2, 4))
    assert np.array_equal(logits(model), before) and not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="nothing is merged"):
        unmerge_lora(model)
    assert student_from_teacher(use_adapter(model, None)).room == CONTEXT


@methods
def test_adding_while_another_is_merged(method):
    model = merge_lora(stir(add_lora(make("gpt2"), 2, 4, name="a")))
    before = logits(model)
    with pytest.raises(ValueError, match="call unmerge_lora before adding an adapter"):
        ADD[method](model, P)
    assert np.array_equal(logits(model), before) and type(model.front) is Front


@families
@methods
@pytest.mark.parametrize("settings, text", [
    (dict(length=CONTEXT), "must be 1 to 11, as the model's context is 12; got 12"),
    (dict(length=0), "got 0"), (dict(length=-1), "got -1"), (dict(length=2.0), r"got 2\.0"),
    (dict(length=True), "got True"), (dict(length=None), "got None"),
    (dict(name="a.b"), "without dots"), (dict(name="first"), "front already has an adapter")])
def test_what_is_refused(family, method, settings, text):
    model = stir(add_prompt(make(family), 1, name="first"))
    before, trained = logits(model), [path for path, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=text):
        ADD[method](model, **dict(length=P) | settings)
    assert np.array_equal(logits(model), before)
    assert [path for path, _ in model.named_parameters()] == trained


@methods
def test_texts_and_masks_that_do_not_fit(method):
    model = ADD[method](make("gpt2"), P)
    assert logits(model, np.ones((1, model.room), int)).shape == (1, CONTEXT - P, V)
    with pytest.raises(ValueError, match=r"1 to 12, .* got 13, 3 of which are in front"):
        model(np.ones((1, model.room + 1), int))
    for shape in ((3, T + P), (3, T - 1), (1, T), (T,)):
        with pytest.raises(ValueError, match=r"must have the shape \(3, 6\), as the tokens"):
            model(TOKENS, np.ones(shape, int))
    with pytest.raises(ValueError, match="mask must be 1 for"):
        model(TOKENS, np.full((3, T), 2))
    with pytest.raises(ValueError, match="tokens must be integers"):
        model(TOKENS[0], np.ones(T, int))


@methods
def test_state_and_dtype(method):
    model, other = (stir(ADD[method](make("llama"), P), seed) for seed in (1, 2))
    assert (logits(model) != logits(other)).any()
    other.load_state_dict(model.state_dict())
    assert np.array_equal(logits(other), logits(model))
    wide = logits(model.astype("float64"))
    assert wide.dtype == np.float64
    close(logits(other), wide, "float32")
    half = ADD[method](make("llama", dtype="bfloat16"), P)
    assert {t.dtype.name for _, t in half.named_tensors()} == {"bfloat16"}
    assert logits(half).dtype.name == "bfloat16"


@methods
@pytest.mark.parametrize("changes", [dict(window=4), dict(rope=Dynamic(2.0, 6))])
def test_a_window_and_a_rope_that_looks_at_the_length(method, changes):
    """Generation is that without a cache, also after the rows have left the window."""
    model = stir(ADD[method](make("llama", dtype="float64", **changes), P))
    for start in (2, 5):  # with the rows, the second is beyond 6 tokens at once
        ids = generate(model, TOKENS[:1, :start], 9 - start, temperature=0)
        for n in range(start, 9):
            assert ids[0, n] == logits(model, ids[:, :n])[0, -1].argmax()
