"""Compiles CUDA source with NVRTC as CuPy does, without a GPU, and reads what ptxas says of it.

Needs the wheels of the extra `kernels`: nvidia-cuda-nvrtc and nvidia-cuda-runtime.
"""

import ctypes
import functools
import re
from pathlib import Path
from typing import NamedTuple


class Resources(NamedTuple):
    """What a kernel takes, in bytes but for the registers of a thread."""

    registers: int
    stack: int
    spills: int
    shared: int


def installed():
    """The folder of the wheels' libraries and headers, or None."""
    try:
        import nvidia
    except ImportError:
        return None
    folders = [Path(path) / "cu13" for path in nvidia.__path__]
    return next((f for f in folders if list(f.glob("lib/libnvrtc.so.*"))), None)


@functools.cache
def library():
    """(NVRTC, the folder of CUDA's headers)."""
    root = installed()
    ctypes.CDLL(next(root.glob("lib/libnvrtc-builtins.so.*")), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(next(root.glob("lib/libnvrtc.so.*"))), root / "include"


def compile_cuda(source: str, file: str, arch: str, *options: str) -> dict[str, Resources]:
    """The resources of each kernel of the source; RuntimeError with the log where it holds an
    error or a warning."""
    nvrtc, headers = library()
    program = ctypes.c_void_p()
    done = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), file.encode(), 0,
                                    None, None)
    assert done == 0
    options = [f"-arch={arch}", "-std=c++17", "-ftz=true", "--device-as-default-execution-space",
               f"-I{headers}", "--ptxas-options=-v", *options]
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    log = log.value.decode()
    if failed or "warning" in log.lower():
        raise RuntimeError(f"{file}, {arch}:\n{log}")
    return resources(log)


def resources(log: str) -> dict[str, Resources]:
    """What ptxas -v reported, by kernel."""
    found = {}
    pattern = (r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
               r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)")
    for name, stack, stores, loads, registers, rest in re.findall(pattern, log, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = Resources(int(registers), int(stack), int(stores) + int(loads),
                                int(shared[1]) if shared else 0)
    return found
