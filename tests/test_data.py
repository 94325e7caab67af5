"""Checks minilm.data: corpora and their split, tokenizers and their files, batches.

Laws (round trips, partitions, coverage, proportions) are drawn with hypothesis; the loader of
tokenizer files is fed mutated files and may raise FormatError only.
"""

import hashlib
import json
import os
import sys
import sysconfig
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilm.data import (
    Batches,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Corpus,
    MaskedBatches,
    corrupt,
    cut,
    held_out_rows,
    load_corpora,
    load_corpus,
    load_tokenizer,
    mask_tokens,
    pack,
    printable,
    split,
)
from minilm.files import FormatError, write_json
from minilm.run import share_held_out

PROSE = ["the cat and the dog sat on the mat. " * 20, "naïve café 数学 😀 " * 10]
SPELLED = ["<|endoftext|>", "<|mask|>", "<|", "endoftext", "|>", " ", "the"]
texts = st.text() | st.lists(st.sampled_from(SPELLED) | st.text(max_size=5)).map("".join)


# Corpora


@pytest.mark.parametrize(
    "name, least, most, documents",
    [
        ("python-reference", 0.4e6, 1e6, 70),
        ("python-docstrings", 1.2e6, 4e6, 400),
        ("python-source", 8e6, 20e6, 450),
    ],
)
def test_python_corpora_have_the_size_they_promise(name, least, most, documents):
    corpus = load_corpus(name)
    assert least < corpus.characters < most
    assert len(corpus.documents) >= documents
    assert corpus.name == name


def test_python_reference_is_sorted_by_topic_and_loads_the_same_twice():
    from pydoc_data.topics import topics

    corpus = load_corpus("python-reference")
    assert corpus.documents == tuple(topics[name] for name in sorted(topics))
    assert load_corpus("python-reference").sha256 == corpus.sha256


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def test_the_library_is_read_without_its_tests(tmp_path, monkeypatch):
    module = '"""B."""\nclass K:\n  "K."\n  def f(self): "f\\d"\nif 1:\n  def g(): "g"\n'
    files = {
        "b.py": module,
        "a.py": "x = 1\n",
        "pkg/m.py": '"""M."""',
        "pkg/__init__.py": "\n",
        "pkg/latin.py": "# \xe9".encode("latin-1"),
        "pkg/data.txt": "no code",
        "test/t.py": "'''t'''",
        "pkg/tests/t.py": "'''t'''",
        "idlelib/idle_test/t.py": "'''t'''",
        "site-packages/t.py": "'''t'''",
        "pydoc_data/topics.py": "topics = {}",
    }
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(write(tmp_path, files))}.get)
    assert load_corpus("python-source").documents == ("x = 1\n", module, '"""M."""')
    assert load_corpus("python-docstrings").documents == ("B.\n\nK.\n\nf\\d\n\ng", "M.")


def test_a_folder_is_its_text_files_in_order(tmp_path):
    files = {
        "b.txt": "b",
        "a/z.md": "z",
        "a.rst": "a",
        "c.py": "c",
        "blank.txt": " \n",
        "latin.txt": b"\xe9",
        "image.png": "p",
        ".hidden.txt": "h",
        ".git/x.txt": "x",
    }
    assert load_corpus(write(tmp_path, files)).documents == ("a", "z", "b", "c")
    assert load_corpus(str(tmp_path / "image.png")).documents == ("p",)


