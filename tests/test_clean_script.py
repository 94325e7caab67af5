"""Checks scripts/clean.py and what it reads and stores: files of every kind, resuming, bad input.
"""

import errno
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import clean
import numpy as np
import pytest
from clean import Settings, main
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.command import typed
from minilm.data.cleaning import reading
from minilm.data.cleaning.funnel import Dropped
from minilm.data.cleaning.reading import mail_text, page_text, read_documents, text_of_line
from minilm.data.cleaning.store import Kept, Store
from minilm.measure.likely import bits_of, buckets
from minilm.transformer import Config, Transformer

ROOT = Path(__file__).parent.parent
PROSE = [paragraph for text in data.load_corpus("python-reference").documents
         for paragraph in text.split("\n\n") if 300 < len(paragraph) < 1500]
PAGES = [" ".join(PROSE[i : i + 4]) + f"\nThis line is here. It is one of some. It ends. No {i}."
         for i in range(0, 40, 4)]
PAGE = """<html><head><title>No</title><style>p {}</style></head><body><nav><a>Home</a></nav>
<h1>A&amp;B</h1><p>One <b>bold</b>
word.</p><script>if (a < b) x()</script><p>Two<br>lines</p><footer>Contact</footer></body>"""
MAIL = b"From: a@b.co\nContent-Type: text/plain; charset=latin-1\n\nCaf\xe9 at 3.\n> x\n"


# Reading


def test_a_page_is_its_text_without_menus_scripts_and_tags():
    assert page_text(PAGE) == "A&B\n\nOne bold word.\n\nTwo\nlines"


@given(st.text("<>/abnv ps!-&;", max_size=60))
def test_no_page_is_too_broken_to_read(html):
    assert isinstance(page_text(html), str)


def test_a_mail_is_its_text_without_its_head_and_quotes():
    assert mail_text(MAIL) == "Café at 3."
    assert mail_text(b"Content-Type: text/html\n\n<p>Hello</p>") == "Hello"
    assert mail_text(b"Content-Type: image/png\n\nabc").reason == "not a mail: it has no text"


@pytest.mark.parametrize("line, found", [
    (b'{"text": "a"}', "a"), (b'{"text": 1}', Dropped('no field "text"')), (b"[]\n",
    Dropped('no field "text"')), (b"{", Dropped("not JSON")), (b"[" * 9999, Dropped("not JSON")),
    (b'{"text": "\\ud800"}', Dropped("not UTF-8")), (b"\xff", Dropped("not JSON")),
])
def test_a_line_of_json(line, found):
    assert text_of_line(line) == found


def test_files_of_every_kind_are_read_or_said_to_be_none(tmp_path):
    files = {"a.txt": b"\xef\xbb\xbfone\r\ntwo", "b.html": PAGE.encode(), "c.eml": MAIL,
             "d.jsonl": b'{"text": "x"}\nnonsense\n{"text": "' + b"y" * 9000 + b'"}\n{"text": "z"}',
             "e.bin": b"\x7fELF\xff\xfe", "f.txt": b"caf\xe9", "g.txt": b"l" * 9000,
             "h.html": b"<p" * 2000, ".hidden.txt": b"no"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    os.symlink(tmp_path / "a.txt", tmp_path / "link.txt")
    found = {Path(source).name: text for source, text in read_documents([tmp_path], 5000)}
    assert found == {
        "a.txt": "one\ntwo", "b.html": page_text(PAGE), "c.eml": "Café at 3.",
        "d.jsonl:1": "x", "d.jsonl:2": Dropped("not JSON"),
        "d.jsonl:3": Dropped("too long: over 5,000 bytes"), "d.jsonl:4": "z",
        "e.bin": Dropped("not UTF-8: byte 4 of 6"), "f.txt": Dropped("not UTF-8: byte 3 of 4"),
        "g.txt": Dropped("too long: 9,000 bytes, expected at most 5,000"),
        "h.html": Dropped("not HTML: 2,000 tags do not end")}


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_may_be_as_long_as_a_file(tmp_path, end):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "abc"}' + end)
    assert [text for _, text in read_documents([tmp_path], 15)] == ["abc"]
    assert [text for _, text in read_documents([tmp_path], 14)] == [
        Dropped("too long: over 14 bytes")]


