"""Text to text: whatever the task is, the model reads a text and writes one.

Raffel et al. 2020, arXiv:1910.10683 (T5), sections 2.1 and 2.4. The name of the task stands in
front of what is read. A class is written as a word, and a similarity from 0 to 5 as a number such
as "3.8", rounded to the nearest 0.2: so regression is classification among 26 texts. Any other
answer is wrong. The task `similarity` of tasks.py is one; here are classes, and how far an answer
is from a number.
"""

import re
from collections.abc import Iterable, Sequence

from minilm.data.instructions import Record
from minilm.data.understanding import Example

MOST = 5.0  # the highest similarity


def classified(examples: Iterable[Example], classes: Sequence[str], instruction: str
               ) -> list[Record]:
    """Records that ask for the class of each example, in words; texts stand one after another.

    >>> classified([Example(("x = 1",), 1)], ("text", "code"), "Kind")[0].output
    'code'
    """
    return [Record(instruction, "\n".join(texts), classes[label], task=instruction.lower())
            for texts, label in examples]


def written(similarity: float) -> str:
    """A similarity from 0 to 5 as text, rounded to the nearest 0.2.

    >>> written(3.75), written(0), written(5 / 3)
    ('3.8', '0.0', '1.6')
    """
    if not 0 <= similarity <= MOST:
        raise ValueError(f"a similarity lies between 0 and {MOST:g}, got {similarity}")
    return f"{round(5 * similarity) / 5:.1f}"


def graded(record: Record, answer: str) -> float:
    """The similarity that an answer says.

    An answer that is no number from 0 to 5 counts as the end of the scale that is farther away from
    the record's output.

    >>> [graded(Record("Similarity", "ab ac", "2.4"), said) for said in ("3.0", "high")]
    [3.0, 5.0]
    """
    said = float(answer) if re.fullmatch(r"[0-9](\.[0-9]+)?", answer) else MOST + 1
    return said if said <= MOST else MOST * (float(record.output) <= MOST / 2)


def off(record: Record, answer: str) -> float:
    """How far the similarity that an answer says is from the one that the record's output names.

    >>> off(Record("Similarity", "ab ac", "2.4"), "3.0"), off(Record("S", "ab ac", "2.0"), "high")
    (0.6, 3.0)
    """
    return round(abs(graded(record, answer) - float(record.output)), 9)
