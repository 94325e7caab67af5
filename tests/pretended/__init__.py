"""The real CuPy on a card that does not exist: `python -m pretended` in `environment()`.

The stand-in (tests/emulated_cupy) contains what we know of CuPy. This is CuPy itself, from the
extra `kernels`. Its Python and Cython run as on a card, and NVRTC compiles every kernel for one.
These files replace the rest:

    driver.c    the CUDA runtime and driver: the card's memory is the host's, a launch calls back
    cublas.c    cuBLAS's functions: products call back, all others are recorded
    card.py     puts both in the place of CUDA before CuPy is imported, and counts launches
    kernels.py  runs a launch: our kernels by tests/emulator, CuPy's own by NumPy
    products.py runs a product by NumPy

Whatever CuPy refuses fails here: a name, a signature, a dtype, a kernel that does not compile, a
grid that is too large. If kernels.py has no formula for a kernel, it is recorded as not compared.
In this environment, tests that take the fixture `cupy` run on this CuPy as "real".

Some things are missing: what CuPy brings compiled (sort, argsort and argpartition by Thrust, sums
by CUB), and denormals that a card takes for 0. NVRTC's machine code is made but not run. Streams
are in order and nothing is asynchronous. Only the time that Python takes to launch is real.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
LIBRARIES = "libcublas.so.13", "libcublasLt.so.13"


def available() -> bool:
    """Whether a C compiler, Python's headers, CuPy and NVRTC are there."""
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return bool(shutil.which("gcc") and header.exists() and importlib.util.find_spec("cupy")
                and importlib.util.find_spec("nvidia"))


def environment() -> dict[str, str]:
    """Build what is needed, and give the environment for `pretended.card.installed()`.

    The libraries, and the kernels that CuPy compiles, stay in a folder of their own.
    """
    folder = build()
    path = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path), "LD_LIBRARY_PATH": str(folder),
        "PRETENDED": str(folder), "CUPY_CACHE_DIR": str(folder / "cache"),
        "CUPY_ACCELERATORS": "",  # CUB's reductions are kernels that NumPy cannot read
        "OPENBLAS_NUM_THREADS": "1"}


def build() -> Path:
    """The folder with the compiled libraries. RuntimeError with gcc's message if it refuses."""
    sources = [HERE / name for name in ("driver.c", "cublas.c", "cublas.names")]
    key = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"minilm-pretended-{os.getuid()}-{key}"
    if (folder / "driver.so").exists():
        return folder
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    names = (HERE / "cublas.names").read_text().split()
    (unfinished / "noted.h").write_text("".join(f"NOTED({name})\n" for name in names))
    (unfinished / "lt.c").write_text("int cublasLtCreate(void) { return 0; }\n")
    for library, source in zip(LIBRARIES, (HERE / "cublas.c", unfinished / "lt.c")):
        version = unfinished / f"{library}.map"
        version.write_text(f"{library} {{ global: *; }};\n")  # CuPy asks for versioned names
        gcc("-I", unfinished, f"-Wl,-soname,{library}", f"-Wl,--version-script={version}", source,
            "-o", unfinished / library)
    include = sysconfig.get_paths()["include"]
    gcc("-I", include, HERE / "driver.c", "-o", unfinished / "driver.so")
    try:
        unfinished.rename(folder)  # atomic: others may be building the same
    except OSError:
        shutil.rmtree(unfinished)
    return folder


def gcc(*words):
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"gcc failed:\n{result.stderr}")
