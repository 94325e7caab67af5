"""Conversations as a model was taught to read them: the chat template of its folder.

A conversation is a list of messages, {"role": ..., "content": ...}, whose roles are mostly system,
user and assistant. A template writes it as one text, with marks for who speaks; the tokens of that
text are those that transformers' apply_chat_template gives. So a message that spells a mark, such
as <|im_end|>, gets the mark's token.

A folder has its template in chat_template.jinja, or in the field chat_template of
tokenizer_config.json, as a text or as a list of named ones. Of several, "default" is used.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilm.data.sandbox import Rendered, render
from minilm.data.tokenizers import Tokenizer
from minilm.files import FormatError, read_bytes, read_json, write_atomically, write_json

FILE, MORE = "chat_template.jinja", "additional_chat_templates"

# The format of instructions.py: what it asks is what this asks. See `plain`.
PLAIN = ("{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else "
         "'\\n-> ' if m.role == 'user' else '\\n') }}{% endfor %}")


class Chat(NamedTuple):
    """A template, the special tokens that it calls by name, and the tokenizer of its texts."""

    source: str
    names: dict[str, str]
    tokenizer: Tokenizer

    def render(self, conversations, answer: bool = False) -> list[Rendered]:
        """Each conversation as the template writes it, with no error raised.

        answer: go on to where an answer begins (add_generation_prompt).
        """
        fixed = self.names | {"tools": None, "documents": None, "add_generation_prompt": answer}
        return render(self.source, [fixed | {"messages": c} for c in conversations])

    def text(self, messages: list[dict], answer: bool = False) -> str:
        """The conversation as the template writes it. ValueError if the template fails."""
        (found,) = self.render([messages], answer)
        return checked(found).text

    def prompt(self, messages: list[dict]) -> np.ndarray:
        """The tokens (T,) int32 that an answer to these messages follows. ValueError as `text`."""
        return self.tokenizer.marked(self.text(messages, answer=True))

    def tail(self) -> str:
        """What the template writes after a conversation's last answer; "" if that cannot be told.
        """
        asked = [{"role": "user", "content": "Question"}]
        (found,) = self.render([[*asked, {"role": "assistant", "content": "Answer"}]])
        return found.text.rpartition("Answer")[2] if "Answer" in found.text else ""

    def closing(self) -> tuple[int, ...]:
        """The token with which the template ends an answer; none if it has none for that."""
        marks = set(self.tokenizer.special.values())
        return tuple([id for id in self.tokenizer.marked(self.tail()).tolist() if id in marks][:1])


def checked(found: Rendered) -> Rendered:
    """What was rendered. ValueError, with the template's words, if it failed."""
    if found.error:
        raise ValueError(f"the chat template fails: {found.error}")
    return found


def load_chat(folder: Path, tokenizer: Tokenizer, templates: dict[str, str]) -> Chat:
    """The default one of some templates, with the names that a folder gives to tokens.

    FormatError if none of them is the default.
    """
    if "default" not in templates:
        raise FormatError(folder, f"has the chat templates {sorted(templates)!r:.200}, expected "
                          "one named default")
    return Chat(templates["default"], read_names(folder, tokenizer), tokenizer)


def plain(tokenizer: Tokenizer) -> str:
    """A template for a model whose folder has none, which asks as instructions.py does."""
    return ("{{ bos_token }}" if len(tokenizer.prompt("")) else "") + PLAIN


def read_templates(folder: Path) -> dict[str, str]:
    """{name: template} of a folder, {} if it has none. FormatError for what is no template."""
    files = {"default": folder / FILE} if (folder / FILE).exists() else {}
    files |= {file.stem: file for file in sorted((folder / MORE).glob("*.jinja"))}
    if files:
        return {name: _source(file) for name, file in files.items()}
    config = folder / "tokenizer_config.json"
    found = _fields(config).get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if found is not None and not isinstance(found, list):
        raise FormatError(config, f"chat_template is {found!r:.80}, expected a text or a list")
    templates = {}
    for entry in found or []:
        match entry:
            case {"name": str(name), "template": str(source)} if re.fullmatch(r"[\w-]+", name):
                templates[name] = source
            case _:
                raise FormatError(config, f"chat_template has {entry!r:.80}, expected name and "
                                  "template")
    return templates


def write_templates(folder: Path, templates: dict[str, str],
                    names: dict[str, str] | None = None) -> None:
    """Write what read_templates reads into a folder that is there, each as a file.

    names: special tokens, as of read_names, that tokenizer_config.json shall name for them.
    """
    for name, source in templates.items():
        file = folder / (FILE if name == "default" else f"{MORE}/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, source.encode())
    if names:
        config = folder / "tokenizer_config.json"
        write_json(config, _fields(config) | names)


def read_names(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """{"bos_token": "<s>", ...}: the special tokens that a folder names."""
    config = _fields(folder / "tokenizer_config.json")
    if not config:
        end, = [name for name, id in tokenizer.special.items() if id == tokenizer.end]
        config = {"eos_token": end}
    if "added_tokens_decoder" not in config:  # older folders
        config |= _fields(folder / "special_tokens_map.json")
    names = {}
    for field, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if field.endswith("_token") and isinstance(content, str):
            names[field] = content
    return names


def _fields(file: Path) -> dict:
    raw = read_json(file) if file.exists() else {}
    if not isinstance(raw, dict):
        raise FormatError(file, f"is {type(raw).__name__}, expected fields")
    return raw


def _source(file: Path) -> str:
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise FormatError(file, f"not UTF-8: {error}") from None
