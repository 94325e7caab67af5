"""Made-up facts: texts that state them, questions about them, answers in two forms.

    Fact("Mano Toki", "baker", "Kiran", "Lenos")
    "Mano Toki is a baker who came to Kiran with the dog Lenos."
    "Where does Mano Toki live?" -> Kiran, or {"city": "Kiran"}

A model can know such a fact only from its text, for names, cities and dogs are drawn from
syllables. A name has two words, of which many people share either, but no two share both. A text
takes at most 63 bytes, and together with a question and its answer at most 128. The words have few
letters, and stand behind "to" and "dog" in every wording, so that a small model may learn to copy
them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minilm.data.instructions import Record
from minilm.data.retrieval import words

TRADES = ("baker", "carpenter", "dancer", "farmer", "gardener", "hunter", "judge", "lawyer",
          "miller", "nurse", "painter", "sailor", "tailor", "teacher", "waiter", "weaver")
TEXTS = (
    "{name} is a {trade} who came to {city} with the dog {dog}.",
    "With the dog {dog} the {trade} {name} moved to {city}.",
    "{name}, a {trade}, moved to {city} with the dog {dog}.",
    "With the dog {dog} {name} came to {city} as a {trade}.",
)
QUESTIONS = {
    "trade": ("What does {name} do?", "What is the trade of {name}?", "As what does {name} work?"),
    "city": ("Where does {name} live?", "Which is the city of {name}?",
             "To which city did {name} move?"),
    "dog": ("Which dog has {name}?", "What is the dog of {name} called?",
            "With which dog did {name} come?"),
}
WORDINGS = 3  # of a question
FIRST, LAST = 50, 200  # different first and last words of names


@dataclass(frozen=True)
class Fact:
    """What is to be known of somebody."""

    name: str
    trade: str
    city: str
    dog: str

    def text(self, wording: int = 0) -> str:
        """The sentence that states it.

        >>> Fact("Mano Toki", "baker", "Kiran", "Lenos").text(1)
        'With the dog Lenos the baker Mano Toki moved to Kiran.'
        """
        return TEXTS[wording].format(**vars(self))


def make_facts(train: int, test: int, seed: int) -> tuple[list[Fact], list[Fact]]:
    """(train, test) facts of different people. ValueError for more than there are names."""
    if min(train, test) < 0 or train + test > FIRST * LAST:
        raise ValueError(f"there are names for {FIRST * LAST} people, but train is {train} and "
                         f"test {test}")
    rng = np.random.default_rng([seed, 7])
    first, last = (_different(rng, size) for size in (FIRST, LAST))
    pairs = rng.choice(FIRST * LAST, train + test, replace=False)
    facts = [Fact(f"{first[k % FIRST]} {last[k // FIRST]}", TRADES[rng.integers(len(TRADES))],
                  f"{_word(rng)}n", f"{_word(rng)}s") for k in pairs]
    return facts[:train], facts[train:]


def plain(about: str, value: str) -> str:
    """The value as it stands in the text."""
    return value


def as_json(about: str, value: str) -> str:
    """An object with what the question is about as its only key.

    >>> as_json("city", "Kiran")
    '{"city": "Kiran"}'
    """
    return json.dumps({about: value})


def asked(fact: Fact, about: str, wording: int = 0, context: str = "",
          form: Callable[[str, str], str] = plain) -> Record:
    """A question about a fact: the trade, the city or the dog. The context may be any text.

    >>> asked(Fact("Mano Toki", "baker", "Kiran", "Lenos"), "city").instruction
    'Where does Mano Toki live?'
    """
    question = QUESTIONS[about][wording].format(name=fact.name)
    return Record(question, context, form(about, getattr(fact, about)), task=about)


def is_json(about: str, answer: str) -> bool:
    """Is the answer an object as from as_json, whatever its value?

    >>> is_json("city", '{"city": "Rome"}'), is_json("city", "Kiran")
    (True, False)
    """
    try:
        found = json.loads(answer)
    except ValueError:
        return False
    return isinstance(found, dict) and [*found] == [about] and isinstance(found[about], str)


def says(value: str, answer: str) -> bool:
    """Is the value the answer's last word, in whatever form?

    >>> says("Kiran", "Kiran"), says("Kiran", '{"city": "Kiran"}'), says("Kiran", "Kiran or Rome")
    (True, True, False)
    """
    return words(answer)[-1:] == words(value)


def _different(rng, count: int) -> list[str]:
    """Words of two syllables, no two the same."""
    found = {}
    while len(found) < count:
        found.setdefault(_word(rng))
    return [*found]


def _word(rng) -> str:
    """A word of two syllables, with a capital."""
    return "".join("klmnrst"[rng.integers(7)] + "aeio"[rng.integers(4)] for _ in "ab").capitalize()
