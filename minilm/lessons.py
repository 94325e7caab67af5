"""What a training program teaches, and how it asks the model for it: records, or conversations."""

from collections.abc import Callable
from functools import partial
from itertools import islice, takewhile
from typing import Any, NamedTuple

import numpy as np

from minilm import data
from minilm.data import Chat
from minilm.dialogue import Dialogue
from minilm.interop.ends import ends_of
from minilm.measure.answers import answers

MOST = 60  # tokens of an answer in a conversation


class Lesson(NamedTuple):
    """What is taught, and how to ask for it."""

    batches: Any  # batches[step] -> (tokens, targets)
    held_out: tuple  # (tokens, targets)
    ask: Callable  # (model) -> ({task: share answered rightly}, [question and answer, ...])
    prompt: str | None  # to ask it later; None for a conversation


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
