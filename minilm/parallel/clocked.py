"""How long collectives are under way, and how much of that a rank waits for.

A call that is posted goes on while the rank computes. Of each call of a Clocked comm it is known

    waited    seconds inside the call itself, in test() and in wait(): then the rank does nothing
              else
    hidden    seconds from posting it until it is done, without those

An engine that works only inside its calls, as MPI does between processes of one machine, may seem
to hide what it has not yet begun. So there is a second measure: with blocking=True each call is
waited for at once, and what is waited less without it is hidden indeed.
"""

import time

from minilm.parallel.comm import Comm


class Clock:
    """A request with its times; done(hidden, waited) is told them at the end."""

    def __init__(self, post, done):
        begun = time.perf_counter()
        self.request, self.done = post(), done
        self.posted = time.perf_counter()
        self.waited, self.inside = self.posted - begun, 0.0
        if self.request is None:
            self._end()

    def Test(self) -> bool:
        return self._ask(self.request.Test)

    def Wait(self):
        self._ask(lambda: self.request.Wait() or True)

    def _ask(self, question):
        begun = time.perf_counter()
        answer = question()
        self.inside += time.perf_counter() - begun
        if answer:
            self._end()
        return answer

    def _end(self):
        hidden = time.perf_counter() - self.posted - self.inside
        self.done(hidden if self.inside else 0.0, self.waited + self.inside)


class Clocked(Comm):
    """Another comm's engine, whose calls are timed, without what mpi.py does beside MPI's own.

    hidden, waited: seconds of all its calls. blocking: wait for each call at once.

    >>> from minilm.parallel.comm import Local
    >>> import numpy as np
    >>> comm = Clocked(Local())
    >>> comm.all_reduce(np.zeros(3)).wait()
    >>> comm.hidden == 0 < comm.waited
    True
    """

    def __init__(self, engine: Comm, ordered: bool = False, blocking: bool = False):
        super().__init__(ordered)
        self.engine, self.blocking, self.hidden, self.waited = engine, blocking, 0.0, 0.0
        self.rank, self.size, self.local_rank = engine.rank, engine.size, engine.local_rank

    def _clocked(self, post):
        clock = Clock(post, self._done)
        if clock.request is None:
            return None
        if self.blocking:
            clock.Wait()
            return None
        return clock

    def _done(self, hidden, waited):
        self.hidden += hidden
        self.waited += waited

    def _all_reduce(self, x):
        return self._clocked(lambda: self.engine._all_reduce(x))

    def _reduce_scatter(self, full, shard):
        return self._clocked(lambda: self.engine._reduce_scatter(full, shard))

    def _all_gather(self, shard, full):
        return self._clocked(lambda: self.engine._all_gather(shard, full))

    def _all_to_all(self, full, parts):
        return self._clocked(lambda: self.engine._all_to_all(full, parts))

    def _broadcast(self, x, root):
        return self._clocked(lambda: self.engine._broadcast(x, root))
