"""minilm.interop.huggingface: what is saved comes back bit for bit, older spellings and shards
load, a damaged or unsupported folder raises FormatError naming the key or field, and (marked
peers) transformers computes the same logits from the same files, whoever wrote them."""

import copy
import dataclasses
import json
import os
import random
import shutil

import ml_dtypes
import numpy as np
import pytest

from minilm.files import FormatError, read_json, write_json
from minilm.interop.config_json import read_config
from minilm.interop.families import FAMILIES
from minilm.interop.huggingface import finite, load_model, save_model
from minilm.interop.shards import some
from minilm.nn import Linear as LinearLayer
from minilm.nn import Module
from minilm.rope import Dynamic, Linear, Llama3, Long, Yarn
from minilm.shapes import tensor_shapes
from minilm.tensor import Tensor
from minilm.tensorfiles import read_tensors, write_tensors
from minilm.transformer import Config, Transformer

SMALL = dict(vocab_size=23, context=11, layers=2, heads=4, width=16)
GEMMA = dict(hidden=24, activation="geglu_tanh", norm_plus_one=True, scaled_embedding=True,
             tied=True, norm_both=True)
CONFIGS = {
    "gpt2": Config.gpt2(**SMALL),
    "gpt2-untied": Config.gpt2(**SMALL, tied=False, activation="gelu", hidden=24),
    "llama": Config.llama(**SMALL, hidden=24),
    "llama-gqa": Config.llama(**SMALL, hidden=24, kv_heads=2, tied=True, rope_theta=500.0),
    "llama-bias": Config.llama(**SMALL, hidden=24, kv_heads=1, bias=True, norm_eps=1e-5),
    "llama-3": Config.llama(**SMALL, hidden=24, head_width=6, rope=Llama3(8.0, 4)),
    "llama-long": Config.llama(**SMALL, hidden=24, rope=Long((1.0, 2.0), (3.0, 4.5), 5, 1.5)),
    "llama-yarn": Config.llama(**SMALL, hidden=24, rope=Yarn(2.0, 5, truncate=False)),
    "llama-dynamic": Config.llama(**SMALL | dict(context=22), hidden=24, rope=Dynamic(2.0, 11)),
    "mistral": Config.llama(**SMALL, hidden=24, window=3, rope=Linear(2.0)),
    "qwen2": Config.llama(**SMALL, hidden=24, bias=("q", "k", "v"), window=4, unwindowed=(0,)),
    "qwen3": Config.llama(**SMALL, hidden=24, qk_norm="head", head_width=8, norm_eps=1e-5),
    "smollm3": Config.llama(**SMALL, hidden=24, unrotated=(1,), tied=True),
    "olmo2": Config.llama(**SMALL, hidden=24, qk_norm="width", norm_output=True),
    "olmo3": Config.llama(**SMALL, hidden=24, qk_norm="width", norm_output=True, window=4,
                          unwindowed=(1,), rope=Yarn(2.0, 5), window_theta=10000.0),
    "gemma": Config.llama(**SMALL, hidden=24, activation="geglu_tanh", norm_plus_one=True,
                          scaled_embedding=True, tied=True, head_width=8),
    "gemma2": Config.llama(**SMALL, **GEMMA, window=4, unwindowed=(1,), attention_cap=5.0,
                           logits_cap=3.0, attention_scale=25**-0.5),
    "gemma3_text": Config.llama(**SMALL, **GEMMA, window=20, unwindowed=(1,), qk_norm="head",
                                rope=Linear(8.0), rope_theta=50.0, window_theta=7.0),
    "bert": Config.bert(**SMALL, hidden=24, norm_eps=1e-6),
    "bert-untied": Config.bert(**SMALL, hidden=24, segments=3, tied=False),
    "distilbert": Config.bert(**SMALL, hidden=24, segments=0),
    "distilbert-untied": Config.bert(**SMALL, hidden=24, segments=0, tied=False),
}
MODEL_TYPES = {"gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "olmo3", "gemma",
               "gemma2", "gemma3_text", "bert", "distilbert"}
TOKENS = np.random.default_rng(5).integers(0, 23, (3, 9))
MASK = (np.arange(9) < np.array([[9], [6], [1]])).astype(np.int64)


def noisy(config, seed=0):
    """A model with noise on every parameter: fresh norms and biases would hide swaps."""
    model, rng = Transformer(config, seed), np.random.default_rng(seed + 1)
    for _, t in model.named_tensors():
        t.data += rng.normal(0, 0.15, t.shape).astype(np.float32)
    return model.eval()


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """What a crash would leave is the matter of test_files."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: (model, its folder)}; nobody writes into the folders."""
    root, models = tmp_path_factory.mktemp("saved"), {n: noisy(c) for n, c in CONFIGS.items()}
    for name, model in models.items():
        save_model(model, root / name)
    return {name: (model, root / name) for name, model in models.items()}


