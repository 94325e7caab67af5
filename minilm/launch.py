"""A program that mpiexec has started n times: one voice, and one end for all.

Rank 0 speaks, and the others are silent. Whoever fails ends the job, as parallel/faults.py does it.
If the reason is the same on all, such as a wrong option, rank 0 says it for all.
"""

import os
import sys

from minilm.parallel import faults
from minilm.parallel.comm import launched
from minilm.parallel.faults import guarded, own_rank
from minilm.parallel.mpi import forget_names


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
    record, rank, together = guarded(), own_rank(), True
    try:
        from mpi4py import MPI  # noqa: F401 - it returns when all are there

        forget_names()
    except (ImportError, RuntimeError):
        together = False  # nor have the others one
    text = "" if isinstance(said, int) or (rank and not together) else said
    faults.end(f"rank {rank}: {text}" if rank and text else text, rank, record,
               said if isinstance(said, int) else 1)
