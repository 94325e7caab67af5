"""The stages that look at one document alone, in the order in which RefinedWeb has them (Penedo et
al. 2023, arXiv:2306.01116, table 2): language, repetition, quality, lines; then private data."""

from collections.abc import Sequence

from minilm.data.cleaning.funnel import Dropped, Stage
from minilm.data.cleaning.language import check_language, language
from minilm.data.cleaning.private import hidden
from minilm.data.cleaning.quality import C4, GOPHER, REPETITION, Rule, broken, c4_lines, with_words

LARGEST = 10_000_000  # bytes of a document; longer ones are dumps, and take minutes to look at
NAMES = ("size", "language", "repetition", "quality", "lines", "words", "private")


def make_stages(names: Sequence[str] = NAMES, code: str = "en", least: float = 0.5,
                unwanted: Sequence[str] = (), largest: int = LARGEST) -> dict[str, Stage]:
    """The stages with these names, {name: function}.

    code, least: the language that is kept, and its least probability. unwanted: words that no page
    may have. largest: bytes. ValueError for unknown names, languages and bounds.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"there is no stage {unknown[0]!r}, only {', '.join(NAMES)}")
    if not 0 <= least <= 1:
        raise ValueError(f"the least probability of a language is 0 to 1, got {least}")
    if largest < 1:
        raise ValueError(f"the largest document must have 1 byte or more, got {largest}")
    if "language" in names:
        check_language(code)
    every: dict[str, Stage] = {
        "size": lambda text: by_size(text, largest),
        "language": lambda text: by_language(text, code, least),
        "repetition": lambda text: by_rules(text, REPETITION),
        "quality": lambda text: by_rules(text, GOPHER),
        "lines": lambda text: by_rules(c4_lines(text), C4),
        "words": lambda text: by_rules(text, with_words(unwanted)),
        "private": lambda text: hidden(text)[0],
    }
    return {name: every[name] for name in NAMES if name in names and (name != "words" or unwanted)}


def by_rules(text: str, rules: dict[str, Rule]) -> str | Dropped:
    """The text, if it breaks none of them."""
    reason = broken(text, rules)
    return Dropped(reason) if reason else text


def by_size(text: str, largest: int) -> str | Dropped:
    """The text, if it is not empty, not too long, and has no zero byte."""
    if not text.strip():
        return Dropped("empty")
    if (size := len(text.encode())) > largest:
        return Dropped(f"too long: {size:,} bytes, expected at most {largest:,}")
    return Dropped("binary: a zero byte") if "\0" in text else text


def by_language(text: str, code: str, least: float) -> str | Dropped:
    """The text, if it is in the language."""
    found, p = language(text)
    if found == code and p >= least:
        return text
    if not found:
        return Dropped("too few letters to tell a language")
    return Dropped(f"not surely {code}: {p:.2f}" if found == code else f"{found}: {p:.2f}")