@pytest.fixture
def edit(saved, tmp_path):
    """edit(name, field=value, ...) -> a copy of the folder with other fields in config.json."""

    def copy(name, tensors=None, drop=(), **changes):
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(saved[name][1], folder)
        raw = read_json(folder / "config.json") | changes
        write_json(folder / "config.json", {k: v for k, v in raw.items() if k not in drop})
        if tensors:
            file = folder / "model.safetensors"
            write_tensors(file, tensors(read_tensors(file)))
        return folder

    return copy


def same(a, b):
    """Equal names, dtypes and bits."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(saved, name):
    model, folder = saved[name]
    loaded = load_model(folder)
    assert loaded.config == model.config
    assert same(loaded, model)
    head = loaded.head.out if loaded.config.head == "masked" else loaded.head
    assert (head.weight is loaded.embed.weight) == loaded.config.tied
    assert np.array_equal(loaded(TOKENS, MASK).data, model(TOKENS, MASK).data)
    loaded(TOKENS).sum().backward()
    assert all(t.grad is not None and t.grad.dtype == np.float32 for t in loaded.parameters())


def test_every_family_that_can_be_written_is(saved):
    assert {read_json(folder / "config.json")["model_type"] for _, folder in saved.values()} == (
        MODEL_TYPES
    )


def test_a_saved_folder_is_the_same_bytes_again(saved, tmp_path):
    for name, (model, folder) in saved.items():
        save_model(load_model(folder), tmp_path)  # over the one before
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), name
        assert same(load_model(tmp_path), model)


def test_gpt2_layout(saved):
    """Conv1D holds (I, O), and c_attn is q, k, v side by side."""
    model, folder = saved["gpt2"]
    tensors, own = read_tensors(folder / "model.safetensors"), model.blocks[1].attention
    q, k, v = np.split(tensors["transformer.h.1.attn.c_attn.weight"], 3, axis=1)
    assert np.array_equal(q, own.q.weight.data.T) and np.array_equal(k, own.k.weight.data.T)
    assert np.array_equal(v, own.v.weight.data.T)
    assert np.array_equal(tensors["transformer.h.1.attn.c_attn.bias"][16:32], own.k.bias.data)
    assert tensors["transformer.h.0.mlp.c_fc.weight"].shape == (16, 64)
    assert "lm_head.weight" not in tensors


def redrawn(folder):
    """Replace the values of the folder's tensors by fixed draws, key by key."""
    rng, file = np.random.default_rng(0), folder / "model.safetensors"
    draws = {k: rng.standard_normal(a.shape, np.float32) / 4 for k, a in read_tensors(file).items()}
    if "cls.predictions.bias" in draws:
        draws["cls.predictions.decoder.bias"] = draws["cls.predictions.bias"]
    write_tensors(file, draws)
    return folder


STORED = {  # logits[1, 5, :4] of TOKENS and MASK by transformers 5.23.0 in redrawn folders
    "gpt2": [0.1110266, -0.2698493, -0.4967726, -0.0487091],
    "llama-gqa": [-0.4121235, 0.0065685, -0.1814243, 0.5295567],
    "llama-bias": [-0.0301832, 0.1616253, -0.2288274, 0.3486558],
    "bert": [0.0759850, -0.3997967, 0.1851802, 0.1486349],
    "distilbert": [0.2259667, -0.5661360, 0.1252403, 0.4439188],
}


@pytest.mark.parametrize("name", STORED)
def test_stored_logits_of_transformers(edit, name):
    """Every tensor is where transformers has it: a swap of two would change these."""
    logits = load_model(redrawn(edit(name)))(TOKENS, MASK).data
    assert np.abs(logits[1, 5, :4] - STORED[name]).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "bert"])
def test_dtypes(saved, tmp_path, name, dtype):
    """A model is saved in its dtype, and loaded from any into any."""
    model, folder = saved[name]
    narrow = load_model(folder, dtype)
    assert {t.dtype.name for _, t in narrow.named_tensors()} == {dtype}
    save_model(narrow, tmp_path / "narrow")
    raw = read_json(tmp_path / "narrow" / "config.json")
    assert raw["dtype"] == raw["torch_dtype"] == dtype
    assert same(load_model(tmp_path / "narrow", dtype), narrow)
    wide = load_model(tmp_path / "narrow").state_dict()
    for key, array in model.state_dict().items():
        assert wide[key].dtype == np.float32
        assert np.array_equal(wide[key], array.astype(dtype).astype(np.float32))


def test_bad_dtype(saved):
    with pytest.raises(ValueError, match="int8"):
        load_model(saved["gpt2"][1], dtype="int8")


