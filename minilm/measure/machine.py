"""What decides how fast this machine is, beside the machine: BLAS's kernels, threads, workers.

OpenBLAS chooses kernels for a CPU that it knows, and may know better or worse than its user: of
those with AVX-512 some multiply as fast with AVX2. The variable OPENBLAS_CORETYPE chooses others.
Other kernels, and another number of BLAS's threads, add up in another order: they give other bits.

`measured` takes two seconds if the machine is quiet; `advice` says what to set.
"""

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

SIZE = 768  # of the products
PRODUCTS_FOR, STEPS_FOR = 0.3, 0.7  # seconds in which turns begin; the fastest counts
GAIN = 1.1  # what is faster by less is not worth a word
WIDE = ("SkylakeX", "Cooperlake", "SapphireRapids")  # OpenBLAS's kernels with AVX-512
NARROW = ("Haswell", "Zen")  # with AVX2
KERNELS, THREADS = "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS"

PRODUCTS = """
import sys, time
import numpy as np
from threadpoolctl import threadpool_info
a = np.random.default_rng(0).standard_normal((2, int(sys.argv[1]), int(sys.argv[1])), np.float32)
out = a[0] @ a[1]
found = [x.get("architecture") for x in threadpool_info() if x["internal_api"] == "openblas"]
print(*found[:1] or ["unknown"], flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    np.matmul(*a, out=out)
    print(time.perf_counter() - start, flush=True)
"""


@dataclass(frozen=True)
class Machine:
    """What was found. Rates are operations a second of products of SIZE x SIZE in float32."""

    cores: int
    features: tuple[str, ...]  # of the CPU, by NumPy's names
    threads_now: int  # of BLAS
    threads: dict[int, float]  # BLAS's threads -> rate
    # Setting -> (its kernels, rate of one thread). The first are the ones that are there.
    kernels: dict[str, tuple[str, float]] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)  # options of a program -> seconds
    load: float = 0.0  # processes that wanted a core, over the last minute


def measured(cores: int, steps: dict[str, Callable[[], float]]) -> Machine:
    """What this machine is.

    steps: the options of a program -> a function that makes steps of training as these options say,
    and returns the fastest one's seconds. The first are the default.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    blas = next((x for x in threadpool_info() if x["user_api"] == "blas"), {})
    features, now, threads = simd(), blas.get("architecture"), blas.get("num_threads", 1)
    chosen, kernels = os.environ.get(KERNELS) or None, {}
    if blas.get("internal_api") == "openblas":
        kernels = by_kernels([chosen, *[None] * bool(chosen), *alternatives(now, features)])
    return Machine(cores, features, threads, by_threads({1, threads, cores}), kernels,
                   in_turn(steps, STEPS_FOR), load)


def simd() -> tuple[str, ...]:
    """The CPU's vector instructions that NumPy finds."""
    found = np.show_config(mode="dicts").get("SIMD Extensions", {})
    return (*found.get("baseline", ()), *found.get("found", ()))


def alternatives(now: str | None, features: tuple[str, ...]) -> list[str]:
    """Kernels of OpenBLAS that this CPU could run beside those it has now.

    >>> alternatives("SkylakeX", ("X86_V4",)), alternatives("Haswell", ("X86_V3",))
    (['Haswell'], [])
    """
    if now in WIDE:
        return ["Haswell"]
    if now in NARROW and any(f == "X86_V4" or f.startswith("AVX512") for f in features):
        return ["SkylakeX"]
    return []


def by_kernels(choices) -> dict[str, tuple[str, float]]:
    """Setting -> (kernels, rate of one thread), each in a process of its own, which take turns.

    choices: values of OPENBLAS_CORETYPE; None is without. One that does not run is left out, and so
    is one that gives the same kernels as one before.
    """
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(products(choice)) for choice in choices]
        names, jobs = {}, {}
        for choice, process in zip(choices, processes):
            name = process.stdout.readline().strip()
            if name and name not in names.values():
                setting = f"{KERNELS}={choice}" if choice else f"no {KERNELS}"
                names[setting], jobs[setting] = name, lambda p=process: product_of(p)
        fastest = in_turn(jobs, PRODUCTS_FOR)
    return {setting: (names[setting], 2 * SIZE**3 / seconds)
            for setting, seconds in fastest.items() if seconds < float("inf")}


