"""Collectives: what n ranks say to each other. One interface over existing engines.

A rank is a process (or, for tests, a thread) that trains on its own rows. Arrays are flat; a shard
is the r-th of n equal parts of a full one, so full.size == n * shard.size. With S the bytes of a
full array, a rank sends, by the ring algorithm:

    call                          afterwards                                   bytes sent
    all_reduce(x)                 x holds the sum over ranks, on every rank    2 (n-1)/n S
    reduce_scatter(full, shard)   shard r holds part r of the sum              (n-1)/n S
    all_gather(shard, full)       full holds all shards in order               (n-1)/n S
    broadcast(x, root)            x holds the root's numbers                   (n-1)/n S, on average
    barrier()                     every rank has come here                     none

The first four return a handle, since the work may go on beside others: after wait() the result is
there, and until then neither array may be touched. Every rank must make the same calls in the same
order. `sent` counts the bytes by what they are for.

An engine adds in an order of its own, which differs between n and between calls. With ordered=True
sums run over ranks 0, 1, ... n-1: the same bytes travel (each part goes to its owner, who adds),
and the sum has the bits of one process that adds the n arrays one after another.

    Local    one rank, imports nothing
    Threads  n ranks in one process, for tests: see `ranks`
    Mpi      NumPy arrays, over mpi4py: mpiexec -n 4 python ...
    Nccl     CuPy arrays over NCCL, one GPU a rank; MPI starts the processes (nccl.py)
"""

import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from minilm.backend import array_module
from minilm.extras import install

LAUNCHED = "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"  # MPICH's and Open MPI's number of ranks


class Handle:
    """A collective under way. request: has Test and Wait, or is None if all is done already.

    then: what is left to do after it, such as adding up what came.
    """

    def __init__(self, request=None, then=None):
        self.request, self.then = request, then

    def test(self) -> bool:
        """Is the result there? Asking also lets an engine get on with it."""
        if self.request is not None and self.request.Test():
            self.request = None
        if self.request is None:
            self._finish()
        return self.request is None

    def wait(self):
        """Return when the result is there."""
        if self.request is not None:
            self.request.Wait()
            self.request = None
        self._finish()

    def _finish(self):
        then, self.then = self.then, None
        if then:
            then()


