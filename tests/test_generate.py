"""Checks generation: the cache changes nothing, sampling is what it says, the script prints it.

`plain` is what everything is held against: no cache, the whole window anew for each token.
"""

import dataclasses
import functools
import importlib
import math
import os
import pkgutil
import re
import runpy
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import generate as script
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilm
from minilm import ops, seq2seq
from minilm.block import Attention, Block
from minilm.cache import Cache
from minilm.data import BPETokenizer, ByteTokenizer, CharTokenizer, printable
from minilm.decode import caches, decode, decodes
from minilm.files import read_json, write_json
from minilm.generate import generate, sample, stream
from minilm.interop import huggingface, peft, save_model
from minilm.nn import Linear, Module
from minilm.peft import add_lora, use_adapter
from minilm.quantize import quantize_model
from minilm.run import newest_model
from minilm.tensor import Tensor, no_grad, randomness
from minilm.transformer import Config, Ends, Transformer

V, CONTEXT = 13, 6
CONFIGS = {
    "gpt2": Config.gpt2(V, CONTEXT, layers=2, heads=2, width=8),
    "llama": Config.llama(V, CONTEXT, 2, heads=4, width=16, hidden=12, kv_heads=2),
}
families = pytest.mark.parametrize("family", CONFIGS)
seeds = st.integers(0, 2**32 - 1)
SETTINGS = [dict(temperature=0), dict(), dict(temperature=0.7, top_k=5), dict(top_p=0.8),
            dict(temperature=1.5, top_k=7, top_p=0.9)]


def make(family, **changes):
    """A tiny float64 model, far enough from its first weights to have preferences."""
    model = Transformer(dataclasses.replace(CONFIGS[family], **changes))
    rng = np.random.default_rng(1)
    for _, t in list(model.named_tensors()):
        t.become(t.data + 0.3 * rng.standard_normal(t.shape))
    return model.eval()


model_of = functools.cache(make)  # for tests that leave the model as it is


def prompts(seed, B, T):
    return np.random.default_rng(seed).integers(0, V, (B, T))


