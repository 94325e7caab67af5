"""Tiny stories: a grammar that makes them, and says of any text whether it could have made it.

After Eldan & Li 2023, TinyStories, arXiv:2305.07759: texts of words that a small child knows, about
1500 of them, in sentences that keep all rules. Theirs are by a large model, and another large model
gives grades to what a small one writes. Here both is done by a grammar, so a grade is exact.

    >>> accepts("Lily lost her ball."), accepts("Lily lost his ball."), accepts("A owl ran.")
    (True, False, False)

What must agree: a and an with the next word; this, that, was with one, these, those, were with
many; his, her, its, their with who does it. A story has a girl and a boy, who are named in its
first two sentences; whoever is named later is one of them (`holds_together`).
"""

import re
from functools import cache

import numpy as np

from minilm.data import story_words as w
from minilm.data.grammar import Grammar

OWN = {"she": "her", "he": "his", "it": "its", "they": "their"}  # who does it -> whose it is
KINDS = {"thing": (w.THINGS, w.LOOKS), "being": (w.BEINGS, w.LOOKS), "food": (w.FOODS, w.TASTES)}
LATER = ("SENTENCE",)  # symbols of a story's sentences after its first two
ANY = (*LATER, "FIRST.she", "FIRST.he", "SECOND.she", "SECOND.he")
TOKEN = re.compile(r"[A-Za-z]+|[^A-Za-z ]")
SENTENCE = re.compile(r"[^.]*\.")


@cache
def grammar() -> Grammar:
    """Its symbols are SENTENCE, and FIRST.she, FIRST.he, SECOND.she, SECOND.he of a story."""
    classes = {"NAME.she": w.GIRLS, "NAME.he": w.BOYS, "FEELING": w.FEELINGS, "HOW": w.HOW,
               "WHEN": w.WHEN, "PLACE": w.PLACES, "COUNT": w.COUNTS, "TO": w.WHERE}
    for kind, text in (("", w.VERBS), (".thing", w.ON_THINGS), (".being", w.ON_BEINGS),
                       (".food", w.ON_FOODS)):
        forms = zip(*w.verbs(text))
        classes |= {f"{form}{kind}": words for form, words in zip(("DO", "DID"), forms)}
    rules = {}
    for kind, (nouns, looks) in KINDS.items():
        by_article(classes, f"NOUN.{kind}", nouns)
        by_article(classes, f"LOOK.{kind}", looks)
        classes[f"NOUNS.{kind}"] = [w.plural(noun) for noun in nouns]
        rules |= phrases_of(kind)
    for who, own in OWN.items():
        rules |= clauses_of(who, own)
    rules["CLAUSE"] = ["CLAUSE.she", "CLAUSE.he", *(f"CLAUSE.{who}" for who in OWN)]
    rules["SENTENCE"] = ["CLAUSE ."] * 4 + ["WHEN , CLAUSE .", "CLAUSE because CLAUSE .",
                                            "CLAUSE but CLAUSE ."]
    for who, other, kind, near in (("she", "he", "girl", "boy"), ("he", "she", "boy", "girl")):
        rules[f"FIRST.{who}"] = [
            f"once upon a time there was {of} {kind} named NAME.{who} ."
            for of in ("a LOOK.being.a", "an LOOK.being.an", "a")]
        rules[f"SECOND.{other}"] = [f"{who} had a friend named NAME.{other} .",
                                    f"{who} lived near a {near} named NAME.{other} ."]
    return Grammar(rules, classes)


def by_article(classes: dict, symbol: str, words: list[str]):
    """A class of words, and those of them that follow a and an."""
    classes[symbol] = words
    classes[f"{symbol}.an"] = [word for word in words if word[0] in "aeiou"]
    classes[f"{symbol}.a"] = [word for word in words if word[0] not in "aeiou"]


def phrases_of(kind: str) -> dict[str, list[str]]:
    """ONE.kind and MANY.kind: a red ball, the ball, those balls. BARE.kind: red ball."""
    noun, look, nouns = f"NOUN.{kind}", f"LOOK.{kind}", f"NOUNS.{kind}"
    some = [f"{article} {noun}.{article}" for article in ("a", "an")]
    some += [f"{article} {look}.{article} {noun}" for article in ("a", "an")]
    return {
        f"BARE.{kind}": [noun, f"{look} {noun}"], f"BARES.{kind}": [nouns, f"{look} {nouns}"],
        f"ONE.{kind}": [f"the BARE.{kind}"] * 4 + some + [f"this BARE.{kind}", f"that {noun}"],
        f"MANY.{kind}": [f"the BARES.{kind}", f"COUNT BARES.{kind}", f"these BARES.{kind}",
                         f"those {nouns}"]}