class Comm:
    """What all engines share: the checks, the counter of bytes, and sums in the order of ranks.

    An engine begins its calls, and gives what a Handle takes: a request, or None if all is done.

    rank: 0, 1, ... size - 1. local_rank: its number on its machine, which decides its GPU.
    sent: bytes sent by this rank, by the `what` of the calls, or by the call's name.
    """

    rank, size, local_rank = 0, 1, 0

    def __init__(self, ordered: bool = False):
        self.ordered, self.sent = ordered, Counter()

    def all_reduce(self, x, what: str = "all_reduce") -> Handle:
        """Add x up over all ranks, in place."""
        self._check(x=x)
        self.sent[what] += 2 * self._others(-(-x.size // self.size) * self.size * x.itemsize)
        if not self.ordered or self.size == 1:
            return Handle(self._all_reduce(x))
        full = array_module(x).zeros(-(-x.size // self.size) * self.size, x.dtype)
        full[: x.size] = x
        shard = full[: full.size // self.size].copy()
        self._ordered(full, shard, add=False).wait()

        def put():
            x[...] = full[: x.size]
        return Handle(self._all_gather(shard, full), put)

    def reduce_scatter(self, full, shard, add: bool = False, what="reduce_scatter") -> Handle:
        """Add `full` up over all ranks; each keeps its own part.

        add: the sum begins with what is in the shard. In order these are the bits of one process
        that goes on adding.
        """
        self._check(full=full, shard=shard)
        self.sent[what] += self._others(full.nbytes)
        if self.ordered:
            return self._ordered(full, shard, add)
        if not add:
            return Handle(self._reduce_scatter(full, shard))
        come = array_module(full).empty_like(shard)

        def more():
            shard[...] += come
        return Handle(self._reduce_scatter(full, come), more)

    def all_gather(self, shard, full, what: str = "all_gather") -> Handle:
        """Put the shards of all ranks together. The shard may be its own place in `full`."""
        self._check(full=full, shard=shard)
        self.sent[what] += self._others(full.nbytes)
        return Handle(self._all_gather(shard, full))

    def broadcast(self, x, root: int = 0, what: str = "broadcast") -> Handle:
        """Give all ranks the root's numbers."""
        self._check(x=x)
        if not 0 <= root < self.size:
            raise ValueError(f"root must be a rank below {self.size}, got {root}")
        self.sent[what] += self._others(x.nbytes)
        return Handle(self._broadcast(x, root))

    def barrier(self):
        """Return when every rank has come here."""
        self.all_reduce(np.zeros(1), what="barrier").wait()

    def numbers(self, *values: float):
        """The values of all ranks, in order: (n, how many), float64."""
        mine, everyone = np.array(values, np.float64), np.zeros((self.size, len(values)))
        self.all_gather(mine, everyone.reshape(-1), what="numbers").wait()
        return everyone

    def _others(self, size: int) -> int:
        """(n-1)/n of so many bytes."""
        return (self.size - 1) * size // self.size

    def _check(self, **arrays):
        for name, a in arrays.items():
            if not hasattr(a, "flags") or a.ndim != 1 or not a.flags.c_contiguous:
                raise ValueError(f"{name} must be a flat array without gaps, got "
                                 f"{getattr(a, 'shape', type(a).__name__)}")
        if "shard" not in arrays:
            return
        full, shard = arrays["full"], arrays["shard"]
        if full.dtype != shard.dtype:
            raise TypeError(f"the full array is {full.dtype}, the shard {shard.dtype}")
        if full.size != self.size * shard.size:
            raise ValueError(f"{self.size} shards of {shard.size} numbers do not make a full array "
                             f"of {full.size}")

    def _ordered(self, full, shard, add):
        parts = array_module(full).empty((self.size, shard.size), full.dtype)

        def in_order():
            if not add:
                shard[...] = parts[0]
            for part in parts[0 if add else 1 :]:
                shard[...] += part
        return Handle(self._all_to_all(full, parts), in_order)


class Local(Comm):
    """One rank."""

    def _all_reduce(self, x): pass
    def _broadcast(self, x, root): pass

    def _reduce_scatter(self, full, shard):
        shard[...] = full

    def _all_gather(self, shard, full):
        full[...] = shard

    def _all_to_all(self, full, parts):
        parts[0] = full


class Threads(Comm):
    """A rank that is a thread. A call returns when all ranks have made it, with its work done.

    Its sums always run in the order of ranks.
    """

    def __init__(self, rank, size, board, gate, ordered=False):
        super().__init__(ordered)
        self.rank, self.size, self.local_rank = rank, size, rank
        self.board, self.gate = board, gate  # what each rank shows the others; where they meet

    def _exchange(self, x, read):
        self.board[self.rank] = x
        self.gate.wait()
        read(self.board)
        self.gate.wait()  # until then nobody changes what others read

    def _all_reduce(self, x):
        total = np.empty_like(x)
        self._exchange(x, lambda board: total.__setitem__(..., sum(board[1:], board[0])))
        x[...] = total

    def _reduce_scatter(self, full, shard):
        parts = np.empty((self.size, shard.size), full.dtype)
        self._all_to_all(full, parts)
        shard[...] = sum(parts[1:], parts[0])

    def _all_gather(self, shard, full):
        self._exchange(shard.copy(), lambda board: full.__setitem__(
            ..., np.concatenate(board)))

    def _all_to_all(self, full, parts):
        mine = slice(self.rank * parts.shape[1], (self.rank + 1) * parts.shape[1])
        self._exchange(full, lambda board: parts.__setitem__(
            ..., [a[mine] for a in board]))

    def _broadcast(self, x, root):
        whole = x.copy()
        self._exchange(whole, lambda board: x.__setitem__(..., board[root]))


def ranks(n: int, run, ordered: bool = True) -> list:
    """[run(comm) of each of n ranks], each a thread of its own. The first error ends all of them.

    >>> def main(comm):
    ...     x = np.array([1.0, 10.0]) * comm.rank
    ...     comm.all_reduce(x).wait()
    ...     return x.tolist()
    >>> ranks(3, main)
    [[3.0, 30.0], [3.0, 30.0], [3.0, 30.0]]
    """
    board, gate = [None] * n, threading.Barrier(n)

    def rank(r):
        try:
            return run(Threads(r, n, board, gate, ordered))
        except BaseException:
            gate.abort()  # the others wait for this one
            raise

    with ThreadPoolExecutor(n) as pool:
        futures = [pool.submit(rank, r) for r in range(n)]
    errors = [e for e in (f.exception() for f in futures) if e is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [f.result() for f in futures]


class Mpi(Comm):
    """NumPy arrays between the processes that mpiexec has started. MPI starts here, not before.

    world: some of them, as a communicator of mpi4py; by default all.
    RuntimeError if mpi4py or an MPI is missing, or if the launcher is another MPI's.
    """

    def __init__(self, ordered: bool = False, world=None):
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

    def barrier(self):
        self.world.Barrier()


def launched() -> int:
    """How many ranks a launcher has started; 1 without one."""
    return int(next((os.environ[k] for k in LAUNCHED if os.environ.get(k)), 1))


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


def connect(ordered: bool = False) -> Comm:
    """The ranks that this process is one of: mpiexec's, or itself alone, which imports nothing."""
    return Mpi(ordered) if any(os.environ.get(k) for k in LAUNCHED) else Local(ordered)