def plain(model, tokens, count, temperature=1.0, top_k=None, top_p=None, seed=0):
    """What `generate` returns, the plain way."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        logits = model(tokens[:, -model.config.context :]).data[:, -1]
        drawn = sample(logits, rng, temperature, top_k, top_p)
        tokens = np.concatenate([tokens, drawn[:, None]], axis=1)
    return tokens


# The cache


@families
@given(
    seed=seeds,
    B=st.integers(1, 3),
    T=st.integers(1, CONTEXT + 3),
    count=st.integers(0, CONTEXT + 3),
    settings=st.sampled_from(SETTINGS),
)
def test_the_cache_changes_no_token(family, seed, B, T, count, settings):
    """Neither within the context nor beyond it."""
    model, tokens = model_of(family), prompts(seed, B, T)
    found = generate(model, tokens, count, seed=seed, **settings)
    assert found.dtype.kind == "i" and found.shape == (B, T + count)
    assert np.array_equal(found, plain(model, tokens, count, seed=seed, **settings))


@families
def test_the_models_here_are_no_bores(family):
    """The test above would say little about models that repeat themselves."""
    found = generate(model_of(family), prompts(0, 3, 2), 20)
    assert all(len(set(row)) > 6 for row in found.tolist())


@families
def test_checkpoints_do_not_keep_the_cache_from_filling(family):
    model, tokens = make(family), prompts(0, 2, 2)
    expected = plain(model, tokens, 2 * CONTEXT)
    model.checkpoint_every = 1
    assert np.array_equal(generate(model, tokens, 2 * CONTEXT), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint64])
def test_prompts_may_be_of_any_integers(dtype):
    model, tokens = model_of("gpt2"), prompts(0, 2, 3)
    found = generate(model, tokens.astype(dtype), 2 * CONTEXT)
    assert found.dtype == np.int64
    assert np.array_equal(found, generate(model, tokens.tolist(), 2 * CONTEXT))


def test_a_context_of_one_token_is_enough():
    model, tokens = make("gpt2", context=1), prompts(0, 2, 3)
    assert np.array_equal(generate(model, tokens, 5), plain(model, tokens, 5))


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16], ids=str)
def test_smaller_dtypes_generate(dtype):
    model, tokens = make("llama"), prompts(0, 2, 3)
    model.astype(dtype)
    for settings in (dict(temperature=0), dict(top_k=9, top_p=0.9)):
        found = generate(model, tokens, 2 * CONTEXT, **settings)
        assert np.array_equal(found, plain(model, tokens, 2 * CONTEXT, **settings))


# Sampling


logits_rows = st.lists(st.floats(-8, 8).map(lambda x: round(x, 3)), min_size=2, max_size=12)


@given(z=logits_rows, seed=seeds)
def test_temperature_0_and_top_k_1_take_the_likeliest(z, seed):
    z, rng = np.array([z] * 20), np.random.default_rng(seed)
    assert (sample(z, rng, 0, None, None) == z[0].argmax()).all()
    for drawn in (sample(z, rng, 1.0, 1, None), sample(z, rng, 1.0, None, 1e-9)):
        assert (z[0, drawn] == z[0].max()).all()


@given(z=logits_rows, seed=seeds, temperature=st.floats(0.1, 5), k=st.none() | st.integers(1, 15),
       p=st.none() | st.floats(0.01, 1))
def test_only_the_allowed_are_drawn(z, seed, temperature, k, p):
    """Tokens as likely as the k-th are among the k likeliest too."""
    z = np.array(z)
    weights = np.exp((z - z.max()) / temperature)
    if k is not None:
        weights[z < sorted(z)[-min(k, len(z))]] = 0
    allowed, reached = set(), 0.0
    for token in sorted(range(len(z)), key=lambda i: -weights[i]):
        if weights[token] and reached < (1 if p is None else p) * weights.sum() * (1 + 1e-12):
            allowed.add(token)
            reached += weights[token]
    drawn = sample(np.array([z] * 100), np.random.default_rng(seed), temperature, k, p)
    assert drawn.shape == (100,) and set(drawn.tolist()) <= allowed


@pytest.mark.parametrize("k, p, expected", [
    (None, None, {0, 1, 2, 3}), (9, 1.0, {0, 1, 2, 3}), (2, None, {1, 3}), (3, None, {0, 1, 3}),
    (None, 0.49, {1}), (None, 0.51, {1, 3}), (None, 0.79, {1, 3}), (None, 0.81, {1, 3, 0}),
    (None, 0.96, {0, 1, 2, 3}), (3, 0.52, {1}), (3, 0.53, {1, 3}),
])
def test_the_fewest_that_reach_p_stay(k, p, expected):
    """All of them, wherever they are in the vocabulary; top_p counts among what top_k left."""
    z = np.log(np.array([[0.15, 0.5, 0.05, 0.3]] * 500))
    assert set(sample(z, np.random.default_rng(0), 1.0, k, p).tolist()) == expected


@pytest.mark.parametrize("temperature, k, p", [(1.0, None, None), (0.5, None, None), (2.0, 4, 0.9)])
def test_frequencies_match_the_softmax(temperature, k, p):
    """Chi-squared within five standard deviations: 2 (n - 1) is its variance."""
    z, count = np.array([0.3, -1.0, 1.2, 0.0, 2.0, -0.4]), 50_000
    weights = np.exp(z / temperature)
    if k:
        weights[[1, 5]] = 0  # what is left has the shares 0.16, 0.25, 0.13, 0.46: all are needed
    expected = count * weights / weights.sum()
    drawn = sample(np.tile(z, (count, 1)), np.random.default_rng(0), temperature, k, p)
    found, kept = np.bincount(drawn, minlength=len(z)), weights > 0
    assert found[~kept].sum() == 0
    chi2, n = ((found - expected)[kept] ** 2 / expected[kept]).sum(), kept.sum()
    assert chi2 < n - 1 + 5 * np.sqrt(2 * (n - 1))


def test_rows_are_drawn_independently():
    drawn = sample(np.zeros((2000, 2)), np.random.default_rng(0), 1.0, None, None)
    assert 888 < drawn.sum() < 1112
    assert 180 < (drawn[::2] & drawn[1::2]).sum() < 320  # 250, and 5 standard deviations


@families
def test_the_seed_decides_the_tokens(family):
    model, tokens = model_of(family), prompts(0, 2, 3)
    one, again, other = (generate(model, tokens, 12, seed=s) for s in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


# What is left behind, and what is refused


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_what_it_was(training):
    model = make("gpt2", dropout=0.5).train(training)
    expected = plain(make("gpt2"), prompts(0, 1, 2), 4)
    assert np.array_equal(generate(model, prompts(0, 1, 2), 4), expected)  # without dropout
    assert {m.training for _, m in model.named_modules()} == {training}
    with pytest.raises(ValueError, match="table has 13 rows"):
        generate(model, [[V]], 4)
    assert {m.training for _, m in model.named_modules()} == {training}


@families
@pytest.mark.parametrize("dtype, tolerance", [
    ("float64", 1e-12), ("float32", 1e-5), ("float16", 5e-3), (ml_dtypes.bfloat16, 4e-2)], ids=str)
def test_one_token_as_vectors_equals_the_model(family, dtype, tolerance):
    """decode() after a prompt, token by token, with a plain layer, a foreign one and a norm."""
    model = make(family).astype(dtype)
    for swapped in (None, "blocks.1.attention.v", "blocks.0.mlp.down", "blocks.1.norm2", "head"):
        if swapped:
            model.replace(swapped, Spy(dict(model.named_modules())[swapped]))
        for B in (None, 1, 3):
            tokens = prompts(0, B or 1, CONTEXT)
            cache = Cache.empty(model)
            with no_grad():
                expected = model(tokens).data.astype(float)
                model.hidden(tokens[:, :2], cache=cache)
                for t in range(2, CONTEXT):
                    assert decodes(model) and cache.length == t
                    logits = decode(model, tokens[:, t] if B else tokens[0, t], cache)
                    assert logits.dtype == dtype and logits.shape == (*([B] if B else []), V)
                    gap = abs(logits - expected[:, t]).max()
                    assert gap < tolerance * abs(expected[:, t]).max()


OTHERS = {  # blocks of these stand in a model where another's should
    "post-norm": dict(norm_first=False), "exact GELU": dict(activation="gelu"),
    "SwiGLU": dict(activation="swiglu"), "both ways": dict(causal=False),
    "wide": dict(hidden=20), "grouped": dict(kv_heads=1), "RMS": dict(norm="rms"),
}


@functools.cache
def replacements(family):
    """(path, kind) of all that the test below puts into a model."""
    paths = [path for path, _ in make(family).named_modules()
             if path and not path.startswith("blocks.0.") and path != "front"]  # see test_front.py
    mixers = "blocks.0", "blocks.1", "blocks.1.attention"  # no Spy: they see other tokens
    return ([(path, kind.__name__) for path in paths for kind in (Wrapped, Averaged, Spy)
             if kind is not Spy or path not in mixers]
            + [(path, kind) for kind in OTHERS
               for path in ("blocks.0", "blocks.1", "blocks.1.attention", "blocks.1.mlp")])


def put(model, family, path, kind):
    """Replace the module at this path by one of this kind."""
    rng = np.random.default_rng(0)
    if kind in OTHERS:
        block = Block(dataclasses.replace(CONFIGS[family], **OTHERS[kind]), rng)
        for _, t in block.named_tensors():
            t.become(t.data + 0.3 * rng.standard_normal(t.shape))
        new = dict(block.named_modules())[path[9:]]
    else:
        new = globals()[kind](dict(model.named_modules())[path])
    model.replace(path, new)


@families
def test_whatever_was_replaced_the_cache_changes_no_token(family):
    """Nor does decode(), through which all but the third of the seeds' five batches go."""
    for seed, (path, kind) in enumerate(replacements(family)):
        model = make(family, dropout=0.5)
        put(model, family, path, kind)
        model.train(seed % 2 == 0)
        tokens = prompts(seed, 1 + (seed % 5 == 2), 1 + seed % 3)
        found = generate(model, tokens, CONTEXT, seed=seed)
        assert np.array_equal(found, plain(model.eval(), tokens, CONTEXT, seed=seed)), (path, kind)
        sees = "both ways" if path != "blocks.1.mlp" else None
        assert caches(model) == (kind not in ("Wrapped", "Averaged", sees)), (path, kind)


