"""How long collectives are under way, and how much of that a rank waits for.

A call that is posted goes on while the rank computes. Of the calls of a Clocked comm it is known

    waited       seconds inside the calls, in test() and in wait(): then the rank does nothing else
    under_way    seconds in which at least one call was posted and not done. It is done when its
                 result is there, whether the rank has asked for it by then or not

so 1 - waited / under_way is hidden behind other work. But calls that are waited for at once may be
under way for a shorter time, since nothing takes the cores from them. So there is a second measure:
with blocking=True each call is waited for at once, and what is waited less without it is hidden
indeed.
"""

import time

from minilm.parallel.comm import Comm, Handle


class Clocked(Comm):
    """Another comm of NumPy's arrays, whose handles are timed: one of the programs', by connect().

    ordered: by default as the other's. blocking: wait for each call at once; may be changed.

    >>> from minilm.parallel.comm import Local
    >>> import numpy as np
    >>> comm = Clocked(Local())
    >>> comm.all_reduce(np.zeros(3)).wait()
    >>> comm.waited > 0 and comm.under_way > 0
    True
    """

    def __init__(self, comm: Comm, ordered: bool | None = None, blocking: bool = False):
        super().__init__(comm.ordered if ordered is None else ordered)
        self.comm, self.blocking = comm, blocking
        self.rank, self.size, self.local_rank = comm.rank, comm.size, comm.local_rank
        self.restart()

    def __getattr__(self, name):
        return getattr(self.comm, name)  # the engine's calls

    def restart(self):
        """Count from 0 again. All handles must be done."""
        self.sent.clear()
        self.waited, self.spans = 0.0, []  # when a call was posted, and when it was done

    def begin(self, step):
        super().begin(step)
        self.comm.begin(step)

    def _call(self, what, method, x, *others, then=None):
        clock = Clock(self, then)
        clock.handle = clock.inside(self.comm._call, what, method, x, *others, then=clock.stop)
        if self.blocking or clock.handle.request is None:  # some engines have done all by now
            clock.wait()
        return clock

    @property
    def under_way(self) -> float:
        total = end = 0.0
        for begun, done in sorted(self.spans):
            total += max(0.0, done - max(begun, end))
            end = max(end, done)
        return total


class Clock(Handle):
    """A handle of a Clocked comm."""

    def __init__(self, comm: Clocked, then=None):
        self.comm, self.then, self.begun = comm, then, time.perf_counter()

    def inside(self, call, *args, **settings):
        """What the call gives. Meanwhile the rank waits."""
        begun = time.perf_counter()
        found = call(*args, **settings)
        self.comm.waited += time.perf_counter() - begun
        return found

    def stop(self):
        """The result has come, perhaps in another thread."""
        self._finish()
        self.comm.spans.append((self.begun, time.perf_counter()))

    def test(self):
        return self.inside(self.handle.test)

    def wait(self):
        self.inside(self.handle.wait)
