"""All metrics that fit some answers, each with its 95 % interval.

BLEU and NIST count the tokens that mteval cuts, all others words in lower case, see tokens.py. So
BLEU is sacrebleu's of the same texts, and ROUGE is rouge-score's if they are in ASCII.

What fits is seen by what is right: shared n-grams are counted if a reference has four tokens, which
BLEU needs; Matthews if the right ones are few classes that come again; Pearson if they are numbers.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from minilm.measure.text import agreement, bleu, cider, meteor, nist, rouge
from minilm.measure.text.bootstrap import interval
from minilm.measure.text.tokens import mean, punctuated, words

CLASSES = 20  # at most; more different outputs are no classes


class Score(NamedTuple):
    """A metric of some answers, and the interval by examples."""

    value: float
    low: float
    high: float


SHARED = {  # name with unit: (tokens, per_example, of_sums, times)
    "BLEU, %": (punctuated, bleu.per_example, bleu.of_sums, 100),
    "NIST": (punctuated, nist.per_example, nist.of_sums, 1),
    "METEOR, %": (words, meteor.per_example, meteor.of_sums, 100),
    "ROUGE-1, %": (words, partial(rouge.per_example, n=1), mean, 100),
    "ROUGE-2, %": (words, partial(rouge.per_example, n=2), mean, 100),
    "ROUGE-L, %": (words, rouge.per_example_l, mean, 100),
    "ROUGE-L of COCO, %": (words, rouge.per_example_coco, mean, 100),
    "CIDEr-D": (words, cider.per_example, mean, 1),
}


def shared(answers: Sequence[str], references: Sequence[Sequence[str]], name: str
           ) -> tuple[np.ndarray, Callable]:
    """(rows of the examples, the score of their sums) of a metric of SHARED, of texts."""
    cut, per_example, of_sums, times = SHARED[name]
    rows = per_example([cut(text) for text in answers],
                       [[cut(text) for text in right] for right in references])
    return rows, lambda sums: times * of_sums(sums)


def overlap(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Every metric of SHARED, without intervals."""
    found = {}
    for name in SHARED:
        rows, of_sums = shared(answers, references, name)
        found[name] = of_sums(rows.sum(0))
    return found


def scores(answers: Sequence[str], references: Sequence[Sequence[str]], seed: int = 0,
           draws: int = 1000, watch: Callable = iter) -> tuple[dict[str, Score], dict[str, str]]:
    """({metric: Score}, {metric that does not fit: why}) of texts, each with those that are right.

    seed, draws: as in bootstrap.interval. watch(metrics) gives them again, such as tqdm. ValueError
    as in tokens.checked.
    """
    fitting, why = metrics(answers, references)
    found = {}
    for name in watch(list(fitting)):
        rows, of_sums = fitting[name]()
        found[name] = scored(rows, of_sums, seed, draws)
    return found, why


def scored(rows: np.ndarray, of_sums: Callable, seed: int = 0, draws: int = 1000) -> Score:
    """A metric's score and interval."""
    return Score(of_sums(rows.sum(0)), *interval(rows, of_sums, seed, draws))


def metrics(answers, references) -> tuple[dict[str, Callable], dict[str, str]]:
    """({metric: () -> (rows, of_sums)}, {metric that does not fit: why})."""
    found, why = {"exact match, %": lambda: (
        agreement.hits(answers, references), lambda sums: 100 * mean(sums))}, {}
    single = [right[0] for right in references if len({*right}) == 1]
    if any(len(punctuated(text)) > 3 for right in references for text in right):
        found |= {name: partial(shared, answers, references, name) for name in SHARED}
    else:
        why["BLEU, ..., CIDEr-D"] = "no reference has four tokens"
    if few_classes(single) and len(single) == len(answers):
        found["Matthews"] = lambda: (agreement.confusion(answers, single),
                                     agreement.matthews_of_sums)
    if len(single) < len(answers) or None in (right := [*map(number, single)]):
        return found, why
    said = [*map(number, answers)]
    if wrong := said.count(None):
        why["Pearson"] = f"{wrong} of {len(said)} answers are no numbers"
    elif min(len({*said}), len({*right})) < 2:
        why["Pearson"] = "all answers are the same" if len({*said}) < 2 else "all that is right is"
    else:
        found["Pearson"] = lambda: (agreement.moments(said, right), agreement.pearson_of_sums)
    return found, why


def few_classes(right: Sequence[str]) -> bool:
    """Are these the names of classes: a few different ones, each of which comes again?"""
    counts = Counter(right)
    return 2 <= len(counts) <= CLASSES and min(counts.values()) > 1


def number(text: str) -> float | None:
    """The finite number that a text is, if it is one.

    >>> number(" 3.5"), number("1e999"), number("four")
    (3.5, None, None)
    """
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
