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
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minilm.files import FormatError

TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")

# Tests are more data than prose or code; idle_test and test hold files that are broken on purpose.
# pydoc_data is python-reference: without it no two corpora share a text.
NOT_LIBRARY = {"idle_test", "pydoc_data", "test", "tests", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Corpus:
    """A named sequence of documents. ValueError if there is none, or if one is empty."""

    name: str
    documents: tuple[str, ...]

    def __post_init__(self):
        if not self.documents:
            raise ValueError(f"corpus {self.name!r} holds no text")
        if "" in self.documents:
            raise ValueError(f"corpus {self.name!r}: document {self.documents.index('')} is empty")

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

    A file is one document. Of a folder all files with a suffix in TEXT_SUFFIXES are read, sorted by
    path; hidden files and files that are not UTF-8 are skipped. Blank documents are dropped. If a
    name is also a path, the name counts. ValueError for an unknown name or if no text is left;
    FormatError for a single file that is not UTF-8.
    """
    name = os.fspath(name_or_path)
    if name in PYTHON_CORPORA:
        documents = PYTHON_CORPORA[name]()
    elif os.path.isdir(name):
        documents = _texts(Path(name), TEXT_SUFFIXES)
    elif os.path.exists(name):
        documents = [_text(Path(name))]
    else:
        raise ValueError(f"{name!r} is neither a path nor one of {', '.join(PYTHON_CORPORA)}")
    return Corpus(name, tuple(document for document in documents if document.strip()))


def split(corpus: Corpus, validation: float = 0.1) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split the documents into (train, validation). `validation` is a share of the characters.

    Whole documents go to validation, in the order of their SHA-256, until it has its share. So the
    split does not depend on the order of the documents, and equal documents stay together. At least
    one text stays in train. A single document is cut: its end is validation. ValueError if a part
    would be empty.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation must lie between 0 and 1, got {validation}")
    if len(corpus.documents) == 1:
        return _cut(corpus, validation)
    copies = Counter(corpus.documents)
    if len(copies) == 1:
        raise ValueError(f"corpus {corpus.name!r} repeats one document: nothing to hold out")
    wanted, characters, held_out = validation * corpus.characters, 0, set()
    by_hash = sorted(copies, key=lambda document: hashlib.sha256(document.encode()).digest())
    for document in by_hash[:-1]:
        held_out.add(document)
        characters += len(document) * copies[document]
        if characters >= wanted:
            break
    train = tuple(document for document in corpus.documents if document not in held_out)
    return train, tuple(document for document in corpus.documents if document in held_out)


def _cut(corpus, validation):
    (text,) = corpus.documents
    border = int(len(text) * (1 - validation))
    if not 0 < border < len(text):
        raise ValueError(f"corpus {corpus.name!r}: {len(text)} characters are too few to split")
    return (text[:border],), (text[border:],)


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


def _source() -> Iterator[str]:
    return _texts(Path(sysconfig.get_path("stdlib")), (".py",), skip=NOT_LIBRARY)


def _texts(root: Path, suffixes: tuple[str, ...], skip: set[str] = frozenset()) -> Iterator[str]:
    """The UTF-8 texts under a folder, sorted by path, without hidden names and folders in skip."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        paths += [
            Path(folder, name)
            for name in names
            if name.endswith(suffixes) and not name.startswith(".")
        ]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            yield _text(path)
        except FormatError:
            continue


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(path, f"not UTF-8 text: {error}") from error


PYTHON_CORPORA = {
    "python-reference": _reference,
    "python-docstrings": _docstrings,
    "python-source": _source,
}