def product_of(process) -> float:
    """Seconds that a product takes a process; infinite if it has died."""
    with contextlib.suppress(OSError, ValueError):
        print(file=process.stdin, flush=True)
        return float(process.stdout.readline())
    return float("inf")


@contextlib.contextmanager
def products(choice: str | None):
    """A process that multiplies with these kernels when a line comes."""
    env = {k: v for k, v in os.environ.items() if k != KERNELS} | {THREADS: "1"}
    env |= {KERNELS: choice} if choice else {}
    process = subprocess.Popen(
        [sys.executable, "-c", PRODUCTS, str(SIZE)], text=True, env=env, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with contextlib.suppress(OSError):  # what it has not read
            process.stdin.close()


def by_threads(counts) -> dict[int, float]:
    """BLAS's threads -> rate in this process."""
    a, b = np.random.default_rng(0).standard_normal((2, SIZE, SIZE), np.float32)
    out = a @ b

    def product(n):
        with threadpool_limits(n, "blas"):
            start = time.perf_counter()
            np.matmul(a, b, out=out)
            return time.perf_counter() - start
    fastest = in_turn({n: lambda n=n: product(n) for n in sorted(counts)}, PRODUCTS_FOR)
    return {n: 2 * SIZE**3 / seconds for n, seconds in fastest.items()}


def in_turn(jobs: dict, seconds: float) -> dict:
    """The fewest seconds that each job says, of at least one turn. Turns begin for `seconds`."""
    fastest, start = dict.fromkeys(jobs, float("inf")), time.perf_counter()
    while jobs:
        for name, job in jobs.items():
            fastest[name] = min(fastest[name], job())
        if time.perf_counter() - start > seconds:
            break
    return fastest


def told(m: Machine) -> list[str]:
    """Lines: what was measured, and what to set."""
    def rates(found): return ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in found.items())
    threads = {f"{n} thread{'s' * (n > 1)}": rate for n, rate in m.threads.items()}
    steps = ", ".join(f"{name or 'as they are'} {1e3 * s:.1f} ms" for name, s in m.steps.items())
    lines = [f"CPU: {cpu()}, {m.cores} core{'s' * (m.cores > 1)}, {' '.join(m.features)}"]
    if m.kernels:
        lines.append(f"products on one thread, by kernels: {rates(dict(m.kernels.values()))}")
    return [*lines, f"products by BLAS's threads: {rates(threads)}",
            f"a step of a small model, by options of a program: {steps}", *advice(m)]


def cpu(info: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def advice(m: Machine) -> list[str]:
    """What to set: lines. Only what was faster by more than a tenth counts.

    >>> advice(Machine(2, (), 2, {1: 5e10, 2: 9e10}, {"": ("A", 5e10), "TYPE=B": ("B", 8e10)}))[0]
    'to set: TYPE=B, products are 1.60 times as fast; other bits'
    """
    rates = {setting: rate for setting, (_, rate) in m.kernels.items()}
    seconds = {setting: 1 / time for setting, time in m.steps.items()}
    threads = {f"{THREADS}={n}": m.threads[n] for n in sorted(
        m.threads, key=lambda n: n != m.threads_now)}
    lines = [*_worth(rates, "products are", "; other bits"),
             *_worth(threads, "with one worker and in generation products are", "; other bits"),
             *_worth(seconds, "for training, a step of a small model is", "")]
    if any(line.endswith("bits") for line in lines):
        lines.append("(other bits: a run that goes on under another setting gives other bits)")
    if not lines:
        lines.append(f"to set: nothing; nothing that was tried is {GAIN:.1f} times as fast")
    if m.load > m.cores / 2:
        lines.append(f"but the machine is busy (load {m.load:.1f} on {m.cores}): look again when "
                     "it is quiet")
    return lines


def _worth(speeds: dict[str, float], what: str, but: str) -> list[str]:
    """The line about the fastest setting, if it gains enough beside the first."""
    best = max(speeds, key=speeds.get, default=None)
    if best is None or (gain := speeds[best] / next(iter(speeds.values()))) <= GAIN:
        return []
    return [f"to set: {best}, {what} {gain:.2f} times as fast{but}"]
