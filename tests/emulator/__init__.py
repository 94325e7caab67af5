"""Runs CUDA kernels on the CPU, for tests. g++ compiles cuda_cpu.hpp and then the .cu source.

It is called like CuPy's RawModule, with NumPy arrays. What a GPU leaves undefined, or hangs on, is
an error here: a barrier or shuffle that some of its threads never reach, a missing argument, or one
of another size. Shared memory is NaN until it is written, or until the wait for an asynchronous
copy to it. The order of threads can be shuffled. Under `sanitized_environment`, an access out of
bounds or a race between threads ends the process.

Speed and memory limits are not checked, nor how a GPU rounds sums of mma, expf and the like.
"""

import contextlib
import ctypes
import os
from collections import Counter

import numpy as np

from emulator.build import (
    available,
    compile_library,
    kernel_names,
    sanitized_environment,
    sanitizer,
)

__all__ = ["RawModule", "available", "launches", "sanitized_environment", "thread_order"]

GRID_LIMITS, BLOCK_LIMITS, THREADS_LIMIT = (2**31 - 1, 65535, 65535), (1024, 1024, 64), 1024
SHARED_DEFAULT, SHARED_LIMIT = 48 << 10, 227 << 10  # bytes, as on an H100

launches = Counter()  # of each kernel, by name
_order = 0  # of threads: 0 is one by one; else a seed plus 1
_launcher = None  # the process that launched first


@contextlib.contextmanager
def thread_order(seed: int):
    """Inside, blocks and threads run in a random order drawn from `seed`, not one by one."""
    global _order
    before, _order = _order, seed + 1
    try:
        yield
    finally:
        _order = before


class RawModule:
    """CUDA C source, compiled. Only the options -D and -I count. RuntimeError if g++ refuses."""

    def __init__(self, code: str, options: tuple[str, ...] = ()):
        self.names = kernel_names(code)
        kept = [option for option in options if option.startswith(("-D", "-I"))]
        self._library = ctypes.PyDLL(str(compile_library(code, kept)))

    def get_function(self, name: str) -> "Function":
        """The kernel of this name."""
        if name not in self.names:
            raise RuntimeError(f"no kernel {name!r} in this module; it has {self.names}")
        return Function(self._library, name)


class Function:
    """A kernel, called as CuPy's RawKernel is: `f(grid, block, args, shared_mem=0)`.

    An array is passed as a pointer, a NumPy scalar as it is, a Python int as int64 and a float as
    float64. For more than 48 KiB of dynamic shared memory set `max_dynamic_shared_size_bytes`
    first, as on a GPU.
    """

    def __init__(self, library: ctypes.PyDLL, name: str):
        self.name, self.max_dynamic_shared_size_bytes = name, SHARED_DEFAULT
        self._launch = getattr(library, f"launch_{name}")
        self._launch.restype = ctypes.c_char_p
        sizes = (ctypes.c_int * 1024)()
        count = getattr(library, f"parameters_{name}")(sizes)
        self._sizes = sizes[:count]  # in bytes, negative for a pointer

    def __call__(self, grid, block, args, *, shared_mem: int = 0):
        shape = [*self._three("grid", grid, GRID_LIMITS),
                 *self._three("block", block, BLOCK_LIMITS)]
        if np.prod(shape[3:]) > THREADS_LIMIT:
            raise ValueError(f"{self.name}: a block {block} has more than {THREADS_LIMIT} threads")
        most = min(self.max_dynamic_shared_size_bytes, SHARED_LIMIT)
        if not 0 <= shared_mem <= most:
            raise ValueError(f"{self.name}: {shared_mem} bytes of dynamic shared memory, at most "
                             f"{most} (max_dynamic_shared_size_bytes; {SHARED_LIMIT} in all)")
        values = self._checked(args)
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        self.launch(shape, shared_mem, pointers)

    def launch(self, shape, shared_mem, pointers):
        """Run a grid of blocks (shape: six numbers). The arguments' addresses are not checked."""
        check_fork()
        launches[self.name] += 1
        fault = self._launch((ctypes.c_uint * 6)(*shape), ctypes.c_size_t(shared_mem),
                             ctypes.c_ulong(_order), pointers)
        if fault:
            raise RuntimeError(f"{self.name}: {fault.decode()}")

    def _three(self, what, given, limits):
        sizes = [int(n) for n in (*given, 1, 1, 1)[:3]]
        if len(given) > 3 or not all(1 <= n <= limit for n, limit in zip(sizes, limits)):
            raise ValueError(f"{self.name}: {what} {given}, expected 1 to {limits}")
        return sizes

    def _checked(self, args):
        """Each argument's bytes as a NumPy array. For an array these are its address."""
        if len(args) != len(self._sizes):
            raise TypeError(f"{self.name}: {len(args)} arguments, expected {len(self._sizes)}")
        return [self._bytes(i, *pair) for i, pair in enumerate(zip(args, self._sizes))]

    def _bytes(self, i, given, size):
        fits = np.ndarray if size < 0 else np.generic | bool | int | float
        what = f"{self.name}: argument {i}"
        if not isinstance(given, fits):
            raise TypeError(f"{what} is of type {type(given).__name__}, expected "
                            f"{'an array' if size < 0 else f'a number of {size} bytes'}")
        value = np.array(given.ctypes.data if size < 0 else given)
        if value.nbytes != abs(size):
            raise TypeError(f"{what}, {value.dtype}, has {value.nbytes} bytes, expected {size}")
        return value


def check_fork():
    """In a fork of a process that has fibers, TSan stops watching and reports nonsense."""
    global _launcher
    _launcher = _launcher or os.getpid()
    if sanitizer() == "thread" and _launcher != os.getpid():
        raise RuntimeError("forked after a launch: TSan cannot watch this process")
