"""Kernels of kernels/*.cu, compiled once, with every argument checked before a launch.

CuPy's RawKernel checks nothing: a wrong dtype, a strided array or a Python int where the kernel
wants 32 bits is undefined behaviour on the card. `Kernel` therefore holds every argument against
the parameter list in the kernel's own source.
"""

import functools
import re
from pathlib import Path

import ml_dtypes  # noqa: F401  (gives NumPy the dtype bfloat16)
import numpy as np

from minilm.backend import array_module, cupy, pointer

# In the package in a wheel, beside it in the source tree.
KERNELS = next(folder / "kernels" for folder in Path(__file__).parents[1:3]
               if (folder / "kernels").is_dir())
REAL = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
DTYPES = {c: dtype for dtype, c in REAL.items()} | {
    "unsigned char": "uint8", "int": "int32", "long long": "int64"}


class Kernel:
    """A kernel of a file, compiled with REAL = real and other macros; call it with a grid, a block
    and arguments. shared: the bytes of shared memory that each block gets beside its fixed arrays.

    Arrays must have the parameter's dtype, be C-contiguous and begin at a multiple of 16 bytes:
    TypeError and ValueError otherwise. Python numbers are converted to the parameter's type;
    OverflowError where one does not fit.
    """

    def __init__(self, file: str, name: str, real: str = "float32", shared: int = 0,
                 **macros: int):
        if real not in REAL:
            raise TypeError(f"{name} computes in {', '.join(REAL)}, got {real}")
        source, self.name = read(file), name
        self.parameters = parameters(source, name, real)
        values = {"REAL": REAL[real], **macros}
        options = ("-std=c++17", *(f"-D{macro}={value}" for macro, value in values.items()))
        module = cupy().RawModule(code=source, options=options)
        self.launch, self.shared = module.get_function(name), shared
        if shared > 48 << 10:  # more than that must be asked for
            self.launch.max_dynamic_shared_size_bytes = shared

    def __call__(self, grid, block, *args):
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, got {len(args)}")
        args = tuple(self.checked(arg, *p) for arg, p in zip(args, self.parameters))
        self.launch(grid, block, args, shared_mem=self.shared)

    def checked(self, arg, name, dtype, is_array):
        """The argument as the kernel takes it."""
        what = f"{self.name}: {name}"
        if not is_array:
            if dtype.kind == "i" and not (number := np.iinfo(dtype)).min <= arg <= number.max:
                raise OverflowError(f"{what} = {arg} does not fit {dtype}")
            return dtype.type(arg)
        if array_module(arg) is np:
            raise TypeError(f"{what} must be an array on the GPU, got {type(arg).__name__}")
        if arg.dtype != dtype:
            raise TypeError(f"{what} must be {dtype}, got {arg.dtype}")
        if not arg.flags.c_contiguous:
            raise ValueError(f"{what} must be contiguous, got strides {arg.strides}")
        if arg.size and pointer(arg) % 16:
            raise ValueError(f"{what} must begin at a multiple of 16 bytes, not {pointer(arg):#x}")
        return arg


kernel = functools.cache(Kernel)


@functools.cache
def multiprocessors() -> int:
    """How many the current GPU has."""
    return cupy().cuda.Device().attributes["MultiProcessorCount"]


def read(file: str) -> str:
    """The source of a kernel file, its headers in place, so that errors and caches see them."""
    def inline(match):
        line = source.count("\n", 0, match.start()) + 2
        return f'{_numbered(match[1])}\n#line {line} "{file}"'
    source = (KERNELS / file).read_text(encoding="utf-8")
    return f'#line 1 "{file}"\n' + re.sub(r'#include "(\w+\.cuh)"', inline, source)


def _numbered(header):
    return f'#line 1 "{header}"\n' + (KERNELS / header).read_text(encoding="utf-8")


def parameters(source: str, name: str, real: str) -> list[tuple[str, np.dtype, bool]]:
    """(name, dtype, whether it is an array) of each parameter of a kernel, read from its source."""
    start = r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s+)?'
    declared, found = re.search(start + name + r"\((.*?)\)\s*{", source, re.S), []
    for text in declared[1].split(","):
        words = re.sub(r"\bconst\b|\b__restrict__\b", "", text).replace("*", " * ").split()
        c_type = " ".join(w for w in words[:-1] if w != "*")
        found.append((words[-1], np.dtype(real if c_type == "REAL" else DTYPES[c_type]),
                      "*" in words))
    return found


def aligned(x):
    """x, or a copy of it where its memory is not as kernels want it."""
    return x if x.flags.c_contiguous and pointer(x) % 16 == 0 else x.copy()
