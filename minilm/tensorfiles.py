"""Tensors in safetensors files, which are read one by one.

The header is written here, for two reasons: the library's own writer puts metadata in a random
order, and this way tensors go to the file without a copy. The library checks the header of what is
read, and tests try hostile files. The numbers are read here, straight into their place, so that
nothing but the arrays that are asked for is ever in memory. Those that need no cast can stay in the
pages of the file, which the system brings in when they are used.
"""

import functools
import itertools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from minilm.files import (
    LFS,
    FormatError,
    of_file,
    parse_json,
    require_no_pointer,
    write_atomically,
)

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}
SMALL = 1 << 16  # bytes; what has fewer is not worth a page
LARGE = 1 << 22  # bytes from which on NumPy asks for huge pages
PIECE = 1 << 18  # numbers that are read and looked at together: they fit a core's cache


def write_tensors(
    path: str | os.PathLike,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write named arrays as safetensors; the same input gives the same bytes.

    TypeError for a dtype that is not in DTYPES. Only arrays that are not C-contiguous are copied.
    """
    write_atomically(path, *tensor_parts(tensors, metadata))


def tensor_parts(
    tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> Iterator[bytes]:
    """What `write_tensors` writes, part by part; an array is copied only when its turn comes."""
    codes = {name: _code(name, array) for name, array in tensors.items()}
    # Large items first: every tensor then starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header = {} if metadata is None else {"__metadata__": _checked(metadata)}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": codes[name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    bodies = (_bytes_of(tensors[name], DTYPES[codes[name]]) for name in names)
    return itertools.chain([len(text).to_bytes(8, "little"), text], bodies)


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read a safetensors file as writable arrays, sorted by name; metadata is not returned.

    Raises FormatError, FileNotFoundError.
    """
    with open_tensors(path) as tensors:
        return {name: tensor.read() for name, tensor in sorted(tensors.items())}


@dataclass(frozen=True)
class Stored:
    """A tensor in an open file, which `read` brings into memory."""

    file: BinaryIO
    path: str | os.PathLike
    name: str
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    pages: Callable[[], mmap.mmap | None]  # all of the file

    size = property(lambda self: math.prod(self.shape))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)

    def read(self, dtype=None, finite: bool = False) -> np.ndarray:
        """All of it, cast to dtype, if one is given, block by block.

        FormatError if the file ends early, and, with finite, if a number is not finite in dtype.
        """
        array = _empty(self.path, self.shape, self.dtype if dtype is None else dtype)
        flat, cast = array.reshape(-1), array.dtype != self.dtype
        buffer = self._buffer() if cast else None
        for i in range(0, self.size, PIECE):
            part = flat[i : i + PIECE]
            stored = self._fill(i, buffer[: part.size] if cast else part)
            if cast:
                with np.errstate(over="ignore", invalid="ignore"):
                    part[...] = stored
            if finite:
                self._require_finite(part)
        return array

    def mapped(self, dtype=None, finite: bool = False) -> np.ndarray:
        """As `read`; but a large tensor that needs no cast is the file's own pages.

        What is written to it is this process's alone. The file may be replaced meanwhile, but not
        be overwritten in its place.
        """
        cast = dtype is not None and self.dtype != dtype
        odd = self.dtype == bool or self.start % self.dtype.itemsize or self.nbytes < SMALL
        pages = None if cast or odd else self.pages()
        if pages is None or len(pages) < self.start + self.nbytes:
            return self.read(dtype, finite)
        flat = np.frombuffer(pages, self.dtype, self.size, self.start)
        for i in range(0, self.size if finite else 0, PIECE):
            self._require_finite(flat[i : i + PIECE])
        return flat.reshape(self.shape)

    def equals(self, other) -> bool:
        """Whether another stored tensor has the same shape, dtype and bits."""
        if not isinstance(other, Stored) or (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        a, b = self._buffer(), self._buffer()
        return all((self._fill(i, a[: self.size - i]).view(np.uint8)
                    == other._fill(i, b[: self.size - i]).view(np.uint8)).all()
                   for i in range(0, self.size, PIECE))

    def _require_finite(self, part):
        if not all_finite(part):
            raise FormatError(self.path, f"{self.name} has numbers that are not finite in "
                                         f"{part.dtype}")

    def _buffer(self):
        return np.empty(min(PIECE, self.size), self.dtype)

    def _fill(self, i, block):
        """The block, with the numbers from i on read into it."""
        self.file.seek(self.start + i * self.dtype.itemsize)
        if self.file.readinto(block.view(np.uint8)) != block.nbytes:
            raise FormatError(self.path, f"ends within the tensor {self.name!r}")
        if self.dtype == bool and block.view(np.uint8).max() > 1:
            raise FormatError(self.path, f"tensor {self.name!r} has a bool that is neither 0 nor 1")
        return block


def all_finite(x: np.ndarray) -> bool:
    """Whether all numbers of a float array are finite. In 16 bits their exponents are looked at."""
    if x.itemsize > 2:
        return bool(np.isfinite(x).all())
    exponent = 0x7C00 if x.dtype == np.float16 else 0x7F80
    return not x.size or bool(((x.view(np.uint16) & exponent) != exponent).all())


@contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator[dict[str, Stored]]:
    """The tensors of a safetensors file by name, to be read one by one inside the `with`.

    They are those of the file that was there at the beginning, even if another one replaces it.
    Raises FormatError, before anything but the header is read, and FileNotFoundError.
    """
    with of_file(path, lambda file: open(os.dup(file.fileno()), "rb", buffering=0)) as file:
        try:
            with safe_open(path, "np"):
                end = os.fstat(file.fileno()).st_size
        except (SafetensorError, OSError) as error:
            require_no_pointer(path, file.read(len(LFS)))
            raise FormatError(path, f"not a safetensors file: {error}") from error
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(path, file.read(min(size, end)))  # no name may appear twice
        header.pop("__metadata__", None)
        pages = functools.cache(partial(_pages, file))
        yield {name: _stored(file, path, name, entry, 8 + size, end, pages)
               for name, entry in header.items()}


def _checked(metadata):
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map str to str, got {key!r}: {value!r}")
    return dict(sorted(metadata.items()))


def _code(name, array):
    if not isinstance(name, str):
        raise TypeError(f"tensor names must be str, got {name!r}")
    if name == "__metadata__":
        raise ValueError("a tensor cannot be named '__metadata__': safetensors reserves it")
    if not isinstance(array, np.ndarray):
        raise TypeError(f"tensor {name!r} must be a numpy array, got {type(array).__name__}")
    if array.dtype.name not in CODES:
        raise TypeError(f"tensor {name!r} has dtype {array.dtype}, expected one of {list(CODES)}")
    return CODES[array.dtype.name]


def _bytes_of(array, dtype):
    return np.asarray(array, dtype, order="C").reshape(-1).view(np.uint8)


def _pages(file) -> mmap.mmap | None:
    """All pages of the file, to be written by this process alone; None where they cannot be had."""
    if os.name == "nt":  # a file whose pages are held cannot be replaced there
        return None
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):  # the system fears that all of them are written
        return None


