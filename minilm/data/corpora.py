"""Text to train on: Python's own, or the user's files and folders. It is read in place.

Every Python comes with a book about the language, a library of code, and the prose inside that
code. They are real text in three registers, and they need no download. They differ between Python
versions, so a run should record `Corpus.sha256`.
"""

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from minilm.data.lines import load_lines
from minilm.files import FormatError, read_bytes
from minilm.strict import parse

TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")

# Tests are more data than prose or code; idle_test and test hold files that are broken on purpose.
# pydoc_data is python-reference: without it no two corpora share a text.
NOT_LIBRARY = {"idle_test", "pydoc_data", "test", "tests", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Corpus:
    """A named sequence of documents. ValueError if there is none, or if one is empty."""

    name: str
    documents: tuple[str, ...]
    skipped: tuple[str, ...] = ()  # what was not read, each with the reason

    def __post_init__(self):
        if not self.documents:
            said = f"; skipped: {self.told()}" if self.skipped else ""
            raise ValueError(f"corpus {self.name!r} holds no text{said}")
        if "" in self.documents:
            raise ValueError(f"corpus {self.name!r}: document {self.documents.index('')} is empty")

    def told(self) -> str:
        """What was skipped, in one line, or an empty one."""
        more = f", and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
        return ", ".join(self.skipped[:5]) + more

    @property
    def characters(self) -> int:
        """Number of characters in all documents."""
        return sum(map(len, self.documents))

    @property
    def sha256(self) -> str:
        """Hex digest of the documents in order, each after its length, so that borders count too.
        """
        digest = hashlib.sha256()
        for document in self.documents:
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()


def load_corpus(name_or_path: str | os.PathLike) -> Corpus:
    """Load one of Python's own corpora by name, or the text at a path.

    python-reference   the language reference, one document a topic (0.5 MB)
    python-docstrings  docstrings of the standard library, one document a module (2 MB)
    python-source      source of the standard library, one document a module (11 MB)

    A file is one document, but for JSON lines, as clean.py leaves them: there the field "text" of
    each line is one. Of a folder all files with a suffix in TEXT_SUFFIXES are read, sorted by
    path; blank ones and hidden ones are left out. Linked folders are followed, each once. What else
    is not read stands in `skipped`: what cannot be read or is not UTF-8, and folders below it that
    hold a run or a model. So a run does not learn from what it wrote itself.

    If a name is also a path, the name counts. ValueError for an unknown name or if no text is left;
    FormatError for a single file that is no file, cannot be read or is not UTF-8, and for JSON
    lines one of which is no object with a text.
    """
    name, skipped = os.fspath(name_or_path), ()
    if name in PYTHON_CORPORA:
        documents = PYTHON_CORPORA[name]()
    elif os.path.isdir(name):
        documents, skipped = _texts(Path(name), TEXT_SUFFIXES)
    elif name.endswith(".jsonl"):
        documents = load_lines(name, _text_of_line, "text")
    elif os.path.lexists(name):
        documents = [_text(name)]
    else:
        raise ValueError(f"{name!r} is neither a path nor one of {', '.join(PYTHON_CORPORA)}")
    return Corpus(name, tuple(text for text in documents if text.strip()), tuple(skipped))


def load_corpora(names: Iterable[str | os.PathLike]) -> list[Corpus]:
    """Load several. A document that one of them has is left out of all that come after it.

    Otherwise a text could be held out of one corpus and learned from another.
    """
    seen, corpora = set(), []
    for name in names:
        corpus = load_corpus(name)
        new = tuple(document for document in corpus.documents if document not in seen)
        if again := len(corpus.documents) - len(new):
            said = f"{again} document{'s' * (again > 1)} that an earlier corpus has"
            corpus = replace(corpus, documents=new, skipped=(*corpus.skipped, said))
        seen.update(new)
        corpora.append(corpus)
    return corpora


def _reference() -> list[str]:
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def _docstrings() -> Iterator[str]:
    for source in _source():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape is the library's concern, not ours
            module = ast.parse(source)
        yield "\n\n".join(_docstrings_in(module))


def _docstrings_in(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler)):  # nothing is documented in expressions
            yield from _docstrings_in(child)


def _source() -> list[str]:
    return _texts(Path(sysconfig.get_path("stdlib")), (".py",), skip=NOT_LIBRARY)[0]


def _texts(root: Path, suffixes: tuple[str, ...], skip=frozenset()) -> tuple[list[str], list[str]]:
    """(the UTF-8 texts under a folder, sorted by path; what was skipped, each with the reason).

    Hidden names and folders in `skip` are left out.
    """
    texts, skipped, paths = [], [], []
    for folder, names in _folders(root, skip, skipped):
        paths += [Path(folder, name) for name in names
                  if name.endswith(suffixes) and not name.startswith(".")]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        if path.is_symlink() and (reason := _lies_in(path, root)):
            skipped.append(f"{path}: {reason}")
            continue
        try:
            texts.append(_text(path))
        except FormatError as error:
            skipped.append(str(error))
        except FileNotFoundError:
            skipped.append(f"{path}: is gone")
    return texts, skipped


def _folders(root: Path, skip, skipped: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) for all folders under root that may hold text, each once.

    Linked folders come last, so that what lies under root is read under its own name.
    """
    def failed(error): skipped.append(f"{error.filename}: cannot be read: {error.strerror}")
    tops, seen, home = [os.fspath(root)], set(), os.path.realpath(root)
    while tops:
        links = []
        for folder, folders, names in chain.from_iterable(os.walk(t, onerror=failed) for t in tops):
            real = os.path.realpath(folder)
            reason = None if real == home else _no_text(real, home, names)
            if not reason and folder in tops:
                reason = _lies_in(folder, root)
            if reason:
                skipped.append(f"{folder}: {reason}")
            if reason or real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
            links += filter(os.path.islink, (os.path.join(folder, name) for name in folders))
            yield folder, names
        tops = sorted(links)


def _no_text(real: str, home: str, names: list[str]) -> str | None:
    """Why a folder other than the corpus's home, with files of these names, is not read."""
    if Path(home).is_relative_to(real):
        return "is a link to a folder that the corpus lies in"
    if "run.json" in names:
        return "holds a run, not text"
    weights = any(name.endswith((".safetensors", "_model.bin")) for name in names)
    if weights and ("config.json" in names or "adapter_config.json" in names):
        return "holds a model, not text"
    return None


def _lies_in(path: str | os.PathLike, root: Path) -> str | None:
    """Why a link in the corpus is not read: it may lead into what a run wrote."""
    home = os.path.realpath(root)
    for folder in Path(os.path.realpath(path)).parents:
        if Path(home).is_relative_to(folder):
            break
        with suppress(OSError):
            if reason := _no_text(str(folder), home, os.listdir(folder)):
                return f"is a link into {folder}, which {reason}"
    return None


def _text_of_line(line: bytes) -> str:
    record = parse(line)
    if not (isinstance(record, dict) and isinstance(record.get("text"), str)):
        raise ValueError('expected an object with a text in the field "text"')
    return record["text"]


def _text(path: str | os.PathLike) -> str:
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise FormatError(path, f"not UTF-8 text: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


PYTHON_CORPORA = {
    "python-reference": _reference,
    "python-docstrings": _docstrings,
    "python-source": _source,
}
