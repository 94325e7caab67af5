"""`python -m minilm` prints what this machine has for minilm, and what to set to be fast."""

from importlib.metadata import PackageNotFoundError, version

import numpy as np

from minilm import backend
from minilm.command import command
from minilm.extras import install
from minilm.measure.machine import Machine, measured, told
from minilm.optim import AdamW
from minilm.parallel.cores import default_workers
from minilm.train import Trainer
from minilm.transformer import Config, Transformer
from minilm.versions import versions

EXTRAS = {"hf": ("tokenizers",), "plots": ("matplotlib",), "report": ("jinja2",),
          "clean": ("py3langid",), "scaling": ("scipy",), "mpi": ("mpi4py", "mpich"),
          "test": ("torch", "pytest"),
          "peers": ("transformers", "peft", "bitsandbytes")}


def main(quick: bool = False):
    """Print what this machine has for minilm. Then measure two seconds, and print what to set.

    Args:
        quick: measure nothing.
    """
    here = versions()
    print(f"minilm {here['minilm']}, Python {here['python']}, {here['platform']}")
    print(f"numpy {here['numpy']}, ml_dtypes {here['ml_dtypes']}")
    for blas in here["blas"] or [{"internal_api": "unknown"}]:
        print("BLAS: " + ", ".join(f"{key} {value}" for key, value in blas.items() if value))
    count, processes = default_workers()
    print(f"workers: {count}, as {'processes' if processes else 'threads'}")
    print(f"GPU: {gpu()}")
    for extra, packages in EXTRAS.items():
        found = [installed(package) for package in packages]
        print(f"{extra}: " + (", ".join(found) if all(found) else install(extra)))
    if not quick:
        print("", *told(machine()), sep="\n")


def machine() -> Machine:
    """Measure this machine: the default workers first, then the others."""
    count, processes = default_workers()
    teams = {"": (count, processes)}
    if processes:
        teams["--threads"] = count, False
    if count > 1:
        teams["--workers 1"] = 1, False
    return measured(count, {options: lambda team=team: step(*team)
                            for options, team in teams.items()})


def step(workers: int, processes: bool, steps: int = 3, limit: float = 0.2) -> float:
    """Seconds of the fastest of a few training steps of a small GPT-2, which begin within `limit`.
    """
    model = Transformer(Config.gpt2(256, context=64, layers=4, heads=4, width=128))
    batch = np.random.default_rng(0).integers(0, 256, (2, max(12, workers), 64))
    with Trainer(model, AdamW(model.parameters()), workers, processes) as trainer:
        taken = [trainer.step(0, tuple(batch)).seconds]
        while len(taken) < steps and sum(taken) < limit:
            taken.append(trainer.step(len(taken), tuple(batch)).seconds)
    return min(taken)


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
