"""Passages that stand twice: all but the first are cut out.

Lee et al. 2022, arXiv:2107.06499, section 4.1, who find them with a suffix array. Only passages of
at least L characters matter, so it is enough to know which windows of L characters are equal. Karp,
Miller & Rosenberg 1972 number them by doubling:

    name_1(i)     = the character at i
    name_2m(i)    = the number of the pair (name_m(i), name_m(i + m))
    name_L(i)     = the number of the pair (name_m(i), name_m(i + L - m))        m < L <= 2 m

Two places have the same name if the same L characters begin there: for certain, without hashes.
Takes about 80 bytes a character.
"""

from collections.abc import Sequence

import numpy as np


def names(text: np.ndarray, L: int) -> np.ndarray:
    """(N,) integers -> (N - L + 1,): equal numbers for equal windows of L."""
    name = np.unique(text, return_inverse=True)[1].astype(np.int64)
    m = 1
    while m < L:
        step = min(m, L - m)
        pairs = name[:-step] * (name.max(initial=0) + 1) + name[step:]
        name = np.unique(pairs, return_inverse=True)[1]
        m += step
    return name


def without_repeats(documents: Sequence[str], L: int = 200) -> list[str]:
    """The documents without what stood before in L characters or more, in them or in an earlier
    one.

    A window that reaches from one document into the next does not count.
    """
    if L < 1:
        raise ValueError(f"L must be at least 1, got {L}")
    # A document ends with a number of its own, so no window across an end is equal to another.
    parts = [np.append(code_points(text), -1 - i) for i, text in enumerate(documents)]
    text = np.concatenate([np.zeros(0, np.int64), *parts])
    if len(text) < L:
        return list(documents)
    name = names(text, L)
    again = np.ones(len(name), bool)
    again[np.unique(name, return_index=True)[1]] = False
    starts = np.flatnonzero(again)
    covered = np.zeros(len(text) + 1, np.int64)
    np.add.at(covered, starts, 1)
    np.add.at(covered, starts + L, -1)
    stays = np.split(np.cumsum(covered[:-1]) == 0, np.cumsum([len(part) for part in parts])[:-1])
    return ["".join(map(chr, part[kept][:-1])) for part, kept in zip(parts, stays)]


def code_points(text: str) -> np.ndarray:
    """(N,) int64."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
