"""Tests that run in a fork of a process that has imported what they need, but not the project.

    run(tree, [file], 60) -> pytest's exit status, and how each test of tests/ ended

The process is multiprocessing's server of forks. What a fork starts ends with it.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading

SERVER = multiprocessing.get_context("forkserver")
OPTIONS = ["-q", "-o", "addopts=", "-m", "not ranks", "-p", "no:cacheprovider",
           "-p", "_hypothesis_pytestplugin"]


def run(tree, files, seconds, chosen=None, paths=()):
    """(exit status, [test, outcome, seconds, [module, line] of paths]) of chosen tests of files.

    seconds are of a CPU, both given and returned; ten times as many may pass. Chosen tests run in
    their order, up to the first that fails; without `chosen` all run.
    """
    record = tree.parent / "ended.jsonl"
    record.unlink(missing_ok=True)
    process = SERVER.Process(target=tested, args=(tree, files, seconds, chosen, paths, record))
    process.start()
    try:
        for _ in range(int(10 * seconds)):  # a time in which all stand still does not count
            if process.exitcode is None:
                process.join(1)
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
    os.environ |= {"PYTHONPATH": str(tree), "TMPDIR": str(scratch),
                   "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # to begin sooner
    gc.freeze()  # pytest collects garbage, but not what was imported before
    sys.dont_write_bytecode = False  # or each fork compiles all modules
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
        if self.chosen:
            found = {item.nodeid: item for item in items}
            items[:] = [found[test] for test in self.chosen if test in found]

    def pytest_runtest_logstart(self):
        self.start, self.outcome, self.lines = cpu(), "passed", set()
        if self.files:
            threading.settrace(self.trace)
            sys.settrace(self.trace)

    def pytest_runtest_logreport(self, report):
        if self.outcome == "passed":
            self.outcome = report.outcome

    def pytest_runtest_logfinish(self, nodeid):
        sys.settrace(None)
        ended = nodeid, self.outcome, cpu() - self.start, sorted(self.lines)
        print(json.dumps(ended), file=self.out, flush=True)

    def trace(self, frame, event, _):
        if name := self.files.get(frame.f_code.co_filename):
            self.lines.add((name, frame.f_lineno))
            return self.trace


def cpu() -> float:
    """Seconds of a CPU that this process and those that it waited for have taken."""
    return sum(os.times()[:4])
