"""BLEU: how many n-grams of the answers stand in a reference, and whether answers are too short.

Papineni et al. 2002, BLEU: a method for automatic evaluation of machine translation, sections 2.1
to 2.3. Over all answers of a corpus, for n from 1 to 4,

    p_n  = sum min(count in the answer, largest count in one of its references)               (1)
           / number of n-grams of the answers
    BP   = 1 if c > r, else exp(1 - r / c)                                                    (2)
    BLEU = BP exp(sum_n ln(p_n) / 4)                                                          (3)

    c   tokens of all answers        r   the same of the references: of each answer's the one whose
                                         length is nearest, the shorter one of two

BLEU of a corpus is not the mean of its answers' BLEU. What other programs may do: they give 100
times this; some (nltk, by default) take the geometric mean with some p_n = 0 as a tiny number and
not as 0; sacrebleu by default smooths a p_n of 0. Here, as in the paper, nothing is smoothed: if no
4-gram is right, BLEU is 0. Case and tokens are the caller's choice; sacrebleu's are those that
tokens.punctuated cuts, and E2E's program makes them lower case.
"""

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import or_

import numpy as np

from minilm.measure.text.tokens import checked, ngrams

N = 4


def bleu(answers: Sequence[Sequence], references: Sequence[Sequence[Sequence]]) -> float:
    """BLEU of tokens, 0 to 1. TypeError and ValueError as in tokens.checked.

    >>> round(bleu(["the cat sat on a mat".split()], [["the cat sat on the mat".split()]]), 3)
    0.537
    """
    return of_sums(per_example(answers, references).sum(0))


def per_example(answers, references) -> np.ndarray:
    """Of each answer the matches for n = 1 .. 4, its n-grams for n = 1 .. 4, c and r: (S, 10)."""
    rows = []
    for answer, right in checked(answers, references):
        matches, counts = [], []
        for n in range(1, N + 1):
            found = ngrams(answer, n)
            allowed = reduce(or_, (ngrams(text, n) for text in right), Counter())  # the largest
            matches.append((found & allowed).total())  # & is min: eq. (1)
            counts.append(found.total())
        c = len(answer)
        r = min((abs(len(text) - c), len(text)) for text in right)[1]
        rows.append([*matches, *counts, c, r])
    return np.array(rows, float)


def of_sums(sums: np.ndarray) -> float:
    """BLEU from the sums of rows (10,)."""
    matches, counts, (c, r) = sums[:N], sums[N : 2 * N], sums[2 * N :]
    if not matches.all():
        return 0.0
    BP = 1.0 if c > r else np.exp(1 - r / c)  # eq. (2)
    return float(BP * np.exp(np.log(matches / counts).mean()))  # eq. (1), (3)
