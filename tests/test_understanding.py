"""Tasks of understanding: what their examples are, their rows and batches; and the experiment."""

import os
from collections import Counter

import numpy as np
import pytest
import understanding
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.data.understanding import Pieces
from minilm.interop import huggingface
from minilm.run import newest_model
from minilm.transformer import Config, Transformer, with_classes
from minilm.trial import newest, writer

CORPORA = {"low": ("abcd efgh " * 9, "short", "ijkl mnop qr " * 5), "high": ("STUV WXYZ " * 20,)}
BYTES = data.ByteTokenizer()
seeds = st.integers(0, 2**32)


def made(task, seed=0, count=40, size=20):
    return data.make_examples(task, CORPORA, count, size, seed)


def texts_of(corpora=CORPORA):
    return "|".join(text for documents in corpora.values() for text in documents)


@given(st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=5), st.integers(1, 9),
       seeds)
def test_every_piece_is_one_of_a_document(documents, size, seed):
    places = Counter(text[i : i + size] for text in documents for i in range(len(text) - size + 1))
    if not places:
        with pytest.raises(ValueError, match=f"no document has {size} characters"):
            Pieces(documents, size)
        return
    pieces, rng = Pieces(documents, size), np.random.default_rng(seed)
    assert pieces.ends[-1] == sum(places.values())
    assert {pieces.draw(rng) for _ in range(20)} <= {*places}


def test_every_place_has_the_same_chance():
    pieces, rng = Pieces(("abc", "x", "de"), 2), np.random.default_rng(0)
    found = Counter(pieces.draw(rng) for _ in range(3000))
    assert {*found} == {"ab", "bc", "de"} and min(found.values()) > 900


@given(st.sampled_from([*understanding.TASKS]), seeds, st.integers(1, 40))
def test_each_class_comes_equally_often(task, seed, count):
    examples = made(task, seed, count)
    assert examples == made(task, seed, count)
    counts = Counter(example.label for example in examples)
    labels = range(6 if task == "similar" else 2)
    assert len(examples) == count and {*counts} <= {*labels}
    assert max(counts.values()) - min(counts[label] for label in labels) <= 1
    assert {sum(map(len, example.texts)) for example in examples} == {20}


@given(seeds)
def test_the_corpus_is_the_one_of_the_label(seed):
    names = data.classes_of("corpus", CORPORA)
    for (text,), label in made("corpus", seed):
        assert text in texts_of({"": CORPORA[names[label]]})


@given(seeds)
def test_words_are_turned_round_or_not(seed):
    for (text,), label in made("words", seed):
        assert (text in texts_of()) == (label == 0)  # no word is another one backwards
        if label:
            halves = [word for word in text.split(" ") if len(word) > 3]
            assert halves and all(word[::-1] in texts_of() for word in halves)


@given(seeds)
def test_a_second_text_goes_on(seed):
    found = Counter((label, "".join(texts) in texts_of())
                    for texts, label in made("next", seed, 60))
    assert found[1, True] == 30 and found[0, False] > 10  # the texts repeat: some go on by chance


