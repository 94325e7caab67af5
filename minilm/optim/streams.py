"""How the pages of a paged optimizer move: streams of a GPU, and a simulation of them.

A device has four queues of work. Each runs in order, and all run at the same time:

    in       copies of pages from the host
    update   the optimizer's arithmetic
    out      copies of pages to the host
    main     the forward and backward pass, which is not queued here

Only events order two queues: `record` notes how far a queue has come, and `wait` holds another one
back until that is done. All calls but `synchronize` return at once.

`CudaDevice` is a GPU. `SimulatedDevice` lets you see and test paging without one: it has a memory
limit of its own, runs its queues in a random order that the rules above allow, and fails when it
is told to.
"""

import random
import threading
from collections import deque

import numpy as np

from minilm.backend import cupy

QUEUES = ("in", "update", "out", "main")


class CudaDevice:
    """The current GPU: three streams that wait for no other stream, and the caller's as "main".

    Pages are CuPy arrays in the memory pool. Their homes are NumPy arrays in pinned memory.
    """

    relief = threading.RLock()  # one thread makes room; the others wait, then use it too

    def __init__(self):
        self.cuda = cupy().cuda
        self.streams = {name: self.cuda.Stream(non_blocking=True) for name in QUEUES[:3]}
        self.pool = self.cuda.get_allocator()
        self.evict = None

    def relieve_with(self, evict):
        """When an array finds no memory, call evict(bytes) until it does, or nothing more is freed.

        One call may not be enough: the pool gives a block back only when all of its pieces are
        free. This holds for the arrays of every thread, until close().
        """
        self.evict, self.hook = evict, self._allocate
        self.cuda.set_allocator(self.hook)

    def _allocate(self, nbytes):
        try:
            return self.pool(nbytes)
        except MemoryError:  # even though the pool has given back its cached blocks
            if self.evict is None:
                raise
        with CudaDevice.relief:
            while True:
                try:
                    return self.pool(nbytes)
                except MemoryError:
                    if self.evict is None or not self.evict(nbytes):
                        raise

    def frame(self, nbytes: int, queue: str = "main"):
        """Device memory for a page, uint8; MemoryError if there is none.

        queue: the memory comes from the pool of this queue's stream, and goes back to it.
        """
        with self._stream(queue):
            return cupy().empty(nbytes, np.uint8)

    def home(self, nbytes: int, pageable: bool):
        """Host memory, uint8. It is not from CuPy's pool, which would round the size up."""
        if pageable:
            return np.empty(nbytes, np.uint8)
        try:
            memory = self.cuda.PinnedMemory(nbytes)
        except self.cuda.runtime.CUDARuntimeError as error:
            raise MemoryError(f"no {nbytes:,} bytes of pinned memory: {error}") from None
        return np.frombuffer(self.cuda.PinnedMemoryPointer(memory, 0), np.uint8, nbytes)

    def free(self, frame=None, home=None):
        """Take back memory that no queue uses any more. Here dropping the last reference does it.
        """

    def copy_in(self, frame, home):
        frame.set(home, self.streams["in"])

    def copy_out(self, home, frame):
        frame.get(self.streams["out"], out=home, blocking=False)

    def launch(self, queue: str, fn, *args):
        with self._stream(queue):
            fn(*args)

    def record(self, queue: str):
        return self._stream(queue).record(self.cuda.Event(disable_timing=True))

    def wait(self, queue: str, event):
        self._stream(queue).wait_event(event)

    def synchronize(self):
        """Return when "in", "update" and "out" are empty."""
        for stream in self.streams.values():
            stream.synchronize()

    def close(self):
        self.synchronize()
        if self.evict and self.cuda.get_allocator() is self.hook:
            self.cuda.set_allocator(self.pool)
        self.evict = None

    def _stream(self, queue):
        return self.streams.get(queue) or self.cuda.get_current_stream()


class Event:
    """A mark in a queue, and whether the queue has passed it."""

    done = False


