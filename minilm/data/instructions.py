"""Instructions to follow: records (instruction, context, output), their files, their batches.

The model sees a record as prompt, output and the tokenizer's end. It learns only the last two: the
targets on the prompt are -100. A file of records is JSONL: a JSON object a line, with the fields of
Record. Only instruction and output are required.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from minilm.data.batches import IGNORED
from minilm.data.tokenizers import Tokenizer
from minilm.files import FormatError, write_atomically


@dataclass(frozen=True)
class Record:
    """An instruction, the context that it is about, and the output that is wanted.

    TypeError or ValueError for a field that is not text, and if instruction, output or a reference
    is empty.
    """

    instruction: str
    context: str
    output: str
    references: tuple[str, ...] = ()  # other outputs that are right
    task: str = ""  # scores are counted by this name; "sql" is scored differently, see tasks.score

    def __post_init__(self):
        if not isinstance(self.references, tuple):
            raise TypeError(f"references: expected a tuple, got {type(self.references).__name__}")
        texts = [(name, value) for name, value in vars(self).items() if name != "references"]
        for name, text in [*texts, *(("references", text) for text in self.references)]:
            if not isinstance(text, str):
                raise TypeError(f"{name}: expected str, got {type(text).__name__}")
            if not text and name not in ("context", "task"):
                raise ValueError(f"{name}: the text is empty")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name}: {error}") from error


def prompt(record: Record) -> str:
    """The text that the output follows."""
    context = f"{record.context}\n" if record.context else ""
    return f"{record.instruction}\n{context}-> "


def load_records(path: str | os.PathLike) -> list[Record]:
    """The records of a JSONL file. Raises FormatError with line and field, FileNotFoundError."""
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            records.append(_record(line))
        except (TypeError, ValueError, RecursionError) as error:
            raise FormatError(path, f"line {number}: {error}") from error
    if not records:
        raise FormatError(path, "holds no record")
    return records


def save_records(path: str | os.PathLike, records: Sequence[Record]) -> None:
    """Write what load_records reads, without empty fields. ValueError if there is no record."""
    if not records:
        raise ValueError("there is no record to save")
    objects = ({name: value for name, value in vars(r).items() if value} for r in records)
    lines = [json.dumps(obj, ensure_ascii=False) + "\n" for obj in objects]
    write_atomically(path, "".join(lines).encode())


def encode(
    records: Sequence[Record], tokenizer: Tokenizer, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Each record as a row: tokens (R, T) and targets (R, T), int32, for a causal model.

    Targets are the tokens one place later, from the output's first token to the end; all others are
    -100. Rows are filled up with tokens 0. T is `length`, or else what the longest record takes:
    all its tokens but the end. ValueError if a record takes more; none is cut.
    """
    if not records:
        raise ValueError("there is no record to encode")
    # Prompt and output are encoded apart, so no token spans both. When the model is asked, the
    # prompt then has the same tokens as in training.
    prompts = [tokenizer.prompt(prompt(record)) for record in records]
    outputs = [[*tokenizer.encode(record.output), tokenizer.end] for record in records]
    taken = [len(asked) + len(answer) - 1 for asked, answer in zip(prompts, outputs)]
    longest = max(taken)
    if length is None:
        length = longest
    if longest > length:
        which = taken.index(longest)
        raise ValueError(
            f"record {which} takes {longest} tokens, the length is {length}: {records[which]!r:.99}"
        )
    tokens = np.zeros((len(records), length), np.int32)
    targets = np.full_like(tokens, IGNORED)
    for row, (asked, answer) in enumerate(zip(prompts, outputs)):
        tokens[row, : taken[row]] = [*asked, *answer[:-1]]
        targets[row, len(asked) - 1 : taken[row]] = answer
    return tokens, targets


class InstructionBatches:
    """Training batches of records: batches[step] -> (tokens, targets), (B, T) int32, as in encode.

    Rows are drawn in epochs: all records once in random order, then all again in another order. A
    batch may span two epochs. It depends on (seed, step) alone, so a resumed run needs no stored
    position. Iterating never ends.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        batch: int,
        length: int | None,
        seed: int,
    ):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.tokens, self.targets = encode(records, tokenizer, length)
        self.batch, self.seed = batch, seed

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        size = len(self.tokens)
        epochs, places = np.divmod(step * self.batch + np.arange(self.batch), size)
        # The 3 keeps this stream apart from those of (seed, step).
        orders = [
            np.random.default_rng([self.seed, epoch, 3]).permutation(size)
            for epoch in range(epochs[0], epochs[-1] + 1)
        ]
        rows = np.stack(orders)[epochs - epochs[0], places]
        return self.tokens[rows], self.targets[rows]


def _record(line):
    pairs = json.loads(line.decode(), object_pairs_hook=tuple)  # not a dict: it hides repeats
    if not isinstance(pairs, tuple):
        raise TypeError(f"expected an object, got {type(pairs).__name__}")
    known, found = [field.name for field in fields(Record)], {}
    for name, value in pairs:
        if name not in known or name in found:
            raise ValueError(f"{name!r:.80}: the field is unknown or appears twice")
        found[name] = value
    for name in ("instruction", "output"):
        if name not in found:
            raise ValueError(f"{name}: the field is missing")
    references = found.get("references", [])
    if not isinstance(references, list):
        raise TypeError(f"references: expected a list, got {type(references).__name__}")
    return Record(**{"context": "", **found, "references": tuple(references)})