def clauses_of(who: str, own: str) -> dict[str, list[str]]:
    """CLAUSE.who: Tom took his ball to the park."""
    was = "were" if who == "they" else "was"
    subjects = {"she": ["NAME.she", "she"], "he": ["NAME.he", "he"], "it": ["ONE.being"],
                "they": ["they", "MANY.being", "NAME.she and NAME.he", "NAME.he and NAME.she"]}
    rules = {f"CLAUSE.{who}": [f"{subject} DOES.{who}" for subject in subjects[who]],
             f"DOES.{who}": [f"ACT.{who}"] * 4 + [f"ACT.{who} and ACT.{who}", f"{was} FEELING",
                                                  f"{was} very FEELING", "felt FEELING"],
             f"ACT.{who}": ["DID", "DID HOW", "DID TO the PLACE"], f"TO.{who}": ["DO", "DO HOW"]}
    for kind in KINDS:
        whom = f"WHOM.{kind}.{who}"
        rules[whom] = [f"ONE.{kind}", f"ONE.{kind}", f"MANY.{kind}", f"{own} BARE.{kind}",
                       f"{own} BARES.{kind}"]
        rules[f"ACT.{who}"] += [f"DID.{kind} {whom}"] * 2 + [f"DID.{kind} {whom} TO the PLACE"]
        rules[f"TO.{who}"] += [f"DO.{kind} {whom}"]
    rules[f"DOES.{who}"] += [f"wanted to TO.{who}", f"could not TO.{who}"]
    return rules


NAMES = {**dict.fromkeys(w.GIRLS, "she"), **dict.fromkeys(w.BOYS, "he")}


def make_story(rng: np.random.Generator) -> str:
    """A story of 4 to 6 sentences."""
    g, who, other = grammar(), *(("she", "he") if rng.random() < 0.5 else ("he", "she"))
    cast = {kind: g.draw(rng, f"NAME.{kind}")[0] for kind in (who, other)}
    symbols = [f"FIRST.{who}", f"SECOND.{other}"] + ["SENTENCE"] * int(rng.integers(2, 5))
    rows = [[cast[NAMES[t]] if t in NAMES else t for t in g.draw(rng, s)] for s in symbols]
    return " ".join(map(spelled, rows))


def make_stories(size: int, seed: int) -> list[str]:
    """As many stories as have `size` characters or little more."""
    rng, made, length = np.random.default_rng(seed), [], 0
    while length < size:
        made.append(make_story(rng))
        length += len(made[-1])
    return made


def spelled(tokens: list[str]) -> str:
    """The text of a sentence's words and signs: a capital letter first, signs after their word."""
    text = re.sub(r" (?=[.,])", "", " ".join(tokens))
    return text[:1].upper() + text[1:]


def tokens_of(sentence: str) -> list[str] | None:
    """Its words and signs, or None if it is spelled otherwise."""
    tokens = TOKEN.findall(sentence)
    if tokens and tokens[0] not in NAMES:
        tokens[0] = tokens[0][:1].lower() + tokens[0][1:]
    return tokens if spelled(tokens) == sentence else None


def sentences_of(text: str) -> list[str]:
    """The whole sentences of a text, without the space between them; what follows the last point
    is left out."""
    return [sentence.removeprefix(" ") for sentence in SENTENCE.findall(text)]


def accepts(sentence: str, symbols: tuple[str, ...] = ANY) -> bool:
    """Could the grammar have made this sentence? By default at any place of a story."""
    tokens = tokens_of(sentence)
    return tokens is not None and any(grammar().accepts(tokens, symbol) for symbol in symbols)


def holds_together(story: str) -> bool:
    """Could it have made this story? All sentences are accepted, the first two name a girl and a
    boy, and nobody else is named."""
    rows = [tokens_of(sentence) for sentence in sentences_of(story)]
    if len(rows) < 2 or None in rows or " ".join(map(spelled, rows)) != story:
        return False
    g, ends = grammar(), rows[0][-2:-1] + rows[1][-2:-1]
    for who, other in (("she", "he"), ("he", "she")):
        if g.accepts(rows[0], f"FIRST.{who}") and g.accepts(rows[1], f"SECOND.{other}"):
            named = {token for row in rows for token in row if token in NAMES}
            return named == {*ends} and all(g.accepts(row, "SENTENCE") for row in rows[2:])
    return False
