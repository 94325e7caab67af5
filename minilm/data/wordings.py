"""Instructions in many wordings: kinds of tasks on a word, alone or one after the other.

A wording is a phrase that names what is to be done, in a sentence around it. The last phrase of a
kind and the last two sentences are kept for questions; the others are to be learned:

    reverse      "reverse", "turn around", "write backwards"; kept: "mirror"
    sentences    "{}", "please {}", "{} this", "task: {}"; kept: "can you {}?", "now {} it"

So a model can be asked for what it has learned in a sentence that is new to it, or by a phrase that
is new. A composition is several kinds in a row: "reverse and upper".
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import numpy as np

from minilm.data.instructions import Record
from minilm.data.tasks import Words

SENTENCES = ("{}", "please {}", "{} this", "task: {}", "can you {}?", "now {} it")


class Kind(NamedTuple):
    """What is done to a word, and the phrases that name it."""

    change: Callable[[str], str]
    phrases: tuple[str, ...]


KINDS = {
    "reverse": Kind(lambda w: w[::-1], ("reverse", "turn around", "write backwards", "mirror")),
    "upper": Kind(str.upper, ("upper", "write in capitals", "make large", "capitalize")),
    "sort": Kind(lambda w: "".join(sorted(w)),
                 ("sort", "put in order", "go by the alphabet", "arrange")),
    "double": Kind(lambda w: w + w, ("double", "repeat", "write twice", "say again")),
    "first": Kind(lambda w: w[0],
                  ("take the first letter", "keep the first", "give the start", "pick the first")),
    "rotate": Kind(lambda w: w[1:] + w[0],
                   ("rotate", "shift left", "move the first to the end", "put the first last")),
    "last": Kind(lambda w: w[-1],
                 ("take the last letter", "keep the last", "give the end", "pick the last")),
    "swap": Kind(lambda w: w[-1] + w[1:-1] + w[0] if len(w) > 1 else w,
                 ("swap the ends", "exchange first with last", "switch", "trade the ends")),
    "next": Kind(lambda w: "".join(chr(ord(c) + 1) for c in w),
                 ("next letters", "count up", "advance each letter", "go one letter on")),
    "tail": Kind(lambda w: w[1:] or w,
                 ("drop the first letter", "cut the first", "remove the start", "lose the first")),
}


class Wording(NamedTuple):
    """Which sentences and phrases may be drawn."""

    sentences: slice
    phrases: slice


LEARNED = Wording(slice(4), slice(3))
NEW_SENTENCE, NEW_PHRASE = Wording(slice(4, None), slice(3)), Wording(slice(4), slice(3, None))


def done(names: Iterable[str], word: str) -> str:
    """The word, of a letter or more, after each of the kinds in their order.

    ValueError for a kind that is unknown.

    >>> done(["reverse", "upper"], "abc")
    'CBA'
    """
    for name in names:
        word = kind(name).change(word)
    return word


def kind(name: str) -> Kind:
    """The kind of this name. ValueError if there is none."""
    if name not in KINDS:
        raise ValueError(f"{name!r} is none of the kinds {', '.join(KINDS)}")
    return KINDS[name]


def worded(names: Iterable[str], word: str, rng: np.random.Generator,
           wording: Wording = LEARNED) -> Record:
    """A record that asks for these kinds, one after the other, in a wording that is drawn.

    Its task is their names. ValueError for a kind that is unknown, and for none.

    >>> record = worded(["reverse", "upper"], "abc", np.random.default_rng(0))
    >>> record.instruction, record.output, record.task
    ('task: turn around and write in capitals', 'CBA', 'reverse and upper')
    """
    if not (names := tuple(names)):
        raise ValueError(f"no kind is named; there are {', '.join(KINDS)}")
    sentence = pick(SENTENCES[wording.sentences], rng)
    phrases = [pick(kind(name).phrases[wording.phrases], rng) for name in names]
    return Record(sentence.format(" and ".join(phrases)), word, done(names, word),
                  task=" and ".join(names))


def meaning(instruction: str) -> tuple[str, ...] | None:
    """The kinds that an instruction asks for, up to two; None for one that `worded` never gives.

    >>> meaning("please sort and mirror"), meaning("please sleep")
    (('sort', 'reverse'), None)
    """
    return _meanings().get(instruction)


@cache
def _meanings() -> dict[str, tuple[str, ...]]:
    named = [((name,), phrase) for name, kind in KINDS.items() for phrase in kind.phrases]
    named += [(a + b, f"{one} and {other}") for (a, one), (b, other) in product(named, repeat=2)]
    return {sentence.format(phrase): names for names, phrase in named for sentence in SENTENCES}


def pairs(names: Iterable[str], without: Iterable[str] = ()) -> list[tuple[str, str]]:
    """The compositions of two of the kinds, without that of these two in either order.

    >>> pairs(["reverse", "upper", "sort"], without=["upper", "reverse"])
    [('reverse', 'sort'), ('upper', 'sort'), ('sort', 'reverse'), ('sort', 'upper')]
    """
    without = {*without}
    return [pair for pair in permutations(names, 2) if {*pair} != without]


def pick(choices: Sequence, rng: np.random.Generator):
    """One of the choices, each with equal chance."""
    return choices[rng.integers(len(choices))]


def distinct_words(count: int, words: Words, seed: int, least: int = 3, most: int = 4) -> list[str]:
    """So many different words, by default of 3 to 4 letters if `words` do not say how long.

    More begin with the same ones. ValueError if they are more than half of all such words.
    """
    letters = ord(words.last) - ord(words.first) + 1
    sizes = range(words.least or least, (words.most or most) + 1)
    if count > (there := sum(letters**size for size in sizes)) // 2:
        raise ValueError(f"{count} different words are wanted: that is more than half of the "
                         f"{there} words of {sizes[0]} to {sizes[-1]} letters")
    rng, found = np.random.default_rng([seed, 4]), {}
    while len(found) < count:
        found.setdefault(words.draw(rng, least, most))
    return [*found]
