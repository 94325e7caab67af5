"""minilm.interop.peft, methods in front of the text: prompts and prefixes come back bit for bit,
what is no such adapter for this model raises FormatError naming the field, and (marked peers) PEFT
gives the same logits, gradients and greedy tokens from the same folders, whoever wrote them."""

import dataclasses
import json
import os
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_interop_peft import (
    CONFIG,
    CONFIGS,
    SMALL,
    TENSORS,
    TOKENS,
    VALUES,
    agree,
    base,
    peer,
    theirs,
    with_peers,
)

from minilm import ops
from minilm.files import FormatError, read_json, write_json
from minilm.generate import generate
from minilm.interop.huggingface import load_model, save_model
from minilm.interop.peft import base_of, load_adapter, save_adapter
from minilm.interop.peft_front import FRONTS, INERT
from minilm.peft import add_lora, add_prefix, add_prompt, settle_prefix, unload_lora
from minilm.peft.adapted import Adapter, adapted_layers, insert_adapters
from minilm.tensorfiles import read_tensors, write_tensors
from minilm.transformer import Config, Transformer

__all__ = ["peer", "theirs"]  # fixtures
P, TEXT = 3, TOKENS[:, :6]
KINDS = {"PROMPT_TUNING": add_prompt, "PREFIX_TUNING": add_prefix}
kinds = pytest.mark.parametrize("kind", KINDS)
CAUSAL = pytest.mark.parametrize("name", ["gpt2", "llama"])
TOLERANCE = {"llama": 1e-6}  # as in test_interop_peft.py


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def stirred(model, seed=0):
    rng = np.random.default_rng(seed)
    for t in model.parameters():
        t.data += rng.normal(0, 0.5, t.shape).astype(t.dtype)
    return model.eval()


def tensors(model):
    return {path: (t.data.tobytes(), t.shape) for path, t in model.named_parameters()}


@given(name=st.sampled_from([*CONFIGS]), kind=st.sampled_from([*KINDS]), p=st.integers(1, 5),
       seed=st.integers(0, 99), dtype=st.sampled_from(["float32", "float64", "bfloat16"]))
def test_round_trip(tmp_path_factory, name, kind, p, seed, dtype):
    folder = tmp_path_factory.mktemp("adapter")
    model = stirred(KINDS[kind](base(name).astype(dtype), p), seed)
    save_adapter(model, folder, base="models/a")
    loaded = load_adapter(base(name).astype(dtype), folder).eval()
    assert tensors(loaded) == tensors(model) and base_of(folder) == "models/a"
    assert np.array_equal(loaded(TEXT).data, model(TEXT).data)
    c, raw = CONFIGS[name], read_json(folder / CONFIG)
    width = c.width if kind == "PROMPT_TUNING" else 2 * c.layers * c.kv_heads * c.D
    assert {k: a.shape for k, a in read_tensors(folder / TENSORS).items()} == {
        "prompt_embeddings": (p, width)}
    assert raw["peft_type"] == kind and raw["num_virtual_tokens"] == p
    assert not (raw.keys() - {*FRONTS[kind].fields} - INERT
                - {"peft_type", "task_type", "inference_mode", "modules_to_save"})


def test_an_mlp_is_saved_as_what_it_gives(tmp_path):
    model = stirred(add_prefix(base("llama"), P, hidden=7))
    save_adapter(model, tmp_path)
    loaded = load_adapter(base("llama"), tmp_path)
    assert tensors(loaded) == tensors(settle_prefix(model))


def test_the_order_of_a_prefix(tmp_path):
    """For each row k and v of the first layer, then those of the second; heads side by side."""
    model = stirred(add_prefix(base("llama"), P))
    save_adapter(model, tmp_path)
    table = read_tensors(tmp_path / TENSORS)["prompt_embeddings"].reshape(P, 2, 2, 2, 4)
    for i, layer in enumerate(model.front.adapters["default"].layers):
        for j, t in enumerate((layer.k, layer.v)):
            assert np.array_equal(table[:, i, j].transpose(1, 0, 2), t.data[0])


@pytest.fixture
def edit(tmp_path):
    """edit(kind, tensors or None, field=value, ...) -> a folder of a llama's with other fields."""
    def copy(kind, change=None, **changes):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        save_adapter(stirred(KINDS[kind](base("llama"), P)), folder)
        write_json(folder / CONFIG, read_json(folder / CONFIG) | changes)
        if change:
            write_tensors(folder / TENSORS, change(read_tensors(folder / TENSORS)))
        return folder
    return copy


