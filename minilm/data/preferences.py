"""What people prefer: answers to a prompt, the better one first, in files or made from a score.

A file of comparisons is JSONL with the fields prompt, chosen and rejected. Made ones have K answers
that a model has drawn. A gold score, a rule on texts, ranks them with noise: the next best answer
is drawn in proportion to exp(sharpness x score) (Plackett 1975; Luce 1959). So of two answers the
first wins with the probability 1 / (1 + exp(-sharpness x the difference)): Bradley & Terry 1952.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minilm.data.lines import first_has, load_lines
from minilm.strict import parse

VOWELS = frozenset("aeiouAEIOU")


def vowels(text: str) -> float:
    """The share of vowels among the characters, 0 of an empty text.

    >>> vowels("banana")
    0.5
    """
    return sum(c in VOWELS for c in text) / max(1, len(text))


def peak(text: str) -> float:
    """The share of vowels v up to 0.4, and 0.8 - v beyond: best at 0.4.

    >>> round(peak("aaaaa"), 6)
    -0.2
    """
    return min(v := vowels(text), 0.8 - v)


def upper(text: str) -> float:
    """The share of capital letters among the characters, 0 of an empty text."""
    return sum(c.isupper() for c in text) / max(1, len(text))


SCORES: dict[str, Callable[[str], float]] = {"vowels": vowels, "peak": peak, "upper": upper}


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt. TypeError for a field that is not text, ValueError if one is empty,
    and if the answers are the same."""

    prompt: str
    chosen: str
    rejected: str

    def __post_init__(self):
        for name, text in vars(self).items():
            if not isinstance(text, str):
                raise TypeError(f"{name}: expected str, got {type(text).__name__}")
            if not text:
                raise ValueError(f"{name}: the text is empty")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name}: {error}") from error
        if self.chosen == self.rejected:
            raise ValueError(f"chosen and rejected are the same: {self.chosen!r:.80}")


def holds_comparisons(path: str | os.PathLike) -> bool:
    """Whether a file is one of comparisons: JSON lines by its name or by the field `chosen`, unless
    they have the field `text` of a corpus. FormatError."""
    if not os.path.isfile(path):
        return False
    lines = os.fspath(path).endswith(".jsonl")
    return first_has(path, "chosen") or (lines and not first_has(path, "text"))


def load_comparisons(path: str | os.PathLike) -> list[Comparison]:
    """The comparisons of a JSONL file. Raises FormatError with line and field, FileNotFoundError.
    """
    return load_lines(path, _comparison, "comparison")


def ranked(scores: Sequence[float], sharpness: float, rng: np.random.Generator) -> np.ndarray:
    """An order of the answers with these scores, best first, drawn as at the top of the file.

    Adding Gumbel noise and sorting draws from Plackett's model. With sharpness inf the order is
    that of the scores, and equal ones come in random order.
    """
    scores = np.asarray(scores, np.float64)
    noise = rng.gumbel(size=scores.shape)
    if sharpness == np.inf:
        return np.lexsort((-noise, -scores))
    return np.argsort(-(sharpness * scores + noise), kind="stable")


def _comparison(line):
    found = parse(line)
    if not isinstance(found, dict):
        raise TypeError(f"expected an object, got {type(found).__name__}")
    names = ("prompt", "chosen", "rejected")
    for name in names:
        if name not in found:
            raise ValueError(f"{name}: the field is missing")
    if unknown := [name for name in found if name not in names]:
        raise ValueError(f"{unknown[0]!r:.80}: the field is unknown, expected {', '.join(names)}")
    return Comparison(**found)
