"""A bucket: tensors of one dtype end to end in one array, of which rank r owns part r of n.

It is what travels: gathering parameters and adding up gradients are one call each. What a rank
keeps, in bytes a parameter of float32, of which there are n ranks:

    stage      parameters   gradients   AdamW's m, v   together
    0 DDP      4            4           8              16
    1 ZeRO-1   4            4           8 / n          8 + 8 / n
    2 ZeRO-2   4            4 / n       8 / n          4 + 12 / n
    3 FSDP     4 / n        4 / n       8 / n          16 / n

16-bit parameters have float32 masters beside m and v, and float32 gradients (see optim/flat.py).
"""

import mmap

import numpy as np

from minilm.arrays import wide
from minilm.backend import array_module
from minilm.optim.adamw import adamw, chunks
from minilm.optim.flat import end_to_end, runs
from minilm.parallel.comm import Comm


def bytes_held(stage: int, n: int, parameter: int = 4, gradient: int = 4) -> float:
    """Bytes that a rank keeps of each trained parameter, if it and its gradient have so many bytes.

    Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 3, where both have 2.

    >>> [bytes_held(stage, n=4) for stage in range(4)]
    [16.0, 10.0, 7.0, 4.0]
    """
    states = 8 + (4 if parameter < 4 else 0)  # m, v and the masters
    return (parameter / (n if stage > 2 else 1) + gradient / (n if stage > 1 else 1)
            + states / (n if stage > 0 else 1))


def bytes_sent(stage: int, n: int, parameter: int = 4, gradient: int = 4) -> float:
    """Bytes that a rank sends a step for each trained parameter, if no micro-batches accumulate.

    One gradient is reduced. DDP gathers it again; stages 1 and 2 gather the parameters instead,
    stage 3 does so twice.

    >>> [bytes_sent(stage, n=4) / 4 for stage in range(4)]
    [1.5, 1.5, 1.5, 2.25]
    """
    gathered = (gradient, parameter, parameter, 2 * parameter)[stage]
    return (gradient + gathered) * (n - 1) / n


