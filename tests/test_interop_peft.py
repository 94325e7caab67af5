"""minilm.interop.peft: an adapter that is saved comes back bit for bit, GPT-2's q, k and v share a
c_attn without a change of the function, what is no such adapter raises FormatError naming path and
field and leaves the model as it was, and (marked peers) PEFT computes the same logits from the same
files, whoever wrote them, merged or not."""

import json
import math
import os
import random
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.files import FormatError, read_json, write_json
from minilm.interop import patterns
from minilm.interop.huggingface import save_model
from minilm.interop.peft import base_of, load_adapter, save_adapter
from minilm.interop.peft_config import READ
from minilm.interop.peft_formats import FORMATS
from minilm.nn import Module
from minilm.peft import (
    add_ia3,
    add_lora,
    merge_lora,
    unload_lora,
    unmerge_lora,
    use_adapter,
)
from minilm.peft.adapted import adapted_layers, insert_adapters
from minilm.peft.ia3 import IA3
from minilm.peft.lora import LoRA
from minilm.quantize import quantize_model
from minilm.tensorfiles import read_tensors, write_tensors
from minilm.transformer import Config, Transformer

SMALL = dict(vocab_size=23, context=11, layers=2, heads=4, width=16)
CONFIGS = {
    "gpt2": Config.gpt2(**SMALL),
    "llama": Config.llama(**SMALL, hidden=24, kv_heads=2),
    "bert": Config.bert(**SMALL, hidden=24),
    "distilbert": Config.bert(**SMALL, hidden=24, segments=0),
}
TOKENS = np.random.default_rng(5).integers(0, 23, (3, 9))
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def base(name):
    """A model with noise on every parameter."""
    model, rng = Transformer(CONFIGS[name]), np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += rng.normal(0, 0.15, t.shape).astype(np.float32)
    return model.eval()


def adapted(name, targets=("q", "v"), r=2, alpha=3.0, seed=0, **settings):
    """The base with an adapter of which neither A nor B is zero."""
    model, rng = add_lora(base(name), r, alpha, targets, **settings), np.random.default_rng(seed)
    for t in model.parameters():
        t.data += rng.normal(0, 0.1, t.shape).astype(np.float32)
    return model.eval()


def adapters(model, name="default"):
    """{path: what the adapter is}, bit for bit."""
    found = {path: m.adapters[name] for path, m in adapted_layers(model).items()}
    return {path: (a.A.data.tobytes(), a.B.data.tobytes(), a.A.shape, a.A.dtype, a.scale, a.alpha,
                   a.drop.p, a.rslora) for path, a in found.items()}


