"""Collectives between GPUs: NCCL through CuPy, with MPI to start the processes.

NCCL's communicator is made from a name of 128 bytes that rank 0 draws; it comes to the others over
`host`, a Comm of the processes. One GPU takes one rank.
"""

import numpy as np

from minilm import backend
from minilm.backend import array_module
from minilm.parallel.comm import Comm, Local

TYPES = {"float32": "FLOAT32", "float16": "FLOAT16", "float64": "FLOAT64", "bfloat16": "BFLOAT16",
         "int32": "INT32", "int64": "INT64", "uint8": "UINT8"}  # NumPy's name: NCCL's


def on_cards(host: Comm) -> Comm:
    """The Comm of ranks on GPUs: each takes the one that has its number on its machine.

    A process that no launcher has started needs no NCCL. RuntimeError if there is no GPU for each
    rank, or no NCCL; on all ranks alike if their machines are.
    """
    there = backend.cupy().cuda.runtime.getDeviceCount()
    for rank, (number, cards) in enumerate(host.numbers(host.local_rank, there)):
        if number >= cards:
            raise RuntimeError(f"each rank needs a GPU of its own, but rank {rank} is number "
                               f"{number + 1:.0f} on a machine that has {cards:.0f}")
    return host if isinstance(host, Local) else Nccl(host, host.ordered)


class OnStream:
    """A call that a stream has been given. It keeps the arrays: their memory is in use until then.
    """

    def __init__(self, cupy, event, arrays):
        self.cupy, self.event, self.arrays = cupy, event, arrays

    def Test(self) -> bool:
        """Has the GPU done it?"""
        return bool(self.event.done)

    def Wait(self):
        """What the current stream is given from now on comes after it."""
        self.cupy.cuda.get_current_stream().wait_event(self.event)


class Nccl(Comm):
    """CuPy arrays between GPUs, one a rank. The processes, and NCCL's id, come by way of `host`.

    Calls run on a stream of their own, which first waits for what the current stream has been
    given. wait() makes the current stream wait; the program goes on.
    """

    def __init__(self, host: Comm, ordered: bool = False):
        super().__init__(ordered)
        self.host = host
        self.rank, self.size, self.local_rank = host.rank, host.size, host.local_rank
        self.cupy, self.nccl = backend.cupy(), backend.nccl()
        self.cupy.cuda.Device(self.local_rank).use()  # before the communicator is made
        name = np.zeros(128, np.uint8)
        if self.rank == 0:
            name[...] = np.frombuffer(bytes(self.nccl.get_unique_id()), np.uint8)
        host.broadcast(name).wait()
        self.world = self.nccl.NcclCommunicator(self.size, name.tobytes(), self.rank)
        self.stream = self.cupy.cuda.Stream(non_blocking=True)

    def begin(self, step):
        super().begin(step)
        self.host.begin(step)  # it is the one that errors name

    def _run(self, call, *arrays):
        here = self.cupy.cuda.get_current_stream()
        self.stream.wait_event(here.record(self.cupy.cuda.Event(disable_timing=True)))
        call(*(a.data.ptr for a in arrays), self.stream.ptr)
        done = self.stream.record(self.cupy.cuda.Event(disable_timing=True))
        return OnStream(self.cupy, done, arrays)

    def _type(self, x):
        if str(x.dtype) not in TYPES or array_module(x) is np:
            raise TypeError(f"NCCL takes CuPy's arrays of {', '.join(TYPES)}, got {x.dtype} of "
                            f"{array_module(x).__name__}")
        return getattr(self.nccl, f"NCCL_{TYPES[str(x.dtype)]}")

    def _all_reduce(self, x):
        kind, add = self._type(x), self.nccl.NCCL_SUM
        return self._run(lambda a, s: self.world.allReduce(a, a, x.size, kind, add, s), x)

    def _reduce_scatter(self, full, shard):
        kind, add, n = self._type(full), self.nccl.NCCL_SUM, shard.size
        return self._run(lambda a, b, s: self.world.reduceScatter(a, b, n, kind, add, s),
                         full, shard)

    def _all_gather(self, shard, full):
        kind, n = self._type(full), shard.size
        return self._run(lambda a, b, s: self.world.allGather(a, b, n, kind, s), shard, full)

    def _broadcast(self, x, root):
        kind = self._type(x)
        return self._run(lambda a, s: self.world.broadcast(a, a, x.size, kind, root, s), x)

    def _all_to_all(self, full, parts):
        kind, n = self._type(full), parts.shape[1]

        def exchange(a, b, s):
            self.nccl.groupStart()
            for other in range(self.size):
                ahead = other * n * full.itemsize
                self.world.send(a + ahead, n, kind, other, s)
                self.world.recv(b + ahead, n, kind, other, s)
            self.nccl.groupEnd()
        return self._run(exchange, full, parts)

    def numbers(self, *values):
        mine, everyone = (self.cupy.asarray(np.array(a, np.float64))
                          for a in (values, np.zeros(self.size * len(values))))
        self.all_gather(mine, everyone, what="numbers").wait()
        return everyone.get().reshape(self.size, -1)

    def barrier(self):
        self.numbers(0.0)
