"""A model's place in its subspace in a folder: the bits that come back, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_methods import CONFIGS, all_of, bits, logits, make

from minilm.files import FormatError, read_json, write_json
from minilm.interop import base_of, load_adapter, peft, save_adapter, subspaces
from minilm.peft import (
    add_bottleneck,
    add_lora,
    add_prefix,
    add_subspace,
    merge_lora,
    subspace_of,
    unload_lora,
)
from minilm.quantize import quantize_model
from minilm.tensorfiles import write_tensors


def moved(family="gpt2", d=20, dtype="float32", name="default", **settings):
    model = add_subspace(make(family, dtype=dtype), d, name=name, **settings)
    subspace = subspace_of(model)
    subspace.theta += np.random.default_rng(4).standard_normal(d)
    subspace.place()
    return model


@pytest.mark.parametrize("family", CONFIGS)
@given(d=st.integers(9, 40), said=st.booleans(), projection=st.sampled_from(["fastfood", "dense"]),
       seed=st.integers(0, 9))
def test_what_is_saved_comes_back_bit_for_bit(tmp_path_factory, family, d, said, projection, seed):
    path = tmp_path_factory.mktemp("adapter")
    settings = dict(said=said, projection=projection, seed=seed)
    model = moved(family, d, **settings)
    save_adapter(model, path, base="runs/a/model")
    again = load_adapter(make(family), path)
    ours, theirs = ({n: t.data.tobytes() for n, t in m.named_parameters()} for m in (model, again))
    assert ours == theirs and bits(again) == bits(make(family)) and base_of(path) == "runs/a/model"
    assert read_json(path / "subspace.json") == {
        "d": d, **settings, "D": subspace_of(model).D, "base": "runs/a/model"}
    assert (path / "subspace.safetensors").stat().st_size < 4 * d + 200
    merged = [unload_lora(merge_lora(m)).state_dict() for m in (model, again)]
    assert all(np.array_equal(a, merged[1][name]) for name, a in merged[0].items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_names_and_dtypes_are_the_models(tmp_path, dtype):
    model = moved(dtype=dtype, name="b")
    save_adapter(model, tmp_path, "b")
    again = load_adapter(add_lora(make("gpt2", dtype=dtype), 2, 4), tmp_path, "c")
    assert np.array_equal(logits(again), logits(model)) and base_of(tmp_path) is None
    assert {p.dtype.name for p in again.parameters()} == {dtype}
    before = all_of(again)
    with pytest.raises(ValueError, match="already has an adapter 'c'"):
        load_adapter(again, tmp_path, "c")
    assert all_of(again) == before


@pytest.mark.parametrize("change, words", [
    (dict(d=10**12), r"theta is float32 \(20,\), expected float \(1000000000000,\)"),
    (dict(d=21), r"theta is float32 \(20,\), expected float \(21,\)"),
    (dict(d=0), r"theta is float32 \(20,\), expected float \(0,\)"), (dict(d="20"), "d is '20'"),
    (dict(D=7089), "not for this model: D is 7,089, and the model has 7,088 numbers"),
    (dict(seed=-1), "not for this model: seed must be at least 0, got -1"),
    (dict(projection="sparse"), "projection is 'sparse', expected"), (dict(said=1), "said is 1"),
    (dict(extra=1), r"\['extra'\] unknown")])
def test_settings_that_do_not_fit_are_named(tmp_path, change, words):
    save_adapter(moved(), tmp_path)
    write_json(tmp_path / "subspace.json", read_json(tmp_path / "subspace.json") | change)
    refused(tmp_path, words)


def refused(path, words, model=None, error=FormatError):
    """The model is then as it was."""
    model = model or make("gpt2")
    before = all_of(model)
    with pytest.raises(error, match=words):
        load_adapter(model, path)
    assert all_of(model) == before


def test_another_model_is_refused(tmp_path):
    save_adapter(moved(), tmp_path)
    refused(tmp_path, "D is 7,088, and the model has 4,592 numbers", make("llama"))
    refused(tmp_path, "not for this model: .* is quantized", quantize_model(make("gpt2")))
    save_adapter(moved("bert", d=8, said=True), tmp_path)
    write_json(tmp_path / "subspace.json", read_json(tmp_path / "subspace.json") | {"d": 7})
    write_tensors(tmp_path / "subspace.safetensors", {"theta": np.zeros(7, np.float32)})
    refused(tmp_path, "d must be 8 to 4,803, of which 7 scale a layer each", make("bert"))


def test_damaged_files_are_refused(tmp_path):
    save_adapter(moved(), tmp_path)
    file = tmp_path / "subspace.safetensors"
    for theta, words in ((np.full(20, np.nan, np.float32), "theta has numbers that are not fin"),
                         (np.zeros(20, np.int32), "theta is int32")):
        write_tensors(file, {"theta": theta})
        refused(tmp_path, words)
    write_tensors(file, {"x": np.zeros(20, np.float32)})
    refused(tmp_path, "missing keys: theta; unexpected keys: x")
    file.unlink()
    refused(tmp_path, "subspace", error=FileNotFoundError)


def test_only_a_subspace_is_saved(tmp_path):
    for model in (add_lora(make("gpt2"), 2, 4), add_bottleneck(make("gpt2"), 2)):
        with pytest.raises(ValueError, match="this model has no subspace 'default'"):
            subspaces.save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match=r"a subspace alone, but .* is of \['Moved', 'Prefix'\]"):
        save_adapter(add_prefix(moved(), 3), tmp_path / "a")
    with pytest.raises(ValueError, match="PEFT has no form for a subspace"):
        peft.save_adapter(moved(), tmp_path / "a")
    model = moved()
    subspace_of(model).theta[3] = np.inf
    with pytest.raises(ValueError, match="theta: 1 of its 20 numbers are not finite"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
