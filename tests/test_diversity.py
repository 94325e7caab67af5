"""What is different among answers: the laws of distinct-n."""

from itertools import pairwise
from types import SimpleNamespace

import diversity as experiment
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.data import ByteTokenizer, Record
from minilm.measure.answers import answers as answers_of
from minilm.measure.diversity import distinct, distinct_ngrams
from minilm.transformer import Config, Transformer

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


# The experiment


def test_what_is_asked_is_not_learned_and_every_answer_is_right():
    train, asked = experiment.questions(experiment.Open(seed=3))
    assert (len(train), len(asked)) == (48 * 10, 16)
    assert len({record.context for record in train + asked}) == 64
    assert all(experiment.is_right(record, record.output) for record in train + asked)
    assert len({record.output for record in train}) > 300
    again = experiment.questions(experiment.Open(seed=4))
    assert again[1] != asked and experiment.questions(experiment.Open(seed=3))[0] == train
    record = Record("Word", "a c", "abbbc")
    for wrong in ("abbc", "abbbbc", "bbbbc", "abbba", "abzbc", "Abbbc", ""):
        assert not experiment.is_right(record, wrong)


def test_answers_are_counted_for_each_question(monkeypatch):
    asked = [Record("Word", "a c", "abbbc"), Record("Word", "b b", "babab")]
    said = [["abbbc"] * 16 + ["acccc"] * 8 + ["wrong"] * 8, ["b"] * 31 + [""]]
    seen = []
    monkeypatch.setattr(experiment, "answers", lambda model, records, tokenizer, *rest: (
        seen.append((records, rest)), [*said[0], *said[1]])[1])
    found = experiment.drawn(None, None, asked, 7)
    assert seen == [([asked[0]] * 32 + [asked[1]] * 32, (1.0, 7))]
    assert found[experiment.RIGHT] == 50 * 24 / 32 and found[experiment.USEFUL] == (2 + 0) / 2
    assert found[experiment.SEVERAL] == 50 * (3 / 32 + 2 / 32)
    pairs = {*"ab bb bc ac cc wr ro on ng".split()}
    assert found[experiment.GRAMS] == pytest.approx(50 * len(pairs) / (32 * 4))


def test_samples_differ_and_repeat_with_the_seed():
    model, tokenizer = Transformer(Config.gpt2(258, 32, 1, 2, 8), seed=0), ByteTokenizer()
    records = [Record("Say", "a", "12345")] * 20 + [Record("Say", "bc", "12345")] * 20

    def draw(temperature, seed):
        return answers_of(model, records, tokenizer, temperature, seed)

    assert len({*draw(1.0, 0)[:20]}) > 15 and draw(1.0, 0) == draw(1.0, 0) != draw(1.0, 1)
    wild = draw(1e9, 0)  # the prompt decides nothing, and each batch draws anew
    assert wild[:20] != wild[20:]
    assert draw(0.0, 0) == draw(0.0, 1) == answers_of(model, records, tokenizer)


def test_equal_learning_is_where_an_arm_is_first_right_often_enough(tmp_path, monkeypatch):
    """The curve of a run that goes on is whole."""
    right, states = iter([10, 20, 50, 90, 99]), []

    def learned(model, tokenizer, records, s, run, title, watch):
        for step in states:
            watch(SimpleNamespace(trainer=None, model=model), SimpleNamespace(step=step, targets=1))
        return model, 0, 0.0

    monkeypatch.setattr(experiment, "learned", learned)
    monkeypatch.setattr(experiment, "drawn", lambda *_: (x := next(right)) and {
        experiment.RIGHT: x, experiment.SEVERAL: 100 - x, experiment.GRAMS: x / 2})
    monkeypatch.setattr(experiment, "loss_of_answers", lambda *_: 1.0)
    s, run = experiment.Open(steps=80), SimpleNamespace(path=tmp_path)
    states[:] = [4]
    experiment.measured(s, run, "")  # 10, and 20 at its end
    states[:] = [8, 12]
    row = experiment.measured(s, run, "")  # 50, 90, and 99 at its end
    assert [n for n, *_ in row[experiment.CURVE]] == [4, 8, 12]
    at = experiment.AT
    assert row[f"{at}: step"] == 9 and row[f"{at}: {experiment.SEVERAL}"] == 40
    assert experiment.at_equal([[1, 70, 3, 4], [2, 80, 0, 0]]) == [1, 70, 3, 4]
    assert experiment.at_equal([[1, 10, 3, 4], [2, 20, 0, 0]]) == [2, 20, 0, 0]
    assert row[experiment.RIGHT] == 99
