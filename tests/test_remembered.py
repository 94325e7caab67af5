"""What a folder says beside its weights comes back when the model is saved: its family, fields that
no Config has, how it samples, its tokenizer; but what the model itself says wins. And a folder that
holds no model, or one in another format, is refused with what to do."""

import errno
import os
from dataclasses import replace

import numpy as np
import pytest

from minilm.data import BPETokenizer, ByteTokenizer, load_tokenizer
from minilm.distill import student_from_teacher
from minilm.files import FormatError, read_json, write_json
from minilm.interop import load_model, save_model
from minilm.interop.huggingface import describe
from minilm.interop.peft import load_adapter, save_adapter
from minilm.interop.remembered import TOKENIZER_FILES
from minilm.nn import Linear
from minilm.peft import add_lora, merge_lora, unload_lora
from minilm.quantize import quantize_model
from minilm.tensorfiles import read_tensors, write_tensors
from minilm.transformer import Config, Ends, Transformer

SMALL = dict(vocab_size=300, context=11, layers=2, heads=4, width=64)
TOKENS = np.random.default_rng(5).integers(0, 23, (3, 9))
EXTRA = {"attention_dropout": 0.25, "initializer_range": 0.5, "id2label": {"0": "no"},
         "of_its_own": [1, 2], "architectures": ["Mine"], "transformers_version": "4.9"}
SAMPLING = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "bos_token_id": 3}
FILES = {"chat_template.jinja": b"{{ messages }}\r\n", "merges.txt": b"#version: 0.2\n\xc3\xa9 a\n",
         "tokenizer.model": bytes(range(256)), "special_tokens_map.json": b'{"eos_token": "</s>" }',
         "added_tokens.json": b"{}", "vocab.json": b'{"a": 1}'}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def folder_of(path, config=None, kind=None, tokenizer=None, **changes):
    """A model's folder with everything that others write beside the weights."""
    model = Transformer(config or Config.llama(**SMALL, hidden=128))
    save_model(quantize_model(model, kind) if kind else model, path, tokenizer or ByteTokenizer())
    write_json(path / "config.json", read_json(path / "config.json") | EXTRA | changes)
    write_json(path / "generation_config.json", SAMPLING | {"eos_token_id": [4, 5]})
    config = read_json(path / "tokenizer_config.json") | {"chat_template": "{{ x }}", "mine": 1}
    write_json(path / "tokenizer_config.json", config)
    for name, data in FILES.items():
        (path / name).write_bytes(data)
    return path


def beside(path):
    """{file: bytes} of the tokenizer."""
    return {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).exists()}


def expect_all(found, original, changed=()):
    """All that the original says is there, but for the architecture, which is the model's own."""
    raw, old = (read_json(path / "config.json") for path in (found, original))
    skip = {"architectures", "bos_token_id", "eos_token_id", *changed}
    assert {k: raw.get(k) for k in old.keys() - skip} == {k: old[k] for k in old.keys() - skip}
    assert beside(found) == beside(original) and len(beside(found)) == 2 + len(FILES)
    generation = read_json(found / "generation_config.json")
    assert generation == read_json(original / "generation_config.json")