def test_dropout_is_the_callers(saved, edit, tmp_path):
    assert load_model(edit("gpt2", embd_pdrop=0.1, resid_pdrop=0.1)).config.dropout == 0.0
    model = load_model(saved["gpt2"][1], dropout=0.3)
    assert model.config.dropout == model.drop.p == model.blocks[1].drop.p == 0.3
    save_model(model, tmp_path / "again")
    assert load_model(tmp_path / "again").config == saved["gpt2"][0].config


def test_a_window_of_all_the_context_is_none(saved, tmp_path):
    model, _ = saved["llama"]
    save_model(Transformer(dataclasses.replace(model.config, window=11)), tmp_path)
    assert load_model(tmp_path).config == model.config


def shard(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """Turn the folder's file into two shards and an index."""
    tensors = read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        write_tensors(folder / name, {k: tensors[k] for k, n in places.items() if n == name})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "bert"])
def test_shards(saved, edit, name):
    folder = edit(name)
    shard(folder)
    assert same(load_model(folder), saved[name][0])


def test_damaged_shards(edit):
    folder = edit("llama")
    shard(folder)
    index, second = folder / "model.safetensors.index.json", "model-00002-of-00002.safetensors"
    raw, tensors = read_json(index), read_tensors(folder / second)
    gone, first = next(iter(tensors)), next(k for k, n in raw["weight_map"].items() if n != second)

    write_tensors(folder / second, {k: a for k, a in tensors.items() if k != gone})
    expect(folder, index, "missing", gone)
    write_tensors(folder / second, tensors | {first: tensors[gone]})
    expect(folder, folder / second, first)
    write_tensors(folder / second, tensors)
    for name in ("../model.safetensors", "/etc/passwd", "a\0.safetensors", "", "model.bin", 7):
        write_json(index, {"weight_map": raw["weight_map"] | {gone: name}})
        expect(folder, index, repr(str(name)))
    write_json(index, raw)
    (folder / second).unlink()
    expect(folder, index, second)
    for weight_map in (None, [], "model.safetensors"):
        write_json(index, {"weight_map": weight_map})
        expect(folder, index, "weight_map")


def expect(folder, path, *texts):
    """load_model raises FormatError of that path with those texts."""
    with pytest.raises(FormatError) as info:
        load_model(folder)
    assert str(info.value).startswith(f"{path}: ")
    assert all(text in str(info.value) for text in texts), str(info.value)


def renamed(*pairs):
    def rename(tensors):
        for old, new in pairs:
            tensors = {k.replace(old, new): a for k, a in tensors.items()}
        return tensors

    return rename


OLD = {  # what older writers have: (model, change of the tensors, fields to drop, fields to change)
    "gpt2 without prefix, with buffers": (
        "gpt2",
        lambda t: (
            renamed(("transformer.", ""))(t)
            | {"h.1.attn.bias": np.ones((1, 1, 11, 11), np.uint8)}
            | {"h.1.attn.masked_bias": np.float32([-1e4])}
        ),
        ["n_inner", "tie_word_embeddings", "activation_function"],
        {},
    ),
    "gpt2 with its tied head": (
        "gpt2",
        lambda t: t | {"lm_head.weight": t["transformer.wte.weight"]},
        [],
        {"n_inner": None},
    ),
    "gpt2 with nothing but its tied head": (
        "gpt2",
        renamed(("transformer.wte.weight", "lm_head.weight")),
        [],
        {"activation_function": "gelu_pytorch_tanh", "reorder_and_upcast_attn": True},
    ),
    "llama of version 4": (
        "llama-gqa",
        lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)},
        ["rope_parameters", "head_dim", "mlp_bias"],
        {"rope_scaling": None, "pretraining_tp": 1},
    ),
    "llama with an old default rope_scaling": (
        "llama-gqa",
        None,
        ["rope_parameters"],
        {"rope_scaling": {"type": "default"}},
    ),
    "llama of version 5": ("llama-gqa", None, ["rope_theta", "torch_dtype"], {}),
    "llama before grouped queries": ("llama", None, ["num_key_value_heads", "rope_theta"], {}),
    "gemma 2 of version 4": ("gemma2", None, ["rope_parameters", "layer_types"],
                             {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
    "gemma 3 of version 4": ("gemma3_text", None, ["rope_parameters", "layer_types"],
                             {"sliding_window_pattern": 2}),
    "mistral": ("llama-gqa", None, [], {"model_type": "mistral", "sliding_window": 11}),
    "mistral by default": ("llama-gqa", None, [], {"model_type": "mistral"}),
    "bert of pretraining": (
        "bert",
        lambda t: (
            renamed(("LayerNorm.weight", "LayerNorm.gamma"), ("Norm.bias", "Norm.beta"))(t)
            | {
                "cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"],
                "bert.embeddings.position_ids": np.arange(11)[None],
                "bert.pooler.dense.weight": np.ones((16, 16), np.float32),
                "bert.pooler.dense.bias": np.ones(16, np.float32),
                "cls.seq_relationship.weight": np.ones((2, 16), np.float32),
                "cls.seq_relationship.bias": np.ones(2, np.float32),
            }
        ),
        ["hidden_act"],
        {"position_embedding_type": "absolute", "gradient_checkpointing": False},
    ),
    "bert with its bias once": (
        "bert",
        lambda t: {k: a for k, a in t.items() if k != "cls.predictions.decoder.bias"},
        [],
        {},
    ),
    "distilbert": (
        "distilbert",
        lambda t: t | {"vocab_projector.weight": t["distilbert.embeddings.word_embeddings.weight"]},
        ["tie_word_embeddings"],
        {"sinusoidal_pos_embds": True, "tie_weights_": True, "qa_dropout": 0.1},
    ),
}


