"""A multiple-choice score in HellaSwag's way: which of four endings goes on from a text?

Zellers et al. 2019, arXiv:1905.07830, have endings in words. Here they are passages of the corpus
itself: one is the true continuation, and the others are those of other questions' beginnings. As
usual for such questions, no answer is written. The model chooses the ending that has the least loss
a byte, given the beginning. All endings have the same number of bytes, so no length is favoured.

>>> text = "one two three four five six seven eight nine ten eleven twelve"
>>> question = questions([text], 1, beginning=8, ending=6)[0]
>>> question.beginning + question.endings[question.right] in text
True
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from minilm import ops
from minilm.arrays import wide
from minilm.graph import no_dropout
from minilm.ranges import check, whole
from minilm.tensor import no_grad

ROWS = 64  # of a batch


class Question(NamedTuple):
    """A text, and the endings among which the one at `right` is its own."""

    beginning: str
    endings: tuple[str, ...]
    right: int


def questions(documents: Iterable[str], count: int, seed: int = 0, beginning: int = 64,
              ending: int = 32, endings: int = 4) -> list[Question]:
    """Questions from anywhere in the documents, beginnings and endings of so many bytes.

    A passage lies in one document, and each of its places has the same chance. A question's other
    endings are drawn from further passages, none of which is like the true one or like another.
    ValueError if the documents are too short for that.
    """
    check({"count": whole(1), "beginning": whole(1), "ending": whole(1), "endings": whole(2)},
          count=count, beginning=beginning, ending=ending, endings=endings)
    rng, size = np.random.default_rng(seed), beginning + ending
    texts = [text for document in documents if len(text := document.encode()) >= size]
    if not texts:
        raise ValueError(f"no document has the {size} bytes of a question")
    ends = np.cumsum([len(text) - size + 1 for text in texts])  # of each text's places

    def passage() -> tuple[str, str]:
        for _ in range(1000):  # most borders lie between characters
            place = int(rng.integers(ends[-1]))
            i = int(np.searchsorted(ends, place, side="right"))
            at = place - int(ends[i]) + len(texts[i]) - size + 1
            try:
                return (texts[i][at : at + beginning].decode(),
                        texts[i][at + beginning : at + size].decode())
            except UnicodeDecodeError:
                continue
        raise ValueError(f"no passage of {beginning} and {ending} bytes has whole characters")

    def question() -> Question:
        text, true = passage()
        found = {true: None}  # a set that keeps its order
        for _ in range(1000 * endings):
            if len(found) == endings:
                order = rng.permutation(endings)
                return Question(text, tuple(np.array([*found])[order].tolist()),
                                int(np.argmin(order)))
            found[passage()[1]] = None
        raise ValueError(f"the documents have no {endings} different endings of {ending} bytes")

    return [question() for _ in range(count)]


def ending_losses(model, tokenizer, asked: Iterable[Question]) -> list[list[float]]:
    """The loss of each ending of each question, in nats a byte, given the beginning.

    ValueError if there is no question, for a model that does not write, and if a beginning and an
    ending have more tokens than the model has room for.
    """
    asked = list(asked)
    if not asked:
        raise ValueError("there is no question to ask")
    model.config.require_writer("the model", "goes on from a text")
    rows = [(tokenizer.encode(question.beginning), tokenizer.encode(end))
            for question in asked for end in question.endings]
    longest = max(len(a) + len(b) for a, b in rows)
    if longest > model.room + 1:  # the last token is only a target
        raise ValueError(f"a question has {longest} tokens, but the model has room for "
                         f"{model.room + 1}")
    nats = iter([float(x) for i in range(0, len(rows), ROWS)
                 for x in row_losses(model, rows[i : i + ROWS])])
    return [[next(nats) / len(end.encode()) for end in question.endings] for question in asked]


def row_losses(model, rows) -> np.ndarray:
    """Nats of each row's second text, after its first one, both as token ids: (B,)."""
    width = max(len(a) + len(b) for a, b in rows) - 1
    tokens, targets = np.zeros((2, len(rows), width), np.int32)
    counted = np.zeros((len(rows), width), bool)
    for i, (a, b) in enumerate(rows):
        end = len(a) + len(b) - 1
        tokens[i, :end], targets[i, :end] = (text := np.concatenate([a, b]))[:-1], text[1:]
        counted[i, len(a) - 1 : end] = True
    with no_grad(), no_dropout():
        log_p = ops.log_softmax(wide(model(tokens).data)).data  # (B, T, V)
    of_target = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return -np.where(counted, of_target, 0).sum(1, dtype=np.float64)


def chosen_rightly(model, tokenizer, asked: Iterable[Question]) -> float:
    """Per cent of the questions whose true ending has the least loss a byte.

    If several endings have the least loss, they share the point: a model for which all bytes have
    the same chance gets 25 % of four endings, in any order.
    """
    asked = list(asked)
    points = [(losses[question.right] == min(losses)) / losses.count(min(losses))
              for question, losses in zip(asked, ending_losses(model, tokenizer, asked))]
    return 100 * float(np.mean(points))
