"""Answers that were given, beside what is right: a file of JSON lines, to be scored.

A line has the fields of instructions.Record and `answer`, a text that may be empty. It needs only
answer and output:

    {"answer": "It is a cat.", "output": "A cat.", "references": ["It is a cat."]}
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

from minilm.data.instructions import Record
from minilm.data.lines import first_has, load_lines
from minilm.strict import parse


@dataclass(frozen=True)
class Answered:
    """An answer, and what Record says of what is right."""

    answer: str
    output: str
    references: tuple[str, ...] = ()
    task: str = ""
    instruction: str = ""
    context: str = ""

    @property
    def right(self) -> tuple[str, ...]:
        """All texts that are right."""
        return (self.output, *self.references)


def answered(records: Sequence[Record], answers: Sequence[str]) -> list[Answered]:
    """The records with their answers."""
    return [Answered(answer, **vars(record)) for record, answer in zip(records, answers)]


def holds_answers(path: str | os.PathLike) -> bool:
    """Whether the first line of a JSONL file has an answer. FormatError, FileNotFoundError."""
    return first_has(path, "answer")


def load_answered(path: str | os.PathLike) -> list[Answered]:
    """The answers of a JSONL file. FormatError with line and field, FileNotFoundError."""
    return load_lines(path, lambda line: _answered(parse(line)), "answer")


def to_lines(found: Sequence[Answered]) -> bytes:
    """What load_answered reads, without empty fields but the answer."""
    objects = ({name: value for name, value in vars(one).items() if value or name == "answer"}
               for one in found)
    return "".join(json.dumps(obj, ensure_ascii=False) + "\n" for obj in objects).encode()


def _answered(fields_of) -> Answered:
    if not isinstance(fields_of, dict):
        raise TypeError(f"expected an object, got {type(fields_of).__name__}")
    for name in ("answer", "output"):
        if name not in fields_of:
            raise ValueError(f"{name}: the field is missing")
    known = [field.name for field in fields(Answered)]
    if unknown := [name for name in fields_of if name not in known]:
        raise ValueError(f"{unknown[0]!r:.80}: the field is unknown")
    references = fields_of.get("references", [])
    if not isinstance(references, list):
        raise TypeError(f"references: expected a list, got {type(references).__name__}")
    answer, own = fields_of["answer"], {"instruction": "", "context": "", **fields_of}
    if not isinstance(answer, str):
        raise TypeError(f"answer: expected str, got {type(answer).__name__}")
    own = {name: value for name, value in own.items() if name != "answer"}
    own["references"] = tuple(references)
    Record(**own | {"instruction": own["instruction"] or "none"})  # raises for what is no text
    return Answered(answer, **own)
