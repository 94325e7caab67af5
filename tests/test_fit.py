"""What a folder will take, told from its config.json and headers, is what it takes: exactly for the
weights, and about for writing. And what a machine has left."""

import os
import tracemalloc

import numpy as np
import plan_memory
import pytest
from test_remembered import family_folder

from minilm.files import FormatError, read_json, write_json
from minilm.generate import generate
from minilm.interop import load_model, save_model
from minilm.interop.bitsandbytes import save_4bit
from minilm.interop.sizes import read_shape, sizes
from minilm.measure.fit import available, generating
from minilm.quantize import quantize_4bit, quantize_model
from minilm.tensorfiles import read_tensors, write_tensors
from minilm.transformer import Config, Transformer

CONFIGS = {
    "llama": Config.llama(300, 256, 2, 4, 128, hidden=384, kv_heads=2),
    "gpt2": Config.gpt2(300, 256, 2, 4, 64), "gpt2, whole groups": Config.gpt2(300, 64, 1, 4, 128),
    "bert": Config.bert(300, 64, 2, 4, 64, 128),
    "untied": Config.bert(300, 64, 2, 4, 64, 128, segments=0, tied=False)}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def folder_of(path, config, kind):
    model = Transformer(config)
    save_model(quantize_model(model, kind) if kind else model, path)
    return path


def held(model):
    return sum(t.data.nbytes for _, t in model.named_tensors())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [None, "nf4", "llm.int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_are_exact(tmp_path, name, kind, dtype):
    folder = folder_of(tmp_path, CONFIGS[name], kind)
    found, model = sizes(folder, dtype), load_model(folder, dtype)
    assert found.weights == held(model)
    tensors = read_tensors(folder / "model.safetensors")
    assert found.stored == sum(a.nbytes for a in tensors.values())
    assert 0 < found.largest < found.weights
    assert read_shape(folder) == (model.config, {None: None, "nf4": 4, "llm.int8": 8}[kind])


def test_joined_tables_of_codes(tmp_path):
    folder = family_folder(tmp_path / "a", "phi3", CONFIGS["llama"])
    for kind in ("nf4", "llm.int8"):
        save_model(quantize_model(load_model(folder), kind), tmp_path / kind)
        assert sizes(tmp_path / kind).weights == held(load_model(tmp_path / kind))


def test_parts_that_keep_their_8_bit_constants(tmp_path):
    """As bitsandbytes makes them: all of c_attn has one offset, and a third is whole groups."""
    folder = folder_of(tmp_path, CONFIGS["gpt2, whole groups"], "nf4")
    key, file = "transformer.h.0.attn.c_attn.weight", folder / "model.safetensors"
    W = np.random.default_rng(0).standard_normal((384, 128), np.float32)
    write_tensors(file, {k: a for k, a in read_tensors(file).items() if not k.startswith(key)}
                  | save_4bit(quantize_4bit(W), key))
    model = load_model(folder)
    assert model.blocks[0].attention.v.weight.c1 is not None
    assert sizes(folder).weights == held(model)


def test_no_weight_is_read(tmp_path):
    """So numbers that are not finite do not matter; sizes that contradict each other do."""
    folder = folder_of(tmp_path, CONFIGS["llama"], "nf4")
    file = folder / "model.safetensors"
    expected, tensors = sizes(folder), read_tensors(file)
    key = "model.layers.0.mlp.up_proj.weight"
    tensors["model.norm.weight"][:] = np.nan
    tensors[f"{key}.nested_absmax"][:] = np.inf
    write_tensors(file, tensors)
    assert sizes(folder) == expected
    write_tensors(file, tensors | {key: tensors[key][:-1]})
    with pytest.raises(FormatError, match="up_proj"):
        sizes(folder)


@pytest.mark.parametrize("kind", [None, "nf4", "llm.int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_writing_takes_about_that(tmp_path, name, kind):
    config = CONFIGS[name]
    model = load_model(folder_of(tmp_path, config, kind))
    prompt = np.ones((2, 200), int)
    generate(model, prompt[:, :8], 2)  # what is made late
    tracemalloc.start()
    generate(model, prompt, 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    told = held(model) + generating(config, 2, 220, bits=kind and read_shape(tmp_path)[1])
    assert 0.8 < told / (held(model) + peak) < 1.6


def test_what_a_machine_has_left(tmp_path):
    assert available(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\n")
    assert available(tmp_path) == 5120
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("3000\n")
    for limit, expected in (("max", 5120), ("7000", 4000), ("9000", 5120), ("2000", 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert available(tmp_path) == expected


def test_the_program_says_whether_a_folder_fits(tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path / "a", CONFIGS["llama"], None)
    monkeypatch.setattr(plan_memory, "available", lambda: 10**6)
    plan_memory.main(folder)
    said = capsys.readouterr().out
    assert [line.split() for line in said.splitlines()][1] == ["full", "lora", "qlora"]
    found = sizes(folder)
    assert "available on this machine: 1.00 MB\n" in said
    over = found.loading - 10**6
    assert (f"the folder's {found.stored / 1e6:.2f} MB, loaded: {found.loading / 1e6:.2f} MB, "
            f"short of {over / 1e6:.2f} MB\n") in said
    monkeypatch.setattr(plan_memory, "available", lambda: 10**12)
    plan_memory.main(folder, dtype="bfloat16")
    assert capsys.readouterr().out.count(", fits\n") == 2
    (folder / "model.safetensors").unlink()
    plan_memory.main(folder)
    assert "loaded" not in capsys.readouterr().out


def test_a_quantized_folder_is_planned_with_its_own_weights(tmp_path, capsys):
    folder = folder_of(tmp_path, CONFIGS["llama"], "llm.int8")
    plan_memory.main(folder)
    said = capsys.readouterr().out
    assert f"weights{sizes(folder).weights / 1e6:13.2f} MB".split() in [
        line.split() for line in said.splitlines()]
    with pytest.raises(ValueError, match="quantized to 8 bits, which are not trained"):
        plan_memory.main(folder, method=("full",), given=frozenset({"method"}))
    raw = read_json(folder / "config.json")
    raw["quantization_config"]["quant_method"] = "gptq"
    write_json(folder / "config.json", raw)
    with pytest.raises(FormatError, match="quant_method 'gptq'"):
        plan_memory.main(folder)
