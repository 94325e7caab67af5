"""Instructions to follow: records (instruction, context, output), their files, their batches.

The model sees a record as prompt, output and the tokenizer's end. It learns only the last two: the
targets on the prompt are -100. A file of records is JSONL: a JSON object a line, with the fields of
Record. Only instruction and output are required.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from minilm.data.batches import IGNORED
from minilm.data.lines import load_lines
from minilm.data.tokenizers import Tokenizer
from minilm.files import write_atomically


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
    task: str = ""  # scores are counted by this name, and some by a rule of its own: tasks.score

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
    return load_lines(path, _record, "record")


def save_records(path: str | os.PathLike, records: Sequence[Record]) -> None:
    """Write what load_records reads, without empty fields. ValueError if there is no record."""
    if not records:
        raise ValueError("there is no record to save")
    objects = ({name: value for name, value in vars(r).items() if value} for r in records)
    lines = [json.dumps(obj, ensure_ascii=False) + "\n" for obj in objects]
    write_atomically(path, "".join(lines).encode())


def encode(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    length: int | None = None,
    context: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Each record as a row: tokens (R, T) and targets (R, T), int32, for a causal model.

    Targets are the tokens one place later, from the output's first token to the end; all others are
    -100. Rows are filled up with tokens 0. T is `length`, or else what the longest record takes:
    all its tokens but the end. ValueError if a record takes more, or more than the model's
    `context`; none is cut.
    """
    rows = _rows(records, tokenizer, length, context)
    return filled(rows, length)


class RowBatches:
    """Training batches of rows: batches[step] -> (tokens, targets), (B, T) int32, as in `filled`.

    rows: tokens and targets, both (T,), with a T of its own each. They are drawn in epochs: all
    once in random order, then all again in another order. A batch may span two epochs. It depends
    on (seed, step) alone, so a resumed run needs no stored position. Iterating never ends.

    Rows share batches with their like, so that a long one does not fill up all others: those of
    up to twice the median length, of up to twice that, and so on. T is `length`, or else what the
    longest row of the batch's longest group takes. A batch comes when that one of its rows is drawn
    which stands first in `rows`: at any time of the epoch with equal chance.
    """

    def __init__(self, rows, batch: int, length: int | None, seed: int):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.rows = rows
        taken = np.array([len(tokens) for tokens, _ in self.rows])
        self.groups, longest = grouped(taken)
        self.widths = np.full_like(longest, length) if length else longest
        self.batch, self.seed = batch, seed

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        size = len(self.rows)
        epochs, places = np.divmod(step * self.batch + np.arange(self.batch), size)
        orders = [self._order(epoch) for epoch in range(epochs[0], epochs[-1] + 1)]
        drawn = np.stack(orders)[epochs - epochs[0], places]
        return filled([self.rows[row] for row in drawn], self.widths[self.groups[drawn].max()])

    def _order(self, epoch: int) -> np.ndarray:
        """All rows (R,) in the order of an epoch."""
        size, batch = len(self.rows), self.batch
        # The 3 keeps this stream apart from those of (seed, step).
        order = np.random.default_rng([self.seed, epoch, 3]).permutation(size)
        # Only whole batches are sorted: the first rows may end a batch of the epoch before, and the
        # last ones begin one that goes on in the next.
        first = -epoch * size % batch
        whole = order[first : first + max(0, size - first) // batch * batch]
        batches = np.argsort(self.groups[whole], kind="stable").reshape(-1, batch)
        rows = whole[batches]
        drawn = batches[np.arange(len(rows)), rows.argmin(axis=1)]
        whole[:] = rows[np.argsort(drawn)].ravel()
        return order


class InstructionBatches(RowBatches):
    """RowBatches of records, each a row as in `encode`."""

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        batch: int,
        length: int | None,
        seed: int,
        context: int | None = None,
    ):
        super().__init__(_rows(records, tokenizer, length, context), batch, length, seed)


def _rows(records, tokenizer, length, context) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and targets, both (T,) int32, of each record, with a T of its own."""
    if not records:
        raise ValueError("there is no record to encode")
    rows = []
    for number, record in enumerate(records):
        # Prompt and output are encoded apart, so no token spans both. When the model is asked, the
        # prompt then has the same tokens as in training.
        try:
            asked, answer = tokenizer.prompt(prompt(record)), tokenizer.encode(record.output)
        except ValueError as error:
            raise ValueError(f"record {number}, {record!r:.99}: {error}") from error
        tokens = np.concatenate([asked, answer, [tokenizer.end]], dtype=np.int32)
        targets = tokens[1:].copy()
        targets[: len(asked) - 1] = IGNORED
        rows.append((tokens[:-1], targets))
    taken = [len(tokens) for tokens, _ in rows]
    which = int(np.argmax(taken))
    if length is not None and taken[which] > length:
        raise ValueError(
            f"record {which} takes {taken[which]} tokens, the length is {length}: "
            f"{records[which]!r:.99}"
        )
    if context is not None and taken[which] > context:
        raise ValueError(
            f"a record takes {taken[which]} tokens, but the model's context is {context}: record "
            f"{which}, {records[which]!r:.99}"
        )
    return rows


def filled(rows, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (R, T) and targets (R, T), int32, of rows with a T of their own.

    They are filled up with tokens 0 and targets -100, to `length` or to the longest row.
    """
    length = length or max(len(tokens) for tokens, _ in rows)
    tokens = np.zeros((len(rows), length), np.int32)
    targets = np.full_like(tokens, IGNORED)
    for row, (asked, wanted) in enumerate(rows):
        tokens[row, : len(asked)], targets[row, : len(wanted)] = asked, wanted
    return tokens, targets


def grouped(taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The group of each row (R,) uint8, and the longest row of each group (G,).

    Half of the rows take the median or more, so at least a quarter of what is filled up is rows.
    """
    limits = [2 * np.median(taken)]
    while limits[-1] < taken.max():
        limits.append(2 * limits[-1])
    groups = np.searchsorted(limits, taken).astype(np.uint8)  # bytes are sorted fastest
    longest = np.zeros(len(limits), taken.dtype)
    np.maximum.at(longest, groups, taken)
    return groups, longest


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
