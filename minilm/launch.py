"""A program that mpiexec has started n times: one voice, and one end for all.

Rank 0 speaks, and the others are silent. Whoever fails ends the job: the others would wait for it
for ever. A rank other than 0 first waits a moment, in which rank 0 fails too if the reason is the
same on all, such as a wrong option. So there is one message.
"""

import os
import sys
import time
from contextlib import suppress

from minilm.parallel.comm import launched
from minilm.parallel.faults import own_rank


def silence_all_but_one():
    """What any rank but 0 prints from now on goes nowhere."""
    if launched() > 1 and own_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def require_stage(known: bool, given):
    """ValueError if several processes were started that would not train together.

    known: has the program an option --stage? given: the names of the options that it has got.
    """
    if launched() == 1 or (known and "stage" in given):
        return
    raise ValueError(f"mpiexec has started {launched()} of this program, and each would work by "
                     "itself: " + ("give --stage 0, 1, 2 or 3, and they train together" if known
                                   else "start it without mpiexec"))


def end(said: str | int):
    """sys.exit, but on several ranks for all of them.

    said: a message, or a code if there is nothing to say.
    """
    if launched() == 1:
        sys.exit(said)
    try:
        from mpi4py import MPI  # returns when all are there
    except (ImportError, RuntimeError):
        MPI = None
    if own_rank():
        time.sleep(min(5, 1 + own_rank() / 4))
    code = said if isinstance(said, int) else 1
    if isinstance(said, str) and (MPI or not own_rank()):
        said = f"rank {own_rank()}: {said}\n" if own_rank() else f"{said}\n"
        with suppress(OSError):
            os.write(2, said.encode("utf-8", "backslashreplace"))
    if not MPI:
        sys.exit(code)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPI would have something to say, too
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)  # mpiexec is about to end this process: it must not go on until then
