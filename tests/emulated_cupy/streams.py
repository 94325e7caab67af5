"""The stand-in's streams, events and pinned memory: cupy.cuda's names, and nothing runs late.

Work is done when it is queued, on any stream. So a missing wait or synchronize() does not show
here; minilm.optim.streams.SimulatedDevice shows a missing wait. Misuse does show here: a blocking
stream, a copy from memory that is not pinned, and an event that measures time.
"""

import ctypes
import threading

import numpy as np

_thread = threading.local()
asynchronous = []  # (queue's id or None, "set" or "get", was the host's memory pinned?) of copies


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.disable_timing, self.recorded = disable_timing, False

    done = property(lambda self: True)

    def record(self, stream=None):
        self.recorded = True

    def synchronize(self):
        pass


class Stream:
    """A stream. With `null` it is the one that is current if no other is."""

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        if not (null or non_blocking):
            raise ValueError("a blocking stream waits for the null stream: nothing overlaps")
        self.is_non_blocking = non_blocking

    done = property(lambda self: True)
    ptr = 0  # what CUDA's libraries are given

    def synchronize(self):
        pass

    def record(self, event=None):
        event = Event() if event is None else event
        if not event.disable_timing:
            raise ValueError("an event that is only waited for needs no timing")
        event.record(self)
        return event

    def wait_event(self, event):
        if not event.recorded:
            raise ValueError("waiting for an event that was not recorded does not wait")

    def __enter__(self):
        _streams().append(self)
        return self

    def __exit__(self, *_):
        _streams().remove(self)


def get_current_stream(device_id=-1):
    return [NULL, *_streams()][-1]


def _streams():
    return _thread.__dict__.setdefault("streams", [])


NULL = Stream.null = Stream(null=True)


class CUDARuntimeError(RuntimeError):
    """cupy.cuda.runtime.CUDARuntimeError."""

    def __init__(self, status):
        super().__init__({2: "cudaErrorMemoryAllocation: out of memory"}[status])
        self.status = status


class PinnedMemory:
    """Page-locked memory of exactly this size. `limit` is how much of it exists; 0: any amount."""

    limit = used = 0
    blocks = {}  # address -> size

    def __init__(self, size, flags=0):
        if PinnedMemory.limit and PinnedMemory.used + size > PinnedMemory.limit:
            raise CUDARuntimeError(2)
        self.memory = (ctypes.c_char * size)()
        self.ptr, self.size = ctypes.addressof(self.memory), size
        PinnedMemory.used += size
        PinnedMemory.blocks[self.ptr] = size

    def __del__(self):
        if hasattr(self, "size"):
            PinnedMemory.used -= self.size
            del PinnedMemory.blocks[self.ptr]


def PinnedMemoryPointer(mem, offset):
    """An object with a buffer, as the real one is. It keeps the memory alive."""
    view = (ctypes.c_char * (mem.size - offset)).from_buffer(mem.memory, offset)
    view.mem = mem
    return view


def copied(stream, way, host: np.ndarray):
    """Record a copy that is queued on a stream."""
    at = host.ctypes.data
    pinned = any(start <= at and at + host.nbytes <= start + size
                 for start, size in PinnedMemory.blocks.items())
    asynchronous.append((stream, way, pinned))
