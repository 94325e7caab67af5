"""Rules that tell text from what only looks like it: lists, menus, code, copies of one line.

Gopher's are in Rae et al. 2021, arXiv:2112.11446, tables A1 and section A.1.1; C4's in Raffel et
al. 2019, arXiv:1910.10683, section 2.2. A rule measures one number of a page and has two bounds:

    >>> broken("Buy now! Buy now! Buy now!", GOPHER)
    'words: 6, expected 50 to 100,000'

C4 also cuts lines out of pages, so its first step gives a text: `c4_lines`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = ("•", "‣", "◦", "▪", "*", "-", "–")
ELLIPSES = ("...", "…")
ENDS = (".", "!", "?", '"', "”")
SENTENCE = re.compile(r"[.!?]+[\"”')\]]*(?:\s+|$)")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
            "use cookies")


class Page:
    """A text, and what the rules count in it. Words are what stands between spaces."""

    def __init__(self, text: str):
        self.text = text
        self.words = text.split()
        self.lines = [line.strip() for line in text.splitlines() if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Parts between empty lines."""
        return [part for part in re.split(r"\n\s*\n", self.text) if part.strip()]

    @cached_property
    def sentences(self) -> int:
        return len(SENTENCE.findall(self.text))


class Rule(NamedTuple):
    """What a page must have: low <= measured <= high."""

    measure: Callable[[Page], float]
    low: float
    high: float


def broken(text: str, rules: dict[str, Rule]) -> str | None:
    """The first rule that a text breaks, with what was found and what was expected, or None."""
    page = Page(text)
    for name, (measure, low, high) in rules.items():
        if not low <= (found := measure(page)) <= high:
            bounds = f"at least {low:,}" if high == math.inf else f"{low:,} to {high:,}"
            return f"{name}: {found:.4g}, expected {bounds}"
    return None


def share(count: float, whole: float) -> float:
    """count / whole; 0 of nothing."""
    return count / whole if whole else 0.0


def of_lines(test: Callable[[str], bool], page: Page) -> float:
    """The share of the lines for which a test is true."""
    return share(sum(map(test, page.lines)), len(page.lines))


def repeated(parts: str, page: Page) -> float:
    """The share of the lines, or of the paragraphs, that stood before."""
    found = getattr(page, parts)
    return share(len(found) - len(set(found)), len(found))


def repeated_letters(parts: str, page: Page) -> float:
    """The share of the page's letters that is in such lines or paragraphs."""
    found = getattr(page, parts)
    again = sum(len(part) * (count - 1) for part, count in Counter(found).items())
    return share(again, sum(map(len, found)))


def top_letters(n: int, page: Page) -> float:
    """The share of the words' letters that is in the most frequent n words in a row."""
    grams = Counter(zip(*(page.words[i:] for i in range(n))))
    if not grams:
        return 0.0
    gram, count = max(grams.items(), key=lambda item: item[1] * sum(map(len, item[0])))
    return share(count * sum(map(len, gram)) * (count > 1), sum(map(len, page.words)))


def doubled_letters(n: int, page: Page) -> float:
    """The share of the words' letters that is in any n words in a row that stand twice or more.

    A word in several of them counts once.
    """
    words, seen, covered = page.words, {}, [0] * (len(page.words) + 1)
    for i in range(len(words) - n + 1):
        first = seen.setdefault(tuple(words[i : i + n]), i)
        if first != i:
            for start in (first, i):
                covered[start] += 1
                covered[start + n] -= 1
    letters = sum(len(word) for word, times in zip(words, accumulate(covered)) if times)
    return share(letters, sum(map(len, words)))


GOPHER = {
    "words": Rule(lambda page: len(page.words), 50, 100_000),
    "letters in a word": Rule(lambda page: share(sum(map(len, page.words)), len(page.words)),
                              3, 10),
    "# to a word": Rule(lambda page: share(page.text.count("#"), len(page.words)), 0, 0.1),
    "ellipses to a word": Rule(lambda page: share(sum(map(page.text.count, ELLIPSES)),
                                                  len(page.words)), 0, 0.1),
    "lines with a bullet": Rule(partial(of_lines, lambda line: line.startswith(BULLETS)), 0, 0.9),
    "lines that end in an ellipsis": Rule(partial(of_lines, lambda line: line.endswith(ELLIPSES)),
                                          0, 0.3),
    "words with a letter": Rule(lambda page: share(sum(any(map(str.isalpha, word))
                                                       for word in page.words),
                                                   len(page.words)), 0.8, 1),
    "kinds of the, be, to, of, and, that, have, with": Rule(
        lambda page: len(STOP_WORDS & {word.lower() for word in page.words}), 2, 8),
}
REPETITION = {
    "repeated lines": Rule(partial(repeated, "lines"), 0, 0.3),
    "repeated paragraphs": Rule(partial(repeated, "paragraphs"), 0, 0.3),
    "letters in repeated lines": Rule(partial(repeated_letters, "lines"), 0, 0.2),
    "letters in repeated paragraphs": Rule(partial(repeated_letters, "paragraphs"), 0, 0.2),
    **{f"letters in the top {n} words in a row": Rule(partial(top_letters, n), 0, most)
       for n, most in ((2, 0.20), (3, 0.18), (4, 0.16))},
    **{f"letters in any {n} words in a row that come again":
       Rule(partial(doubled_letters, n), 0, most)
       for n, most in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10))},
}
C4 = {
    "sentences": Rule(lambda page: page.sentences, 3, math.inf),
    "lorem ipsum": Rule(lambda page: page.text.lower().count("lorem ipsum"), 0, 0),
    "curly brackets": Rule(lambda page: page.text.count("{"), 0, 0),
}


def c4_lines(text: str) -> str:
    """The lines that end a sentence and have 5 words or more, without those about javascript and
    cookies."""
    return "\n".join(line for line in map(str.strip, text.splitlines())
                     if line.endswith(ENDS) and not line.endswith(ELLIPSES)
                     and len(line.split()) >= 5
                     and "javascript" not in line.lower()
                     and not any(policy in line.lower() for policy in POLICIES))


def with_words(words: Sequence[str]) -> dict[str, Rule]:
    """A rule that none of these words stands in a page, in whatever case."""
    unwanted = {word.lower() for word in words}
    return {"unwanted words": Rule(lambda page: sum(word.strip(".,;:!?\"'()").lower() in unwanted
                                                    for word in page.words), 0, 0)}
