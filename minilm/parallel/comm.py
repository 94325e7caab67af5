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
    Mpi      NumPy arrays, over mpi4py: mpiexec -n 4 python ... (mpi.py)
    Nccl     CuPy arrays over NCCL, one GPU a rank; MPI starts the processes (nccl.py)

If one of the ranks makes another call than the others, or does not come, all of them get an error
that names it. faults.py has what else may go wrong.
"""

import os
import threading
from collections import Counter

import numpy as np

from minilm.backend import array_module
from minilm.parallel.faults import PATIENCE, Parted, guarded, hooked, missed, require_alike, where

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
    step, calls, said: the step that `begin` has named, the engine's calls up to now, the last one.
    """

    rank, size, local_rank = 0, 1, 0

    def __init__(self, ordered: bool = False):
        self.ordered, self.sent = ordered, Counter()
        self.step, self.calls, self.said = 0, 0, ""

    def begin(self, step: int):
        """The calls from now on are those of a step, which errors name."""
        self.step = step

    def all_reduce(self, x, what: str = "all_reduce") -> Handle:
        """Add x up over all ranks, in place."""
        self._check(x=x)
        self.sent[what] += 2 * self._others(-(-x.size // self.size) * self.size * x.itemsize)
        if not self.ordered or self.size == 1:
            return self._call(what, self._all_reduce, x)
        full = array_module(x).zeros(-(-x.size // self.size) * self.size, x.dtype)
        full[: x.size] = x
        shard = full[: full.size // self.size].copy()
        self._ordered(full, shard, False, what).wait()

        def put():
            x[...] = full[: x.size]
        return self._call(what, self._all_gather, shard, full, then=put)

    def reduce_scatter(self, full, shard, add: bool = False, what="reduce_scatter") -> Handle:
        """Add `full` up over all ranks; each keeps its own part.

        add: the sum begins with what is in the shard. In order these are the bits of one process
        that goes on adding.
        """
        self._check(full=full, shard=shard)
        self.sent[what] += self._others(full.nbytes)
        if self.ordered:
            return self._ordered(full, shard, add, what)
        if not add:
            return self._call(what, self._reduce_scatter, full, shard)
        come = array_module(full).empty_like(shard)
        return self._call(what, self._reduce_scatter, full, come, then=lambda: _add(shard, come))

    def all_gather(self, shard, full, what: str = "all_gather") -> Handle:
        """Put the shards of all ranks together. The shard may be its own place in `full`."""
        self._check(full=full, shard=shard)
        self.sent[what] += self._others(full.nbytes)
        return self._call(what, self._all_gather, shard, full)

    def broadcast(self, x, root: int = 0, what: str = "broadcast") -> Handle:
        """Give all ranks the root's numbers."""
        self._check(x=x)
        if not 0 <= root < self.size:
            raise ValueError(f"root must be a rank below {self.size}, got {root}")
        self.sent[what] += self._others(x.nbytes)
        return self._call(what, self._broadcast, x, root)

    def barrier(self):
        """Return when every rank has come here."""
        self.all_reduce(np.zeros(1), what="barrier").wait()

    def numbers(self, *values: float):
        """The values of all ranks, in order: (n, how many), float64."""
        mine, everyone = np.array(values, np.float64), np.zeros((self.size, len(values)))
        self.all_gather(mine, everyone.reshape(-1), what="numbers").wait()
        return everyone

    def _call(self, what, method, x, *others, then=None) -> Handle:
        """Begin a call of the engine, and keep in words which it is."""
        name = method.__name__[1:]
        self.calls += 1
        array = f"{name} of {x.size} {x.dtype}" + f" for {what}" * (what != name)
        self.said = (array if x.size else what) + f" in step {self.step}" * bool(self.step)
        return self._begun(method(x, *others), then, x.nbytes)

    def _begun(self, request, then, size):
        return Handle(request, then)

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

    def _ordered(self, full, shard, add, what):
        parts = array_module(full).empty((self.size, shard.size), full.dtype)

        def in_order():
            if not add:
                shard[...] = parts[0]
            for part in parts[0 if add else 1 :]:
                _add(shard, part)
        return self._call(what, self._all_to_all, full, parts, then=in_order)


def _add(shard, part):
    with np.errstate(over="ignore", invalid="ignore"):  # MPI's own sums do not warn either
        shard += part


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

    Its sums always run in the order of ranks. board: where each rank shows the others its (call's
    number, call in words, array). gate: where they meet. patience: how long one waits there.
    """

    def __init__(self, rank, size, board, gate, ordered=False, patience=PATIENCE):
        super().__init__(ordered)
        self.rank, self.size, self.local_rank = rank, size, rank
        self.board, self.gate, self.patience = board, gate, patience

    def _exchange(self, x, read):
        self.board[self.rank] = self.calls, self.said, x
        self._meet()
        require_alike(self.calls, [said for _, said, _ in self.board])
        read([x for *_, x in self.board])
        self._meet()  # until then nobody changes what others read

    def _meet(self):
        try:
            self.gate.wait(self.patience)
        except threading.BrokenBarrierError:
            late = [r for r, (calls, *_) in enumerate(self.board) if calls < self.calls]
            raise threading.BrokenBarrierError(missed(late, self)) from None

    def end(self):
        """This rank's last call: it returns when all have come to their end."""
        self._call("its end", self._barrier, np.zeros(0))

    def _barrier(self, x): self._exchange(x, len)

    def _all_reduce(self, x):
        total = np.empty_like(x)
        self._exchange(x, lambda board: total.__setitem__(..., sum(board[1:], board[0])))
        x[...] = total

    def _reduce_scatter(self, full, shard):
        parts = np.empty((self.size, shard.size), full.dtype)
        self._all_to_all(full, parts)
        shard[...] = sum(parts[1:], parts[0])

    def _all_gather(self, shard, full):
        self._exchange(shard.copy(), lambda board: full.__setitem__(..., np.concatenate(board)))

    def _all_to_all(self, full, parts):
        mine = slice(self.rank * parts.shape[1], (self.rank + 1) * parts.shape[1])
        self._exchange(full, lambda board: parts.__setitem__(..., [a[mine] for a in board]))

    def _broadcast(self, x, root):
        whole = x.copy()
        self._exchange(whole, lambda board: x.__setitem__(..., board[root]))


def ranks(n: int, run, ordered: bool = True, patience: float = PATIENCE) -> list:
    """[run(comm) of each of n ranks], each a thread of its own. The first error ends all of them.

    It says as a note on which rank it came. If a rank does not come to a call in which the others
    have waited for `patience` seconds, that is a RuntimeError, too; its thread is left behind.

    >>> def main(comm):
    ...     x = np.array([1.0, 10.0]) * comm.rank
    ...     comm.all_reduce(x).wait()
    ...     return x.tolist()
    >>> ranks(3, main)
    [[3.0, 30.0], [3.0, 30.0], [3.0, 30.0]]
    """
    board, gate = [(0, "", None)] * n, threading.Barrier(n)
    results, errors = [None] * n, [None] * n

    def rank(r):
        comm = Threads(r, n, board, gate, ordered, patience)
        try:
            results[r] = run(comm)
            comm.end()
        except BaseException as error:
            if not isinstance(error, Parted | threading.BrokenBarrierError):
                error.add_note(f"on rank {r} of {n}, {where(comm)}")
            errors[r] = error
            gate.abort()  # the others wait for this one

    threads = [threading.Thread(target=rank, args=[r], daemon=True) for r in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not gate.broken:
            thread.join(0.05)
    for thread in threads:
        thread.join(1 if gate.broken else None)
    found = [error for error in errors if error is not None]
    for error in sorted(found, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return results


def launched() -> int:
    """How many ranks a launcher has started; 1 without one."""
    return int(next((os.environ[k] for k in LAUNCHED if os.environ.get(k)), 1))


def connect(ordered: bool = False, patience: float = PATIENCE) -> Comm:
    """The ranks that this process is one of: mpiexec's, or itself alone, which imports nothing.

    One of mpiexec's forks here, and whatever ends it from here on ends all: see faults.py. So call
    it early, before a GPU is used. patience: seconds after which a rank that does not come to a
    call counts as lost; more than the longest work that one does while others wait, such as saving.
    """
    if not any(os.environ.get(k) for k in LAUNCHED):
        return Local(ordered)
    from minilm.parallel.mpi import Mpi  # not before it is needed: it is the only one to need it

    record = guarded()
    return hooked(Mpi(ordered, patience=patience, record=record), record)
