"""How a job of several ranks ends if one of them fails: soon, with one message, and all of it.

A rank that is gone is waited for by the others for ever, and MPI says nothing. So:

    a rank                       who finds out, and says so
    raises                       it says so itself; its error would otherwise wait at MPI's end
    is killed, or exits at once  its guard: the process that mpiexec started, which has forked
    ends while others go on      all: the end is a call like others, and these are compared
    makes another call           all: before an array is used, each knows what the others call
    does not come to a call      those who wait, when their patience is over

The message names the rank, the step, and the last call; the job's exit code is not 0. It takes a
few seconds, and for a rank that does not come `connect`'s patience, by default PATIENCE, and
LONGEST. If several ranks find the same out, as if all got a wrong file, the lowest is given time to
speak for all. Then mpiexec kills the others, even those that are stopped. A first Ctrl-C is passed
on to the ranks; at a second one mpiexec kills them.

The guard costs a fork, and shares its memory with the rank. Under another mpiexec than MPICH's the
launcher adds lines of its own. Over NCCL the first two rows hold: its calls are not compared.
"""

import atexit
import ctypes
import mmap
import os
import signal
import stat
import struct
import sys
import time
import traceback
from functools import cache

PATIENCE = 600.0  # seconds
TURN = 0.5  # seconds that a rank leaves to each one below it, and to 0 twice, up to LONGEST in all
LONGEST = 5.0
RANKS = "PMI_RANK", "OMPI_COMM_WORLD_RANK"  # MPICH's and Open MPI's number of this process


class Parted(RuntimeError):
    """The ranks do not make the same calls. All that make one find it out."""


def where(comm) -> str:
    """In which step a rank is, and what it called last, in words.

    >>> from minilm.parallel.comm import Local
    >>> comm = Local()
    >>> where(comm)
    'before its first call'
    >>> comm.begin(7)
    >>> comm.barrier()
    >>> where(comm)
    'in step 7, after call 1: all_reduce of 1 float64 for barrier in step 7'
    """
    step = f"in step {comm.step}, " * bool(comm.step)
    return step + (f"after call {comm.calls}: {comm.said}" if comm.calls else
                   "before its first call")


def require_alike(call: int, said: list[str]):
    """Parted if the ranks do not all say the same; it tells who says what, the fewest first.

    >>> require_alike(7, ["a", "b"])
    Traceback (most recent call last):
    minilm.parallel.faults.Parted: the ranks differ in call 7: rank 0 has a; rank 1 has b
    """
    by_words = {}
    for rank, words in enumerate(said):
        by_words.setdefault(words, []).append(rank)
    if len(by_words) > 1:
        groups = sorted(by_words.items(), key=lambda group: len(group[1]))
        raise Parted(f"the ranks differ in call {call}: " + "; ".join(
            f"{named(ranks, 'has', 'have')} {words}" for words, ranks in groups))


def missed(late: list[int], comm) -> str:
    """What to say if ranks have not come to the call in which the others wait."""
    if not late:
        return f"all ranks wait for one another, this one {where(comm)}"
    return (f"{named(late, 'has', 'have')} not come to call {comm.calls}, for which rank "
            f"{comm.rank} has waited {comm.patience:g} s: {comm.said}")


def named(ranks, one: str, several: str) -> str:
    return (f"rank {ranks[0]} {one}" if len(ranks) == 1 else
            f"ranks {', '.join(map(str, ranks))} {several}")


class Record:
    """What a rank has done, in memory that its guard sees, too."""

    SIZE = 1024

    def __init__(self):
        self.memory = mmap.mmap(-1, self.SIZE)

    def write(self, text: str):
        """How far it is."""
        line = text.encode()[: self.SIZE - 2]
        self.memory[1 : len(line) + 2] = line + b"\0"

    def read(self) -> str:
        return self.memory[1:].partition(b"\0")[0].decode(errors="replace")

    def end(self):
        """All ranks have come to the end, or the reason of another end is told."""
        self.memory[0] = 1

    @property
    def ended(self) -> bool:
        return self.memory[0] == 1


@cache
def guarded() -> Record:
    """Fork, once. The parent becomes the guard of this rank and does not return."""
    record = Record()
    record.write("before its first call")
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the rank's to handle
    child = os.fork()
    if child:
        code = 1
        try:
            code = guard(child, record)
        finally:
            os._exit(code)
    signal.signal(signal.SIGINT, before)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it goes with its guard
    return record


def guard(child: int, record: Record) -> int:
    """Wait for the end of a rank, and see to it that all end; returns the exit code."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not record.ended:
        # Perhaps the reason is told, and mpiexec is about to end us. MPI may crash, too, if its
        # calls differ: then the other ranks say more.
        time.sleep(4 * TURN if code > 0 else 3 * TURN)
        how = (f"was killed by {signal.Signals(-code).name}" if code < 0 else
               f"left with exit code {code}")
        if code == -signal.SIGKILL:
            how += " (did memory run out?)"
        say(f"rank {own_rank()} {how} {record.read()}")
    elif code == 0:
        return 0
    code = 128 - code if code < 0 else code or 1
    if "PMI_FD" in os.environ:  # what MPI_Abort writes; mpiexec would add nine lines to an exit
        os.write(int(os.environ["PMI_FD"]), f"cmd=abort exitcode={code}\n".encode())
        time.sleep(TURN)
    return code


def hooked(comm, record: Record):
    """The Comm of this rank. From now on its end, a good one or an error, is all ranks' end."""
    rank_itself = os.getpid()

    def fail(kind, error, trace):
        said = f"rank {comm.rank} of {comm.size} failed {where(comm)}\n" + "".join(
            traceback.format_exception(kind, error, trace))
        if issubclass(kind, Parted):
            said = f"{error}\n{''.join(traceback.format_tb(trace))}"
        elif issubclass(kind, KeyboardInterrupt):
            said = f"stopped {where(comm)}"
        end(said, comm.rank, record)

    def leave():
        if os.getpid() == rank_itself:
            try:
                comm.end()
            except (Parted, KeyboardInterrupt) as error:
                end(str(error), comm.rank, record)
            record.end()

    sys.excepthook = fail
    atexit.register(leave)
    return comm


def end(said: str, rank: int, record: Record, code: int = 1):
    """Say it, if no rank below this one has the same to say, and end all ranks."""
    sys.stdout.flush()
    time.sleep(min(LONGEST, (rank + 1) * TURN) if rank else 0)
    if said:
        say(said)
    record.end()
    os._exit(code)


def say(text: str):
    """To stderr in one piece, since other ranks write there as well; returns when it is read.

    What an end finds in the pipe to mpiexec is lost.
    """
    try:
        os.write(2, f"{text.rstrip()}\n".encode("utf-8", "backslashreplace"))
        until = time.monotonic() + LONGEST
        while stat.S_ISFIFO(os.fstat(2).st_mode) and unread(2) and time.monotonic() < until:
            time.sleep(0.01)
    except OSError:
        pass  # nobody listens


def unread(pipe: int) -> int:
    """Bytes that wait in a pipe, given either end."""
    import fcntl  # here, since all programs load this file, and Windows has neither
    import termios

    count = fcntl.ioctl(pipe, termios.FIONREAD, struct.pack("i", 0))
    return struct.unpack("i", count)[0]


def own_rank() -> int:
    """The number of this process among those that mpiexec has started; 0 without it."""
    return int(next((os.environ[k] for k in RANKS if os.environ.get(k)), 0))
