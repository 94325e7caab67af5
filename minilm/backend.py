"""Devices: which one an array is on, and how memory is handled there.

Work on an array runs where the array is. Code that needs a function of NumPy or CuPy asks
`array_module(x)` for the module; elsewhere it uses operators and methods. Only this module and
arrays.py import CuPy, and only when it is used.
"""

import contextlib
import ctypes
import functools
import sys

import numpy as np

from minilm.extras import install


def array_module(x):
    """numpy or cupy, whichever x belongs to."""
    return module_of(type(x))


@functools.cache  # asked thousands of times a step
def module_of(kind: type):
    """numpy or cupy, whichever arrays of this type belong to."""
    if issubclass(kind, (np.ndarray, np.generic)):
        return np
    cupy = sys.modules.get("cupy")
    if cupy is None or not issubclass(kind, cupy.ndarray):
        raise TypeError(f"expected an array of NumPy or CuPy, got {kind.__name__}")
    return cupy


def to_device(array, device: str):
    """The array on `device`, "cpu" or "cuda"; the same object if it is already there.

    ValueError for any other device. RuntimeError with the reason if "cuda" cannot be used.
    """
    if device == "cpu":
        return array if array_module(array) is np else array.get()
    if device != "cuda":
        raise ValueError(f'device must be "cpu" or "cuda", got {device!r}')
    return cupy().asarray(array)


@functools.cache
def cupy():
    """The cupy module. RuntimeError with the reason if it cannot be used."""
    try:
        import cupy as cp
    except ImportError as error:
        why = " ".join(str(error).split())  # CuPy writes a page
        message = f'device "cuda" needs CuPy: {install("gpu")} ({why})'
        raise RuntimeError(message) from None
    if not cp.is_available():
        raise RuntimeError('device "cuda" needs an NVIDIA GPU and its driver; CuPy finds none')
    return cp


def cublas():
    """(CuPy's cuBLAS functions, the current device's handle, set to add up in float32 only).

    By default cuBLAS may split a long sum of 16-bit products and round each part to 16 bits. A
    product of CuPy's own may switch this on again, so each call here switches it off.
    """
    blas, current_handle = _cublas()
    handle = current_handle()
    disallow_reduced_precision_reduction = 16  # of cublasMath_t; CuPy has no name for it
    blas.setMathMode(handle, disallow_reduced_precision_reduction)
    return blas, handle


@functools.cache
def _cublas():
    cp = cupy()
    from cupy_backends.cuda.libs import cublas

    return cublas, cp.cuda.device.get_cublas_handle


def nccl():
    """CuPy's module of NCCL. RuntimeError with the reason if it cannot be used."""
    cupy()
    from cupy.cuda import nccl

    if not nccl.available:
        raise RuntimeError(f"ranks on GPUs need NCCL: {install('nccl')}")
    return nccl


def pool_bytes() -> int:
    """Bytes that CuPy's pool takes of the GPU, after it has given back all that it can."""
    pool = cupy().get_default_memory_pool()
    pool.free_all_blocks()
    return pool.total_bytes()


@contextlib.contextmanager
def memory_limit(size: int):
    """Inside, all arrays on the GPU together may take `size` bytes, as on a smaller card.

    Beyond that CuPy raises OutOfMemoryError, a MemoryError that says how many bytes were requested,
    held and allowed. The limit does not count what CUDA itself and cuBLAS hold, about half a GB.
    """
    pool = cupy().get_default_memory_pool()
    before = pool.get_limit()
    pool.free_all_blocks()  # blocks that it keeps for later would count
    pool.set_limit(size=size)
    try:
        yield
    finally:
        pool.set_limit(size=before)


def peak_memory():
    """`with peak_memory() as peak:` measures the GPU arrays that this thread makes.

    peak.bytes is the most that arrays took at any one time, including those made before.
    """
    cp = cupy()

    class Peak(cp.cuda.MemoryHook):
        name = "peak_memory"

        def __init__(self):
            self.held = self.bytes = cp.get_default_memory_pool().used_bytes()

        def malloc_postprocess(self, **block):
            if block["mem_ptr"]:  # 0 if there was no room
                self.held += block["mem_size"]
                self.bytes = max(self.bytes, self.held)

        def free_postprocess(self, **block):
            self.held -= block["mem_size"]

    return Peak()


def tune_allocator():
    """Keep freed memory in the process, so that a new array costs no page faults (glibc only).

    Otherwise the operating system maps and unmaps each large temporary, which on a small model
    costs more than the arithmetic. It changes the whole process, so importing does not do it.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def use_huge_pages(arrays):
    """Move NumPy's arrays to memory pages of 2 MiB, if the system can (Linux 6.1); else nothing.

    A model that generates reads all weights for each token, and looks up the address of each page
    of usually 4 KiB. The arrays keep their addresses. It takes 0.2 s for half a gigabyte.
    """
    if sys.platform != "linux":
        return
    madvise, size = ctypes.CDLL(None).madvise, 2 << 20
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    madv_collapse = 25  # refused at the end of the heap, and by older systems
    for array in arrays:
        start = array.ctypes.data // size * size
        end = -(-(array.ctypes.data + array.nbytes) // size) * size
        madvise(start, end - start, madv_collapse)
