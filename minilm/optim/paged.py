"""AdamW with its states in pages that move between the host and the device.

Dettmers, Pagnoni, Holtzman & Zettlemoyer 2023, arXiv:2305.14314, section 3, "Paged Optimizers". In
the paper the driver moves pages on page faults; here the optimizer copies them itself. Parameters
and gradients stay on the device; pages.py says how pages of states come and go. The parameters have
the bits of `AdamW`, for every page size and budget.

If a step fails, parameters and states are all of the old step or all of the new one:

* Before the first update is launched, memory is found and pages are brought back. If this fails, it
  raises at the old state.
* A copy that is refused later has changed nothing, since its source is whole. The rest of the step
  is tried once more.
* If that is refused too, parameters and states are of two steps. This raises, and so does every
  later call.
* An error that a GPU reports later, about work under way, loses all that is on the GPU.

What overlaps: clipping needs the global norm, so no update can begin before the backward pass is
over. But the first pages come into their slots during the passes, and the last ones go home during
the next forward pass.
"""

import contextlib
import math
import os
import weakref
from collections import deque

import numpy as np

from minilm.arrays import BLOCK
from minilm.backend import array_module
from minilm.optim.adamw import AdamW, adamw
from minilm.optim.flat import squares
from minilm.optim.pages import PageTable
from minilm.optim.streams import CudaDevice, SimulatedDevice
from minilm.ranges import check, optional, power_of_two, whole

BROKEN = "parameters and states are of two steps: go back to a checkpoint"


class Float32:
    """The states m and v as AdamW has them: two float32 arrays."""

    block = 4  # elements that always stay together: the kernel takes 16 bytes at a time
    names = "m", "v"

    def zeros(self, n: int, xp=np) -> tuple:
        return xp.zeros(n, np.float32), xp.zeros(n, np.float32)

    def spare(self, n: int) -> int:
        """Extra bytes of device memory that an update of n parameters takes: none."""
        return 0

    def update(self, p, g, arrays, t, lr, beta1, beta2, eps, weight_decay, scale=1.0):
        """Step t of AdamW for gradients g * scale; p and the arrays change in place."""
        step = BLOCK if array_module(p) is np else max(1, p.size)
        for i in range(0, p.size, step):
            part = slice(i, i + step)
            adamw(p[part], g[part], *(a[part] for a in arrays), t, lr, beta1, beta2, eps,
                  weight_decay, scale)


