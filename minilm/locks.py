"""Locks that die with their process, even if it is killed: the kernel keeps them.

`alone(folder)` makes a process the only one that writes in a folder. The lock is POSIX's (lockf),
which belongs to the process: forked workers that outlive it do not keep it. Windows has its own.

`hold(path)` keeps a file or a folder of that name. This lock (flock) belongs to the open file, so
it also tells threads apart. Where there is none, nothing is held.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

INSIDE = {}  # (process, device, inode) of each folder that this process is alone in
BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # what a lock says that is another's


@contextmanager
def alone(folder: str | os.PathLike) -> Iterator[None]:
    """Be the only process inside `with alone(folder)`.

    RuntimeError if another one is, or if this one is already: a process would get the lock twice,
    and closing the file once lets it go. A file .lock is in the folder meanwhile; one that a kill
    has left is free.
    """
    place, me = os.stat(folder), object()
    place = os.getpid(), place.st_dev, place.st_ino
    if INSIDE.setdefault(place, me) is not me:
        raise RuntimeError(f"{folder} is in use: this process writes there already")
    try:
        with _locked(folder):
            yield
    finally:
        del INSIDE[place]


@contextmanager
def _locked(folder):
    file = Path(folder) / ".lock"
    while True:
        opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _taken(opened):
                raise RuntimeError(f"{folder} is in use: another process writes there")
            if _is(opened, file):  # else its last owner has removed it meanwhile
                try:
                    yield
                finally:
                    with suppress(OSError):  # Windows cannot remove what is open
                        file.unlink()
                return
        finally:
            os.close(opened)


@contextmanager
def hold(path: str | os.PathLike, wait: bool = True) -> Iterator[bool]:
    """Hold an existing file or folder; yields whether it is held.

    It is not if it does not exist, if another holds it (with wait=False), or without locks.
    """
    opened = _held(path, wait) if fcntl else None
    try:
        yield opened is not None
    finally:
        if opened is not None:
            os.close(opened)


def _held(path, wait):
    """A file descriptor that holds the path, or None."""
    while True:
        try:
            opened = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
        except OSError:
            return None
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is(opened, path):
                return opened
        except OSError:
            os.close(opened)
            return None
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)  # the name is another file's by now


def _taken(opened) -> bool:
    try:
        if fcntl:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt
            msvcrt.locking(opened, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return error.errno not in BUSY  # a disk without locks cannot keep others out
    return True


def _is(opened, path) -> bool:
    """Is the open file the one of that name?"""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(opened), os.stat(path))
    return False