@pytest.mark.parametrize("what", OLD)
def test_older_spellings(saved, edit, what):
    name, tensors, drop, changes = OLD[what]
    model, _ = saved[name]
    loaded = load_model(edit(name, tensors, drop, **changes))
    assert loaded.config == model.config
    assert same(loaded, model)


def test_phi3_as_it_was_published(saved):
    """The context before it was stretched stands beside rope_scaling, whose type has its old name.
    """
    raw = read_json(saved["llama-long"][1] / "config.json")
    del raw["rope_parameters"]
    rope, field = raw["rope_scaling"] | {"rope_type": "su"}, "original_max_position_embeddings"
    raw |= {"model_type": "phi3", field: rope.pop(field), "rope_scaling": rope}
    assert read_config(raw)[1].rope == CONFIGS["llama-long"].rope
    with pytest.raises(ValueError, match=f"{field} is 6, expected 5 as below"):
        read_config(raw | {field: 6, "rope_scaling": rope | {field: 5}})


REFUSED = [  # (model, field, value) that would change the logits or that is no value of the field
    ("gpt2", "model_type", "gptj"),
    ("gpt2", "model_type", ["gpt2"]),
    ("gpt2", "activation_function", "relu"),
    ("gpt2", "activation_function", 3),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "add_cross_attention", True),
    ("gpt2", "quantization_config", {"load_in_4bit": True}),
    ("gpt2", "n_embd", 16.0),
    ("gpt2", "n_embd", None),
    ("gpt2", "n_head", 0),
    ("gpt2", "n_layer", -1),
    ("gpt2", "n_layer", True),
    ("gpt2", "vocab_size", "23"),
    ("gpt2", "layer_norm_epsilon", 0),
    ("gpt2", "layer_norm_epsilon", None),
    ("gpt2", "tie_word_embeddings", None),
    ("gpt2", "tie_word_embeddings", 1),
    ("llama", "hidden_act", "gelu"),
    ("llama", "attention_bias", "no"),
    ("llama", "mlp_bias", "no"),
    ("llama", "head_dim", 0),
    ("llama", "is_causal", False),
    ("gpt2", "is_causal", False),
    ("llama", "num_key_value_heads", 0),
    ("llama", "sliding_window", 10),
    ("llama", "rope_theta", -1.0),
    ("llama", "rope_theta", 10**39),
    ("llama", "rope_theta", 500000.0),
    ("llama", "rope_scaling", {"type": "linear", "factor": -2.0}),
    ("llama", "rope_scaling", {"type": "linear"}),
    ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}),  # rope_parameters says default
    ("llama", "rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
    ("llama", "rope_parameters", {"rope_type": ["default"]}),
    ("llama", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ("llama", "rope_parameters", [1]),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "rms_norm_eps", "1e-6"),
    ("gemma2", "use_bidirectional_attention", True),
    ("gemma3_text", "use_bidirectional_attention", True),
    ("gemma2", "hidden_activation", "gelu"),
    ("gemma2", "sliding_window", None),
    ("gemma2", "layer_types", ["full_attention"]),
    ("gemma2", "query_pre_attn_scalar", 25.0),
    ("gemma2", "attn_logit_softcapping", 0.0),
    ("gemma2", "final_logit_softcapping", "30"),
    ("gemma3_text", "attn_logit_softcapping", 50.0),  # which transformers does not apply
    ("gemma3_text", "rope_parameters", {"rope_type": "default", "rope_theta": 50.0}),
    ("gemma3_text", "rope_parameters", {"sliding_attention": {"rope_type": "linear",
                                                              "factor": 2.0}}),
    ("gemma3_text", "rope_scaling", {"type": "longrope", "short_factor": [1.0, 1.0],
                                     "long_factor": [2.0, 2.0], "factor": 2.0}),
    ("gemma3_text", "rope_local_base_freq", 8.0),  # rope_parameters says 7
    ("gemma3_text", "rope_theta", 51.0),
    ("gemma2", "head_dim", 0),
    ("bert", "hidden_act", "gelu_new"),
    ("bert", "is_decoder", True), ("llama", "is_causal", False), ("gpt2", "is_causal", False),
    ("bert", "is_causal", True), ("distilbert", "is_causal", True),
    ("bert", "position_embedding_type", "relative_key"),
    ("bert", "type_vocab_size", 0),
    ("distilbert", "activation", "relu"),
]


