"""What decides a run's bits beside its settings: versions, libraries, and the files of its base."""

import platform
from pathlib import Path

import ml_dtypes
import numpy as np
from threadpoolctl import threadpool_info

import minilm
from minilm.files import sha256
from minilm.together import settle


def versions() -> dict:
    """Versions and libraries, as run.json keeps them."""
    told = ("internal_api", "version", "architecture", "num_threads")
    blas = [{key: library.get(key) for key in told}
            for library in threadpool_info() if library["user_api"] == "blas"]
    return {"minilm": minilm.__version__, "python": platform.python_version(),
            "numpy": np.__version__, "ml_dtypes": ml_dtypes.__version__,
            "platform": platform.platform(), "blas": blas}


def differing(then: dict, now: dict, workers: int) -> str:
    """What of two versions() gives other bits; "" if nothing does.

    BLAS sums in another order with another number of threads. Several workers have one thread each.
    """
    libraries = []
    for told in (then, now):
        found = told.get("blas")
        found = [x for x in found if isinstance(x, dict)] if isinstance(found, list) else []
        libraries.append([{k: v for k, v in library.items() if k != "num_threads" or workers == 1}
                          for library in found])
    changed = [f"{name} was {then[name]!r:.100} and is {now[name]}"
               for name in ("numpy", "ml_dtypes") if then.get(name, now[name]) != now[name]]
    # Other packages bring libraries of their own: one that is the same is numpy's.
    if all(libraries) and not any(library in libraries[1] for library in libraries[0]):
        changed.append("BLAS was {} and is {}".format(*map(_told, libraries)))
    return ", ".join(changed)


def fingerprints(folder: Path) -> list[dict]:
    """Name and SHA-256 of all files of a model's folder that may decide what it computes."""
    settle(folder)
    return [{"name": file.name, "sha256": sha256(file)} for file in sorted(Path(folder).iterdir())
            if file.suffix in (".safetensors", ".json", ".txt", ".model") and file.is_file()]


def _told(libraries: list[dict]) -> str:
    return "; ".join(", ".join(f"{k} {v}" for k, v in library.items()) for library in libraries)