def test_what_is_no_text_file_does_not_refuse_the_rest(tmp_path):
    root = write(tmp_path / "root", {"a.txt": "a", "latin.txt": b"\xe9", "locked/b.txt": "b"})
    os.symlink("missing.txt", root / "dangling.txt")
    os.symlink("loop.txt", root / "loop.txt")
    os.mkfifo(root / "pipe.txt")
    os.symlink("/dev/zero", root / "zero.txt")
    (root / "folder.txt").mkdir()
    corpus = load_corpus(root)
    assert corpus.documents == ("a", "b")
    said = dict(line.removeprefix(f"{root}/").split(": ", 1) for line in corpus.skipped)
    assert said.keys() == {"dangling.txt", "latin.txt", "loop.txt", "pipe.txt", "zero.txt"}
    assert "a link to nothing" in said["dangling.txt"] and "not UTF-8" in said["latin.txt"]
    assert "it is a pipe" in said["pipe.txt"] and "it is a device" in said["zero.txt"]
    assert corpus.told().count(": ") >= 5 and "more" not in corpus.told()


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": "a", "locked/b.txt": "b"})
    scandir = os.scandir

    def refuses(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    corpus = load_corpus(tmp_path)
    assert corpus.documents == ("a",)
    assert corpus.skipped == (f"{tmp_path / 'locked'}: cannot be read: Permission denied",)


@pytest.mark.parametrize("kind", ["dangling", "pipe", "loop", "device"])
def test_a_path_that_is_no_file_is_an_error_at_once(tmp_path, kind):
    path = tmp_path / "text.txt"
    os.mkfifo(path) if kind == "pipe" else os.symlink(
        {"dangling": "none", "loop": "text.txt", "device": "/dev/zero"}[kind], path)
    with pytest.raises(FormatError, match=r"text\.txt: cannot be read: "):
        load_corpus(path)


def test_linked_folders_are_read_once(tmp_path):
    write(tmp_path, {"root/z/a.txt": "a", "far/b.txt": "b", "far/deep/c.txt": "c", "up.txt": "no"})
    root = tmp_path / "root"
    for link, target in {"a": "z", "z/again": "..", "far": "../far", "m": "../far/deep",
                         "b.txt": "../far/b.txt", "up": ".."}.items():
        os.symlink(target, root / link)
    os.symlink("../root", tmp_path / "far" / "back")
    corpus = load_corpus(root)
    assert corpus.documents == ("b", "b", "c", "a")  # b.txt, far/b.txt, far/deep, z
    assert corpus.skipped == (f"{root}/up: is a link to a folder that the corpus lies in",)
    assert load_corpus(root / "far" / "deep").documents == ("c",)


def test_runs_and_models_in_a_corpus_are_not_its_text(tmp_path):
    files = {"a.txt": "a", "runs/notes.md": "mine", "runs/pretrain-1/run.json": "{}",
             "runs/pretrain-1/samples.txt": "sampled", "runs/pretrain-1/deep/x.txt": "sampled",
             "m/config.json": "{}", "m/model.safetensors": "w", "m/merges.txt": "m",
             "n/adapter_config.json": "{}", "n/adapter_model.bin": "w", "n/README.md": "n",
             "site/config.json": "{}", "site/page.md": "page"}
    corpus = load_corpus(write(tmp_path, files))
    assert corpus.documents == ("a", "mine", "page")
    assert sorted(corpus.skipped) == [
        f"{tmp_path}/m: holds a model, not text",
        f"{tmp_path}/n: holds a model, not text",
        f"{tmp_path}/runs/pretrain-1: holds a run, not text",
    ]
    assert load_corpus(tmp_path / "runs" / "pretrain-1").documents == ("sampled", "sampled")
    with pytest.raises(ValueError, match=r"no text; skipped: .*/1: holds a run"):
        load_corpus(write(tmp_path / "only", {"1/run.json": "{}", "1/samples.txt": "x"}))


def test_links_into_runs_are_not_followed(tmp_path):
    write(tmp_path, {"root/a.txt": "a", "far/1/run.json": "{}", "far/1/samples.txt": "no",
                     "far/1/deep/er/x.txt": "no", "root/2/run.json": "{}", "root/2/s.txt": "no",
                     "far/notes.txt": "b"})
    root, run = tmp_path / "root", tmp_path / "far" / "1"
    for link, target in {"s.txt": run / "samples.txt", "x.txt": run / "deep/er/x.txt",
                         "deep": run / "deep", "er": run / "deep/er", "own.txt": root / "2/s.txt",
                         "notes.txt": "../far/notes.txt", "twice.txt": root / "s.txt"}.items():
        os.symlink(target, root / link)
    corpus, into = load_corpus(root), f"is a link into {run}, which holds a run, not text"
    assert corpus.documents == ("a", "b")
    assert sorted(corpus.skipped) == [
        f"{root}/2: holds a run, not text",
        f"{root}/deep: {into}",
        f"{root}/er: {into}",
        f"{root}/own.txt: is a link into {root}/2, which holds a run, not text",
        f"{root}/s.txt: {into}", f"{root}/twice.txt: {into}", f"{root}/x.txt: {into}"]
    assert load_corpus(run / "deep").documents == ("no",)  # asked for by name


@pytest.mark.parametrize("lines, said", [
    ('{"text": "a"}\n{"text": "b', "line 2: not valid JSON"),  # the file was cut
    ('{"text": "a"}\n{"t": "b"}', "line 2: expected an object with a text in the field"),
    ('{"text": 1}', "line 1: expected an object"), ("", "holds no text")])
def test_json_lines_are_whole_or_refused(tmp_path, lines, said):
    write(tmp_path, {"good.jsonl": '{"text": "a"}\n{"text": " "}\n{"text": "b\\nc", "x": 1}',
                     "bad.jsonl": lines})
    assert load_corpus(tmp_path / "good.jsonl").documents == ("a", "b\nc")
    with pytest.raises(FormatError, match=said):
        load_corpus(tmp_path / "bad.jsonl")


def test_a_text_of_two_corpora_counts_in_the_first(tmp_path):
    write(tmp_path, {"a/1.txt": "one", "a/2.txt": "two", "b/1.txt": "two", "b/2.txt": "three"})
    first, second = load_corpora([tmp_path / "a", tmp_path / "b"])
    assert (first.documents, second.documents) == (("one", "two"), ("three",))
    assert first.skipped == () and second.told() == "1 document that an earlier corpus has"
    with pytest.raises(ValueError, match="no text; skipped: 2 documents that an earlier"):
        load_corpora([tmp_path / "a", tmp_path / "a"])


def test_all_ends_of_lines_are_one(tmp_path):
    write(tmp_path, {"a.txt": b"a\r\nb\rc\n"})
    assert load_corpus(tmp_path).documents == ("a\nb\nc\n",)


def test_a_corpus_needs_text(tmp_path):
    with pytest.raises(ValueError, match="python-reference, python-docstrings, python-source"):
        load_corpus("no-such-corpus")
    with pytest.raises(ValueError, match="no text"):
        load_corpus(tmp_path)
    write(tmp_path, {"latin.txt": b"\xe9", "blank.txt": "\n"})
    with pytest.raises(FormatError, match=r"latin\.txt: not UTF-8"):
        load_corpus(tmp_path / "latin.txt")
    with pytest.raises(ValueError, match="no text"):
        load_corpus(tmp_path / "blank.txt")
    with pytest.raises(ValueError, match="document 1 is empty"):
        Corpus("x", ("a", ""))


def test_the_hash_pins_text_and_borders():
    data = b"\x02\0\0\0\0\0\0\0\xc3\xa9" + b"\x01\0\0\0\0\0\0\0b"
    assert Corpus("x", ("é", "b")).sha256 == hashlib.sha256(data).hexdigest()
    assert Corpus("x", ("é", "b")).characters == 2
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab")]
    assert len({Corpus("x", documents).sha256 for documents in parts}) == 4


shares = st.floats(0.01, 0.99)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 3)), min_size=2, max_size=8),
    share=shares,
)
@example(sizes=[(465_000, 1), (2_000, 1)], share=0.1)
@example(sizes=[(2_000, 1), (465_000, 1)], share=0.1)
@example(sizes=[(20_000, 1)] + [(100, 1)] * 9, share=0.1)
@example(sizes=[(30_000, 2), (1, 1)], share=0.1)
def test_the_share_that_is_asked_for_is_held_out_whatever_the_sizes(sizes, share):
    found = [chr(0x4E00 + i) * size for i, (size, n) in enumerate(sizes) for _ in range(n)]
    total, most = sum(map(len, found)), max(copies for _, copies in sizes)
    train, validation = split(Corpus("x", tuple(found)), share)
    held = sum(map(len, validation))
    assert sum(map(len, train)) == total - held
    # a tenth of the smaller part, or a cut; its place moves by one if both halves would be equal
    assert abs(held - share * total) <= max(0.1 * min(share, 1 - share) * total, 2 * most)
    cut = {text[0] for text in train} & {text[0] for text in validation}
    assert len(cut) <= 1
    for text in set(found):  # every copy is cut at the same place, and its end is held out
        parts = [Counter(x for x in part if x[0] == text[0]) for part in (train, validation)]
        assert all(set(part.values()) <= {found.count(text)} for part in parts)
        assert "".join("".join(part) for part in parts) == text


