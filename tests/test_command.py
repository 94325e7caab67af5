"""The hand that holds a program: streams that are closed, full or of another alphabet, words that a
terminal gives and a shell reads.

The programs run as their user would run them, on a small text and for two steps; as processes of
their own only if the interpreter's start or end is what is looked at.
"""

import dataclasses
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import termios
from pathlib import Path

import docstring_parser
import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from minilm import data
from minilm.command import command, typed, utf8
from minilm.extras import install
from minilm.interop import huggingface
from minilm.run import RunDirectory
from minilm.shell import near, quoted
from minilm.transformer import Config, Transformer

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
TINY = ["--layers", "1", "--heads", "2", "--width", "8", "--context", "16", "--batch", "2",
        "--workers", "1", "--sample", "9", "--steps", "2"]


def words(script, *options):
    return [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, options)]


def run(command, env=(), **settings):
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
    return subprocess.run(command, env=ENV | dict(env), timeout=60, **settings)


def program(monkeypatch, script, *options):
    """Run a program in this process, as from a command line; its status."""
    monkeypatch.setattr(sys, "argv", words(script, *options)[1:])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code
    return None


class Stream(io.TextIOWrapper):
    """A text stream whose bytes can be had."""

    def __init__(self, encoding, errors="strict"):
        super().__init__(io.BytesIO(), encoding, errors)

    def __str__(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def pretrain(tmp_path):
    """The options of a tiny run on a text with letters that ASCII lacks."""
    (tmp_path / "text.txt").write_text("Ein Bär läuft übers Eis → 雪. " * 99, encoding="utf-8")
    return ["--corpus", tmp_path / "text.txt", "--out", tmp_path / "runs", "--prompt", "Bär → 雪",
            *TINY]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model in a folder whose name a shell would take apart."""
    folder = tmp_path_factory.mktemp("it's $HOME `date` here") / "mödel"
    huggingface.save_model(Transformer(Config.gpt2(258, 128, 1, 2, 8)), folder)
    data.ByteTokenizer().save(folder / "tokenizer.json")
    return folder


# Streams


@pytest.mark.parametrize("encoding, errors, said", [
    ("ascii", "strict", "B\\xe4r \\u2192 \\u96ea"), ("latin-1", "strict", "Bär \\u2192 \\u96ea"),
    ("ascii", "surrogateescape", "B\\xe4r \\u2192"),  # the locale C
    ("ascii", "replace", "B?r ? ?"),  # as its user chose
    ("utf-8", "strict", "Bär → 雪")])
def test_a_stream_of_another_alphabet_ends_no_run(pretrain, tmp_path, monkeypatch, encoding, errors,
                                                  said):
    out, err = Stream(encoding, errors), Stream(encoding, errors)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert program(monkeypatch, "pretrain", *pretrain) is None
    assert str(out).count("--- after step") == 2 and said in str(out) and str(err) == ""
    assert RunDirectory(tmp_path / "runs" / "pretrain-1").records()[-1]["step"] == 2


def test_bytes_of_utf8_are_text_whatever_the_locale():
    """In the locale C each byte beyond ASCII comes as a surrogate."""
    typed = "Bär → 雪".encode()
    assert utf8("prompt", typed.decode("ascii", "surrogateescape")) == "Bär → 雪"
    assert utf8("prompt", "Bär → 雪") == "Bär → 雪"
    with pytest.raises(ValueError, match=r"^a text must be UTF-8, got the byte 0xff after 'ä'$"):
        utf8("a text", "ä" + os.fsdecode(b"\xff"))


@pytest.mark.parametrize("script, closed", [
    ("pretrain", "stdout"), ("pretrain", "stderr"), ("generate", "stderr"), ("generate", "stdout")])
def test_a_missing_stream_ends_no_program(pretrain, model, monkeypatch, capsys, script, closed):
    """What should have gone to one does not appear in the other."""
    monkeypatch.setattr(sys, closed, None)
    options = {"pretrain": pretrain, "generate": ["--model", model, "--tokens", 1]}[script]
    assert program(monkeypatch, script, *options) is None
    getattr(sys, closed).close()
    out, err = capsys.readouterr()
    assert bool(out) == (closed == "stderr") and ("tokens/s" in err) == (
        closed == "stdout" and script == "generate") and "tokens/s" not in out


def test_a_file_does_not_take_the_place_of_a_closed_stream(pretrain, tmp_path):
    done = run(["sh", "-c", f"{shlex.join(words('pretrain', *pretrain))} <&- >&- 2>&-"])
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    made = RunDirectory(tmp_path / "runs" / "pretrain-1")
    assert [record["step"] for record in made.records()] == [1, 2]  # and nothing that was printed
    assert (made.path / "model" / "config.json").exists()


def test_who_reads_no_more_is_told_how_to_go_on(pretrain, tmp_path, monkeypatch):
    """As with `| head -1`: the run stops, and can be gone on with."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8", buffering=1) as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        said = program(patch, "pretrain", *pretrain)
    assert said == ("pretrain.py: Broken pipe; stopped at once; a run that had begun goes on with "
                    "--resume")
    again = tmp_path / "runs" / "pretrain-1"
    assert program(monkeypatch, "pretrain", "--resume", again) is None
    assert [record["step"] for record in RunDirectory(again).records()] == [1, 2]