@pytest.mark.parametrize("name, field, value", REFUSED)
def test_refused_fields(edit, name, field, value):
    folder = edit(name, **{field: value})
    expect(folder, folder / "config.json", field)


@pytest.mark.parametrize("field", ["n_embd", "n_layer", "n_head", "vocab_size", "model_type"])
def test_missing_fields(edit, field):
    folder = edit("gpt2", drop=[field])
    expect(folder, folder / "config.json", field)


def test_a_model_of_text_and_images_is_refused_with_a_word_on_its_text(edit):
    folder = edit("gpt2", model_type="gemma3", text_config={"model_type": "gemma3_text"})
    expect(folder, folder / "config.json", "model_type is 'gemma3'",
           "text_config is 'gemma3_text': save its language_model and head as one")


def test_refused_combinations(edit):
    folder = edit("gpt2", hidden_size=17)
    expect(folder, folder / "config.json", "hidden_size", "n_embd")
    folder = edit("llama", rope_scaling={"type": "linear", "rope_type": "dynamic", "factor": 2})
    expect(folder, folder / "config.json", "type", "dynamic")
    folder = edit("llama", drop=["num_key_value_heads"], model_type="mistral")  # 8 by default
    expect(folder, folder / "config.json", "kv_heads")
    folder = edit("gpt2", n_head=3)
    expect(folder, folder / "config.json", "width 16")


@pytest.mark.parametrize("size, key", [("vocab_size", "wte"), ("n_positions", "wpe"),
                                       ("n_inner", "c_fc")])
def test_an_absurd_size_asks_for_no_memory(edit, size, key):
    folder = edit("gpt2", **{size: 10**12})
    expect(folder, folder / "model.safetensors", key, "expected float", "1000000000000")


def test_absurd_layers_are_refused_before_anything_is_built(edit, monkeypatch):
    """Few numbers in many layers: each claimed layer would be some twenty objects."""
    monkeypatch.setattr("minilm.interop.huggingface.Transformer", None)
    folder = edit("gpt2", n_layer=29)
    expect(folder, folder / "config.json", "n_layer is 29, but model.safetensors holds 28 tensors")
    folder = edit("gpt2", n_layer=28)
    expect(folder, folder / "model.safetensors", "missing keys: transformer.h.10.attn")
    folder = edit("gpt2", n_layer=240_000)
    expect(folder, folder / "config.json", "n_layer is 240000, expected at most 100000")


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_the_model(name):
    built = {path: t.shape for path, t in Transformer(CONFIGS[name]).named_tensors()}
    assert tensor_shapes(CONFIGS[name]) == built


@pytest.mark.parametrize("dtype, value, ours", [
    (np.float32, np.nan, "float32"), (np.float32, -np.inf, "float32"),
    (np.float64, 1e39, "float32"), (np.float32, 65520.0, "float16"),
    (ml_dtypes.bfloat16, np.inf, "float64"),
])
def test_numbers_that_are_not_finite_are_refused(edit, dtype, value, ours):
    """Also those that would become infinite in the model's dtype."""
    key = "transformer.h.1.attn.c_attn.weight"

    def spoil(tensors):
        array = tensors[key].astype(dtype)
        array[3, 2] = value
        return tensors | {key: array}

    folder = edit("gpt2", spoil)
    with pytest.raises(FormatError, match=f"{key} has numbers that are not finite in {ours}"):
        load_model(folder, ours)


def test_a_signalling_nan_is_refused_without_a_warning(tmp_path):
    array = np.array([32641], np.uint16).view(ml_dtypes.bfloat16)
    with pytest.raises(FormatError, match="x has numbers that are not finite"):
        finite(tmp_path, "x", array, "bfloat16")


def test_a_shard_with_a_name_that_no_folder_can_hold(edit):
    folder = edit("llama")
    shard(folder)
    index = folder / "model.safetensors.index.json"
    name = "m" * 300 + ".safetensors"
    write_json(index, {"weight_map": dict.fromkeys(read_json(index)["weight_map"], name)})
    expect(folder, folder / name, "cannot be read")


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "bert-untied", "distilbert"])
def test_every_key_is_needed(saved, edit, name):
    """A key less, one more, one of another shape or dtype: the error names it."""
    folder = edit(name)
    file = folder / "model.safetensors"
    tensors = read_tensors(file)
    for key in tensors:
        if key.startswith("cls.predictions") and key.endswith(".bias"):
            continue  # one of two copies may be absent
        write_tensors(file, {k: a for k, a in tensors.items() if k != key})
        expect(folder, file, f"missing keys: {key}")
        larger = np.concatenate([tensors[key], tensors[key][:1]])
        write_tensors(file, tensors | {key: larger})
        expect(folder, file, key, f"{larger.shape}, expected float {tensors[key].shape}")
        write_tensors(file, tensors | {key: tensors[key].astype(np.int32)})
        expect(folder, file, f"{key} is int32")
    write_tensors(file, tensors | {"adapter.weight": np.zeros(3, np.float32)})
    expect(folder, file, "unexpected keys: adapter.weight")