@families
@given(data=st.data(), seed=seeds, training=st.booleans())
def test_nor_after_several_replacements(family, data, seed, training):
    model, drawn = make(family, dropout=0.5), st.sampled_from(replacements(family))
    for path, kind in data.draw(st.lists(drawn, min_size=2, max_size=4)):
        if path in dict(model.named_modules()):  # the last one may have taken it away
            put(model, family, path, kind)
    tokens = prompts(seed, *data.draw(st.sampled_from([(1, 1), (1, 3), (2, 2)])))
    found = generate(model.train(training), tokens, CONTEXT, seed=seed)
    assert np.array_equal(found, plain(model.eval(), tokens, CONTEXT, seed=seed))


def test_what_decode_leaves_to_the_model():
    assert not decodes(make("gpt2", norm_first=False))
    assert not decodes(make("gpt2", segments=2))


def test_a_subclass_does_not_inherit_tokenwise():
    class Summed(Linear):
        def forward(self, x):
            return super().forward(x).sum(1, keepdims=True)
    model = make("gpt2")
    model.blocks[0].mlp.up.__class__ = Summed
    assert not caches(model) and not decodes(model)


def test_every_module_says_whether_it_is_tokenwise():
    """Those that are not yet known to the cache, and are not tokenwise, make generation slow."""
    known = (Transformer, Block, Attention, seq2seq.EncoderDecoder, seq2seq.Reader, seq2seq.Stack,
             seq2seq.Block, seq2seq.Attention)
    for module in pkgutil.walk_packages(minilm.__path__, "minilm."):
        for m in vars(importlib.import_module(module.name)).values():
            if isinstance(m, type) and issubclass(m, Module):
                assert "tokenwise" in vars(m) or m in known, m


