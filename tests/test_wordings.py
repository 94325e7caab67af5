"""Instructions in many wordings, and scripts/experiments/unseen_tasks.py."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import unseen_tasks as experiment
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.data.wordings import (
    KINDS,
    LEARNED,
    NEW_PHRASE,
    NEW_SENTENCE,
    SENTENCES,
    distinct_words,
    done,
    kind,
    meaning,
    pairs,
    worded,
)
from minilm.measure.verdict import FAILS, HOLDS

words = st.text("abcdefgh", min_size=1, max_size=5)
names = st.lists(st.sampled_from([*KINDS]), min_size=1, max_size=2)
wordings = st.sampled_from([LEARNED, NEW_SENTENCE, NEW_PHRASE])
seeds = st.integers(0, 999)


@given(names, words, wordings, seeds)
def test_an_instruction_means_one_thing(names, word, wording, seed):
    record = worded(names, word, np.random.default_rng(seed), wording)
    assert meaning(record.instruction) == tuple(names)
    assert (record.context, record.output) == (word, done(names, word))
    assert record.task == " and ".join(names)
    assert meaning(record.instruction + "x") is None and meaning(record.instruction[1:]) is None


def test_no_two_kinds_share_an_instruction():
    from minilm.data.wordings import _meanings
    phrases = sum(len(kind.phrases) for kind in KINDS.values())
    assert len(_meanings()) == len(SENTENCES) * (phrases + phrases**2)


@given(names, seeds)
def test_what_is_kept_for_questions_is_never_learned(names, seed):
    rng = np.random.default_rng(seed)
    new, known = (worded(names, "abc", rng, wording).instruction
                  for wording in (NEW_PHRASE, LEARNED))
    ask = worded(names, "abc", rng, NEW_SENTENCE).instruction
    kept = [KINDS[name].phrases[3] for name in names]
    assert " and ".join(kept) in new and not any(phrase in known + ask for phrase in kept)
    assert ask.startswith(("can you ", "now ")) and not (new + known).startswith(("can ", "now "))


@pytest.mark.parametrize("name, word, said", [
    ("reverse", "abca", "acba"), ("upper", "abc", "ABC"), ("sort", "cabc", "abcc"),
    ("double", "ab", "abab"), ("first", "bca", "b"), ("rotate", "abcd", "bcda"),
    ("last", "bca", "a"), ("swap", "abcd", "dbca"), ("swap", "a", "a"), ("next", "abh", "bci"),
    ("tail", "abc", "bc")])
def test_each_kind_does_what_it_says(name, word, said):
    assert done([name], word) == said


@given(names, names, words)
def test_kinds_follow_each_other(first, second, word):
    assert done(first + second, word) == done(second, done(first, word))


@given(st.lists(st.sampled_from("abcdefgh"), min_size=3, max_size=4, unique=True).map("".join))
def test_the_unseen_has_no_answer_in_common_with_a_kind(word):
    alone = {done([name], word) for name in experiment.TAUGHT}
    assert not alone & {done([experiment.HELD], word), done(experiment.UNSEEN, word)}


@given(st.lists(st.sampled_from([*KINDS]), unique=True, max_size=5))
def test_all_pairs_but_the_one_that_is_kept(names):
    found = pairs(names, ["upper", "reverse"])
    assert len({*found}) == len(found) and all(a != b for a, b in found)
    both = {"upper", "reverse"} <= {*names}
    assert len(found) == len(names) * (len(names) - 1) - 2 * both
    assert ("upper", "reverse") not in found and ("reverse", "upper") not in found


@given(st.integers(0, 60), st.integers(0, 60), seeds)
def test_words_are_distinct_and_more_begin_with_the_same(few, more, seed):
    drawn = data.Words("a", "e")
    found = distinct_words(few + more, drawn, seed)
    assert found[:few] == distinct_words(few, drawn, seed)
    assert len({*found}) == few + more
    assert all(len(word) in (3, 4) and {*word} <= {*"abcde"} for word in found)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"61 different words .* half of the 120 words of 1 to 4"):
        distinct_words(61, data.Words("a", "c", 1, 4), 0)
    with pytest.raises(ValueError, match="'sing' is none of the kinds reverse, upper"):
        kind("sing")
    with pytest.raises(ValueError, match="no kind is named"):
        worded([], "abc", np.random.default_rng(0))


# The experiment


@pytest.mark.parametrize("kinds", experiment.K)
def test_what_is_unseen_is_never_learned(kinds):
    s = experiment.Unseen(kinds=kinds, train=600, test=20, seed=3)
    train, asked = experiment.records(s)
    meant = {meaning(record.instruction) for record in train}
    alone = {names[0] for names in meant if len(names) == 1}
    assert alone == {*experiment.TAUGHT[:kinds]} and experiment.HELD not in sum(meant, ())
    assert not {("reverse", "upper"), ("upper", "reverse")} & meant
    assert (experiment.TOGETHER in meant) == (kinds > 1)
    learned = {record.context for record in train}
    said = {record.instruction for record in train}
    for measure, own in asked.items():
        assert len(own) == 20 and not learned & {record.context for record in own}
        assert all(len({*record.context}) == len(record.context) for record in own)
        if measure in (experiment.SENTENCE, experiment.PHRASE):
            assert not said & {record.instruction for record in own}
            assert {record.task for record in own} <= alone
    assert {r.task for r in asked[experiment.NEW]} == {"reverse and upper"}
    assert {r.task for r in asked[experiment.KIND]} == {experiment.HELD}
    assert experiment.records(s)[0] == train != experiment.records(replace(s, seed=4))[0]


def test_answers_are_counted_by_what_they_do(monkeypatch):
    """Of what a model gives that always writes words backwards."""
    monkeypatch.setattr(experiment, "learned", lambda model, *rest: (model, 0, 0.0))
    monkeypatch.setattr(experiment, "base", lambda folder: (None, data.ByteTokenizer()))
    monkeypatch.setattr(experiment, "loss_of_answers", lambda model, tokenizer, own: len(own))
    monkeypatch.setattr(experiment, "answers", lambda model, own, tokenizer: [
        record.context[::-1] for record in own])
    s = experiment.Unseen(kinds=1, train=10, test=8)
    found = experiment.measured(s, SimpleNamespace(), "k = 1")
    for measure in (experiment.OWN, experiment.SENTENCE, experiment.PHRASE, experiment.PART,
                    experiment.OTHER):
        assert found[measure] == 100, measure
    for measure in (experiment.COMPOSED, experiment.NEW, experiment.KIND):
        assert found[measure] == 0, measure
    assert found[experiment.LOSS_KIND] == 8


def test_a_claim_can_fail():
    def rows(cost, kind):
        return [{"arm": arm, "seed": seed, experiment.OWN: 90.0 + seed, experiment.PHRASE:
                 90.0 + seed - cost, experiment.KIND: kind} for arm in experiment.ARMS
                for seed in (0, 1, 2)]
    phrase = experiment.CLAIMS["k = 9: a new phrase for a learned kind costs at most 10 points"]
    does = experiment.CLAIMS["k = 9 does an unseen kind, in 5 % or more"]
    assert phrase(rows(9.0, 0.0)).verdict == HOLDS and phrase(rows(11.0, 0.0)).verdict == FAILS
    assert does(rows(0.0, 6.0)).verdict == HOLDS and does(rows(0.0, 0.0)).verdict == FAILS
