"""The facts of Config that came after Llama: what each means, that generation with a cache and
decode know it, and which contradictions are refused. test_published_models compares with
transformers."""

import math
from dataclasses import replace

import numpy as np
import pytest

from minilm.cache import Cache
from minilm.config import Config
from minilm.decode import decode, decodes
from minilm.distill import student_from_teacher
from minilm.generate import generate
from minilm.rope import Dynamic, Linear, Llama3, Long, Yarn, frequencies, rotary_tables
from minilm.tensor import no_grad
from minilm.transformer import Transformer

CONTEXT = 14
BASE = Config.llama(19, CONTEXT, layers=3, heads=4, width=16, hidden=24, kv_heads=2,
                    rope_theta=50.0)
FACTS = {
    "head_width": dict(head_width=6), "bias": dict(bias=("q", "k", "v")),
    "qk_norm of heads": dict(qk_norm="head"), "qk_norm of all": dict(qk_norm="width"),
    "norm_output": dict(norm_output=True), "norm_both": dict(norm_both=True),
    "attention_scale": dict(attention_scale=2.0), "attention_cap": dict(attention_cap=0.1),
    "logits_cap": dict(logits_cap=0.5), "window": dict(window=3),
    "window_theta": dict(window=3, unwindowed=(1,), window_theta=7.0, rope=Linear(2.5)),
    "window of some": dict(window=2, unwindowed=(1,)), "unrotated": dict(unrotated=(0, 2)),
    "geglu": dict(activation="geglu_tanh"), "plus one": dict(norm_plus_one=True),
    "scaled": dict(scaled_embedding=True),
    "linear": dict(rope=Linear(2.5)), "dynamic": dict(rope=Dynamic(2.0, 5)),
    "llama3": dict(rope=Llama3(8.0, 9)), "yarn": dict(rope=Yarn(4.0, 6)),
    "long": dict(rope=Long((1.0, 1.5), (2.0, 3.0), 6, 1.2)),
}


def noisy(config):
    model, rng = Transformer(config), np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += rng.normal(0, 0.2, t.shape).astype(np.float32)
    return model.eval()


@pytest.mark.parametrize("name", FACTS)
def test_each_fact_changes_the_logits(name):
    """Of the same weights, if the shapes are the same."""
    changed, tokens = noisy(replace(BASE, **FACTS[name])), np.arange(CONTEXT)[None]
    plain = noisy(BASE)
    if name not in ("head_width", "bias", "qk_norm of heads", "qk_norm of all", "norm_both"):
        changed.load_state_dict(plain.state_dict())
    assert abs(changed(tokens).data - plain(tokens).data).max() > 1e-3


@pytest.mark.parametrize("name", FACTS)
def test_a_cache_changes_no_token(name):
    """Within the window and beyond it, in several rows and in one, which decode runs."""
    model = noisy(replace(BASE, **FACTS[name]))
    assert decodes(model)
    for tokens in (np.array([[3, 5, 7]]), np.array([[3, 5], [11, 2]])):
        found, expected = generate(model, tokens, 2 * CONTEXT, temperature=0), tokens
        for _ in range(2 * CONTEXT):
            best = model(expected[:, -CONTEXT:]).data[:, -1].argmax(-1)
            expected = np.concatenate([expected, best[:, None]], axis=1)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", FACTS)
def test_decode_is_the_model(name):
    model, cache = noisy(replace(BASE, **FACTS[name])), None
    length = model.config.steady
    tokens = np.random.default_rng(0).integers(0, 19, (1, length))
    with no_grad():
        expected, cache = model(tokens).data[0], Cache.empty(model)
        for t, token in enumerate(tokens[0]):
            logits = decode(model, token, cache)
            assert abs(logits - expected[t]).max() < 2e-6 * abs(expected).max()


def test_a_cache_of_other_angles_is_refused():
    model = noisy(replace(BASE, rope=Dynamic(2.0, 5)))
    cache = Cache.empty(model)
    with no_grad():
        model(np.array([[1, 2, 3, 4]]), cache=cache)
        model(np.array([[5]]), cache=cache)
        with pytest.raises(ValueError, match="beyond 5 tokens"):
            model(np.array([[6]]), cache=cache)


def test_layers_with_a_window_turn_by_their_own_theta():
    """A window that hides nothing: the theta is all that differs, and it is never stretched."""
    changes, tokens = dict(layers=1, window=CONTEXT), np.arange(CONTEXT)[None]
    near = noisy(replace(BASE, **changes, window_theta=7.0, rope=Linear(2.5)))
    far = noisy(replace(BASE, **changes, window_theta=7.0, rope=Linear(2.5), unwindowed=(0,)))
    plain = [noisy(replace(BASE, layers=1, rope_theta=7.0)),
             noisy(replace(BASE, layers=1, rope=Linear(2.5)))]
    assert [(m(tokens).data == p(tokens).data).all() for m, p in zip((near, far), plain)] == [1, 1]


def test_caps_bound_scores_and_logits():
    tokens = np.arange(CONTEXT)[None]
    assert abs(noisy(replace(BASE, logits_cap=0.125))(tokens).data).max() <= 0.125
    capped, same = (noisy(replace(BASE, layers=1, **c)) for c in (
        dict(attention_cap=1e-6), dict(attention_scale=1e-6)))  # all scores are about 0
    assert abs(capped(tokens).data - same(tokens).data).max() < 1e-4


