"""The README: what it names is there, its commands are understood, its examples run.

CI runs the commands themselves.
"""

import ast
import functools
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
import tyro

from minilm import data
from minilm.interop import huggingface
from minilm.transformer import Config, Transformer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {path.name for path in (ROOT / "scripts").rglob("*.py")}


def table_under(title):
    """The cells of the first table below a heading, without its head."""
    section = README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


def defined(path):
    """The functions and classes that a file defines."""
    nodes = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


PAPERS = table_under("Papers, equations, functions, tests")


@pytest.mark.parametrize("row", PAPERS, ids=lambda row: row[2])
def test_a_papers_function_and_test_are_there(row):
    for cell in row[2:]:
        path, name = re.fullmatch(r"`([\w/.]+): (\w+)`", cell).groups()
        assert name in defined(path), cell
    said = re.search(r"\[(\d{4}\.\d{5})\]", row[0])
    if said:
        folder = (ROOT / row[2].strip("`").partition(":")[0]).parent
        sources = [*folder.glob("*.py"), *(ROOT / "kernels").glob("*.cu")]
        assert any(said[1] in path.read_text(encoding="utf-8") for path in sources), said[1]


def test_what_is_named_is_there():
    """Files in `code`, and pictures, which are small."""
    for name in set(re.findall(r"`((?:minilm|scripts|tests|kernels)/[\w./]*)`", README)):
        assert (ROOT / name).exists(), name
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size < 200_000, picture


def commands():
    """Every command of a script: in an indented line, or in `code`."""
    lines = re.findall(r"^    (.*scripts/[\w/]*\w+\.py.*)$", README, re.MULTILINE)
    code = re.findall(r"`((?:scripts/)?[\w/]*\w+\.py(?: [^`]*)?)`", README)
    for text in lines + code:
        text = text.split("&&")[-1].replace("$'", "'")
        name, options = re.search(r"(\w+\.py)(.*)", text).groups()
        if name in SCRIPTS and "=" not in name:
            yield name, options.strip()


@pytest.mark.parametrize(("name", "options"), sorted(set(commands())), ids=str)
def test_a_command_is_understood(name, options, monkeypatch):
    module = importlib.import_module(Path(name).stem)
    if not hasattr(module, "main"):
        assert not options, f"{name} is no program"
        return
    called = []
    main = functools.wraps(module.main)(lambda *args, **settings: called.append(settings))
    options = shlex.split(options.replace(" D ", " float16 ").replace(" S", " 0"))
    tyro.cli(main, args=options)
    assert called


def examples():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    """All in one program, on a small model in the place of the trained one."""
    monkeypatch.chdir(tmp_path)
    model = Transformer(Config.gpt2(258, 128, layers=4, heads=2, width=64))
    huggingface.save_model(model, "runs/pretrain-1/model")
    data.ByteTokenizer().save("runs/pretrain-1/model/tokenizer.json")
    (tmp_path / "examples.py").write_text("\n".join(examples()))
    names = runpy.run_path("examples.py")
    assert "If the object is a class" in capsys.readouterr().out
    assert (tmp_path / "tuned/model.safetensors").exists()
    assert (tmp_path / "adapter/adapter_config.json").exists()
    assert names["student"].config.layers == 2 and names["trainer"].model is names["model"]