@pytest.mark.parametrize("kind", [None, "nf4", "llm.int8"])
def test_all_of_a_folder_comes_back(tmp_path, kind):
    folder = folder_of(tmp_path / "a", kind=kind)
    save_model(load_model(folder), tmp_path / "b")
    expect_all(tmp_path / "b", folder)
    assert read_json(tmp_path / "b" / "config.json")["architectures"] == ["LlamaForCausalLM"]
    save_model(load_model(tmp_path / "b"), tmp_path / "c")
    for file in os.listdir(tmp_path / "b"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes(), file


def test_what_is_made_of_a_model_carries_it(tmp_path):
    """Merged, quantized, cast, with fewer layers."""
    folder = folder_of(tmp_path / "a")
    model = add_lora(load_model(folder), r=2, alpha=4)
    save_model(unload_lora(merge_lora(model)), tmp_path / "merged")
    expect_all(tmp_path / "merged", folder)
    save_model(quantize_model(load_model(folder), "nf4"), tmp_path / "quantized")
    expect_all(tmp_path / "quantized", folder)
    save_model(load_model(folder, "bfloat16"), tmp_path / "narrow")
    expect_all(tmp_path / "narrow", folder, ["dtype", "torch_dtype"])
    save_model(student_from_teacher(load_model(folder), [1]), tmp_path / "student")
    expect_all(tmp_path / "student", folder, ["num_hidden_layers"])
    assert read_json(tmp_path / "student" / "config.json")["num_hidden_layers"] == 1


def test_the_model_wins_over_what_is_remembered(tmp_path):
    model = load_model(folder_of(tmp_path / "a", eos_token_id=77))
    assert model.ends == Ends(3, (4, 5), None)
    model.ends = Ends(None, (9,), 8)
    save_model(model, tmp_path / "b")
    assert read_json(tmp_path / "b" / "config.json").items() >= {
        "bos_token_id": None, "eos_token_id": 9, "pad_token_id": None}.items()
    assert read_json(tmp_path / "b" / "generation_config.json") == {
        "temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": 9, "pad_token_id": 8}
    assert load_model(tmp_path / "b").ends == model.ends


@pytest.mark.parametrize("kind, config", [
    ("mistral", Config.llama(**SMALL, hidden=128)), ("phi3", Config.llama(**SMALL, hidden=128)),
    ("qwen2", Config.llama(**SMALL, hidden=128, bias=("q", "k", "v"))),
    ("gemma", Config.llama(**SMALL, hidden=128, activation="geglu_tanh", norm_plus_one=True,
                           scaled_embedding=True, tied=True))])
def test_the_family_stays(tmp_path, kind, config):
    """Also if another one, which is tried before it, could express the same."""
    folder = family_folder(tmp_path / "a", kind, config)
    model = load_model(folder)
    save_model(model, tmp_path / "b")
    raw = read_json(tmp_path / "b" / "config.json")
    assert raw["model_type"] == kind and raw["attention_dropout"] == 0.25
    ours, theirs = (read_tensors(tmp_path / who / "model.safetensors") for who in "ba")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert ("model.layers.1.mlp.gate_up_proj.weight" in ours) == (kind == "phi3")
    assert load_model(tmp_path / "b").config == model.config == config


def family_folder(path, kind, config):
    """A folder of this model_type; a Phi-3 has joined tables."""
    folder_of(path, config, model_type=kind, sliding_window=None)
    raw = read_json(path / "config.json")
    write_json(path / "config.json", {k: v for k, v in raw.items() if not k.endswith("_bias")})
    if kind == "phi3":
        file = path / "model.safetensors"
        tensors = read_tensors(file)
        for i in range(config.layers):
            for joined, parts in {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj",
                                                         "self_attn.v_proj"),
                                  "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}.items():
                rows = [tensors.pop(f"model.layers.{i}.{part}.weight") for part in parts]
                tensors[f"model.layers.{i}.{joined}.weight"] = np.concatenate(rows)
        write_tensors(file, tensors)
    return path


def test_config_json_keeps_its_words(tmp_path):
    """As long as they still say what the model is."""
    words = {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 500,
             "sliding_window": 99, "eos_token_id": [7], "hidden_act": "swish"}
    folder = folder_of(tmp_path / "a", model_type="mistral", **words)
    raw = read_json(folder / "config.json")
    for field in ("rope_parameters", "head_dim", "attention_bias", "mlp_bias"):
        del raw[field]
    write_json(folder / "config.json", raw)
    write_json(folder / "generation_config.json", {"eos_token_id": [7], "top_k": 3})
    save_model(load_model(folder), tmp_path / "b")
    found = read_json(tmp_path / "b" / "config.json")
    assert found == raw | {"architectures": ["MistralForCausalLM"]}
    generation = read_json(tmp_path / "b" / "generation_config.json")
    assert generation == {"eos_token_id": [7], "top_k": 3}
    save_model(student_from_teacher(load_model(folder), [1]), tmp_path / "c")
    found = read_json(tmp_path / "c" / "config.json")
    assert found["num_hidden_layers"] == 1 and found["hidden_act"] == "silu"
    assert load_model(tmp_path / "c").config.rope == load_model(folder).config.rope


def test_a_model_of_another_family_now_is_saved_as_that(tmp_path):
    """Nothing of config.json counts then, but the tokenizer is still its own."""
    folder = family_folder(tmp_path / "a", "phi3", Config.llama(**SMALL, hidden=128))
    model = load_model(folder)
    model.config = replace(model.config, norm_eps=1e-4, bias=("q", "k", "v", "o"))
    rng = np.random.default_rng(0)
    for block in model.blocks:
        for part in "qkvo":
            setattr(block.attention, part, Linear(64, 64, rng))
        block.norm1.eps = block.norm2.eps = 1e-4
    model.norm.eps = 1e-4
    save_model(model, tmp_path / "b")
    raw = read_json(tmp_path / "b" / "config.json")
    assert raw["model_type"] == "llama" and "of_its_own" not in raw
    assert beside(tmp_path / "b") == beside(folder)
    assert np.array_equal(load_model(tmp_path / "b")(TOKENS).data, model(TOKENS).data)


def test_an_adapter_of_a_phi3_is_of_its_joined_tables(tmp_path):
    folder = family_folder(tmp_path / "a", "phi3", Config.llama(**SMALL, hidden=128))
    model = load_model(folder)
    assert describe(model)[0].architecture == "Phi3ForCausalLM"
    add_lora(model, r=2, alpha=4, targets="all-linear")
    for _, t in model.named_parameters():
        t.data += np.random.default_rng(0).normal(0, 0.1, t.shape).astype(np.float32)
    save_adapter(model, tmp_path / "adapter")
    keys = read_tensors(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("qkv_proj" in key for key in keys) and not any(".q_proj" in key for key in keys)
    again = load_adapter(load_model(folder), tmp_path / "adapter")
    assert np.abs(again(TOKENS).data - model(TOKENS).data).max() < 1e-5


def test_a_given_tokenizer_wins_unless_it_is_the_same(tmp_path):
    """The same one adds nothing; another one leaves no file of the old one, no template either."""
    folder = folder_of(tmp_path / "a")
    save_model(load_model(folder), tmp_path / "b", load_tokenizer(folder / "tokenizer.json"))
    assert beside(tmp_path / "b") == beside(folder)
    other = BPETokenizer.train(["the cat sat on the mat"] * 3, 280)
    save_model(load_model(folder), tmp_path / "c", other)
    assert set(beside(tmp_path / "c")) == {"tokenizer.json", "tokenizer_config.json"}
    assert "chat_template" not in read_json(tmp_path / "c" / "tokenizer_config.json")
    again = load_tokenizer(tmp_path / "c" / "tokenizer.json")
    assert again.encode("the mat").tolist() == other.encode("the mat").tolist()
    bpe = folder_of(tmp_path / "d", tokenizer=other)
    raw = read_json(bpe / "tokenizer.json")  # older files spell a merge as one text
    raw["model"]["merges"] = [" ".join(merge) for merge in raw["model"]["merges"]]
    write_json(bpe / "tokenizer.json", raw | {"truncation": {
        "max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}})
    save_model(load_model(bpe), tmp_path / "e", load_tokenizer(bpe / "tokenizer.json"))
    assert beside(tmp_path / "e") == beside(bpe)


@pytest.mark.parametrize("data", [b"", b"[1]", b"\xff", b'{"model": 3, "added_tokens": [1]}'])
def test_damaged_files_of_a_tokenizer_are_no_matter_of_the_model(tmp_path, data):
    """They come back as they are, until a tokenizer replaces them."""
    folder = folder_of(tmp_path / "a")
    (folder / "tokenizer.json").write_bytes(data)
    save_model(load_model(folder), tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == data
    save_model(load_model(folder), tmp_path / "c", ByteTokenizer())
    assert load_tokenizer(tmp_path / "c" / "tokenizer.json").vocab_size == 258


# Refusals


def expect(path, error, *texts):
    with pytest.raises(error) as info:
        load_model(path)
    assert all(text in str(info.value) for text in texts), str(info.value)
    return info.value


def test_no_folder_and_a_file(tmp_path):
    assert expect(tmp_path / "x", FileNotFoundError, "no such folder").errno == errno.ENOENT
    (tmp_path / "f.safetensors").write_bytes(b"")
    expect(tmp_path / "f.safetensors", FormatError, "is no folder", "config.json")


@pytest.mark.parametrize("name, texts", [
    ("pytorch_model.bin", ["pickle", "from_pretrained(", 'save_pretrained("converted")']),
    ("consolidated.00.pth", ["pickle", "from_pretrained("]),
    ("model-Q4_K.gguf", ["GGUF", 'gguf_file="model-Q4_K.gguf"', "save_pretrained"])])
def test_other_formats_say_how_to_convert(tmp_path, name, texts):
    folder = folder_of(tmp_path / "a")
    (folder / "model.safetensors").rename(folder / name)
    expect(folder, FormatError, str(folder / name), *texts)
    (folder / "config.json").unlink()
    expect(folder, FormatError, str(folder / name), *texts)


def test_an_adapters_folder_is_no_model(tmp_path):
    save_adapter(add_lora(Transformer(Config.llama(**SMALL, hidden=128)), 2, 4), tmp_path)
    expect(tmp_path, FormatError, "adapter", "load_adapter", "--adapter")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_is_no_file(tmp_path, name):
    folder = folder_of(tmp_path / "a")
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    expect(folder, FormatError, str(folder / name), "git lfs pull")
