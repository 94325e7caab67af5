"""Records that a model writes for another one, and the rule that drops bad ones.

Wang et al. 2022, arXiv:2212.10560 (Self-Instruct), section 2: a model is shown some records,
writes new instructions and their answers, and is tuned on what is left after a filter. The filter
drops what is no whole record, what is too close to a record that is there, and inputs that have
several outputs (section 2.2, filtering and postprocessing).

    readable    the text ended, and is an instruction, a context and an output
    new         its prompt is neither a record's that the model learned from, nor written before
    agreed      the model gives the same output when it is asked its own prompt once more

What is left out: similarity by ROUGE-L, where "new" has equality; tasks of classification, whose
outputs are written before their inputs; and instructions that need no context. There the model
learns from prompts with examples in them, here its weights have learned to write records.
"""

from collections.abc import Sequence

import numpy as np

from minilm.data.instructions import Record, prompt
from minilm.data.tokenizers import Tokenizer


def text_of(record: Record) -> str:
    """A record as a text to be written.

    >>> text_of(Record("Sort", "cab", "abc"))
    'Sort\\ncab\\n-> abc'
    """
    return prompt(record) + record.output


def read(text: str, task: str = "") -> Record | None:
    """The record that a text is, or None if it is none with a context.

    >>> read("Sort\\ncab\\n-> abc")
    Record(instruction='Sort', context='cab', output='abc', references=(), task='')
    >>> read("Sort\\n-> abc")
    """
    lines = text.split("\n")
    if len(lines) != 3 or not lines[2].startswith("-> "):
        return None
    instruction, context, output = lines[0], lines[1], lines[2].removeprefix("-> ")
    return Record(instruction, context, output, task=task) if all(
        (instruction, context, output)) else None


def rows_to_write(records: Sequence[Record], tokenizer: Tokenizer
                  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows that teach to write records: tokens and targets, both (T,) int32 with a T of its own.

    A row is the end of a text, the whole record and an end. All of it is learned, so that a model
    that goes on from an end writes a record.
    """
    rows = []
    for record in records:
        tokens = np.concatenate([[tokenizer.end], tokenizer.encode(text_of(record)),
                                 [tokenizer.end]], dtype=np.int32)
        rows.append((tokens[:-1], tokens[1:]))
    return rows


def new(written: Sequence[Record], known: Sequence[Record]) -> list[Record]:
    """Those whose prompt is none of the known records' and comes here for the first time."""
    seen, found = {prompt(record) for record in known}, []
    for record in written:
        if (asked := prompt(record)) not in seen:
            seen.add(asked)
            found.append(record)
    return found


def agreed(written: Sequence[Record], answers: Sequence[str]) -> list[Record]:
    """Those whose output is what was answered. ValueError unless there is an answer to each."""
    if len(written) != len(answers):
        raise ValueError(f"{len(written)} records need an answer each, got {len(answers)}")
    return [record for record, answer in zip(written, answers) if record.output == answer]