@pytest.mark.parametrize("buffering", [1, -1], ids=["lines", "blocks"])
@pytest.mark.parametrize("options", [["--help"], ["--lectures"], ["--layers", "2", "--width", "8"]])
def test_a_full_disk_is_one_line(monkeypatch, options, buffering):
    with open("/dev/full", "w", encoding="utf-8", buffering=buffering) as full:
        monkeypatch.setattr(sys, "stdout", full)
        said = program(monkeypatch, "plan_memory", *options)
    assert said == "plan_memory.py: No space left on device; stopped"


def test_nothing_is_said_twice_as_a_process_ends():
    """The interpreter writes what is left; it must not fail then."""
    with open("/dev/full", "wb") as full:
        done = run([sys.executable, "-m", "minilm"], stdout=full)
    assert (done.returncode, done.stderr) == (
        1, b"python -m minilm: No space left on device; stopped\n")


def test_what_stderr_does_not_take_is_lost_and_the_work_goes_on(model):
    """What is said there is beside the work: here, the speed."""
    with open("/dev/full", "wb") as full:
        done = run(words("generate", "--model", model, "--tokens", 3, "--prompt", "To"),
                   stderr=full)
    assert done.returncode == 0 and done.stdout.startswith(b"To") and done.stdout.endswith(b"\n")


def test_progress_fits_a_narrow_terminal_without_utf8(pretrain, monkeypatch):
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, 40))
    with open(writer, "w", encoding="ascii", buffering=1) as terminal, monkeypatch.context() as it:
        it.setattr(sys, "stderr", terminal)
        assert program(it, "pretrain", *pretrain) is None
        bars = os.read(reader, 9999).replace(b"\n", b"\r").split(b"\r")
    os.close(reader)
    assert any(b"2/2" in bar for bar in bars) and max(map(len, bars)) <= 40
    assert any(re.search(rb"^loss \d\.\d\d\d: 100%.*2/2", bar) for bar in bars), bars


# What a shell reads


