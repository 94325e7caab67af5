"""Files of JSON lines: an object a line, of which something is made."""

import json
import os
from collections.abc import Callable
from typing import TypeVar

from minilm.files import FormatError, read_bytes, require_no_pointer
from minilm.strict import parse

Made = TypeVar("Made")


def load_lines(path: str | os.PathLike, make: Callable[[bytes], Made], what: str) -> list[Made]:
    """make(line) of each line of a file of `what`, such as "record".

    FormatError with the line for what is no JSON and for what `make` refuses by TypeError or
    ValueError; also for a file without a line, or with a pointer in its place. FileNotFoundError.
    """
    found, content = [], read_bytes(path)
    require_no_pointer(path, content)
    for number, line in enumerate(content.splitlines(), 1):
        try:
            found.append(make(line))
        except json.JSONDecodeError as error:
            said = f"line {number}: not valid JSON: {error.msg}, at column {error.colno}"
            raise FormatError(path, said) from error
        except (TypeError, ValueError, RecursionError) as error:
            raise FormatError(path, f"line {number}: {error}") from error
    if not found:
        raise FormatError(path, f"holds no {what}")
    return found


def first_has(path: str | os.PathLike, name: str) -> bool:
    """Whether the first line has this field. FormatError, FileNotFoundError."""
    first = read_bytes(path).lstrip().partition(b"\n")[0]
    try:
        return name in parse(first)
    except (TypeError, ValueError, RecursionError):
        return False
