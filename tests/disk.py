"""A disk that fails: its k-th file operation, or all from the k-th on, do not succeed.

    with monkeypatch.context() as patch:
        disk = Disk(patch, 3, no_space)
        ...                             # the third operation raises OSError
    assert disk.count >= 3
"""

import errno
import io
import os
import signal

from minilm import files, records


class Disk:
    """Counts the file operations of minilm and calls `fail` at the k-th, or from the k-th on.

    A write that fails has written half of its bytes. fsync only counts: the kernel outlives us.
    """

    def __init__(self, patch, k, fail, forever=False):
        self.count, self.k, self.fail, self.forever = 0, k, fail, forever
        for name in ("mkdir", "replace", "rename", "unlink", "rmdir"):
            patch.setattr(os, name, self.counted(getattr(os, name)))
        patch.setattr(os, "fsync", self.counted(lambda fd: None))
        patch.setattr(os, "open", self.open_descriptor(os.open))
        for module in (files, records):
            patch.setattr(module, "open", self.open, raising=False)

    def due(self):
        self.count += 1
        return self.count == self.k or (self.forever and self.count > self.k)

    def counted(self, operation):
        def call(*args, **kwargs):
            if self.due():
                self.fail()
            return operation(*args, **kwargs)

        return call

    def open_descriptor(self, operation):
        def call(name, flags, *args, **kwargs):
            if flags & os.O_CREAT and self.due():
                self.fail()
            return operation(name, flags, *args, **kwargs)

        return call

    def open(self, name, mode="r", **kwargs):
        if "r" in mode:
            return open(name, mode, **kwargs)
        if self.due():
            self.fail()
        writer = HalfWriter(io.FileIO(name, mode.replace("b", "")), self)
        return writer if "b" in mode else io.TextIOWrapper(writer, **kwargs)


class HalfWriter(io.BufferedWriter):
    def __init__(self, raw, disk):
        super().__init__(raw)
        self.disk = disk

    def write(self, part):
        if self.disk.due():
            super().write(bytes(part)[: len(part) // 2])
            self.flush()
            self.disk.fail()
        return super().write(part)


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)