@given(st.lists(st.text("abc", min_size=1, max_size=20), min_size=2, max_size=12)
       .filter(lambda found: len(set(found)) > 1), shares, st.randoms())
def test_no_text_is_on_both_sides_and_the_order_does_not_matter(found, share, random):
    train, validation = split(Corpus("x", tuple(found)), share)
    assert train and validation and not set(train) & set(validation)
    assert sum(map(len, train + validation)) == sum(map(len, found))
    random.shuffle(found)
    again = split(Corpus("x", tuple(found)), share)
    assert [sorted(part) for part in again] == [sorted(train), sorted(validation)]


def test_parts_keep_the_order_of_the_corpus():
    found = [f"{i} {chr(97 + i) * 50}" for i in range(20)]
    train, validation = split(Corpus("x", tuple(found)), 0.3)
    assert sorted(train + validation, key=lambda text: int(text.split()[0])) == found
    assert list(train) == [text for text in found if text in train] and len(validation) == 6


# The default run's: they may change with Python's own text, but not with the rule.
@pytest.mark.parametrize(
    "name", ["python-reference", "python-docstrings", "python-source"]
)
def test_pythons_own_text_is_held_out_by_whole_documents(name):
    corpus = load_corpus(name)
    train, validation = split(corpus)
    held, wanted = set(), 0.1 * corpus.characters
    for text in sorted(set(corpus.documents), key=lambda t: hashlib.sha256(t.encode()).digest()):
        if sum(len(t) for t in corpus.documents if t in held) >= wanted:
            break
        held.add(text)
    assert sum(map(len, validation)) < 1.1 * wanted
    assert validation == tuple(text for text in corpus.documents if text in held)
    assert train == tuple(text for text in corpus.documents if text not in held)


