"""A rank that fails ends all ranks, with one message. Processes, each job started by mpiexec."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from faulty import PATIENCE

from minilm.parallel import faults
from minilm.parallel.faults import RANKS, TURN, Record

pytestmark = pytest.mark.ranks
pytest.importorskip("mpi4py", reason="the extra mpi is not installed")
MPIEXEC = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
if not MPIEXEC:
    pytest.skip("there is no mpiexec", allow_module_level=True)
TESTS = Path(__file__).parent
SECONDS = PATIENCE + 20  # most of it is for a busy machine: it starts three interpreters

STEP_3 = r"in step 3, after call 2: all_reduce of 12 float32 for gradients in step 2\n"
OTHERS = r"; ranks 0, 2 have all_reduce of 12 float32 for gradients in step 3\n"
LATE = (r"rank 1 has not come to call 3, for which rank 0 has waited 2 s: all_reduce of 12 float32 "
        r"for gradients in step 3\n")
MESSAGES = {
    "raise": f"rank 1 of 3 failed {STEP_3}Traceback(.*\n)+ZeroDivisionError: no more\n",
    "exit": f"the ranks differ in call 3: rank 1 has its end in step 3{OTHERS}(  .*\n)+",
    "return": f"the ranks differ in call 3: rank 1 has its end in step 3{OTHERS}(  .*\n)+",
    "os._exit0": f"rank 1 left with exit code 0 {STEP_3}",
    "os._exit3": f"rank 1 left with exit code 3 {STEP_3}",
    "SIGKILL": rf"rank 1 was killed by SIGKILL \(did memory run out\?\) {STEP_3}",
    "SIGSEGV": f"rank 1 was killed by SIGSEGV {STEP_3}",
    "SIGSTOP": f"{LATE}(  .*\n)+",
    "hang": f"{LATE}(  .*\n)+",
    "shape": f"the ranks differ in call 3: rank 1 has all_reduce of 9 float32 for gradients "
             f"in step 3{OTHERS}(  .*\n)+",
    "longer": f"the ranks differ in call 3: rank 1 has all_reduce of 100000 float32 for gradients "
              f"in step 3{OTHERS}(  .*\n)+",
    "dtype": f"the ranks differ in call 3: rank 1 has all_reduce of 12 int32 for gradients "
             f"in step 3{OTHERS}(  .*\n)+",
    "barrier": f"the ranks differ in call 3: rank 1 has barrier in step 3{OTHERS}(  .*\n)+",
    "gather": f"the ranks differ in call 3: rank 1 has all_gather of 4 float32 in step 3{OTHERS}"
              "(  .*\n)+",
    "all raise": "rank 0 of 3 failed before its first call\nTraceback(.*\n)+"
                 "ZeroDivisionError: everywhere\n",
    "guard": "(.*\n)+.*BAD TERMINATION(.*\n)+",  # mpiexec's own: who would speak is dead
}


def start(how):
    path = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [MPIEXEC, "-n", "3", sys.executable, "-W", "error", str(TESTS / "faulty.py"), how],
        env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1",
                          "MPIEXEC_TIMEOUT": "60"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def processes_of(how) -> list[str]:
    return [i for i in processes() if f"faulty.py\0{how}\0".encode() in read(i, "cmdline")]


def without_owner() -> set[str]:
    """Files of MPICH in shared memory that no process uses."""
    used = b"".join(read(i, "maps") for i in processes())
    return {path.name for path in Path("/dev/shm").glob("mpich*")
            if path.name.encode() not in used}


def processes():
    return [path.name for path in Path("/proc").iterdir() if path.name.isdigit()]


def read(process, name) -> bytes:
    try:
        return Path("/proc", process, name).read_bytes()
    except OSError:  # it has ended
        return b""


def nothing_is_left(how, before) -> bool:
    """Soon: mpiexec does not wait for those that it kills."""
    until = time.monotonic() + 5
    while processes_of(how) or not without_owner() <= before:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("how", MESSAGES)
def test_a_rank_that_fails_ends_all(how):
    before, began = without_owner(), time.monotonic()
    job = start(how)
    said, complained = job.communicate(timeout=70)
    seconds = time.monotonic() - began
    assert job.returncode not in (0, None), complained
    assert re.fullmatch(MESSAGES[how], complained + said), complained + said
    assert seconds < SECONDS
    assert nothing_is_left(how, before)


def test_ranks_that_end_well_leave_nothing():
    before, job = without_owner(), start("well")
    said, complained = job.communicate(timeout=70)
    assert (job.returncode, complained) == (0, "")
    assert sorted(said.split("\n")[:-1]) == [f"rank {r} has ended" for r in range(3)]
    assert nothing_is_left("well", before)


def test_a_message_is_read_before_its_rank_ends():
    """Else mpiexec may hear of the end first, and throw the message away."""
    code = ("import time; from minilm.parallel import faults; faults.say('why'); "
            "print(time.monotonic())")
    with subprocess.Popen([sys.executable, "-c", code], cwd=TESTS.parent, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as rank:
        time.sleep(1)
        began = time.monotonic()
        assert rank.stderr.readline() == "why\n"
        assert float(rank.stdout.read()) > began


def test_what_a_rank_has_printed_is_not_lost():
    code = ("from minilm.parallel import faults; print('before'); "
            "faults.end('why', 0, faults.Record())")
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": ""}, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "before\n", "why\n")


@pytest.mark.parametrize("script, ended, code, done", [
    ("exit 0", True, 0, []), ("exit 3", True, 3, []),
    ("exit 0", False, 1, [3 * TURN, "rank 0 left with exit code 0 in step 7"]),
    ("exit 3", False, 3, [4 * TURN, "rank 0 left with exit code 3 in step 7"]),
    ("kill -9 $$", False, 137,
     [3 * TURN, "rank 0 was killed by SIGKILL (did memory run out?) in step 7"])])
def test_a_guard_leaves_the_others_time_and_then_speaks(monkeypatch, script, ended, code, done):
    acts, record = [], Record()
    record.write("in step 7")
    if ended:
        record.end()
    for name in (*RANKS, "PMI_FD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(faults, "time", SimpleNamespace(sleep=acts.append))
    monkeypatch.setattr(faults, "say", acts.append)
    child = os.posix_spawn("/bin/sh", ["sh", "-c", script], os.environ)
    assert (faults.guard(child, record), acts) == (code, done)


def test_a_record_holds_the_beginning_of_a_long_line():
    record = Record()
    for size, kept in ((5000, 1022), (1022, 1022), (3, 3)):
        record.write("x" * size)
        assert record.read() == "x" * kept and not record.ended


def test_ctrl_c_ends_all():
    """The first one, though one rank sleeps and the others wait for it."""
    before, job = without_owner(), start("hang forever")
    for line in job.stdout:
        if line == "now\n":
            break
    job.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, complained = job.communicate(timeout=70)
    assert time.monotonic() - began < SECONDS
    ours = [line for line in complained.splitlines() if not line.startswith("[mpiexec")]
    assert len(ours) == 1 and ours[0].startswith("stopped in step 3, after call 3: "), complained
    assert job.returncode != 0
    assert nothing_is_left("hang forever", before)
