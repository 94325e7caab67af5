"""What all tests share: hypothesis profiles, no network, `close`, and CuPy or its stand-in.

HYPOTHESIS_PROFILE=thorough draws many more examples, few is for kernels under sanitizers, ci makes
them the same every time.
The tolerances of `close`, by dtype and with their reason, are in `scripts/bench/op_table.py`.
"""

import contextlib
import ctypes
import gc
import importlib.util
import os
import signal
import socket
from collections import Counter

# Several workers on the same cores, each with a thread for every core, mostly wait for each other:
# tests took up to ten times as long. It must be said before NumPy is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")

import pytest
from hypothesis import settings
from op_table import TOLERANCE, error

from minilm import backend, cuda
from minilm.optim import eightbit

settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True)
settings.register_profile("few", max_examples=2, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


def close(actual, expected, dtype, scale=0.0):
    """Assert that the arrays agree as well as computing in `dtype` allows."""
    found, allowed = error(actual, expected, scale), TOLERANCE[str(dtype)]
    assert found <= allowed, f"error {found:.1e}, allowed in {dtype}: {allowed:.0e}"


@contextlib.contextmanager
def counted_launches():
    """Inside, a Counter of how often each of our kernels is launched, on a card or without one."""
    count, launch = Counter(), cuda.Kernel.__call__

    def counted(kernel, *args, **settings):
        count[kernel.name] += 1
        launch(kernel, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda.Kernel, "__call__", counted)
        yield count


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """No test reaches for the network."""

    def refuse(self, address):
        raise AssertionError(f"a test tried to connect to {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket.socket, "connect_ex", refuse)
        yield


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, in this process and in those that it starts, as in a terminal.

    A shell without job control ignores it for what it starts with &, and that is inherited.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def has_gpu() -> bool:
    """Whether there is a driver, and a CuPy to use it, or a card that is pretended."""
    if "PRETENDED" in os.environ:
        from pretended.card import installed

        installed()
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return importlib.util.find_spec("cupy") is not None


@pytest.fixture(scope="module", params=["emulated", "real"] if has_gpu() else ["emulated"])
def cupy(request):
    """The module cupy: the stand-in of tests/emulated_cupy, and where a GPU is the real one too."""
    import emulator
    from emulated_cupy import installed

    if request.param == "emulated" and not emulator.available() and "CI" not in os.environ:
        pytest.skip("no g++: kernels cannot run on the CPU")
    stand_in = installed() if request.param == "emulated" else contextlib.nullcontext()
    gc.collect()
    gc.freeze()  # where no memory is left garbage is collected: not by looking at all of this again
    with stand_in:
        forget_cupy()
        yield backend.cupy()
        forget_cupy()
    gc.unfreeze()


def forget_cupy():
    """Let go of the module, of the kernels that it compiled, and of arrays that are kept."""
    for kept in (backend.cupy, backend.module_of, backend._cublas):
        kept.cache_clear()
    cuda.kernel.cache_clear()
    eightbit._tables.cache_clear()


@pytest.fixture(scope="session")
def peer():
    """(torch, transformers), offline."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    import torch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers
