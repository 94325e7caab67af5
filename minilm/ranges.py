"""The ranges of settings: which numbers each may be, and what is said of one that it may not be.

    RANGES = {"batch": whole(1), "lr": AT_LEAST_0, "clip": LIMIT}
    check(RANGES, batch=16, lr=float("nan"), clip=1.0)
    # ValueError: lr must be finite and at least 0, got nan

Each class or function that takes settings has one such table. A program's settings are checked by
the same tables before anything else happens, so the library and the command line say the same.
"""

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple


class Range(NamedTuple):
    """What a setting may be."""

    words: str  # what follows "must be"
    holds: Callable  # value -> bool
    kind: type = numbers.Real
    optional: bool = False  # may it be None?
    many: bool = False  # is it a tuple or a list, each item of which must be in the range?


FINITE = Range("finite", math.isfinite)
AT_LEAST_0 = Range("finite and at least 0", lambda x: 0 <= x < math.inf)
POSITIVE = Range("positive and finite", lambda x: 0 < x < math.inf)
LIMIT = Range("positive", lambda x: x > 0)  # infinity means that there is none
BELOW_1 = Range("at least 0 and below 1", lambda x: 0 <= x < 1)


def whole(least: int, most: float = math.inf) -> Range:
    """Whole numbers from least to most."""
    words = f"at least {least}" if most == math.inf else f"{least} to {most}"
    return Range(words, lambda x: least <= x <= most, numbers.Integral)


def power_of_two(least: int) -> Range:
    """Powers of two from least up."""
    return Range(f"a power of two from {least} up", lambda n: n >= least and not n & (n - 1),
                 numbers.Integral)


def optional(wanted: Range) -> Range:
    """The range, or None."""
    return wanted._replace(optional=True)


def each(wanted: Range) -> Range:
    """Tuples or lists, each item of which is in the range."""
    return wanted._replace(many=True)


def one_of(*words: str) -> Range:
    """One of these words."""
    return Range(f"one of {words}", lambda x: x in words, str)


def check(ranges: dict[str, Range], **settings):
    """ValueError for the first setting out of its range, TypeError if it is no such number at all.

    >>> check({"lr": POSITIVE}, lr=0.0)
    Traceback (most recent call last):
    ValueError: lr must be positive and finite, got 0.0
    """
    for name, wanted in ranges.items():
        given = settings[name]
        if wanted.many and not isinstance(given, (tuple, list)):
            raise TypeError(f"{name} must be several, each {wanted.words}; got {given!r}")
        for value in given if wanted.many else (given,):
            if value is None and wanted.optional:
                continue
            if not isinstance(value, wanted.kind) or isinstance(value, bool):
                kind = {numbers.Real: "a number", numbers.Integral: "a whole number", str: "a word"}
                raise TypeError(f"{name} must be {kind[wanted.kind]}, {wanted.words}; got "
                                f"{value!r}")
            if not wanted.holds(value):
                raise ValueError(f"{name} must be {wanted.words}, got {value}")


def check_stored(ranges: dict[str, Range], **settings):
    """`check`, and ValueError for a whole number that `stored` would refuse as it is read again."""
    check(ranges, **settings)
    for name, given in settings.items():
        for value in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(value, numbers.Integral) and not -(2**63) <= value < 2**63:
                raise ValueError(f"{name} must fit 64 bits, got {value}")
