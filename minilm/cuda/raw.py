"""Kernels of kernels/*.cu, compiled once, with every argument checked before a launch.

CuPy's RawKernel checks nothing: a wrong dtype, a strided array, or a Python int for a parameter of
32 bits is undefined behaviour on the card. So `Kernel` compares every argument with the parameter
list in the kernel's own source.
"""

import functools
import re
from pathlib import Path

import ml_dtypes  # noqa: F401  (gives NumPy the dtype bfloat16)
import numpy as np

from minilm.backend import cupy

# A wheel has the kernels in the package, the source tree beside it.
KERNELS = next(folder / "kernels" for folder in Path(__file__).parents[1:3]
               if (folder / "kernels").is_dir())
REAL = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
COMPUTES = frozenset(map(np.dtype, REAL))  # the dtypes that kernels have
DTYPES = {c: dtype for dtype, c in REAL.items()} | {
    "unsigned char": "uint8", "int": "int32", "long long": "int64"}


class Kernel:
    """A kernel of a file, compiled with REAL = real and other macros: kernel(grid, block, *args).

    An array must have the parameter's dtype, else TypeError. It must be C-contiguous and begin at a
    multiple of 16 bytes, else ValueError. A Python number is converted to the parameter's type;
    OverflowError if it does not fit.
    """

    def __init__(self, file: str, name: str, real="float32", **macros: int):
        real = str(np.dtype(real))
        if real not in REAL:
            raise TypeError(f"{name} computes in {', '.join(REAL)}, got {real}")
        source, self.name = read(file), name
        self.parameters = parameters(source, name, real)
        values = {"REAL": REAL[real], **macros}
        options = ("-std=c++17", *(f"-D{macro}={value}" for macro, value in values.items()))
        module = cupy().RawModule(code=source, options=options)
        self.launch, self.array = module.get_function(name), cupy().ndarray

    def __call__(self, grid, block, *args):
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, got {len(args)}")
        given = []
        for arg, (name, dtype, is_array) in zip(args, self.parameters):
            if not is_array:
                arg = arg if type(arg) is dtype.type else self.number(arg, name, dtype)
            elif (type(arg) is not self.array or arg.dtype != dtype or arg.data.ptr % 16
                    or not arg.flags.c_contiguous):  # asked here, as calls cost a third of a launch
                self.check(arg, name, dtype)
            given.append(arg)
        self.launch(grid, block, tuple(given))

    def check(self, x, name, dtype):
        """TypeError or ValueError if x is not an array that the kernel takes."""
        if type(x) is not self.array:
            raise TypeError(f"{self.name}: {name} must be an array on the GPU, got "
                            f"{type(x).__name__}")
        if x.dtype != dtype:
            raise TypeError(f"{self.name}: {name} must be {dtype}, got {x.dtype}")
        if not x.flags.c_contiguous:
            raise ValueError(f"{self.name}: {name} must be contiguous, got strides {x.strides}")
        if x.data.ptr % 16 and x.size:
            raise ValueError(f"{self.name}: {name} must begin at a multiple of 16 bytes, not "
                             f"{x.data.ptr:#x}")

    def number(self, x, name, dtype):
        """A Python number in the parameter's type; OverflowError if it does not fit."""
        half = 1 << 8 * dtype.itemsize - 1
        if dtype.kind == "i" and not -half <= x < half:
            raise OverflowError(f"{self.name}: {name} = {x} does not fit {dtype}")
        return dtype.type(x)


kernel = functools.cache(Kernel)


def read(file: str) -> str:
    """The source of a kernel file with its headers put in, so that errors and caches see them."""
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
    """x, or a copy if x is not contiguous or does not begin at a multiple of 16 bytes."""
    return x if x.flags.c_contiguous and x.data.ptr % 16 == 0 else x.copy()
