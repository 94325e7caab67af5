"""The first minutes with the scripts: --help, extras that are not there, Ctrl-C, wrong input."""

import ast
import contextlib
import importlib
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import distill
import memory_report
import numpy as np
import pretrain
import pytest
import quantize
import turns

from minilm import data
from minilm.command import command
from minilm.extras import install, told
from minilm.interop import huggingface
from minilm.run import RunDirectory
from minilm.transformer import Config, Transformer

FOLDER = Path(__file__).resolve().parents[1] / "scripts"
ROOMS = [FOLDER / "bench", FOLDER / "experiments"]
FILES = {path.stem: path for path in FOLDER.rglob("*.py")}
SCRIPTS = sorted(path.stem for path in FOLDER.rglob("*.py")
                 if '    command(main' in path.read_text(encoding="utf-8"))
EXTRAS = ("bitsandbytes", "cupy", "jax", "jinja2", "matplotlib", "peft", "tokenizers", "torch",
          "transformers")


def without(packages, program):
    """The words of a process that runs a program where packages are not installed."""
    return [sys.executable, "-c", f"""
import importlib.util, runpy, sys
from importlib.machinery import PathFinder
def find(name, *rest): return None if name in {packages} else PathFinder.find_spec(name, *rest)
finder = type("Finder", (), {{"find_spec": staticmethod(find)}})
sys.meta_path[sys.meta_path.index(PathFinder)] = finder
sys.path[:0] = {[str(FOLDER), *map(str, ROOMS), str(FOLDER.parent)]}
{program}"""]


