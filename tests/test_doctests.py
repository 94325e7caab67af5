"""Runs the examples (>>>) in the docstrings of minilm, and checks that they stand where expected.

Docstrings are read from the source: doctest.testmod, which looks at what a module holds, passes
over functions that a decorator such as `@op` of another module has wrapped.
"""

import ast
import doctest
import importlib
import inspect
import pkgutil

import pytest

import minilm

MODULES = sorted(module.name for module in pkgutil.walk_packages(minilm.__path__, "minilm."))

EXPECTED = {
    "minilm.data.batches", "minilm.distill", "minilm.generate", "minilm.ops",
    "minilm.optim.adamw", "minilm.peft.adalora", "minilm.peft.bitfit", "minilm.peft.bottleneck",
    "minilm.peft.dora", "minilm.peft.ia3", "minilm.peft.lora", "minilm.peft.subspace",
    "minilm.peft.top",
    "minilm.quantize.fourbit", "minilm.tensor", "minilm.transformer",
}


def examples(module):
    """A DocTest for each docstring of the module that has examples."""
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            name = f"{module.__name__}.{getattr(node, 'name', '__doc__')}"
            text, line = ast.get_docstring(node) or "", node.body[0].lineno - 1
            found.append(doctest.DocTestParser().get_doctest(
                text, dict(vars(module)), name, module.__file__, line))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_are_true(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []
    for test in examples(importlib.import_module(name)):
        doctest.DocTestRunner().run(test, out=told.append)
    if told:
        pytest.fail("".join(told), pytrace=False)


def test_examples_stand_where_they_are_expected():
    with_examples = {name for name in MODULES if examples(importlib.import_module(name))}
    assert with_examples >= EXPECTED


@pytest.mark.parametrize("name", MODULES)
def test_no_example_stands_outside_a_docstring(name):
    """Every >>> of a module's source is one of its examples."""
    module = importlib.import_module(name)
    lines = inspect.getsource(module).splitlines()
    written = sum(line.lstrip().startswith(">>> ") for line in lines)
    assert written == sum(len(test.examples) for test in examples(module))


def test_a_wrong_example_is_told(tmp_path, monkeypatch):
    (tmp_path / "wrong.py").write_text(
        "from minilm.tensor import op\n"
        "@op\n"
        "def one(x):\n"
        "    '''The first.\n"
        "\n"
        "    >>> one(3).data\n"
        "    4\n"
        "    '''\n"
        "    return x, None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pytest.fail.Exception, match="Expected:\n    4\nGot:\n    3"):
        test_the_examples_are_true("wrong", tmp_path, monkeypatch)
