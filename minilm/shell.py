"""Words of a command that its user types into a shell."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def python() -> str:
    """The Python that runs, as its user would name it here."""
    return "python" if shutil.which("python") == sys.executable else near(sys.executable)


def near(path: str | Path) -> str:
    """A path from the current folder if it lies there, else from the root."""
    path = Path(os.path.abspath(path))  # not resolved: a virtual environment's python is a link
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def quoted(word: str) -> str:
    r"""A word as a shell reads it. Bytes that a terminal would obey or cannot show are escaped.

    >>> print(quoted("it's $HOME"), quoted("a\tb"))
    'it'"'"'s $HOME' $'a\011b'
    """
    if word.replace("\n", "").isprintable():
        return shlex.quote(word)
    safe = set(range(32, 127)) - set(b"'\\")
    return "$'" + "".join(chr(byte) if byte in safe else f"\\{byte:03o}"
                          for byte in word.encode("utf-8", "surrogateescape")) + "'"
