"""Checks BM25 against the library rank-bm25, and by its laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.data.retrieval import BM25, words

TEXT = st.lists(st.sampled_from("cat dog sat mat the on".split()), min_size=1, max_size=8)
TEXTS = st.lists(TEXT.map(" ".join), min_size=1, max_size=6)


@pytest.mark.peers
@given(TEXTS, TEXT.map(" ".join))
def test_scores_are_those_of_rank_bm25(texts, question):
    theirs = pytest.importorskip("rank_bm25").BM25Okapi([words(text) for text in texts])
    np.testing.assert_allclose(BM25(texts).scores(question), theirs.get_scores(words(question)),
                               rtol=1e-12, atol=1e-12)


@given(TEXTS, TEXT.map(" ".join))
def test_words_that_no_text_has_change_nothing(texts, question):
    index = BM25(texts)
    np.testing.assert_array_equal(index.scores(question), index.scores(f"{question} zebra"))


@given(TEXTS, TEXT.map(" ".join), st.integers(0, 9))
def test_the_best_have_the_highest_scores(texts, question, k):
    index = BM25(texts)
    best, scores = index.best(question, k), index.scores(question)
    assert len(best) == min(k, len(texts))
    assert all(scores[i] >= scores[j] for i in best for j in {*range(len(texts))} - {*best})


def test_a_rare_word_counts_more_and_a_long_text_less():
    index = BM25(["the cat sat", "the dog sat", "the dog sat on a long mat", "the end", "no end"])
    assert index.best("the cat") == [0]
    assert index.best("dog", 2) == [1, 2]


def test_by_hand():
    """f = 1, n = 1, N = 3, all texts of one length: idf = ln(2.5 / 1.5)."""
    found = BM25(["a b", "c d", "e f"]).scores("a")
    np.testing.assert_allclose(found, [np.log(2.5 / 1.5), 0, 0])


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="no text to look for"):
        BM25([])
