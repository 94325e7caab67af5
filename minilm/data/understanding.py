"""Small tasks for a model that understands: pieces of documents, and which class they are of.

    corpus    a piece: which corpus is it from?
    words     a piece: is it as it was written, or are its longer words written backwards?
    next      two pieces: does the second go on where the first ends, or is it from elsewhere?
    similar   two pieces: how many fifths of the first does the second repeat? A grade, 0 to 5

They are to GLUE (Wang et al. 2018, arXiv:1804.07461) what TASKS is to instructions: SST-2 asks for
a fact about one text, CoLA whether it is right, QNLI and RTE what two have to do with each other,
and STS-B how similar they are. Pieces are cut anywhere, also inside of words.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minilm.data.tokenizers import Tokenizer


class Example(NamedTuple):
    """One text or two, and the number of their class, or their grade."""

    texts: tuple[str, ...]
    label: int | float


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
    """The names of a task's classes; of grades, what they are of.

    ValueError for an unknown task.
    """
    if task not in KINDS:
        raise ValueError(f"{task!r} is none of the tasks {', '.join(KINDS)}")
    return KINDS[task].classes or tuple(corpora)


def make_examples(task: str, corpora: Mapping[str, Sequence[str]], count: int, size: int,
                  seed: int) -> list[Example]:
    """`count` examples of `size` characters, as many of each class or grade, in random order.

    corpora: name -> documents. All of them are drawn from with equal chance. ValueError for an
    unknown task, for sizes below 8, for corpora without such a piece, and for fewer than two
    corpora if the task is to tell them apart.
    """
    classes = classes_of(task, corpora)
    if not KINDS[task].classes and len(classes) < 2:
        raise ValueError(f"task {task!r} needs at least two corpora, got {list(corpora)}")
    if size < 8:
        raise ValueError(f"size must be at least 8 characters, got {size}")
    pieces = [Pieces(documents, size) for documents in corpora.values()]
    rng = np.random.default_rng([seed, *task.encode()])
    labels = rng.permutation(np.arange(count) % (KINDS[task].grades or len(classes))).tolist()
    kind = float if KINDS[task].grades else int
    return [Example(KINDS[task].draw(pieces, label, rng), kind(label)) for label in labels]


def anywhere(pieces: list[Pieces], rng) -> str:
    """A piece of any of the corpora."""
    return pieces[rng.integers(len(pieces))].draw(rng)


def of_corpus(pieces, label, rng) -> tuple[str]:
    """A piece of the corpus of this number."""
    return (pieces[label].draw(rng),)


def of_words(pieces, label, rng) -> tuple[str]:
    """A piece as it is (0), or with its words of four or more letters backwards (1).

    Either one has such words that are not the same backwards.
    """
    for _ in range(1000):
        text = anywhere(pieces, rng)
        words = [m.span() for m in re.finditer("[A-Za-z]{4,}", text) if m[0] != m[0][::-1]]
        if words:
            break
    else:
        raise ValueError("of 1000 pieces none has a word of four letters")
    if label:
        for a, b in words:
            text = text[:a] + text[a:b][::-1] + text[b:]
    return (text,)


def of_next(pieces, label, rng) -> tuple[str, str]:
    """The two halves of a piece (1), or the first one and the second of another piece (0)."""
    text = anywhere(pieces, rng)
    half = len(text) // 2
    other = text if label else anywhere(pieces, rng)
    return text[:half], other[half:]


def of_similar(pieces, grade, rng) -> tuple[str, str]:
    """The first half of a piece, and the same with all but `grade` of its fifths from elsewhere."""
    half = pieces[0].size // 2
    text, other = anywhere(pieces, rng)[:half], anywhere(pieces, rng)[:half]
    kept = rng.permutation(np.arange(FIFTHS) < grade)[np.arange(half) * FIFTHS // half]
    return text, "".join(a if keep else b for a, b, keep in zip(text, other, kept))


FIFTHS = 5


class Kind(NamedTuple):
    """A task: its classes, none for the corpora's names; what draws one; how many grades it has."""

    classes: tuple[str, ...]
    draw: Callable
    grades: int = 0


KINDS = {
    "corpus": Kind((), of_corpus),
    "words": Kind(("as written", "backwards"), of_words),
    "next": Kind(("elsewhere", "goes on"), of_next),
    "similar": Kind(("similarity",), of_similar, FIFTHS + 1),
}


def rows_of_examples(examples: Sequence[Example], tokenizer: Tokenizer,
                     context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, labels, mask) of examples: (N, T), (N,) and (N, T), int32; float32 for grades.

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
    kind = np.float32 if isinstance(examples[0].label, float) else np.int32
    return tokens, np.array([e.label for e in examples], kind), mask.astype(np.int32)


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