def agree(ours, theirs, tolerance):
    assert ours.dtype == theirs.dtype
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """What a crash would leave is the matter of test_files."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: a folder}; nobody writes into the folders."""
    root = tmp_path_factory.mktemp("saved")
    for name in CONFIGS:
        save_adapter(adapted(name), root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture
def edit(saved, tmp_path):
    """edit(name, field=value, ...) -> a copy of the folder with other fields or tensors."""

    def copy(name, tensors=None, drop=(), **changes):
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(saved[name], folder)
        raw = read_json(folder / CONFIG) | changes
        write_json(folder / CONFIG, {k: v for k, v in raw.items() if k not in drop})
        if tensors:
            write_tensors(folder / TENSORS, tensors(read_tensors(folder / TENSORS)))
        return folder

    return copy


def expect(name, folder, file, *texts):
    """FormatError of that file with those texts, and a model that nothing happened to."""
    model = base(name)
    before = {p: t.data.tobytes() for p, t in model.named_parameters()}
    with pytest.raises(FormatError) as info:
        load_adapter(model, folder)
    assert str(info.value).startswith(f"{folder / file}: ")
    assert all(text in str(info.value) for text in texts), str(info.value)
    assert {p: t.data.tobytes() for p, t in model.named_parameters()} == before
    assert not adapted_layers(model)


def test_an_adapter_on_a_layer_that_peft_does_not_know_is_not_left_out(tmp_path):
    class Wrapped(Module):
        def __init__(self, module):
            self.module = module

    model = base("llama")
    model.replace("blocks.1.mlp", Wrapped(model.blocks[1].mlp))
    add_lora(model, 2, 3.0, ("mlp.up", "module.up"))
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.module\.up is no layer"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


TARGETS = ("q", "k", "v", "o", "mlp.up", "mlp.down", "blocks.1.attention.q", "all-linear")


@given(name=st.sampled_from(["llama", "bert", "distilbert"]),
       targets=st.sets(st.sampled_from(TARGETS[:-1]), min_size=1) | st.just("all-linear"),
       r=st.integers(1, 4), alpha=st.sampled_from([1, 3, 16.0, 0.7]), rslora=st.booleans(),
       dropout=st.sampled_from([0.0, 0.1]))
def test_round_trip(tmp_path_factory, name, targets, r, alpha, rslora, dropout):
    folder = tmp_path_factory.mktemp("adapter")
    model = adapted(name, targets, r, alpha, rslora=rslora, dropout=dropout)
    save_adapter(model, folder)
    loaded = load_adapter(base(name), folder).eval()
    assert adapters(loaded) == adapters(model)
    assert np.array_equal(loaded(TOKENS).data, model(TOKENS).data)
    assert {path for path, _ in loaded.named_parameters()} == {
        path for path, _ in model.named_parameters()}


@given(targets=st.sets(st.sampled_from(TARGETS[:-1]), min_size=1) | st.just("all-linear"),
       r=st.integers(1, 4), alpha=st.sampled_from([1, 3, 16.0, 0.7]), rslora=st.booleans())
def test_gpt2_round_trip(tmp_path_factory, targets, r, alpha, rslora):
    """q, k, v to one c_attn and back: the same function, and from then on the same bits."""
    first, second = (tmp_path_factory.mktemp("adapter") for _ in range(2))
    def wide(): return base("gpt2").astype("float64")
    model = adapted("gpt2", targets, r, alpha, rslora=rslora).astype("float64")
    save_adapter(model, first)
    loaded = load_adapter(wide(), first).eval()
    agree(loaded(TOKENS).data, model(TOKENS).data, 1e-12)
    for path, layer in adapted_layers(model).items():
        twin = adapted_layers(loaded)[path].adapters["default"]
        assert twin.scale == pytest.approx(layer.adapters["default"].scale, rel=1e-15)
        agree(twin.update(), layer.adapters["default"].update(), 1e-12)
    save_adapter(loaded, second)
    for file in (CONFIG, TENSORS):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert adapters(load_adapter(wide(), second)) == adapters(loaded)


@pytest.mark.parametrize("rslora", [False, True])
def test_gpt2_blocks(tmp_path, rslora):
    model = adapted("gpt2", ("q", "v", "o"), r=2, alpha=3, rslora=rslora)
    save_adapter(model, tmp_path)
    raw, tensors = read_json(tmp_path / CONFIG), read_tensors(tmp_path / TENSORS)
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_{}.weight"
    q, v = (adapted_layers(model)[f"blocks.1.attention.{m}"].adapters["default"] for m in "qv")
    A, B = tensors[key.format("A")], tensors[key.format("B")]
    assert np.array_equal(A, np.concatenate([q.A.data, v.A.data]))
    expected = np.zeros((48, 4), np.float32)
    expected[:16, :2], expected[32:, 2:] = q.B.data, v.B.data
    assert np.array_equal(B, expected)
    alphas = {"c_attn": 3 * math.sqrt(2) if rslora else 6, "c_proj": 3}
    for i in (0, 1):
        for module, r in {"c_attn": 4, "c_proj": 2}.items():
            name = f"transformer.h.{i}.attn.{module}"
            assert raw["rank_pattern"].get(name, raw["r"]) == r
            assert raw["alpha_pattern"].get(name, raw["lora_alpha"]) == alphas[module]
    assert raw["target_modules"] == ["attn.c_proj", "c_attn"]
    assert raw["fan_in_fan_out"] is True and raw["use_rslora"] is rslora


def test_gpt2_thirds(edit):
    """A c_attn as PEFT trains it: A for all, and the rows of B in the order q, k, v."""
    rng = np.random.default_rng(0)
    folder = edit("gpt2", lambda t: {k: rng.standard_normal((2, 16) if "_A" in k else (48, 2),
                                                            np.float32) for k in t},
                  r=2, lora_alpha=5)
    model, tensors = load_adapter(base("gpt2"), folder), read_tensors(folder / TENSORS)
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_{}.weight"
    for i, part in enumerate("qkv"):
        adapter = adapted_layers(model)[f"blocks.1.attention.{part}"].adapters["default"]
        assert np.array_equal(adapter.A.data, tensors[key.format("A")])
        assert np.array_equal(adapter.B.data, tensors[key.format("B")][16 * i : 16 * (i + 1)])
        assert adapter.scale == 2.5
    for block in model.blocks:
        q, k, v = (m.adapters["default"] for m in adapted_layers(block.attention).values())
        assert q.A is k.A is v.A  # one tensor, which is trained as one
        assert not np.shares_memory(q.B.data, k.B.data)


def test_the_names_of_the_modules(tmp_path):
    """As few parts as select these modules and no other."""
    cases = {("q", "blocks.1.attention.v"): ["1.self_attn.v_proj", "q_proj"],
             ("mlp.up", "blocks.0.mlp.down"): ["0.mlp.down_proj", "up_proj"],
             "all-linear": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj",
                            "v_proj"],
             ("head",): ["lm_head"]}
    for targets, names in cases.items():
        save_adapter(adapted("llama", targets), tmp_path)
        raw = read_json(tmp_path / CONFIG)
        assert (raw["target_modules"], raw["task_type"]) == (names, "CAUSAL_LM")
        assert raw["rank_pattern"] == raw["alpha_pattern"] == {}
    save_adapter(adapted("bert", ("mlp.up",)), tmp_path)
    raw = read_json(tmp_path / CONFIG)
    assert (raw["target_modules"], raw["task_type"]) == (["intermediate.dense"], None)


def test_names_settings_and_dtypes(saved, tmp_path):
    """Several adapters in one model; and each is cast to the model's dtype, exact where wider."""
    model = load_adapter(load_adapter(base("llama"), saved["llama"], "a"), saved["llama"], "b")
    assert adapters(model, "a") == adapters(model, "b") == adapters(adapted("llama"))
    assert all(m.active == "b" for m in adapted_layers(model).values())
    narrow = load_adapter(base("llama").astype(ml_dtypes.bfloat16), saved["llama"])
    assert {t.dtype.name for t in narrow.parameters()} == {"bfloat16"}
    save_adapter(narrow, tmp_path)
    assert {a.dtype.name for a in read_tensors(tmp_path / TENSORS).values()} == {"bfloat16"}
    back = dict(load_adapter(base("llama"), tmp_path).named_parameters())
    for path, t in narrow.named_parameters():
        assert np.array_equal(back[path].data, t.data.astype(np.float32))
    merged = merge_lora(use_adapter(model, "a"))  # what is saved does not depend on it
    save_adapter(merged, tmp_path, "a")
    assert (tmp_path / TENSORS).read_bytes() == (saved["llama"] / TENSORS).read_bytes()


