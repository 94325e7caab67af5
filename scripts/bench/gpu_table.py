"""What the benchmark on a GPU prints, and how it measures times.

The card's ceilings come first: bytes a second in a copy, and flops a second in a product of
bfloat16. They give each row a floor, a time that no kernel can beat. For each part of the work it
is bytes or flops over their ceiling, whichever takes longer; the parts are added up.

`times` does all timing of kernels. A pass makes each call once, on inputs of its own, and keeps all
results. The inputs together are three times as large as the L2 cache, so nothing comes from the
cache that would come from memory in a model. Launching from Python takes longer than some of the
kernels, so a pass waits behind other work until all of it is queued. (CUDA graphs would also work
for our kernels. But CuPy 14.2 refuses to capture cuBLAS, and both sides must be timed alike.)
"""

import datetime
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minilm.backend import cupy

HEAD = ("| what | floor | minilm | of the floor | the other | other / minilm | goal |\n"
        "|---|---|---|---|---|---|---|")


class Ceilings(NamedTuple):
    """What a card can do a second: bytes read and written by a copy, flops in bfloat16."""

    bytes: float
    flops: float

    def seconds(self, work) -> float:
        """The floor of work: parts of (bytes, flops), done one after the other."""
        return sum(max(size / self.bytes, flops / self.flops) for size, flops in work)


H200 = Ceilings(4.3e12, 790e12)


class Row(NamedTuple):
    """A measurement. `ours` and `other` draw inputs and return the `ready` of `times`."""

    title: str
    work: tuple  # parts of (bytes, flops), for the floor
    ours: Callable
    beside: str = ""  # the name of the other side
    other: Callable | None = None
    added: tuple = ()  # work whose floor is added to the other's time
    share: float = 0.0  # goal: at least this share of the floor's speed
    speed: float = 0.0  # goal: at least this ratio of the other's time to ours

    @property
    def goal(self) -> str:
        least = f"at least {self.share:.0%} of the floor" if self.share else ""
        if self.speed >= 1:
            return f"at least {self.speed:.1f} x as fast" + (f", {least}" if least else "")
        return f"at most {1 / self.speed:.2f} x its time" if self.speed else least


def times(ready: Callable[[], list], rounds: int) -> list[float]:
    """Seconds of a call on the card for each of `rounds` passes; each is the mean over a pass.

    ready() returns the calls of a pass. RuntimeError if Python cannot queue them fast enough.
    """
    found, waits = [], 8
    run_pass(ready, waits)  # compiles the kernels and fills the memory pool
    while len(found) < rounds:
        seconds, was_queued = run_pass(ready, waits)
        if was_queued:
            found.append(seconds)
        elif waits >= 4096:
            raise RuntimeError("not measured: the card ran the calls faster than they were queued")
        else:
            waits *= 2
    return found


def run_pass(ready, waits):
    """(mean seconds of a call, whether all calls were queued before the first began)."""
    cp = cupy()
    start, stop, numbers = cp.cuda.Event(), cp.cuda.Event(), cp.zeros(1 << 28, np.float32)
    before, calls = ready(), ready()
    cp.cuda.Device().synchronize()
    for _ in range(waits):
        numbers.max()  # only reads, so nothing is left in the cache to be written back
    results = [call() for call in before]  # an untimed pass, for the state of the caches
    start.record()
    results += [call() for call in calls]
    stop.record()
    was_queued = not start.done
    stop.synchronize()
    results.clear()
    return cp.cuda.get_elapsed_time(start, stop) / 1e3 / len(calls), was_queued


def measured_line(row: Row, ceilings: Ceilings, rounds: int) -> str:
    """Measure a row; returns its line."""
    ours = times(row.ours(), rounds)
    return line(row, ceilings, ours, times(row.other(), rounds) if row.other else [])


def line(row: Row, ceilings: Ceilings, ours=(), other=()) -> str:
    """A line of the table from the seconds of both sides; without them, "not yet measured"."""
    floor, added = ceilings.seconds(row.work), ceilings.seconds(row.added)
    if not ours:
        beside = row.beside and f"{row.beside}: not yet measured"
        return cells(row.title, span([floor]), "not yet measured", "", beside, "", row.goal)
    other, mine = [t + added for t in other], statistics.median(ours)
    share, speed = floor / mine, statistics.median(other) / mine if other else 0.0
    met = "met" if share >= row.share and speed >= row.speed else "missed"
    return cells(row.title, span([floor]), span(ours), f"{share:.0%}",
                 other and f"{row.beside}: {span(other)}", other and f"{speed:.2f}",
                 row.goal and f"{row.goal}: {met}")


def cells(*texts) -> str:
    return f"| {' | '.join(text or '' for text in texts)} |"


def span(values, unit="") -> str:
    """The median; of several values also the lowest and the highest. Seconds, unless unit is given.
    """
    if not unit:
        unit, factor = ("ms", 1e3) if statistics.median(values) >= 1e-3 else ("us", 1e6)
        values = [v * factor for v in values]
    middle = f"{statistics.median(values):.2f} {unit}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} - {max(values):.2f})"


def code_bytes(shape, double) -> float:
    """Bytes of an NF4 matrix in blocks of 64: codes and their constants."""
    n = math.prod(shape)
    blocks = n / 64
    return n / 2 + (blocks + 4 * blocks / 256 if double else 4 * blocks)


def heading() -> str:
    """What the table was measured on, when and how."""
    return (f"Measured on {datetime.date.today()}: {card()}.\n\n"
            f"    python {shlex.join(sys.argv)}\n\n"
            "Medians, with the lowest and the highest.\n")


def card() -> str:
    """The card, and the versions of driver and libraries."""
    import torch

    cp = cupy()
    name = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)["name"].decode()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    version = cp.cuda.runtime.driverGetVersion()
    return (f"{name}, driver {driver}, CUDA {version // 1000}.{version % 1000 // 10}, "
            f"CuPy {cp.__version__}, PyTorch {torch.__version__}")