def test_threads_share_a_model_that_trains():
    """Each generates without dropout and without a graph, while another trains with both."""
    model, barrier = make("gpt2", dropout=0.5).train(), threading.Barrier(5)
    expected = generate(model, prompts(0, 1, 2), 40)

    def work(draws):
        barrier.wait()
        if draws:
            return [generate(model, prompts(0, 1, 2), 40) for _ in range(2)]
        def run(seed):
            with randomness(np.random.default_rng(seed)):
                ops.cross_entropy(y := model(prompts(0, 2, 4)), prompts(1, 2, 4)).backward()
            gradient = model.blocks[0].mlp.up.weight.grad
            for p in model.parameters():
                p.grad = None
            return y.data, gradient
        return [(run(0), run(1)) for _ in range(20)]

    with ThreadPoolExecutor(5) as pool:
        *drawn, trained = pool.map(work, [True] * 4 + [False])
    assert all(np.array_equal(tokens, expected) for one in drawn for tokens in one)
    for one, other in trained:
        for found, again, drawn_anew in zip(one, trained[0][0], other):
            assert np.array_equal(found, again) and not np.array_equal(found, drawn_anew)
    assert all(m.training for _, m in model.named_modules())


class Wrapped(Module):
    """A stand-in that does what its module does, and says nothing of itself."""

    def __init__(self, module):
        self.module = module

    def forward(self, *args):
        return self.module(*args)


class Averaged(Wrapped):
    """The mean of the results for all tokens so far."""

    def forward(self, *args):
        y = self.module(*args)
        T = y.shape[-2]
        return Tensor(np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]) @ y


class Spy(Module):
    """A module's stand-in that remembers whether a graph was built."""

    tokenwise = True

    def __init__(self, module):
        self.module, self.graphs = module, []

    def forward(self, x):
        y = self.module(x)
        self.graphs.append(y.requires_grad)
        return y


def test_no_graph_is_built_and_only_inside():
    model = make("gpt2")
    model.head = spy = Spy(model.head)
    x = Tensor(np.ones(2), requires_grad=True)
    drawn = stream(model, prompts(0, 2, 3))
    for _ in range(CONTEXT + 1):
        assert next(drawn).shape == (2,)
        assert (x * 2.0).requires_grad  # between two tokens the caller may train
    assert spy.graphs == [False] * (CONTEXT + 1)


@pytest.mark.parametrize("tokens, settings, given", [
    ([1, 2], {}, "(2,)"),
    ([[]], {}, "(1, 0)"),
    ([[1.5]], {}, "float64"),
    ([["a"]], {}, "<U1"),
    ([[True]], {}, "bool"),
    ([[V]], {}, "table has 13 rows"),
    ([[1]], dict(max_new_tokens=-1), "max_new_tokens=-1"),
    ([[1]], dict(max_new_tokens=2.5), "max_new_tokens=2.5"),
    ([[1]], dict(max_new_tokens=None), "max_new_tokens=None"),
    ([[1]], dict(temperature=-0.5), "temperature=-0.5"),
    ([[1]], dict(temperature=float("nan")), "temperature=nan"),
    ([[1]], dict(temperature=float("inf")), "temperature=inf"),
    ([[1]], dict(temperature="1"), "temperature='1'"),
    ([[1]], dict(temperature=None), "temperature=None"),
    ([[1]], dict(top_k=0), "top_k=0"),
    ([[1]], dict(top_k=2.5), "top_k=2.5"),
    ([[1]], dict(top_k=float("nan")), "top_k=nan"),
    ([[1]], dict(top_k=True), "top_k=True"),
    ([[1]], dict(top_p=0.0), "top_p=0.0"),
    ([[1]], dict(top_p=1.5), "top_p=1.5"),
    ([[1]], dict(top_p="1"), "top_p='1'"),
    ([[1]], dict(seed=-1), "seed=-1"),
    ([[1]], dict(seed=1.5), "seed=1.5"),
    ([[1]], dict(eos=[1.5]), "eos=[1.5]"),
    ([[1]], dict(eos="60"), "eos='60'"),
    ([[1]], dict(eos=-1), "eos=-1"),
])
def test_bad_settings(tokens, settings, given):
    with pytest.raises(ValueError) as error:
        generate(model_of("gpt2"), tokens, **dict(max_new_tokens=0) | settings)
    assert given in str(error.value)