def test_a_single_document_is_cut_at_its_end():
    assert split(Corpus("x", ("0123456789",))) == (("012345678",), ("9",))
    assert split(Corpus("x", ("0123456789",)), 0.5) == (("01234",), ("56789",))
    assert split(Corpus("x", ("ab", "ab")), 0.1) == (("a", "a"), ("b", "b"))


@pytest.mark.parametrize(
    "found, share, message",
    [
        (("a",), 0.1, "1 characters are too few"),
        (("a", "a"), 0.1, "1 characters are too few"),
        (("aa",), 0.5, "2 characters are too few"),
        (("a", "b"), 0.0, "between 0 and 1"),
        (("a", "b"), 1.0, "between 0 and 1"),
        (("a", "b"), float("nan"), "between 0 and 1"),
    ],
)
def test_split_refuses_an_empty_part(found, share, message):
    with pytest.raises(ValueError, match=message):
        split(Corpus("x", found), share)


# Tokenizers


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers")
    return BPETokenizer.train(PROSE, 290)


@pytest.fixture(scope="module", params=["bytes", "characters", "bpe"])
def tokenizer(request):
    if request.param == "bpe":
        return request.getfixturevalue("bpe")
    return ByteTokenizer() if request.param == "bytes" else CharTokenizer.train([*PROSE, *SPELLED])


def test_bytes_are_utf8():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.end, tokenizer.mask, tokenizer.vocab_size) == (256, 257, 258)
    assert tokenizer.decode([97, 256, 0xFF, 257, 98]) == "a\ufffdb"


def test_characters_are_numbered_in_order():
    tokenizer = CharTokenizer.train(["cab", "😀a"])
    assert tokenizer.alphabet == "abc😀"
    assert tokenizer.encode("😀bca").tolist() == [3, 1, 2, 0]
    assert (tokenizer.end, tokenizer.mask, tokenizer.vocab_size) == (4, 5, 6)
    assert tokenizer.decode(np.array([3, 4, 1, 5])) == "😀b"


@pytest.mark.parametrize("stranger", ["A", "b", "😀", "\0", "\U0010ffff"])
def test_an_unknown_character_is_named(stranger):
    with pytest.raises(ValueError) as error:
        CharTokenizer("ac").encode("ca" + stranger + "a" + stranger)
    text = f"ca{stranger}a{stranger}"
    assert str(error.value) == (f"character {stranger!r} at position 2 is not in the alphabet of 2 "
                                f"characters: {text!r}")
    with pytest.raises(ValueError, match=f"at position 99 .*: 'c{'a' * 19}.{'a' * 19}'$"):
        CharTokenizer("ac").encode("a" * 79 + "c" + "a" * 19 + "-" + "a" * 50)


@pytest.mark.parametrize("alphabet", ["", "ba", "aa", "\ud800"])
def test_an_alphabet_is_ascending(alphabet):
    with pytest.raises(ValueError):
        CharTokenizer(alphabet)


@given(text=texts)
def test_bytes_round_trip(text):
    check_round_trip(ByteTokenizer(), text)


@given(text=texts)
def test_bpe_round_trip(bpe, text):
    check_round_trip(bpe, text)


@given(text=texts.filter(bool), data=st.data())
def test_characters_round_trip(text, data):
    tokenizer = CharTokenizer.train([text])
    check_round_trip(tokenizer, data.draw(st.text(tokenizer.alphabet)))


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert not np.isin(ids, [tokenizer.end, tokenizer.mask]).any()  # whatever the text spells
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()