def test_on_a_quantized_base(saved):
    model = load_adapter(quantize_model(base("gpt2")), saved["gpt2"])
    wide = load_adapter(base("gpt2"), saved["gpt2"])
    assert adapters(model) == adapters(wide)
    assert not np.array_equal(model(TOKENS).data, quantize_model(base("gpt2"))(TOKENS).data)


PEFT = {  # all that PEFT 0.21.2 writes beside what save_adapter writes
    "auto_mapping": None, "peft_version": "0.21.2", "base_model_name_or_path": "some/model",
    "revision": None, "inference_mode": True, "exclude_modules": None, "layers_to_transform": None,
    "layers_pattern": None, "megatron_config": None, "megatron_core": "megatron.core",
    "trainable_token_indices": None, "loftq_config": {}, "eva_config": None, "corda_config": None,
    "lora_ga_config": None, "use_dora": False, "velora_config": None, "target_parameters": None,
    "alora_invocation_tokens": None, "use_qalora": False, "qalora_group_size": 16,
    "monteclora_config": None, "layer_replication": None, "lora_bias": False, "use_bdlora": None,
    "arrow_config": None, "kasa_config": None, "ensure_weight_tying": False,
}


@pytest.mark.parametrize("changes", [
    PEFT, {"target_modules": r".*self_attn\.(q|v)_proj"}, {"exclude_modules": r".*\.k_proj"},
    {"target_modules": ["self_attn.q_proj", "v_proj", "gate"], "exclude_modules": ["lm_head"]},
    {"layers_to_transform": [0, 1, 7]}, {"target_modules": None}, {"rank_pattern": {"(q|v)_p": 9}},
    {"layers_to_transform": [], "layers_pattern": ["layers"]}, {"runtime_config": {"a": 1}},
    {"layers_to_transform": [1, 0], "layers_pattern": ["blocks", "l[aeiou]yers?"]},
    {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, {"loftq_config": {"bits": 4}},
    {"corda_config": {"a": 1}}, {"init_lora_weights": "orthogonal"}, {"modules_to_save": ["score"]},
    {"exclude_modules": ["o_proj"], "target_modules": ["q_proj", "v_proj", "o_proj"]},
    {"init_lora_weights": "gaussian"}, {"rank_pattern": None, "alpha_pattern": None},
    {"lora_bias": None, "something_new": False, "fan_in_fan_out": True},
])
def test_fields_that_change_no_number(edit, changes):
    loaded = load_adapter(base("llama"), edit("llama", **changes))
    assert adapters(loaded) == adapters(adapted("llama"))


def test_the_base_is_named(edit, tmp_path):
    model = adapted("llama")
    for base, expected in ((None, None), ("runs/a/model", "runs/a/model"),
                           (tmp_path / "m", str(tmp_path / "m"))):
        save_adapter(model, tmp_path / "a", base=base)
        assert read_json(tmp_path / "a" / CONFIG)["base_model_name_or_path"] == expected
        assert base_of(tmp_path / "a") == expected
    assert base_of(edit("llama", base_model_name_or_path="")) is None
    assert base_of(edit("llama", drop=["base_model_name_or_path"])) is None
    for wrong in (7, ["m"], False):
        folder = edit("llama", base_model_name_or_path=wrong)
        expect("llama", folder, CONFIG, "base_model_name_or_path is")
        with pytest.raises(FormatError, match="base_model_name_or_path"):
            base_of(folder)
    with pytest.raises(FileNotFoundError):
        base_of(tmp_path / "nowhere")


def test_absent_fields(edit):
    needed = {"peft_type", "r", "lora_alpha"}
    folder = edit("llama", drop=read_json(edit("llama") / CONFIG).keys() - needed)
    assert adapters(load_adapter(base("llama"), folder)) == adapters(adapted("llama"))
    for field in needed:
        expect("llama", edit("llama", drop=[field]), CONFIG, f"{field} is None")


@pytest.mark.parametrize("patterns, scales", [
    ({"q_proj": 8}, [4.0, 1.5, 4.0, 1.5]),
    ({"layers.0.self_attn.v_proj": 8, "v_proj": 4}, [1.5, 4.0, 1.5, 2.0]),
    ({"v_proj": 4, "layers.0.self_attn.v_proj": 8}, [1.5, 2.0, 1.5, 2.0]),  # the first one
    ({"^model.layers.1.self_attn.q_proj": 8}, [1.5, 1.5, 4.0, 1.5]),
    ({"^layers.1.self_attn.q_proj": 8, "proj": 7, "_proj": 9, "q_proj.": 1}, [1.5] * 4),
])
def test_alpha_pattern(edit, patterns, scales):
    model = load_adapter(base("llama"), edit("llama", alpha_pattern=patterns))
    assert [m.adapters["default"].scale for m in adapted_layers(model).values()] == scales


def test_rank_pattern(edit):
    def longer(tensors):
        return {k: np.repeat(a, 2, 0 if "_A" in k else 1) if "1.self_attn.q" in k else a
                for k, a in tensors.items()}
    folder = edit("llama", longer, rank_pattern={"1.self_attn.q_proj": 4}, use_rslora=True)
    model = load_adapter(base("llama"), folder)
    found = {p: m.adapters["default"] for p, m in adapted_layers(model).items()}
    assert {p for p, a in found.items() if a.r == 4} == {"blocks.1.attention.q"}
    assert all(a.scale == 3 / math.sqrt(a.r) for a in found.values())
    expect("llama", edit("llama", longer), TENSORS, "layers.1.self_attn.q_proj.lora_A.weight is "
           "float32 (4, 16), expected float (2, 16)")
    expect("llama", edit("llama", rank_pattern={"q_proj": 3}), TENSORS, "expected float (3, 16)")


REFUSED = [
    ("peft_type", "LOHA"), ("peft_type", ["LORA"]), ("bias", "some"), ("bias", None), ("r", 0),
    ("r", 2.0), ("r", True), ("r", 10**30), ("lora_alpha", "3"), ("lora_alpha", 10**400),
    ("lora_alpha", None), ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("use_rslora", "yes"),
    ("use_rslora", None), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", []),
    ("rank_pattern", {"(q|v_proj": 2}), ("alpha_pattern", {"*": 2}),
    ("alpha_pattern", {"q_proj": None}), ("target_modules", [3]), ("target_modules", {"q": 1}),
    ("exclude_modules", r".*\.v_proj"), ("exclude_modules", ["v_proj"]),
    ("target_modules", r"(?i"), ("target_modules", "(" * 5000), ("layers_to_transform", "1"),
    ("layers_to_transform", [True]), ("layers_to_transform", -1), ("layers_pattern", "layers"),
    ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "olora"), ("init_lora_weights", "corda"), ("init_lora_weights", "mica"),
    ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"),
    ("use_dora", "yes"), ("use_dora", None), ("modules_to_save", "lm_head"), ("lora_bias", True),
    ("layer_replication", [[0, 1]]), ("alora_invocation_tokens", [1]), ("use_bdlora", {"a": 1}),
    ("use_qalora", True), ("target_parameters", ["x"]), ("trainable_token_indices", [1]),
    ("kasa_config", {}), ("velora_config", {}), ("something_new", {}), ("something_new", 0),
    ("ensure_weight_tying", True),
    ("arrow_config", {"a": 1}), ("megatron_config", {"a": 1}), ("something_new", 1),
]


