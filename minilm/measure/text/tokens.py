"""Texts as tokens and their n-grams, which all metrics count.

How a text is cut decides a score, often by several points, so there are two ways, each known:

    punctuated  as mteval-v13a, the program that NIST gave out with its scores, and so as sacrebleu
                by default: punctuation is a token of its own, but within numbers; case is kept
    words       lower case, letters and digits alone. Of ASCII this is what rouge-score does; it
                drops all other letters, and here they are kept

COCO's programs cut as the Penn Treebank does and then drop punctuation. That differs from `words`
in contractions ("don't" is "do", "n't" there) and in hyphens, which join there.
"""

import re
from collections import Counter
from collections.abc import Sequence

ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}  # in this order
SPLITS = (  # in this order
    (r"([{-~[-` -&(-+:-@/])", r" \1 "),  # all of ASCII but ' , - . letters and digits
    (r"([^0-9])([.,])", r"\1 \2 "),  # a period or comma, unless a digit is before it
    (r"([.,])([^0-9])", r" \1 \2"),  # or after it
    (r"([0-9])(-)", r"\1 \2 "),
)


def punctuated(text: str) -> list[str]:
    """Words and punctuation, as mteval-v13a.

    >>> punctuated("At Anna's, soup is 3.50.")
    ['At', "Anna's", ',', 'soup', 'is', '3.50', '.']
    """
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, new in SPLITS:
        text = re.sub(pattern, new, text)
    return text.split()


def words(text: str) -> list[str]:
    """Letters and digits in a row, in lower case.

    >>> words("At Anna's, soup is 3.50.")
    ['at', 'anna', 's', 'soup', 'is', '3', '50']
    """
    return re.findall(r"[^\W_]+", text.lower())


def ngrams(tokens: Sequence, n: int) -> Counter:
    """How often each n tokens in a row are there.

    >>> ngrams("abab", 2)[("a", "b")]
    2
    """
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def checked(answers: Sequence[Sequence], references: Sequence[Sequence[Sequence]]):
    """(answer, its references), an example after another, all of tokens.

    TypeError for a text that is not cut into tokens. ValueError if there is no answer, if an answer
    has no reference, and if there are not as many lists of references as answers.
    """
    if len(answers) != len(references):
        raise ValueError(f"there are {len(answers)} answers, but references for {len(references)}")
    if not len(answers):
        raise ValueError("there is no answer to judge")
    for number, (answer, right) in enumerate(zip(answers, references)):
        if isinstance(right, str) or any(isinstance(text, str) for text in (answer, *right)):
            raise TypeError(f"example {number}: expected an answer of tokens and a list of "
                            f"references of tokens, got {answer!r:.80} and {right!r:.80}")
        if not len(right):
            raise ValueError(f"example {number} has no reference: {answer!r:.80}")
    return list(zip(answers, references))


def mean(sums: Sequence[float]) -> float:
    """of_sums of a metric whose rows are (score of the example, 1)."""
    return float(sums[0] / sums[1])
