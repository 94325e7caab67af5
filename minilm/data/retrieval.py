"""Which texts answer a question: BM25, which counts words.

Robertson & Zaragoza 2009, The Probabilistic Relevance Framework: BM25 and Beyond, section 3.4:

    score(q, d) = sum over q's words of  idf  f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))
    idf         = ln((N - n + 1/2) / (n + 1/2))

    f    how often d has the word       n   how many of the N texts have it
    k1   how soon more of it stops to count       b   how much a long text is held against it

A word in more than half of the texts would have a negative idf. Such a one gets `eps` times the
mean idf of all words, as in the library rank-bm25, whose BM25Okapi gives the same scores.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np


class BM25:
    """An index of texts. ValueError if there is none."""

    def __init__(self, texts: Sequence[str], k1: float = 1.5, b: float = 0.75, eps: float = 0.25):
        if not texts:
            raise ValueError("there is no text to look for")
        self.counts = [Counter(words(text)) for text in texts]
        size = np.array([count.total() for count in self.counts], float)
        self.k1, self.weight = k1, k1 * (1 - b + b * size / max(1, size.mean()))  # (N,)
        N, n = len(texts), Counter(word for count in self.counts for word in count)
        self.idf = {word: float(np.log((N - m + 0.5) / (m + 0.5))) for word, m in n.items()}
        least = eps * float(np.mean(list(self.idf.values()) or [0.0]))
        self.idf = {word: idf if idf >= 0 else least for word, idf in self.idf.items()}

    def scores(self, question: str) -> np.ndarray:
        """Of each text: (N,)."""
        total = np.zeros(len(self.counts))
        for word in words(question):
            f = np.array([count[word] for count in self.counts])
            total += self.idf.get(word, 0.0) * f * (self.k1 + 1) / (f + self.weight)
        return total

    def best(self, question: str, k: int = 1) -> list[int]:
        """The numbers of the k best texts, the best first; of equal ones the earlier first."""
        return np.argsort(-self.scores(question), kind="stable")[:k].tolist()


def words(text: str) -> list[str]:
    """The words, in lower case.

    >>> words("Anna's cat: 3 mice!")
    ['anna', 's', 'cat', '3', 'mice']
    """
    return re.findall(r"\w+", text.lower())
