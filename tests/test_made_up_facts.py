"""Checks data/facts.py: facts, their texts, questions and answers. BM25 tells the texts apart."""

import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.data.facts import (
    FIRST,
    LAST,
    QUESTIONS,
    TEXTS,
    WORDINGS,
    Fact,
    as_json,
    asked,
    is_json,
    make_facts,
    plain,
    says,
)
from minilm.data.retrieval import BM25, words

WORD = st.text("abcdefgh", min_size=1, max_size=9)
ABOUT = st.sampled_from([*QUESTIONS])
SEED = st.integers(0, 2**32 - 1)


@given(train=st.integers(0, 60), test=st.integers(0, 60), seed=SEED)
def test_no_two_people_share_a_name_but_many_share_a_word(train, test, seed):
    known, new = make_facts(train, test, seed)
    assert (len(known), len(new)) == (train, test)
    names = [fact.name for fact in known + new]
    assert len(set(names)) == train + test
    first, last = (len({name.split()[i] for name in names}) for i in (0, 1))
    assert first <= FIRST and last <= LAST
    if train + test > FIRST:
        assert first < train + test


@given(train=st.integers(1, 30), test=st.integers(1, 30), seed=SEED)
def test_the_split_moves_no_fact(train, test, seed):
    """The people are the same ones, wherever they are cut in two."""
    everybody = [*chain(*make_facts(train, test, seed))]
    assert make_facts(0, train + test, seed) == ([], everybody)
    assert make_facts(train, test, seed + 1)[0] != everybody[:train]


def test_there_are_no_more_people_than_names():
    known, new = make_facts(FIRST * LAST - 1, 1, 0)
    assert len({fact.name for fact in known + new}) == FIRST * LAST
    for train, test in ((FIRST * LAST, 1), (-1, 5), (5, -1)):
        with pytest.raises(ValueError, match="names for 10000 people, but train is"):
            make_facts(train, test, 0)


@given(seed=SEED, wording=st.integers(0, len(TEXTS) - 1))
def test_a_text_states_the_whole_fact_and_fits_with_a_question(seed, wording):
    (fact,), _ = make_facts(1, 0, seed)
    text = fact.text(wording)
    assert {*words(text)} >= {*words(" ".join(vars(fact).values()))} and len(text) <= 63
    for about in QUESTIONS:
        for i in range(WORDINGS):
            record = asked(fact, about, i, text, as_json)
            assert record.context == text and record.task == about
            assert len(data.prompt(record)) + len(record.output) + 1 <= 128
            assert getattr(fact, about) not in record.instruction
            assert fact.name in record.instruction
            assert asked(fact, about, i).output == getattr(fact, about)


def test_wordings_differ():
    fact = Fact("Mano Toki", "baker", "Kiran", "Lenos")
    assert len({fact.text(i) for i in range(len(TEXTS))}) == len(TEXTS)
    questions = [asked(fact, about, i).instruction for about in QUESTIONS for i in range(WORDINGS)]
    assert len({*questions}) == len(QUESTIONS) * WORDINGS
    assert [len(said) for said in QUESTIONS.values()] == [WORDINGS] * len(QUESTIONS)


@given(about=ABOUT, value=WORD, other=WORD)
def test_an_answer_says_its_value_in_either_form(about, value, other):
    for form in (plain, as_json):
        assert says(value, form(about, value)) and says(value, form(about, value.capitalize()))
        assert says(other, form(about, value)) == (other == value)
    assert not says(value, f"{value} {value}x") and not says(value, "")


@given(about=ABOUT, value=WORD)
def test_the_form_does_not_ask_for_the_value(about, value):
    assert is_json(about, as_json(about, value)) and not is_json(about, plain(about, value))
    for other in [*QUESTIONS]:
        assert is_json(other, as_json(about, value)) == (other == about)
    wrong = [as_json(about, value)[:-1], as_json(about, value) + ".", f'["{value}"]', "1", "{}", "",
             json.dumps({about: 1931}), json.dumps({about: value, "more": value})]
    assert not any(is_json(about, answer) for answer in wrong)


@given(st.text(), ABOUT)
def test_any_answer_can_be_judged(answer, about):
    assert is_json(about, answer) in (True, False) and says("Kiran", answer) in (True, False)


@given(seed=st.integers(0, 999), about=ABOUT, wording=st.integers(0, WORDINGS - 1))
def test_bm25_finds_the_one_text_that_has_both_words_of_a_name(seed, about, wording):
    people, _ = make_facts(100, 0, seed)
    rng = np.random.default_rng(seed)
    index = BM25([fact.text(rng.integers(len(TEXTS))) for fact in people])
    fact = people[seed % 100]
    assert index.best(asked(fact, about, wording).instruction) == [seed % 100]
