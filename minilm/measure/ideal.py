"""What demonstrations tell about a task at best: the answer of who knows how the rows are made.

The tasks of data/shots.py are drawn: a kind, each with equal chance, then one of that kind. Who
knows this, and has seen pairs (x_1, y_1) .. (x_k, y_k), gives a question x the answer

    argmax_y  sum over tasks t of  P(t) [t(x_1) = y_1] .. [t(x_k) = y_k] [t(x) = y]            (1)

by Bayes' rule; no other answer is right more often. Of the 26^8 maps the sum is known in closed
form: let n letters be in the questions, x among them. The images of different letters are
independent, so the maps that fit, if any does, have the share 26^-n.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from minilm.data.shots import ALPHABET, KINDS, NAMED, Pair


def ideal(shown: Sequence[Pair], asked: str, kinds: Collection[str] = KINDS) -> str:
    """The answer of eq. (1) after these demonstrations of a task of one of the kinds.

    Of answers with equal chance it is the first one in the order of kinds, tasks and letters.
    ValueError if no task of these kinds fits.

    >>> ideal([("abc", "bcd")], "had")  # each letter one place on, for maps are many
    'ibe'
    >>> ideal([("abc", "qqt")], "cab"), ideal([("abc", "qqt")], "dab")  # nothing shows d
    ('tqq', 'aqq')
    """
    chances = Counter()
    for kind in kinds:
        tasks = NAMED.get(kind, ())
        fit = [task for task in tasks if all(task(x) == y for x, y in shown)]
        for task in fit:
            chances[task(asked)] += 1 / len(tasks)
    if "map" in kinds and (images := images_in(shown)) is not None:
        guess = "".join(images.get(letter, ALPHABET[0]) for letter in asked)
        for answer in {**chances, guess: 0}:
            chances[answer] += fitting_maps([*shown, (asked, answer)])
    if not chances:
        raise ValueError(f"no task of the kinds {', '.join(kinds)} fits {shown!r:.200}")
    return max(chances, key=chances.get)  # eq. (1)


def images_in(pairs: Sequence[Pair]) -> dict[str, str] | None:
    """letter -> image in these pairs; None if no map has them.

    >>> images_in([("aba", "xyx")]), images_in([("aba", "xyz")])
    ({'a': 'x', 'b': 'y'}, None)
    """
    images = {}
    for x, y in pairs:
        for letter, image in zip(x, y, strict=True):
            if image not in ALPHABET or images.setdefault(letter, image) != image:
                return None
    return images


def fitting_maps(pairs: Sequence[Pair]) -> float:
    """The share of all maps that have these pairs."""
    images = images_in(pairs)
    return 0.0 if images is None else float(len(ALPHABET)) ** -len(images)
