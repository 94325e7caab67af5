"""Records that a model writes, and scripts/experiments/self_instruct.py."""

from dataclasses import replace

import numpy as np
import pytest
import self_instruct as experiment
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.data.selfmade import agreed, new, read, rows_to_write, text_of
from minilm.data.tokenizers import ByteTokenizer
from minilm.run import RunDirectory

line = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=9)
records = st.builds(data.Record, line, line, line)


@given(records, st.text())
def test_a_record_that_is_written_can_be_read(record, task):
    assert read(text_of(record)) == record
    assert read(text_of(record), task) == replace(record, task=task)


@given(st.text("ab\n-> ", max_size=30))
def test_what_can_be_read_is_what_was_written(text):
    if record := read(text):
        assert text_of(record) == text and record.context


@pytest.mark.parametrize("text", ["", "a", "a\nb", "a\nb\nc", "a\nb\n-> ", "\nb\n-> c",
                                  "a\n\n-> c", "a\n-> c", "a\nb\n-> c\n", "a\nb\n->c"])
def test_what_is_no_record_is_not_read(text):
    assert read(text) is None


@given(st.lists(records, min_size=1, max_size=5))
def test_all_of_a_row_is_learned(own):
    tokenizer = ByteTokenizer()
    for record, (tokens, targets) in zip(own, rows_to_write(own, tokenizer), strict=True):
        assert tokens[0] == targets[-1] == tokenizer.end and (tokens[1:] == targets[:-1]).all()
        assert tokens.dtype == targets.dtype == np.int32
        assert tokenizer.decode(targets[:-1]) == text_of(record)


few = st.lists(st.builds(data.Record, st.sampled_from("ab"), st.sampled_from("xy"),
                         st.sampled_from("12")), max_size=9)


@given(few, few)
def test_what_is_new_is_neither_known_nor_written_before(written, known):
    def prompts(own): return [data.prompt(record) for record in own]
    found = new(written, known)
    assert len({*prompts(found)}) == len(found) and not {*prompts(found)} & {*prompts(known)}
    assert {*prompts(found)} | {*prompts(known)} >= {*prompts(written)}
    assert found == new(found, known) and [r for r in written if r in found][:1] == found[:1]


@given(few, st.data())
def test_an_output_that_is_not_given_again_is_dropped(written, drawn):
    again = [drawn.draw(st.sampled_from("12")) for _ in written]
    assert agreed(written, again) == [r for r, x in zip(written, again) if r.output == x]
    with pytest.raises(ValueError, match="need an answer each"):
        agreed(written, [*again, "1"])


# The experiment


def test_the_rule_drops_what_it_says(capsys):
    def pair(text, again): return {"text": text, "again": again}
    found = [pair("sort\ncab\n-> abc", "abc"), pair("sort\ncab\n-> abc", "abc"),  # a copy
             pair("sort\ncba\n-> abd", "abc"),  # not agreed
             pair("sort\nask\n-> aks", "aks"), pair("nothing", ""),
             pair("upper\nabc\n-> ABC", "ABC")]  # known
    seeds = [data.Record("upper", "abc", "wrong")]
    readable, kept = experiment.sifted(found, seeds, ["ask"])
    assert [record.context for record in readable] == ["cab", "cab", "cba", "abc"]
    assert kept == [data.Record("sort", "cab", "abc")]
    assert capsys.readouterr().out == (
        "  of 6 texts 5 are readable, 4 of them about other words than are asked, 2 of them new, "
        "1 of them agreed\n")


@pytest.mark.parametrize("instruction, output, right", [
    ("sort", "abc", True), ("please mirror", "bac", True), ("sort", "bac", False),
    ("sort and upper", "ABC", True), ("sing", "abc", False)])
def test_a_written_record_is_judged_by_what_it_asks(instruction, output, right):
    assert experiment.is_right(data.Record(instruction, "cab", output)) == right


def test_each_arm_learns_from_its_source(tmp_path, monkeypatch):
    """The teacher is taught once; its right and wrong records are told apart."""
    s = experiment.Imitation(n=6, texts=12, test=2, method="full", seed=3)
    train, test, ask = experiment.gold(s)
    words = [record.context for record in train[6:10]]
    texts = [f"upper\n{word}\n-> {word.upper()}" for word in words] + ["?"] * 4
    texts[0] = f"upper\n{words[0]}\n-> X"
    learned, taught = [], []
    monkeypatch.setattr(experiment, "writer", lambda *_: taught.append(1) or "taught")
    monkeypatch.setattr(experiment, "written", lambda *_: texts)
    monkeypatch.setattr(experiment, "answers", lambda model, own, tokenizer, *how: [
        "other" if record.context == words[3] and not how else record.output for record in own])
    monkeypatch.setattr(experiment, "learned", lambda model, tokenizer, own, *_: (
        learned.append(own), ("model",))[1])
    monkeypatch.setattr(experiment, "right", lambda *_: {experiment.RIGHT: 1.0})
    monkeypatch.setattr(experiment, "loss_of_answers", lambda *_: 1.0)
    rows = {}
    for arm, own in experiment.ARMS.items():
        (folder := tmp_path / arm).mkdir()
        rows[arm] = experiment.measured(replace(s, **own), RunDirectory(folder), arm)
    kept = [read(text) for text in texts[:3]]
    assert taught == [1] and learned == [train[:6], kept, kept, train[:6] + kept, train[:3]]
    assert [row[experiment.COUNT] for row in rows.values()] == [6, 3, 3, 9, 3]
    assert [row[experiment.TRUE] for row in rows.values()] == pytest.approx(
        [100, 200 / 3, 200 / 3, 800 / 9, 100])
    assert {row[experiment.SHARE] for row in rows.values()} == {100 * 3 / 8}
    assert not {*ask} & {record.context for record in train}
    assert len(test) == 6 and all(map(experiment.is_right, train + test))


def test_a_text_that_does_not_end_is_empty(monkeypatch):
    end, seeds = ByteTokenizer.end, [data.Record("a", "b", "c")]
    monkeypatch.setattr(experiment, "base", lambda folder: (None, ByteTokenizer()))
    calls = []

    def generate(model, begun, longest, seed, eos):
        calls.append((begun.shape, longest, seed, eos))
        rows = [[end, 97, 98, end, 99], [end, 97, 98, 99, 99], [end, end, 97, 97, 97]]
        return np.array((rows * 100)[: len(begun)])

    monkeypatch.setattr(experiment, "generate", generate)
    found = experiment.written(None, ByteTokenizer(), seeds,
                               experiment.Imitation(texts=300, seed=3))
    assert found[:3] == ["ab", "", ""] and len(found) == 300
    longest = len("a\nb\n-> c") + 1
    assert calls == [((256, 1), longest, [3, 0], end), ((44, 1), longest, [3, 256], end)]
