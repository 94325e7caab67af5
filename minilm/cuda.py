"""The CUDA kernels of kernels/*.cu: compiled once, and a launcher for each.

CuPy's RawKernel checks nothing: a wrong dtype, a strided array or a Python int where the kernel
wants 32 bits is undefined behaviour on the card. `Kernel` therefore holds every argument against
the parameter list in the kernel's own source before it launches. The launchers below check shapes.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (gives NumPy the dtype bfloat16)
import numpy as np

from minilm.backend import array_module, cupy, pointer

# Beside this file in a wheel, one folder up in the source tree.
KERNELS = next(folder for folder in (Path(__file__).parent / "kernels",
                                     Path(__file__).parents[1] / "kernels") if folder.is_dir())
REAL = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
DTYPES = {c: dtype for dtype, c in REAL.items()} | {
    "unsigned char": "uint8", "int": "int32", "long long": "int64"}


class Kernel:
    """A kernel of a file, compiled with REAL = real; call it with a grid, a block and arguments.

    Arrays must have the parameter's dtype, be C-contiguous and begin at a multiple of 16 bytes:
    TypeError and ValueError otherwise. Python numbers are converted to the parameter's type;
    OverflowError where one does not fit.
    """

    def __init__(self, file: str, name: str, real: str = "float32"):
        source, self.name = read(file), name
        self.parameters = parameters(source, name, real)
        module = cupy().RawModule(code=source, options=("-std=c++17", f"-DREAL={REAL[real]}"))
        self.launch = module.get_function(name)

    def __call__(self, grid, block, *args, shared_mem: int = 0):
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, got {len(args)}")
        args = tuple(self._checked(arg, *p) for arg, p in zip(args, self.parameters))
        self.launch(grid, block, args, shared_mem=shared_mem)

    def _checked(self, arg, name, dtype, is_array):
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


class Codes(NamedTuple):
    """What the kernels want of a FourBit: its arrays and two tables, all on the GPU.

    Constants c2 are float32; in 8 bits they are c2_codes, with c1, map and offset, and c2 is empty.
    """

    packed: object  # uint8 (n / 2,)
    levels: object  # float32 (16,)
    c2: object  # float32 (blocks,) or (0,)
    c2_codes: object  # uint8 (blocks,) or (0,)
    c1: object  # float32 (blocks / 256,) or (0,)
    map: object  # float32 (256,) or (0,)
    offset: object  # float32 (1,) or (0,)
    shape: tuple
    block_size: int

    @property
    def arrays(self):
        return self[:7]

    def checked(self, what: str):
        """The number of codes n; ValueError where an array does not go with the shape."""
        n = int(np.prod(self.shape))
        blocks, doubled = -(-n // self.block_size), self.c2_codes.size > 0
        wanted = {"packed": -(-n // 2), "levels": 16, "c2": 0 if doubled else blocks,
                  "c2_codes": blocks if doubled else 0, "c1": -(-blocks // 256) if doubled else 0,
                  "map": 256 if doubled else 0, "offset": 1 if doubled else 0}
        for name, size in wanted.items():
            if (found := getattr(self, name).size) != size:
                raise ValueError(f"{what}: {name} of {self.shape} in blocks of {self.block_size} "
                                 f"has {size} elements, got {found}")
        if self.block_size < 32 or self.block_size & (self.block_size - 1):
            raise ValueError(f"{what}: block_size must be 32, 64, 128 ..., got {self.block_size}")
        return n


def nf4_dequantize(W: Codes, dtype):
    """The numbers that 4-bit codes stand for, in W's shape: float32, float16 or bfloat16."""
    n, xp = W.checked("nf4_dequantize"), array_module(W.packed)
    out = xp.empty(W.shape, dtype)
    if n:
        kernel("nf4_dequantize.cu", "nf4_dequantize", str(out.dtype))(
            (-(-n // 8192),), (256,), *W.arrays, out, n, W.block_size.bit_length() - 1,
            W.c2_codes.size > 0)
    return out