def test_settings_may_be_numpys():
    model, tokens = model_of("gpt2"), prompts(0, 2, 3)
    settings = dict(temperature=np.float64(0.5), top_k=np.int64(5), top_p=np.float64(0.75))
    found = generate(model, tokens, np.int32(4), **settings, seed=np.random.default_rng(3))
    settings = {name: value.item() for name, value in settings.items()}
    assert np.array_equal(found, generate(model, tokens, 4, **settings, seed=3))


NONE = [(math.nan, 1.0, 2.0), (1.0, 2.0, math.nan), (math.inf, 1.0, 2.0), (-math.inf,) * 3,
        (math.nan, math.inf, -math.inf)]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("row", NONE)
@pytest.mark.parametrize("settings", [(0, None, None), (1.0, None, None), (0.7, 2, None),
                                      (1.0, None, 0.5), (1e-310, 1, 0.9)])
def test_logits_that_are_none_are_an_error(dtype, row, settings):
    """In any row, and not the first token for ever."""
    z = np.array([(0.0, 1.0, 2.0), row, (0.0, 1.0, 2.0)]).astype(dtype)
    with pytest.raises(ValueError, match="logits are not finite"):
        sample(z, np.random.default_rng(0), *settings)


@pytest.mark.parametrize("settings", [(0, None, None), (1.0, None, None), (0.7, 2, None),
                                      (1.0, None, 0.999), (1e-310, None, None)])
def test_a_logit_of_minus_infinity_forbids_its_token(settings):
    z = np.array([[-math.inf, 1.0, 1.5, -math.inf]] * 200)
    drawn = set(sample(z, np.random.default_rng(0), *settings).tolist())
    assert drawn == ({1, 2} if settings[0] > 0.1 else {2})


@families
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_model_that_overflowed_does_not_write(family, settings):
    model = make(family)
    model.blocks[1].mlp.down.weight.data[0] = math.nan
    for B in (1, 2):
        with pytest.raises(ValueError, match="logits are not finite"):
            generate(model, prompts(0, B, 2), 3, **settings)


@given(z=logits_rows, seed=seeds, temperature=st.sampled_from([5e-324, 1e-310, 1e-307, 1e-200]),
       k=st.none() | st.integers(1, 15), p=st.none() | st.floats(0.01, 1))
def test_the_smallest_temperatures_take_the_likeliest(z, seed, temperature, k, p):
    z = np.array([z] * 20)
    drawn = sample(z, np.random.default_rng(seed), temperature, k, p)
    assert (z[0, drawn] == z[0].max()).all()


# Ends


@given(seed=seeds, ends=st.lists(st.integers(0, V + 3), max_size=4), B=st.integers(1, 3),
       pad=st.none() | st.integers(0, V), family=st.sampled_from([*CONFIGS]),
       settings=st.sampled_from(SETTINGS))
def test_each_row_stops_at_its_end(seed, ends, B, pad, family, settings):
    """What comes before is what is drawn without ends."""
    model, tokens, longest = make(family), prompts(seed, B, 2), 0
    model.ends = Ends(eos=tuple(ends), pad=pad)
    free = generate(model, tokens, 8, seed=seed, eos=(), **settings)
    found = generate(model, tokens, 8, seed=seed, **settings)
    for row, whole in zip(found, free):
        ended = np.flatnonzero(np.isin(whole[2:], ends))
        length = ended[0] + 1 if len(ended) else 8
        assert np.array_equal(row[: 2 + length], whole[: 2 + length])
        filling = pad if pad is not None else [*ends, 0][0]
        assert (row[2 + length :] == filling).all()
        longest = max(longest, length)
    assert found.shape == (B, 2 + longest) and found.dtype == np.int64


