"""Trouble that is planted in good text, so that it is known what cleaning should find.

Copies, exact ones and near ones; and pages that are no good text: menus and notices of web sites,
other languages, and what is left of files that were no text.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from minilm.data.grammar import Grammar

GOOD, COPY, NEAR = "good", "copy", "near copy"
SITE, FOREIGN, NOISE = "boilerplate", "other language", "noise"
CHANGED = 0.005  # of a near copy's words


class Page(NamedTuple):
    """A document, and what it is."""

    text: str
    kind: str  # GOOD, COPY ...
    source: int  # which good document it is or is a copy of; -1: none


def planted(documents: Sequence[str], rng: np.random.Generator, copies: float = 0.3,
            trouble: float = 0.3, times: Sequence[int] = (8, 32)) -> list[Page]:
    """The documents among pages of trouble, in random order.

    copies, trouble: shares of the characters of all pages; a third of the trouble is of each kind.
    times: how often documents that have copies stand in all; each number gets an equal part of the
    copies, but a document always has all of its own, so that there may be somewhat more of them.
    Which have some is drawn. Every second copy is a near one: of its words 1 in 200 are other words
    of the documents, so that J of 5 words in a row is about 0.95.
    ValueError for shares that leave no room, and if there are too few documents to copy.
    """
    if min(copies, trouble) < 0 or copies + trouble >= 1 or not documents:
        raise ValueError("copies and trouble must be shares that leave room for documents, got "
                         f"{copies} and {trouble} beside {len(documents)} documents")
    if not times or min(times) < 2:
        raise ValueError(f"a document with a copy stands twice or more, got times={times!r}")
    size = sum(map(len, documents)) / (1 - copies - trouble)
    pages = [Page(text, GOOD, i) for i, text in enumerate(documents)]
    left, words = iter(rng.permutation(len(documents))), " ".join(documents).split()
    for count in times:
        room = copies * size / len(times)
        while room > 0:
            if (i := next(left, None)) is None:
                raise ValueError(f"{len(documents)} documents are too few for copies of a share of "
                                 f"{copies}")
            pages += copies_of(documents[i], int(i), count - 1, words, rng)
            room -= (count - 1) * len(documents[i])
    length = size / len(pages)
    for kind, make in ((SITE, site), (FOREIGN, foreign), (NOISE, noise)):
        room = trouble * size / 3
        while room > 0:
            pages.append(Page(make(rng, int(length)), kind, -1))
            room -= len(pages[-1].text)
    return [pages[i] for i in rng.permutation(len(pages))]


def copies_of(text: str, source: int, count: int, words: list[str], rng) -> list[Page]:
    """Copies, exact and near ones in turn."""
    return [Page(changed(text, words, rng), NEAR, source) if i % 2 else Page(text, COPY, source)
            for i in range(count)]


def changed(text: str, words: list[str], rng: np.random.Generator) -> str:
    """The text with some of its words in place of others; lines stay."""
    lines = [line.split(" ") for line in text.split("\n")]
    size = sum(map(len, lines))
    for place in rng.integers(size, size=max(1, round(CHANGED * size))):
        for line in lines:
            if place < len(line):
                line[place] = words[rng.integers(len(words))]
                break
            place -= len(line)
    return "\n".join(map(" ".join, lines))


def filled_up(make, joint: str, size: int) -> str:
    """make() again and again, until there are so many characters."""
    parts = [make()]
    while sum(map(len, parts)) < size:
        parts.append(make())
    return joint.join(parts)


SITES = Grammar({
    "LINE": ["ITEM | ITEM | ITEM | ITEM", "* ITEM", "* ITEM", "Copyright YEAR NAME . All rights "
             "reserved .", "This site uses cookies to NAME .", "Please enable javascript to NAME .",
             "Share on NAME", "ITEM ( YEAR )", "Page YEAR of YEAR", "Posted by NAME in ITEM",
             "Read more about ITEM ..."]}, {
    "ITEM": "Home Login About Contact News Shop Help Forum Search Sitemap Downloads Imprint "
            "Account Cart Blog Press Jobs Partners".split(),
    "NAME": "continue anonymous friends admin webmaster improve guests everybody".split(),
    "YEAR": [str(n) for n in range(1, 40)] + [str(n) for n in range(1995, 2024)]})


def site(rng: np.random.Generator, size: int) -> str:
    """Menus and notices."""
    return filled_up(lambda: " ".join(SITES.draw(rng, "LINE")), "\n", size)


@cache
def languages() -> list[Grammar]:
    """Simple sentences of German, French and Spanish."""
    return [Grammar({"S": rows}, dict(zip("ABC", map(str.split, classes))))
            for rows, *classes in (
        (["Der A B das C , weil der A es so B .", "Wenn das C nicht da ist , B der A noch einmal .",
          "Dann B der A das C und wartet auf den Nutzer ."],
         "Rechner Server Dienst Nutzer Fehler Ordner Schritt Aufruf Befehl Name",
         "liest schreibt sucht braucht findet öffnet schließt prüft lädt zeigt",
         "Programm Verzeichnis Ergebnis Modul Feld Wort Zeichen Bild Gerät Netz"),
        (["Le A B la C parce que le A ne la B pas .", "Si la C est vide , le A B encore une fois .",
          "Ensuite le A B la C et attend une réponse ."],
         "serveur fichier module client dossier projet service nom lecteur bouton",
         "cherche trouve ouvre ferme donne garde montre lit demande change",
         "valeur ligne page liste fonction clé chaîne réponse table commande"),
        (["El A B la C porque el A no la B .", "Si la C está vacía , el A B otra vez .",
          "Después el A B la C y espera una respuesta ."],
         "servidor archivo programa cliente usuario nombre servicio equipo lector sistema",
         "busca encuentra abre cierra guarda muestra lee pide cambia necesita",
         "línea página lista función clave cadena respuesta tabla orden carpeta"))]


def foreign(rng: np.random.Generator, size: int) -> str:
    """Sentences of one other language."""
    language = languages()[rng.integers(3)]
    return filled_up(lambda: " ".join(language.draw(rng, "S")).replace(" .", ".").replace(
        " ,", ","), " ", size)


def noise(rng: np.random.Generator, size: int) -> str:
    """Codes and numbers, as of files that were no text."""
    signs = np.array([*"0123456789abcdef+/=;:#%&$_-<>[]ABCDEFXYZ"])
    return filled_up(lambda: "".join(rng.choice(signs, rng.integers(2, 40))), " ", size)
