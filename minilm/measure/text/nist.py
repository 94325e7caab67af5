"""NIST: BLEU's n-grams, weighed by how much they tell.

Doddington 2002, Automatic evaluation of machine translation quality using n-gram co-occurrence
statistics. With n from 1 to 5,

    info(w_1 ... w_n) = log2(count(w_1 ... w_(n-1)) / count(w_1 ... w_n))                      (2)
    NIST = sum_n [sum of info of the matches / number of n-grams of the answers]
           exp(beta ln(min(L / L_ref, 1))^2)                                                  (3)

Counts are over all references; for n = 1 the numerator is the number of their tokens. L are the
tokens of the answers, and L_ref of their references, of each answer's the mean. beta makes the
factor 1/2 if L / L_ref is 2/3. A match counts as often as it is in one reference, at most.

The mean is arithmetic, so a score is not 0 because no 5-gram is right, and there is no top. An
answer that is its reference need not have the highest score: one that leaves out some of what is
common tells more a token. Scores of corpora with other references do not compare.

Several references are pooled, as the program mteval does: a match may be in any of them. nltk's
corpus_nist instead chooses for each answer and n the one reference with the best ratio, and takes
that one's length. With one reference each the two are equal. mteval, and E2E's program after it,
make all of it lower case if not told otherwise; here case is the caller's choice.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import or_

import numpy as np

from minilm.measure.text.tokens import checked, ngrams

N = 5
BETA = math.log(1 / 2) / math.log(2 / 3) ** 2


def nist(answers: Sequence[Sequence], references: Sequence[Sequence[Sequence]]) -> float:
    """NIST of tokens, at least 0. TypeError and ValueError as in tokens.checked.

    >>> nist([["a", "b"]], [[["a", "b"]]])  # info(a) = info(b) = 1 bit; b is sure after a
    1.0
    """
    return of_sums(per_example(answers, references).sum(0))


def information(references) -> dict[tuple, float]:
    """Bits of each n-gram of the references, n from 1 to 5: eq. (2)."""
    texts = [text for right in references for text in right]
    count = Counter({(): sum(map(len, texts))})
    for n in range(1, N + 1):
        for text in texts:
            count.update(ngrams(text, n))
    return {gram: math.log2(count[gram[:-1]] / count[gram]) for gram in count if gram}


def per_example(answers, references) -> np.ndarray:
    """Of each answer, for n = 1 .. 5 the information of its matches, then its n-grams, L and L_ref:
    (S, 12). The information is that of these references, however the rows are summed."""
    examples, info, rows = checked(answers, references), information(references), []
    for answer, right in examples:
        told, counts = [], []
        for n in range(1, N + 1):
            found = ngrams(answer, n)
            allowed = reduce(or_, (ngrams(text, n) for text in right), Counter())
            told.append(math.fsum(info[gram] * times for gram, times in (found & allowed).items()))
            counts.append(found.total())
        rows.append([*told, *counts, len(answer), sum(map(len, right)) / len(right)])
    return np.array(rows, float)


def of_sums(sums: np.ndarray) -> float:
    """NIST from the sums of rows (12,)."""
    told, counts, (L, L_ref) = sums[:N], sums[N : 2 * N], sums[2 * N :]
    if not L or not L_ref:
        return 0.0
    penalty = math.exp(BETA * math.log(min(L / L_ref, 1)) ** 2)
    return float((told / np.maximum(counts, 1)).sum() * penalty)  # eq. (3)
