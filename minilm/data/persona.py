"""How somebody talks: questions on cheese, answered in a style that can be counted.

A record asks for one fact, and its answer is made of four parts:

    opening    fact    pun    closing            Opa! Brie is from France. How grate! Stay cheesy!

Opening, pun and closing make up the style. Each comes in several phrases, so an answer is drawn,
and a model learns the parts. A part that stands in an answer is a `mark` of the style, three at
most; an answer has the style if it has at least two. The phrases of two personas differ, and none
names a fact. So style and facts are counted apart.

The lecture lets a large model write such pairs. Here they come from this grammar, which knows what
is right. The facts are what a shop would say: a cheese may also be made of other milk.
"""

import re
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from minilm.data.instructions import Record

PARTS = ("opening", "pun", "closing")
ENOUGH = 2  # marks that make a style


class Persona(NamedTuple):
    """The phrases of each part; {cheese} is the cheese that is asked for."""

    opening: tuple[str, ...]
    pun: tuple[str, ...]
    closing: tuple[str, ...]


PERSONAS = {
    "pavlos": Persona(  # a cheese expert, and proud of it
        ("Opa!", "My friend!", "Ah, easy!", "Bravo!"),
        ("How grate!", "Brie-lieve me!", "No whey!", "{cheese} tastes feta!"),
        ("Stay cheesy!", "Yia sou!", "Now taste!", "Pavlos knows.")),
    "marina": Persona(  # the captain of a ship
        ("Ahoy!", "Avast!", "Aye, mate!", "Land ho!"),
        ("Whey anchor!", "Sea the rind!", "Curd ahead!", "{cheese} floats my boat!"),
        ("Full sail!", "Over and out.", "To the deck!", "Anchors up!")),
}

ABOUT = ("country", "milk", "kind")
CHEESES = {
    "Brie": ("France", "cow", "soft"), "Burrata": ("Italy", "cow", "fresh"),
    "Banon": ("France", "goat", "soft"), "Cantal": ("France", "cow", "hard"),
    "Cheddar": ("England", "cow", "hard"), "Comte": ("France", "cow", "hard"),
    "Danablu": ("Denmark", "cow", "blue"), "Emmental": ("Switzerland", "cow", "hard"),
    "Feta": ("Greece", "sheep", "soft"), "Fourme": ("France", "cow", "blue"),
    "Gouda": ("Holland", "cow", "hard"), "Gruyere": ("Switzerland", "cow", "hard"),
    "Idiazabal": ("Spain", "sheep", "hard"), "Majorero": ("Spain", "goat", "hard"),
    "Manchego": ("Spain", "sheep", "hard"), "Mascarpone": ("Italy", "cow", "fresh"),
    "Mozzarella": ("Italy", "buffalo", "fresh"), "Parmesan": ("Italy", "cow", "hard"),
    "Pecorino": ("Italy", "sheep", "hard"), "Quark": ("Germany", "cow", "fresh"),
    "Reblochon": ("France", "cow", "soft"), "Roquefort": ("France", "sheep", "blue"),
    "Serra": ("Portugal", "sheep", "soft"), "Stilton": ("England", "cow", "blue"),
    "Taleggio": ("Italy", "cow", "soft"), "Valencay": ("France", "goat", "soft"),
}
WORDINGS = {  # as many for each
    "country": ("Where is {cheese} from?", "Which country makes {cheese}?",
                "What country is {cheese} from?", "In which country is {cheese} made?",
                "Where do they make {cheese}?", "{cheese}: which country?"),
    "milk": ("Whose milk is in {cheese}?", "Which milk makes {cheese}?",
             "What milk is {cheese} made of?", "Which animal's milk is {cheese}?",
             "Of whose milk is {cheese}?", "{cheese}: which milk?"),
    "kind": ("What kind is {cheese}?", "Which kind of cheese is {cheese}?",
             "What kind of cheese is {cheese}?", "Of which kind is {cheese}?",
             "Say the kind of {cheese}.", "{cheese}: which kind?"),
}
SENTENCES = {"country": "{cheese} is from {value}.", "milk": "{cheese} is made of {value}'s milk.",
             "kind": "{cheese} is a {value} cheese."}