@pytest.mark.parametrize("field, value", REFUSED)
def test_refused_fields(edit, field, value):
    folder = edit("llama", **{field: value})
    wide = (field, value) == ("r", 10**30)  # a rank that no tensor has
    expect("llama", folder, TENSORS if wide else CONFIG, str(value) if wide else field)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WTE = "base_model.model.model.embed_tokens.lora_embedding_A"
K = Q.replace("q_proj", "k_proj")
EMBED = "base_model.model.model.embed_tokens.weight"


@pytest.mark.parametrize("tensors, text", [
    (lambda t: {k: a for k, a in t.items() if k != Q}, f"missing keys: {Q}"),
    (lambda t: {}, "missing keys: "),
    (lambda t: t | {WTE: np.ones((2, 23))}, f"unexpected keys: {WTE}"),
    (lambda t: t | {K: t[Q]}, f"unexpected keys: {K}"),
    (lambda t: t | {Q.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(16)}, "magnitude"),
    (lambda t: t | {Q: t[Q][:, :8]}, "(2, 8), expected float (2, 16)"),
    (lambda t: t | {Q: t[Q][:1]}, "(1, 16), expected float (2, 16)"),
    (lambda t: t | {Q: t[Q][0]}, "(16,), expected float (2, 16)"),
    (lambda t: t | {Q: t[Q].astype(np.int8)}, f"{Q} is int8"),
    (lambda t: t | {Q.replace("_A", "_B"): np.ones((8, 2), np.float32)}, "expected float (16, 2)"),
    (lambda t: {k.replace("base_model.model.", ""): a for k, a in t.items()}, "unexpected keys: "),
    (lambda t: t | {Q: t[Q] * np.nan}, f"{Q} has numbers that are not finite in float32"),
    (lambda t: t | {Q: t[Q].astype(np.float64) + 1e300}, f"{Q} has numbers that are not finite"),
])
def test_refused_tensors(edit, tensors, text):
    expect("llama", edit("llama", tensors), TENSORS, text)


@pytest.mark.parametrize("changes, text", [
    ({"target_modules": "all-linear"}, "missing keys: "),
    ({"use_dora": True}, "missing keys: base_model.model.model.layers.0.self_attn.q_proj.lora_mag"),
    ({"target_modules": r".*q_proj"}, "unexpected keys: "),
    ({"target_modules": r"q_proj|v_proj"}, "unexpected keys: "),  # the whole name, as in PEFT
    ({"target_modules": r".*\.(q|k|v)_proj"}, "missing keys: "),
    ({"layers_to_transform": 1}, "unexpected keys: "),
    ({"target_modules": ["q_proj", "k_proj", "v_proj"], "layers_to_transform": [0, 1]},
     "missing keys: "),
    ({"layers_to_transform": [0, 1], "layers_pattern": "h"}, "unexpected keys: "),
    ({"rank_pattern": {"[qv]_proj": 3}}, "expected float (3, 16)"),
    ({"modules_to_save": ["norm"]}, "missing keys: base_model.model.model.layers.0.input_layern"),
])
def test_the_file_is_what_the_config_chooses(edit, changes, text):
    expect("llama", edit("llama", **changes), TENSORS, text)


def test_layers_go_with_a_list(edit):
    folder = edit("llama", target_modules=".*[qv]_proj", layers_to_transform=[0])
    expect("llama", folder, CONFIG, "layers_to_transform is [0], which goes with a list")


@pytest.mark.parametrize("name, entries", [
    ("gpt2", ["attn"]),  # c_attn too, in it
    ("bert", ["embeddings"]), ("llama", ["mlp", "0.mlp.up_proj"])])
