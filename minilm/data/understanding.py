"""Small tasks for a model that understands: pieces of documents, and which class they are of.

    corpus    a piece: which corpus is it from?
    words     a piece: is it as it was written, or are some of its words written backwards?
    next      two pieces: does the second go on where the first ends, or is it from elsewhere?

They are to GLUE (Wang et al. 2018, arXiv:1804.07461) what TASKS is to instructions: SST-2 asks for
a fact about one text, CoLA whether it is right, and QNLI and RTE what two have to do with each
other. Pieces are cut anywhere, also inside of words.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minilm.data.tokenizers import Tokenizer


class Example(NamedTuple):
    """One text or two, and the number of their class."""

    texts: tuple[str, ...]
    label: int


class Pieces:
    """Pieces of `size` characters of documents, each place with equal chance.

    ValueError if no document is as long.
    """

    def __init__(self, documents: Iterable[str], size: int):
        self.documents = [text for text in documents if len(text) >= size]
        if not self.documents:
            raise ValueError(f"no document has {size} characters")
        self.size = size
        self.ends = np.cumsum([len(text) - size + 1 for text in self.documents])

    def draw(self, rng: np.random.Generator) -> str:
        """A piece."""
        place = int(rng.integers(self.ends[-1]))
        which = int(np.searchsorted(self.ends, place, side="right"))
        start = place - int(self.ends[which - 1]) * (which > 0)
        return self.documents[which][start : start + self.size]


def classes_of(task: str, corpora: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The names of a task's classes. ValueError for an unknown task."""
    if task not in KINDS:
        raise ValueError(f"{task!r} is none of the tasks {', '.join(KINDS)}")
    return KINDS[task][0] or tuple(corpora)


def make_examples(task: str, corpora: Mapping[str, Sequence[str]], count: int, size: int,
                  seed: int) -> list[Example]:
    """`count` examples with `size` characters each, as many of each class, in random order.

    corpora: name -> documents. All of them are drawn from with equal chance. ValueError for an
    unknown task, for sizes below 8, for corpora without such a piece, and for fewer than two
    corpora if the task is to tell them apart.
    """
    classes = classes_of(task, corpora)
    if len(classes) < 2:
        raise ValueError(f"task {task!r} needs at least two corpora, got {list(corpora)}")
    if size < 8:
        raise ValueError(f"size must be at least 8 characters, got {size}")
    pieces = [Pieces(documents, size) for documents in corpora.values()]
    rng = np.random.default_rng([seed, *task.encode()])
    labels = rng.permutation(np.arange(count) % len(classes))
    return [Example(KINDS[task][1](pieces, int(label), rng), int(label)) for label in labels]


def anywhere(pieces: list[Pieces], rng) -> str:
    """A piece of any of the corpora."""
    return pieces[rng.integers(len(pieces))].draw(rng)


def of_corpus(pieces, label, rng) -> tuple[str]:
    """A piece of the corpus of this number."""
    return (pieces[label].draw(rng),)


def of_words(pieces, label, rng) -> tuple[str]:
    """A piece as it is (0), or with about half of its words backwards (1).

    Either one has words of four or more letters that are not the same backwards.
    """
    for _ in range(1000):
        text = anywhere(pieces, rng)
        words = [m.span() for m in re.finditer("[A-Za-z]{4,}", text) if m[0] != m[0][::-1]]
        if words:
            break
    else:
        raise ValueError("of 1000 pieces none has a word of four letters")
    if label:
        turned = rng.random(len(words)) < 0.5
        turned[rng.integers(len(words))] = True
        for a, b in (span for span, turn in zip(words, turned) if turn):
            text = text[:a] + text[a:b][::-1] + text[b:]
    return (text,)


def of_next(pieces, label, rng) -> tuple[str, str]:
    """The two halves of a piece (1), or the first one and the second of another piece (0)."""
    text = anywhere(pieces, rng)
    half = len(text) // 2
    other = text if label else anywhere(pieces, rng)
    return text[:half], other[half:]


KINDS: dict[str, tuple[tuple[str, ...], Callable]] = {  # task -> (its classes, what draws one)
    "corpus": ((), of_corpus),  # the corpora's names
    "words": (("as written", "backwards"), of_words),
    "next": (("elsewhere", "goes on"), of_next),
}


def rows_of_examples(examples: Sequence[Example], tokenizer: Tokenizer,
                     context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, labels, mask) of examples: (N, T), (N,) and (N, T), int32.

    A row is the tokenizer's end, and each text with the end after it. So the first token, which a
    pooler takes, is always the same, and it is none of the text's. What does not fit is cut off.
    """
    rows = []
    for texts, _ in examples:
        room = (context - 1) // len(texts) - 1
        row = [tokenizer.end]
        for text in texts:
            row += [*tokenizer.encode(text)[:room], tokenizer.end]
        rows.append(row)
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.full(mask.shape, tokenizer.end, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, np.array([e.label for e in examples], np.int32), mask.astype(np.int32)


class EpochBatches:
    """Batches of the rows of some arrays: batches[step] -> a tuple like them, with B rows.

    The rows are drawn in epochs: all once in random order, then all again in another order. A batch
    depends on (seed, step) alone. Iterating never ends.
    """

    def __init__(self, arrays: Sequence[np.ndarray], batch: int, seed: int):
        if batch < 1 or len({len(a) for a in arrays}) != 1 or not len(arrays[0]):
            raise ValueError("batches need at least one row of each array, as many of each, and a "
                             f"batch of at least 1; got {[len(a) for a in arrays]} and {batch}")
        self.arrays, self.batch, self.seed = arrays, batch, seed

    def __getitem__(self, step: int) -> tuple[np.ndarray, ...]:
        size = len(self.arrays[0])
        epochs, places = np.divmod(step * self.batch + np.arange(self.batch), size)
        orders = {e: np.random.default_rng([self.seed, e, 4]).permutation(size)
                  for e in {*epochs.tolist()}}  # the 4 keeps this stream apart from others'
        drawn = [orders[int(e)][place] for e, place in zip(epochs, places)]
        return tuple(a[drawn] for a in self.arrays)