def test_special_ids_decode_to_nothing(tokenizer):
    ids = [*tokenizer.encode("the "), tokenizer.end, tokenizer.mask, *tokenizer.encode("cat")]
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.decode([]) == ""


def test_ids_that_name_no_token_decode_to_nothing(tokenizer):
    """As in transformers: a model's table may have more rows than there are tokens."""
    known = tokenizer.encode("the cat").tolist()
    for stranger in (tokenizer.vocab_size, tokenizer.vocab_size + 1, 2**40):
        assert tokenizer.decode([stranger, *known, stranger]) == "the cat"


def test_what_is_no_id_is_refused(tokenizer):
    with pytest.raises(ValueError, match="-1"):
        tokenizer.decode([1, -1])
    with pytest.raises(TypeError, match="float64"):
        tokenizer.decode([1.0])
    with pytest.raises(ValueError, match=r"\(1, 1\)"):
        tokenizer.decode([[1]])


def test_a_lone_surrogate_is_no_text(tokenizer):
    with pytest.raises(ValueError):
        tokenizer.encode("a\ud800")


def test_save_then_load_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert type(again) is type(tokenizer)
    for name in ("vocab_size", "end", "mask"):
        assert getattr(again, name) == getattr(tokenizer, name)
    for text in (*PROSE, "<|endoftext|><|mask|>"):
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


def test_bpe_learns_merges_and_puts_special_tokens_last(bpe):
    assert bpe.vocab_size == 290
    assert (bpe.end, bpe.mask) == (288, 289)
    assert len(bpe.encode(PROSE[0])) < len(PROSE[0]) / 2
    assert BPETokenizer.train(PROSE, 290).tokenizer.to_str() == bpe.tokenizer.to_str()


def test_bpe_training_refuses_nonsense():
    with pytest.raises(ValueError, match="at least 256 bytes"):
        BPETokenizer.train(PROSE, 257)
    with pytest.raises(TypeError, match="sequence of texts"):
        BPETokenizer.train("one text", 300)


def huggingface(names, special=True, **fields):
    """The fields of a tokenizer.json over "a" and "b", with special tokens from id 7 on."""
    added = [
        {"id": id, "content": name, "special": special, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for id, name in enumerate(names, start=7)
    ]
    vocab = {"a": 0, "b": 3} | {token["content"]: token["id"] for token in added}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": model,
        **fields,
    }


def load(path, fields):
    path.write_text(json.dumps(fields))
    return load_tokenizer(path)


@pytest.mark.parametrize(
    "names, end, mask",
    [
        (["<|endoftext|>"], 7, None),
        (["<s>", "</s>", "<mask>"], 8, 9),
        (["[CLS]", "[SEP]", "[MASK]"], 8, 9),
        (["[SEP]", "<|endoftext|>"], 8, None),
    ],
)
def test_special_tokens_of_others_are_found(tmp_path, names, end, mask):
    pytest.importorskip("tokenizers")
    tokenizer = load(tmp_path / "tokenizer.json", huggingface(names))
    assert (tokenizer.end, tokenizer.mask) == (end, mask)
    assert tokenizer.vocab_size == 7 + len(names)  # ids 1, 2 and 4 .. 6 do not occur
    assert tokenizer.encode("b a b").tolist() == [3, 0, 3]


def test_others_settings_do_not_cut_or_fill_the_text(tmp_path):
    pytest.importorskip("tokenizers")
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    fill |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    fields = huggingface(["</s>"], truncation=cut, padding=fill)
    tokenizer = load(tmp_path / "tokenizer.json", fields)
    assert tokenizer.encode("b b b").tolist() == [3, 3, 3]


def test_a_special_token_that_cannot_be_escaped_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    fields = huggingface(["</s>"], pre_tokenizer={"type": "WhitespaceSplit"})
    tokenizer = load(tmp_path / "tokenizer.json", fields)
    with pytest.raises(ValueError, match="spells a special token"):
        tokenizer.encode("a </s>")


