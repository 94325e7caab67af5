"""How many of some answers are different, as wholes and in their pieces.

Li et al. 2016, A diversity-promoting objective function for neural conversation models,
arXiv:1510.03055, section 5: distinct-n is the number of different n-grams of all answers divided by
the number of all n-grams. The same with whole answers is what Biderman et al. 2024,
arXiv:2405.09673, count of solutions of a problem (figure 5). Both fall as more answers are drawn,
so compare equal numbers of them.
"""

from collections.abc import Iterable, Sequence

from minilm.ranges import check, whole


def distinct(answers: Iterable) -> float:
    """The share of different ones among the answers, above 0, up to 1. ValueError without any.

    >>> distinct(["yes", "yes", "no", "yes"])
    0.5
    """
    answers = list(answers)
    if not answers:
        raise ValueError("there is no answer")
    return len(set(answers)) / len(answers)


def distinct_ngrams(answers: Iterable[Sequence], n: int = 2) -> float:
    """distinct-n: different n-grams / all n-grams of the answers, which are texts or tokens.

    An answer of fewer than n places has none. ValueError if no answer has one.

    >>> distinct_ngrams(["abab"], 2)  # ab ba ab
    0.6666666666666666
    """
    check({"n": whole(1)}, n=n)
    found = [tuple(answer[i : i + n]) for answer in answers for i in range(len(answer) - n + 1)]
    if not found:
        raise ValueError(f"no answer has {n} places")
    return len(set(found)) / len(found)
