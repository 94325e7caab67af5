"""`python -m minilm` prints what this machine has for minilm."""

from importlib.metadata import PackageNotFoundError, version

from minilm import backend
from minilm.command import command
from minilm.extras import install
from minilm.parallel.cores import default_workers
from minilm.versions import versions

EXTRAS = {"hf": ("tokenizers",), "plots": ("matplotlib",), "report": ("jinja2",),
          "clean": ("py3langid",), "scaling": ("scipy",), "mpi": ("mpi4py", "mpich"),
          "test": ("torch", "pytest"),
          "peers": ("transformers", "peft", "bitsandbytes")}


def main():
    """Print what this machine has for minilm."""
    told = versions()
    print(f"minilm {told['minilm']}, Python {told['python']}, {told['platform']}")
    print(f"numpy {told['numpy']}, ml_dtypes {told['ml_dtypes']}")
    for blas in told["blas"] or [{"internal_api": "unknown"}]:
        print("BLAS: " + ", ".join(f"{key} {value}" for key, value in blas.items() if value))
    count, processes = default_workers()
    print(f"workers: {count}, as {'processes' if processes else 'threads'}")
    print(f"GPU: {gpu()}")
    for extra, packages in EXTRAS.items():
        found = [installed(package) for package in packages]
        print(f"{extra}: " + (", ".join(found) if all(found) else install(extra)))


def gpu() -> str:
    """The GPU that minilm would use, or why there is none."""
    try:
        cp = backend.cupy()
        card = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
        cuda = cp.cuda.runtime.runtimeGetVersion()
    except (RuntimeError, OSError, AttributeError) as error:  # CuPy's are RuntimeErrors
        return f"none; {error}"
    return (f"{card['name'].decode()}, {card['totalGlobalMem'] / 2**30:.0f} GiB, sm_{card['major']}"
            f"{card['minor']}; CuPy {cp.__version__}, CUDA {cuda // 1000}.{cuda % 1000 // 10}")


def installed(package: str) -> str | None:
    """The package and its version, or None if it is not installed."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    command(main, name="python -m minilm")