PANICS = {  # a prefix longer than the tokens it should be cut from makes the library panic
    "type": "BPE",
    "continuing_subword_prefix": "##",
    "vocab": {"a": 0, "b": 1, "ab": 2},
    "merges": [["a", "b"]],
}
HUGE = {"type": "WordLevel", "vocab": {"a": 2**31, "</s>": 7}, "unk_token": "a"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ([], "expected a JSON object"),
        ({}, "not a Hugging Face tokenizer"),
        ({"minilm_tokenizer": "words"}, "'words'"),
        ({"minilm_tokenizer": "characters"}, "'characters'"),
        ({"minilm_tokenizer": "characters", "alphabet": "ba"}, "ascending"),
        ({"minilm_tokenizer": "characters", "alphabet": "\ud800"}, "surrogates"),
        (huggingface(["<s>"]), "no special token"),
        (huggingface(["</s>"], model=PANICS), "not a Hugging Face tokenizer"),
        (huggingface(["</s>"], model=HUGE), "2147483648 does not fit int32"),
        (huggingface(["</s>"], special=False), "no special token"),
    ],
)
def test_a_broken_file_is_named(tmp_path, fields, message):
    pytest.importorskip("tokenizers")
    with pytest.raises(FormatError, match=message) as error:
        load(tmp_path / "tokenizer.json", fields)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory, bpe):
    """The bytes of a valid file of each kind, and a path to write to."""
    path = tmp_path_factory.mktemp("fuzz") / "tokenizer.json"
    found = [json.dumps(huggingface(["</s>", "<mask>"])).encode()]
    found.append(json.dumps(huggingface(["</s>"], model=PANICS)).encode())
    for tokenizer in (ByteTokenizer(), CharTokenizer("abcé"), bpe):
        tokenizer.save(path)
        found.append(path.read_bytes())
    return found, path


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_files_raise_format_errors_only(files, data):
    found, path = files
    content = data.draw(st.sampled_from(found))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        cut = data.draw(st.sampled_from([0, 1, 2, 20]))
        patch = st.sampled_from([b"", b"null", b"-1", b"4294967295", b'"', b"[["]) | st.binary()
        content = content[:at] + data.draw(patch) + content[at + cut :]
    path.write_bytes(content)
    try:
        tokenizer = load_tokenizer(path)
    except FormatError:
        return
    assert tokenizer.vocab_size > tokenizer.end >= 0


def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "minilm\[hf\]"'):
        BPETokenizer.train(PROSE, 300)
    with pytest.raises(ImportError, match=r'pip install "minilm\[hf\]"'):
        load(tmp_path / "tokenizer.json", huggingface(["</s>"]))


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "tokenizer.json")


# Batches


def test_pack_ends_each_document():
    stream = pack(["ab", "", "c"], ByteTokenizer())
    assert stream.tolist() == [97, 98, 256, 256, 99, 256]
    assert stream.dtype == np.int32
    with pytest.raises(ValueError, match="no document"):
        pack([], ByteTokenizer())
    with pytest.raises(TypeError, match="sequence of texts"):
        pack("abc", ByteTokenizer())
    with pytest.raises(ValueError, match="document 1, 'acb': character 'c' at position 1"):
        pack(["ab", "acb"], CharTokenizer("ab"))


def streams_of(*sizes):
    """Streams that count up, stream s from 10000 s: a token tells where it was drawn."""
    return [10_000 * which + np.arange(size) for which, size in enumerate(sizes)]


