"""Byte-pair encoding: which bytes become one token is learned from text.

Sennrich et al. 2016, arXiv:1508.07909, algorithm 1, on bytes instead of characters, as in GPT-2
(Radford et al. 2019):

    cut the texts into words, and the words into bytes
    make one token of the two neighbours that stand side by side most often; and so on

The order in which pairs were found is the tokenizer: a text's words go through the same merges in
the same order. So the first merges of a long list make a tokenizer of fewer tokens.

BPETokenizer in tokenizers.py does this through a library, which is faster. Both find the same
merges. Of pairs that are equally frequent the one whose first token is older comes first, then the
one whose second is; the bytes that can be seen are the oldest. One thing differs: a number that is
no digit, such as ², is a letter here.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from minilm.data.tokenizers import END

Pair = tuple[bytes, bytes]

# GPT-2's words: an ending such as 's; letters, digits or signs, with the space in front of them.
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
SEEN = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
BYTES = [bytes([b]) for b in sorted(range(256), key=lambda b: (b not in SEEN, b))]


class Merge(NamedTuple):
    """Two tokens that become one, and how often they stood side by side at that moment."""

    pair: Pair
    count: int


def learn(documents: Iterable[str], vocab_size: int) -> list[Merge]:
    """The merges that make vocab_size tokens out of the 256 bytes; fewer if no pair is left."""
    if vocab_size < 256:
        raise ValueError(f"vocab_size must be at least the 256 bytes, got {vocab_size}")
    words = Counter(word for document in documents for word in WORD.findall(document))
    parts = {word: split(word) for word in words}
    ids = {token: id for id, token in enumerate(BYTES)}
    counts, where = Counter(), defaultdict(set)
    for word, times in words.items():
        for pair in pairwise(parts[word]):
            counts[pair] += times
            where[pair].add(word)
    queue = [(-count, ids[a], ids[b], (a, b)) for (a, b), count in counts.items()]
    heapify(queue)
    found = []
    while queue and len(ids) < vocab_size:
        count, *_, pair = heappop(queue)
        if not count or -count != counts[pair]:  # a pair is here with every count that it had
            continue
        found.append(Merge(pair, -count))
        ids.setdefault(b"".join(pair), len(ids))  # another pair may have made it before
        changed = set()
        for word in where.pop(pair):
            before, parts[word] = parts[word], merged(parts[word], pair)
            for old in pairwise(before):
                counts[old] -= words[word]
            for new in pairwise(parts[word]):
                counts[new] += words[word]
                where[new].add(word)
            changed |= {*pairwise(before), *pairwise(parts[word])}
        for a, b in changed:
            heappush(queue, (-counts[a, b], ids[a], ids[b], (a, b)))
    return found


def split(word: str) -> list[bytes]:
    """The bytes of a word, each a token."""
    return [bytes([b]) for b in word.encode()]


def merged(tokens: Sequence[bytes], pair: Pair) -> list[bytes]:
    """The tokens, with one for each occurrence of the pair, from the left.

    >>> merged([b"a", b"a", b"a", b"b"], (b"a", b"a"))
    [b'aa', b'a', b'b']
    """
    out, i = [], 0
    while i < len(tokens):
        both = tuple(tokens[i : i + 2]) == pair
        out.append(b"".join(pair) if both else tokens[i])
        i += 1 + both
    return out


class LearnedTokens:
    """A tokenizer of 256 bytes, merges and an end, to look at: see tokenizers.py for what its
    attributes mean. ids: {token: id}.
    """

    mask = None

    def __init__(self, merges: Sequence[Merge]):
        self.rank = {merge.pair: i for i, merge in reversed([*enumerate(merges)])}
        made = dict.fromkeys(b"".join(merge.pair) for merge in merges)  # two pairs can make one
        self.ids = {token: id for id, token in enumerate([*BYTES, *made])}
        self.end = len(self.ids)
        self.special = {END: self.end}
        self.vocab_size = self.end + 1
        self.known = {}

    def tokens(self, text: str) -> list[bytes]:
        """Joined, they are the text's bytes."""
        return [token for word in WORD.findall(text) for token in self._of_word(word)]

    def encode(self, text: str) -> np.ndarray:
        return np.array([self.ids[token] for token in self.tokens(text)], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        tokens = [*self.ids]
        return b"".join(tokens[id] for id in ids if id != self.end).decode(errors="replace")

    def _of_word(self, word):
        if word not in self.known:
            tokens = split(word)
            while oldest := min((pair for pair in pairwise(tokens) if pair in self.rank),
                                key=self.rank.get, default=None):
                tokens = merged(tokens, oldest)
            self.known[word] = tokens
        return self.known[word]
