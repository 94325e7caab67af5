"""Dataclasses that come back from JSON: every field is checked against its annotation.

    JSON     a list       an object       a whole number   a number   null
    field    tuple[...]   dict[str, ...]  int              float      None

Numbers must fit 64 bits, so that nothing later overflows. Infinity, for which JSON has no name, is
the word "inf".
"""

import math
import os
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from minilm.files import FormatError

LARGEST = {int: 2**63 - 1, float: 1.7976931348623157e308}


def revive(kind: type, stored, path: str | os.PathLike, inside: str = ""):
    """The dataclass `kind` with the fields of `stored`, which was read from the file `path`.

    inside: where in the file, for messages. FormatError, naming the field, if one is missing,
    unknown, or not what its annotation says, and if `kind` refuses a value.
    """
    where = f"{inside}: " if inside else ""
    if not isinstance(stored, dict):
        raise FormatError(path, f"{where}is {_short(stored)}, expected an object")
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}  # without class variables
    if missing := sorted(names - stored.keys()):
        raise FormatError(path, f"{where}{missing} missing")
    if unknown := sorted(stored.keys() - names):
        raise FormatError(path, f"{where}{unknown} unknown")
    found = {}
    for name, value in stored.items():
        infinite = value == "inf" and hints[name] is float
        if not infinite and not fits(value, hints[name]):
            wanted = hints[name].__name__ if type(hints[name]) is type else hints[name]
            raise FormatError(path, f"{where}{name} is {_short(value)}, expected {wanted}")
        found[name] = math.inf if infinite else tuple(value) if type(value) is list else value
    try:
        return kind(**found)
    except (TypeError, ValueError) as error:
        raise FormatError(path, f"{where}{error}") from None


def fits(value: Any, hint: Any) -> bool:
    """Can the JSON value be a field with this annotation?

    >>> fits([1, 2.5], tuple[float, ...]), fits([1], tuple[int, int]), fits(True, int)
    (True, False, False)
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is None or hint is NoneType:
        return value is None
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if hint in (int, float):
        whole = type(value) is int or (hint is float and type(value) is float)
        return whole and not abs(value) > LARGEST[hint]  # nan is a float
    if (origin or hint) is tuple:
        if not isinstance(value, list):
            return False
        args = args[:1] * len(value) if Ellipsis in args else args
        return not args or (len(args) == len(value) and all(map(fits, value, args)))
    if (origin or hint) is dict:
        return isinstance(value, dict) and (
            not args or all(fits(v, args[1]) for v in value.values()))
    return type(value) is hint


def _short(value) -> str:
    return f"{value!r:.100}"