@pytest.mark.parametrize("kind, changes, text", [
    ("PROMPT_TUNING", dict(peft_type="P_TUNING"), "peft_type is 'P_TUNING', expected one of"),
    ("PROMPT_TUNING", dict(num_virtual_tokens=0), "num_virtual_tokens is 0, expected a positive"),
    ("PROMPT_TUNING", dict(num_virtual_tokens=None), "num_virtual_tokens is None"),
    ("PREFIX_TUNING", dict(num_virtual_tokens=11),
     "is 11, which leaves no room for a text: the model's context is 11"),
    ("PROMPT_TUNING", dict(token_dim=8), "token_dim is 8, but for this model it is 16"),
    ("PREFIX_TUNING", dict(token_dim=16), "token_dim is 16, but for this model it is 8"),
    ("PREFIX_TUNING", dict(num_attention_heads=4), "num_attention_heads is 4, but for this model"),
    ("PREFIX_TUNING", dict(num_layers=3), "num_layers is 3, but for this model it is 2"),
    ("PREFIX_TUNING", dict(num_transformer_submodules=2), "submodules is 2, expected 1 or null"),
    ("PROMPT_TUNING", dict(modules_to_save=["lm_head"]), "modules_to_save is ['lm_head'], which"),
    ("PROMPT_TUNING", dict(use_lora=True), "use_lora is True, which is not supported")])
def test_fields_that_do_not_fit(edit, kind, changes, text):
    refuses(edit(kind, **changes), CONFIG, text)


@kinds
def test_tables_that_do_not_fit(edit, kind):
    width = {"PROMPT_TUNING": 16, "PREFIX_TUNING": 32}[kind]
    key = "prompt_embeddings"
    for change, text in (
            (lambda t: {key: t[key][1:]}, f"is float32 (2, {width}), expected float (3, {width})"),
            (lambda t: {key: t[key][:, 1:]}, f"expected float (3, {width})"),
            (lambda t: {key: t[key].astype(np.int32)}, f"is int32 (3, {width})"),
            (lambda t: {key: t[key] * np.nan}, "not finite"), (lambda t: {}, "missing keys"),
            (lambda t: t | {"more": t[key]}, "unexpected keys: more")):
        refuses(edit(kind, change), TENSORS, text)


def refuses(folder, file, text):
    model = base("llama")
    with pytest.raises(FormatError) as info:
        load_adapter(model, folder)
    assert str(info.value).startswith(f"{folder / file}: ") and text in str(info.value)
    assert not adapted_layers(model) and tensors(model) == tensors(base("llama"))


@kinds
def test_fuzzed_fields(edit, kind):
    """Any value in any field: an adapter or FormatError."""
    folder, rng, model = edit(kind), random.Random(0), base("llama")
    raw = read_json(folder / CONFIG)
    for field in ("peft_type", *FRONTS[kind].fields, *sorted(INERT)):
        for value in VALUES if field in FRONTS[kind].fields else rng.sample(VALUES, 3):
            (folder / CONFIG).write_text(json.dumps(raw | {field: value}))
            try:
                load_adapter(model, folder)
            except FormatError:
                assert not adapted_layers(model)
            unload_lora(model)


def test_what_peft_cannot_express(tmp_path):
    class Other(Adapter):
        anywhere, length = True, 1

    model = add_lora(add_prompt(base("gpt2"), P), 2, 4)
    with pytest.raises(ValueError, match="'default' is in front of the text and on layers too"):
        save_adapter(model, tmp_path / "x")
    model = insert_adapters(base("gpt2"), "a", {"front": Other()})
    with pytest.raises(ValueError, match=r"'a' is a Other; PEFT's in front are \['PROMPT_TUNING'"):
        save_adapter(model, tmp_path / "x", "a")
    model = add_prompt(base("gpt2"), P)
    model.parameters()[0].data[0, 0] = np.inf
    with pytest.raises(ValueError, match="P: 1 of its 48 numbers are not finite"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_loaded_beside_an_adapter_of_layers(tmp_path):
    """Two folders under one name act together; under a name that is taken in front, neither."""
    save_adapter(stirred(add_prompt(base("llama"), P)), tmp_path / "prompt")
    save_adapter(stirred(add_lora(base("llama"), 2, 4)), tmp_path / "lora")
    model = load_adapter(load_adapter(base("llama"), tmp_path / "lora"), tmp_path / "prompt")
    both = stirred(add_prompt(base("llama"), P))
    names = {*tensors(stirred(add_lora(base("llama"), 2, 4))), *tensors(both)}
    assert {*tensors(model)} == names
    with pytest.raises(ValueError, match="front already has an adapter 'default'"):
        load_adapter(model, tmp_path / "prompt")


# Peers


def peft_config(peft, kind, **settings):
    make = {"PROMPT_TUNING": peft.PromptTuningConfig, "PREFIX_TUNING": peft.PrefixTuningConfig}
    return make[kind](task_type="CAUSAL_LM", num_virtual_tokens=P, **settings)


@with_peers
@kinds
def test_every_field_of_peft_is_known(peer, kind):
    known = {*FRONTS[kind].fields} | INERT
    fields = {f.name for f in dataclasses.fields(peft_config(peer[2], kind))}
    assert {"prompt_tuning_init", "prefix_projection"} & fields and {*FRONTS[kind].fields} <= fields
    unread = {"peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version",
              "revision", "modules_to_save"}
    assert fields <= known | unread | {"ensure_weight_tying"}


def text_logits(peer, model, mask=None):
    """Theirs, of the text alone: after a prompt PEFT gives those of its rows too."""
    torch, _, _ = peer
    with torch.no_grad():
        found = model.eval()(input_ids=torch.tensor(TEXT), attention_mask=torch.tensor(
            np.ones(TEXT.shape, int) if mask is None else mask)).logits.numpy()
    return found[:, -TEXT.shape[1] :]


WAYS = [("PROMPT_TUNING", {}), ("PREFIX_TUNING", {}),
        ("PREFIX_TUNING", dict(prefix_projection=True, encoder_hidden_size=7))]
MASK = np.ones(TEXT.shape, int)
MASK[0, 4:], MASK[1, :2] = 0, 0  # right and left padding


@with_peers
@CAUSAL
@pytest.mark.parametrize("kind, settings", WAYS)
def test_peer_writes(peer, theirs, tmp_path, name, kind, settings):
    torch, _, peft = peer
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs(name), peft_config(peft, kind, **settings))
    before = text_logits(peer, model)
    model.save_pretrained(tmp_path)
    ours, plain = base(name).astype("float64"), base(name)(TEXT).data
    ours = load_adapter(ours, tmp_path).eval()
    expected = text_logits(peer, peft.PeftModel.from_pretrained(theirs(name), tmp_path))
    assert np.abs(before - plain).max() > 0.01 * np.abs(plain).max()
    agree(expected, before, 1e-6)  # they save in float32
    agree(ours(TEXT).data, expected, TOLERANCE.get(name, 1e-12))
    narrow = load_adapter(base(name), tmp_path).eval()
    agree(narrow(TEXT).data.astype("float64"), expected, 1e-6)


