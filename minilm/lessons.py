"""What a training program teaches, and how it asks the model for it: records, or conversations."""

import os
from collections.abc import Callable
from functools import partial
from itertools import islice, takewhile
from typing import Any, NamedTuple

import numpy as np

from minilm import data
from minilm.data import Chat
from minilm.dialogue import Dialogue
from minilm.files import FormatError
from minilm.interop.ends import ends_of
from minilm.measure.answers import answers

MOST = 60  # tokens of an answer in a conversation


class Lesson(NamedTuple):
    """What is taught, and how to ask for it."""

    batches: Any  # batches[step] -> (tokens, targets)
    held_out: tuple  # (tokens, targets)
    ask: Callable  # (model) -> ({task: share answered rightly}, [question and answer, ...])
    prompt: str | None  # to ask it later; None for a conversation


def load_data(s):
    """(records to train on, records held out), as finetune.py's settings ask for them.

    ValueError or FormatError for a file that has none, too few, or some that cannot be scored.
    """
    if len(s.data) == 1 and s.data[0] not in data.TASKS:
        (path,) = s.data
        if not os.path.lexists(path):
            raise ValueError(f"{path!r} is neither a file nor one of the tasks "
                             f"{', '.join(data.TASKS)}")
        talks = data.holds_conversations(path)
        records = data.load_conversations(path) if talks else data.load_records(path)
        if len(records) <= s.test:
            raise ValueError(f"{s.test} of the records are held out, but {path} has "
                             f"{len(records)}: give a smaller --test")
        if talks:
            if s.reverse:
                raise ValueError(f"{path} holds conversations: only records can be reversed")
            return data.split_records(records, s.test, s.train, data.opening)
        records = [*map(data.swap, records)] if s.reverse else records
        train, test = data.split_records(records, s.test, s.train)
        try:
            for record in test:
                data.score(record, record.output)  # what cannot be scored is refused now
        except ValueError as error:
            raise FormatError(path, str(error)) from error
        return train, test
    made = data.make_tasks(s.data, s.train or 2000, s.test, s.seed)
    return data.swapped(*made) if s.reverse else made


def instructions(train, test, tokenizer, model, batch: int, seed: int) -> Lesson:
    """What records teach: the output."""
    context = model.room
    return Lesson(data.InstructionBatches(train, tokenizer, batch, None, seed, context),
                  data.encode(test, tokenizer, context=context),
                  partial(scored, test, tokenizer), data.prompt(test[0]))


def conversations(train, test, chat: Chat, model, batch: int, seed: int) -> Lesson:
    """What conversations teach: the answers. The model gets the ends that they teach."""
    ends = ends_of(model, chat.tokenizer)
    train, held_out = (data.answer_rows(part, chat, ends.eos, model.room)
                       for part in (train, test))
    model.ends = ends._replace(eos=tuple(dict.fromkeys([*ends.eos, *chat.closing()])))
    return Lesson(data.RowBatches(train, batch, None, seed), data.filled(held_out),
                  partial(answered, test[0], chat), None)


def scored(test, tokenizer, model):
    """Lesson.ask for records: the last answer of each task is shown."""
    said, right = answers(model, test, tokenizer), {}
    for record, answer in zip(test, said):
        right.setdefault(record.task or "records", []).append(data.score(record, answer))
    shown = {record.task: data.prompt(record).replace("\n", " ") + answer
             for record, answer in zip(test, said)}
    return {task: float(np.mean(r)) for task, r in right.items()}, [*shown.values()]


def answered(messages, chat: Chat, model):
    """Lesson.ask for conversations: the first answer of one is shown, none is scored."""
    asked = messages[: [message["role"] for message in messages].index("assistant")]
    drawn = islice(Dialogue(model, 0).answer(chat.prompt(asked)), MOST)
    said = chat.tokenizer.decode([*takewhile(lambda id: id not in model.ends.eos, drawn)])
    return {}, [f"{asked[-1]['content']} -> {said}".replace("\n", " ")]
