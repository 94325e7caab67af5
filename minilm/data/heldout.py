"""What is held out: the part of texts or records that a model is judged by, and never trained on.

The parts depend on what is in the texts, by its SHA-256, and not on the order in which it comes: a
file that is sorted by class gives all of its classes to both parts. What is equal stays together,
so nothing is on both sides.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from minilm.data.corpora import Corpus
from minilm.data.instructions import prompt

SPARE = 0.1  # of the smaller part: how far from its share it may be without cutting a document


def split(corpus: Corpus, validation: float = 0.1) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split the documents into (train, validation). `validation` is a share of the characters.

    Whole documents go to validation, in the order of their SHA-256, until it has its share. One
    that is too large for that is cut, and its end is validation. So the share is met to a tenth of
    the smaller part; or, if a small document comes very often, to a character of each copy.
    ValueError if a part would be empty.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation must lie between 0 and 1, got {validation}")
    copies, total = Counter(corpus.documents), corpus.characters
    wanted, spare = validation * total, SPARE * min(validation, 1 - validation) * total
    begins, held, rest = {}, 0, total  # where a document's held-out part begins
    for document in sorted(copies, key=_digest):
        size = len(document) * copies[document]
        fits = held + size <= wanted + spare
        if held >= wanted or (not fits and held >= wanted - spare):
            break
        rest -= size
        if not fits:
            border = int((total * (1 - validation) - rest) / copies[document])
            begins[document] = _cut(corpus, document, border, begins, rest)
            break
        begins[document] = 0
        held += size
    parts = [(text, begins.get(text, len(text))) for text in corpus.documents]
    return (
        tuple(text[:begin] for text, begin in parts if begin > 0),
        tuple(text[begin:] for text, begin in parts if begin < len(text)),
    )


def account(corpus: Corpus, train: Sequence[str], validation: Sequence[str]) -> str:
    """The characters on both sides of a split, and what was not read, for a program to print.

    >>> print(account(Corpus("x", ("ab", "c"), ("x/y.txt: is gone",)), ("ab",), ("c",)))
    x: 2 characters to train on, 1 held out (33.3%)
    x: skipped: x/y.txt: is gone
    """
    trained, held = sum(map(len, train)), sum(map(len, validation))
    share = held / (trained + held)
    said = f"{corpus.name}: {trained:,} characters to train on, {held:,} held out ({share:.1%})"
    return f"{said}\n{corpus.name}: skipped: {corpus.told()}" if corpus.skipped else said


def _cut(corpus, document, border, held, rest):
    """The place nearest to `border` that leaves text on both sides, and none of it on the other.

    held: the documents that are held out whole. rest: characters in those that are not.
    """
    trained = set(corpus.documents).difference(held, [document])
    first, last = 0 if rest else 1, len(document) - (0 if held else 1)
    for place in _outwards(min(max(border, first), last), first, last):
        head, tail = document[:place], document[place:]
        if head not in held and tail not in trained and head != tail:
            return place
    raise ValueError(
        f"corpus {corpus.name!r}: {len(document)} characters are too few to split: {document!r:.80}"
    )


def _outwards(middle: int, first: int, last: int) -> Iterator[int]:
    """All places from first to last, the nearest to the middle first."""
    for away in range(last - first + 1):
        for place in dict.fromkeys((middle - away, middle + away)):
            if first <= place <= last:
                yield place


def split_records(
    records: Sequence, held_out: int, train: int | None = None, prompt: Callable = prompt
) -> tuple[list, list]:
    """Split into (train, held out), each in the order in which they came.

    Records with the same prompt, a text, stay together. They are held out in the order of the
    prompt's SHA-256. If many share a prompt, somewhat fewer than `held_out` may be. `train` is how
    many to train on at most: the next ones in that order. ValueError if a part would be empty.
    """
    if train is not None and train < 1:
        raise ValueError(f"train must be at least 1, got {train}")
    if not 0 < held_out < len(records):
        raise ValueError(f"{held_out} of {len(records)} records cannot be held out")
    copies, left, chosen = Counter(map(prompt, records)), held_out, set()
    for text in sorted(copies, key=_digest):
        if copies[text] <= left:
            chosen.add(text)
            left -= copies[text]
    if not chosen:
        raise ValueError(f"every prompt comes more than {held_out} times: nothing can be held out")
    held = [record for record in records if prompt(record) in chosen]
    rest = [record for record in records if prompt(record) not in chosen]
    places = sorted(range(len(rest)), key=lambda place: _digest(prompt(rest[place])))
    return [rest[place] for place in sorted(places[:train])], held


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
