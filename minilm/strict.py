"""Strict JSON: what `json` takes beyond the standard is refused, and what would do harm later."""

import json
import math

DEEPEST = 100  # levels


def parse(data: bytes) -> object:
    """The value of a JSON text in UTF-8.

    ValueError or RecursionError for a repeated key, for NaN, infinity and numbers that become
    infinite, for half of a surrogate pair, and for lists and objects that are too deep.
    """
    text = data.decode()
    value = json.loads(text, object_pairs_hook=_without_repeats, parse_float=_finite,
                       parse_constant=_refuse_constant)
    _require_shallow(value)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()  # refuses half of a pair
    return value


def _require_shallow(value):
    """ValueError for lists and objects in each other DEEPEST times and more.

    What goes through a value recursively, such as repr, would fail, and nothing of use is so deep.
    """
    level = [value]
    for _ in range(DEEPEST):
        level = [child for parent in level if isinstance(parent, (dict, list))
                 for child in (parent.values() if isinstance(parent, dict) else parent)]
        if not level:
            return
    raise ValueError(f"lists or objects are nested {DEEPEST} times or more")


def _without_repeats(pairs):
    obj = {}
    for key, value in pairs:
        if key in obj:
            raise ValueError(f"key {key!r} appears twice")
        obj[key] = value
    return obj


def _finite(number):
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is too large")
    return value


def _refuse_constant(name):
    raise ValueError(f"{name} is not a JSON number")