def start(*words):
    """A process of its own group, as a terminal's, which hears Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, "-u", *map(str, words)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(FOLDER.parent)},
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@contextlib.contextmanager
def killed_in_the_end(process):
    """Where something went wrong, its whole group."""
    try:
        yield
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise


@pytest.fixture
def model(tmp_path):
    """The folder of a small model."""
    huggingface.save_model(Transformer(Config.gpt2(258, 48, 1, 2, 64)), tmp_path / "model")
    data.ByteTokenizer().save(tmp_path / "model" / "tokenizer.json")
    return tmp_path / "model"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_every_setting(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    command(importlib.import_module(script).main)
    out = capsys.readouterr().out
    assert "{None}" not in out and "--no-" not in out
    lines = [line.strip("│|+ ") for line in out.splitlines()]
    head, *settings = re.split(r"\n(?=--[a-z])", "\n".join(lines))
    assert "show this help" in head and settings
    for setting in settings:
        words = re.sub(r"(?s)--[\w-]+|\{[^}]*\}|\(default: .*|[^a-z]", "", setting)
        assert words, f"{setting} is not described"


@pytest.mark.parametrize("script", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_no_program_imports_another(script):
    """What two of them need is in the package."""
    others = {path.stem for path in FOLDER.rglob("*.py")}
    nodes = list(ast.walk(ast.parse((FOLDER / f"{script}.py").read_text(encoding="utf-8"))))
    early = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    late = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not others & (early | late)


def test_help_needs_no_extra():
    program = ("import contextlib, io, importlib, tyro\n"
               f"for script in {SCRIPTS}:\n"
               "    said = io.StringIO()\n"
               "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):\n"
               "        tyro.cli(importlib.import_module(script).main, args=['--help'])\n"
               "    said = said.getvalue()\n"
               "    print('show this help' in said and 'None:' not in said)\n")
    done = subprocess.run(without(EXTRAS, program), capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["True"] * len(SCRIPTS), "")


@pytest.mark.parametrize("missing, script, words, extra", [
    ("tokenizers", "pretrain", ["--tokenizer", "bpe"], "hf"),
    ("py3langid", "clean", ["--source", "."], "clean"),
    ("jinja2", "report", ["--run", "--only", "scaling_laws", "--jobs", "9"], "report"),
    ("torch", "compare_torch", [], "test"),
    ("torch", "benchmark", ["--rows", "qlora", "train"], "test"),
    ("peft", "benchmark", ["--rows", "lora"], "peers"),
    ("bitsandbytes", "benchmark", ["--rows", "codes"], "peers"),
])
def test_a_missing_extra_is_named_in_one_line(tmp_path, missing, script, words, extra):
    program = (f"sys.argv = {[f'{script}.py', *words]}\n"
               f"runpy.run_path({str(FILES[script])!r}, run_name='__main__')")
    done = subprocess.run(without([missing], program), capture_output=True, text=True,
                          cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}.py: ") and line.endswith(f'pip install "minilm[{extra}]"')
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_each_says_how_to_get_pictures(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert quantize.draw_codebooks([np.ones((64, 64), np.float32)], tmp_path / "a.png") is None
    assert not memory_report.draw({}, [], 0, 0, tmp_path / "b.png")
    assert distill.draw(tmp_path / "c.png", {}, "", [], {}) is None
    run = RunDirectory.create(tmp_path, "pretrain", {}, [])
    pretrain.finish(run, huggingface.load_model(model), data.ByteTokenizer(),
                    pretrain.Settings(steps=3), 3)
    said = capsys.readouterr().out
    assert f"for curves: {install('plots')}" in said
    assert f"--model {run.path / 'model'}" in said and not list(tmp_path.rglob("*.png"))


def test_a_picture_is_where_it_is_or_how_to_get_it():
    assert told("curves", Path("a.png")) == "curves: a.png"
    assert told("curves", None) == f"for curves: {install('plots')}"


def test_only_one_file_says_how_to_install_and_each_extra_exists():
    """The command is said once; what is named is an extra of pyproject.toml."""
    house = FOLDER.parent
    extras = tomllib.loads((house / "pyproject.toml").read_text(encoding="utf-8"))
    extras = extras["project"]["optional-dependencies"]
    for path in [*house.glob("minilm/**/*.py"), *FOLDER.rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert ("pip install" in text) == (path.stem == "extras"), path
        assert set(re.findall(r"\binstall\(['\"](\w+)", text)) <= set(extras), path


BENCHMARK = ["--rows", "qlora", "--configs", "L"]


@pytest.mark.parametrize("script, words, children, seconds", [
    ("compare_torch", [], 0, 0),
    ("plan_memory", ["--check"], 0, 0),
    ("quantize", ["--model", "MODEL"], 0, 0),
    ("memory_report", [], 0, 0),
    ("benchmark", BENCHMARK, 3, 0),  # while the second contender starts; the third is a helper
    ("benchmark", BENCHMARK, 3, 0.15),  # while they import
])
def test_ctrl_c_is_one_line_and_leaves_nobody_behind(model, script, words, children, seconds):
    """The terminal sends it to every process of the group."""
    words = [str(model) if word == "MODEL" else word for word in words]
    process = start(FILES[script], *words)
    with killed_in_the_end(process):
        assert process.stdout.readline()
        family = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while children and len(family.read_text().split()) < children:
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (1, "\nstopped\n")
        limit = time.monotonic() + 5
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < limit:
                os.killpg(process.pid, 0)


def test_a_contender_that_dies_is_said_to_have(capfd):
    with pytest.raises(RuntimeError, match="a contender died; its output is above"):
        with turns.Contender(iter, ()) as contender:
            contender.run()
    assert "StopIteration" in capfd.readouterr().err


def test_ctrl_c_before_the_first_step_costs_no_time(tmp_path):
    """While the first sample is drawn; the run can still be gone on with."""
    (tmp_path / "text.txt").write_text("A cat sat on a mat. " * 200)
    process = start(FOLDER / "pretrain.py", "--corpus", tmp_path / "text.txt", "--out", tmp_path,
                    "--sample", 10**6, "--workers", 1, "--steps", 2, "--prompt", "A ")
    with killed_in_the_end(process):
        lines = [process.stdout.readline() for _ in range(5)]  # 1 to 3 are the mixture
        assert "3,600 characters to train on, 400 held out" in lines[0]
        assert lines[4].startswith(f"{tmp_path / 'pretrain-1'}: ") and "from step 0" in lines[4]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err == "\nstopped at once; a run that had begun goes on with --resume\n"
    assert RunDirectory(tmp_path / "pretrain-1").records() == []


WRONG = [
    ("quantize --model nowhere", "nowhere: there is no such folder"),
    ("finetune --model nowhere", "nowhere: there is no such folder"),
    ("plan_memory --model nowhere", "nowhere: there is no such folder"),
    ("pretrain --resume nowhere", "nowhere/run.json"),
    ("finetune --resume nowhere", "nowhere/run.json"),
    ("generate --model file", "file: is no folder; a model is a folder with config.json"),
    ("generate --model run", "run: is the folder of a run: give run/adapter or run/model"),
    ("generate --model MODEL --adapter run", "run: is the folder of a run: give run/adapter or "),
    ("distill --teacher run", "run: is the folder of a run: give run/adapter or run/model"),
    ("plan_memory --model new", "new: is the folder of a run: it has no model or adapter yet"),
    ("quantize --model MODEL --out file/a.png", "file: File exists"),
    ("memory_report --out file/a.png", "file: File exists"),
    ("quantize --model MODEL --out run", "run: is a folder, expected a file"),
    ("memory_report --out run", "run: is a folder, expected a file"),
    ("report --run --out run", "run: is a folder, expected a file"),
    ("quantize --model file", "file: is no folder; a model is a folder with config.json"),
    ("pretrain --tokenizer file", "file: "),
    ("finetune", "no model in runs/pretrain-*/model: run pretrain.py first, or give --model"),
    ("quantize", "no model in runs/pretrain-*/model: run pretrain.py first, or give --model"),
    ("quantize --model MODEL --corpus nowhere", "'nowhere' is neither a path nor one of python-"),
    ("finetune --model MODEL --data nowhere", "nowhere"),
    ("generate --model MODEL --adapter nowhere", "nowhere: there is no such folder"),
    ("plan_memory", "give --model, or --layers and --width"),
    ("compare_torch --steps 0", "steps must be at least 1, got 0"),
    ("benchmark --rounds 0", "rounds must be at least 1, got 0"),
    ("report --results nowhere", "nowhere"),
    ("adaptation_methods --model nowhere", "nowhere: there is no such folder"),
    ("adaptation_methods --quick --resume nowhere", "nowhere/run.json"),
    ("memory_report --layers 0", "layers must be positive, got 0"),
    ("memory_report --steps 1", "steps must be at least 2, got 1"),
    ("pretrain --steps 0", "steps must be at least 1, got 0"),
    ("pretrain --warmup -1", "warmup must be at least 0, got -1"),
    ("pretrain --clip -1", "clip must be positive, got -1.0"),
    ("pretrain --clip nan", "clip must be positive, got nan"),
    ("pretrain --seed -1", "seed must be at least 0, got -1"),
    ("pretrain --save-every 0", "save_every must be at least 1, got 0"),
    ("pretrain --sample -1", "sample must be at least 0, got -1"),
    ("pretrain --batch 2 --accumulate 3", "accumulate must be 1 to the batch's 2 rows, got 3"),
    ("finetune --model MODEL --steps 0", "steps must be at least 1, got 0"),
    ("pretrain --clip 0", "clip must be positive, got 0.0"),
    ("pretrain --lr -1", "lr must be positive and finite, got -1.0"),
    ("pretrain --lr nan", "lr must be positive and finite, got nan"),
    ("pretrain --min-lr -1", "min_lr must be finite and at least 0, got -1.0"),
    ("pretrain --beta2 1", "beta2 must be at least 0 and below 1, got 1.0"),
    ("pretrain --weight-decay inf", "weight_decay must be finite and at least 0, got inf"),
    ("pretrain --workers -1", "workers must be at least 0, got -1"),
    ("pretrain --vocab-size 300", "vocab_size is given, but the tokenizer bytes has its own"),
    ("pretrain --context 0", "context must be at least 1, got 0"),
    ("pretrain --lr 1e-4 --min-lr 1e-3", "min_lr must be at most lr, 0.0001; got 0.001"),
    ("pretrain --family bert --sample 9", "sample is given, but bert fills in tokens"),
    ("pretrain --family gpt2 --bias", "bias is given, but a gpt2 has biases in any case"),
    ("pretrain --weights 2", "weights is given, but there is one corpus to draw from"),
    ("pretrain --corpus file --context 64", "file: the text to train on is too short: 65 tokens"),
    ("distill --corpus file --context 64", "file: the text to train on is too short: 65 tokens"),
    ("tokens --corpus file --context 64", "file: the text to train on is too short: 65 tokens"),
    ("distill --masked-only", "masked_only is given, but the objective is causal"),
    ("distill --sweep 2 2.0000000001", "sweep must be different temperatures"),
    ("generate --model MODEL --temperature 0 --top-k 40", "top_k is given, but temperature 0"),
    ("generate --model MODEL --temperature 0 --seed 0", "seed is given, but temperature 0"),
    ("plan_memory --model MODEL --family gpt2", "give either a model's folder or its widths"),
    ("finetune --model MODEL --lr inf", "lr must be finite and at least 0, got inf"),
    ("finetune --model MODEL --alpha nan", "alpha must be positive and finite, got nan"),
    ("finetune --model MODEL --method full --r 8", "r is given, but the method is full"),
    ("finetune --model MODEL --method top --kind nf4", "kind is given, but the method is top"),
    ("finetune --model MODEL --length 3", "length is given, but the method is lora"),
    ("plan_memory --model MODEL --method ia3 --length 3", "length is given, but the method is ia3"),
    ("finetune --model MODEL --method ia3 --rslora", "rslora is given, but the method is ia3"),
    ("distill --workers -1", "workers must be at least 0, got -1"),
    ("distill --lr -1", "lr must be finite and at least 0, got -1.0"),
    ("distill --sweep 1 0", "sweep must be positive and finite, got 0.0"),
    ("distill --teacher MODEL --layers 8", "layers is given, but a teacher is given"),
    ("distill --weights 0 1 0 --top-k 3", "top_k is given, but the soft loss has no weight"),
    ("quantize --model MODEL --block-sizes 64 33", "block_sizes must be among 32, 64, 128, "),
    ("plan_memory --check --rank 3", "take no other option; got check, rank"),
    ("plan_memory --model MODEL --method full --rank 8", "rank is given, but the method is full"),
    ("quantize --model MODEL --block-sizes", "block_sizes must be among 32, 64, 128, "),
    ("adaptation_methods --quick --model MODEL", "model is given, but a quick run makes a tiny"),
    ("adaptation_methods --resume nowhere --out runs", "give --resume or --out, not both"),
    ("memory_report --page-size 1000", "page_size must be a power of two from 4 up, got 1000"),
    ("finetune --model MODEL --train 0", "train must be at least 1, got 0"),
    ("adaptation_methods --quick --seeds -1", "seeds must be at least 0, got -1"),
    ("pretrain --tokenizer nowhere", "'nowhere' is neither a path nor one of bytes, chars, bpe"),
]


@pytest.mark.parametrize("command, expected", WRONG, ids=[command for command, _ in WRONG])
def test_wrong_input_is_one_line(tmp_path, model, monkeypatch, capsys, command, expected):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no model")
    for made in ("run/run.json", "run/model/x.safetensors", "run/adapter/x.safetensors",
                 "run/checkpoints/step-1/x.safetensors", "new/run.json"):
        Path(made).parent.mkdir(parents=True, exist_ok=True)
        Path(made).touch()
    script, *words = command.replace("MODEL", "model").split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FILES[script]), run_name="__main__")
    line = ended.value.code
    assert line.startswith(f"{script}.py: ") and expected in line and "\n" not in line
    assert capsys.readouterr().out == "" and not Path("runs").exists()


def test_the_model_that_was_chosen_is_said(model, monkeypatch, capsys):
    import generate

    (model.parent / "runs" / "pretrain-1").mkdir(parents=True)
    model.rename(model.parent / "runs" / "pretrain-1" / "model")
    monkeypatch.chdir(model.parent)
    generate.main(tokens=1)
    assert capsys.readouterr().err.startswith("runs/pretrain-1/model:\n1 token, ")