def test_the_command_that_is_printed_asks_the_model(model, tmp_path, monkeypatch, capsys):
    """A prompt and folders with all that a shell would take apart."""
    monkeypatch.chdir(tmp_path)
    odd = "'it' \"is\" $HOME `date` \\n !! * ~ é → ;|&<>(){}#"
    records = [data.Record(f"-{odd} {i}", "  two\tcells ", "yes") for i in range(3)]
    data.save_records(tmp_path / "a b.jsonl", records)
    assert program(monkeypatch, "finetune", "--model", model, "--data", tmp_path / "a b.jsonl",
                   "--out", tmp_path / "it's `here`", "--test", 1, "--steps", 1, "--warmup", 0,
                   "--batch", 2, "--r", 1, "--workers", 1, "--known", model / "config.json") is None
    command = capsys.readouterr().out.partition("ask it: ")[2].strip()
    shown = run(["bash", "-c", f"{command} --tokens 1"], cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.decode().startswith(data.prompt(records[0]))


def heard(word):
    """What a program hears of a quoted word."""
    program = "import os, sys; sys.stdout.buffer.write(os.fsencode(sys.argv[1]))"
    line = f"{shlex.quote(sys.executable)} -I -S -c {shlex.quote(program)} {quoted(word)}"
    return subprocess.run(["bash", "-c", line], check=True, stdout=subprocess.PIPE).stdout


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_every_word_comes_through_a_shell(word):
    assert heard(word) == word.encode()
    assert quoted(word).replace("\n", "").isprintable()


def test_a_path_that_is_not_utf8_comes_through_a_shell():
    assert heard(os.fsdecode(b"caf\xe9 \x1b[31m it's\\")) == b"caf\xe9 \x1b[31m it's\\"


def test_a_program_is_named_from_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert near(tmp_path / "scripts" / "a.py") == near("scripts/a.py") == "scripts/a.py"
    assert near(tmp_path.parent / "a.py") == str(tmp_path.parent / "a.py")
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    line = typed(tmp_path / "a b.py", "--seeds", 0, 1, resume=Path("r"), top_k=3, prompt="-> ")
    assert line == ".venv/bin/python 'a b.py' --seeds 0 1 --resume r --top-k 3 '--prompt=-> '"
    python = tmp_path / "python"
    python.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert typed("a.py") == ".venv/bin/python a.py"  # the python of this name is another
    assert install("hf") == '.venv/bin/python -m pip install "minilm[hf]"'
    monkeypatch.setattr(sys, "executable", str(python))
    assert typed("a.py") == "python a.py"
    assert install("hf") == 'python -m pip install "minilm[hf]"'


# What a terminal gives


@pytest.mark.parametrize("script", ["generate", "pretrain", "distill"])
def test_a_prompt_that_is_not_utf8_is_one_line(script, tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ["--model", model] if script == "generate" else ["--corpus", model / "config.json"]
    said = program(monkeypatch, script, *where, "--prompt", os.fsdecode(b"caf\xe9"))
    assert said == f"{script}.py: prompt must be UTF-8, got the byte 0xe9 after 'caf'"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_utf8_is_a_folder(pretrain, tmp_path, monkeypatch):
    out, there = Stream("utf-8"), os.fsencode(tmp_path) + b"/caf\xe9"
    monkeypatch.setattr(sys, "stdout", out)
    assert program(monkeypatch, "pretrain", *pretrain, "--out", os.fsdecode(there)) is None
    assert os.listdir(there) == [b"pretrain-1"]
    assert "/caf\\351/pretrain-1/model'" in str(out) and "caf\\udce9" in str(out)


def test_python_m_minilm_names_itself():
    done = run([sys.executable, "-m", "minilm", "--nothing"])
    assert done.returncode == 2 and b"python -m minilm" in done.stderr


def test_ctrl_c_while_an_object_is_let_go_of_is_not_lost(tmp_path):
    """Python prints what is raised in __del__ and goes on; the program must stop all the same."""
    (tmp_path / "waits.py").write_text("""
import signal, time
from minilm.command import command

class Dropped:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def main():
    Dropped()
    time.sleep(30)

command(main)
""")
    done = run([sys.executable, tmp_path / "waits.py"])
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"\nstopped\n")


def test_ctrl_c_is_not_lost_where_threads_are_slow_to_start(tmp_path):
    """It must not come again before the hook that was told of it has ended."""
    (tmp_path / "waits.py").write_text("""
import signal, sys, threading, time
from minilm.command import command

class Dropped:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def spin(end):
    while time.monotonic() < end:
        pass

def main():
    sys.setswitchinterval(0.03)
    threading.Thread(target=spin, args=[time.monotonic() + 2], daemon=True).start()
    time.sleep(0.1)
    Dropped()
    time.sleep(3)

command(main)
""")
    started = [subprocess.Popen([sys.executable, tmp_path / "waits.py"], env=ENV,
                                stderr=subprocess.PIPE) for _ in range(4)]
    assert [process.communicate()[1] for process in started] == 4 * [b"\nstopped\n"]


def test_what_else_cannot_be_raised_is_still_told(tmp_path):
    (tmp_path / "tells.py").write_text("""
from minilm.command import command

class Dropped:
    def __del__(self):
        raise ValueError("told")

command(lambda: print(Dropped()) or None)
""")
    done = run([sys.executable, tmp_path / "tells.py"])
    assert done.returncode == 0 and b"ValueError: told" in done.stderr


@pytest.mark.parametrize("words, wanted", [
    ([], (None, 40, None)), (["--size", "3"], (3, 40, None)),
    (["--top", "None"], (None, None, None)), (["--top", "7", "--out", "None"], (None, 7, None)),
    (["--out", "a b"], (None, 40, Path("a b")))])
def test_an_option_may_be_none(monkeypatch, words, wanted):
    def main(size: float | None = None, top: int | None = 40, out: Path | None = None):
        """A program."""
        found.append((size, top, out))
    found = []
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    command(main)
    assert found == [wanted]
    monkeypatch.setattr(sys, "argv", ["x.py", "--size", "a"])
    with pytest.raises(SystemExit):
        command(main)
    assert found == [wanted]


def test_help_says_what_is_not_given(monkeypatch, capsys):
    def main(size: float | None = None, top: int | None = 40):
        """A program.

        Args:
            size: of it.
            top: of it.
        """
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    command(main)
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: not given)" in said and "(default: 40)" in said and "None" not in said


