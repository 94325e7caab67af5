"""Documents out of the files that people have: text, HTML, mail, JSON lines.

Files are read one at a time, those of a folder in the order of their paths; hidden ones and links
are left out. A file that is no text is Dropped, with the reason. The files themselves stay as they
are.
"""

import email
import email.policy
import json
import os
import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from minilm.data.cleaning.funnel import Dropped

LINES, PAGES, MAILS = (".jsonl",), (".html", ".htm", ".xhtml"), (".eml",)
UNSEEN = {"script", "style", "template", "noscript", "head", "svg"}
AROUND = {"nav", "footer", "aside", "form", "button", "select"}  # of a page, but not its text
BLOCKS = {"p", "div", "br", "li", "ul", "ol", "table", "tr", "section", "article", "main", "header",
          "blockquote", "pre", "dl", "dt", "dd", "hr", "h1", "h2", "h3", "h4", "h5", "h6"}


class Document(NamedTuple):
    """Where it stands, and its text."""

    source: str  # a path; of a line in it, path:number
    text: str | Dropped


def read_documents(paths: Iterable[str | os.PathLike], largest: int) -> Iterator[Document]:
    """All documents of these files and folders, one after another.

    largest: bytes of a file that is read, except for JSON lines, which are read one by one.
    FileNotFoundError for a path that is not there.
    """
    for path in map(Path, paths):
        path.stat()
        for file in sorted(files_in(path)) if path.is_dir() else [path]:
            if file.suffix.lower() in LINES:
                yield from lines_of(file, largest)
            else:
                yield Document(str(file), text_of(file, largest))


def files_in(folder: Path) -> Iterator[Path]:
    """The files below a folder."""
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(top, name)
            if not name.startswith(".") and file.is_file() and not file.is_symlink():
                yield file


def lines_of(file: Path, largest: int) -> Iterator[Document]:
    """The documents of JSON lines: the field "text" of each."""
    try:
        opened = open(file, "rb")
    except OSError as error:
        yield Document(str(file), unread(error))
        return
    with opened:
        number = 0
        while line := opened.readline(largest + 1):
            number += 1
            cut = not line.endswith(b"\n") and len(line) > largest
            while cut and (rest := opened.readline(largest)) and not rest.endswith(b"\n"):
                pass
            yield Document(f"{file}:{number}", Dropped(f"too long: over {largest:,} bytes")
                           if cut else text_of_line(line))


def unread(error: OSError) -> Dropped:
    """What is said of a file that cannot be read."""
    return Dropped(f"cannot be read: {error.strerror}")


def text_of_line(line: bytes) -> str | Dropped:
    """The text of a line of JSON."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return Dropped("not JSON")
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        return Dropped('no field "text"')
    return Dropped("not UTF-8") if re.search("[\ud800-\udfff]", text) else text


def text_of(file: Path, largest: int) -> str | Dropped:
    """The text of a file, without a page's tags and a mail's head."""
    try:
        if (size := file.stat().st_size) > largest:
            return Dropped(f"too long: {size:,} bytes, expected at most {largest:,}")
        data = file.read_bytes()
    except OSError as error:
        return unread(error)
    if file.suffix.lower() in MAILS:
        return mail_text(data)
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        return Dropped(f"not UTF-8: byte {error.start:,} of {len(data):,}")
    if file.suffix.lower() not in PAGES:
        return text
    # The parser looks for the end of a tag from each that has none: n of them take n^2 steps.
    if (open_tags := text.count("<") - text.count(">")) > 1000:
        return Dropped(f"not HTML: {open_tags:,} tags do not end")
    return page_text(text)


def mail_text(data: bytes) -> str | Dropped:
    """What a mail says, without its head, attachments and what it quotes."""
    try:
        message = email.message_from_bytes(data, policy=email.policy.default)
        body = message.get_body(("plain", "html"))
        text = body.get_content() if body else ""
    except (LookupError, ValueError, AttributeError) as error:  # charsets and heads that are wrong
        return Dropped(f"not a mail: {error}")
    if not body:
        return Dropped("not a mail: it has no text")
    if body.get_content_subtype() == "html":
        text = page_text(text)
    return "\n".join(line for line in text.splitlines() if not line.startswith(">"))


def page_text(html: str) -> str:
    """What a page says, a line for each of its blocks, without menus, forms and what stands below.
    """
    page = PageText()
    page.feed(html)
    page.close()
    lines = "".join(page.parts).split("\n")
    text = "\n".join(" ".join(line.split()) for line in lines)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class PageText(HTMLParser):
    """Collects the text of a page."""

    def __init__(self):
        super().__init__()
        self.parts, self.hidden = [], []

    def handle_starttag(self, tag, attrs):
        if tag in UNSEEN | AROUND:
            self.hidden.append(tag)
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if tag in self.hidden:  # tags that were opened in it and not closed end with it
            while self.hidden.pop() != tag:
                pass
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data.replace("\n", " "))