def test_a_window_hides_what_is_in_front_of_it():
    """With one layer, token t depends on t - 2 .. t alone."""
    model, tokens = noisy(replace(BASE, layers=1, window=3)), np.arange(CONTEXT)[None]
    before = model(tokens).data[0]
    tokens[0, 4] = 18
    changed = abs(model(tokens).data[0] - before).max(-1) > 0
    assert changed.tolist() == [4 <= t < 7 for t in range(CONTEXT)]


def test_a_student_keeps_the_facts_of_its_layers():
    teacher = noisy(replace(BASE, window=3, unwindowed=(1,), unrotated=(0, 2)))
    student = student_from_teacher(teacher, [1, 2])
    assert student.config.unwindowed == (0,) and student.config.unrotated == (1,)
    assert [b.attention.window for b in student.blocks] == [None, 3]
    assert [b.attention.rotates for b in student.blocks] == [True, False]


# Ropes, by their papers' formulas, with theta 50 and D 8


W = 50.0 ** (-2 * np.arange(4) / 8)


def test_linear_divides_positions():
    assert np.allclose(Linear(2.5).frequencies(50.0, 8, None), W / 2.5, rtol=1e-6)


def test_dynamic_stretches_only_texts_beyond_its_context():
    rope = Dynamic(2.0, 10)
    assert np.array_equal(rope.frequencies(50.0, 8, 10), frequencies(50.0, 8))
    theta = 50.0 * (2 * 15 / 10 - 1) ** (8 / 6)
    assert np.allclose(rope.frequencies(50.0, 8, 15), theta ** (-2 * np.arange(4) / 8), rtol=1e-6)


def test_llama3_keeps_fast_pairs_and_divides_slow_ones():
    w, turns = Llama3(8.0, 40).frequencies(50.0, 8, None), 40 * W / (2 * math.pi)
    s = (turns - 1) / 3
    expected = np.where(turns > 4, W, np.where(turns < 1, W / 8, (1 - s) * W / 8 + s * W))
    assert np.allclose(w, expected, rtol=1e-6)
    assert (turns > 4).any() and (turns < 1).any() and ((turns > 1) & (turns < 4)).any()


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    w = Yarn(4.0, 200, fast=20.0, slow=2.0).frequencies(50.0, 8, None)
    assert np.allclose(w[[0, 3]], [W[0], W[3] / 4], rtol=1e-6)
    assert W[2] / 4 < w[2] < W[2]
    assert Yarn(4.0, 200).scale == 0.1 * math.log(4) + 1 and Yarn(4.0, 9, attention=2.0).scale == 2


def test_long_has_divisors_for_short_and_long_texts():
    rope = Long((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0), 10)
    assert np.allclose(rope.frequencies(50.0, 8, 10), W / [1, 2, 3, 4], rtol=1e-6)
    assert np.allclose(rope.frequencies(50.0, 8, 11), W / [5, 6, 7, 8], rtol=1e-6)


def test_tables_are_scaled():
    c = replace(BASE, rope=Yarn(4.0, 6, attention=1.5))
    cos, sin = rotary_tables(c, np.arange(5), np.float32)
    assert np.allclose(cos**2 + sin**2, 1.5**2)


# Contradictions


@pytest.mark.parametrize("changes, given", [
    (dict(head_width=5), ["even", "got 5"]),
    (dict(head_width=0), ["head_width", "positive"]),
    (dict(qk_norm="row"), ["qk_norm", "row", "'head'"]),
    (dict(norm="layer", qk_norm="head"), ["qk_norm", "'rms'"]),
    (dict(norm="layer", norm_plus_one=True), ["norm_plus_one", "'rms'"]),
    (dict(norm_first=False, norm_output=True), ["norm_output", "norm_first"]),
    (dict(norm_first=False, norm_both=True), ["norm_both", "norm_first"]),
    (dict(norm_output=True, norm_both=True), ["norm_both", "norm_output"]),
    (dict(attention_scale=0.0), ["attention_scale", "positive", "0.0"]),
    (dict(attention_cap=-1.0), ["attention_cap", "-1.0"]),
    (dict(logits_cap=math.inf), ["logits_cap", "inf"]),
    (dict(window_theta=7.0), ["window_theta", "a window"]),
    (dict(window=0), ["window", "positive"]),
    (dict(window=3, causal=False), ["window", "causal"]),
    (dict(unwindowed=(1,)), ["unwindowed", "a window"]),
    (dict(window=3, unwindowed=(3,)), ["unwindowed", "0 to 2", "(3,)"]),
    (dict(unrotated=(2, 1)), ["unrotated", "(2, 1)"]),
    (dict(positions="learned", unrotated=(1,)), ["unrotated", "rotary"]),
    (dict(positions="learned", rope=Linear(2.0)), ["rope", "rotary"]),
    (dict(bias=("v", "q")), ["bias", "('v', 'q')"]),
    (dict(bias=("q", "x")), ["bias", "'x'"]),
    (dict(bias=()), ["bias", "()"]),
    (dict(activation="gelu", bias=("gate",)), ["bias", "'gate'"]),
    (dict(rope="linear"), ["rope", "'linear'", "Yarn"]),
    (dict(rope=Linear(0.0)), ["factor", "positive", "0.0"]),
    (dict(rope=Llama3(2.0, 9, low=4.0)), ["low", "high"]),
    (dict(rope=Yarn(2.0, 9), rope_theta=1.0), ["YaRN", "1.0"]),
    (dict(rope=Dynamic(2.0, 9), head_width=2), ["Dynamic", "width 2"]),
    (dict(rope=Long((1.0,), (1.0, 2.0), 9)), ["Long", "width 4"]),
])
def test_contradictions(changes, given):
    with pytest.raises(ValueError) as error:
        replace(BASE, **changes)
    assert all(part in str(error.value) for part in given), str(error.value)