@given(
    sizes=st.lists(st.integers(9, 40), min_size=1, max_size=3),
    batch=st.integers(1, 20),
    seed=st.integers(0, 2**63),
    step=st.integers(0, 10**9),
)
def test_rows_are_crops_of_one_stream(sizes, batch, seed, step):
    tokens, targets = Batches(streams_of(*sizes), [1] * len(sizes), batch, 8, seed)[step]
    for array in (tokens, targets):
        assert array.shape == (batch, 8)
        assert array.dtype == np.int32 and array.flags.c_contiguous
    np.testing.assert_array_equal(targets, tokens + 1)
    np.testing.assert_array_equal(tokens, tokens[:, :1] + np.arange(8))
    assert all(token % 10_000 < sizes[token // 10_000] for token in targets[:, -1])


def test_every_crop_has_the_same_chance():
    batches = Batches(streams_of(9, 12), [0.25, 0.75], batch=2000, length=8, seed=0)
    first = np.concatenate([batches[step][0][:, 0] for step in range(20)])
    starts, counts = np.unique(first, return_counts=True)
    assert starts.tolist() == [0, 10_000, 10_001, 10_002, 10_003]
    expected = np.array([0.25, *[0.75 / 4] * 4])
    check_shares(counts, expected)


@given(
    st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=5).filter(any),
    st.integers(0, 1000),
)
def test_streams_come_in_proportion_to_their_weights(weights, seed):
    batches = Batches(streams_of(*[9] * len(weights)), weights, batch=5000, length=8, seed=seed)
    which = np.concatenate([batches[step][0][:, 0] for step in range(2)]) // 10_000
    check_shares(np.bincount(which, minlength=len(weights)), np.array(weights) / sum(weights))


def check_shares(counts, shares):
    """Each count is within six standard deviations of its binomial expectation; 0 and 1 exact."""
    total = counts.sum()
    deviation = np.sqrt(total * shares * (1 - shares))
    certain = (shares == 0) | (shares == 1)
    assert (np.abs(counts - total * shares) <= np.where(certain, 0, 6 * deviation + 1)).all()


def test_a_step_depends_on_seed_and_step_only():
    streams = streams_of(500, 300)
    batches = Batches(streams, [1, 2], batch=4, length=16, seed=3)
    forward = [batches[step] for step in range(5)]
    resumed = Batches(streams, [10, 20], batch=4, length=16, seed=3)
    for step in (4, 2, 0, 3, 1):
        np.testing.assert_array_equal(resumed[step], forward[step])
    np.testing.assert_array_equal(list(islice(batches, 5)), forward)
    other = Batches(streams, [1, 2], batch=4, length=16, seed=4)
    starts = [found[0][:, 0].tolist() for found in (*forward, *islice(other, 5))]
    assert len(set(map(tuple, starts))) == 10


def test_the_draw_of_a_seed_never_changes():
    tokens, _ = Batches(streams_of(1000, 1000), [1, 1], batch=6, length=8, seed=1)[2]
    assert tokens[:, 0].tolist() == [92, 867, 655, 204, 10515, 980]


@pytest.mark.parametrize(
    "sizes, weights, batch, length, message",
    [
        ([20, 8], [1, 1], 2, 8, "stream 1 is too short: 9 tokens are needed, it has 8"),
        ([20], [1, 1], 2, 8, "expected 1 weights"),
        ([20, 20], [1, -1], 2, 8, "negative"),
        ([20, 20], [0, 0], 2, 8, "zero"),
        ([20], [float("nan")], 2, 8, "finite"),
        ([20], [float("inf")], 2, 8, "finite"),
        ([20], [1], 0, 8, "batch and length"),
        ([20], [1], 2, 0, "batch and length"),
    ],
)
def test_batches_refuse_nonsense(sizes, weights, batch, length, message):
    with pytest.raises(ValueError, match=message):
        Batches(streams_of(*sizes), weights, batch, length, seed=0)


def test_a_stream_is_flat_integers():
    for stream in (np.zeros(9), np.zeros((9, 9), np.int32)):
        with pytest.raises(TypeError, match="a stream is"):
            Batches([stream], [1], 2, 4, seed=0)
        with pytest.raises(TypeError, match="a stream is"):
            cut(stream, 4)


@given(size=st.integers(2, 200), length=st.integers(1, 50))
def test_rows_cover_the_stream_once(size, length):
    stream = np.arange(1000, 1000 + size)
    tokens, targets = cut(stream, length)
    assert tokens.dtype == targets.dtype == np.int32
    assert tokens.shape == targets.shape == (-(-(size - 1) // length), length)
    counted = targets != -100
    np.testing.assert_array_equal(targets[counted], stream[1:])
    np.testing.assert_array_equal(tokens[counted], stream[:-1])
    assert not tokens[~counted].any()
    assert counted[:-1].all() and counted[-1].any()


def test_rows_refuse_nonsense():
    with pytest.raises(ValueError, match="the stream is too short: 2 tokens are needed, it has 1"):
        cut(np.array([1]), 4)
    with pytest.raises(ValueError, match="at least 1"):
        cut(np.arange(9), 0)


def test_masking_has_the_rates_of_bert():
    tokens = np.random.default_rng(0).integers(0, 50, (400, 500)).astype(np.int32)
    before = tokens.copy()
    inputs, targets = mask_tokens(tokens, np.random.default_rng(1), 49, 50, special={0, 48})
    np.testing.assert_array_equal(tokens, before)
    assert inputs.dtype == targets.dtype == np.int32

    chosen = targets != -100
    np.testing.assert_array_equal(targets[chosen], tokens[chosen])
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])
    ordinary = ~np.isin(tokens, [0, 48, 49])
    assert not chosen[~ordinary].any()
    check_shares(np.bincount(chosen[ordinary]), np.array([0.85, 0.15]))

    masked, kept = inputs == 49, inputs == tokens
    fates = [(chosen & masked).sum(), (chosen & kept).sum(), (chosen & ~masked & ~kept).sum()]
    by_chance = 0.1 / 47  # a random id may be the true one
    check_shares(np.array(fates), np.array([0.8, 0.1 + by_chance, 0.1 - by_chance]))
    drawn = np.bincount(inputs[chosen & ~masked & ~kept], minlength=50)
    check_shares(drawn, np.array([0, *[1 / 47] * 47, 0, 0]))


def test_masking_repeats_with_its_generator_and_obeys_the_rate():
    tokens = np.arange(1, 90).reshape(1, -1)
    first, again = (mask_tokens(tokens, np.random.default_rng(5), 0, 90) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    _, none = mask_tokens(tokens, np.random.default_rng(5), 0, 90, rate=0)
    assert (none == -100).all()
    _, all_but_special = mask_tokens(tokens, np.random.default_rng(5), 0, 90, rate=1, special=[7])
    np.testing.assert_array_equal(all_but_special, np.where(tokens == 7, -100, tokens))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mask": 9, "vocab_size": 9}, "below 9"),
        ({"mask": 0, "vocab_size": 9, "special": [-1]}, "below 9"),
        ({"mask": 0, "vocab_size": 2, "special": [1]}, "every id is special"),
        ({"mask": 0, "vocab_size": 9, "rate": 1.5}, "rate"),
        ({"mask": 0, "vocab_size": 9, "rate": float("nan")}, "rate"),
    ],
)
def test_masking_refuses_nonsense(fields, message):
    with pytest.raises(ValueError, match=message):
        mask_tokens(np.arange(4), np.random.default_rng(0), **fields)


