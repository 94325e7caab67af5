"""minilm.interop.bitsandbytes: 4-bit weights and whole folders come back bit for bit, GPT-2's q, k
and v share a c_attn without a change of any weight, what is damaged or no such weight is refused by
name, and (marked peers) transformers and bitsandbytes hold the same weights and compute the same
logits from the same files, whoever wrote them."""

import json
import os
import random
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.files import FormatError, read_json, write_json
from minilm.interop import huggingface
from minilm.interop.bitsandbytes import load_4bit, load_model, save_4bit, save_model
from minilm.interop.peft import load_adapter
from minilm.nn import Linear
from minilm.peft import add_lora
from minilm.quantize import QuantizedLinear, quantize_4bit, quantize_model
from minilm.quantize.fourbit import BLOCK_SIZES, double_quantize
from minilm.tensorfiles import read_tensors, write_tensors
from minilm.transformer import Config, Transformer

SMALL = dict(vocab_size=23, context=11, layers=2, heads=4, width=64)
CONFIGS = {
    "gpt2": Config.gpt2(**SMALL),
    "gpt2-wide": Config.gpt2(**SMALL | {"width": 128, "layers": 1}),  # thirds of 256 blocks
    "llama": Config.llama(**SMALL, hidden=128, kv_heads=2),
    "bert": Config.bert(**SMALL, hidden=128),
    "distilbert": Config.bert(**SMALL, hidden=128, segments=0),
}
TOKENS = np.random.default_rng(5).integers(0, 23, (3, 9))
NAME = "model.layers.0.self_attn.q_proj.weight"
STATE = ".quant_state.bitsandbytes__"


def base(name):
    """A model with noise on every parameter."""
    model, rng = Transformer(CONFIGS[name]), np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += rng.normal(0, 0.15, t.shape).astype(np.float32)
    return model.eval()


def quantized(name, kind="nf4", double_quant=True, **settings):
    return quantize_model(base(name), kind, double_quant, **settings)


def layers(model):
    return {path: m for path, m in model.named_modules() if type(m) is QuantizedLinear}


