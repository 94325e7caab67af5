"""LLM.int8() folders: what is saved comes back bit for bit and computes equation (3) from the
file's own numbers, what is damaged or no such weight is refused by name, interop.load_model takes
any folder, and (marked peers) bitsandbytes' layers and transformers' logits agree, whoever wrote
them."""

import math
import os
import shutil

import generate as script
import numpy as np
import pytest

from minilm.data import ByteTokenizer, printable
from minilm.files import FormatError, read_json, write_json
from minilm.generate import generate
from minilm.interop import bitsandbytes, huggingface, load_model, save_model
from minilm.interop.eight_bits import load_8bit, save_8bit
from minilm.quantize import QuantizedLinear, quantize_int8, quantize_model
from minilm.tensor import Tensor
from minilm.tensorfiles import read_tensors, write_tensors
from minilm.transformer import Config, Transformer

SMALL = dict(vocab_size=23, context=11, layers=2, heads=4, width=64)
CONFIGS = {"gpt2": Config.gpt2(**SMALL), "llama": Config.llama(**SMALL, hidden=128, kv_heads=2),
           "bert": Config.bert(**SMALL, hidden=128)}
TOKENS = np.random.default_rng(5).integers(0, 23, (3, 9))
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def base(name):
    """A model with noise on every parameter."""
    model, rng = Transformer(CONFIGS[name]), np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += rng.normal(0, 0.15, t.shape).astype(np.float32)
    return model.eval()


def layers(model):
    return {path: m for path, m in model.named_modules() if type(m) is QuantizedLinear}


def same(a, b):
    """Equal names, dtypes and bits."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: (model, folder)}; nobody writes into the folders."""
    root, models = tmp_path_factory.mktemp("saved"), {}
    for name in CONFIGS:
        models[name] = quantize_model(base(name), "llm.int8"), root / name
        bitsandbytes.save_model(*models[name])
    return models


@pytest.fixture
def edit(saved, tmp_path):
    """edit(tensors=change, field=value) -> a copy of the Llama's folder with changes."""
    def copy(tensors=lambda t: t, **changes):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(saved["llama"][1], folder)
        raw, file = read_json(folder / "config.json"), folder / "model.safetensors"
        raw["quantization_config"] |= changes
        write_json(folder / "config.json", raw)
        write_tensors(file, tensors(read_tensors(file)))
        return folder

    return copy


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(saved, tmp_path, name):
    model, folder = saved[name]
    loaded = load_model(folder)
    assert same(loaded, model) and loaded.config == model.config
    assert {m.threshold for m in layers(loaded).values()} == {6.0}
    assert np.array_equal(loaded(TOKENS).data, model(TOKENS).data)
    bitsandbytes.save_model(loaded, tmp_path)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("outliers", [(), (3,), (0, 17, 63)])
def test_a_layer_computes_equation_3_from_the_files_numbers(saved, outliers):
    """A column with an outlier is multiplied in float16, the others in codes of their row."""
    _, folder = saved["llama"]
    tensors = read_tensors(folder / "model.safetensors")
    codes, scb = tensors[f"{MODULE}.weight"], tensors[f"{MODULE}.SCB"]
    assert codes.dtype == np.int8 and scb.shape == (64,) and np.abs(codes).max(1).min() == 127
    x = np.random.default_rng(0).standard_normal((5, 64)).clip(-3, 3).astype(np.float16)
    x[2, list(outliers)] = 8
    W = codes.astype(np.float64) * scb[:, None].astype(np.float64) / 127
    expected = np.zeros((5, 64))
    plain = x.astype(np.float64)
    plain[:, list(outliers)] = 0
    for n in range(5):
        c = 127 / np.abs(plain[n]).max()
        expected[n] = np.rint(plain[n] * c) / c @ W.T
    for h in outliers:
        expected += np.outer(x[:, h].astype(np.float64), W[:, h].astype(np.float16))
    found = layers(load_model(folder))["blocks.0.attention.q"](Tensor(x.astype(np.float32))).data
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.abs(found - x.astype(np.float64) @ W.T).max() > 1e-3 * np.abs(expected).max()


