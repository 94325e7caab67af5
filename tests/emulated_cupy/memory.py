"""Memory of the stand-in: a pool that counts and limits as CuPy's does, and hooks that it calls.

Nothing is really pooled. Every array has a block of its own from malloc, so a sanitizer can put red
zones around it, and the block is freed with its last view. Only the numbers follow CuPy's pool:
sizes are rounded up to 512 bytes, chunks are split and joined, and the limit is on what the card
has given, not on what is used.
"""

import ctypes
import gc
import threading
import weakref
from collections import deque

import numpy as np

from emulated_cupy.streams import get_current_stream

BLOCK = 512


class OutOfMemoryError(MemoryError):
    """cupy.cuda.memory.OutOfMemoryError, in CuPy's words."""

    def __init__(self, size, total, limit=0):
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} "
                         f"bytes, limit set to: {limit:,} bytes).")


class MemoryPool:
    """The numbers of cupy.get_default_memory_pool(): what it takes of the card, and gives back.

    An array gets the smallest free chunk of its stream that holds it, of equal ones the one that
    has been free for longest: the numbers are the same in each process. The rest of the chunk stays
    free. If there is no such chunk, the card is asked for one. A chunk that was split goes back to
    the card when all of its pieces are free.
    """

    def __init__(self):
        self._limit = self._used = self._total = 0
        self._free, self._dropped = {}, deque()  # free chunks, in order; those a finalizer dropped
        self._lock = threading.RLock()
        self._sizes = {}  # address -> bytes, of every live block

    def _forget(self):
        """Begin as a new process does: what was allocated before is nobody's."""
        self._limit = self._used = self._total = 0
        self._free, self._dropped = {}, deque()  # older pointers know the old ones

    def set_limit(self, size=None, fraction=None):
        if fraction is not None:
            raise NotImplementedError("there is no card whose fraction it could be")
        self._limit = size or 0

    def get_limit(self):
        return self._limit

    def used_bytes(self):
        with self._lock:
            self._collect()
            return self._used

    def total_bytes(self):
        return self._total

    def free_bytes(self):
        return self._total - self.used_bytes()

    def free_all_blocks(self, stream=None):
        """Give all whole free chunks back to the card."""
        with self._lock:
            self._collect()
            for chunk in [c for c in self._free if c.whole() and stream in (None, c.stream)]:
                self._free.pop(chunk)
                self._total -= chunk.size

    def malloc(self, size):
        """Room for an array; OutOfMemoryError beyond the limit."""
        rounded = -(-size // BLOCK) * BLOCK
        with self._lock:
            self._collect()
            chunk = self._free_chunk(rounded) or self._new_chunk(size, rounded)
            self._used += rounded
        return MemoryPointer(self, chunk)

    def _free_chunk(self, size):
        stream = get_current_stream()
        fits = [c for c in self._free if c.stream is stream and c.size >= size]
        if not fits:
            return None
        chunk = min(fits, key=lambda c: c.size)
        self._free.pop(chunk)
        if chunk.size > size:
            self._free[chunk.split(size)] = True
        return chunk

    def _new_chunk(self, size, rounded):
        if self._limit and self._total + rounded > self._limit:
            gc.collect()
            self.free_all_blocks()
        if self._limit and self._total + rounded > self._limit:
            for hook in list(_hooks().values()):
                hook.malloc_postprocess(device_id=0, size=size, mem_size=rounded, mem_ptr=0,
                                        pmem_id=0)
            raise OutOfMemoryError(rounded, self._total, self._limit)
        self._total += rounded
        return Chunk(rounded, get_current_stream())

    def _collect(self):
        """Make chunks free that nobody uses any more, and join them with free neighbours."""
        while self._dropped:
            chunk = self._dropped.popleft()
            self._used -= chunk.size
            if chunk.after in self._free:
                self._free.pop(chunk.after)
                chunk.join()
            if chunk.before in self._free:
                chunk = chunk.before
                self._free.pop(chunk)
                chunk.join()
            self._free[chunk] = True


class Chunk:
    """A piece of one allocation of the card; it knows the pieces beside it."""

    def __init__(self, size, stream, before=None, after=None):
        self.size, self.stream, self.before, self.after = size, stream, before, after

    def whole(self):
        return self.before is self.after is None

    def split(self, size):
        """Keep the first `size` bytes; the rest is a new piece."""
        rest = Chunk(self.size - size, self.stream, self, self.after)
        if self.after:
            self.after.before = rest
        self.size, self.after = size, rest
        return rest

    def join(self):
        """Take in the piece after this one."""
        self.size += self.after.size
        self.after = self.after.after
        if self.after:
            self.after.before = self


class MemoryPointer:
    """An allocator's result: room in a pool until it is dropped. The bytes are NumPy's."""

    def __init__(self, pool, chunk):
        self.size = chunk.size
        weakref.finalize(self, pool._dropped.append, chunk).atexit = False


POOL = MemoryPool()


def adopt(array: np.ndarray):
    """Count an array's block until it is freed; OutOfMemoryError beyond the pool's limit."""
    block = owner(array)
    size, address = block.nbytes, block.ctypes.data
    if not size:
        return
    pointer = get_allocator()(size)
    POOL._sizes[address] = size
    weakref.finalize(block, _freed, address, pointer).atexit = False
    for hook in list(_hooks().values()):
        hook.malloc_postprocess(device_id=0, size=size, mem_size=pointer.size, mem_ptr=address,
                                pmem_id=address)


def _freed(address, pointer):
    del POOL._sizes[address]
    for hook in list(_hooks().values()):
        hook.free_postprocess(device_id=0, mem_size=pointer.size, mem_ptr=address, pmem_id=address)


def get_allocator():
    return _allocator


def set_allocator(allocator=None):
    """Set what all threads ask for room. None is the raw allocator, without a pool."""
    global _allocator
    _allocator = allocator or MemoryPool().malloc


def owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory this one is a view of, or itself."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def unwritten(array: np.ndarray) -> np.ndarray:
    """The array filled with 0xFF, which is nan in every float, so that unwritten elements show."""
    ctypes.memset(array.ctypes.data, 0xFF, array.nbytes)
    return array


def view(address: int, shape, strides, dtype) -> np.ndarray:
    """What lies at an address. IndexError if it is not inside one block of the pool."""
    dtype = np.dtype(dtype)
    size = sum((n - 1) * s for n, s in zip(shape, strides)) + dtype.itemsize
    blocks = list(POOL._sizes.items())
    if not any(start <= address and address + size <= start + n for start, n in blocks):
        raise IndexError(f"{size} bytes at {address:#x} are in no array on the GPU")
    memory = (ctypes.c_char * size).from_address(address)
    return np.ndarray(shape, dtype, memory, strides=strides)


class MemoryHook:
    """cupy.cuda.MemoryHook: inside its `with` block it is told of this thread's allocations."""

    name = "MemoryHook"

    def __enter__(self):
        if self.name in _hooks():
            raise KeyError(f"memory hook {self.name} already exists")
        _hooks()[self.name] = self
        return self

    def __exit__(self, *_):
        del _hooks()[self.name]

    def malloc_postprocess(self, **kwargs):
        pass

    def free_postprocess(self, **kwargs):
        pass


_thread = threading.local()
_allocator = POOL.malloc


def _hooks():
    return _thread.__dict__.setdefault("hooks", {})