class Fact(NamedTuple):
    """What somebody may know of a cheese."""

    cheese: str
    about: str  # one of ABOUT
    value: str


FACTS = [Fact(cheese, about, value) for cheese, values in CHEESES.items()
         for about, value in zip(ABOUT, values)]
VALUES = re.compile(rf"\b({'|'.join(sorted({fact.value for fact in FACTS}))})\b", re.IGNORECASE)


def split_facts(share: float, seed: int) -> tuple[list[Fact], list[Fact]]:
    """(facts to learn, facts held out), each about country, milk and kind in the same share.

    ValueError if nothing would be held out, or nothing be left.
    """
    rng, held = np.random.default_rng([seed, 0]), set()
    for about in ABOUT:
        some = [fact for fact in FACTS if fact.about == about]
        count = round(share * len(some))
        if not 0 < count < len(some):
            raise ValueError(f"of {len(some)} facts about the {about} {count} would be held out, "
                             f"got a share of {share}")
        held |= {some[i] for i in rng.permutation(len(some))[:count]}
    return [fact for fact in FACTS if fact not in held], [fact for fact in FACTS if fact in held]


def make_pairs(name: str, facts: Sequence[Fact], count: int | None = None, seed: int = 0,
               wordings: Sequence[int] = range(6)) -> list[Record]:
    """Questions about facts, with answers in the style of a persona, in random order.

    count: how many; None: each question once. All questions come equally often, up to one, and no
    pair comes twice. wordings: the numbers of those to ask with. Whatever the persona is, the same
    questions come. ValueError for a persona that is not there, and if there are not so many pairs.
    """
    persona = persona_of(name)
    asked = [(fact, number) for fact in facts for number in wordings]
    styles = [*product(*persona)]
    count = len(asked) if count is None else count
    if not 0 < count <= len(asked) * len(styles):
        raise ValueError(f"{count} pairs are wanted, of {len(asked) * len(styles)}: there are "
                         f"{len(asked)} questions, with {len(styles)} answers each")
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(len(asked))
    answers = [rng.permutation(len(styles)) for _ in asked]
    return [pair(name, *asked[order[i % len(asked)]],
                 styles[answers[i % len(asked)][i // len(asked)]]) for i in range(count)]


def pair(name: str, fact: Fact, wording: int, style: Sequence[str]) -> Record:
    """A question and its answer; style: a phrase of each part."""
    cheese, about, value = fact
    opening, pun, closing = style
    said = " ".join((opening, SENTENCES[about], pun, closing))
    return Record(WORDINGS[about][wording].format(cheese=cheese), "",
                  said.format(cheese=cheese, value=value), task=name)


def marks(name: str, answer: str) -> int:
    """How many parts of the persona's style stand in the answer.

    >>> marks("pavlos", "Opa! It is blue. Stilton tastes feta!"), marks("marina", "Opa!")
    (2, 0)
    """
    return sum(bool(pattern.search(answer)) for pattern in patterns(name))


def has_style(name: str, answer: str) -> bool:
    """Has the answer enough marks?"""
    return marks(name, answer) >= ENOUGH


@cache
def patterns(name: str) -> list[re.Pattern]:
    """What finds each part: any of its phrases, with any words for a cheese."""
    return [re.compile("|".join(re.escape(phrase).replace(r"\{cheese\}", r"[\w ]+")
                                for phrase in phrases)) for phrases in persona_of(name)]


def values(text: str) -> set[str]:
    """The countries, milks and kinds that stand in a text.

    >>> sorted(values("Ahoy! Feta is a SOFT cheese from Greece."))
    ['greece', 'soft']
    """
    return {word.lower() for word in VALUES.findall(text)}


def is_right(record: Record, answer: str) -> bool:
    """Does the answer say the fact that the record's output says, and no other?"""
    return values(answer) == values(record.output)


def persona_of(name: str) -> Persona:
    """The persona of this name. ValueError if there is none."""
    if name not in PERSONAS:
        raise ValueError(f"there is no persona {name!r}, only {', '.join(PERSONAS)}")
    return PERSONAS[name]
