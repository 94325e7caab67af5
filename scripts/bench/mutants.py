"""Whether the tests test: small bugs are planted in a package, and its tests are to find them.

    python scripts/bench/mutants.py --packages align measure --count 100 --seed 0
    python scripts/bench/mutants.py --packages . --only minilm/graph.py:57

A mutant is a module with one change: < becomes <=, and becomes or, n becomes n + 1, a condition is
negated, a keyword, a call or a raise is dropped (mutations.py). It prints a line for each mutant of
a sample: killed, if a test fails or does not end, or survived; and in the end the share of each
package. A mutant that means the same counts as survived: a reader has to find those. The package
"." is minilm/*.py.

First the test files of each module run in a copy of the tree, and the lines that each test runs
are noted. Those are the files that have its name, or import it in the fewest steps and most of it,
and the examples of docstrings. Then each mutant is written into the copy, and the tests that ran
its line run, then the others of its module's files. Each run is a fork of one process that has
imported NumPy, pytest and PyTorch, but not the project. A test that fails alone without the mutant
kills nothing.
"""

import ast
import os
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from forked_tests import SERVER, run
from mutations import Mutant, mutants, planted

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = ".git", ".venv*", "runs", "__pycache__"  # of the copy
EXAMPLES = Path("tests/test_doctests.py")  # of docstrings: it imports each module by its name
SECONDS = 3.0  # of a CPU, when noted: of tests that ran the line, and then of others
WATCHED = 20.0  # seconds of a test file in which lines are noted; later tests are not used
WAIT = 10.0  # seconds of a CPU that a process may take to begin
PASSED = 0, 5  # pytest's exit status if all tests pass, or if there are none
NO_TEST = "no test: it cannot begin, or does not end"
ALWAYS = "__main__", "pytest", "hypothesis"  # imported once, before any fork
LOADED = "numpy", "ml_dtypes", "torch", "transformers"  # the same, if a test names it


def main(packages: tuple[str, ...], count: int = 100, seed: int = 0, only: tuple[str, ...] = (),
         files: int = 4, tree: Path = ROOT):
    """Print which mutants of a package its tests kill.

    Args:
        packages: folders of minilm/, with what is in them; "." for the modules of minilm itself.
        count: how many mutants of each package.
        seed: of the sample.
        only: FILE:LINE of those of the sample that are to run.
        files: of each module how many test files, those that have its name or import it first.
        tree: the project, with minilm/ and tests/; it is copied.
    """
    samples = {package: sample(tree, package, count, seed, only) for package in packages}
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    os.environ.setdefault("HYPOTHESIS_PROFILE", "ci")
    used = "\n".join(path.read_text("utf-8") for path in (tree / "tests").rglob("*.py"))
    SERVER.set_forkserver_preload([*ALWAYS, *(name for name in LOADED if name in used)])
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        tests = Tests(copy, files, {mutant.path for some in samples.values() for mutant in some})
        for package, some in samples.items():
            tests.watch({mutant.path for mutant in some})
            ended = [tests.killed(mutant) for mutant in some]
            shares.append(f"{package}: {sum(ended)} of {len(some)} killed")
    print("", *shares, sep="\n")


def sample(tree, package, count, seed, only) -> list[Mutant]:
    """Some mutants of a package, in the order of its files and lines."""
    folder = tree / "minilm" / package
    modules = sorted(folder.glob("*.py") if package == "." else folder.rglob("*.py"))
    if not modules:
        raise ValueError(f"packages must be folders of minilm, or .; got {package!r}")
    every = [mutant for path in modules for mutant in mutants(tree, path.relative_to(tree))]
    some = sorted(random.Random(seed).sample(range(len(every)), min(count, len(every))))
    def asked(m): return not only or f"{m.path.as_posix()}:{m.lines.start}" in only
    return [every[i] for i in some if asked(every[i])]


