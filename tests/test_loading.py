"""Loading draws nothing and takes the model's memory and at most one tensor more; a file that does
not fit its config is refused before that. Stored tensors read as the file has them, in any dtype.
"""

import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.files import FormatError, read_json, write_json
from minilm.interop import bitsandbytes, huggingface, load_model
from minilm.quantize import quantize_model
from minilm.tensorfiles import (
    LARGE,
    PIECE,
    SMALL,
    all_finite,
    open_tensors,
    read_tensors,
    write_tensors,
)
from minilm.transformer import Config, Transformer

LLAMA = Config.llama(vocab_size=2000, context=32, layers=6, heads=4, width=256, hidden=768)
GPT2 = Config.gpt2(vocab_size=2000, context=32, layers=4, heads=4, width=256)
OBJECTS = 400_000  # bytes of Python's own


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{what it holds: a folder}; nobody writes into them."""
    root = tmp_path_factory.mktemp("folders")
    model, fsync = Transformer(LLAMA), os.fsync
    os.fsync = lambda file: None
    huggingface.save_model(model, root / "float32")
    huggingface.save_model(huggingface.load_model(root / "float32", "bfloat16"), root / "bfloat16")
    huggingface.save_model(Transformer(GPT2), root / "gpt2")
    for kind in ("nf4", "llm.int8"):
        bitsandbytes.save_model(quantize_model(huggingface.load_model(root / "float32"), kind),
                                root / kind)
    shards(root / "float32", root / "shards")
    os.fsync = fsync
    return root


def shards(folder, new):
    new.mkdir()
    (new / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = read_tensors(folder / "model.safetensors")
    places = {key: f"part-{i % 3}.safetensors" for i, key in enumerate(tensors)}
    for name in set(places.values()):
        write_tensors(new / name, {k: a for k, a in tensors.items() if places[k] == name})
    write_json(new / "model.safetensors.index.json", {"weight_map": places})


def peak_of(run):
    """(what it returned, the bytes that it held at its highest moment)."""
    tracemalloc.start()
    try:
        result = run()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("folder, dtype", [
    ("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"),
    ("float32", "float16"), ("gpt2", "float32"), ("shards", "float32"), ("nf4", "float32"),
    ("nf4", "bfloat16"), ("llm.int8", "float32")])
def test_loading_takes_the_model_and_one_tensor(folders, folder, dtype, monkeypatch):
    """Of what needs no cast it takes nothing: that stays in the file."""
    load_model(folders / folder, dtype)  # what is imported late
    monkeypatch.setattr("minilm.tensorfiles.LARGE", 2**60)  # tracemalloc sees NumPy's arrays alone

    def drawn(seed):
        raise AssertionError("weights are drawn")

    monkeypatch.setattr(np.random, "default_rng", drawn)
    made, build = [], Transformer.__init__

    def skeleton(self, *args, **how):
        """Built outside of what is measured: its memory is not written before it is replaced."""
        tracemalloc.stop()
        build(self, *args, **how)
        made.append(self)
        tracemalloc.start()

    monkeypatch.setattr(Transformer, "__init__", skeleton)
    model, peak = peak_of(lambda: load_model(folders / folder, dtype))
    held = sum(t.data.nbytes for _, t in model.named_tensors())
    largest = max(t.data.nbytes for _, t in model.named_tensors())
    assert made and peak < held + largest + 4 * PIECE + OBJECTS
    if folder in ("shards", dtype):
        assert peak < held / 10


def test_what_does_not_fit_is_refused_before_it_is_read(folders, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders / "float32" / name).read_bytes())
    raw = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", raw | {"intermediate_size": 767})

    def refused():
        with pytest.raises(FormatError, match="expected float"):
            load_model(tmp_path)

    assert peak_of(refused)[1] < OBJECTS


FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@given(bits=st.lists(st.integers(0, 2**64 - 1), max_size=9), stored=st.sampled_from(FLOATS),
       dtype=st.sampled_from([None, *FLOATS]))
def test_a_stored_tensor_reads_as_astype_casts(tmp_path_factory, bits, stored, dtype):
    """Any bits, also those of NaN and infinity, which `finite` refuses."""
    file = tmp_path_factory.getbasetemp() / "t.safetensors"
    x = np.array(bits, np.uint64).view(stored)
    write_tensors(file, {"x": x})
    with np.errstate(all="ignore"):
        expected = x.astype(dtype or stored)
        finite = bool(np.isfinite(expected).all())
    assert all_finite(expected) == finite
    with open_tensors(file) as tensors:
        found = tensors["x"].read(dtype)
        with np.errstate(all="ignore"):  # some processors tell of a signalling NaN even here
            assert np.array_equal(tensors["x"].mapped(dtype), found, equal_nan=True)
            assert np.array_equal(found, expected, equal_nan=True)
        assert found.dtype == expected.dtype and found.flags.writeable
        assert tensors["x"].equals(tensors["x"])
        if finite:
            assert tensors["x"].read(dtype, finite=True).tobytes() == expected.tobytes()
        else:
            with pytest.raises(FormatError, match="x has numbers that are not finite"):
                tensors["x"].read(dtype, finite=True)


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_every_exponent_of_16_bits_is_told_apart(dtype):
    x = np.arange(0, 2**16, 32, dtype=np.uint16).view(dtype)
    assert [all_finite(x[i : i + 1]) for i in range(len(x))] == (
        np.isfinite(x.astype(np.float32)).tolist())


@pytest.mark.parametrize("at", [0, PIECE - 1, PIECE, 2 * PIECE + 6])
def test_every_piece_is_read_and_looked_at(tmp_path, at):
    x = np.arange(2 * PIECE + 7, dtype=np.float32).reshape(-1, 1)
    y = x.copy()
    y[at] = np.inf
    write_tensors(tmp_path / "t", {"x": x, "y": y, "z": x[:-1]})
    with open_tensors(tmp_path / "t") as tensors:
        assert np.array_equal(tensors["x"].read("float64", finite=True), x)
        assert np.array_equal(tensors["x"].mapped(finite=True), x)
        with pytest.raises(FormatError, match="y has numbers that are not finite in float32"):
            tensors["y"].mapped(finite=True)
        assert np.array_equal(tensors["y"].read(), y)
        assert not tensors["x"].equals(tensors["y"]) and not tensors["x"].equals(tensors["z"])
        with pytest.raises(FormatError, match="not finite"):
            tensors["y"].read(finite=True)


def test_a_file_that_is_replaced_meanwhile_stays_the_one_that_was_opened(tmp_path):
    write_tensors(tmp_path / "t", {"x": np.ones(5)})
    with open_tensors(tmp_path / "t") as tensors:
        write_tensors(tmp_path / "t", {"x": np.zeros(5), "y": np.zeros(3)})
        assert tensors["x"].read().tolist() == [1] * 5


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_large_arrays_are_this_processs_alone(tmp_path):
    """A forked worker must not write into its parent's."""
    x = np.arange(LARGE // 4, dtype=np.float32).reshape(2, -1)
    write_tensors(tmp_path / "t", {"x": x})
    found = read_tensors(tmp_path / "t")["x"]
    assert found.flags.writeable and found.tobytes() == x.tobytes()
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
    else:
        found[:] = -1
        os._exit(0)
    assert found.tobytes() == x.tobytes()


def test_pages_are_this_processs_alone_and_outlive_the_file(tmp_path):
    """What is written to them does not reach the file; a model may be saved over its own folder."""
    x = np.arange(SMALL, dtype=np.float32)
    write_tensors(tmp_path / "t", {"x": x, "y": x[:9]})
    before = (tmp_path / "t").read_bytes()
    with open_tensors(tmp_path / "t") as tensors:
        pages, small = tensors["x"].mapped("float32"), tensors["y"].mapped()
    assert pages.flags.writeable and pages.flags.aligned and not pages.flags.owndata
    assert small.flags.owndata
    pages[3] = small[3] = -1
    assert (tmp_path / "t").read_bytes() == before
    write_tensors(tmp_path / "t", {"x": 2 * pages})
    assert pages[3] == -1 and pages[5] == 5
    assert read_tensors(tmp_path / "t")["x"][5] == 10


def test_a_file_that_is_cut_meanwhile_is_refused(tmp_path):
    write_tensors(tmp_path / "t", {"x": np.ones(5)})
    with open_tensors(tmp_path / "t") as tensors:
        os.truncate(tmp_path / "t", (tmp_path / "t").stat().st_size - 1)
        with pytest.raises(FormatError, match="ends within the tensor 'x'"):
            tensors["x"].read()
