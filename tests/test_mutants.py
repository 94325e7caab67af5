"""bench/mutants.py: which changes there are, what a toy's tests kill, and that nothing is left."""

import ast
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import mutants
import pytest
from mutations import changes, walk

ROOT = Path(__file__).resolve().parents[1]
TOY = {
    "minilm/__init__.py": '"""A package."""\n',
    "minilm/toy/clip.py": '''"""Numbers with a bound."""

def clip(x: int, low=9):
    """x, but at least low, which is 0 or more."""
    if low < 0:
        raise ValueError(f"low is {low + 0}")
    if x < low:
        return low
    return x
''',
    "tests/test_clip.py": """
import pytest
from minilm.toy.clip import clip

ran = []

def test_values():
    ran.append(clip(1, 2))
    assert ran[-1] == 2 and clip(3, 0) == 3

def test_error():
    with pytest.raises(ValueError):
        clip(1, -1)

def test_that_fails_alone():
    assert ran
""",
    "tests/test_other.py": "def test_of_no_module():\n    assert False\n",
}


@pytest.mark.parametrize("source, expected", [
    ("a < b <= c", {"a <= b <= c", "a < b < c"}),
    ("a is not b", {"a is b"}),
    ("a in b", {"a not in b"}),
    ("a + b", {"a - b"}),
    ("a ** b", {"a * b"}),
    ("a *= b", {"a /= b"}),
    ("a and b or c", {"(a and b) and c", "a or b"}),
    ("not a", {"a"}),
    ("-a", {"a"}),
    ("a = True", {"False"}),
    ("a = 0", {"1"}),
    ("a = 7", {"8"}),
    ("a = 1e-8", {"2e-08"}),
    ("a = 0.0", {"1.0"}),
    ("def f(): return a", {"return None"}),
    ("def f(): return None", set()),
    ("raise ValueError(1 + 1)", {"pass"}),
    ("f(a)", {"pass"}),
    ("a = f(b, c=d, **e)", {"f(b, **e)", "f(b, c=d)"}),
    ("a[b:c]", {"b + 1:c", "b:c - 1"}),
    ("a[:]", {"1:", ":-1"}),
    ("if a: b", {"not a"}),
    ("if a < b: c", {"a <= b"}),
    ("a if b else c", {"not b"}),
    ("while a: b", {"not a"}),
    ('def f(a: 1) -> 2: "3"', set()),
    ("a: 1", set()),
    ("__all__ = ['a']", set()),
    ("assert a, 1 + 1", set()),
    ("a = f'{b + 1}'", set()),
])
def test_changes(source, expected):
    found = {ast.unparse(new) for node in walk(ast.parse(source)) for _, new in changes(node)}
    assert found == expected


@pytest.mark.parametrize("module", ["arrays", "interop/peft_formats", "data/tokenizers"])
def test_each_mutant_is_python_and_one_change(module):
    path = Path(f"minilm/{module}.py")
    source, every = (ROOT / path).read_bytes(), list(mutants.mutants(ROOT, path))
    for mutant in every[::15]:
        changed = source[:mutant.piece.start] + mutant.written.encode()
        tree = ast.parse(changed + source[mutant.piece.stop:])
        assert ast.dump(tree) != ast.dump(ast.parse(source)), mutant
    assert len(every) > 100


@pytest.fixture
def toy(tmp_path):
    """A start of the program on a small tree, in a folder for temporary files."""
    for name, text in TOY.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    temporary = Path(tempfile.mkdtemp())  # not in tmp_path: a socket's name has at most 107 bytes
    def start(*words):
        return subprocess.Popen(
            [sys.executable, ROOT / "scripts/bench/mutants.py", "--packages", "toy", "--tree",
             tmp_path / "tree", *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    yield start
    temporary.rmdir()  # nothing is left in it
    files = [path for path in (tmp_path / "tree").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "tree").as_posix(): path.read_text()
            for path in files} == TOY


def test_what_is_killed(toy):
    """`low <= 0` by a value, no raise by its test; `x <= low` means the same."""
    place = "minilm/toy/clip.py:"
    out, err = toy("--only", *(f"{place}{line}" for line in (5, 6, 7))).communicate(timeout=60)
    assert (out.splitlines(), err) == ([
        f"killed    {place}5  low < 0  ->  low <= 0",
        f"killed    {place}5  0  ->  1",
        f"killed    {place}6  raise ValueError(f'low is {{low + 0}}')  ->  pass",
        f"survived  {place}7  x < low  ->  x <= low",
        "", "toy: 3 of 4 killed"], "")


def test_ctrl_c_leaves_nothing(toy):
    process = toy()
    assert process.stdout.readline() == "survived  minilm/toy/clip.py:3  9  ->  10\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "\nstopped\n" and process.returncode == 1


def test_a_package_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"packages must be folders of minilm, or \.; got 'toy'"):
        mutants.main(("toy",), tree=tmp_path)