def test_files(tree) -> dict[Path, list[Path]]:
    """Each file of the project -> its test files, the most specific first."""
    names = {}  # by which each file is imported
    for folder in "minilm", "scripts", "tests":
        for path in (tree / folder).rglob("*.py"):
            parts = path.relative_to(tree).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            names[".".join(parts if folder == "minilm" else parts[-1:])] = path.relative_to(tree)
    for path in [path for path in names.values() if path.name == "__init__.py"]:
        for node in ast.walk(ast.parse((tree / path).read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module in names:  # a package's own names
                for alias in node.names:
                    names.setdefault(".".join([*path.parent.parts, alias.name]), names[node.module])
    arrows, found = {path: imports(tree / path, names) for path in {*names.values()}}, {}
    for test in (path for path in arrows if path.name.startswith("test_")):
        edge, seen, steps = {test}, set(), 0
        while edge:
            for path in edge:
                named = test.stem == f"test_{path.stem.strip('_')}"  # as good as a step less
                rank = steps - named, -arrows[test][path], test
                found.setdefault(path, []).append(rank)
            seen |= edge
            edge, steps = set().union(*map(arrows.get, edge)) - seen, steps + 1
    return {path: [test for *_, test in sorted(ranks)] for path, ranks in found.items()}


def imports(path, names) -> Counter:
    """The files of the project that a file imports, early or late: how many names of each."""
    said = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            said += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                said += [node.module, f"{node.module}.{alias.name}"]
    return Counter(names[name] for name in said if name in names)


class Tests:
    """The tests of some modules, as far as they pass: how long each takes, and what it runs.

    files: module -> its test files. found: test -> (seconds, {(module, line)}). trusted: tests that
    pass alone as well.
    """

    def __init__(self, tree, count, paths):
        self.tree, self.paths = tree, paths
        self.files = {path: files[:count] for path, files in test_files(tree).items()}
        self.found, self.watched, self.trusted = {}, set(), {NO_TEST}

    def watch(self, paths):
        """Run the test files of some modules, and note what they run of all."""
        new = {file for path in paths for file in self.files.get(path, [])} - self.watched
        new |= {EXAMPLES} - self.watched if (self.tree / EXAMPLES).exists() else set()
        for file in sorted(new):
            _, ended = run(self.tree, [file], WATCHED, None, self.paths)
            passed = {test: (seconds, set(map(tuple, lines)))
                      for test, outcome, seconds, lines in ended if outcome == "passed"}
            self.found |= passed
            if not passed:
                print(f"{file}: no test passes", flush=True)
        self.watched |= new

    def killed(self, mutant) -> bool:
        """Whether a test finds it; prints its line."""
        while True:
            with planted(self.tree, mutant):
                killer = next(filter(None, map(self.failing, self.chosen(mutant))), None)
            if killer is None or self.trust(killer):
                print("survived " if killer is None else "killed   ", mutant, flush=True)
                return killer is not None
            del self.found[killer]

    def chosen(self, mutant):
        """The tests that ran the mutant's lines, then the others of its module's files."""
        rank = {file: i for i, file in enumerate(self.files.get(mutant.path, []))}
        places = {(mutant.path.as_posix(), line) for line in mutant.lines}
        near = {test for test, (_, lines) in self.found.items() if lines & places}
        for some in near, {test for test in self.found if file_of(test) in rank} - near:
            left, tests = SECONDS, []
            for test in sorted(some, key=lambda test: (rank.get(file_of(test), len(rank)),
                                                       self.found[test][0])):
                if (seconds := self.found[test][0]) <= left:
                    left -= seconds
                    tests.append(test)
            yield tests

    def failing(self, tests) -> str | None:
        """The test that fails; NO_TEST if they do not end, or cannot begin."""
        if not tests:
            return None
        seconds = WAIT + 3 * sum(self.found[test][0] for test in tests)
        files = list(dict.fromkeys(map(file_of, tests)))
        status, ended = run(self.tree, files, seconds, tests)
        failed = [test for test, outcome, *_ in ended if outcome == "failed"]
        return None if status in PASSED else failed[-1] if failed else NO_TEST

    def trust(self, test) -> bool:
        """Whether a test passes alone without a mutant."""
        if test not in self.trusted:
            status, _ = run(self.tree, [file_of(test)], WATCHED, [test])
            self.trusted |= {test} if status in PASSED else set()
        return test in self.trusted


def file_of(test) -> Path:
    return Path(test.partition("::")[0])


if __name__ == "__main__":
    from minilm.command import command

    command(main)
