"""Tests that run in a fork of a process that has imported what they need, but not the project.

    run(tree, [file], 60) -> pytest's exit status, and how each test of tests/ ended

The process is multiprocessing's server of forks. What a fork starts ends with it.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time

SERVER = multiprocessing.get_context("forkserver")
OPTIONS = ["-q", "-o", "addopts=", "-m", "not kernels and not ranks",
           "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported before
for plugin in "cacheprovider", "anyio", "xdist", "typeguard":  # to begin sooner
    OPTIONS += ["-p", f"no:{plugin}"]


def run(tree, files, seconds, chosen=None, paths=()):
    """(exit status, [test, outcome, seconds, [module, line] of paths]) of chosen tests of files.

    Without `chosen` all tests run, also after one that fails.
    """
    record = tree.parent / "ended.jsonl"
    record.unlink(missing_ok=True)
    process = SERVER.Process(target=tested, args=(tree, files, seconds, chosen, paths, record))
    process.start()
    try:
        process.join(2 * seconds)
    finally:  # with what the tests have started
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    lines = record.read_text("utf-8").split("\n")[:-1] if record.exists() else []
    return process.exitcode, [json.loads(line) for line in lines]


def tested(tree, files, seconds, chosen, paths, record):
    """What a fork does."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    scratch = tree.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    os.environ |= {"PYTHONPATH": str(tree), "TMPDIR": str(scratch)}
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    import pytest

    options = [f"--rootdir={tree}", f"--basetemp={tree.parent / 'pytest'}", *OPTIONS]
    with open(record, "w", encoding="utf-8") as out:
        os._exit(pytest.main([*options, *(["-x"] if chosen else []), *map(str, files)],
                             plugins=[Watch(tree, chosen, paths, out)]))


class Watch:
    """A plugin of pytest: it chooses tests, and writes a line of JSON for each that has ended."""

    def __init__(self, tree, chosen, paths, out):
        self.chosen, self.out = chosen, out
        self.files = {str(tree / path): path.as_posix() for path in paths}  # whose lines are noted

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if not self.chosen or item.nodeid in self.chosen]

    def pytest_runtest_logstart(self):
        self.start, self.outcome, self.lines = time.perf_counter(), "passed", set()
        if self.files:
            threading.settrace(self.trace)
            sys.settrace(self.trace)

    def pytest_runtest_logreport(self, report):
        if self.outcome == "passed":
            self.outcome = report.outcome

    def pytest_runtest_logfinish(self, nodeid):
        sys.settrace(None)
        seconds = time.perf_counter() - self.start
        print(json.dumps([nodeid, self.outcome, seconds, sorted(self.lines)]), file=self.out,
              flush=True)

    def trace(self, frame, event, _):
        if name := self.files.get(frame.f_code.co_filename):
            self.lines.add((name, frame.f_lineno))
            return self.trace