def test_an_option_may_have_many_words_or_none(monkeypatch, capsys):
    def main(sizes: tuple[int, ...] = (), of: tuple[Path, ...] = (Path("a"),),
             rates: tuple[float, ...] = (0.5, 2)):
        """A program."""
        found.append((sizes, of, rates))
    found = []
    for words in ("", "--sizes 3 4 --of b c --rates 1", "--sizes --of --rates", "--help"):
        monkeypatch.setattr(sys, "argv", ["x.py", *words.split()])
        command(main)
    assert found == [((), (Path("a"),), (0.5, 2)), ((3, 4), (Path("b"), Path("c")), (1.0,)),
                     ((), (), ())]
    said = [" ".join(line.strip("│ ").split()) for line in capsys.readouterr().out.splitlines()]
    assert {"--sizes [INT ...] (default: not given)", "--of [PATH ...] (default: a)",
            "--rates [FLOAT ...] (default: 0.5 2)"} <= {*said}
    monkeypatch.setattr(sys, "argv", ["x.py", "--sizes", "3", "a"])
    with pytest.raises(SystemExit):
        command(main)
    assert len(found) == 3 and "--sizes" in capsys.readouterr().err


@dataclasses.dataclass
class Split:
    size: int = 1
    """of what is
    cut
    into"""


def test_help_has_lines_of_its_own(monkeypatch, capsys):
    """Not those of the source, of a function's docstring or of an option of a dataclass; also where
    an option is not known."""
    def main(s: tyro.conf.OmitArgPrefixes[Split], top: int = 2):
        """A program.

        Args:
            top: of what has
                (two) or
                three lines
        """
    parsers = docstring_parser.parse, docstring_parser.parse_from_object
    monkeypatch.setattr(sys, "argv", ["x.py", "--sizee", "3"])
    with pytest.raises(SystemExit):
        command(main)
    assert "of what is cut into (default: 1)" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    command(main)
    said = capsys.readouterr().out
    assert "of what has (two) or three lines (default: 2)" in said
    assert "of what is cut into (default: 1)" in said
    assert parsers == (docstring_parser.parse, docstring_parser.parse_from_object)


def test_help_fits_a_terminal(monkeypatch, capsys):
    def main(block_sizes: tuple[int, ...] = (1,), corpus: str = "a", out: Path = Path("b"),
             model: Path | None = None):
        """A program whose first line is longer than the eighty columns that a terminal has, by far.

        Args:
            block_sizes: of it.
            corpus: of it.
            out: of it.
            model: of it.
        """
    for columns in ("80", "60"):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr(sys, "argv", ["quantize.py", "--help"])
        command(main)
        said = capsys.readouterr().out
        assert max(map(len, said.splitlines())) <= int(columns)
        assert said.startswith("usage: quantize.py [-h]") and "far." in said and "of it." in said


def test_windows_has_what_all_programs_load():
    """Neither of these modules is there, nor what mpi4py asks for."""
    code = ("import sys; sys.modules |= dict.fromkeys(('fcntl', 'termios', 'mpi4py')); "
            "import minilm.loop, minilm.joining")
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True)