def test_gpt2_weights_the_wrong_way_round(edit):
    folder = edit("gpt2", lambda t: t | {"transformer.h.0.mlp.c_fc.weight": np.ones((64, 16))})
    expect(folder, folder / "model.safetensors", "h.0.mlp.c_fc", "(64, 16)", "(16, 64)")


def test_refused_copies_and_spellings(edit):
    embed = "transformer.wte.weight"
    folder = edit("gpt2", lambda t: t | {"wte.weight": t[embed]})
    expect(folder, folder / "model.safetensors", embed, "two spellings")
    folder = edit("bert", lambda t: t | {"cls.predictions.bias": t["cls.predictions.bias"] + 1})
    expect(folder, folder / "model.safetensors", "cls.predictions.bias")
    folder = edit("gpt2", tie_word_embeddings=False)
    expect(folder, folder / "model.safetensors", "missing keys: lm_head.weight")


@pytest.mark.parametrize("name, head, embed", [
    ("gpt2", "lm_head", "transformer.wte"), ("llama-gqa", "lm_head", "model.embed_tokens"),
    ("bert", "cls.predictions.decoder", "bert.embeddings.word_embeddings")])
def test_a_head_of_other_numbers_is_not_tied(saved, edit, tmp_path, name, head, embed):
    folder = edit(name, lambda t: t | {f"{head}.weight": t[f"{embed}.weight"] + 1})
    model = load_model(folder)
    own = model.head.out if model.config.head == "masked" else model.head
    assert model.config == dataclasses.replace(saved[name][0].config, tied=False)
    assert np.array_equal(own.weight.data, model.embed.weight.data + 1)
    save_model(model, tmp_path / "again")
    assert read_json(tmp_path / "again" / "config.json")["tie_word_embeddings"] is False
    assert same(load_model(tmp_path / "again"), model)


def test_many_wrong_keys_make_a_short_message(edit):
    folder = edit("gpt2", renamed(("transformer.", "module.")))
    expect(folder, folder / "model.safetensors", "missing keys: ", "unexpected keys: ", "more")
    with pytest.raises(FormatError) as info:
        load_model(folder)
    assert len(str(info.value)) < 1000
    assert some("edcba") == "a, b, c, d, e" and some("fedcba") == "a, b, c, d, e and 1 more"


