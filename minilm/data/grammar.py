"""A grammar of phrases: it makes sentences, and says of any sentence whether it could have made it.

Rules without context (Chomsky 1956, Three models for the description of language). A symbol stands
for one of its alternatives, each a row of symbols and words, or for any word of a class. Agreement
is in the names of the symbols, as in NOUN.one and NOUN.many.

    >>> g = Grammar({"S": ["the NOUN.one sleeps", "the NOUN.many sleep"]},
    ...             {"NOUN.one": ["cat", "dog"], "NOUN.many": ["cats", "dogs"]})
    >>> g.accepts("the dogs sleep".split(), "S"), g.accepts("the dogs sleeps".split(), "S")
    (True, False)
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter

import numpy as np


class Grammar:
    """rules: symbol -> its alternatives, each with equal chance; one that stands there twice has
    twice the chance. classes: symbol -> words, the r-th with a chance in proportion to 1 / r, as in
    texts (Zipf 1949, Human behavior and the principle of least effort).

    What is neither a rule nor a class is a word. ValueError for a symbol that has no alternative or
    is both, for an empty alternative, and if a symbol can stand inside itself.
    """

    def __init__(self, rules: Mapping[str, Sequence[str]], classes: Mapping[str, Sequence[str]]):
        if both := sorted({*rules} & {*classes}):
            raise ValueError(f"{both[0]!r} has alternatives, and is a class of words")
        for symbol, choices in {**rules, **classes}.items():
            if isinstance(choices, str) or not choices or not all(map(str.split, choices)):
                raise ValueError(f"{symbol!r} needs one alternative or more, none of them empty, "
                                 f"got {choices!r:.80}")
        self.rules = {symbol: [tuple(choice.split()) for choice in choices]
                      for symbol, choices in rules.items()}
        self.classes = {symbol: tuple(words) for symbol, words in classes.items()}
        self.members = {symbol: frozenset(words) for symbol, words in classes.items()}
        chances = {symbol: 1 / np.arange(1, len(words) + 1) for symbol, words in classes.items()}
        self.borders = {symbol: np.cumsum(p) / p.sum() for symbol, p in chances.items()}
        inside = {symbol: {part for choice in choices for part in choice}
                  for symbol, choices in self.rules.items()}
        try:
            TopologicalSorter(inside).prepare()
        except CycleError as error:
            raise ValueError(f"{error.args[1][0]!r} can stand inside itself") from None

    @property
    def words(self) -> set[str]:
        """All words that a sentence can have."""
        found = {word for words in self.members.values() for word in words}
        parts = {part for choices in self.rules.values() for choice in choices for part in choice}
        return found | (parts - {*self.rules} - {*self.classes})

    def draw(self, rng: np.random.Generator, symbol: str) -> list[str]:
        """The words of a phrase."""
        if symbol in self.classes:
            place = np.searchsorted(self.borders[symbol], rng.random(), side="right")
            return [self.classes[symbol][place]]
        if symbol not in self.rules:
            return [symbol]
        choices = self.rules[symbol]
        parts = choices[int(rng.random() * len(choices))]
        return [word for part in parts for word in self.draw(rng, part)]

    def accepts(self, words: Sequence[str], symbol: str) -> bool:
        """Can the symbol stand for these words?"""
        @cache
        def ends(symbol: str, start: int) -> frozenset[int]:  # where its phrases from here may end
            if symbol in self.rules:
                return frozenset(end for choice in self.rules[symbol]
                                 for end in row(choice, start))
            here = words[start : start + 1]
            fits = here and (here[0] in self.members[symbol] if symbol in self.members
                             else here[0] == symbol)
            return frozenset([start + 1] if fits else ())

        def row(parts: tuple[str, ...], start: int) -> Iterator[int]:
            places = {start}
            for part in parts:
                places = {end for place in places for end in ends(part, place)}
            yield from places

        return len(words) in ends(symbol, 0)
