"""One batch on several cores: threads, or forked processes that share weights and gradients.

Each worker runs forward and backward on its part of the batch, with BLAS at one thread. All of them
add to one gradient buffer, in a fixed order: the k-th gradient of worker w is added after the k-th
of worker w - 1. (Their graphs are alike, so both are of the same parameter.) So the bits of the sum
are the same every time, and the same for threads and processes. A gradient that comes early waits
in its worker's queue, and the worker goes on until the queue is full.

Threads run everywhere. Processes need fork (Linux), but do not wait for the interpreter's lock,
which costs a third of the step on small models. FlatParameters lie in memory that a fork shares.
"""

import mmap
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from threadpoolctl import threadpool_limits


def default_workers() -> tuple[int, bool]:
    """(workers, processes) that suit this machine: every core, and processes if fork is safe."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores, sys.platform == "linux" and cores > 1


class Workers:
    """`run(method, parts)` calls method(owner, *part) for each part, each on its own worker.

    It returns the results in order. flat: the FlatParameters to which the backward passes inside a
    method add their gradients. owner: the object whose methods are called. With processes=True each
    worker has its own copy of it, made when the workers start; methods, parts and results travel
    through pipes. Use Workers as a context manager: while it is open, BLAS has one thread in this
    process. A single worker is this thread, and needs no context manager.
    """

    def __init__(self, flat, owner, count: int, processes: bool = False):
        if count < 1:
            raise ValueError(f"there must be at least one worker, got {count}")
        self.owner, self.count, self.processes = owner, count, processes
        self.open, self.pipes, self.children = False, [], []
        self.sync = multiprocessing.get_context("fork") if processes else threading
        self.failed = Flag()
        self.turns = [self.sync.Semaphore(0) for _ in range(count - 1)]
        row = [None, *self.turns, None]
        self.queues = [GradientQueue(*row[w : w + 2], self._broken) for w in range(count)]
        self.rank, self.parent, self.flat = threading.local(), os.getpid(), flat

    def __enter__(self):
        if not all(p.requires_grad for p in self.flat.params):
            raise ValueError("a parameter of the optimizer is frozen, or its adapter does not act: "
                             "let it act before the workers start")
        self.open, self.pipes, self.children = True, [], []
        # The nodes, since a parameter loses its own while its adapter does not act.
        self.receivers = [(p.node, p.on_grad) for p in self.flat.params]
        for p in self.flat.params:
            p.on_grad = lambda dy, receive=p.on_grad: self.queues[self.rank.value].put(receive, dy)
        if self.count > 1:
            OneThread.begin()
        if not self.processes:
            self.pool = ThreadPoolExecutor(max(1, self.count - 1))
            return self
        try:
            for rank in range(1, self.count):
                self._start(rank)
        except BaseException:  # no more processes, or Ctrl-C: leave nothing behind
            self.__exit__()
            raise
        return self

    def _start(self, rank):
        ours, theirs = self.sync.Pipe()
        child = self.sync.Process(target=self._serve, args=(rank, theirs, ours), daemon=True)
        with theirs:  # closed, so that a dead child reads as the end of the file
            child.start()
        self.pipes.append(ours)
        self.children.append(child)

    def __exit__(self, *_):
        self.open = False
        if self.processes:
            for pipe, child in zip(self.pipes, self.children):
                pipe.close()
                child.terminate()
                child.join(5)
                child.kill()  # one that is stopped does not hear the first
                child.join()
        else:
            self.pool.shutdown()
        for node, receive in self.receivers:
            node.on_grad = receive
        if self.count > 1:
            OneThread.end()

    def run(self, method, parts: list[tuple]) -> list:
        if self.count > 1 and not self.open:
            raise RuntimeError(f"the {self.count} workers run only inside a `with`: "
                               "with Trainer(...) as trainer: ...")
        if not 1 <= len(parts) <= self.count:
            raise ValueError(f"{len(parts)} parts for {self.count} workers")
        if self.failed.is_set():
            raise RuntimeError("a worker failed before; its gradients are lost")
        for turn in self.turns:  # a run with fewer parts leaves counts for workers that had none
            while turn.acquire(False):
                pass
        if not self.processes:
            futures = [self.pool.submit(self._run, w, method, part)
                       for w, part in enumerate(parts) if w]
            return [self._run(0, method, parts[0]), *(f.result() for f in futures)]
        for pipe, part in zip(self.pipes, parts[1:]):
            with suppress(OSError):  # _receive will find the dead child
                pipe.send((method, part))
        results = [self._run(0, method, parts[0])]
        return results + [self._receive(w) for w in range(1, len(parts))]

    def _run(self, rank, method, part):
        self.rank.value = rank
        try:
            result = method(self.owner, *part)
            self.queues[rank].finish()
            return result
        except GaveUp:
            return None  # run raises the other worker's error
        except BaseException:
            if self.count > 1:  # others may wait for this one's gradients
                self.failed.set()
            raise

    def _broken(self):
        """Has a worker failed? In a child also: has the parent died?"""
        return self.failed.is_set() or self.parent not in (os.getpid(), os.getppid())

    def _serve(self, rank, pipe, parents_end):
        """What a child does: take parts and send results, until the pipe is closed."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        parents_end.close()
        for p, view in zip(self.flat.params, self.flat.views(self.flat.grad)):
            p.grad = view  # worker 0 writes first, the others add
        try:
            while True:
                try:
                    answer = (self._run(rank, *pipe.recv()), None)
                except EOFError:
                    return
                except Exception:
                    answer = (None, traceback.format_exc())
                pipe.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return  # the parent is gone

    def _receive(self, rank):
        try:
            result, error = self.pipes[rank - 1].recv()
        except (EOFError, OSError):  # the end of the pipe, or of half an answer
            self.failed.set()
            self.children[rank - 1].join(1)
            code = self.children[rank - 1].exitcode
            how = f"killed by signal {-code}" if code and code < 0 else f"exit code {code}"
            raise RuntimeError(f"worker process {rank} died: {how}; if memory ran out, fewer "
                               "workers need less") from None
        if error:
            raise RuntimeError(f"worker process {rank} failed:\n{error}")
        return result


