"""The records of a run, metrics.jsonl: an object a line, of a step and of numbers."""

import json
import math
from pathlib import Path

from minilm.files import FormatError, read_json_lines
from minilm.stored import fits

NUMBER = float | bool | None  # None: it was not finite


def append_record(file: Path, record: dict):
    """Add a line; a number that is not finite becomes null."""
    with open(file, "a", encoding="utf-8") as opened:
        opened.write(json.dumps(_finite(record), allow_nan=False) + "\n")


def read_records(file: Path) -> list[dict]:
    """All lines, without a last one that a crash has cut short; [] if there is no file.

    FormatError if one is not an object with a step from 0 on, and else numbers or objects of them.
    """
    try:
        records = read_json_lines(file)
    except FileNotFoundError:
        return []
    for i, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise FormatError(file, f"line {i} is {record!r:.100}, expected an object")
        if not fits(record.get("step"), int) or record["step"] < 0:
            raise FormatError(file, f"line {i}: step is {record.get('step')!r:.100}, expected an "
                              "int from 0 on")
        for name, value in record.items():
            if not fits(value, NUMBER | dict[str, NUMBER]):
                raise FormatError(file, f"line {i}: {name} is {value!r:.100}, expected numbers")
    return records


def with_nan(x):
    """A record with nan where a number was not finite."""
    if isinstance(x, dict):
        return {name: with_nan(value) for name, value in x.items()}
    return math.nan if x is None else x


def _finite(x):
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x