def test_an_end_in_the_prompt_ends_nothing():
    model, tokens = model_of("gpt2"), prompts(0, 1, 3)
    free = generate(model, tokens, 6, 0)
    unseen = next(int(id) for id in tokens[0] if id not in free[0, 3:])
    assert np.array_equal(generate(model, tokens, 6, 0, eos=unseen), free)


def test_bert_does_not_generate():
    with pytest.raises(ValueError, match="only a causal model"):
        stream(Transformer(Config.bert(V, CONTEXT, 1, 2, 8, hidden=8)), [[1]])


# scripts/generate.py


def save(folder, tokenizer, **changes):
    """A tiny model of bytes in a folder; returns the model."""
    config = Config.gpt2(tokenizer.vocab_size, 16, layers=1, heads=2, width=8, **changes)
    model = Transformer(config).eval()
    for p in model.parameters():
        p.data += np.random.default_rng(2).standard_normal(p.shape, np.float32)
    huggingface.save_model(model, folder)
    tokenizer.save(folder / "tokenizer.json")
    return model


def test_the_script_prints_what_generate_returns(tmp_path, capsys):
    """300 tokens of bytes: many characters of several bytes, broken ones among them."""
    tokenizer = ByteTokenizer()
    model = save(tmp_path, tokenizer)
    script.main(tmp_path, "Où ", 300, temperature=1.0, top_k=None, top_p=None, seed=3)
    printed, speed = capsys.readouterr()
    ids = generate(model, tokenizer.encode("Où ")[None], 300, seed=3)[0].tolist()
    end = ids.index(tokenizer.end) if tokenizer.end in ids else len(ids)
    assert printed == printable(tokenizer.decode(ids[:end])) + "\n"
    count, tokens, number, unit = speed.split()
    assert (int(count), tokens, unit) == (end - len("Où ".encode()), "tokens,", "tokens/s")
    assert float(number.replace(",", "")) > 0


def test_the_script_passes_its_settings_on(tmp_path, capsys):
    model = save(tmp_path, ByteTokenizer())
    for settings in (dict(), dict(temperature=0.5, seed=1), dict(top_k=2), dict(top_p=0.3)):
        script.main(tmp_path, "The ", 20, **settings)
        settings = dict(temperature=0.8, top_k=40, top_p=0.95) | settings
        ids = generate(model, [list(b"The ")], 20, **settings)[0]
        assert ByteTokenizer.end not in ids
        assert capsys.readouterr().out == printable(ByteTokenizer().decode(ids)) + "\n"


@pytest.mark.parametrize("tokenizer", [
    ByteTokenizer(), CharTokenizer("".join(sorted(set("naïve 数学 😀")))),
    BPETokenizer.train(["naïve 数学 😀 the cat"], 300),
], ids=lambda t: type(t).__name__)
def test_characters_come_whole_and_at_once(tokenizer, monkeypatch):
    """Each piece is printed with the token that completes it, and the pieces are the text."""
    text, pieces = "naïve 数学 😀 ", []
    monkeypatch.setattr(script, "print", lambda *text, **_: pieces.append(*text), raising=False)
    before, ids = tokenizer.encode("na").tolist(), tokenizer.encode(text).tolist()
    came = []

    def stream():
        for id in ids:
            if came:
                whole = tokenizer.decode(before + came)[2:]
                assert whole.endswith("\ufffd") or "".join(pieces) == whole
            came.append(id)
            yield id

    assert script.write(stream(), tokenizer, before) == len(ids)
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)


def test_an_incomplete_character_is_shown_at_the_end(capsys):
    assert script.write(iter("é😀".encode()[:-1]), ByteTokenizer(), [65]) == 5
    assert capsys.readouterr().out == "é\ufffd\n"


def test_special_tokens_print_nothing(capsys):
    assert script.write(iter([257, 97, 257, 98]), ByteTokenizer(), [256]) == 4
    assert capsys.readouterr().out == "ab\n"


class Words:
    """A tokenizer whose words begin with a space, but for a text's first one; 0 is special."""

    def decode(self, ids):
        return "".join(["", " the", " cat"][id] for id in ids).removeprefix(" ")


