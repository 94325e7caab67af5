"""Puts driver.c and cublas.c in the place of CUDA, and counts what CuPy launches.

    card = installed()  # before anything imports cupy, in a process with pretended.environment()
    card.launches, card.not_compared  # by name
    card.seconds  # of work that a card would do; the rest is the host's time
"""

import contextlib
import ctypes
import os
import time
from collections import Counter
from pathlib import Path

from pretended import products
from pretended.kernels import kernel

PROPERTIES = {"name": b"a pretended H100", "major": 9, "minor": 0, "multiProcessorCount": 132,
              "totalGlobalMem": 80 << 30, "l2CacheSize": 50 << 20, "warpSize": 32,
              "maxThreadsPerBlock": 1024, "sharedMemPerBlock": 48 << 10}


class Card:
    """The counters, and the functions that the driver calls."""

    def __init__(self):
        self.launches, self.not_compared, self.seconds = Counter(), Counter(), 0.0
        self.faults = []  # of products: cuBLAS cannot report them in another way
        self._sources, self._functions = {}, []  # by module; (name, run)

    def compiled(self, module, source, options):
        self._sources[module] = source, options

    def function(self, module, name):
        """The number of a kernel, by which `launch` is told what to run."""
        name = name.decode() if isinstance(name, bytes) else name
        self._functions.append([name, None, module])
        return len(self._functions)

    def launch(self, number, shape, shared, arguments):
        with self._counted(self._functions[number - 1][0]):
            self._run(self._functions[number - 1], shape, shared, arguments)

    def _run(self, entry, shape, shared, arguments):
        name, run, module = entry
        if run is None:
            run = entry[1] = kernel(*self._sources[module], name)
        if not run(shape, shared, (ctypes.c_void_p * 64).from_address(arguments)):
            self.not_compared[name] += 1

    def product(self, given):
        return self._answered(products.multiply, given.contents)

    def dot(self, *given):
        return self._answered(products.dot, *given)

    def other(self, name):
        self.launches[name.decode()] += 1
        self.not_compared[name.decode()] += 1

    def _answered(self, call, *given):
        with self._counted("cuBLAS"):
            try:
                return call(*given)
            except Exception as error:
                self.faults.append(error)
                return 14  # CUBLAS_STATUS_INTERNAL_ERROR

    @contextlib.contextmanager
    def _counted(self, name):
        self.launches[name] += 1
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def installed() -> Card:
    """Make CuPy run on the pretended card, from now on in this process."""
    card, folder = Card(), Path(os.environ["PRETENDED"])
    without_libcuda()
    cublas = ctypes.CDLL(folder / "libcublas.so.13", ctypes.RTLD_GLOBAL)
    card.kept = [products.PRODUCT(card.product), products.DOT(card.dot), products.OTHER(card.other)]
    cublas.set_callbacks(*card.kept)

    import cupy_backends.cuda.api.driver as driver
    import cupy_backends.cuda.api.runtime as runtime

    library = ctypes.PyDLL(folder / "driver.so")
    library.set_callbacks.argtypes = 3 * [ctypes.py_object]
    library.set_callbacks(card.function, card.launch, PROPERTIES)
    for module, prefix in (runtime, "rt_"), (driver, "dr_"):
        replace_functions(module, prefix, library)
    for name, answer in {
            "getDeviceCount": 1, "getDevice": 0, "driverGetVersion": 13000, "setDevice": None,
            "runtimeGetVersion": 13000, "getDeviceProperties": PROPERTIES, "streamIsCapturing": 0,
            "memGetInfo": (80 << 30, 80 << 30), "deviceSynchronize": None,
            "streamSynchronize": None, "_ensure_context": None}.items():
        setattr(runtime, name, lambda *_, answer=answer: answer)  # as Python calls them
    runtime.deviceGetAttribute = lambda which, _: library.rt_deviceGetAttribute(which, 0, 0)

    from cupy.cuda import compiler

    compile_module = compiler._compile_module_with_cache

    def noted(source, options=(), *args, **kwargs):
        module = compile_module(source, options, *args, **kwargs)
        card.compiled(module.ptr, source, tuple(options))
        return module
    compiler._compile_module_with_cache = noted
    return card


def without_libcuda():
    """CuPy checks that the driver's library loads; let this process itself stand for it."""
    load = ctypes.CDLL

    class CDLL(load):
        def __init__(self, name, *args, **kwargs):
            super().__init__(None if name == "libcuda.so.1" else name, *args, **kwargs)
    ctypes.CDLL = CDLL


def replace_functions(module, prefix, library):
    """Replace a module's C functions, for other Cython modules, with those of `library`."""
    python = ctypes.pythonapi
    python.PyCapsule_GetName.restype = ctypes.c_void_p
    python.PyCapsule_GetName.argtypes = [ctypes.py_object]
    python.PyCapsule_New.restype = ctypes.py_object
    python.PyCapsule_New.argtypes = 3 * [ctypes.c_void_p]
    for name, capsule in list(module.__pyx_capi__.items()):
        if hasattr(library, prefix + name):
            ours = ctypes.cast(getattr(library, prefix + name), ctypes.c_void_p)
            signature = python.PyCapsule_GetName(capsule)  # Cython compares it
            module.__pyx_capi__[name] = python.PyCapsule_New(ours, signature, None)
