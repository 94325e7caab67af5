"""Records the other way round: out of an answer, what was asked.

Lecture 003 plays it as an "uno reverse card": given a response, predict the instruction. A record
that is swapped asks ASKED about the output, and wants the prompt:

    Upper                 What was asked?
    abc           <->     ABC
    -> ABC                -> Upper
                             abc
"""

from collections.abc import Iterable
from dataclasses import replace

from minilm.data.instructions import Record, prompt

ASKED = "What was asked?"
SUFFIX = ", reversed"  # of the task's name: "sql" is scored by running queries, its questions not


def swap(record: Record) -> Record:
    """The record the other way round, or one that asks ASKED about a context turned back.

    So swapping twice gives the record again, if its instruction is a single line. If it has more
    of them, all but the first come back as context; the prompt is the same, to the letter. The
    references are left out: they are other answers to one question, and no other questions.
    """
    if record.instruction == ASKED and record.context:
        instruction, context = parted(record.output)
        return Record(instruction, context, record.context, task=record.task.removesuffix(SUFFIX))
    asked = record.instruction + (f"\n{record.context}" if record.context else "")
    return Record(ASKED, record.output, asked, task=record.task and record.task + SUFFIX)


def parted(asked: str) -> tuple[str, str]:
    """(instruction, context) of the text that a swapped record wants.

    >>> parted("Sort\\nbca"), parted("Say hello")
    (('Sort', 'bca'), ('Say hello', ''))
    """
    instruction, _, context = asked.partition("\n")
    return (instruction, context) if instruction and context else (asked, "")


def swapped(train: Iterable[Record], test: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Both parts the other way round, without training records of an output that is asked about.

    Different questions may have one answer, so parts that shared no prompt may share some then.
    """
    train, test = [*map(swap, train)], [*map(swap, test)]
    asked = {*map(prompt, test)}
    return [record for record in train if prompt(record) not in asked], test


def question(record: Record, said: str) -> Record | None:
    """What a model that is asked a swapped record gives back as a question, with the record's
    answer as the one that is wanted: a round trip is right if that is what it is answered by.

    None if the model says nothing.
    """
    return swap(replace(record, output=said)) if said else None
