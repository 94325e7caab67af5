"""Memory of the stand-in: a pool that counts and limits, and hooks that are told, as CuPy's are.

Nothing is pooled in truth: every array has a block of its own from malloc, which a sanitizer can
put red zones around, and which is given back when its last view is gone. Only the numbers follow
the pool: sizes rounded up to 512 bytes, and "total" that falls with free_all_blocks() alone.
"""

import ctypes
import threading
import weakref

import numpy as np

BLOCK = 512


class OutOfMemoryError(MemoryError):
    """cupy.cuda.memory.OutOfMemoryError, in CuPy's words."""

    def __init__(self, size, total, limit=0):
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} "
                         f"bytes, limit set to: {limit:,} bytes).")


class MemoryPool:
    """cupy.get_default_memory_pool()'s numbers."""

    def __init__(self):
        self._limit = self._used = self._total = 0
        self._sizes = {}  # address -> bytes of every block that lives

    def set_limit(self, size=None, fraction=None):
        if fraction is not None:
            raise NotImplementedError("there is no card whose fraction it could be")
        self._limit = size or 0

    def get_limit(self):
        return self._limit

    def used_bytes(self):
        return self._used

    def total_bytes(self):
        return self._total

    def free_bytes(self):
        return self._total - self._used

    def free_all_blocks(self, stream=None):
        self._total = self._used

    def malloc(self, size):
        """Room for an array; OutOfMemoryError beyond the limit."""
        rounded = -(-size // BLOCK) * BLOCK
        if self._limit and self._used + rounded > self._limit:
            for hook in list(_hooks().values()):
                hook.malloc_postprocess(device_id=0, size=size, mem_size=rounded, mem_ptr=0,
                                        pmem_id=0)
            raise OutOfMemoryError(rounded, self._used, self._limit)
        self._used += rounded
        self._total = max(self._total, self._used)
        return MemoryPointer(self, rounded)


class MemoryPointer:
    """What an allocator gives: room in a pool until it is dropped. The bytes are NumPy's."""

    def __init__(self, pool, size):
        self.size = size
        weakref.finalize(self, _give_back, pool, size).atexit = False


def _give_back(pool, size):
    pool._used -= size


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
    """What arrays of all threads ask for room; None is the raw allocator, without a pool."""
    global _allocator
    _allocator = allocator or MemoryPool().malloc


def owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory this one is a view of, or itself."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def unwritten(array: np.ndarray) -> np.ndarray:
    """The array filled with 0xFF, nan in every float, so that what nobody writes shows."""
    ctypes.memset(array.ctypes.data, 0xFF, array.nbytes)
    return array


def view(address: int, shape, strides, dtype) -> np.ndarray:
    """What lies at an address; IndexError where that is not inside one block of the pool."""
    dtype = np.dtype(dtype)
    size = sum((n - 1) * s for n, s in zip(shape, strides)) + dtype.itemsize
    blocks = list(POOL._sizes.items())
    if not any(start <= address and address + size <= start + n for start, n in blocks):
        raise IndexError(f"{size} bytes at {address:#x} are in no array on the GPU")
    memory = (ctypes.c_char * size).from_address(address)
    return np.ndarray(shape, dtype, memory, strides=strides)


class MemoryHook:
    """cupy.cuda.MemoryHook: told of this thread's allocations while it is a `with` block's."""

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