def test_absent_files(saved, edit, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)
    folder = edit("gpt2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_model(folder)


INEXPRESSIBLE = {
    "norm": Config.gpt2(**SMALL, norm="rms"),
    "positions": Config.llama(**SMALL, hidden=24, positions="learned"),
    "activation": Config.gpt2(**SMALL, activation="swiglu"),
    "bias": Config.gpt2(**SMALL, bias=False),
    "kv_heads": Config.gpt2(**SMALL, kv_heads=2),
    "norm_first": Config.bert(**SMALL, hidden=24, norm_first=True),
    "causal": Config.llama(**SMALL, hidden=24, causal=False),
    "head": Config.llama(**SMALL, hidden=24, head="masked"),
    "norm_eps": Config.bert(**SMALL, hidden=24, segments=0, norm_eps=1e-5),
    "segments": Config.gpt2(**SMALL, segments=2),
    "norm_both": Config.llama(**SMALL, hidden=24, norm_both=True),
    "attention_scale": Config.llama(**SMALL, hidden=24, attention_scale=0.3),
    "logits_cap": Config.llama(**SMALL, hidden=24, logits_cap=3.0),
}


@pytest.mark.parametrize("field", INEXPRESSIBLE)
def test_inexpressible_configs(tmp_path, field):
    with pytest.raises(ValueError, match="norm" if field == "positions" else field):
        save_model(Transformer(INEXPRESSIBLE[field]), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_foreign_modules(tmp_path):
    class Scaled(LinearLayer):
        pass

    model = Transformer(CONFIGS["gpt2"])
    rng = np.random.default_rng(0)
    model.replace("blocks.1.mlp.up", Scaled(16, 64, rng))
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up: Scaled"):
        save_model(model, tmp_path / "x")
    model.replace("blocks.1.mlp.up", LinearLayer(16, 60, rng))
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up\.weight: \(60, 16\)"):
        save_model(model, tmp_path / "x")
    model = Transformer(CONFIGS["llama"])
    model.replace("head", LinearLayer(16, 23, rng))
    with pytest.raises(ValueError, match=r"head\.bias"):
        save_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma", "bert", "distilbert"])
@pytest.mark.parametrize("end", ["head", "embed"])
def test_a_head_that_was_tied_is_saved_by_itself(tmp_path, name, end):
    """As after an adapter with a head of its own was merged."""
    model = noisy(CONFIGS[name])
    masked = model.config.head == "masked"
    path = end if end == "embed" or not masked else "head.out"
    layer = copy.copy(dict(model.named_modules())[path])
    layer.weight = Tensor(np.random.default_rng(7).standard_normal(layer.weight.shape, np.float32))
    model.replace(path, layer)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert model.config.tied and not loaded.config.tied
    assert np.array_equal(loaded(TOKENS, MASK).data, model(TOKENS, MASK).data)


class Wrapped(Module):
    def __init__(self, module):
        self.module = module


@pytest.mark.parametrize("path, changes, given", [
    ("blocks.1", dict(norm_first=False), r"blocks\.1\.norm_first: False"),
    ("blocks.1", dict(activation="gelu"), r"blocks\.1\.mlp\.activation: gelu"),
    ("blocks.1.mlp", dict(activation="gelu"), r"blocks\.1\.mlp\.activation: gelu"),
    ("blocks.1.attention", dict(causal=False), r"blocks\.1\.attention\.causal: False"),
    ("blocks.1.attention", dict(heads=2, kv_heads=2), r"blocks\.1\.attention\.heads: 2"),
    ("blocks.1.norm2", dict(norm_eps=1e-3), r"blocks\.1\.norm2\.eps: 0\.001"),
    *((path, None, rf"differing: {path}") for path in (
        "blocks.1", "blocks.1.mlp", "blocks.1.attention", "blocks.1.norm1", "embed", "head",
        "norm")),
])
def test_modules_that_config_does_not_mean(tmp_path, path, changes, given):
    """Also those of the same shapes: config.json could not say what they do."""
    model, c = Transformer(CONFIGS["gpt2"]), CONFIGS["gpt2"]
    modules = dict(model.named_modules())
    if changes:
        other = Transformer(dataclasses.replace(c, **changes))
        modules = dict(other.named_modules())
    model.replace(path, modules[path] if changes else Wrapped(modules[path]))
    with pytest.raises(ValueError, match=given):
        save_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


VALUES = [None, True, False, 0, -1, 1, 2, 3, 10**5, 10**400, 0.5, 1e308, "", "gelu", "\ud800", [],
          {}, [1], {"a": 1}, {"rope_type": {}}, {"rope_theta": "x"},
          {"type": "dynamic", "factor": 1e300}, {"type": "yarn", "factor": 2, "beta_fast": []},
          {"type": "longrope", "short_factor": [1, "2"], "long_factor": [1, 2]},
          {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1},
          ["sliding_attention", "full_attention"], [0, 2]]


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "llama-yarn", "qwen2", "smollm3", "gemma2",
                                  "gemma3_text", "bert", "distilbert"])
def test_fuzzed_config(edit, name):
    """Any value in any field, and any damaged bytes: a model or FormatError."""
    folder, rng = edit(name), random.Random(0)
    file = folder / "config.json"
    raw, data = read_json(file), file.read_bytes()
    for field in [*raw, *FAMILIES[raw["model_type"]].only, "rope_scaling", "sliding_window",
                  "use_sliding_window", "sliding_window_pattern", "no_rope_layer_interval",
                  "max_window_layers"]:
        for value in VALUES:
            file.write_text(json.dumps(raw | {field: value}))
            only_format_errors(folder)
    for value in VALUES:
        file.write_text(json.dumps(value))
        expect(folder, file)
    for _ in range(100):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            broken[rng.randrange(len(broken))] = rng.choice(b'0123456789-"{}[],: anx\xff')
        file.write_bytes(broken)
        only_format_errors(folder)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_fuzzed_tensors(edit, dtype):
    """Half of the damage goes to the header, where it can matter."""
    folder = edit("llama-gqa", lambda t: {k: a.astype(dtype) for k, a in t.items()})
    file, rng = folder / "model.safetensors", random.Random(0)
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for i in range(120):
        broken = bytearray(data[: rng.randrange(len(data))] if i % 5 == 0 else data)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(broken) if i % 2 else min(len(broken), header))
            broken[place] = rng.randrange(256)
        file.write_bytes(broken)
        only_format_errors(folder)


def test_fuzzed_index(edit):
    folder, rng = edit("llama"), random.Random(0)
    shard(folder)
    file = folder / "model.safetensors.index.json"
    data = file.read_bytes()
    for _ in range(100):
        broken = bytearray(data)
        broken[rng.randrange(len(broken))] = rng.choice(b'0129-"{}[],: anx/\\\xff')
        file.write_bytes(broken)
        only_format_errors(folder)


