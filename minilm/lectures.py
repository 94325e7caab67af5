"""What the lectures say, line by line, and what shows it: claims of experiments, other commands.

A lecture is a file NUMBER.toml with its title and its lines:

    [[lines]]
    id = "2.13"
    at = "134"                              lines of the lecture's text; "004:12" for another one's
    says = "Can the rank be adjusted ...?"  in words of our own
    claims.adaptive_rank = ["late layers*"] an experiment, and which of its claims judge the line
    commands.lectures = ["GPT-3"]           a command of run.toml, and how the parts of its output
                                            begin that show the line; no part: all of it

`wrong` says why a slide is wrong, `note` what else there is to say, and `not_small` why no small
model can show it. The verdicts are not in these files: they are looked up in the kept results.
"""

import tomllib
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from minilm.files import FormatError, read_bytes
from minilm.results import Result
from minilm.stored import fits, revive


@dataclass(frozen=True)
class Line:
    """Something that a lecture says."""

    id: str
    at: str
    says: str
    claims: dict[str, tuple[str, ...]]  # experiment -> patterns of claims; * is any text
    commands: dict[str, tuple[str, ...]]  # command -> the first words of parts of its output
    wrong: str
    note: str
    not_small: str

    def __post_init__(self):
        if not (self.claims or self.commands or self.not_small):
            raise ValueError(f"the line {self.id} needs claims, commands or not_small")


@dataclass(frozen=True)
class Lecture:
    """A lecture; `number` is that of its file."""

    number: str
    title: str
    lines: tuple[Line, ...]


EMPTY = {"claims": {}, "commands": {}, "wrong": "", "note": "", "not_small": ""}


def read_toml(path: Path) -> dict:
    """A TOML file. FormatError if it is none, FileNotFoundError if it is not there."""
    try:
        return tomllib.loads(read_bytes(path).decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FormatError(path, str(error)) from None


def read_lectures(folder: Path) -> list[Lecture]:
    """The lectures of a folder, in order. FormatError names the file, the line and the field."""
    found = []
    for path in sorted(folder.glob("[0-9]*.toml")):
        stored = read_toml(path)
        if not fits(lines := stored.get("lines"), tuple[dict, ...]):
            raise FormatError(path, f"lines is {lines!r:.100}, expected tables")
        lines = [revive(Line, EMPTY | line, path, f"lines[{i}]") for i, line in enumerate(lines)]
        lecture = revive(Lecture, stored | {"number": path.stem, "lines": []}, path)
        found.append(replace(lecture, lines=tuple(lines)))
    return found


def chosen(patterns: tuple[str, ...], texts: list[str]) -> list[str]:
    """The texts that fit one of the patterns, in their order.

    >>> chosen(["late *", "*q and k"], ["v gets more than q and k", "late layers get more"])
    ['v gets more than q and k', 'late layers get more']
    """
    return [text for text in texts if any(fnmatchcase(text, p) for p in patterns)]


def judges(line: Line, results: dict[str, Result]) -> dict[str, list[dict]]:
    """Experiment -> the claims that judge a line, with their verdicts; [] without a result."""
    found = {}
    for name, patterns in line.claims.items():
        claims = results[name].claims if name in results else ()
        texts = chosen(patterns, [claim["claim"] for claim in claims])
        found[name] = [claim for claim in claims if claim["claim"] in texts]
    return found


def parts(output: str, begins: tuple[str, ...]) -> list[str]:
    """The parts of an output, between empty lines, that begin with these words.

    >>> parts("a 1\\n  2\\n\\nb 3\\n", ["b"])
    ['b 3']
    """
    blocks = [block.strip("\n") for block in output.split("\n\n")]
    return [block for begin in begins for block in blocks if block.strip().startswith(begin)]
