"""Conversations to learn from: their file, and rows whose targets are the assistant's answers.

A file is JSONL, {"messages": [{"role": "user", "content": "..."}, ...]} a line. A chat template
writes the messages as tokens. Which of them are an answer is found in one of two ways:

    the template says it    by blocks of {% generation %}
    by what is asked        an answer is what stands in the text with it, after the text that asks
                            for it (add_generation_prompt), up to the token that ends it

The second way sees each answer after exactly the tokens that it is asked with. Turns share a row as
long as one's tokens begin with those of the turn before. Some templates write an earlier answer
otherwise than the last one, without its thoughts, say; then the next turn begins a row of its own.
"""

import os
from collections.abc import Collection, Sequence

import numpy as np

from minilm.data.batches import IGNORED
from minilm.data.chat import Chat, checked
from minilm.data.lines import first_has, load_lines
from minilm.strict import parse

Messages = list[dict[str, str]]


def holds_conversations(path: str | os.PathLike) -> bool:
    """Whether the first line of a JSONL file has messages. FormatError, FileNotFoundError."""
    return first_has(path, "messages")


def load_conversations(path: str | os.PathLike) -> list[Messages]:
    """The conversations of a JSONL file. FormatError with the line, FileNotFoundError."""
    return load_lines(path, lambda line: _conversation(parse(line)), "conversation")


def opening(messages: Messages) -> str:
    """The text of the messages before the first answer."""
    roles = [message["role"] for message in messages]
    return "\n".join(message["content"] for message in messages[: roles.index("assistant")])


def answer_rows(conversations: Sequence[Messages], chat: Chat, ends: Collection[int],
                context: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of tokens and targets, both (T,) int32 with a T of its own, for a causal model.

    Targets are the tokens one place later if these are an answer's, and -100 otherwise. ends: ids
    that end a text, beside the one that ends the template's answers. Messages after the last answer
    are left out. ValueError, with the conversation's number, if the template fails, if a
    conversation takes more tokens than the context, or if its answers cannot be found.
    """
    ends, tail = {*ends, *chat.closing()}, chat.tail()
    turns = [[i for i, message in enumerate(messages) if message["role"] == "assistant"]
             for messages in conversations]
    whole = chat.render([m[: places[-1] + 1] for m, places in zip(conversations, turns)])
    asked = chat.render([m[:i] for m, places in zip(conversations, turns) for i in places], True)
    said = chat.render([m[: i + 1] for m, places in zip(conversations, turns) for i in places])
    pairs, rows = zip(asked, said), []
    for number, (messages, places, text) in enumerate(zip(conversations, turns, whole)):
        own = [next(pairs) for _ in places]
        try:
            if text.spans:
                found = [_spanned(chat.tokenizer, checked(text))]
            else:
                texts = [_asked(checked(ask).text, checked(said).text, messages[i]["content"], tail)
                         for (ask, said), i in zip(own, places)]
                found = _chained(chat.tokenizer, texts, ends)
            for tokens, wanted in found:
                if len(tokens) - 1 > context:
                    raise ValueError(f"it takes {len(tokens) - 1} tokens, but the model's context "
                                     f"is {context}")
                rows.append((tokens[:-1], np.where(wanted, tokens, IGNORED)[1:]))
        except ValueError as error:
            raise ValueError(f"conversation {number}, {messages!r:.99}: {error}") from error
    return rows


def _asked(before: str, after: str, said: str, tail: str) -> tuple[str, str]:
    """The text that asks for an answer, and that text with the answer.

    Some templates ask otherwise than they write what was asked: they begin a thought, or have the
    system's message in the last question only. What counts is how the model is asked.
    """
    if after.startswith(before):
        return before, after
    for answer in (said + tail, said.strip() + tail):
        if answer and after.endswith(answer):
            return before, before + answer
    raise ValueError(f"the template asks for an answer with ...{before[-40:]!r}, but then writes "
                     f"...{after[max(0, len(before) - 40) : len(before) + 40]!r}")


def _chained(tokenizer, texts, ends) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of tokens, and which of them are wanted, for texts (asking, with the answer)."""
    rows = []
    for before, after in texts:
        asked, tokens = tokenizer.marked(before), tokenizer.marked(after)
        if not _begins(tokens, asked):  # a token spans both: apart, as it is when it is asked
            tokens = np.concatenate([asked, tokenizer.marked(after[len(before) :])])
        last = np.flatnonzero(np.isin(tokens[len(asked) :], [*ends]))
        if not len(last):
            raise ValueError(f"the template writes no end of a text after an answer, but "
                             f"{after[-20:]!r}: the model would not learn to stop")
        wanted = np.zeros(len(tokens), bool)
        wanted[len(asked) : len(asked) + last[-1] + 1] = True
        if rows and _begins(asked, rows[-1][0]):
            _, earlier = rows.pop()
            wanted[: len(earlier)] = earlier
        rows.append((tokens, wanted))
    return rows


def _spanned(tokenizer, found) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and which of them have a character in one of the spans."""
    tokens = tokenizer.marked(found.text)
    wanted = np.zeros(len(tokens), bool)
    for start, end in found.spans:
        first = _agreement(tokens, tokenizer.marked(found.text[:start]))
        part = tokenizer.marked(found.text[:end])
        wanted[first : (last := _agreement(tokens, part)) + (last < len(part))] = True
    return tokens, wanted


def _begins(tokens, part) -> bool:
    return _agreement(tokens, part) == len(part)


def _agreement(first, second) -> int:
    """How many tokens two arrays have in common, from their beginning."""
    size = min(len(first), len(second))
    return int(np.append(np.flatnonzero(first[:size] != second[:size]), size)[0])


def _conversation(raw) -> Messages:
    if not isinstance(raw, dict) or raw.keys() != {"messages"}:
        fields = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"expected the field messages alone, got {fields!r:.80}")
    messages = raw["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: expected a list of some, got {messages!r:.80}")
    for number, message in enumerate(messages):
        match message:
            case {"role": str(role), "content": str(), **rest} if role and not rest:
                pass
            case _:
                raise ValueError(f"message {number}: expected role and content, both text, got "
                                 f"{message!r:.80}")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("no message has the role assistant: there is nothing to learn")
    return messages