class PagedAdamW(AdamW):
    """AdamW whose states take no more device memory than there is; see the top of the file.

    page_size: elements of a page, a power of two
    device_budget: bytes of device memory that states may take; by default as many as they need, as
        long as no other array needs the memory
    device: see streams.py; by default the GPU if the parameters are on one, else a simulated device
        without limit
    state: the format of the states, Float32() or eightbit.EightBit()
    pageable: keep pages in ordinary host memory, if there is not enough pinned memory; slower

    A step whose gradient is not finite changes nothing and is counted in `skipped`. close(), or the
    end of a `with`, gives the memory back.
    ValueError for a bad page size or a budget below three pages; MemoryError if the host's
    memory does not hold the states.
    """

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, undecayed=(), page_size: int = 1 << 22,
                 device_budget: int | None = None, device=None, state=None,
                 pageable: bool = False):
        self.state, self.table = Float32() if state is None else state, None
        if not hasattr(self.state, "block") or isinstance(self.state, type):
            raise TypeError(f"state must be Float32() or EightBit(), got {state!r}")
        check({"page_size": power_of_two(self.state.block), "device_budget": optional(whole(0))},
              page_size=page_size, device_budget=device_budget)
        self.page_size, self.budget, self.pageable = page_size, device_budget, pageable
        self.device, self.skipped, self.broken, self.process = device, 0, None, os.getpid()
        super().__init__(params, lr, betas, eps, weight_decay, undecayed)
        self.shapes = [p.shape for p in self.flat.params]

    def _make_states(self):
        f = self.flat
        if f.data.dtype != np.float32:
            raise TypeError(f"states are paged in float32, the parameters are {f.data.dtype}")
        if self.device is None:
            on_cpu = array_module(f.data) is np
            self.device = SimulatedDevice() if on_cpu else CudaDevice()
        sides = (0, self.decayed), (self.decayed, f.size)
        parts = [slice(i, min(i + self.page_size, stop)) for start, stop in sides
                 for i in range(start, stop, self.page_size)]
        self.table = PageTable(parts, self.state, self.device, self.budget, self.pageable)
        self.device.relieve_with(self.table.evict)
        weakref.finalize(self, self.device.close).atexit = False  # dropped without close()

    def step(self, scale: float = 1.0, everywhere=None):
        """A step of AdamW if all gradients are finite; otherwise nothing changes."""
        self._check()
        self.flat.complete()
        if math.isfinite(squares(self.flat.grad)):
            super().step(scale, everywhere)
        else:
            self.skipped += 1

    def update(self, part: slice, t: int, lr: float, scale: float = 1.0):
        """Step t of a part, with gradients multiplied by scale, which must be finite.

        If states cannot be split at an end of the part, that end moves up; parts that together
        cover everything still do. After an error at the old state `steps` is t - 1.
        """
        self._check()
        pieces = self._pieces(part)
        left = deque(pieces)
        with self.table.in_use():
            try:
                self._run(left, t, lr, scale)
            except BaseException as error:
                everything = (part.start, part.stop) == (0, self.flat.size)
                if everything and len(left) == len(pieces) and not self.broken:
                    self.steps = t - 1
                    raise
                self._finish(left, len(pieces), error, t, lr, scale)
            finally:
                self.device.wait("main", self.device.record("update"))  # the parameters
        if part.stop == self.flat.size:
            self.prefetch()

    def _pieces(self, part):
        """(page, slice of the flat space) for each stretch of a page that a part is to update.

        Parameters without a gradient are left out, but for the blocks of states that they share
        with others; there their gradient counts as 0.
        """
        pieces, block = [], self.state.block
        runs = self.flat.with_gradient(slice(0, self.flat.size))
        for page in self.table.pages:
            first, end = page.part.start, page.part.stop
            def up(x): return min(max(first + -(-(x - first) // block) * block, first), end)
            def down(x): return min(max(first + (x - first) // block * block, first), end)
            at, last = up(part.start), up(part.stop)
            for run in runs:
                start, stop = max(at, down(run.start)), min(up(run.stop), last)
                if start < stop:
                    pieces.append((page, slice(start, stop)))
                    at = stop
        return pieces

    def _run(self, left, *step):
        """Update the pieces that are left. Each is taken off the list when it is launched."""
        table = self.table
        with table.lock:
            table.begin()
        self.device.wait("update", self.device.record("main"))  # the gradient
        while left:
            page, piece = left[0]
            if page.frame:
                self._launch(page, page.frame, piece, *step)
                left.popleft()
                continue
            with table.lock:
                frame = table.load(page)
                self._launch(page, frame, piece, *step)
                left.popleft()
                table.store(frame)
        with table.lock:
            for frame in table.slots:
                if frame.dirty:  # on a second attempt
                    table.store(frame)

    def _launch(self, page, frame, piece, *step):
        if loaded := frame.loaded:  # another thread may have a part of the page
            self.device.wait("update", loaded)
            frame.loaded = None
        frame.dirty, page.used = True, step[0]
        try:
            self.device.launch("update", self._apply, page, frame.memory, piece, *step)
        except BaseException as error:
            self.broken = error
            raise

    def _apply(self, page, memory, piece, t, lr, scale):
        f, first = self.flat, page.part.start
        decay = self.weight_decay if piece.stop <= self.decayed else 0.0
        arrays = []
        for a in self.table.arrays(page, memory[: page.nbytes]):
            per = 1 if a.size == page.size else self.state.block  # elements that share an item
            arrays.append(a[(piece.start - first) // per : -(-(piece.stop - first) // per)])
        self.state.update(f.data[piece], f.grad[piece], arrays, t, lr, *self.betas, self.eps, decay,
                          scale)
        f.round(piece)

    def _finish(self, left, count, error, *step):
        """Do the rest of a step after an error; see the top of the file."""
        try:
            if self.broken or not isinstance(error, Exception):
                raise error
            self._run(left, *step)
        except Exception as again:
            if not left and not self.broken:
                raise  # all is new; a page that is not home yet goes there in the next step
            self.broken = again
            raise RuntimeError(f"step {step[0]} ended after {count - len(left)} of {count} pages "
                               f"({again}); {BROKEN}") from again
        except BaseException as interrupt:
            self.broken = interrupt
            raise

    def prefetch(self):
        """Begin to load the pages that the next step needs first. `step` ends with this."""
        self._check()
        with self.table.lock, contextlib.suppress(Exception):  # the next step will raise it
            self.table.prefetch()

    def evict(self, nbytes: int) -> int:
        """Write pages home to free nbytes, those used longest ago first; returns the bytes freed.

        It is called automatically if a forward or backward pass finds no memory for an array.
        """
        self._check()
        return self.table.evict(nbytes)

    m = property(lambda self: self.states()["m"])
    v = property(lambda self: self.states()["v"])

    def states(self) -> dict:
        """The states of all pages end to end, by name: copies on the host."""
        self._check()
        with self.table.lock:
            self.table.flush()
            homes = [self.table.arrays(page, page.home) for page in self.table.pages]
            return dict(zip(self.state.names, map(np.concatenate, zip(*homes))))

    def put_back(self, states: dict):
        """Go on from what states() gave, also if that optimizer had pages of another size."""
        self._check()
        with self.table.lock:
            self.table.flush()
            homes = [self.table.arrays(page, page.home) for page in self.table.pages]
            homes = dict(zip(self.state.names, zip(*homes)))
            for name, places in homes.items():
                if (wanted := sum(place.size for place in places)) != states[name].size:
                    raise ValueError(f"{name} has {wanted} elements, got {states[name].size}")
            for name, places in homes.items():
                ends = np.cumsum([place.size for place in places])
                for place, values in zip(places, np.split(states[name], ends[:-1])):
                    place[...] = values
            self.table.forget()
            self.table.bring_back()

    def close(self):
        """Wait for all copies, then give the memory back. The states are lost."""
        if self.table:
            with self.table.lock:
                self.table.close()
            self.table = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _check(self):
        """RuntimeError if the optimizer cannot go on; ValueError if parameters changed."""
        if self.table is None:
            raise RuntimeError("the optimizer is closed")
        if self.broken:
            raise RuntimeError(f"a step failed half done ({self.broken}); {BROKEN}")
        if self.process != os.getpid():
            raise RuntimeError("processes cannot share a page table: train with threads")
        for i, (p, shape) in enumerate(zip(self.flat.params, self.shapes)):
            if p.shape != shape:
                raise ValueError(f"parameter {i} was {shape} and has become {p.shape}")
