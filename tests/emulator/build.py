"""Compiles a .cu source with g++ into a shared library, once for each source.

If CUDA_SANITIZER names a sanitizer, the library is built for it.
"""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(')
FLAGS = ["-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
         "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-sign-compare"]
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-tree-loop-distribute-patterns"]
BUILDS = {
    "": ["-O2", "-Werror"],
    "address": [*SANITIZED, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
                "-fsanitize-sections=cuda_shared"],
    "thread": [*SANITIZED, "-fsanitize=thread"],
}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}


def available() -> bool:
    """Whether there is a g++ to compile with."""
    return shutil.which("g++") is not None


def sanitizer() -> str:
    """The sanitizer that kernels of this process run under: "address", "thread" or ""."""
    return os.environ.get("CUDA_SANITIZER", "")


def sanitized_environment(kind: str) -> dict[str, str]:
    """The environment of a process whose kernels run under a sanitizer.

    kind: "address", which also finds undefined behaviour, or "thread". The first report ends the
    process with exit code 66. Run pytest with -s, or the output that it has captured is lost. A
    process may fork before its first launch, not after.
    """
    runtimes = [run_gxx(f"-print-file-name={name}") for name in (RUNTIMES[kind], "libstdc++.so")]
    options = "exitcode=66:halt_on_error=1:detect_leaks=0:handle_segv=0"
    return dict(
        os.environ, CUDA_SANITIZER=kind, LD_PRELOAD=" ".join(runtimes), ASAN_OPTIONS=options,
        UBSAN_OPTIONS=f"{options}:print_stacktrace=1", TSAN_OPTIONS=options,
        OPENBLAS_NUM_THREADS="1")


def kernel_names(code: str) -> list[str]:
    """The kernels that a source defines."""
    return KERNEL.findall(code)


def compile_library(code: str, options: list[str]) -> Path:
    """The path of the compiled source. RuntimeError with the compiler's message if g++ refuses."""
    kind = sanitizer()
    if kind and RUNTIMES[kind] not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError(f"CUDA_SANITIZER={kind} needs the environment that "
                           f"emulator.sanitized_environment({kind!r}) returns")
    exports = "".join(f"EXPORT_KERNEL({name})\n" for name in kernel_names(code))
    text = f'#line 1 "kernel.cu"\n{code}\n#line 1 "exports"\n{exports}'
    flags = [*FLAGS, *BUILDS[kind], *options]
    headers = [path.read_text() for path in sorted(HERE.rglob("*.h*"))]
    parts = [platform.machine(), version(), *flags, *headers, text]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    library = cache_folder() / f"{key}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        run_gxx(*flags, "-include", str(HERE / "cuda_cpu.hpp"), "-I", str(HERE / "include"),
                "-x", "c++", "-", "-o", str(unfinished), text=text)
        unfinished.replace(library)  # atomic: others may be compiling the same
    return library


def cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"minilm-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


@functools.cache
def version() -> str:
    return run_gxx("--version")


def run_gxx(*arguments: str, text: str = "") -> str:
    """What g++ prints. g++ itself runs without a sanitizer's runtime."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(["g++", *arguments], input=text, env=environment, text=True,
                            capture_output=True)
    if result.returncode:
        raise RuntimeError(f"g++ failed:\n{result.stderr}")
    return result.stdout.strip()