def test_json_lines_that_cannot_be_read_are_said_to_be_none(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    (tmp_path / "b.txt").write_text("two")

    def refuse(path, *how):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(reading, "open", refuse, raising=False)
    assert [text for _, text in read_documents([tmp_path], 5000)] == [
        Dropped("cannot be read: Permission denied"), "two"]


# The store


def test_what_was_written_after_the_last_save_is_cut_off(tmp_path):
    store = Store(tmp_path)
    store.add("one", "a")
    store.save()
    count, size = store.count, store.size
    store.add("two", "b")
    store.close()
    again = Store(tmp_path, count, size)
    again.add("three", "c")
    again.close()
    with closing(Kept(tmp_path)) as kept:
        assert [kept[i] for i in range(len(kept))] == [{"text": "one", "source": "a"},
                                                       {"text": "three", "source": "c"}]
    with pytest.raises(ValueError, match="it was changed"):
        Store(tmp_path, 3, size)


def test_an_empty_store(tmp_path):
    Store(tmp_path).close()
    with closing(Kept(tmp_path)) as kept:
        assert len(kept) == 0
        assert kept.exact().shape == kept.near(np.arange(0), 0.8).shape == (0,)


# Buckets


def test_a_third_of_the_texts_is_in_each_bucket():
    assert buckets([3.0, 1.0, 2.0, 9.0, 8.0, 7.0]) == ["middle", "head", "head", "tail", "tail",
                                                       "middle"]


def test_bits_of_a_model_that_knows_nothing_are_its_vocabularys():
    model = Transformer(Config.gpt2(258, 16, layers=1, heads=1, width=8))
    for p in model.parameters():
        p.data[:] = 0
    text = "some text of 25 bytes ..."
    assert bits_of(model, data.ByteTokenizer(), text) == pytest.approx(26 / 25 * np.log2(258))
    assert bits_of(model, data.ByteTokenizer(), "") == pytest.approx(np.log2(258))  # its end


# The program


@pytest.fixture
def heap(tmp_path):
    """Ten pages, a copy of one, a near copy of another, trouble of several kinds."""
    folder = tmp_path / "heap"
    folder.mkdir()
    pages = [*PAGES, PAGES[0].upper(), PAGES[1].replace("line", "row", 1)]
    for i, page in enumerate(pages):
        (folder / f"{i:02}.txt").write_text(page)
    (folder / "mail.txt").write_text(PAGES[2] + "\nIt is sent to jo@example.org by us all.")
    (folder / "short.txt").write_text("Too short.")
    (folder / "x.bin").write_bytes(b"\xff")
    return folder


def run(heap, tmp_path, **options):
    """The records that are left, and the run's folder."""
    out = tmp_path / "runs"
    before = len([*out.glob("*")]) if out.exists() else 0
    main(Settings(source=(str(heap),), **options), out=out)
    folder = out / f"clean-{before + 1}"
    return [json.loads(line) for line in (folder / "clean.jsonl").read_text().splitlines()], folder


def test_copies_go_and_the_sources_stay_as_they_are(heap, tmp_path, capsys):
    before = {path: path.read_bytes() for path in heap.iterdir()}
    records, folder = run(heap, tmp_path, stages=("language", "private", "exact", "near"))
    assert {path: path.read_bytes() for path in heap.iterdir()} == before
    names = [Path(record["source"]).name for record in records]
    assert {"00.txt", "01.txt"} <= {*names}
    assert not {"10.txt", "11.txt", "mail.txt", "short.txt", "x.bin"} & {*names}
    said = capsys.readouterr().out
    assert "not UTF-8: byte 0 of 1" in said
    assert f"copy: of {heap / '00.txt'}" in said
    funnel = json.loads((folder / "funnel.json").read_text())
    assert funnel["exact"]["documents"] - funnel["exact"]["kept"] == 1
    assert funnel["near"]["documents"] - funnel["near"]["kept"] == 2


def test_stages_can_be_chosen(heap, tmp_path):
    records, _ = run(heap, tmp_path, stages=("private",))
    assert len(records) == 14
    assert any("sent to <EMAIL> by" in record["text"] for record in records)


def test_passages_that_stood_before_are_cut(heap, tmp_path):
    records, _ = run(heap, tmp_path, stages=(), passages=100)
    assert sum(PROSE[0] in record["text"] for record in records) == 1


def test_pretrain_reads_what_is_left(heap, tmp_path):
    records, folder = run(heap, tmp_path)
    corpus = data.load_corpus(folder / "clean.jsonl")
    assert corpus.documents == tuple(record["text"] for record in records)


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(heap, tmp_path):
    """Ctrl-C comes while it reads; the whole run is beside it."""
    _, whole = run(heap, tmp_path)
    program = (
        "import clean, os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "read = clean.read_documents\n"
        "def stopping(*args):\n"
        "    for i, document in enumerate(read(*args)):\n"
        "        if i == 5: os.kill(os.getpid(), signal.SIGINT)\n"
        "        yield document\n"
        "clean.read_documents = stopping\n"
        f"clean.main(clean.Settings(source=({str(heap)!r},)), out=clean.Path({str(tmp_path)!r}))\n")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}:"
                                + os.environ.get("PYTHONPATH", "")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env=environment)
    stopped = tmp_path / "clean-1"
    said = f"stopped after 6 documents; go on with: {typed(clean.__file__, resume=stopped)}"
    assert said in done.stdout.splitlines(), done.stderr
    assert not (stopped / "clean.jsonl").exists()
    main(resume=stopped)
    for name in ("clean.jsonl", "funnel.json", "kept.index", "kept.jsonl"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_does_not_go_on_with_other_files(heap, tmp_path):
    _, folder = run(heap, tmp_path)
    (heap / "00.txt").write_text("another text")
    with pytest.raises(ValueError, match="the files are not those that this run was started on"):
        main(resume=folder)


@pytest.mark.parametrize("options, error", [
    ({}, "source must name a file or a folder"),
    ({"source": (".",), "stages": ("magic",)}, "there is no stage 'magic'"),
    ({"source": (".",), "near": 0.0}, "near must be above 0 and at most 1, got 0.0"),
    ({"source": (".",), "passages": 0}, "passages must have 1 character or more, got 0"),
    ({"source": (".",), "buckets": ("top",)}, "there is no bucket 'top', only head, middle, tail"),
])
def test_bad_settings_are_refused_before_a_run_has_a_folder(tmp_path, options, error):
    with pytest.raises(ValueError, match=error):
        main(Settings(**options), out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options, given, error", [
    ({"stages": ("size",)}, {"least"}, "least is given, but --stages leave language out"),
    ({"stages": ("size",)}, {"near"}, "near is given, but --stages leave near out"),
    ({"stages": ("size",)}, {"words"}, "words is given, but --stages leave words out"),
    ({}, {"buckets"}, "buckets is given, but there is no --model that could sort texts"),
])
def test_options_that_decide_nothing_are_refused(tmp_path, options, given, error):
    with pytest.raises(ValueError, match=error):
        main(Settings(source=(str(tmp_path),), **options), out=tmp_path / "runs",
             given=frozenset(given))
    assert not (tmp_path / "runs").exists()


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(Settings(source=(str(tmp_path / "none"),)), out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_nothing_is_left_of_nothing(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(" ")
    records, _ = run(tmp_path / "a.txt", tmp_path)
    assert records == []
    assert "nothing is left" in capsys.readouterr().out
