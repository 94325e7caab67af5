"""A stand-in for CuPy on machines without a GPU: `with installed() as cupy:`.

NumPy does the arithmetic, but only what CuPy has gets through. Names and signatures are those of
the real CuPy (compared with it if it is installed), and NumPy arrays do not mix with the
stand-in's. So code that would fail on a card fails here. Names that this project does not use may
be missing.

    arrays.py   arrays; counts launches, bytes, and copies to and from the host
    blas.py     cuBLAS's products
    memory.py   the memory pool; counts and limits memory
    streams.py  streams, events and pinned memory
    real.py     the names and signatures of the real CuPy

Kernels run on the CPU (tests/emulator). The stand-in is stricter than CuPy: it refuses a NumPy
array as an index, and NumPy's own functions on its arrays. CuPy would copy such an index to the
card and take over such a function. The order of streams is not checked, nor any speed.
"""

import contextlib
import inspect
import math
import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np

from emulated_cupy import arrays, blas, memory, real, streams
from emulated_cupy.arrays import launches, ndarray, reset, to_device, to_host, traffic

__all__ = ["installed", "launches", "make", "reset", "to_device", "to_host", "traffic"]


class Module(types.ModuleType):
    """A module of the stand-in. What it does not define comes from NumPy, if CuPy has it."""

    def __getattr__(self, name):
        if self.__name__ != "cupy" or name.startswith("__"):
            raise AttributeError(f"the stand-in for {self.__name__} has no {name!r}")
        real.require("", name)
        value = getattr(np, name, None)
        if value is None or isinstance(value, types.ModuleType):
            raise AttributeError(f"the stand-in for cupy has no {name!r}")
        if isinstance(value, np.ufunc):
            value = Ufunc(name)
        elif callable(value) and not inspect.isclass(value):
            value = function(name, value)
        setattr(self, name, value)
        return value


class Ufunc:
    """cupy.ufunc: elementwise, with `out`, `dtype` and `casting` but no `where`. Also `at`."""

    def __init__(self, name):
        self.name = name

    def __call__(self, *args, **kwargs):
        return arrays.elementwise(self.name, *args, **kwargs)

    def at(self, a, indices, b=None):
        arrays.at(self.name, a, indices, b)


def function(name, fn):
    """NumPy's function with CuPy's signature."""

    def call(*args, **kwargs):
        real.bind(name, args, kwargs)
        return arrays.run(name, fn, args, kwargs)

    return call


def empty(shape, dtype=float, order="C"):
    return arrays.new(memory.unwritten(np.empty(shape, dtype, order)))


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    return arrays.new(memory.unwritten(np.empty_like(prototype._host, dtype, order, shape=shape)))


def arange(start, stop=None, step=1, dtype=None):
    if stop is None:
        start, stop = 0, start
    if dtype is not None:  # CuPy casts these before it counts; NumPy counts in Python numbers
        start, step = (np.dtype(dtype).type(x) for x in (start, step))
    return function("arange", np.arange)(start, stop, step, dtype)


def asarray(a, dtype=None):
    return arrays.array(a, dtype, copy=False)


def asnumpy(a):
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


class RawModule:
    """cupy.RawModule with its kernels run on the CPU."""

    def __init__(self, code=None, *, path=None, options=(), backend="nvrtc",
                 translate_cucomplex=False, enable_cooperative_groups=False,
                 name_expressions=None, jitify=None):
        from emulator import RawModule as OnCPU

        if code is None or not isinstance(options, tuple):
            raise TypeError("the stand-in compiles `code`, with options as a tuple")
        self.module = OnCPU(code, options)

    def get_function(self, name):
        return RawKernel(self.module.get_function(name))


class RawKernel:
    """cupy.RawKernel: unwraps its arguments. It is asked for more shared memory as CuPy's is."""

    def __init__(self, function):
        self.function = function
        self.max_dynamic_shared_size_bytes = function.max_dynamic_shared_size_bytes

    def __call__(self, grid, block, args, *, shared_mem=0):
        self.function.max_dynamic_shared_size_bytes = self.max_dynamic_shared_size_bytes
        self.function(grid, block, tuple(_argument(a) for a in args), shared_mem=shared_mem)
        arrays.count(self.function.name, [a for a in args if isinstance(a, ndarray)])


def _argument(x):
    """An array's memory, or a scalar's value. A NumPy array must have one element, its value."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, np.ndarray):
        if x.size != 1:
            raise TypeError(f"Unsupported type {type(x)}")
        return x.reshape(())[()]
    return x


def erf(x):
    """cupyx.scipy.special.erf."""
    values = np.array([math.erf(v) for v in x._host.reshape(-1).tolist()], np.float64)
    host = values.reshape(x.shape).astype(np.promote_types(x.dtype, np.float32))
    made = arrays.new(host)
    arrays.count("erf", [x, made])
    return made


def make() -> dict[str, types.ModuleType]:
    """The modules by their names, for sys.modules."""
    def module(name, **names):
        made = Module(name)
        made.__path__, made.__spec__ = [], ModuleSpec(name, None)
        vars(made).update(names)
        return made

    device = module("cupy.cuda.device", get_cublas_handle=lambda: blas.HANDLE)
    runtime = module("cupy.cuda.runtime", CUDA_R_32F=0, CUDA_R_64F=1, CUDA_R_16F=2, CUDA_R_16BF=14,
                     CUDARuntimeError=streams.CUDARuntimeError, getDeviceCount=lambda: 1)
    memories = module("cupy.cuda.memory", OutOfMemoryError=memory.OutOfMemoryError,
                      MemoryPool=memory.MemoryPool)
    cuda = module(
        "cupy.cuda", device=device, runtime=runtime, memory=memories,
        MemoryHook=memory.MemoryHook, is_available=lambda: True,
        **{f.__name__: f for f in (
            memory.get_allocator, memory.set_allocator, streams.Event, streams.Stream,
            streams.get_current_stream, streams.PinnedMemory, streams.PinnedMemoryPointer)})
    cupy = module(
        "cupy", cuda=cuda, ndarray=ndarray, RawModule=RawModule, RawKernel=RawKernel,
        is_available=lambda: True, get_default_memory_pool=lambda: memory.POOL, arange=arange,
        array=arrays.array, asarray=asarray, asnumpy=asnumpy, empty=empty, empty_like=empty_like,
        matmul=arrays.matmul)
    special = module("cupyx.scipy.special", erf=erf)
    scipy = module("cupyx.scipy", special=special)
    libs = module("cupy_backends.cuda.libs", cublas=blas)
    found = [cupy, cuda, device, runtime, memories, module("cupyx", scipy=scipy), scipy, special,
             module("cupy_backends", cuda=module("cupy_backends.cuda", libs=libs)), libs]
    named = {m.__name__: m for m in found}
    return named | {"cupy_backends.cuda": named["cupy_backends"].cuda,
                    "cupy_backends.cuda.libs.cublas": blas}


MODULES = make()


@contextlib.contextmanager
def installed():
    """Inside, `import cupy` gives the stand-in, with all counters at zero and no memory limit."""
    def ours(name): return name.split(".")[0] in ("cupy", "cupyx", "cupy_backends")
    before = {name: m for name, m in sys.modules.items() if ours(name)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(MODULES)
    reset()
    memory.POOL._forget()
    try:
        yield MODULES["cupy"]
    finally:
        memory.set_allocator(memory.POOL.malloc)
        for name in [name for name in sys.modules if ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)