@with_peers
@CAUSAL
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # generate's
@pytest.mark.parametrize("kind, settings", WAYS)
def test_peer_reads(peer, theirs, tmp_path, name, kind, settings):
    """No key missing or left over; the same logits, padded or not, and the same greedy tokens."""
    torch, _, peft = peer
    ours = stirred(KINDS[kind](base(name), P, **{"hidden": 7} if settings else {}))
    if settings:
        settle_prefix(ours)
    save_adapter(ours.astype("float64"), tmp_path)
    model = peft.PeftModel.from_pretrained(theirs(name), tmp_path).double()
    tolerance = TOLERANCE.get(name, 1e-12)
    agree(ours(TEXT).data, text_logits(peer, model), tolerance)
    seen = MASK.astype(bool)
    agree(ours(TEXT, MASK).data[seen], text_logits(peer, model, MASK)[seen], tolerance)
    start = torch.tensor(TEXT[:, :2])
    found = model.generate(input_ids=start, attention_mask=torch.ones_like(start), do_sample=False,
                           max_new_tokens=5, min_new_tokens=5, pad_token_id=0).numpy()
    assert generate(ours, TEXT[:, :2], 5, temperature=0).tolist() == found.tolist()


OTHERS = {"window": Config.llama(**SMALL, hidden=24, kv_heads=2, window=4),
          "heads": Config.llama(**SMALL, hidden=24, kv_heads=2, qk_norm="head", head_width=6),
          "gemma": Config.llama(**SMALL, hidden=24, kv_heads=2, norm_plus_one=True, tied=True,
                                scaled_embedding=True, activation="geglu_tanh", head_width=4)}


@with_peers
@kinds
@pytest.mark.parametrize("name", OTHERS)
def test_later_llamas(peer, tmp_path, name, kind):
    """A window that leaves the rows behind, heads of their own width, a table with a factor."""
    _, transformers, peft = peer
    ours = stirred(Transformer(OTHERS[name]))
    save_model(ours, tmp_path / "model")
    save_adapter(stirred(KINDS[kind](ours, P)), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = peft.PeftModel.from_pretrained(model, tmp_path).double()
    wide = load_adapter(load_model(tmp_path / "model", "float64"), tmp_path).eval()
    agree(wide(TEXT).data, text_logits(peer, model), 1e-6)


@with_peers
@CAUSAL
@kinds
def test_gradients_are_theirs(peer, theirs, tmp_path, name, kind):
    torch, _, peft = peer
    ours = stirred(KINDS[kind](base(name), P)).astype("float64")
    save_adapter(ours, tmp_path)
    config = peft_config(peft, kind)
    model = peft.get_peft_model(theirs(name), config).double()
    weight = model.prompt_encoder["default"].embedding.weight
    table = read_tensors(tmp_path / TENSORS)["prompt_embeddings"]
    weight.data[...] = torch.tensor(table)
    logits = model(input_ids=torch.tensor(TEXT), attention_mask=torch.ones(TEXT.shape)).logits
    targets = np.roll(TEXT, -1, 1)
    torch.nn.functional.cross_entropy(
        logits[:, -TEXT.shape[1] :].reshape(-1, 23), torch.tensor(targets).reshape(-1)).backward()
    ops.cross_entropy(ours(TEXT), targets).backward()
    for p in ours.parameters():
        p.data = p.grad
    save_adapter(ours, tmp_path)
    grad = read_tensors(tmp_path / TENSORS)["prompt_embeddings"]
    agree(grad, weight.grad.numpy(), {"llama": 1e-5}.get(name, 1e-12))


