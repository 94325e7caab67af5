"""The multiple-choice score: its questions, and its laws."""

import math

import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st

from minilm.data import ByteTokenizer
from minilm.measure.choices import Question, chosen_rightly, ending_losses, questions
from minilm.measure.losses import loss_of
from minilm.tensor import Tensor
from minilm.transformer import Config, Transformer

BYTES = ByteTokenizer()
DOCUMENTS = ("Peter Piper picked a peck of pickled peppers, and zum Frühstück süße Äpfel. " * 3,
             "ø" * 5 + " Where is the peck of pickled peppers that Peter Piper picked? 葉っぱ " * 4)
seeds = st.integers(0, 2**32 - 1)


def make(seed=0, **changes):
    config = Config.llama(258, 48, layers=2, heads=2, width=16, hidden=24)
    return Transformer(config, seed).astype("float64") if not changes else Transformer(
        Config.bert(258, 48, layers=1, heads=2, width=8, hidden=8))


class Successor:
    """Stands for a model that is sure of the next byte: the one after this one, or not that one."""

    config, room = make().config, 48

    def __init__(self, right=True):
        self.sure = 30.0 if right else -30.0

    def __call__(self, tokens):
        return Tensor(self.sure * np.eye(258)[(tokens + 1) % 256])


@given(seed=seeds, beginning=st.integers(1, 30), ending=st.integers(3, 20),
       endings=st.integers(2, 6))
def test_questions_are_of_the_text(seed, beginning, ending, endings):
    asked = questions(DOCUMENTS, 5, seed, beginning, ending, endings)
    assert asked == questions(DOCUMENTS, 5, seed, beginning, ending, endings)
    for text, options, right in asked:
        assert len(text.encode()) == beginning and len(options) == len({*options}) == endings
        assert {len(option.encode()) for option in options} == {ending}
        assert any(text + options[right] in document for document in DOCUMENTS)
        assert all(any(option in document for document in DOCUMENTS) for option in options)


def test_the_right_ending_is_anywhere_and_so_is_the_text():
    asked = questions(DOCUMENTS, 400, 3, 8, 8)
    counts = np.bincount([question.right for question in asked], minlength=4)
    assert (np.abs(counts - 100) < 6 * math.sqrt(400 * 3 / 16)).all()
    assert asked != questions(DOCUMENTS, 400, 4, 8, 8)
    short = questions(["abcdefgh", "0123456789"], 300, 0, 4, 4, 2)
    where = [question.beginning for question in short]
    assert {*where} == {"abcd", "0123", "1234", "2345"}  # the first and the last place, too
    assert all(abs(where.count(text) - 75) < 50 for text in {*where})


@given(seed=seeds, endings=st.integers(2, 5))
def test_equal_chances_share_the_point(seed, endings):
    """All bytes have the same chance: 25 % of four endings, whatever their order is."""
    model = make()
    model.head.weight.data[...] = 0
    asked = questions(DOCUMENTS, 7, seed, 6, 5, endings)
    assert chosen_rightly(model, BYTES, asked) == pytest.approx(100 / endings)
    losses = ending_losses(model, BYTES, asked)
    close(np.array(losses), np.full((7, endings), math.log(258)), "float64")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_model_that_knows_nothing_scores_25_percent(seed):
    """Random weights have no ties; four standard errors of 300 questions."""
    score = chosen_rightly(make(seed), BYTES, questions(DOCUMENTS, 300, seed, 8, 6))
    assert abs(score - 25) < 4 * 100 * math.sqrt(3 / 16 / 300)


@given(seed=seeds, data=st.data())
def test_the_order_of_endings_and_questions_does_not_matter(seed, data):
    model, asked = make(seed), questions(DOCUMENTS, 6, seed, 8, 6)
    turned = []
    for text, options, right in data.draw(st.permutations(asked)):
        order = data.draw(st.permutations(range(4)))
        turned.append(Question(text, tuple(options[i] for i in order), order.index(right)))
    assert chosen_rightly(model, BYTES, turned) == chosen_rightly(model, BYTES, asked)


def test_who_knows_what_comes_next_is_always_right():
    asked = questions(["".join(map(chr, range(33, 123)))], 40, 1, 8, 6)
    assert chosen_rightly(Successor(), BYTES, asked) == 100
    assert chosen_rightly(Successor(right=False), BYTES, asked) == 0


@given(seed=seeds)
def test_a_loss_is_that_of_the_ending_alone(seed):
    """Of endings that differ in length, too: the loss of all less that of the beginning."""
    model = make(seed)
    question = Question("pickled ", ("peppers", "a", "ä", "Peter Piper"), 0)
    (losses,) = ending_losses(model, BYTES, [question])
    for loss, ending in zip(losses, question.endings, strict=True):
        def nats(text):
            tokens = BYTES.encode(text)[None]
            return loss_of(model, tokens[:, :-1], tokens[:, 1:]) * (tokens.shape[1] - 1)
        whole, part = nats(question.beginning + ending), nats(question.beginning)
        close(np.array(loss * len(ending.encode())), np.array(whole - part), "float64")


def test_batches_of_any_size_give_the_same_losses(monkeypatch):
    asked = questions(DOCUMENTS, 3, 0, 20, 9)
    whole = ending_losses(make(), BYTES, asked)
    monkeypatch.setattr("minilm.measure.choices.ROWS", 5)
    close(np.array(ending_losses(make(), BYTES, asked)), np.array(whole), "float64")


@pytest.mark.parametrize("documents, given, said", [
    (["short"], {}, "no document has the 96 bytes"),
    (["a" * 200], {}, "no 4 different endings of 32 bytes"),
    (["é" * 200], {"beginning": 3, "ending": 3}, "no passage of 3 and 3 bytes has whole"),
    (DOCUMENTS, {"count": 0}, "count"), (DOCUMENTS, {"endings": 1}, "endings"),
    (DOCUMENTS, {"ending": 0}, "ending"), (DOCUMENTS, {"beginning": 0}, "beginning")])
def test_what_makes_no_question_is_refused(documents, given, said):
    with pytest.raises(ValueError, match=said):
        questions(documents, **{"count": 3} | given)


def test_what_cannot_be_asked_is_refused():
    asked = questions(DOCUMENTS, 2, 0, 40, 10)
    with pytest.raises(ValueError, match=r"a question has 50 tokens, .* room for 49"):
        ending_losses(make(), BYTES, asked)
    assert ending_losses(make(), BYTES, questions(DOCUMENTS, 2, 0, 40, 9))
    with pytest.raises(ValueError, match="no question"):
        ending_losses(make(), BYTES, [])
    with pytest.raises(ValueError, match="only a causal model goes on from a text"):
        ending_losses(make(bert=True), BYTES, asked)