def test_masked_batches_are_the_batches_corrupted_and_repeat():
    tokenizer = ByteTokenizer()
    plain = Batches([pack(PROSE, tokenizer)], [1], batch=4, length=100, seed=3)
    masked = MaskedBatches(plain, tokenizer, seed=3)
    (inputs, targets), (tokens, _) = masked[7], plain[7]
    hidden = targets != -100
    assert 0.05 < hidden.mean() < 0.3 and tokenizer.mask in inputs
    assert (targets[hidden] == tokens[hidden]).all() and (inputs[~hidden] == tokens[~hidden]).all()
    assert not hidden[tokens == tokenizer.end].any()
    again = MaskedBatches(plain, tokenizer, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(masked[7], again[7], strict=True))
    assert not np.array_equal(masked[7][0] != tokens, masked[8][0] != plain[8][0])


def test_rows_that_are_held_out_are_cut_and_hide_no_padding():
    tokenizer, parts = ByteTokenizer(), [PROSE[:1], PROSE[1:]]
    tokens, targets = cut(np.concatenate([pack(part, tokenizer) for part in parts]), 64)
    plain = held_out_rows(parts, tokenizer, 64, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(plain, (tokens, targets), strict=True))
    inputs, wanted, mask = held_out_rows(parts, tokenizer, 64, seed=0, masked=True)
    real, hidden = targets != -100, wanted != -100
    assert not real.all() and np.array_equal(mask, real) and hidden.any()
    assert not hidden[~real].any() and (wanted[hidden] == tokens[hidden]).all()
    assert (inputs[~hidden] == tokens[~hidden]).all() and tokenizer.mask in inputs[hidden]


def test_a_tokenizer_without_a_mask_cannot_corrupt():
    tokenizer = ByteTokenizer()
    tokenizer.mask = None
    with pytest.raises(ValueError, match="no mask token"):
        corrupt(np.arange(5), np.random.default_rng(0), tokenizer)


def test_printable_keeps_text_and_hides_what_would_steer_a_terminal():
    assert printable("naïve 数学 😀\tx\n\x1b[2Jy\x07\r\x9b") == "naïve 数学 😀\tx\n�[2Jy���"


def test_the_share_that_a_models_run_held_out(tmp_path):
    def run(name, **settings):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.json", {"settings": settings})
        return tmp_path / name / "model"

    first = run("a", validation=0.25)
    second = run("b", model=str(first))
    assert share_held_out(first) == share_held_out(run("c", model=str(second))) == 0.25
    assert share_held_out(run("loop", model=str(tmp_path / "loop" / "model"))) is None
    for i, validation in enumerate((0, 1, True, "0.1", None, [0.1])):
        assert share_held_out(run(f"bad-{i}", validation=validation)) is None
    assert share_held_out(tmp_path / "none" / "model") is None
    write_json(tmp_path / "a" / "run.json", [])
    assert share_held_out(second) is None
    (tmp_path / "a" / "run.json").write_bytes(b"{")
    with pytest.raises(FormatError, match=r"a/run\.json: not valid JSON"):
        share_held_out(first)
