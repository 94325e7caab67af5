"""Faults of instruction data, planted: wrong answers, mixed formats, unclear instructions.

Lecture 004 wants of a good dataset that its instructions are clear and its formatting consistent.
Each function takes records and gives as many, in the same order.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from minilm.data.instructions import Record

FORMATS = ("{}", "Answer: {}", "{}.", "[{}]")  # of an output; the first one changes nothing


def with_wrong_answers(records: Sequence[Record], share: float, seed: int) -> list[Record]:
    """This share of the records has the output of another record of its task.

    A wrong answer looks like a right one. ValueError for a share below 0 or above 1, and for a task
    whose records have no output that would be wrong.
    """
    outputs = defaultdict(list)
    for record in records:
        outputs[record.task].append(record.output)
    found, rng = list(records), np.random.default_rng([seed, 6])
    for place in some(len(records), share, rng):
        record = records[place]
        right, others = {record.output, *record.references}, outputs[record.task]
        if right >= {*others}:
            raise ValueError(f"task {record.task!r} has no output that is wrong for {record!r:.99}")
        while (wrong := others[rng.integers(len(others))]) in right:
            pass
        found[place] = replace(record, output=wrong)
    return found


def in_formats(records: Sequence[Record], seed: int, formats: Sequence[str] = FORMATS
               ) -> list[Record]:
    """Each record with its output in one of the formats, which is drawn.

    >>> in_formats([Record("Double", "ab", "abab")], 0, ["<{}>"])[0].output
    '<abab>'
    """
    rng = np.random.default_rng([seed, 7])
    return [replace(record, output=formats[rng.integers(len(formats))].format(record.output))
            for record in records]


def in_any_format(record: Record, formats: Sequence[str] = FORMATS) -> Record:
    """The record with its right outputs in all formats among its references."""
    right = (record.output, *record.references)
    return replace(record, references=tuple(text.format(x) for x in right for text in formats))


def unclear(records: Sequence[Record], share: float, seed: int, instruction: str = "do it"
            ) -> list[Record]:
    """This share of the records has an instruction that does not say what is wanted.

    ValueError for a share below 0 or above 1.
    """
    found = list(records)
    for place in some(len(records), share, np.random.default_rng([seed, 8])):
        found[place] = replace(records[place], instruction=instruction)
    return found


def some(count: int, share: float, rng: np.random.Generator) -> list[int]:
    """The places of a share of so many, rounded, in a random order. ValueError for no share."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share must lie between 0 and 1, got {share}")
    return rng.permutation(count)[: round(share * count)].tolist()
