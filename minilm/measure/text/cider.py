"""CIDEr-D: how much of what is peculiar to its references an answer says.

Vedantam et al. 2015, CIDEr: Consensus-based image description evaluation, arXiv:1411.5726, sections
4 and 6. For n from 1 to 4 a text is a vector with a number for each of its n-grams w,

    g(w)      = (times in the text) ln(examples / max(1, examples with w in a reference))     (1)
    CIDEr_n   = mean over references of  g_answer . g_reference / (|g_answer| |g_reference|)  (2)
    CIDEr-D_n = 10 mean over references of  exp(-(l_answer - l_reference)^2 / (2 sigma^2))
                  min(g_answer, g_reference) . g_reference / (|g_answer| |g_reference|)       (4)
    CIDEr-D   = mean over n of CIDEr-D_n                                                      (5)

sigma is 6. So words that are in every example count nothing, and neither does repeating a rare one
(by min, and by the lengths l). An example's score lies between 0 and 10; the corpus's is the mean.
It has 10 only with one reference each: the mean over references that differ is less. With a single
example, or references that are the same for all, every ln is 0, and so is the score.

This is what COCO's program calls CIDEr, with which E2E is scored. The paper's CIDEr is eq. (2)
without min, lengths and 10. In (1) the paper divides by the text's n-grams, which the norms undo,
but for min. l is the number of tokens; the program's is that of bigrams, which gives the same
differences. The paper's CIDEr stems words, D does not; here tokens are the caller's choice. A side
without an n-gram, or without one that is peculiar, has no direction: its cosine is 0.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from minilm.measure.text.tokens import checked, mean, ngrams

N, SIGMA = 4, 6.0
of_sums = mean


def cider(answers: Sequence[Sequence], references: Sequence[Sequence[Sequence]]) -> float:
    """CIDEr-D of tokens, 0 to 10. TypeError and ValueError as in tokens.checked.

    >>> cider([["a", "cat"], ["a", "dog"]], [[["a", "cat"]], [["a", "dog"]]])  # n = 1 and 2 of 4
    5.0
    """
    return mean(per_example(answers, references).sum(0))


def per_example(answers, references) -> np.ndarray:
    """(CIDEr-D of the example, 1): (S, 2). How rare an n-gram is depends on all references."""
    examples = checked(answers, references)
    score = np.zeros(len(examples))
    for n in range(1, N + 1):
        wanted = [[ngrams(text, n) for text in right] for right in references]
        having = Counter(w for right in wanted for w in set().union(*right))

        def g(count):
            return {w: times * math.log(len(examples) / max(1, having[w]))  # eq. (1)
                    for w, times in count.items()}

        for i, (answer, right) in enumerate(examples):
            mine = g(ngrams(answer, n))
            for text, count in zip(right, wanted[i]):
                near = math.exp(-(len(answer) - len(text)) ** 2 / (2 * SIGMA**2))
                score[i] += 10 * near * cosine(mine, g(count)) / len(right)  # eq. (4)
    return np.stack([score / N, np.ones(len(examples))], axis=1)  # eq. (5)


def cosine(a: dict, b: dict) -> float:
    """Of a, cut to what b has, and b; 0 if one of them is all zeros."""
    dot = math.fsum(min(x, b[w]) * b[w] for w, x in a.items() if w in b)
    sizes = math.hypot(*a.values()) * math.hypot(*b.values())
    return dot / sizes if sizes else 0.0