class OneThread:
    """BLAS has one thread while any Workers of this process are open.

    The number is the process's, so those of several threads share one limit: the first to open sets
    it, the last to close gives back what was there before.
    """

    lock, users, limits = threading.Lock(), 0, None

    @classmethod
    def begin(cls):
        with cls.lock:
            cls.limits = cls.limits or threadpool_limits(1, "blas")
            cls.users += 1

    @classmethod
    def end(cls):
        with cls.lock:
            cls.users -= 1
            if not cls.users:
                cls.limits.restore_original_limits()
                cls.limits = None


class Flag:
    """A flag that threads and forked processes share. No lock: its owner may be killed any time."""

    def __init__(self):
        self.byte = mmap.mmap(-1, 1)

    def set(self):
        self.byte[0] = 1

    def is_set(self) -> bool:
        return self.byte[0] == 1


class GaveUp(Exception):
    """A gradient's turn will not come: another worker failed."""


class GradientQueue:
    """The gradients of one worker, each waiting for its turn to be added to the sum.

    before, after: semaphores that count the gradients added by the worker before this one, and by
    this one; None at the ends of the row. broken() says when to stop waiting.
    """

    LIMIT = 1 << 24  # bytes that may wait

    def __init__(self, before, after, broken):
        self.before, self.after, self.broken = before, after, broken
        self.waiting = deque()

    def put(self, receive, dy):
        self.waiting.append((receive, dy))
        while self.waiting and (self.before is None or self.before.acquire(False)):
            self._enter()
        self._wait_for(self.LIMIT)

    def finish(self):
        """Wait until every gradient has been added."""
        self._wait_for(0)

    def _wait_for(self, limit):
        """Return when at most `limit` bytes wait."""
        while sum(dy.nbytes for _, dy in self.waiting) > limit:
            while not self.before.acquire(True, 0.1):
                if self.broken():
                    raise GaveUp
            self._enter()

    def _enter(self):
        receive, dy = self.waiting.popleft()
        receive(dy)
        if self.after:
            self.after.release()