def test_threshold_0_there_is_infinity_here(edit, tmp_path):
    """It means that no input is an outlier."""
    model = load_model(edit(llm_int8_threshold=0.0))
    assert {m.threshold for m in layers(model).values()} == {math.inf}
    bitsandbytes.save_model(model, tmp_path / "again")
    again = read_json(tmp_path / "again" / "config.json")["quantization_config"]
    assert again["llm_int8_threshold"] == 0.0
    model = load_model(edit(llm_int8_threshold=3))
    assert {m.threshold for m in layers(model).values()} == {3.0}


@pytest.mark.parametrize("field, value", [
    ("llm_int8_threshold", -1), ("llm_int8_threshold", "6"), ("llm_int8_threshold", True),
    ("llm_int8_has_fp16_weight", True), ("load_in_4bit", True), ("quant_method", "gptq")])
def test_refused_fields(edit, field, value):
    with pytest.raises(FormatError, match=f"quantization_config has {field}"):
        load_model(edit(**{field: value}))


def changed(part, change):
    return lambda t: t | {f"{MODULE}.{part}": change(t[f"{MODULE}.{part}"].copy())}


def spoilt(value):
    def spoil(array):
        array[3] = value
        return array
    return spoil


@pytest.mark.parametrize("change, text", [
    (changed("weight", lambda a: a[:-1]), "SCB is float32 (64,), expected float32 (63,)"),
    (changed("weight", lambda a: a.astype(np.uint8)), "weight is uint8 (64, 64), expected int8"),
    (changed("weight", lambda a: a.reshape(-1)), "weight is int8 (4096,)"),
    (changed("SCB", lambda a: a.astype(np.float16)), "SCB is float16"),
    (changed("SCB", lambda a: a[None]), "SCB is (1, 64)"),
    (changed("SCB", spoilt(np.nan)), "SCB has numbers"),
    (changed("SCB", spoilt(-1)), "SCB has numbers"),
    (changed("weight_format", lambda a: np.full((), 2, np.uint8)), "weight_format is 2, expected"),
    (changed("weight_format", lambda a: np.zeros(2, np.uint8)), "weight_format is uint8 (2,)"),
    (lambda t: {k: a for k, a in t.items() if k != f"{MODULE}.weight"}, "weight is missing"),
    (lambda t: {k: a for k, a in t.items() if k != f"{MODULE}.SCB"}, "weight is int8"),
    (lambda t: t | {"model.norm.SCB": np.ones(64, np.float32)}, "model.norm.weight is float32"),
    (lambda t: t | {"model.embed_tokens.SCB": np.ones(23, np.float32),
                    "model.embed_tokens.weight": np.ones((23, 64), np.int8)}, "embed_tokens"),
])
def test_damaged_folders(edit, change, text):
    with pytest.raises(FormatError) as info:
        load_model(edit(change))
    assert text in str(info.value)


def test_old_folders_have_no_weight_format(saved, edit):
    old = edit(lambda t: {k: a for k, a in t.items() if not k.endswith("weight_format")})
    assert same(load_model(old), saved["llama"][0])


def test_a_weight_comes_back():
    x = quantize_int8(np.random.default_rng(0).standard_normal((6, 40), np.float32), axis=-1)
    tensors = save_8bit(x, "m")
    assert {name: (a.dtype.name, a.shape) for name, a in tensors.items()} == {
        "m.weight": ("int8", (6, 40)), "m.SCB": ("float32", (6,)), "m.weight_format": ("uint8", ())}
    again = load_8bit(tensors, "m")
    assert np.array_equal(again.codes, x.codes) and np.array_equal(again.absmax, x.absmax)
    with pytest.raises(ValueError, match="a constant a row"):
        save_8bit(quantize_int8(np.ones((4, 4))), "m")