def only_format_errors(folder):
    try:
        load_model(folder)
    except FormatError:
        pass


@pytest.fixture(scope="session")
def peer():
    """(torch, transformers), offline."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    transformers = pytest.importorskip("transformers")
    import torch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


LLAMA = dict(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=11)
GPT2 = dict(vocab_size=23, n_embd=16, n_layer=2, n_head=4, n_positions=11)
PEERS = {  # (architecture, its config)
    "gpt2": ("GPT2", "LMHeadModel", GPT2),
    "gpt2-untied": ("GPT2", "LMHeadModel", GPT2 | dict(tie_word_embeddings=False, n_inner=24)),
    "gpt2-erf": ("GPT2", "LMHeadModel", GPT2 | dict(activation_function="gelu")),
    "llama": ("Llama", "ForCausalLM", LLAMA),
    "llama-gqa-tied": (
        "Llama",
        "ForCausalLM",
        LLAMA | dict(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5),
    ),
    "llama-theta": (
        "Llama",
        "ForCausalLM",
        LLAMA | dict(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    ),
    "llama-bias": ("Llama", "ForCausalLM", LLAMA | dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", "ForCausalLM", LLAMA | dict(num_key_value_heads=1)),
    "bert": ("Bert", "ForMaskedLM", LLAMA | dict(type_vocab_size=3)),
    "bert-untied": ("Bert", "ForMaskedLM", LLAMA | dict(tie_word_embeddings=False)),
    "bert-pretraining": ("Bert", "ForPreTraining", LLAMA),
    "distilbert": (
        "DistilBert",
        "ForMaskedLM",
        dict(vocab_size=23, dim=16, hidden_dim=24, n_layers=2, n_heads=4)
        | dict(max_position_embeddings=11),
    ),
}


def peer_model(peer, name):
    torch, transformers = peer
    family, task, config = PEERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, family + task)(getattr(transformers, family + "Config")(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
        if name == "bert-untied":  # two biases, of which the logits use one: load_model wants one
            model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
    return model.eval()


def peer_logits(peer, model, mask=None):
    torch, _ = peer
    with torch.no_grad():
        y = model(torch.tensor(TOKENS), attention_mask=None if mask is None else torch.tensor(mask))
    return (y.prediction_logits if "prediction_logits" in y else y.logits).numpy()


def agree(ours, theirs, tolerance):
    assert ours.dtype == theirs.dtype
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_peer_writes(peer, tmp_path, name):
    """Same logits in float32, and to float64's last digits but for rotary's float32 angles."""
    model = peer_model(peer, name)
    model.save_pretrained(tmp_path)
    ours, exact = load_model(tmp_path), load_model(tmp_path, "float64")
    assert ours.config.tied == model.config.tie_word_embeddings
    for mask in (None, MASK):
        kept = np.ones_like(MASK, bool) if mask is None else mask == 1
        agree(ours(TOKENS, mask).data[kept], peer_logits(peer, model.float(), mask)[kept], 1e-5)
        tolerance = 2e-6 if ours.config.positions == "rotary" else 1e-12
        theirs = peer_logits(peer, model.double(), mask)
        agree(exact(TOKENS, mask).data[kept], theirs[kept], tolerance)


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_peer_reads(peer, saved, tmp_path, name, dtype):
    """No key missing or left over, no other shape, and the same logits."""
    _, transformers = peer
    save_model(load_model(saved[name][1], dtype), tmp_path)
    ours, family = load_model(tmp_path), read_json(tmp_path / "config.json")["architectures"][0]
    model, info = getattr(transformers, family).from_pretrained(
        tmp_path, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    assert str(model.dtype) == f"torch.{dtype}"
    assert model.config.tie_word_embeddings == ours.config.tied
    model = model.float().eval()
    for mask in (None, MASK):
        kept = np.ones_like(MASK, bool) if mask is None else mask == 1
        agree(ours(TOKENS, mask).data[kept], peer_logits(peer, model, mask)[kept], 1e-5)


@pytest.mark.peers
def test_peer_shards(peer, tmp_path):
    model = peer_model(peer, "llama")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    agree(load_model(tmp_path)(TOKENS).data, peer_logits(peer, model), 1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("name", STORED)
def test_stored_logits_are_what_the_peer_computes(peer, edit, name):
    _, transformers = peer
    folder = redrawn(edit(name))
    family = read_json(folder / "config.json")["architectures"][0]
    model = getattr(transformers, family).from_pretrained(folder).eval()
    logits = peer_logits(peer, model, MASK)
    assert np.abs(logits[1, 5, :4] - STORED[name]).max() < 1e-5, logits[1, 5, :4].tolist()
