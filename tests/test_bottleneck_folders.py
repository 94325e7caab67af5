"""Bottleneck adapters in their own folders: what comes back, and what is refused by its name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_methods import CONFIGS, logits, make, stir

from minilm.files import FormatError, read_json, write_json
from minilm.interop import base_of, bottlenecks, load_adapter, save_adapter
from minilm.peft import add_bottleneck, add_lora, use_adapter
from minilm.tensorfiles import read_tensors, write_tensors


@pytest.mark.parametrize("family", CONFIGS)
@given(m=st.integers(1, 5), form=st.sampled_from("HPL"), skip=st.integers(0, 1),
       norms=st.booleans(), activation=st.sampled_from(["relu", "gelu", "silu"]))
def test_what_is_saved_comes_back(tmp_path_factory, family, m, form, skip, norms, activation):
    path = tmp_path_factory.mktemp("adapter")
    settings = dict(form=form, skip=skip, norms=norms and form == "H", activation=activation)
    model = stir(add_bottleneck(make(family), m, **settings))
    save_adapter(model, path, base="runs/a/model")
    again = load_adapter(make(family), path)
    assert np.array_equal(logits(again), logits(model))
    ours, theirs = (dict(found.named_parameters()) for found in (model, again))
    assert ours.keys() == theirs.keys() and base_of(path) == "runs/a/model"
    assert read_json(path / "bottleneck.json") == {"m": m, **settings, "base": "runs/a/model"}


def test_names_and_dtypes_are_the_models(tmp_path):
    save_adapter(stir(add_bottleneck(make("gpt2"), 3, name="b")), tmp_path, "b")
    model = load_adapter(add_lora(make("gpt2", dtype="bfloat16"), 2, 4), tmp_path, "c")
    assert {p.dtype.name for p in model.parameters()} == {"bfloat16"}
    assert all(".adapters.c." in name for name, _ in model.named_parameters())
    assert base_of(tmp_path) is None
    with pytest.raises(ValueError, match="already has an adapter 'c'"):
        load_adapter(model, tmp_path, "c")


@pytest.mark.parametrize("change, words", [
    (dict(m=10**12), r"has no W_down of 1000000000000 rows, which bottleneck\.json says"),
    (dict(skip=2), "not for this model: skip must be 0 to 1, got 2"),
    (dict(form="P", norms=True), "not for this model: norms are trained with form H"),
    (dict(form="X"), "form is 'X', expected"), (dict(extra=1), r"\['extra'\] unknown"),
    (dict(m=4), "has no W_down of 4 rows"),
    (dict(form="P"), r"unexpected keys: blocks\.0\.attention\.o"),
    (dict(form="L"), r"missing keys: blocks\.0\.mlp\.down\.norm"), (dict(m="3"), "m is '3'")])
def test_settings_that_do_not_fit_are_named(tmp_path, change, words):
    save_adapter(add_bottleneck(make("gpt2"), 3), tmp_path)
    write_json(tmp_path / "bottleneck.json", read_json(tmp_path / "bottleneck.json") | change)
    refused(tmp_path, words)


def refused(path, words):
    """The model is then as it was."""
    model = make("gpt2")
    before = model.state_dict().keys()
    with pytest.raises(FormatError, match=words):
        load_adapter(model, path)
    assert model.state_dict().keys() == before


def test_damaged_files_are_refused(tmp_path):
    save_adapter(add_bottleneck(make("gpt2"), 3), tmp_path)
    file = tmp_path / "bottleneck.safetensors"
    arrays = read_tensors(file)
    arrays["blocks.1.mlp.down.b_up"] = np.full(16, np.nan, np.float32)
    write_tensors(file, arrays)
    refused(tmp_path, r"blocks\.1\.mlp\.down\.b_up")
    file.unlink()
    with pytest.raises(FileNotFoundError):
        load_adapter(make("gpt2"), tmp_path)


def test_only_what_add_bottleneck_makes_is_saved(tmp_path):
    model = add_bottleneck(make("gpt2"), 3)
    del model.blocks[1].mlp.down.adapters["default"]
    with pytest.raises(ValueError, match="'default' is not what add_bottleneck makes"):
        save_adapter(model, tmp_path / "a")
    model = add_lora(make("gpt2"), 2, 4)
    with pytest.raises(ValueError, match="this model has no bottlenecks 'default'"):
        bottlenecks.save_adapter(model, tmp_path / "a")
    model = stir(add_bottleneck(make("gpt2"), 3))
    model.blocks[0].mlp.down.adapters["default"].b_up.data[0] = np.inf
    with pytest.raises(ValueError, match="b_up: 1 of its 16 numbers are not finite"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_base_is_what_it_was(tmp_path):
    save_adapter(stir(add_bottleneck(make("llama"), 3)), tmp_path)
    model = make("llama")
    before = logits(model)
    load_adapter(model, tmp_path)
    assert not np.array_equal(logits(model), before)
    assert np.array_equal(logits(use_adapter(model, None)), before)
