"""`python -m minilm`: the versions, BLAS, workers, the GPU or why there is none, the extras.

What it measures is in test_machine.py."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import minilm
from minilm import __main__ as told
from minilm import backend
from minilm.extras import install
from minilm.parallel.cores import default_workers

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def lines(monkeypatch, capsys):
    """The lines of main where only these packages are installed."""
    def run(**packages):
        def found(package):
            if package not in packages:
                raise PackageNotFoundError(package)
            return packages[package]
        monkeypatch.setattr(told, "version", found)
        told.main(quick=True)
        return capsys.readouterr().out.splitlines()
    return run


def test_the_command():
    done = subprocess.run([sys.executable, "-W", "error", "-m", "minilm", "--quick"], text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    count, processes = default_workers()
    first, second, *rest = done.stdout.splitlines()
    assert first.startswith(f"minilm {minilm.__version__}, Python {platform.python_version()}, ")
    assert second == f"numpy {np.__version__}, ml_dtypes {ml_dtypes.__version__}"
    assert f"workers: {count}, as {'processes' if processes else 'threads'}" in rest
    assert f"test: torch {version('torch')}, pytest {pytest.__version__}" in rest


def test_blas_is_numpys(lines, monkeypatch):
    library = {"user_api": "blas", "internal_api": "openblas", "version": "0.3.31",
               "architecture": "Haswell", "num_threads": 4, "prefix": "lib"}
    monkeypatch.setattr(minilm.versions, "threadpool_info",
                        lambda: [library, library | {"user_api": "openmp"}])
    (line,) = [line for line in lines() if line.startswith("BLAS")]
    assert line == ("BLAS: internal_api openblas, version 0.3.31, architecture Haswell, "
                    "num_threads 4")
    monkeypatch.setattr(minilm.versions, "threadpool_info", list)
    assert "BLAS: internal_api unknown" in lines()


@pytest.mark.parametrize("count, processes, said", [
    (1, False, "1, as threads"), (8, True, "8, as processes")])
def test_workers_are_those_of_training(lines, monkeypatch, count, processes, said):
    monkeypatch.setattr(told, "default_workers", lambda: (count, processes))
    assert f"workers: {said}" in lines()


def test_an_extra_is_there_or_how_to_get_it(lines):
    here = dict(tokenizers="1.2", torch="3", pytest="4", peft="5", jinja2="6", mpi4py="7")
    assert lines(**here)[-8:] == [
        "hf: tokenizers 1.2", f"plots: {install('plots')}", "report: jinja2 6",
        f"clean: {install('clean')}", f"scaling: {install('scaling')}",
        f"mpi: {install('mpi')}",  # mpich is missing
        "test: torch 3, pytest 4", f"peers: {install('peers')}"]


@pytest.fixture
def fresh():
    """What was found before is forgotten, and what is found here too."""
    backend.cupy.cache_clear()
    yield
    backend.cupy.cache_clear()


def test_without_cupy_it_says_how_to_get_it(fresh, lines, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    (line,) = [line for line in lines() if line.startswith("GPU")]
    assert line.startswith(f'GPU: none; device "cuda" needs CuPy: {install("gpu")} (')


def test_without_a_card_it_says_so(cupy, fresh, lines, monkeypatch):
    monkeypatch.setattr(cupy, "is_available", lambda: False)
    assert ('GPU: none; device "cuda" needs an NVIDIA GPU and its driver; CuPy finds none'
            in lines())


def test_a_card_is_named(cupy, fresh, lines, monkeypatch):
    """The stand-in has none, so it is given one."""
    runtime, card = cupy.cuda.runtime, {
        "name": b"A card", "totalGlobalMem": 80 * 2**30, "major": 9, "minor": 0}
    if hasattr(runtime, "getDeviceProperties"):
        card = runtime.getDeviceProperties(cupy.cuda.Device().id)
        number = runtime.runtimeGetVersion()
    else:
        number = 13010
        monkeypatch.setattr(cupy.cuda, "Device", lambda: type("Device", (), {"id": 3}), False)
        monkeypatch.setattr(runtime, "getDeviceProperties", {3: card}.get, False)
        monkeypatch.setattr(runtime, "runtimeGetVersion", lambda: number, False)
        monkeypatch.setattr(cupy, "__version__", "14.2.0", False)
    expected = (f"GPU: {card['name'].decode()}, {round(card['totalGlobalMem'] / 2**30)} GiB, "
                f"sm_{card['major']}{card['minor']}; CuPy {cupy.__version__}, "
                f"CUDA {number // 1000}.{number // 10 % 100}")
    assert expected in lines()
    if number == 13010:
        assert expected == "GPU: A card, 80 GiB, sm_90; CuPy 14.2.0, CUDA 13.1"