class SimulatedDevice:
    """A device on the CPU. Its memory is `limit` bytes; new memory holds nan.

    seed: of the order in which queued work runs; with None all work runs at once. A forward pass in
    NumPy cannot be queued, so "main" runs at once and its waits block. With overlap=True "main" is
    a queue too, for passes that are given to launch("main", ...).
    """

    def __init__(self, limit: int | None = None, seed: int | None = None, overlap: bool = False):
        self.limit, self.overlap = limit, overlap
        self.used = self.peak = 0  # bytes
        self.tried, self.failing = 0, range(0)  # allocations and copies
        self.queues = {name: deque() for name in QUEUES}
        self.lock = threading.RLock()
        self.evict = None
        self.random = None if seed is None else random.Random(seed)
        # Odd seeds give the queues a fixed rank: one goes first whenever it can, another last.
        self.order = self.random.sample(QUEUES, 4) if seed is not None and seed % 2 else None

    def relieve_with(self, evict):
        """When allocate() finds no memory, it calls evict(bytes) and tries once more."""
        self.evict = evict

    def fail(self, k: int, times: int = 1):
        """Let the k-th allocation or copy from now fail (1 is the next), and times - 1 after it."""
        self.failing = range(self.tried + k, self.tried + k + times)

    def allocate(self, nbytes: int):
        """Take memory as a forward or backward pass does; give it back with release()."""
        try:
            self._take(nbytes)
        except MemoryError:
            if self.evict is None or not self.evict(self.used + nbytes - self.limit):
                raise
            self._take(nbytes)

    def release(self, nbytes: int):
        """Give back what allocate() took."""
        self.used -= nbytes

    def frame(self, nbytes: int, queue: str = "main"):
        """As in CudaDevice."""
        self._try(MemoryError)
        self._take(nbytes)
        frame = np.full(nbytes, 0xFF, np.uint8)
        if queue == "main":  # a pass may still be using the array that had this memory before
            self.launch(queue, np.copyto, frame, np.uint8(0xFF))
        return frame

    def home(self, nbytes: int, pageable: bool):
        """As in CudaDevice."""
        self._try(MemoryError)
        return np.empty(nbytes, np.uint8)

    def free(self, frame=None, home=None):
        """Take back memory; RuntimeError if queued work uses it."""
        array = home if frame is None else frame
        with self.lock:
            queued = [x for queue in self.queues.values() for _, args in queue for x in args]
        if any(np.may_share_memory(x, array) for x in queued if isinstance(x, np.ndarray)):
            raise RuntimeError("memory is freed while queued work uses it")
        array.fill(0xFF)
        if frame is not None:
            self.used -= frame.size

    def copy_in(self, frame, home):
        self._try(RuntimeError)
        self.launch("in", np.copyto, frame, home)

    def copy_out(self, home, frame):
        self._try(RuntimeError)
        self.launch("out", np.copyto, home, frame)

    def launch(self, queue: str, fn, *args):
        self._add(queue, fn, *args)

    def record(self, queue: str):
        event = Event()
        self._add(queue, setattr, event, "done", True)
        return event

    def wait(self, queue: str, event):
        if queue == "main" and not self.overlap:
            self._run(lambda: event.done)
        else:
            self._add(queue, None, event)

    def synchronize(self):
        """Return when "in", "update" and "out" are empty."""
        self._run(lambda: not any(self.queues[name] for name in QUEUES[:3]))

    def close(self):
        self.synchronize()
        self.evict = None

    def _take(self, nbytes):
        if self.limit is not None and self.used + nbytes > self.limit:
            raise MemoryError(f"out of memory allocating {nbytes:,} bytes (allocated so far: "
                              f"{self.used:,} bytes, limit: {self.limit:,} bytes)")
        self.used += nbytes
        self.peak = max(self.peak, self.used)

    def _try(self, kind):
        self.tried += 1
        if self.tried in self.failing:
            raise kind(f"allocation or copy {self.tried} was told to fail")

    def _add(self, queue, fn, *args):
        """Queue fn(*args), or with fn None a wait for an event. Without a queue, run it now."""
        if self.random is None or (queue == "main" and not self.overlap):
            if fn:
                fn(*args)
        else:
            with self.lock:
                self.queues[queue].append((fn, args))

    def _run(self, until):
        """Run queued work in some legal order until the condition holds."""
        with self.lock:
            while not until():
                ready = [name for name in QUEUES if self._ready(self.queues[name])]
                if not ready:
                    raise RuntimeError("every queue waits for an event that nobody records")
                name = self.random.choice(ready)
                if self.order:
                    name = min(ready, key=self.order.index)
                fn, args = self.queues[name].popleft()
                if fn:
                    fn(*args)

    def _ready(self, queue):
        return queue and (queue[0][0] or queue[0][1][0].done)
