"""Files that are whole or absent, and errors that name the path and the field.

A write goes to a temporary file in the same folder, is forced to the disk, and is then renamed over
the target. So a crash leaves the old file or the new one, never a part. What a kill leaves of a
temporary file is removed by the next write to its target. A read accepts only what is well formed
and raises FormatError for anything else.
"""

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minilm.locks import hold
from minilm.strict import parse

LFS = b"version https://git-lfs"  # the first bytes of what git-lfs leaves in a file's place


class FormatError(ValueError):
    """A file does not hold what it should; the text is "path: message", which is cut if it is long.
    """

    def __init__(self, path: str | os.PathLike, message: str):
        if len(message) > 1000:  # it may quote what the file holds
            message = f"{message[:500]} ... {message[-400:]}"
        super().__init__(os.fspath(path), message)

    def __str__(self):
        return "{}: {}".format(*self.args)


def write_atomically(path: str | os.PathLike, *parts: bytes) -> None:
    """Write the parts (bytes or contiguous uint8 arrays) one after another as one whole file."""
    _require_place(path := Path(path))
    with temporary(path) as new:
        write_synced(new, parts)
        os.replace(new, path)
    sync_folder(path.parent)


def make_place(path: Path) -> None:
    """Make the folder of a file. OSError if the file can have no place, as where a folder is.

    A program calls it before its work, so that its user hears of it at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _require_place(path)


def _require_place(path: Path):
    if path.exists() and not path.is_file():  # a rename would replace a device
        kind = _kind(path.stat().st_mode)
        number = errno.EISDIR if kind == "folder" else errno.EINVAL
        raise OSError(number, f"is a {kind}, expected a file", str(path))


@contextmanager
def temporary(path: str | os.PathLike, folder: bool = False) -> Iterator[Path]:
    """A new empty file or folder beside `path`, to be filled and renamed to it.

    It is removed at the end if it is still there. Those of processes that were killed are removed
    before: nobody holds them.
    """
    path = Path(path)
    name = f".{path.name[:50]}"  # names have at most 255 bytes
    for other in path.parent.glob(f"{glob.escape(name)}.*.tmp"):
        with hold(other, wait=False) as dead:
            if dead:
                remove(other)
    held = False
    while not held:
        new = path.with_name(f"{name}.{os.urandom(8).hex()}.tmp")
        new.mkdir() if folder else new.touch(exist_ok=False)
        with hold(new) as held:
            held = held or new.exists()  # no: another process took it for dead
            if held:
                try:
                    yield new
                finally:
                    remove(new)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_synced(path: Path, parts: Iterable[bytes]) -> None:
    """Write the parts to a file that is not anybody's yet, and force it to the disk."""
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: str | os.PathLike) -> None:
    """Force the names in a folder to the disk; without this a rename may be lost in a crash."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sync_file(path: str | os.PathLike) -> None:
    """Force a file to the disk, if there is one."""
    if os.path.exists(path):
        with open(path, "rb+") as opened:
            os.fsync(opened.fileno())


def write_json(path: str | os.PathLike, obj: object) -> None:
    """Write obj as indented JSON.

    ValueError for what JSON has no name for: NaN, infinity, and bytes that are not UTF-8.
    """
    write_atomically(path, json_bytes(obj))


def json_bytes(obj: object) -> bytes:
    """What `write_json` writes."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError as error:  # of a path, whose bytes may be any
        said = text[: error.end].rpartition('"')[2]
        raise ValueError(f"JSON is UTF-8, which {said[-100:]!r} is not") from None


def read_json(path: str | os.PathLike) -> object:
    """Read strict JSON: UTF-8, no repeated key, no NaN or infinity, no half of a surrogate pair.

    Raises FormatError, FileNotFoundError.
    """
    return parse_json(path, read_bytes(path))


def read_json_lines(path: str | os.PathLike) -> list:
    """Read strict JSON, a value a line, without a last line that a crash has cut short.

    Raises FormatError, naming the line, and FileNotFoundError.
    """
    lines, values = read_bytes(path).split(b"\n"), []
    if not lines[-1]:
        lines.pop()
    for i, line in enumerate(lines, 1):
        try:
            values.append(parse_json(path, line))
        except FormatError as error:
            if i < len(lines):
                raise FormatError(path, f"line {i}: {error.args[1]}") from None
    return values


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hex. Raises FormatError, FileNotFoundError."""
    return of_file(path, lambda file: hashlib.file_digest(file, "sha256").hexdigest())


def read_bytes(path: str | os.PathLike) -> bytes:
    """All bytes of a file. FormatError for what is no file or cannot be read, FileNotFoundError.

    A pipe would wait for its writer for ever, and a device may have no end.
    """
    return of_file(path, lambda file: file.read())


def of_file(path: str | os.PathLike, read: Callable):
    """read(the open file). Raises what `read_bytes` raises."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise FormatError(path, f"cannot be read: it is a {_kind(mode)}, a file was expected")
        with open(path, "rb") as file:
            return read(file)
    except FormatError:
        raise
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise FormatError(path, "cannot be read: it is a link to nothing") from error
        raise
    except OSError as error:
        raise FormatError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # no path, such as one with a zero byte
        raise FormatError(path, f"cannot be read: {error}") from error
    except MemoryError as error:
        raise FormatError(path, "cannot be read: it does not fit in memory") from error


def _kind(mode):
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def parse_json(path: str | os.PathLike, data: bytes) -> object:
    """What `read_json` makes of the bytes of a file."""
    try:
        return parse(data)
    except (ValueError, RecursionError) as error:
        require_no_pointer(path, data)
        raise FormatError(path, f"not valid JSON: {error}") from error


def require_no_pointer(path: str | os.PathLike, data: bytes) -> None:
    """FormatError if the bytes of a file are git-lfs's name of one that was not fetched."""
    if data.startswith(LFS):
        raise FormatError(path, "is a pointer of git-lfs, not the file itself: `git lfs pull` in "
                                "its folder fetches it")