def _stored(file, path, name, entry, body, end, pages) -> Stored:
    if (code := entry["dtype"]) not in DTYPES:
        raise FormatError(path, f"tensor {name!r} has dtype {code}, expected one of {list(DTYPES)}")
    first, last = entry["data_offsets"]
    tensor = Stored(file, path, name, body + first, DTYPES[code], tuple(entry["shape"]),
                    pages)
    if tensor.nbytes != last - first or body + last > end:  # another file, for the library saw it
        raise FormatError(path, f"tensor {name!r} changed while it was read")
    if not tensor.size or len(tensor.shape) > 8:
        _empty(path, tensor.shape, tensor.dtype)
    return tensor


def _empty(path, shape, dtype):
    """An array that nobody has written. NumPy asks for huge pages for a large one, which take twice
    as long to come as plain ones; each number is written once here, so plain ones serve."""
    size, dtype = math.prod(shape), np.dtype(dtype)
    try:
        if size * dtype.itemsize < LARGE or os.name == "nt":
            return np.empty(shape, dtype)
        pages = mmap.mmap(-1, size * dtype.itemsize, access=mmap.ACCESS_COPY)
        return np.frombuffer(pages, dtype, size).reshape(shape)
    except (ValueError, OverflowError) as error:
        raise FormatError(path, f"has a tensor of shape {shape}: {error}") from error
    except (MemoryError, OSError) as error:
        raise FormatError(path, "cannot be read: it does not fit in memory") from error
