"""Collectives between processes: MPI, as mpi4py has it. `comm.connect` makes them.

What MPI does not tell is if a rank makes another call than the others, or none. So with each call
goes a small one of its own communicator, in which each rank tells the others in words which call it
makes. It is looked at first: MPI may add numbers of another dtype up without a word. And a rank
that waits asks from time to time for how long it has waited; see `Call`.

MPI moves numbers while it is called, and at no other time. So a thread, the mover, asks after large
calls again and again; what it moves and adds up is there when the rank needs it. It takes a core if
one is free, and else a little of this rank's.
"""

import os
import queue
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from minilm.backend import array_module
from minilm.extras import install
from minilm.parallel.comm import Comm, Handle, launched
from minilm.parallel.faults import PATIENCE, Parted, Record, missed, require_alike, where

WORDS = 96  # bytes of a call in words
LARGE = 1 << 16  # bytes of a call that the mover looks after
PAUSE = 0.001  # seconds between its looks
GRACE = 1.0  # seconds in which those who wait tell each other so

yields = getattr(os, "sched_yield", lambda: time.sleep(0))


class Mpi(Comm):
    """NumPy arrays between the processes that mpiexec has started. MPI starts here, not before.

    world: some of them, as a communicator of mpi4py; by default all. patience: after so many
    seconds in a call it is an error, Parted, that some rank has not come to it. record: where the
    rank's guard reads how far it is.
    RuntimeError if mpi4py or an MPI is missing, or if the launcher is another MPI's.
    """

    def __init__(self, ordered: bool = False, world=None, patience: float = PATIENCE,
                 record: Record | None = None):
        super().__init__(ordered)
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise RuntimeError(f"ranks need MPI: {install('mpi')} ({why})") from None
        if (sees := MPI.COMM_WORLD.Get_size()) != (said := launched()):
            raise RuntimeError(f"the launcher started {said} ranks, but MPI sees {sees}: take the "
                               "mpiexec of the same MPI, beside this python")
        self.mpi, self.world = MPI, MPI.COMM_WORLD if world is None else world
        self.rank, self.size = self.world.Get_rank(), self.world.Get_size()
        machine = self.world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank = machine.Get_rank()
        machine.Free()
        self.aside, self.patience, self.record = self.world.Dup(), patience, record
        self.large, self.mover = queue.SimpleQueue(), None  # calls for the mover
        self.broken, self.heard, self.complained, self.sends = None, set(), None, []
        self.world.Barrier()
        forget_names()

    def begin(self, step):
        super().begin(step)
        self._note()

    def _note(self):
        if self.record:
            self.record.write(where(self))

    def _begun(self, request, then, size):
        self._note()
        call = Call(self, request, then)
        if size >= LARGE and self.size > 1:
            self.mover = self.mover or started(self.large)
            self.large.put(call)
        return call

    def _call(self, *how, **then):
        if self.broken:  # the ranks have parted
            raise Parted(f"a call after an error: {self.broken}")
        return super()._call(*how, **then)

    def _all_reduce(self, x):
        return self.world.Iallreduce(self.mpi.IN_PLACE, _host(x))

    def _reduce_scatter(self, full, shard):
        return self.world.Ireduce_scatter_block(_host(full), _host(shard))

    def _all_gather(self, shard, full):
        inside = np.may_share_memory(shard, full)  # MPI wants no overlapping buffers
        send = self.mpi.IN_PLACE if inside else _bits(shard)
        return self.world.Iallgather(send, _bits(full))

    def _all_to_all(self, full, parts):
        return self.world.Ialltoall(_bits(full), _bits(parts))

    def _broadcast(self, x, root):
        return self.world.Ibcast(_bits(x), root)

    def _barrier(self, x):
        return self.world.Ibarrier()

    def barrier(self):
        self._call("barrier", self._barrier, np.zeros(0)).wait()

    def end(self):
        """This rank's last call: it returns when all have come to their end."""
        self._call("its end", self._barrier, np.zeros(0)).wait()

    @contextmanager
    def sound(self):
        """After an error inside, every call is one."""
        if self.broken:
            raise self.broken
        try:
            yield
        except Exception as error:
            self.broken = error
            raise

    def ask(self, since: float):
        """Parted if a rank has not come to a call in which this one has waited too long.

        Those who wait tell all others when the first of them has lost its patience. Who says
        nothing then, is late.
        """
        while self.aside.Iprobe():
            status = self.mpi.Status()
            self.aside.Recv(np.zeros(1), status=status)
            self.heard.add(status.Get_source())
        now = time.monotonic()
        if self.complained is None:
            if now - since > self.patience or self.heard:
                self.complained = now
                self.sends = [self.aside.Isend(np.zeros(1), r) for r in range(self.size)
                              if r != self.rank]
        elif now - self.complained > GRACE:
            late = [r for r in range(self.size) if r != self.rank and r not in self.heard]
            raise Parted(missed(late, self))


class Call(Handle):
    """A call under way, with the small one that tells which it is. Two threads may look after it.
    """

    def __init__(self, comm: Mpi, request, then):
        super().__init__(request, then)
        self.comm, self.number, self.lock = comm, comm.calls, threading.RLock()
        words = np.frombuffer(comm.said.encode()[:WORDS].ljust(WORDS), np.uint8)
        self.words = np.zeros((comm.size, WORDS), np.uint8)
        self.telling = comm.aside.Iallgather(words, self.words)

    def test(self):
        with self.lock, self.comm.sound():
            if self.telling and self.telling.Test():
                self.telling = None
                require_alike(self.number, [row.tobytes().decode().rstrip() for row in self.words])
            return self.telling is None and super().test()

    def wait(self):
        since = asked = time.monotonic()
        while not self.test():
            yields()  # there may be fewer cores than ranks
            if time.monotonic() - asked > 0.05:
                asked = time.monotonic()
                with self.comm.sound():
                    self.comm.ask(since)


def started(calls: queue.SimpleQueue) -> threading.Thread:
    """The mover: it sees to it that these calls get on, one after another."""
    def move():
        while True:
            call = calls.get()
            with suppress(Exception):  # the rank finds it broken
                while not call.test():
                    time.sleep(PAUSE)
    mover = threading.Thread(target=move, daemon=True, name="mover")
    mover.start()
    return mover


def forget_names():
    """MPICH's memory that processes share keeps its file until all have ended well. All ranks have
    opened it when this is called, so it needs no name; and then none is left behind."""
    maps = Path("/proc/self/maps")
    if sys.platform == "linux":
        for name in {line.split()[-1] for line in maps.read_text().splitlines()}:
            if name.startswith("/dev/shm/mpich"):
                Path(name).unlink(missing_ok=True)


def _host(x):
    """TypeError for what MPI's sums do not take: a GPU's array would crash it without a word."""
    if array_module(x) is not np:
        raise TypeError("MPI takes NumPy's arrays; a GPU's travel over NCCL")
    if x.dtype.kind == "V":
        raise TypeError(f"MPI cannot add {x.dtype}: add in float32")
    return x


def _bits(x):
    """bfloat16 and its like travel as integers of their size."""
    return _host(x.view(f"u{x.itemsize}") if x.dtype.kind == "V" else x)