def test_a_word_keeps_the_space_in_front_of_it(capsys):
    assert script.write(iter([2, 0, 1, 0, 0, 2]), Words(), [1]) == 6
    assert capsys.readouterr().out == " cat the cat\n"


def test_the_script_lets_an_adapter_act(tmp_path, capsys):
    model = add_lora(save(tmp_path, ByteTokenizer()), 2, 4, "all-linear")
    for p in model.parameters():
        p.data += np.random.default_rng(0).normal(0, 0.3, p.shape).astype(np.float32)
    peft.save_adapter(model, tmp_path / "adapter")
    settings = dict(temperature=1.0, top_k=None, top_p=None, seed=3)

    def text():
        ids = generate(model, [list(b"The ")], 20, **settings)[0]
        return printable(ByteTokenizer().decode(ids)) + "\n"

    adapted = text()
    use_adapter(model, None)
    script.main(tmp_path, "The ", 20, **settings, adapter=tmp_path / "adapter")
    assert capsys.readouterr().out == adapted != text()


def test_the_script_keeps_weights_as_floats(tmp_path, monkeypatch, capsys):
    """Within the MB that are given; an adapter acts beside the codes then."""
    model = quantize_model(save(tmp_path / "model", ByteTokenizer()))
    save_model(model, tmp_path / "4 bits")
    ByteTokenizer().save(tmp_path / "4 bits" / "tokenizer.json")
    add_lora(model, 2, 4, "all-linear")
    for p in model.parameters():
        p.data += np.random.default_rng(0).normal(0, 0.3, p.shape).astype(np.float32)
    peft.save_adapter(model, tmp_path / "adapter")
    settings = dict(tokens=20, temperature=1.0, top_k=None, top_p=None, seed=3)
    for adapter in (None, tmp_path / "adapter"):
        use_adapter(model, adapter and "default")
        ids = generate(model, [list(b"The ")], 20, seed=3)[0]
        text = printable(ByteTokenizer().decode(ids)) + "\n"
        for megabytes, said in ((None, ""), (0, "0 weights kept as floats, 0.00 MB\n"),
                                (0.0005, "1 weight kept as floats, 0.00 MB\n"),
                                (1, "6 weights kept as floats, 0.00 MB\n")):
            script.main(tmp_path / "4 bits", adapter=adapter, dequantized=megabytes, **settings)
            printed = capsys.readouterr()
            assert printed.out == text and printed.err.startswith(said + "20 tokens, ")
    for folder, megabytes, words in (("model", 1, "generate.py: no layer of this model .* keep"),
                                     ("4 bits", -1, "generate.py: dequantized must be .* -1.0$")):
        line = run_script(monkeypatch, "--model", tmp_path / folder, "--dequantized", megabytes)
        assert re.match(words, line), line


def test_an_empty_prompt_starts_a_new_document(tmp_path, capsys):
    model = save(tmp_path, ByteTokenizer())
    script.main(tmp_path, "", 20, temperature=1.0, top_k=None, top_p=None)
    ids = generate(model, [[ByteTokenizer.end]], 20)[0, 1:]
    assert capsys.readouterr().out == printable(ByteTokenizer().decode(ids)) + "\n"


@pytest.mark.parametrize("ends", [Ends(), Ends(50256, (50256,))], ids=["none", "out of reach"])
@pytest.mark.parametrize("prompt", ["The ", ""])
def test_the_script_stops_where_the_document_ends(tmp_path, capsys, prompt, ends):
    """As the tokenizer says, if the folder names no end, or only one that the table has not."""
    model = save(tmp_path, ByteTokenizer(), tied=False)
    model.ends = ends
    model.norm.weight.data[:], model.norm.bias.data[:] = 0, 1
    model.head.weight.data[:] = 0
    model.head.weight.data[ByteTokenizer.end] = 1
    huggingface.save_model(model, tmp_path)
    script.main(tmp_path, prompt, 20, temperature=0)
    printed = capsys.readouterr()
    assert printed.out == prompt + "\n" and printed.err.startswith("0 tokens, ")


def writes(folder, letter):
    """A model that writes this letter, in a folder, and an adapter for it beside the folder."""
    model = save(folder, ByteTokenizer(), tied=False)
    model.norm.weight.data[:], model.norm.bias.data[:] = 0, 1
    model.head.weight.data[:] = 0
    model.head.weight.data[ord(letter)] = 1
    huggingface.save_model(model, folder)
    peft.save_adapter(add_lora(model, 1, 1), folder.parent / "adapter", base=folder)