@given(seeds, st.integers(10, 40))
def test_a_grade_is_how_many_fifths_are_the_same(seed, size):
    other = {"digits": ("0123456789" * 9,), "letters": ("abcdefghij" * 9,)}  # may start alike
    for (one, two), grade in data.make_examples("similar", other, 12, size, seed):
        same = [a == b for a, b in zip(one, two)]
        fifths = [same[i] for i in np.unique(np.arange(size // 2) * 5 // (size // 2),
                                             return_index=True)[1]]
        assert len(one) == len(two) == size // 2 and isinstance(grade, float)
        assert one == two if grade == 5 else sum(fifths) in (grade, 5)  # or the same text twice


def test_grades_are_learned_by_least_squares():
    examples = data.make_examples("similar", CORPORA, 24, 20, 0)
    tokens, grades, mask = data.rows_of_examples(examples, BYTES, 30)
    assert grades.dtype == np.float32 and Counter(grades.tolist()) == {g: 4 for g in range(6)}
    model = Transformer(Config.bert(258, 30, layers=1, heads=2, width=8, hidden=8))
    model = with_classes(model, ("similarity",))
    said = understanding.answers(model, tokens, grades, mask)
    loss, share = understanding.GradeLoss(), slice(0, 9)
    assert loss.totals(tokens, grades, mask) == (24,)
    assert float(loss(model, tokens, grades, mask).data) == pytest.approx(
        np.mean((np.array(said) - grades) ** 2), rel=1e-5)
    part = loss(model, tokens[share], grades[share], mask[share], totals=(24,))
    assert float(part.data) == pytest.approx(
        np.sum((np.array(said) - grades)[share] ** 2) / 24, rel=1e-5)


@pytest.mark.parametrize("given, said", [
    (("sentiment", CORPORA, 4, 20, 0), "'sentiment' is none of the tasks corpus, words, .*similar"),
    (("corpus", {"one": ("text " * 9,)}, 4, 20, 0), r"at least two corpora, got \['one'\]"),
    (("next", CORPORA, 4, 7, 0), "size must be at least 8 characters, got 7"),
    (("next", CORPORA, 4, 999, 0), "no document has 999 characters"),
    (("words", {"digits": ("1234 " * 9,)}, 4, 20, 0), "none has a word of four letters")])
def test_what_gives_no_examples(given, said):
    with pytest.raises(ValueError, match=said):
        data.make_examples(*given)


one_or_two = st.lists(st.text(max_size=12), min_size=1, max_size=2)


@given(st.lists(st.tuples(one_or_two, st.integers(0, 2)), min_size=1, max_size=5),
       st.integers(8, 40))
def test_rows(examples, context):
    examples = [data.Example(tuple(texts), label) for texts, label in examples]
    tokens, labels, mask = data.rows_of_examples(examples, BYTES, context)
    assert tokens.shape == mask.shape and tokens.shape[1] <= context
    assert labels.tolist() == [label for _, label in examples]
    for (texts, _), row, seen in zip(examples, tokens, mask):
        row, rest = row[: seen.sum()], row[seen.sum() :]
        assert seen[: len(row)].all() and (rest == BYTES.end).all() and row[0] == row[-1] == 256
        parts = bytes(min(id, 255) for id in row[1:-1])
        own = [text.encode() for text in texts]
        if sum(map(len, own)) + len(own) + 1 <= context and len(own) == 1:
            assert parts == own[0]
        assert (row == BYTES.end).sum() == len(texts) + 1


@given(st.integers(1, 9), st.integers(1, 7), seeds)
def test_an_epoch_has_every_row_once(rows, batch, seed):
    arrays = np.arange(rows), np.arange(rows) * 10
    batches = data.EpochBatches(arrays, batch, seed)
    drawn = [batches[step] for step in range(rows)]  # `batch` epochs
    a, b = (np.concatenate([part[i] for part in drawn]) for i in (0, 1))
    assert (b == 10 * a).all()
    for epoch in a.reshape(batch, rows):
        assert sorted(epoch) == [*range(rows)]
    assert all((batches[step][0] == part[0]).all() for step, part in reversed([*enumerate(drawn)]))


def test_batches_of_unequal_arrays():
    with pytest.raises(ValueError, match=r"at least one row of each array.* got \[3, 2\] and 1"):
        data.EpochBatches((np.zeros(3), np.zeros(2)), 1, 0)


def test_each_experiment_takes_the_newest_model_that_it_can_use(tmp_path, monkeypatch):
    sizes = dict(vocab_size=258, context=48, layers=1, heads=2, width=8)
    for run, config in ((1, Config.bert(**sizes, hidden=8)), (2, Config.gpt2(**sizes))):
        folder = tmp_path / "runs" / f"pretrain-{run}" / "model"
        huggingface.save_model(Transformer(config), folder, BYTES)
        os.utime(folder / "config.json", (1e9 + run, 1e9 + run))
    monkeypatch.chdir(tmp_path)
    assert newest(understanding.require_encoder).parent.name == "pretrain-1"
    assert newest(writer).parent.name == newest_model(tmp_path / "runs").parent.name == "pretrain-2"
    with pytest.raises(ValueError, match="pretrain-2/model predicts next tokens; this needs"):
        understanding.main(model=(folder,), out=tmp_path)
