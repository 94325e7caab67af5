"""ROUGE: n-grams, or words in the right order, that an answer shares with a reference.

Lin 2004, ROUGE: a package for automatic evaluation of summaries, sections 2 and 3.1. With the match
of an answer and a reference,

    match = n-grams in both, each as often as in the one that has it less: ROUGE-n            (1)
          = length of their longest common subsequence: ROUGE-L
    P = match / n-grams of the answer     R = match / n-grams of the reference
    F = (1 + beta^2) P R / (R + beta^2 P)                                                     (4)

ROUGE-n in the paper is R alone. Today F with beta = 1 is what is called so, as by rouge-score, and
here. An example's score is that of its best reference, a corpus's is the mean of its examples.

ROUGE-L of COCO's programs, with which E2E is scored, is another number: it takes the largest P and
the largest R over references, which may be of two, and beta = 1.2. With one reference it differs
only by beta. ROUGE-Lsum, which takes the sentences of a summary one by one, is left out. Words are
not stemmed (rouge-score can stem them).
"""

from collections.abc import Sequence

import numpy as np

from minilm.measure.text.tokens import checked, mean, ngrams

BETA = 1.2  # COCO's
of_sums = mean


def rouge_n(answers: Sequence[Sequence], references: Sequence[Sequence[Sequence]], n: int) -> float:
    """ROUGE-n of tokens, 0 to 1. TypeError and ValueError as in tokens.checked.

    >>> rouge_n([["the", "cat"]], [[["the", "cat", "sat"]]], 2)  # P = 1, R = 1 / 2
    0.6666666666666666
    """
    return mean(per_example(answers, references, n).sum(0))


def rouge_l(answers: Sequence[Sequence], references: Sequence[Sequence[Sequence]]) -> float:
    """ROUGE-L of tokens, 0 to 1. TypeError and ValueError as in tokens.checked.

    >>> rouge_l([["the", "old", "cat"]], [[["the", "cat", "sat"]]])
    0.6666666666666666
    """
    return mean(per_example_l(answers, references).sum(0))


def coco_rouge_l(answers: Sequence[Sequence], references: Sequence[Sequence[Sequence]]) -> float:
    """ROUGE-L as COCO's programs have it, 0 to 1. TypeError and ValueError as in tokens.checked."""
    return mean(per_example_coco(answers, references).sum(0))


def per_example(answers, references, n: int) -> np.ndarray:
    """(best F of the example, 1): (S, 2)."""
    rows = []
    for answer, right in checked(answers, references):
        found = ngrams(answer, n)
        wanted = [ngrams(text, n) for text in right]
        rows.append((max(f((found & text).total(), found.total(), text.total())
                         for text in wanted), 1))  # & is min: eq. (1)
    return np.array(rows, float)


def per_example_l(answers, references) -> np.ndarray:
    """(best F of the example, 1): (S, 2)."""
    return np.array([(max(f(subsequence(answer, text), len(answer), len(text)) for text in right),
                      1) for answer, right in checked(answers, references)], float)


def per_example_coco(answers, references) -> np.ndarray:
    """(F of the largest P and the largest R, 1): (S, 2)."""
    rows = []
    for answer, right in checked(answers, references):
        match = [(subsequence(answer, text), len(text)) for text in right]
        P = max(same / max(len(answer), 1) for same, _ in match)
        R = max(same / max(size, 1) for same, size in match)
        rows.append((f_beta(P, R, BETA), 1))
    return np.array(rows, float)


def f(match: float, of_answer: int, of_reference: int) -> float:
    """F with beta = 1; 0 if nothing matches."""
    return f_beta(match / max(of_answer, 1), match / max(of_reference, 1), 1.0)


def f_beta(P: float, R: float, beta: float) -> float:
    """Eq. (4); 0 for P = R = 0."""
    return (1 + beta**2) * P * R / (R + beta**2 * P) if P and R else 0.0


def subsequence(a: Sequence, b: Sequence) -> int:
    """Length of the longest common subsequence: what is left of both if some tokens are dropped.

    longest[j] is that of what is read of a and of b[:j].

    >>> subsequence("house", "horse")
    4
    """
    longest = [0] * (len(b) + 1)
    for x in a:
        before = 0  # longest[j - 1] without x
        for j, y in enumerate(b, 1):
            both = before + 1 if x == y else max(longest[j], longest[j - 1])
            before, longest[j] = longest[j], both
    return longest[-1]