def test_an_adapter_finds_its_base(tmp_path, monkeypatch, capsys):
    """The one that it names, not the newest model."""
    monkeypatch.chdir(tmp_path)
    for run, age in (("a", 10), ("b", 20)):
        writes(Path("runs") / run / "model", run)
        os.utime(f"runs/{run}/model/config.json", (1e9 - age, 1e9 - age))
    for run in "ab":
        script.main(tokens=5, temperature=0, adapter=Path("runs") / run / "adapter")
        printed = capsys.readouterr()
        assert printed.out == f"The {run * 5}\n" and printed.err.startswith(f"runs/{run}/model:\n")
    script.main(Path("runs/a/model"), tokens=0, adapter=Path("runs/b/adapter"))
    assert capsys.readouterr().err.startswith("runs/b/adapter was made for runs/b/model\n")
    for base, words in ((None, "does not name its model"), ("", "does not name its model"),
                        ("someone/gpt2", "names 'someone/gpt2', which is no folder here")):
        raw = read_json("runs/a/adapter/adapter_config.json") | {"base_model_name_or_path": base}
        write_json("runs/a/adapter/adapter_config.json", raw)
        line = run_script(monkeypatch, "--adapter", "runs/a/adapter")
        assert line == f"generate.py: runs/a/adapter {words}: give --model"
    assert run_script(monkeypatch, "--adapter", "nowhere").startswith("generate.py: nowhere")


def test_a_date_that_is_still_to_come_is_no_newest(tmp_path, monkeypatch):
    now = time.time()
    for run, date in (("a", now - 10), ("b", now + 30), ("c", now - 5)):
        save(tmp_path / run / "model", ByteTokenizer())
        os.utime(tmp_path / run / "model" / "config.json", (date, date))
    assert newest_model(tmp_path).parent.name == "b"  # a server's clock may be ahead
    os.utime(tmp_path / "c" / "model" / "config.json", (now + 9e5, now + 9e5))
    with pytest.raises(ValueError, match=r"c/model is dated .* still to come.*: give --model"):
        newest_model(tmp_path)
    assert newest_model(tmp_path, "[ab]").parent.name == "b"
    assert newest_model(tmp_path, "c").parent.name == "c"  # no other can be meant


def test_without_a_model_the_newest_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for run, age in (("pretrain-9", 20), ("pretrain-10", 10), ("other-1", 30)):
        save(tmp_path / "runs" / run / "model", ByteTokenizer())
        config = tmp_path / "runs" / run / "model" / "config.json"
        os.utime(config, (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "stopped-1" / "model").mkdir(parents=True)
    assert newest_model(tmp_path / "runs").parent.name == "pretrain-10"
    script.main(tokens=0)
    assert capsys.readouterr().out == "The \n"


def run_script(monkeypatch, *arguments):
    """What the script's process ends with: an error line, or None."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    try:
        runpy.run_path(script.__file__, run_name="__main__")
    except SystemExit as error:
        return error.code


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model", ByteTokenizer())
    model = ("--model", tmp_path / "model")
    bert = Transformer(Config.bert(258, 16, 1, 2, 8, hidden=8))
    huggingface.save_model(bert, tmp_path / "bert")
    ByteTokenizer().save(tmp_path / "bert" / "tokenizer.json")
    save(tmp_path / "bare", ByteTokenizer())
    (tmp_path / "bare" / "tokenizer.json").unlink()
    cases = {
        (): "no model in runs/*/model: run pretrain.py first, or give --model",
        ("--model", "nowhere"): "nowhere: there is no such folder",
        ("--model", tmp_path / "bare"): "tokenizer.json",
        ("--model", tmp_path / "bert"): "bert fills in masked tokens; only a causal model writes",
        (*model, "--temperature", "-1"): "temperature=-1.0: expected a number from 0 up",
        (*model, "--top-k", "0"): "top_k=0",
        (*model, "--top-p", "2"): "top_p=2.0",
        (*model, "--tokens", "-1"): "tokens must not be negative, got -1",
        (*model, "--seed", "-1"): "seed=-1: expected 0, 1, 2, ...",
    }
    for arguments, message in cases.items():
        line = run_script(monkeypatch, *arguments)
        assert line.startswith("generate.py: ") and message in line and "\n" not in line
        assert capsys.readouterr().out == ""
    assert run_script(monkeypatch, *model, "--tokens", "1", "--top-k", "None") is None
    assert capsys.readouterr().out.startswith("The ")
