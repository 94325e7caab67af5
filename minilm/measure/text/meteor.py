"""METEOR: which words an answer shares with a reference, and in how many pieces.

Lavie & Agarwal 2007, METEOR: an automatic metric for MT evaluation with high levels of correlation
with human judgments, section 2, after Banerjee & Lavie 2005. Words of an answer h and a reference r
are matched one to one: first equal words, then, among what is left, words of equal stem. In each
stage as many are matched as can be, so that the fewest pairs cross. With m matches in the fewest
chunks, each of which is a row of neighbours in both,

    P = m / |h|     R = m / |r|     F = P R / (alpha P + (1 - alpha) R)
    penalty = gamma (chunks / m)^beta      METEOR = F (1 - penalty)

alpha = .9, beta = 3, gamma = .5, as in the paper for English. An example has the score of its best
reference. An answer that is its reference, of m words, has 1 - .5 / m^3.

What is left out: synonyms, which need WordNet, and paraphrases, which need tables of METEOR 1.5's.
Such matches can only be more, so its scores are others, and E2E's, which are of 1.5 with parameters
of its own, do not compare. nltk's meteor_score has synonyms, and otherwise the same formula. But
for a repeated word it takes the last one that is free, which may cross more than it must:

    h = the cat      r = the cat sat on the mat      nltk: two chunks; here, as in the paper: one

The score of a corpus is the mean of its examples. (The paper's program instead adds up m, chunks
and lengths of each example's best reference, and scores that once.) Words are in lower case, as
tokens.words gives them.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from minilm.measure.text.porter import stem
from minilm.measure.text.tokens import checked, mean

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5
BEAM = 40  # matchings that are followed; METEOR 1.5's own number
of_sums = mean


def meteor(answers: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
           ) -> float:
    """The mean METEOR of words, 0 to 1. TypeError and ValueError as in tokens.checked.

    >>> meteor(["the cat".split()], [["the cat sat on the mat".split()]])  # F = 2 / 5.6, one chunk
    0.33482142857142855
    """
    return mean(per_example(answers, references).sum(0))


def per_example(answers, references) -> np.ndarray:
    """(METEOR with the example's best reference, 1): (S, 2)."""
    return np.array([(max(score(*matched(answer, text), len(answer), len(text)) for text in right),
                      1) for answer, right in checked(answers, references)], float)


def score(m: float, chunks: float, h: float, r: float) -> float:
    """METEOR of m matches; 0 if there is none."""
    if not m:
        return 0.0
    P, R = m / h, m / r
    return float(P * R / (ALPHA * P + (1 - ALPHA) * R) * (1 - GAMMA * (chunks / m) ** BETA))


def matched(h: Sequence[str], r: Sequence[str]) -> tuple[int, int]:
    """(m, chunks)."""
    equal = matching(h, r)
    kept = [{i: number for number, i in enumerate(side)} for side in zip(*equal)] or [{}, {}]
    stems = [[("matched", kept[side][i]) if i in kept[side] else stem(word)
              for i, word in enumerate(text)] for side, text in enumerate((h, r))]
    pairs = matching(*stems)
    return len(pairs), sum(pair != (i + 1, j + 1) for pair, (i, j) in
                           zip(pairs, [(-2, -2), *pairs]))


def matching(h: Sequence[Hashable], r: Sequence[Hashable]) -> list[tuple[int, int]]:
    """The most pairs (i, j) with h[i] = r[j] that cross least; of several such, fewest chunks.

    Pairs of equal words that cross could be uncrossed, so j rises with i among them. Which of them
    stay alone is tried: from left to right, the best BEAM beginnings are followed, which are all if
    few words are repeated.
    """
    wanted, left, places = Counter(h) & Counter(r), Counter(h), defaultdict(list)
    for j, word in enumerate(r):
        places[word].append(j)
    begun = [(0, 0, ())]  # (crossings, chunks, pairs)
    for i, word in enumerate(h):
        left[word] -= 1
        if not wanted[word]:
            continue
        longer = []
        for crossings, chunks, pairs in begun:
            used = [j for k, j in pairs if h[k] == word]
            need = wanted[word] - len(used)
            if left[word] >= need:  # this one may stay alone
                longer.append((crossings, chunks, pairs))
            free = [j for j in places[word] if not used or j > used[-1]]
            for j in free[: len(free) - need + 1] if need else ():
                longer.append((crossings + sum(other > j for _, other in pairs),
                               chunks + (pairs[-1:] != ((i - 1, j - 1),)), (*pairs, (i, j))))
        begun = sorted(longer)[:BEAM]
    return list(begun[0][2])
