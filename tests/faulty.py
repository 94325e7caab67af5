"""A rank that fails: mpiexec -n 3 python tests/faulty.py HOW [RANK]

All ranks make six steps of one call each. In step 3 one of them does what HOW says.
"""

import os
import signal
import sys
import time

import numpy as np

from minilm.parallel.comm import connect

PATIENCE = 2.0


def fail(how, comm):
    x = np.ones(12, np.float32)
    if how == "raise":
        raise ZeroDivisionError("no more")
    elif how == "exit":
        sys.exit(3)
    elif how == "return":
        sys.exit()
    elif how.startswith("os._exit"):
        os._exit(int(how[-1]))
    elif how in ("SIGKILL", "SIGSTOP", "SIGSEGV", "SIGTERM"):
        os.kill(os.getpid(), signal.Signals[how])
    elif how == "guard":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    elif how == "hang":
        time.sleep(60)
    elif how == "hang forever":
        time.sleep(0.5)  # the others wait by now
        print("now", flush=True)
        time.sleep(600)
    elif how == "shape":
        comm.all_reduce(x[:9], what="gradients").wait()
    elif how == "longer":
        comm.all_reduce(np.ones(100_000, np.float32), what="gradients").wait()
    elif how == "dtype":
        comm.all_reduce(x.view(np.int32), what="gradients").wait()
    elif how == "barrier":
        comm.barrier()
    elif how == "gather":
        comm.all_gather(x[:4].copy(), x).wait()
    raise AssertionError(f"{how} went on")


def main(how, who="1"):
    comm = connect(patience=600 if how == "hang forever" else PATIENCE)
    if how == "all raise":
        raise ZeroDivisionError("everywhere")
    for step in range(1, 7):
        comm.begin(step)
        if step == 3 and how != "well" and comm.rank in map(int, who.split(",")):
            fail(how, comm)
        x = np.ones(12, np.float32)
        comm.all_reduce(x, what="gradients").wait()
        assert (x == comm.size).all()
    sys.stdout.write(f"rank {comm.rank} has ended\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