class Pages:
    """An array whose memory can be given back while others hold views of it, and comes again.

    The graph holds views of a block's weights until its backward pass. Given back, the numbers read
    as 0 until they are written again.
    """

    def __init__(self, size: int, dtype):
        private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
        kind = {"flags": private} if private else {}  # of shared memory nothing can be given back
        self.memory = mmap.mmap(-1, max(1, size * dtype.itemsize), **kind)
        self.array = np.frombuffer(self.memory, dtype, size)

    def give_back(self):
        """Let the operating system have the memory (where it has MADV_DONTNEED: Linux)."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.memory.madvise(mmap.MADV_DONTNEED)


class Bucket:
    """Takes over tensors of one dtype, all trained or all frozen: their data become views.

    undecayed: ids of those that AdamW must not decay. ready(bucket) is called when each tensor has
    brought its gradient in a backward pass.
    """

    def __init__(self, tensors, comm: Comm, stage: int, undecayed, ready):
        self.comm, self.stage, self.ready = comm, stage, ready
        first = [t for t in tensors if id(t) not in undecayed]
        self.tensors = first + [t for t in tensors if id(t) in undecayed]
        self.places, self.end = end_to_end(self.tensors)  # the rest is padding
        each = -(-self.end // (8 * comm.size)) * 8  # kernels take fours, NCCL likes 16 bytes
        self.size, own = comm.size * each, slice(comm.rank * each, (comm.rank + 1) * each)
        self.decayed = self.places[len(first)].start if len(first) < len(tensors) else self.size
        self.mine = own if stage else slice(0, self.size)
        self.trains, like = tensors[0].requires_grad, tensors[0].data
        self.xp, self.wide = array_module(like), np.promote_types(like.dtype, np.float32)
        self.pages = Pages(self.size, like.dtype) if stage == 3 else None
        self.whole = self.pages.array if self.pages else self.xp.zeros(self.size, like.dtype)
        for t, place in zip(self.tensors, self.places):
            view = self.whole[place].reshape(t.shape)
            view[...] = t.data
            t.data = view
        comm.broadcast(self.whole, what="start").wait()
        self.part = self.whole[own].copy() if stage == 3 else self.whole[self.mine]
        self.here, self.coming = True, None  # the whole parameters; their gathering
        if self.trains:
            self._make_states()

    def _make_states(self):
        rounded = self.whole.dtype.itemsize < 4
        self.masters = wide(self.part) if rounded else self.part
        self.m, self.v = (self.xp.zeros(self.part.size, self.wide) for _ in "mv")
        self.grads = self.sum = self.work = None  # of this rank; part r of all ranks'; the adding
        self.arrived = np.zeros(len(self.tensors), bool)  # in grads
        self.present = self.arrived.copy()  # in the sum
        self.missing, self.reduced = set(), True
        for i, t in enumerate(self.tensors):
            t.on_grad = lambda dy, i=i: self._receive(i, dy)

    # Parameters

    def fetch(self):
        """Begin to gather the parameters, if they are not here."""
        if not self.here and not self.coming:
            self.coming = self.comm.all_gather(self.part, self.whole, what="parameters")

    def gather(self):
        """Return when the parameters are here."""
        self.fetch()
        if self.coming:
            self.coming.wait()
            self.here, self.coming = True, None

    def release(self):
        """Keep the own part of the parameters only."""
        if self.pages and (self.here or self.coming):
            self.gather()
            self.pages.give_back()
            self.here = False

    # Gradients

    def begin(self):
        """A backward pass is to come."""
        self.missing, self.reduced = set(range(len(self.tensors))), False

    def _receive(self, i, dy):
        if self.reduced:
            raise RuntimeError(f"a gradient of shape {dy.shape} came after those of its unit were "
                               "added up: run backward inside zero.micro_batch(), and let no two "
                               "checkpointed segments use one unit")
        self.finish()
        if self.grads is None:
            self.grads = self.xp.zeros(self.size, self.wide)
        view = self.grads[self.places[i]].reshape(dy.shape)
        if self.arrived[i]:
            with np.errstate(invalid="ignore"):  # inf - inf: the norm will show it
                view += dy
        else:
            view[...] = dy
        self.arrived[i] = True
        self.missing.discard(i)
        if not self.missing:
            self.ready(self)

    def reduce(self):
        """Begin to add this rank's gradients up over all ranks."""
        self.finish()
        if self.grads is None:
            self.grads = self.xp.zeros(self.size, self.wide)
        for i, place in enumerate(self.places):
            if not self.arrived[i]:
                self.grads[place] = 0
        self.present |= self.arrived
        self.arrived[...], self.reduced = False, True
        if self.stage == 0 and not self.comm.ordered:
            self.work = self.comm.all_reduce(self.grads, what="gradients")
            return
        goes_on = self.sum is not None
        if not goes_on:
            self.sum = self.xp.zeros(self.size // self.comm.size, self.wide)
        self.work = self.comm.reduce_scatter(self.grads, self.sum, goes_on, what="gradients")

    def finish(self):
        """Return when what reduce() has begun is done."""
        if self.work:
            self.work.wait()
            self.work = None
            if self.stage >= 2:
                self.grads = None

    def complete(self):
        """All micro-batches are in: put the sum where the update rule reads it."""
        self.finish()
        if self.stage < 2 and self.sum is not None:
            if self.stage == 0:
                self.comm.all_gather(self.sum, self.grads, what="gradients").wait()
            else:
                self.grads[self.mine] = self.sum
            self.sum = None

    @property
    def gradient(self):
        """The own part of the sum of gradients, after complete()."""
        return self.grads[self.mine] if self.stage < 2 else self.sum

    def zero_grad(self):
        """Forget the gradients."""
        self.finish()
        self.sum = None
        self.arrived[...] = self.present[...] = False

    # The step

    def update(self, t, lr, scale, betas, eps, weight_decay):
        """Step t of AdamW on the own part; tensors without a gradient stay as they are."""
        self._own()
        start, g = self.mine.start, self.gradient
        for run in runs(self.present, self.places, self.size, self.mine):
            for chunk in chunks(run, self.decayed, self.xp):
                own = slice(chunk.start - start, chunk.stop - start)
                decay = weight_decay if chunk.stop <= self.decayed else 0.0
                adamw(self.masters[own], g[own], self.m[own], self.v[own], t, lr, *betas, eps,
                      decay, scale)
                if self.masters is not self.part:
                    self.part[own] = self.masters[own]  # rounds

    def share(self):
        """Begin to give the other ranks the own part, after a step; gather() waits for theirs."""
        if self.stage in (1, 2):
            self.coming = self.comm.all_gather(self.part, self.whole, what="parameters")

    def _own(self):
        """Return when the own part is no longer being sent: until then it may not be touched."""
        if self.stage < 3:
            self.gather()

    def states(self):
        """(name, array) of the numbers that a run goes on from, whole: the same for any n."""
        self._own()
        for name, own in self._states().items():
            whole = own
            if self.stage:
                whole = self.xp.zeros(self.size, own.dtype)
                self.comm.all_gather(own, whole, what="states").wait()
            yield name, whole[: self.end]

    def _states(self):
        return {"parameters": self.masters, "m": self.m, "v": self.v}

    def put_back(self, states: dict):
        """Take the own part of what states() gave, perhaps to another number of ranks."""
        self._own()
        for name, own in self._states().items():
            if states[name].shape != (self.end,):
                raise ValueError(f"{name} of a bucket of {self.end} numbers must be as long, got "
                                 f"shape {states[name].shape}")
            stop = min(self.mine.stop, self.end)
            given = states[name][self.mine.start : stop]
            own[: given.size] = self.xp.asarray(given)
        if self.masters is not self.part:
            self.part[...] = self.masters

    def held(self) -> dict:
        """Bytes of this rank's memory, by what they are for."""
        whole = self.whole.nbytes if self.here or self.coming else 0
        held = {"parameters": whole + (self.part.nbytes if self.pages else 0)}
        if self.trains:
            held["gradients"] = sum(a.nbytes for a in (self.grads, self.sum) if a is not None)
            own = self.masters.nbytes if self.masters is not self.part else 0
            held["states"] = self.m.nbytes + self.v.nbytes + own
        return held