def same(a, b):
    """Equal names, dtypes and bits."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a
    )


def equal(a, b):
    """Two FourBits, bit for bit."""
    return all(x.tobytes() == y.tobytes() and x.dtype == y.dtype if hasattr(x, "dtype") else x == y
               for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def agree(ours, theirs, tolerance):
    assert ours.dtype == theirs.dtype
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """What a crash would leave is the matter of test_files."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: a folder of nf4 with double quantization}; nobody writes into the folders."""
    root = tmp_path_factory.mktemp("saved")
    for name in CONFIGS:
        save_model(quantized(name), root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture
def edit(saved, tmp_path):
    """edit(name, tensors=change, field=value) -> a copy with changes, of quantization_config's
    fields too."""

    def copy(name, tensors=None, **changes):
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(saved[name], folder)
        raw = read_json(folder / "config.json")
        raw["quantization_config"] |= changes
        write_json(folder / "config.json", raw)
        if tensors:
            file = folder / "model.safetensors"
            write_tensors(file, tensors(read_tensors(file)))
        return folder

    return copy


def expect(folder, file, *texts):
    with pytest.raises(FormatError) as info:
        load_model(folder)
    assert str(info.value).startswith(f"{folder / file}: ")
    assert all(text in str(info.value) for text in texts), str(info.value)


@given(shape=st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
       kind=st.sampled_from(["nf4", "fp4"]), size=st.sampled_from(BLOCK_SIZES[:4]),
       double=st.booleans(), seed=st.integers(0, 9))
def test_round_trip_of_a_weight(shape, kind, size, double, seed):
    """Any shape and block size, odd numbers of codes and short blocks too."""
    x = quantize_4bit(np.random.default_rng(seed).standard_normal(shape, np.float32), kind, size,
                      double)
    tensors = save_4bit(x, NAME)
    n = x.packed.size
    assert tensors[NAME].shape == (n, 1)
    assert tensors[NAME].dtype == np.uint8
    assert equal(load_4bit(tensors | {"other.weight": np.zeros(3)}, NAME), x)
    assert np.array_equal(load_4bit(tensors, NAME).dequantize(), x.dequantize())


def test_the_tensors():
    """Names, dtypes and the text of the state are those of bitsandbytes 0.50.2."""
    x = quantize_4bit(np.random.default_rng(0).standard_normal((6, 64), np.float32), "fp4")
    x = double_quantize(quantize_4bit(x.dequantize(), "fp4", double_quant=False), offset=0.5)
    tensors = save_4bit(x, "w", "bfloat16")
    assert {name: (a.dtype.name, a.shape) for name, a in tensors.items()} == {
        "w": ("uint8", (192, 1)), "w.absmax": ("uint8", (6,)), "w.quant_map": ("float32", (16,)),
        "w.nested_absmax": ("float32", (1,)), "w.nested_quant_map": ("float32", (256,)),
        "w.quant_state.bitsandbytes__fp4": ("uint8", (151,)),
    }
    assert tensors["w.quant_state.bitsandbytes__fp4"].tobytes() == (
        b'{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 64], '
        b'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}')
    plain = save_4bit(quantize_4bit(np.ones((2, 64)), double_quant=False), "w")
    assert {name: (a.dtype.name, a.shape) for name, a in plain.items()} == {
        "w": ("uint8", (64, 1)), "w.absmax": ("float32", (2,)), "w.quant_map": ("float32", (16,)),
        "w.quant_state.bitsandbytes__nf4": ("uint8", (76,)),
    }


def test_weights_without_a_form():
    x = np.random.default_rng(0).standard_normal((4, 64))
    with pytest.raises(ValueError, match=r"double_quant='int8'"):
        save_4bit(quantize_4bit(x, double_quant="int8"), NAME)
    for codebook in ("nf3", "int4"):
        with pytest.raises(ValueError, match=codebook):
            save_4bit(quantize_4bit(x, codebook), NAME)


def test_other_storage():
    """bnb_4bit_quant_storage: the same bytes under another dtype, where they may look like NaN."""
    x = np.random.default_rng(0).standard_normal((4, 64))
    x[0] = 1.0  # codes 15, and so bytes of ones
    x = quantize_4bit(x)
    tensors = save_4bit(x, NAME)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        other = tensors | {NAME: tensors[NAME].reshape(-1).view(dtype)[:, None]}
        assert equal(load_4bit(other, NAME), x)


def stated(**changes):
    """A change of the fields of the state."""
    def change(tensors):
        state = json.loads(tensors[NAME + STATE + "nf4"].tobytes()) | changes
        state = {field: value for field, value in state.items() if value != "gone"}
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        return tensors | {NAME + STATE + "nf4": text}
    return change


def without(*parts):
    return lambda t: {k: a for k, a in t.items() if k not in [NAME + part for part in parts]}


def changed(part, change):
    return lambda t: t | {NAME + part: change(t[NAME + part].copy())}


def spoilt(array):
    array[-1] = np.nan
    return array


DAMAGED = [  # (change of a weight's tensors, what the error names)
    (without(""), f"{NAME} is missing"), (without(".absmax"), ".absmax is missing"),
    (without(".quant_map"), ".quant_map is missing"),
    (without(".nested_quant_map"), ".nested_quant_map is missing"),
    (without(".nested_absmax"), STATE), (without(STATE + "nf4"), STATE),
    (without(".nested_absmax", ".nested_quant_map"), "nested_blocksize"),
    (lambda t: t | {NAME + STATE + "fp4": t[NAME + STATE + "nf4"]}, STATE),
    (changed("", lambda a: a[:-1]), f"{NAME} is uint8 (127,), expected finite uint8 (128,)"),
    (changed(".absmax", lambda a: a[:-1]), ".absmax is uint8 (3,)"),
    (changed(".absmax", lambda a: a.astype(np.float32)), ".absmax is float32"),
    (changed(".quant_map", lambda a: a[:8]), ".quant_map is float32 (8,)"),
    (changed(".quant_map", lambda a: a + np.float32(1e-5)), ".quant_map is not bitsandbytes'"),
    (changed(".quant_map", lambda a: a.astype(np.float64)), ".quant_map is float64"),
    (changed(".quant_map", spoilt), "finite"), (changed(".nested_quant_map", spoilt), "finite"),
    (changed(".nested_quant_map", lambda a: a[::-1].copy()), ".nested_quant_map is not"),
    (changed(".nested_absmax", spoilt), "finite"),
    (changed(".nested_absmax", lambda a: a[None]), ".nested_absmax is float32 (1, 1)"),
    (changed(STATE + "nf4", lambda a: a[:-1]), "not JSON"),
    (changed(STATE + "nf4", lambda a: np.frombuffer(b"[1]", np.uint8)), "expected fields"),
    (changed(STATE + "nf4", lambda a: np.frombuffer(b"[" * 10**5, np.uint8)), "not JSON"),
    (stated(quant_type="fp4"), "quant_type 'fp4'"), (stated(quant_type="gone"), "quant_type None"),
    (stated(blocksize=128), ".absmax is uint8 (4,), expected finite uint8 (2,)"),
    (stated(blocksize=64.0), "blocksize 64.0"), (stated(blocksize=48), "blocksize 48"),
    (stated(blocksize=0), "blocksize 0"), (stated(dtype="int8"), "dtype 'int8'"),
    (stated(dtype=["float32"]), "dtype"), (stated(shape=[4, 65]), "expected finite uint8 (130,)"),
    (stated(shape=[10**30, 10**30]), "shape [1000"), (stated(shape=[-4, -64]), "shape"),
    (stated(shape=[0, 10**30]), "shape [0, 1000"), (stated(shape=[10**400, 0]), "shape"),
    (stated(shape=[4, 64] + [1] * 99), "shape"),
    (lambda t: stated(nested_offset=9e37)(t) | {
        NAME + ".absmax": np.full(4, 255, np.uint8), NAME + ".nested_absmax": np.float32([3.4e38])},
     "not finite"),
    (stated(shape=256), "shape 256"), (stated(shape=[4.0, 64]), "shape"),
    (stated(shape="gone"), "shape None"), (stated(nested_blocksize=128), "nested_blocksize 128"),
    (stated(nested_dtype="float16"), "nested_dtype"), (stated(nested_offset=None), "nested_offset"),
    (stated(nested_offset=float("nan")), "not JSON: NaN"),
    (stated(nested_offset=1e300), "nested_offset"), (stated(nested_offset=True), "nested_offset"),
    (stated(something_new=1), "something_new"),
]


@pytest.mark.parametrize("change, text", DAMAGED)
def test_damaged_weights(change, text):
    x = quantize_4bit(np.random.default_rng(0).standard_normal((4, 64), np.float32))
    with pytest.raises(ValueError) as info:
        load_4bit(change(save_4bit(x, NAME)), NAME)
    assert text in str(info.value) and NAME in str(info.value)


@pytest.mark.parametrize("kind, double", [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("name", ["llama", "bert", "distilbert"])
def test_round_trip(tmp_path, name, kind, double):
    model = quantized(name, kind, double)
    save_model(model, tmp_path / "a")
    loaded = load_model(tmp_path / "a")
    assert loaded.config == model.config
    assert same(loaded, model)
    assert np.array_equal(loaded(TOKENS).data, model(TOKENS).data)
    assert {m.compute_dtype for m in layers(loaded).values()} == {"float32"}
    save_model(loaded, tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-wide"])
def test_gpt2_round_trip(tmp_path, name, double):
    """q, k and v have offsets of their own, so together they have float32 constants."""
    model = quantized(name, "nf4", double)
    save_model(model, tmp_path / "a")
    loaded = load_model(tmp_path / "a")
    assert np.array_equal(loaded(TOKENS).data, model(TOKENS).data)
    twins = layers(loaded)
    for path, layer in layers(model).items():
        ours, back = layer.weight, twins[path].weight
        assert np.array_equal(back.packed, ours.packed)
        assert np.array_equal(back.absmax, ours.absmax)
        assert (back.c1 is None) == (not double or path[-1] in "qkv")
        assert np.array_equal(twins[path].bias.data, layer.bias.data)
    save_model(loaded, tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("width, nested", [(64, False), (128, True)])
def test_gpt2_thirds(tmp_path, width, nested):
    """A doubly quantized c_attn: each third takes its codes, and its c1 where they are its own."""
    config = Config.gpt2(**SMALL | {"width": width, "layers": 1})
    save_model(quantize_model(Transformer(config)), tmp_path)
    key, rng = "transformer.h.0.attn.c_attn.weight", np.random.default_rng(0)
    W = (rng.standard_normal((3 * width, width)) * np.exp(rng.standard_normal((3 * width, 1))))
    whole = quantize_4bit(W.astype(np.float32))
    tensors = {k: a for k, a in read_tensors(tmp_path / "model.safetensors").items()
               if not k.startswith(key)} | save_4bit(whole, key)
    write_tensors(tmp_path / "model.safetensors", tensors)
    parts = [layers(load_model(tmp_path))[f"blocks.0.attention.{part}"].weight for part in "qkv"]
    for part, expected in zip(parts, np.split(whole.dequantize(), 3)):
        assert np.array_equal(part.dequantize(), expected)
        assert (part.c1 is not None) == nested
    save_model(load_model(tmp_path), tmp_path / "b")
    again = load_4bit(read_tensors(tmp_path / "b" / "model.safetensors"), key)
    assert equal(again, whole if nested else replace(whole, c2=whole.absmax, c1=None, offset=None))


def test_one_offset_for_parts_of_a_group(tmp_path):
    """64 blocks each: three groups of 256, each begun only, cannot be one begun group."""
    model = quantized("gpt2")
    weight = model.blocks[0].attention.q.weight
    for part in "kv":
        bias = getattr(model.blocks[0].attention, part).bias
        model.replace(f"blocks.0.attention.{part}", QuantizedLinear(weight, bias))
    save_model(model, tmp_path)
    for part in "qkv":
        found = layers(load_model(tmp_path))[f"blocks.0.attention.{part}"].weight
        assert np.array_equal(found.dequantize(), weight.dequantize())


def test_parts_that_share_blocks(tmp_path, edit):
    key = "transformer.h.0.attn.c_attn.weight"
    x = quantize_4bit(np.ones((192, 64), np.float32), block_size=4096)
    folder = edit("gpt2", lambda t: {k: a for k, a in t.items() if not k.startswith(key)}
                  | save_4bit(x, key))
    assert layers(load_model(folder))["blocks.0.attention.v"].weight.c2.size == 1
    config = Config.gpt2(**SMALL | {"width": 48, "layers": 1})
    model = quantize_model(Transformer(config), block_size=4096, skip=("head", "q", "k", "v"))
    save_model(model, tmp_path / "thirds")
    file = tmp_path / "thirds" / "model.safetensors"
    x = quantize_4bit(np.ones((144, 48), np.float32), block_size=4096)
    write_tensors(file, {k: a for k, a in read_tensors(file).items() if k != key}
                  | save_4bit(x, key))
    expect(tmp_path / "thirds", "model.safetensors", key, "share blocks")
    model = quantize_model(Transformer(config), block_size=4096)
    with pytest.raises(ValueError, match=r"c_attn.*block_size"):
        save_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_settings(tmp_path, saved):
    """What is not quantized, the compute dtype and the dtype of the rest are kept."""
    model = quantized("llama", skip=("head", "down"), compute_dtype="bfloat16")
    save_model(model.astype("float16"), tmp_path)
    raw = read_json(tmp_path / "config.json")
    assert raw["dtype"] == "float16"
    assert raw["quantization_config"] == {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp.down_proj",
                                  "model.layers.1.mlp.down_proj"]}
    loaded = load_model(tmp_path, "float16")
    assert same(loaded, model)
    assert type(loaded.blocks[1].mlp.down) is Linear
    assert {m.compute_dtype for m in layers(loaded).values()} == {"bfloat16"}
    wide = load_model(saved["gpt2"], "bfloat16", dropout=0.1)
    assert wide.config.dropout == 0.1
    assert {t.dtype.name for t in wide.parameters()} == {"bfloat16"}
    loaded(TOKENS).sum().backward()
    assert loaded.embed.weight.grad is not None


def test_either_reader_names_the_other(saved, tmp_path):
    with pytest.raises(FormatError, match=r"quantization_config.*interop\.load_model"):
        huggingface.load_model(saved["llama"])
    huggingface.save_model(base("llama"), tmp_path)
    expect(tmp_path, "config.json", "quantization_config is None")


@pytest.mark.parametrize("field, value", [
    ("quant_method", "gptq"), ("load_in_4bit", False), ("load_in_4bit", None),
    ("bnb_4bit_compute_dtype", "int8"), ("bnb_4bit_compute_dtype", ["float32"]),
])
def test_refused_fields(edit, field, value):
    expect(edit("llama", **{field: value}), "config.json", f"quantization_config has {field}")


@pytest.mark.parametrize("change, text", DAMAGED)
def test_damaged_folders(edit, change, text):
    """As of a single weight, but with the path; what no state claims is an unexpected key."""
    x = quantize_4bit(np.random.default_rng(0).standard_normal((4, 64), np.float32))

    def spoil(tensors):
        own = {k: a for k, a in tensors.items() if not k.startswith(NAME)}
        return own | change(save_4bit(x, NAME))

    folder = edit("llama", spoil)
    with pytest.raises(FormatError) as info:
        load_model(folder)
    assert str(info.value).startswith(f"{folder / 'model.safetensors'}: ")
    assert NAME in str(info.value)


def whole(*shape):
    return quantize_4bit(np.ones(shape, np.float32))


@pytest.mark.parametrize("name, tensors, texts", [
    ("llama", save_4bit(whole(64, 32), NAME), (NAME, "(64, 32), expected float (64, 64)")),
    ("llama", save_4bit(whole(64, 8, 8), NAME), (NAME, "(64, 8, 8), expected (O, I)")),
    ("llama", save_4bit(whole(4096), NAME), (NAME, "(4096,), expected (O, I)")),
    ("llama", save_4bit(whole(0, 64), NAME), (NAME, "(0, 64), expected (O, I)")),
    ("llama", save_4bit(replace(whole(0, 64), shape=(0, 2**55)), NAME), (NAME, "expected (O, I)")),
    ("llama", save_4bit(whole(23, 64), "model.embed_tokens.weight"), ("embed_tokens", "linear")),
    ("llama", save_4bit(whole(23, 64), "model.other.weight"), ("unexpected keys: model.other",)),
    ("gpt2", save_4bit(whole(23, 64), "transformer.wte.weight"), ("transformer.wte", "linear")),
    ("gpt2", save_4bit(whole(23, 64), "lm_head.weight"), ("lm_head.weight differs",)),
])
def test_quantized_in_the_wrong_place(edit, name, tensors, texts):
    folder = edit(name, lambda t: {k: a for k, a in t.items()
                                   if not k.startswith(min(tensors, key=len))} | tensors)
    expect(folder, "model.safetensors", *texts)


def test_a_tied_head_alone(edit):
    """Where only the head's name is there, it is the embedding too, which cannot be quantized."""
    tensors = save_4bit(whole(23, 64), "lm_head.weight")
    folder = edit("gpt2", lambda t: {k: a for k, a in t.items() if "wte" not in k} | tensors)
    expect(folder, "model.safetensors", "lm_head.weight", "linear")


def test_an_untied_head_can_be_quantized(tmp_path):
    model = quantize_model(base("llama"), skip=())
    save_model(model, tmp_path)
    assert same(load_model(tmp_path), model)
    assert read_json(tmp_path / "config.json")["quantization_config"]["llm_int8_skip_modules"] == []


def test_models_that_cannot_be_saved(tmp_path):
    path = tmp_path / "x"

    def refused(model, text):
        with pytest.raises(ValueError, match=text):
            save_model(model, path)
        assert not path.exists()

    refused(base("llama"), "must have quantized layers")
    refused(quantized("llama", "int8"), "Int8")
    refused(quantized("llama", "nf3"), "nf3")
    refused(quantized("gpt2", double_quant="int8"), r"double_quant='int8'")
    refused(quantized("gpt2", skip=("head", "k")), r"attention\.q.*one weight")
    refused(quantized("gpt2", skip=()), "head")
    refused(quantized("llama", compute_dtype="float64"), "float64")
    refused(quantized("llama").astype("float64"), "float64")
    refused(add_lora(quantized("llama"), 2, 3), "not the modules")
    refused(quantize_model(quantized("llama", skip=("q", "head")), "fp4"), r"'fp4', 'nf4'")
    mixed = quantize_model(quantized("llama", skip=("q", "head")), compute_dtype="bfloat16")
    refused(mixed, r"'bfloat16', 'float32'")
    mixed = quantized("llama")
    mixed.replace("blocks.0.mlp.up", QuantizedLinear(whole(120, 64)))
    refused(mixed, r"blocks\.0\.mlp\.up")
    mixed = quantized("llama")
    mixed.blocks[0].mlp.up.bias = mixed.norm.weight
    refused(mixed, r"blocks\.0\.mlp\.up\.bias")
    mixed = quantized("gpt2", skip=("head", "q"))
    refused(quantize_model(mixed, block_size=128), r"c_attn.*block_size")


def test_fuzzed_folders(edit):
    """Any damage: a model or FormatError."""
    folder, rng = edit("llama"), random.Random(0)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    states = [i for i in range(header, len(data)) if data.startswith(b'{"quant_type"', i)]
    for i in range(90):
        broken = bytearray(data[: rng.randrange(len(data))] if i % 5 == 0 else data)
        for _ in range(rng.randint(1, 3)):
            start, end = (8, header) if i % 2 else (rng.choice(states) + 13, 0)
            place = rng.randrange(start, end or start + 150)
            if place < len(broken):
                broken[place] = rng.choice(b'0123-"{}[],: anx\xff')
        file.write_bytes(broken)
        try:
            load_model(folder)
        except FormatError:
            pass


@pytest.fixture(scope="session")
def peer():
    """(torch, transformers, bitsandbytes), offline, and without the kernels that repack weights for
    CPUs with bfloat16, which round more."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TORCHDYNAMO_DISABLE"] = "1"
    transformers = pytest.importorskip("transformers")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    import torch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
        yield torch, transformers, bitsandbytes


def their_model(peer, folder, **settings):
    _, transformers, _ = peer
    architecture = getattr(transformers, read_json(folder / "config.json")["architectures"][0])
    model, info = architecture.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(info.values()), info
    return model.eval()


def compare(peer, ours, model):
    """The same weights bit for bit, in as many layers, and the same logits."""
    torch, _, bitsandbytes = peer
    family, _ = huggingface.describe(ours)
    modules, found = dict(model.named_modules()), layers(ours)
    joined = family.joined(ours.config.layers, found)
    assert {name for name, m in modules.items() if isinstance(m, bitsandbytes.nn.Linear4bit)} == (
        joined.keys())
    for name, paths in joined.items():
        weight = modules[name].weight
        theirs = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).numpy()
        W = np.concatenate([found[path].weight.dequantize() for path in paths])
        assert np.array_equal(W, theirs)
        packed = np.concatenate([found[path].weight.packed for path in paths])
        assert np.array_equal(packed, weight.data.numpy()[:, 0])
    with torch.no_grad():
        agree(ours(TOKENS).data, model(torch.tensor(TOKENS)).logits.numpy(), 2e-6)


FORMS = [("llama", "nf4", True), ("llama", "nf4", False), ("llama", "fp4", True),
         ("llama", "fp4", False), ("gpt2", "nf4", True), ("gpt2", "fp4", False),
         ("gpt2-wide", "nf4", True), ("bert", "nf4", True), ("distilbert", "nf4", False)]


@pytest.mark.peers
@pytest.mark.parametrize("name, kind, double", FORMS)
def test_peer_writes(peer, tmp_path, name, kind, double):
    _, transformers, _ = peer
    huggingface.save_model(base(name), tmp_path)
    model = their_model(peer, tmp_path, quantization_config=transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double))
    model.save_pretrained(tmp_path / "quantized")
    ours = load_model(tmp_path / "quantized")
    compare(peer, ours, model)
    for path, m in layers(quantize_model(base(name), kind, double, skip=("head",))).items():
        assert np.array_equal(layers(ours)[path].weight.packed, m.weight.packed)


@pytest.mark.peers
@pytest.mark.parametrize("name, kind, double", FORMS)
def test_peer_reads(peer, tmp_path, name, kind, double):
    ours = quantized(name, kind, double)
    save_model(ours, tmp_path)
    model = their_model(peer, tmp_path)
    compare(peer, ours, model)
    state, tensors = model.state_dict(), read_tensors(tmp_path / "model.safetensors")
    for key, array in tensors.items():
        assert state[key].numpy().tobytes() == array.tobytes(), key
    assert {key for key in state if STATE in key} == {key for key in tensors if STATE in key}


@pytest.mark.peers
def test_joined_weights_are_cut_by_their_own_sizes(peer, tmp_path):
    """Phi-3's q, k, v with fewer heads of k and v, and its gate and up."""
    torch, transformers, _ = peer
    config = transformers.Phi3Config(
        vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0)
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / "float")
    write = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                            bnb_4bit_use_double_quant=True)
    model = transformers.Phi3ForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=write).eval()
    model.save_pretrained(tmp_path / "quantized")
    ours, tokens = load_model(tmp_path / "quantized"), np.arange(16)[None]
    assert [m.weight.shape for m in layers(ours).values()][:3] == [(64, 64), (32, 64), (32, 64)]
    with torch.no_grad():
        agree(ours(tokens).data, model(torch.tensor(tokens)).logits.numpy(), 2e-6)


@pytest.mark.peers
def test_peer_reads_what_is_left_out(peer, tmp_path):
    """Layers that are not quantized here are not there, and the head can be."""
    for skip in ((), ("head", "down", "v"), ("blocks.1.mlp.up",)):
        save_model(ours := quantized("llama", skip=skip), tmp_path)
        compare(peer, ours, their_model(peer, tmp_path))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peer_trains_an_adapter_on_it(peer, tmp_path, name):
    """QLoRA: their adapter on their 4-bit base, and both here."""
    torch, _, _ = peer
    peft = pytest.importorskip("peft")
    save_model(quantized(name), tmp_path)
    torch.manual_seed(0)
    model = peft.get_peft_model(their_model(peer, tmp_path), peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, lora_alpha=1)).eval()
    model.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(load_model(tmp_path), tmp_path / "adapter").eval()
    with torch.no_grad():
        agree(ours(TOKENS).data, model(torch.tensor(TOKENS)).logits.numpy(), 2e-6)
