"""minilm.files: what is written comes back bit for bit, a failed write leaves nothing, and a
damaged file raises FormatError and nothing else."""

import copy
import io
import json
import os
import random
import re
import stat

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minilm import files
from minilm.files import FormatError, read_json, write_json
from minilm.tensorfiles import DTYPES, read_tensors, write_tensors


@st.composite
def arrays(draw):
    """Any stored dtype, any bits, any shape down to 0-d and empty, contiguous or not."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    size = int(np.prod(shape)) * dtype.itemsize
    bits = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    x = (bits % 2 if dtype.name == "bool" else bits).view(dtype).reshape(shape)
    layout = draw(st.sampled_from(["plain", "transposed", "reversed", "strided", "broadcast"]))
    if layout == "plain" or x.ndim == 0:
        return x
    if layout == "transposed":
        return x.T
    if layout == "broadcast":
        return np.broadcast_to(x, (2, *x.shape))
    return x[::-1] if layout == "reversed" else x[::2]


def tensor_file(header, body=b""):
    """A safetensors file with any header: an object, or the bytes themselves."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + body


def entry(dtype="U8", shape=(1,), offsets=(0, 1)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


EXAMPLE = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.arange(3).astype(ml_dtypes.bfloat16),
    "flag": np.array(True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@given(tensors=st.dictionaries(st.text(max_size=8), arrays(), max_size=4))
def test_tensors_come_back_bit_for_bit(folder, tensors):
    write_tensors(folder / "t.safetensors", tensors)
    loaded = read_tensors(folder / "t.safetensors")
    assert list(loaded) == sorted(tensors)
    for name, x in tensors.items():
        y = loaded[name]
        assert (y.dtype, y.shape, y.tobytes()) == (x.dtype, x.shape, x.tobytes())
        assert y.flags.writeable and y.flags.aligned and y.flags.c_contiguous


def test_big_endian_arrays_are_stored_by_value(tmp_path):
    write_tensors(tmp_path / "t", {"x": np.array([1, 2], ">i4")})
    np.testing.assert_array_equal(read_tensors(tmp_path / "t")["x"], np.array([1, 2], "<i4"))


def test_same_input_gives_same_bytes_in_any_order(tmp_path):
    tensors = {f"x{i}": np.full(i, i, np.float32) for i in range(9)}
    metadata = {f"key{i}": str(i) for i in range(9)}
    written = []
    for seed in range(4):
        shuffle = random.Random(seed).sample
        write_tensors(
            tmp_path / "t",
            dict(shuffle(list(tensors.items()), 9)),
            dict(shuffle(list(metadata.items()), 9)),
        )
        written.append((tmp_path / "t").read_bytes())
    assert len(set(written)) == 1


@given(tensors=st.dictionaries(st.text(max_size=8), arrays(), max_size=4))
def test_the_safetensors_library_reads_ours_and_we_read_its(folder, tensors):
    tensors = {k: np.array(x, order="C") for k, x in tensors.items()}
    plain = {k: x for k, x in tensors.items() if x.dtype != ml_dtypes.bfloat16}
    write_tensors(folder / "ours", plain, {"format": "np"})
    theirs = safetensors.numpy.load_file(folder / "ours")
    assert {k: x.tobytes() for k, x in theirs.items()} == {k: x.tobytes() for k, x in plain.items()}
    safetensors.numpy.save_file(tensors, folder / "theirs", {"format": "np"})
    ours = read_tensors(folder / "theirs")
    assert {k: x.tobytes() for k, x in ours.items()} == {k: x.tobytes() for k, x in tensors.items()}


def test_metadata_is_in_the_header_and_every_tensor_is_aligned(tmp_path):
    write_tensors(tmp_path / "t", EXAMPLE, {"format": "pt", "a": "é"})
    with safetensors.safe_open(tmp_path / "t", "np") as file:
        assert file.metadata() == {"format": "pt", "a": "é"}
    data = (tmp_path / "t").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    for name, x in EXAMPLE.items():
        assert header[name]["data_offsets"][0] % x.itemsize == 0


@pytest.mark.parametrize(
    ("tensors", "metadata", "error"),
    [
        ({"a": np.zeros(1, complex)}, None, TypeError),
        ({"a": np.array([None])}, None, TypeError),
        ({"a": [1.0]}, None, TypeError),
        ({1: np.zeros(1)}, None, TypeError),
        ({"__metadata__": np.zeros(1)}, None, ValueError),
        ({"\ud800": np.zeros(1)}, None, ValueError),
        ({}, {"epoch": 1}, TypeError),
    ],
)
def test_what_cannot_be_stored_is_refused_before_a_file_exists(tmp_path, tensors, metadata, error):
    with pytest.raises(error):
        write_tensors(tmp_path / "t", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    write_tensors(tmp_path / "t", EXAMPLE)
    whole = (tmp_path / "t").read_bytes()
    for damaged in [whole[:n] for n in range(len(whole))] + [whole + b"\0", whole + whole]:
        (tmp_path / "t").write_bytes(damaged)
        with pytest.raises(FormatError, match=re.escape(f"{tmp_path / 't'}: ")):
            read_tensors(tmp_path / "t")


@given(data=st.data())
def test_a_mutated_file_reads_or_is_refused(folder, data):
    write_tensors(folder / "m", EXAMPLE, {"format": "np"})
    damaged = bytearray((folder / "m").read_bytes())
    position = st.integers(0, len(damaged) - 1)
    for at, byte in data.draw(st.lists(st.tuples(position, st.integers(0, 255)), max_size=4)):
        damaged[at] = byte
    (folder / "m").write_bytes(damaged)
    try:
        read_tensors(folder / "m")
    except FormatError:
        pass


MALFORMED = {
    "empty": b"",
    "short": b"\1\0\0",
    "no header": tensor_file(b""),
    "huge header": (2**63).to_bytes(8, "little") + b"{}",
    "header past the end": (100).to_bytes(8, "little") + b"{}",
    "header is not UTF-8": tensor_file(b'{"\xff":1}'),
    "header is not an object": tensor_file([]),
    "lone surrogate": tensor_file(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", b"x"),
    "deep nesting": tensor_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "metadata is not text": tensor_file({"__metadata__": {"a": 1}}),
    "same name twice": tensor_file(
        '{{"a":{0},"a":{0}}}'.format(json.dumps(entry())).encode(), b"x"
    ),
    "same key twice": tensor_file(
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"
    ),
    "no dtype": tensor_file({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x"),
    "unknown dtype": tensor_file({"a": entry("F3")}, b"x"),
    "dtype we do not hold": tensor_file({"a": entry("F8_E4M3")}, b"x"),
    "bool that is 7": tensor_file({"a": entry("BOOL")}, b"\7"),
    "negative size": tensor_file({"a": entry(shape=[-1])}, b"x"),
    "shape is not the bytes": tensor_file({"a": entry(shape=[2])}, b"x"),
    "shape overflows": tensor_file({"a": entry(shape=[2**63, 2])}, b"x"),
    "empty but too big for numpy": tensor_file({"a": entry(shape=[0, 2**63], offsets=[0, 0])}),
    "too many axes for numpy": tensor_file({"a": entry(shape=[1] * 70)}, b"x"),
    "offsets swapped": tensor_file({"a": entry(offsets=[1, 0])}, b"x"),
    "offsets past the end": tensor_file({"a": entry(offsets=[0, 2], shape=[2])}, b"x"),
    "hole": tensor_file({"a": entry(offsets=[1, 2])}, b"xx"),
    "overlap": tensor_file({"a": entry(), "b": entry()}, b"x"),
    "trailing bytes": tensor_file({"a": entry()}, b"xx"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tensor_files_are_refused(tmp_path, case):
    (tmp_path / "t").write_bytes(MALFORMED[case])
    with pytest.raises(FormatError, match=re.escape(f"{tmp_path / 't'}: ")):
        read_tensors(tmp_path / "t")


def test_the_error_names_the_tensor(tmp_path):
    (tmp_path / "t").write_bytes(MALFORMED["dtype we do not hold"])
    with pytest.raises(FormatError, match="tensor 'a' has dtype F8_E4M3"):
        read_tensors(tmp_path / "t")


def test_format_error_is_path_and_message_and_can_cross_processes(tmp_path):
    error = FormatError(tmp_path / "x.json", "no field")
    assert str(error) == f"{tmp_path / 'x.json'}: no field"
    assert str(copy.copy(error)) == str(error)  # rebuilt from its args, as in another process


def test_a_long_message_is_cut():
    error = FormatError("x.json", f"field is {'a' * 10**6!r}, expected text")
    assert str(error).startswith("x.json: field is 'aaa")
    assert str(error).endswith("aaa', expected text")
    assert len(str(error)) < 1000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(value=json_values)
def test_json_comes_back(folder, value):
    write_json(folder / "j", value)
    assert repr(read_json(folder / "j")) == repr(value)  # repr tells 1 from 1.0 and 0.0 from -0.0


def test_json_is_readable_and_keeps_the_order(tmp_path):
    write_json(tmp_path / "j", {"b": 1, "a": "é"})
    assert (tmp_path / "j").read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "é"\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_what_json_cannot_hold_leaves_no_file(tmp_path, value):
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "j", value)
    assert os.listdir(tmp_path) == []


def test_a_path_that_is_not_utf8_is_named_in_full(tmp_path):
    with pytest.raises(ValueError, match=r"^JSON is UTF-8, which 'texts/caf\\udce9' is not$"):
        write_json(tmp_path / "j", {"corpus": [os.fsdecode(b"texts/caf\xe9/a.txt")]})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b'"\xff"', b"[1,]", b"NaN", b"[-Infinity]", b'{"a":1,"a":2}', b"[" * 100_000,
     b"{} {}", b"1" * 5000, b"\xef\xbb\xbf{}"],
)
def test_malformed_json_is_refused(tmp_path, text):
    (tmp_path / "j").write_bytes(text)
    with pytest.raises(FormatError, match=re.escape(f"{tmp_path / 'j'}: ")):
        read_json(tmp_path / "j")


def test_json_has_a_depth(tmp_path):
    """Deeper, a message that quotes the value would be a RecursionError."""
    for depth in (1, 99):
        (tmp_path / "j").write_text("[" * depth + "]" * depth)
        assert str(read_json(tmp_path / "j")) == "[" * depth + "]" * depth
    for opening, closing in ("[]", ('{"a":[', "]}")):
        (tmp_path / "j").write_text(opening * 100 + "1" + closing * 100)
        with pytest.raises(FormatError, match="nested 100 times or more"):
            read_json(tmp_path / "j")


@given(text=st.binary(max_size=40))
def test_any_bytes_are_json_or_refused(folder, text):
    (folder / "j").write_bytes(text)
    try:
        read_json(folder / "j")
    except FormatError:
        pass


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_a_missing_file_is_not_a_damaged_one(tmp_path, read):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")
    with pytest.raises(FormatError, match="cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("read", [read_json, read_tensors, files.read_bytes, files.sha256])
def test_what_is_no_file_is_refused_at_once(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("none", tmp_path / "dangling")
    os.symlink("loop", tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    for name, said in [("pipe", "it is a pipe, a file was expected"), ("folder", "it is a folder"),
                       ("dangling", "it is a link to nothing"), ("loop", "symbolic links"),
                       ("x" * 300, "name too long"), ("a\0b", "null"), ("\ud800", "surrog"),
                       ("/dev/zero", "it is a device")]:
        path = tmp_path / name
        with pytest.raises(FormatError, match=f"(?i)cannot be read: .*{said}") as error:
            read(path)
        assert str(error.value).startswith(f"{path}: ")


def test_a_file_larger_than_memory_is_refused(tmp_path, monkeypatch):
    class Endless(io.BytesIO):
        def read(self):
            raise MemoryError

    (tmp_path / "f").write_bytes(b"f")
    monkeypatch.setattr(files, "open", lambda *_: Endless(), raising=False)
    with pytest.raises(FormatError, match="f: cannot be read: it does not fit in memory"):
        files.read_bytes(tmp_path / "f")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    files.write_atomically(tmp_path / "f", b"old")

    def full(*_):
        raise OSError("no space left")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(OSError, match="no space left"):
                files.write_atomically(tmp_path / "f", b"n", b"ew")
        assert os.listdir(tmp_path) == ["f"]
        assert (tmp_path / "f").read_bytes() == b"old"
    with pytest.raises(TypeError):
        files.write_atomically(tmp_path / "f", b"n", "ew")
    assert os.listdir(tmp_path) == ["f"]
    files.write_atomically(tmp_path / "f", b"n", b"ew")
    assert (tmp_path / "f").read_bytes() == b"new"


def test_a_write_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(fd):
        done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else os.fstat(fd).st_size)
        fsync(fd)

    def logged_replace(a, b):
        done.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    files.write_atomically(tmp_path / "f", b"abc", b"de")
    assert done == [5, "rename", "folder"]  # all five bytes, then the name, then the folder


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(tmp_path / "f") == expected
