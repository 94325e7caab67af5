"""The READMEs: what they name is there, their commands are understood, their examples run.

CI runs the front page's two commands themselves.
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
from test_layout import FLOORS

import minilm
from minilm import data
from minilm.interop import huggingface
from minilm.transformer import Config, Transformer

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for folder in (".", "minilm", "kernels", "scripts", "scripts/bench",
                        "scripts/experiments", "tests")
         for path in sorted((ROOT / folder).glob("*.md"))}
FRONT, HOUSE = PAGES["README.md"], PAGES["minilm/README.md"]
PROGRAMS = {path.name: path for path in (ROOT / "scripts").rglob("*.py")}


def defined(path):
    """The functions and classes that a file defines."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def papers():
    """The cells of each row of the table of papers."""
    section = HOUSE.split("\n## Papers", 1)[1]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


@pytest.mark.parametrize("row", papers(), ids=lambda row: row[2])
def test_a_papers_function_and_test_are_there(row):
    for cell in row[2:]:
        path, name = re.fullmatch(r"`([\w/.]+): (\w+)`", cell).groups()
        assert name in defined(beside("minilm/README.md", path)), cell
    said = re.search(r"\[(\d{4}\.\d{5})\]", row[0])
    if said:
        folder = beside("minilm/README.md", row[2].strip("`").partition(":")[0]).parent
        sources = [*folder.glob("*.py"), *(ROOT / "kernels").glob("*.cu")]
        assert any(said[1] in path.read_text(encoding="utf-8") for path in sources), said[1]


def beside(page, name):
    """The path that a page names: from its own folder, or from the root."""
    here = (ROOT / page).parent / name
    return here if here.exists() else ROOT / name


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_is_there(page):
    """Links, files in `code`, and pictures, which are small."""
    text = PAGES[page]
    for name in re.findall(r"(?<!!)\[[^]]*\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / page).parent / name).exists(), name
    for name in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", text):
        if not name.startswith(("runs/", "experiments/", "bench/")):
            assert beside(page, name).exists(), name
    for name in re.findall(r"`(\w+\.(?:py|cu|cuh|md))`", text):
        assert any(p.name == name for p in ROOT.rglob(name)), name
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert ((ROOT / page).parent / picture).stat().st_size < 200_000, picture


def test_the_front_page_is_one_page():
    assert len(FRONT.splitlines()) <= 150
    linked = {((ROOT / page).parent / link).resolve() for page, text in PAGES.items()
              for link in re.findall(r"\]\(([^)#]+\.md)\)", text)}
    for page in PAGES:
        assert page == "README.md" or ROOT / page in linked, f"nothing leads to {page}"


@pytest.mark.parametrize("drawing", [HOUSE, minilm.__doc__], ids=["README", "docstring"])
def test_the_plan_that_is_drawn_is_the_one_that_is_checked(drawing):
    """Each floor's line names the rooms that test_layout.py gives it, and no other."""
    rooms = set().union(*FLOORS) - {"__main__"}
    whole = re.sub(r"\n {4,}(?=\w)", " ", drawing)  # a floor may take two lines
    lines = [set(re.findall(r"\w+", line)) & rooms for line in whole.splitlines()]
    drawn = [line for line in lines if len(line) > 1]
    for floor in FLOORS:
        assert floor - {"__main__"} in drawn, (floor, drawn)


def commands():
    """Every command of a program: in an indented line, or in `code`."""
    for text in PAGES.values():
        found = re.findall(r"^    (.*scripts/[\w/]+\.py.*)$", text, re.MULTILINE)
        found += re.findall(r"`((?:scripts/)?[\w/]+\.py(?: [^`]*)?)`", text)
        for command in found:
            command = command.split("&&")[-1].replace("$'", "'")
            name, options = re.search(r"(\w+\.py)([^#]*)", command).groups()
            if name in PROGRAMS:
                yield name, options.strip()


@pytest.mark.parametrize(("name", "options"), sorted(set(commands())), ids=str)
def test_a_command_is_understood(name, options):
    module = importlib.import_module(PROGRAMS[name].stem)
    if not hasattr(module, "main"):
        assert not options, f"{name} is no program"
        return
    called = []
    if options:
        main = functools.wraps(module.main)(lambda *args, **settings: called.append(settings))
        options = shlex.split(options.replace(" D", " float16").replace(" S", " 0"))
        tyro.cli(main, args=options)
        assert called


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    """All of a page in one program, on a small model in the place of the trained one."""
    monkeypatch.chdir(tmp_path)
    model = Transformer(Config.gpt2(258, 128, layers=4, heads=2, width=64))
    huggingface.save_model(model, "runs/pretrain-1/model")
    data.ByteTokenizer().save("runs/pretrain-1/model/tokenizer.json")
    pages = FRONT + PAGES["scripts/README.md"]
    examples = re.findall(r"```python\n(.*?)```", pages, re.DOTALL)
    (tmp_path / "examples.py").write_text("\n".join(examples))
    names = runpy.run_path("examples.py")
    assert "If the object is a class" in capsys.readouterr().out
    assert (tmp_path / "tuned/model.safetensors").exists()
    assert (tmp_path / "adapter/adapter_config.json").exists()
    assert names["trainer"].model is names["model"]
