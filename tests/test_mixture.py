"""What a run sees of each corpus: the laws of epochs, and that the batches keep to them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.data.mixture import Part, amount, from_epochs, mixture_of, mixture_table

counts = st.integers(1, 10**12)
several = st.lists(st.tuples(counts, st.floats(1e-3, 1e3)), min_size=1, max_size=5)


def mixture(drawn, weighted=True):
    corpora = [data.Corpus(f"c{i}", ("é" * (i + 1), "held")) for i in range(len(drawn))]
    parts = [(corpus.documents[:1], corpus.documents[1:]) for corpus in corpora]
    return mixture_of(corpora, parts, [tokens for tokens, _ in drawn],
                      [weight for _, weight in drawn] if weighted else ())


@given(drawn=several, total=counts)
def test_what_is_seen_of_the_corpora_is_the_whole_run(drawn, total):
    found = mixture(drawn)
    assert sum(part.p for part in found) == pytest.approx(1)
    assert sum(part.epochs(total) * part.tokens for part in found) == pytest.approx(total)
    assert [part.size for part in found] == [2 * (i + 1) for i in range(len(drawn))]


@given(drawn=several, total=counts)
def test_without_weights_every_corpus_is_seen_equally_often(drawn, total):
    found = mixture(drawn, weighted=False)
    every = total / sum(tokens for tokens, _ in drawn)
    assert [part.epochs(total) for part in found] == pytest.approx([every] * len(drawn))


@given(p=st.floats(1e-3, 1), epochs=st.floats(1e-3, 1e3), total=counts)
def test_epochs_and_tokens_are_two_ways_to_say_it(p, epochs, total):
    part = from_epochs("a", p, epochs, 5, total)
    assert part.epochs(total) == pytest.approx(epochs)
    assert from_epochs("a", p, part.epochs(total), 5, total).tokens == pytest.approx(part.tokens)


def test_batches_see_each_corpus_as_often_as_the_table_says():
    """Tokens of two streams, which differ, are counted over a run."""
    streams, steps, batch, length = [np.zeros(600, int), np.ones(150, int)], 300, 8, 16
    batches = data.Batches(streams, (1, 3), batch, length, seed=0)
    corpora = [data.Corpus(name, (name,)) for name in "ab"]
    parts = mixture_of(corpora, [(c.documents, ()) for c in corpora], batches.sizes, (1, 3))
    seen = sum(np.bincount(batches[step][0].ravel(), minlength=2) for step in range(steps))
    epochs = [part.epochs(steps * batch * length) for part in parts]
    assert epochs == [0.25 * 38400 / 600, 0.75 * 38400 / 150]
    assert seen / [600, 150] == pytest.approx(epochs, rel=0.05)  # 2400 draws of rows


def test_the_sizes_of_masked_batches_are_those_of_the_text():
    tokenizer = data.ByteTokenizer()
    parts = [(["abc" * 30], ["abc" * 30]), (["xy" * 20], ["xy" * 20])]
    for masked in (False, True):
        batches, _ = data.batches_of(parts, tokenizer, 2, 8, 0, masked=masked)
        assert list(batches.sizes) == [91, 41]


def test_the_table_has_a_line_a_corpus_and_one_for_all():
    a, b = Part("a" * 30, 0.75, 2e12, 5e12), Part("b", 0.25, 3e11, 4e11)
    head, columns, *lines = mixture_table([a, b], 4e12).splitlines()
    assert head == "a run on 4,000,000,000,000 tokens"
    assert columns.split() == ["corpus", "share", "epochs", "tokens", "size", "bytes", "a", "token"]
    assert lines[0].split() == ["a" * 30, "75.0%", "1.50", "2,000,000,000,000", "5", "TB", "2.50"]
    assert lines[2].startswith("all ") and len({*map(len, [columns, *lines])}) == 1
    assert len(mixture_table([a], 1).splitlines()) == 3


def test_a_run_says_what_it_has_of_each_corpus():
    corpora = [data.Corpus("a", ("abcd", "ef")), data.Corpus("b", ("xyz", "u"), ("c: is gone",))]
    parts = [(c.documents[:1], c.documents[1:]) for c in corpora]
    assert data.accounts(corpora, parts, [4, 3], (1, 1), 12).splitlines() == [
        "a: 4 characters to train on, 2 held out (33.3%)",
        "b: 3 characters to train on, 1 held out (25.0%)", "b: skipped: c: is gone",
        *mixture_table([Part("a", 0.5, 4, 4), Part("b", 0.5, 3, 3)], 12).splitlines()]


@given(st.integers(0, 10**17))
def test_an_amount_is_near_what_it_says(size):
    number, unit = amount(size).split()
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    assert float(number) * units[unit] == pytest.approx(size, rel=5e-4)
    assert unit == "TB" or float(number) <= 1000
