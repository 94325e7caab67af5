"""Documents that are copies of others: exact ones, and near ones by MinHash.

Broder 1997 (On the resemblance and containment of documents); Lee et al. 2022, arXiv:2107.06499,
section 4.2. Two documents are as near as the words in a row that they share:

    J(A, B) = |A n B| / |A u B|           A, B: their sets of n words in a row
    P[min h(A) = min h(B)] = J            h: a random order of all such sets' members      (1)

k such minima are a signature. It is cut into b bands of r = k / b minima. Documents that agree in a
whole band are candidates, and those of them with J >= a threshold are near:

    P[candidate] = 1 - (1 - J^r)^b        which is steepest about J = (1 / b)^(1 / r)       (2)

    h_i(x) = a_i x + c_i mod 2^32         a_i odd; x: 32 bits of SHA-1                      (3)

So what is kept of a document are the b hashes of its bands, 8 bytes each. Only candidates are read
a second time.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable

import numpy as np

N, K, BANDS = 5, 128, 16  # words in a row, minima, bands
NEAR = 0.8  # least J


def normal(text: str) -> str:
    """A text without what copies differ in: case, accents, digits, punctuation, kinds of space.

    As CCNet (Wenzek et al. 2020, arXiv:1911.00359, section 3), but words stay apart, and a text
    without a letter stays what it is.

    >>> normal("Café  No. 7,\\nParis"), normal("3.14  2.72")
    ('cafe no paris', '3.14 2.72')
    """
    plain = unicodedata.normalize("NFD", text.lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join((re.sub(r"[\W\d_]+", " ", plain).strip() or text).split())


def digest(text: str) -> int:
    """64 bits that are equal for exact copies, up to what `normal` leaves out.

    Among a million documents the chance that any other two have the same is 1 in 37 million.
    """
    return hashed(normal(text).encode())


def hashed(data: bytes) -> int:
    """64 bits of SHA-1."""
    return int.from_bytes(hashlib.sha1(data).digest()[:8], "little")


def shingles(text: str, n: int = N) -> set[str]:
    """The sets of n words in a row; of a shorter text all its words."""
    words = normal(text).split()
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def jaccard(a: set, b: set) -> float:
    """|a n b| / |a u b|; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


class MinHash:
    """Signatures of k minima, with orders drawn from a seed as the library datasketch draws them.
    """

    def __init__(self, k: int = K, seed: int = 1):
        rng = np.random.RandomState(seed)
        self.a = rng.randint(0, 1 << 31, k, np.uint32) * np.uint32(2) + np.uint32(1)
        self.c = rng.randint(0, 1 << 32, k, np.uint32)

    def __call__(self, members: Iterable[str]) -> np.ndarray:
        """(k,) uint32 of a set of texts; all ones of an empty one."""
        x = np.array([int.from_bytes(hashlib.sha1(member.encode()).digest()[:4], "little")
                      for member in members], np.uint32)
        return (x[:, None] * self.a + self.c).min(0, initial=2**32 - 1)  # eq. (1), (3)


def bands(signature: np.ndarray, count: int = BANDS) -> np.ndarray:
    """A hash of each band: (count,) uint64. ValueError if the bands are not of one size."""
    if len(signature) % count:
        raise ValueError(f"{len(signature)} minima cannot be cut into {count} bands of one size")
    return np.array([hashed(band.tobytes()) for band in signature.reshape(count, -1)], np.uint64)


def chance(J: float, k: int = K, count: int = BANDS) -> float:
    """That a pair as near as J is a candidate, eq. (2)."""
    return 1 - (1 - J ** (k // count)) ** count


def groups(hashes: np.ndarray, members: Callable[[int], set], near: float = NEAR) -> np.ndarray:
    """For each of D documents the first one of its group: (D,) int64.

    hashes: (D, b) of their bands. members(i): the set of document i, asked for candidates alone. A
    group are documents that are near one another, or linked by others that are.
    """
    first = np.arange(len(hashes))

    def top(i):
        while first[i] != i:
            first[i] = i = first[first[i]]
        return i

    for band in hashes.T:
        order = np.argsort(band, kind="stable")
        edges = np.flatnonzero(np.diff(band[order], prepend=~band[order[:1]]))
        sizes = np.diff(edges, append=len(order))
        for start, size in zip(edges[sizes > 1], sizes[sizes > 1]):
            same = order[start : start + size]
            for j, b in enumerate(same):
                for a in same[:j]:
                    if (x := top(a)) != (y := top(b)) and jaccard(members(a), members(b)) >= near:
                        first[max(x, y)] = min(x, y)
    return np.array([top(i) for i in range(len(first))], np.int64)