def test_a_module_that_is_saved_within_another(edit, name, entries):
    """PEFT fails with a KeyError for what it wrote of these."""
    expect(name, edit(name, modules_to_save=entries), CONFIG, "modules_to_save is", "around it")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "alpha_pattern"])
def test_an_expression_has_an_end(edit, monkeypatch, field):
    monkeypatch.setattr(patterns, "SECONDS", 0.4)
    value = r"(.*.*)*\.(.+)+!"
    folder = edit("llama", **{field: {value: 2} if field == "alpha_pattern" else value})
    expect("llama", folder, CONFIG, f"{field} takes more than 0.4 seconds")


def test_lists_and_tables_have_an_end(edit):
    """Each entry is compared with each module: a million would take minutes."""
    many = [f"m{i}" for i in range(10**4 + 1)]
    expect("llama", edit("llama", target_modules=many), CONFIG, "target_modules is ['m0', ")
    expect("llama", edit("llama", rank_pattern=dict.fromkeys(many, 2)), CONFIG, "rank_pattern is")


def test_refused_folders(edit, tmp_path):
    empty = edit("llama", lambda t: {}, target_modules=None)
    expect("llama", empty, TENSORS, "no adapter")
    expect("bert", edit("llama"), TENSORS, "unexpected keys: base_model.model.model.layers")
    expect("gpt2", edit("gpt2", lambda t: {k: a[:46] for k, a in t.items()}), TENSORS, "(48, ")
    folder = edit("llama")
    for value in (None, [], "LORA", 3):
        write_json(folder / CONFIG, value)
        expect("llama", folder, CONFIG, type(value).__name__)
    with pytest.raises(FileNotFoundError, match=CONFIG):
        load_adapter(base("llama"), tmp_path)
    folder = edit("llama")
    (folder / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=TENSORS):
        load_adapter(base("llama"), folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    expect("llama", folder, "adapter_model.bin", "save_pretrained writes adapter_model.safetensors")
    untrained = edit("llama", lambda t: {EMBED: base("llama").embed.weight.data}, target_modules=[])
    expect("llama", untrained, TENSORS, "no adapter")


def test_names_that_cannot_be(saved):
    model = load_adapter(base("llama"), saved["llama"])
    for name in ("default", "a.b", ""):
        with pytest.raises(ValueError, match=r"name|already"):
            load_adapter(model, saved["llama"], name)
    merge_lora(model)
    with pytest.raises(ValueError, match="unmerge_lora"):
        load_adapter(model, saved["llama"], "b")
    assert {n for m in adapted_layers(model).values() for n in m.adapters} == {"default"}


def test_adapters_that_cannot_be_saved(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x"

    def model(name="gpt2", **settings):
        def make(r=2, alpha=3, dropout=0.0, rslora=False):
            draw = lambda *shape: rng.standard_normal(shape, np.float32)
            return LoRA(draw(r, 16), draw(16, r), alpha, dropout, rslora)
        ours = {"q": make(), "v": make(**settings)}
        paths = {f"blocks.0.attention.{part}": a for part, a in ours.items()}
        return insert_adapters(base(name), "default", paths)

    for settings in ({"r": 3}, {"alpha": 4}, {"rslora": True}):
        with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn"):
            save_adapter(model(**settings), path)
    for settings in ({"dropout": 0.1}, {"rslora": True}):
        with pytest.raises(ValueError, match="use_rslora and lora_dropout"):
            save_adapter(model("distilbert", **settings), path)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        save_adapter(model(), path, "other")
    with pytest.raises(ValueError, match="no adapter 'default'"):
        save_adapter(base("gpt2"), path)
    with pytest.raises(ValueError, match="kv_heads"):
        save_adapter(add_lora(Transformer(Config.gpt2(**SMALL, kv_heads=2)), 2, 3), path)
    assert not path.exists()
    save_adapter(model("distilbert", r=3, alpha=4), path)  # two forms, each a pattern
    assert read_json(path / CONFIG)["rank_pattern"] == {
        "distilbert.transformer.layer.0.attention.v_lin": 3}
    scales = [m.adapters["default"].scale
              for m in adapted_layers(load_adapter(base("distilbert"), path)).values()]
    assert scales == [1.5, 4 / 3]


VALUES = [None, True, 0, -1, 2, 10**400, 0.5, 1e308, "", "LORA", "\ud800", [], {}, [1], ["q"],
          {"a": 1}, {"q_proj": {}}]


def test_fuzzed_files(edit):
    """Any value in any field, and any damaged bytes: an adapter or FormatError."""
    folder, rng, model = edit("llama"), random.Random(0), base("llama")
    raw = read_json(folder / CONFIG)

    def attempt():
        try:
            load_adapter(model, folder)
        except FormatError:
            assert not adapted_layers(model)
        unload_lora(model)

    for field in ("peft_type", *READ, *FORMATS["LORA"].fields):
        for value in VALUES:
            (folder / CONFIG).write_text(json.dumps(raw | {field: value}))
            attempt()
    for file in (CONFIG, TENSORS):
        folder = edit("llama")
        data = (folder / file).read_bytes()
        for i in range(100):
            broken = bytearray(data[: rng.randrange(len(data))] if i % 4 == 0 else data)
            for _ in range(rng.randint(1, 3) if broken else 0):
                broken[rng.randrange(min(len(broken), 900))] = rng.choice(b'0123-"{}[],: anx\xff')
            (folder / file).write_bytes(broken)
            attempt()


# IA3


def scaled(name, targets=("k", "v", "down"), feedforward=("down",), seed=0):
    """The base with vectors of which none is ones."""
    model, rng = add_ia3(base(name), targets, feedforward), np.random.default_rng(seed)
    for t in model.parameters():
        t.data += rng.normal(0, 0.3, t.shape).astype(np.float32)
    return model.eval()


def vectors(model, name="default"):
    """{path: what the vector is}, bit for bit."""
    return {path: (m.adapters[name].l.data.tobytes(), m.adapters[name].feedforward)
            for path, m in adapted_layers(model).items()}


PLACES = ("q", "k", "v", "o", "mlp.up", "mlp.down", "blocks.1.attention.k", "blocks.0.mlp.down")


@given(name=st.sampled_from(["llama", "bert", "distilbert"]), data=st.data(),
       targets=st.sets(st.sampled_from(PLACES), min_size=1) | st.just("all-linear"))
def test_ia3_round_trip(tmp_path_factory, name, data, targets):
    folder = tmp_path_factory.mktemp("adapter")
    among = ("q", "down", "o") if targets == "all-linear" else sorted(targets)
    model = scaled(name, targets, data.draw(st.sets(st.sampled_from(among))))
    save_adapter(model, folder)
    loaded = load_adapter(base(name), folder).eval()
    assert vectors(loaded) == vectors(model)
    assert np.array_equal(loaded(TOKENS).data, model(TOKENS).data)
    raw = read_json(folder / CONFIG)
    assert {*raw["feedforward_modules"]} <= {*raw["target_modules"]}  # else PEFT refuses them


def test_ia3_of_gpt2(tmp_path):
    """q, k, v one below the other in c_attn, ones where there is none; from then on, all three."""
    model = scaled("gpt2")
    save_adapter(model, tmp_path)
    tensors, raw = read_tensors(tmp_path / TENSORS), read_json(tmp_path / CONFIG)
    k, v, down = (m.adapters["default"].l.data for m in list(adapted_layers(model).values())[:3])
    block = "base_model.model.transformer.h.0"
    assert np.array_equal(tensors[f"{block}.attn.c_attn.ia3_l"],
                          np.concatenate([np.ones(16, np.float32), k, v])[:, None])
    assert np.array_equal(tensors[f"{block}.mlp.c_proj.ia3_l"], down[None])
    assert raw["peft_type"] == "IA3" and raw["fan_in_fan_out"] is True
    assert raw["target_modules"] == ["c_attn", "mlp.c_proj"]
    assert raw["feedforward_modules"] == ["mlp.c_proj"]
    loaded = load_adapter(base("gpt2"), tmp_path)
    agree(loaded(TOKENS).data, model(TOKENS).data, 1e-6)
    found = vectors(loaded)
    assert found.pop("blocks.0.attention.q") == found.pop("blocks.1.attention.q") == (
        np.ones(16, np.float32).tobytes(), False)
    assert found == vectors(model)


def test_ia3_at_the_input_of_c_attn(tmp_path):
    """One vector for q, k and v: they can be written while they have the same."""
    model = scaled("gpt2", ("q", "k", "v"), ("q", "k", "v"))
    for block in model.blocks:
        for layer in (block.attention.k, block.attention.v):
            layer.adapters["default"].l.data[...] = block.attention.q.adapters["default"].l.data
    save_adapter(model, tmp_path)
    assert {a.shape for a in read_tensors(tmp_path / TENSORS).values()} == {(1, 16)}
    loaded = load_adapter(base("gpt2"), tmp_path)
    assert vectors(loaded) == vectors(model)
    for block in loaded.blocks:
        q, k, v = (m.adapters["default"] for m in adapted_layers(block.attention).values())
        assert q.l is k.l is v.l
    for other in (scaled("gpt2", ("q", "k", "v"), ("q", "k", "v")),  # three different ones
                  scaled("gpt2", ("k", "v"), ("k", "v")), scaled("gpt2", ("q", "k"), "q")):
        with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn has one vector for its input"):
            save_adapter(other, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_ia3_names_are_compared_letter_by_letter(tmp_path):
    """PEFT takes "0.output.dense" of feedforward_modules for layer 10's too."""
    def deep(): return Transformer(Config.bert(**SMALL | {"layers": 11}, hidden=24))
    ones = {"blocks.0.mlp.down": IA3(np.ones(24, np.float32), feedforward=True),
            "blocks.10.mlp.down": IA3(np.ones(16, np.float32))}
    model = insert_adapters(deep(), "default", ones)
    save_adapter(model, tmp_path)
    assert read_json(tmp_path / CONFIG)["feedforward_modules"] == ["layer.0.output.dense"]
    assert vectors(load_adapter(deep(), tmp_path)) == vectors(model)


@pytest.fixture
def ia3(tmp_path):
    """ia3(field=value, ...) -> a folder of Llama's IA3 with other fields or tensors."""

    def make(tensors=None, **changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_adapter(scaled("llama"), folder)
        write_json(folder / CONFIG, read_json(folder / CONFIG) | changes)
        if tensors:
            write_tensors(folder / TENSORS, tensors(read_tensors(folder / TENSORS)))
        return folder

    return make


@pytest.mark.parametrize("changes", [
    {"init_ia3_weights": False}, {"feedforward_modules": r".*\.mlp\.down_proj"},
    {"feedforward_modules": None}, {"feedforward_modules": ["own_proj", "o_proj"]},
    {"target_modules": None}, {"exclude_modules": ["o_proj"], "task_type": "CAUSAL_LM"}])
def test_ia3_fields_that_change_no_number(ia3, changes):
    assert vectors(load_adapter(base("llama"), ia3(**changes))) == vectors(scaled("llama"))


DOWN = "base_model.model.model.layers.0.mlp.down_proj.ia3_l"


@pytest.mark.parametrize("changes, file, text", [
    ({"feedforward_modules": []}, TENSORS, "is float32 (1, 24), expected float (16, 1)"),
    ({"feedforward_modules": ["down_proj", "v_proj"]}, TENSORS, "expected float (1, 16)"),
    ({"feedforward_modules": [3]}, CONFIG, "feedforward_modules is [3]"),
    ({"target_modules": ["k_proj", "down_proj"]}, TENSORS, "unexpected keys"),
    ({"target_modules": ["k_proj", "v_proj", "proj", "o_proj", "down_proj"]}, TENSORS,
     "missing keys: base_model.model.model.layers.0.self_attn.o_proj.ia3_l"),
    ({"r": 8}, CONFIG, "r is 8, which is not supported"),
    ({"modules_to_save": ["lm_head"]}, TENSORS, "missing keys: base_model.model.lm_head.weight"),
    ({"feedforward_modules": r".*\.(down|v)_proj"}, TENSORS, "expected float (1, 16)"),
    ({"layers_to_transform": [0]}, CONFIG, "layers_to_transform"),
    ({"tensors": lambda t: t | {DOWN: t[DOWN][0]}}, TENSORS, "(24,), expected float (1, 24)"),
    ({"tensors": lambda t: t | {DOWN: np.ones((), np.float32)}, "feedforward_modules": None},
     TENSORS, "expected float (16, 1)"),
    ({"tensors": lambda t: {k: a for k, a in t.items() if k != DOWN}}, TENSORS, "missing keys"),
    ({"tensors": lambda t: t | {DOWN: t[DOWN].astype(int)}}, TENSORS, "int64")])
def test_ia3_refused(ia3, changes, file, text):
    expect("llama", ia3(**changes), file, text)


def test_two_methods_are_two_folders(tmp_path):
    model = insert_adapters(base("llama"), "both", {
        "blocks.0.attention.q": IA3(np.ones(16, np.float32)),
        "blocks.1.attention.q": LoRA(np.ones((2, 16)), np.ones((16, 2)), 3)})
    with pytest.raises(ValueError, match=r"'both' is of \['IA3', 'LoRA'\]"):
        save_adapter(model, tmp_path / "x", "both")
    model = add_lora(scaled("llama"), 2, 3, name="b")
    save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "b", "b")
    both = load_adapter(load_adapter(base("llama"), tmp_path / "a"), tmp_path / "b", "b")
    assert np.array_equal(both(TOKENS).data, model(TOKENS).data)
    use_adapter(both, "default")
    assert np.array_equal(both(TOKENS).data, scaled("llama")(TOKENS).data)


@pytest.fixture(scope="session")
def peer():
    """(torch, transformers, peft), offline."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TORCHDYNAMO_DISABLE"] = "1"
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    import torch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers, peft


THEIRS = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "bert": "BertForMaskedLM",
          "distilbert": "DistilBertForMaskedLM"}


@pytest.fixture(scope="module")
def theirs(peer, tmp_path_factory):
    """theirs(name): their model with the weights of base(name), in float64."""
    _, transformers, _ = peer
    root = tmp_path_factory.mktemp("models")
    for name in THEIRS:
        save_model(base(name), root / name)
    return lambda name: getattr(transformers, THEIRS[name]).from_pretrained(root / name).double()


def peer_logits(peer, model):
    with peer[0].no_grad():
        return model.eval()(peer[0].tensor(TOKENS)).logits.numpy()


TOLERANCE = {"llama": 1e-6}  # rotary angles and RMSNorm are in float32 there; else 1e-12

SETTINGS = {
    "lora": dict(r=3, lora_alpha=4),
    "rslora": dict(r=3, lora_alpha=4, use_rslora=True, lora_dropout=0.1),
    "patterns": dict(r=2, lora_alpha=4, rank_pattern={"1.attn.c_attn": 5, "1.mlp.up_proj": 5},
                     alpha_pattern={"^transformer.h.0.mlp.c_fc": 9, "0.self_attn.q_proj": 9}),
    "patterns-rslora": dict(r=2, lora_alpha=4, use_rslora=True,
                            rank_pattern={"c_attn": 5, "q_proj": 5},
                            alpha_pattern={"c_attn": 9, "q_proj": 9}),
    "excluded": dict(r=2, target_modules="all-linear", exclude_modules=["c_proj", "down_proj"]),
    "one-layer": dict(r=2, layers_to_transform=[1]),
}
PEER_TARGETS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "up_proj", "down_proj"],
                "bert": ["query", "dense"], "distilbert": ["v_lin", "lin1"]}


PEER_WARNINGS = [pytest.mark.filterwarnings(f"ignore:{text}") for text in (
    "`is_gradient_checkpointing` is deprecated:FutureWarning",
    "fan_in_fan_out is set to False:UserWarning",
    "The following .*_pattern keys did not match:RuntimeWarning",
)]


def with_peers(test):
    for mark in (pytest.mark.peers, *PEER_WARNINGS):
        test = mark(test)
    return test


@with_peers
@pytest.mark.parametrize("name, settings", [
    *((name, s) for name in ("gpt2", "llama") for s in SETTINGS), ("bert", "lora"),
    ("distilbert", "rslora")])
def test_peer_writes(peer, theirs, tmp_path, name, settings):
    torch, _, peft = peer
    torch.manual_seed(0)
    config = peft.LoraConfig(**dict(target_modules=PEER_TARGETS[name]) | SETTINGS[settings])
    model = peft.get_peft_model(theirs(name), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    ours, plain = base(name).astype("float64"), base(name)(TOKENS).data
    ours, tolerance = load_adapter(ours, tmp_path).eval(), TOLERANCE.get(name, 1e-12)
    expected = peer_logits(peer, model)
    assert np.abs(expected - plain).max() > 0.01 * np.abs(plain).max()
    agree(ours(TOKENS).data, expected, tolerance)
    model.merge_adapter()
    agree(merge_lora(ours)(TOKENS).data, peer_logits(peer, model), tolerance)
    model.unmerge_adapter()
    agree(unmerge_lora(ours)(TOKENS).data, expected, tolerance)


@with_peers
@pytest.mark.parametrize("name, targets, rslora", [
    ("gpt2", ("q", "v"), False), ("gpt2", ("q", "v"), True), ("gpt2", ("q", "k", "v"), True),
    ("gpt2", ("k", "o"), False), ("gpt2", "all-linear", False), ("gpt2", "all-linear", True),
    ("gpt2", ("blocks.1.attention.v", "mlp.down"), True), ("llama", ("q", "v"), True),
    ("llama", "all-linear", False), ("llama", ("blocks.0.mlp.gate", "o", "head"), True),
    ("bert", "all-linear", False), ("distilbert", ("q",), True)])
def test_peer_reads(peer, theirs, tmp_path, name, targets, rslora):
    """No key missing or left over, and the same logits, before and after the merge."""
    _, _, peft = peer
    ours = adapted(name, targets, rslora=rslora).astype("float64")
    save_adapter(ours, tmp_path)
    model = peft.PeftModel.from_pretrained(theirs(name), tmp_path)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = read_tensors(tmp_path / TENSORS)
    assert state.keys() == tensors.keys()
    assert all(np.array_equal(state[key].numpy(), array) for key, array in tensors.items())
    tolerance = TOLERANCE.get(name, 1e-12)
    agree(ours(TOKENS).data, peer_logits(peer, model), tolerance)
    agree(merge_lora(ours)(TOKENS).data, peer_logits(peer, model.merge_and_unload()), tolerance)


@with_peers
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peer_in_float32(peer, theirs, tmp_path, name):
    """As the models are used: within 1e-6 of the largest logit, before and after the merge."""
    ours = adapted(name, ("q", "v"))
    save_adapter(ours, tmp_path)
    model = peer[2].PeftModel.from_pretrained(theirs(name).float(), tmp_path)
    agree(ours(TOKENS).data, peer_logits(peer, model), 1e-6)
    again = load_adapter(base(name), tmp_path).eval()
    agree(again(TOKENS).data, peer_logits(peer, model), 1e-6)
    agree(merge_lora(again)(TOKENS).data, peer_logits(peer, model.merge_and_unload()), 1e-6)


IA3_TARGETS = {  # (target_modules, feedforward_modules); the third is what PEFT takes by itself
    "gpt2": [(["c_attn", "mlp.c_proj", "c_fc"], ["mlp.c_proj"]), (["c_attn"], ["c_attn"]),
             (None, None)],
    "llama": [(["k_proj", "v_proj", "down_proj"], ["down_proj"]), ("all-linear", ["o_proj"]),
              (None, None)],
    "bert": [(["key", "value", "output.dense"], ["output.dense"])],
    "distilbert": [(["k_lin", "lin1", "lin2"], ["lin2"])],
}


@with_peers
@pytest.mark.parametrize("name, targets", [(n, t) for n, ts in IA3_TARGETS.items() for t in ts])
def test_peer_writes_ia3(peer, theirs, tmp_path, name, targets):
    torch, _, peft = peer
    torch.manual_seed(0)
    config = peft.IA3Config(target_modules=targets[0], feedforward_modules=targets[1])
    model = peft.get_peft_model(theirs(name), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "ia3_" in key:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    tolerance, plain = TOLERANCE.get(name, 1e-12), base(name)(TOKENS).data
    ours = load_adapter(base(name).astype("float64"), tmp_path).eval()
    expected = peer_logits(peer, model)
    assert np.abs(expected - plain).max() > 0.01 * np.abs(plain).max()
    agree(ours(TOKENS).data, expected, tolerance)
    model.merge_adapter()
    agree(merge_lora(ours)(TOKENS).data, peer_logits(peer, model), tolerance)


@with_peers
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("targets, feedforward", [
    (("k", "v", "down"), "down"), ("all-linear", ("o", "down")), (("q", "up"), ("up",)),
    (("blocks.0.mlp.down", "blocks.1.attention.o"), "blocks.0.mlp.down"), (("v",), ())])
def test_peer_reads_ia3(peer, theirs, tmp_path, name, targets, feedforward):
    """No key missing or left over; the same logits in float64 and float32, merged or not."""
    _, _, peft = peer
    ours = scaled(name, targets, feedforward)
    save_adapter(ours, tmp_path)
    model = peft.PeftModel.from_pretrained(theirs(name), tmp_path)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = read_tensors(tmp_path / TENSORS)
    assert state.keys() == tensors.keys()
    assert all(np.array_equal(state[key].numpy(), array) for key, array in tensors.items())
    wide = load_adapter(base(name).astype("float64"), tmp_path).eval()
    agree(wide(TOKENS).data, peer_logits(peer, model), TOLERANCE.get(name, 1e-12))
    agree(ours(TOKENS).data, peer_logits(peer, model.float()), 1e-6)
    agree(merge_lora(ours)(TOKENS).data, peer_logits(peer, model.merge_and_unload()), 1e-6)
