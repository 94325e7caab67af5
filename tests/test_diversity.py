"""What is different among answers: the laws of distinct-n."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.measure.diversity import distinct, distinct_ngrams

answers = st.lists(st.text("abc", max_size=5), min_size=1, max_size=8).filter(
    lambda said: any(len(text) > 1 for text in said))
both = pytest.mark.parametrize(
    "share", [distinct, distinct_ngrams, lambda a: distinct_ngrams(a, 1)],
    ids=["answers", "2-grams", "1-grams"])


@both
@given(said=answers, k=st.integers(1, 4))
def test_repeating_all_answers_halves_what_is_distinct(share, said, k):
    assert 0 < share(said) <= 1
    assert share(said * k) == pytest.approx(share(said) / k)


@both
@given(said=answers, seed=st.integers(0, 99))
def test_order_and_names_do_not_matter(share, said, seed):
    mixed = [said[i] for i in np.random.default_rng(seed).permutation(len(said))]
    assert share(mixed) == share(said)
    assert share([text.translate(str.maketrans("abc", "xya")) for text in said]) == share(said)
    assert share([tuple(map(ord, text)) for text in said]) == share(said)  # tokens


@given(answers)
def test_each_counts_what_it_says(said):
    assert distinct(said) == len({*said}) / len(said)
    pairs = [a + b for text in said for a, b in pairwise(text)]
    assert distinct_ngrams(said) == len({*pairs}) / len(pairs)


def test_the_pieces_of_one_answer_do_not_run_into_the_next():
    assert distinct_ngrams(["ab", "ab"]) == 0.5 and distinct_ngrams(["abcd"]) == 1
    assert distinct(["ab", "ab"]) == 0.5 and distinct("abcd") == 1


@pytest.mark.parametrize("call, said", [
    (lambda: distinct([]), "no answer"), (lambda: distinct_ngrams(["a", ""]), "no answer has 2"),
    (lambda: distinct_ngrams(["a"], 0), "n must be")])
def test_nothing_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