def test_kinds_that_bitsandbytes_has_not(tmp_path):
    with pytest.raises(ValueError, match="Int8"):
        bitsandbytes.save_model(quantize_model(base("llama"), "int8"), tmp_path / "x")
    model = quantize_model(base("llama"), "llm.int8")
    layers(model)["blocks.0.attention.q"].threshold = 5.0
    with pytest.raises(ValueError, match="one threshold"):
        bitsandbytes.save_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_one_reader_takes_any_folder(saved, tmp_path):
    for kind in (None, "nf4", "llm.int8"):
        model = base("llama") if kind is None else quantize_model(base("llama"), kind)
        (huggingface if kind is None else bitsandbytes).save_model(model, tmp_path)
        loaded = load_model(tmp_path, dropout=0.25)
        assert same(loaded, model) and loaded.config.dropout == 0.25
        narrow = load_model(tmp_path, "bfloat16")
        assert narrow.embed.weight.dtype == "bfloat16"
        assert len(layers(narrow)) == (0 if kind is None else 14)
    with pytest.raises(FormatError, match=r"quantization_config.*interop\.load_model"):
        huggingface.load_model(saved["llama"][1])


@pytest.mark.parametrize("kind", ["nf4", "llm.int8"])
def test_the_script_writes_with_a_quantized_model(tmp_path, capsys, kind):
    tokenizer = ByteTokenizer()
    model = quantize_model(Transformer(Config.llama(**SMALL | {"vocab_size": 258, "context": 32},
                                                    hidden=128)), kind)
    save_model(model, tmp_path, tokenizer)
    script.main(tmp_path, "the cat", 12, temperature=0)
    drawn = generate(load_model(tmp_path), tokenizer.encode("the cat")[None], 12, 0)[0]
    assert capsys.readouterr().out == printable(tokenizer.decode(drawn)) + "\n"


@pytest.fixture(scope="session")
def peer():
    """(torch, transformers, bitsandbytes), offline and quiet."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    bnb = pytest.importorskip("bitsandbytes")
    import logging

    import torch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return torch, transformers, bnb


FAMILIES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM"}


def in_8_bits(peer, name, tmp_path):
    """A folder that transformers quantized, its model, and the folder of floats."""
    torch, transformers, _ = peer
    model, architecture = base("llama" if name == "phi3" else name), FAMILIES[name]
    huggingface.save_model(model, tmp_path / "plain")
    if name == "phi3":
        config = transformers.Phi3Config(
            vocab_size=23, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=11,
            pad_token_id=0)
        torch.manual_seed(0)
        transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / "plain")
    theirs = getattr(transformers, architecture).from_pretrained(
        tmp_path / "plain", dtype=torch.float32, device_map="cpu",
        quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", theirs, tmp_path / "plain"


def their_logits(peer, model):
    with peer[0].no_grad():
        return model(peer[0].tensor(TOKENS)).logits.numpy()


def size(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_peer_computes_the_same(peer, tmp_path, name):
    """Its layers round to float16, so a code may differ by one: logits agree far within what
    quantization changes. Our folder holds the tensors of theirs, and is read there."""
    folder, theirs, plain = in_8_bits(peer, name, tmp_path)
    model, expected = load_model(folder), their_logits(peer, theirs)
    cost = size(load_model(plain)(TOKENS).data - expected)
    assert 0 < size(model(TOKENS).data - expected) < 0.4 * cost
    bitsandbytes.save_model(model, tmp_path / "ours")
    ours, wanted = (read_tensors(tmp_path / who / "model.safetensors")
                    for who in ("ours", "theirs"))
    assert ours.keys() == wanted.keys()
    assert all(np.array_equal(ours[key], wanted[key]) for key in wanted)
    again = getattr(peer[1], FAMILIES[name]).from_pretrained(
        tmp_path / "ours", device_map="cpu", dtype=peer[0].float32).eval()
    assert np.array_equal(their_logits(peer, again), expected)


@pytest.mark.peers
@pytest.mark.parametrize("threshold", [6.0, 0.0, 1.5])
def test_peers_layer_computes_the_same(peer, tmp_path, threshold):
    folder, theirs, _ = in_8_bits(peer, "llama", tmp_path)
    raw = read_json(folder / "config.json")
    raw["quantization_config"]["llm_int8_threshold"] = threshold
    write_json(folder / "config.json", raw)
    x = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float16).astype(np.float32)
    x[3, 5], x[1, 40] = 9, -7
    layer = theirs.model.layers[1].mlp.up_proj
    layer.state.threshold = threshold
    expected = layer(peer[0].tensor(x)).detach().numpy()
    found = layers(load_model(folder))["blocks.1.mlp.up"](Tensor(x)).data
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
