"""Demonstrations of a task that nobody names: whoever has seen a few may tell what is to be done.

Brown et al. 2020, arXiv:2005.14165, "Language models are few-shot learners", put k demonstrations
and a question in the prompt, and no parameter changes. Training on rows of demonstrations, each of
a task of its own, teaches a model to learn so (Min et al. 2021, arXiv:2110.15943, MetaICL). A row:

    bad>xqr
    dad>rqr
    abb>qxx

All words have three letters from a to h. The task of a row is drawn anew: first its kind, and then
which one of that kind it is.

    upper   in upper case
    letter  one of its letters, three times: the first, the second or the third
    shift   each letter some places on in the alphabet, from z to a: 1 to 25
    map     an image for each of the 8 letters, one of 26, drawn each with equal chance

A demonstration names upper, and letter too, but for a letter that stands twice in its word. A shift
looks like a map, of which a demonstration shows the images of its own letters alone. So more of
them help; minilm/measure/ideal.py says what can be told from them at best.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from minilm.data.batches import IGNORED
from minilm.data.heldout import split_records
from minilm.data.instructions import filled
from minilm.data.tokenizers import Tokenizer

LETTERS, SIZE, ALPHABET = "abcdefgh", 3, "abcdefghijklmnopqrstuvwxyz"
SHOTS = 5  # demonstrations in front of a question, at most
Task = Callable[[str], str]
Pair = tuple[str, str]  # what is asked, and the answer


def translated(letters: str, images: str) -> Task:
    """Each letter's image."""
    table = str.maketrans(letters, images)
    return lambda word: word.translate(table)


def repeated(place: int) -> Task:
    """The letter in this place, as often as a word has letters."""
    return lambda word: SIZE * word[place]


NAMED: dict[str, tuple[Task, ...]] = {  # all tasks of each kind but map, which has 26^8
    "upper": (str.upper,),
    "letter": tuple(repeated(place) for place in range(SIZE)),
    "shift": tuple(translated(ALPHABET, ALPHABET[by:] + ALPHABET[:by])
                   for by in range(1, len(ALPHABET))),
}
KINDS = (*NAMED, "map")

# The words of demonstrations, and those of held-out questions.
SHOWN, ASKED = split_records(["".join(letters) for letters in product(LETTERS, repeat=SIZE)],
                             held_out=112, prompt=str)


def draw_task(rng: np.random.Generator, kinds: Collection[str] = KINDS) -> Task:
    """A task of one of these kinds. ValueError for none, and for one that is not in KINDS."""
    if unknown := sorted({*kinds} - {*KINDS}):
        raise ValueError(f"{unknown[0]!r} is none of the kinds {', '.join(KINDS)}")
    if not kinds:
        raise ValueError(f"no kind of task is named; there are {', '.join(KINDS)}")
    kind = [*kinds][rng.integers(len(kinds))]
    if kind == "map":
        return translated(LETTERS, "".join(rng.choice([*ALPHABET], len(LETTERS))))
    return NAMED[kind][rng.integers(len(NAMED[kind]))]


def draw_pairs(rng: np.random.Generator, task: Task, count: int) -> tuple[Pair, ...]:
    """So many demonstrations of a task, no two of the same word."""
    return tuple((SHOWN[i], task(SHOWN[i])) for i in rng.choice(len(SHOWN), count, replace=False))


@dataclass(frozen=True)
class Question:
    """A held-out word, and demonstrations of what is to be done with it."""

    kind: str
    task: Task
    shown: tuple[Pair, ...]
    asked: str

    @property
    def answer(self) -> str:
        return self.task(self.asked)

    def text(self, k: int) -> str:
        """The prompt with the first k demonstrations.

        >>> Question("upper", str.upper, (("abc", "ABC"), ("bad", "BAD")), "cab").text(1)
        'abc>ABC\\ncab>'
        """
        return "".join(f"{asked}>{answer}\n" for asked, answer in self.shown[:k]) + f"{self.asked}>"


def make_questions(kinds: Collection[str], count: int, seed: int, fixed: bool = False
                   ) -> list[Question]:
    """`count` questions of each kind, each with SHOTS demonstrations of its own task.

    fixed: all questions of a kind are about one task. No word is asked twice about it: ValueError
    for a count above the number of ASKED words. A kind's questions do not depend on the others.
    """
    if not 1 <= count <= len(ASKED):
        raise ValueError(f"count must lie between 1 and {len(ASKED)}, the words, got {count}")
    found = []
    for kind in dict.fromkeys(kinds):
        rng = np.random.default_rng([seed, *kind.encode()])
        one = draw_task(rng, [kind])
        for place in rng.permutation(len(ASKED))[:count]:
            task = one if fixed else draw_task(rng, [kind])
            found.append(Question(kind, task, draw_pairs(rng, task, SHOTS), ASKED[place]))
    return found


def prompt_of(question: Question, k: int, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens (T,) of a question after k demonstrations. No token spans a question's border."""
    return np.concatenate([tokens for tokens, _ in _parts(question.shown[:k], tokenizer)]
                          + [_asked(question.asked, k, tokenizer)])


def row(pairs: Sequence[Pair], tokenizer: Tokenizer, last: bool = False):
    """Tokens and targets, both (T,) int32, of questions and answers.

    The targets are the answers, each with the line's end; last: the last one alone.
    """
    parts = [*_parts(pairs, tokenizer)]
    tokens = np.concatenate([tokens for tokens, _ in parts])
    counts = np.concatenate([np.full(len(tokens), is_answer) for tokens, is_answer in parts])
    if last:
        counts[: -len(parts[-1][0])] = False
    return tokens[:-1], np.where(counts[1:], tokens[1:], IGNORED).astype(np.int32)


def rows_of_questions(questions: Sequence[Question], k: int, tokenizer: Tokenizer):
    """Tokens and targets (R, T) of questions after k demonstrations. Their own answers count."""
    return filled([row((*q.shown[:k], (q.asked, q.answer)), tokenizer, last=True)
                   for q in questions])


class ShotBatches:
    """Training batches of rows: batches[step] -> (tokens, targets), (B, T) int32, as in `row`.

    draw: rng -> the task of a row. A row has `shots` demonstrations, and a question whose answer
    follows. Every answer counts: it has fewer of them in front, or none. A batch depends on
    (seed, step) alone.
    """

    def __init__(self, draw: Callable[[np.random.Generator], Task], tokenizer: Tokenizer,
                 batch: int, seed: int, shots: int = SHOTS):
        if batch < 1 or not 0 <= shots < len(SHOWN):
            raise ValueError(f"batch must be at least 1, and shots from 0 to {len(SHOWN) - 1}, got "
                             f"{batch} and {shots}")
        self.draw, self.tokenizer, self.batch = draw, tokenizer, batch
        self.seed, self.shots = seed, shots

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        # The 4 keeps this stream apart from those of other batches.
        rng = np.random.default_rng([self.seed, step, 4])
        return filled([row(draw_pairs(rng, self.draw(rng), self.shots + 1), self.tokenizer)
                       for _ in range(self.batch)])


def _parts(pairs, tokenizer):
    """(tokens, is it an answer) of each question and each answer in turn."""
    for number, (asked, answer) in enumerate(pairs):
        yield _asked(asked, number, tokenizer), False
        yield tokenizer.encode(f"{answer}\n"), True


def _asked(word, number, tokenizer):
    """The tokens of a question, which may begin the text."""
    return (tokenizer.encode if number else tokenizer.prompt)(f"{word}>")
