"""Checks byte-pair encoding: its merges against the library's, its laws, and what tokens.py prints.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokens import main

from minilm.data import BPETokenizer, load_corpus
from minilm.data.bpe import BYTES, LearnedTokens, Merge, learn

PLAIN = st.text("ab é\n'st1_.😀", max_size=60)  # few letters, so that pairs come again
MANUAL = load_corpus("python-reference").documents[:12]
MERGES = learn(MANUAL, 700)


def of_library(documents, vocab_size: int):
    """(the pairs that the library merges, its tokenizer)."""
    tokenizer = BPETokenizer.train(documents, vocab_size + 2)  # an end and a mask
    byte_of = {character: bytes([byte]) for character, byte in zip(
        sorted(token for token in tokenizer.tokenizer.get_vocab() if len(token) == 1),
        (b[0] for b in BYTES))}
    return [tuple(b"".join(byte_of[c] for c in side) for side in pair)
            for pair in tokenizer.fields()["model"]["merges"]], tokenizer


@given(st.lists(PLAIN, max_size=4), st.integers(256, 290))
def test_merges_are_those_of_the_library(documents, vocab_size):
    pytest.importorskip("tokenizers")
    pairs, tokenizer = of_library(documents, vocab_size)
    merges = learn(documents, vocab_size)
    assert [merge.pair for merge in merges] == pairs
    for text in documents:
        assert LearnedTokens(merges).encode(text).tolist() == tokenizer.encode(text).tolist()


def test_merges_of_a_manual_are_those_of_the_library():
    pytest.importorskip("tokenizers")
    pairs, tokenizer = of_library(MANUAL, 700)
    assert [merge.pair for merge in MERGES] == pairs
    np.testing.assert_array_equal(LearnedTokens(MERGES).encode(MANUAL[3]),
                                  tokenizer.encode(MANUAL[3]))


def test_the_most_frequent_pair_is_first_and_the_count_is_its():
    """In ab ab abc the pair a b stands 3 times; then ab c once, and so does the space's."""
    assert learn(["ab", "ab", "abc"], 258) == [Merge((b"a", b"b"), 3), Merge((b"ab", b"c"), 1)]
    assert learn(["aaa"], 300) == [Merge((b"a", b"a"), 2), Merge((b"aa", b"a"), 1)]


def test_equally_frequent_pairs_are_merged_in_the_order_of_their_tokens():
    """c d and a b stand once each; a is older. A space is younger than all that can be seen."""
    assert [merge.pair for merge in learn(["cd", "ab"], 258)] == [(b"a", b"b"), (b"c", b"d")]
    assert [merge.pair for merge in learn([" c", "zc"], 258)] == [(b"z", b"c"), (b" ", b"c")]


@given(st.text(max_size=80), st.integers(0, len(MERGES)))
def test_tokens_are_the_texts_bytes_and_decode_to_it(text, count):
    tokenizer = LearnedTokens(MERGES[:count])
    assert b"".join(tokenizer.tokens(text)) == text.encode()
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.end]) == text


@given(st.sampled_from(MANUAL), st.integers(0, 900), st.lists(st.integers(0, len(MERGES))))
def test_more_merges_never_make_more_tokens(document, start, counts):
    text = document[start : start + 200]
    sizes = [len(LearnedTokens(MERGES[:count]).tokens(text)) for count in sorted(counts)]
    assert all(more >= fewer for more, fewer in itertools.pairwise(sizes))


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="at least the 256 bytes, got 255"):
        learn(["a"], 255)


def test_tokens_prints_merges_lengths_rows_and_epochs(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("ab ab ab abc\n" * 30)
    (tmp_path / "b.txt").write_text("xy " * 100)
    main((str(tmp_path / "a.txt"), str(tmp_path / "b.txt")), vocab_size=260, text="ab abc",
         weights=(3, 1), batch=2, context=8, steps=10)
    said = capsys.readouterr().out
    assert "   1        108  'a' + 'b' -> 'ab'" in said
    assert "'ab abc': 6 bytes" in said
    assert "<|endoftext|>" in said
    assert "75.0%" in said
    assert "25.0%" in said
    assert "a run on 160 tokens" in said


@pytest.mark.parametrize("options, error", [
    ({"corpus": ()}, "corpus must name a text"),
    ({"steps": -1}, "steps must not be negative, got -1"),
    ({"weights": (1, 2)}, "expected 1 weights, one a stream"),
    ({"vocab_size": 7}, "at least the 256 bytes, got 7"),
])
def test_tokens_refuses(tmp_path, options, error):
    (tmp_path / "a.txt").write_text("ab ab ab abc\n" * 30)
    with pytest.raises(ValueError, match=error):
        main(**{"corpus": (str(tmp_path / "a.txt"),)} | options)
