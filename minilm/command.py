"""How every program of scripts/ begins and ends, and what it tells its user to type.

It begins with streams that take any text. It ends with one line if something is wrong, if nobody
takes what it prints, or after Ctrl-C.

A program with a parameter `given` gets the names of the options that stand on the command line. So
`--steps 2400` is not the same as no word about steps, even if 2400 is the default.
"""

import _thread
import contextlib
import functools
import inspect
import io
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import traceback
import typing
from pathlib import Path

import docstring_parser
import tyro

from minilm.launch import end, require_stage, silence_all_but_one
from minilm.parallel.comm import launched
from minilm.shell import near, python, quoted
from minilm.train import Diverged

WRONG = (ValueError, OSError, ImportError, MemoryError, RuntimeError, Diverged)  # can be mended

Given = tyro.conf.Suppress[frozenset[str]]  # the type of a program's parameter `given`


def command(main, stopped: str = "stopped", name: str | None = None):
    """Call main with the command line's options. If it fails, print a line and exit with 1.

    stopped: what to say after Ctrl-C, and if stdout takes no more. name: the program's, by default
    its file's.
    """
    ready_streams()
    silence_all_but_one()
    name, ended, given = name or Path(sys.argv[0]).name, None, options(sys.argv[1:])
    takes = inspect.signature(main).parameters
    if "given" in takes:
        main = functools.partial(main, given=given)
    try:
        require_stage("stage" in takes, given)
        with no_ctrl_c_lost(), narrow_help():
            tyro.cli(main, prog=name, config=(tyro.conf.FlagCreatePairsOff,), registry=SHOWN)
    except SystemExit as asked:
        ended = asked.code
    except KeyboardInterrupt:
        ended = f"\n{stopped}"
    except OSError as error:
        where, why = error.filename, error.strerror  # stdout has no file's name
        ended = f"{name}: " + (f"{where}: {why}" if where else f"{why}; {stopped}" if why else
                               str(error)) + notes(error)
    except WRONG as error:
        ended = f"{name}: {error}{notes(error)}"
    except Exception:
        if launched() == 1:
            raise
        ended = traceback.format_exc()  # the others must not wait for this rank
    if (error := lost_output()) and not ended:
        ended = f"{name}: {error.strerror}; {stopped}"
    if ended:
        end(ended)


SHOWN = tyro.constructors.ConstructorRegistry()


@SHOWN.primitive_rule
def or_none(option: tyro.constructors.PrimitiveTypeInfo):
    """How an option reads that may be None: help says INT, not {None}|INT, and not that its default
    is None, but that it is not given; None can be typed."""
    kinds = typing.get_args(option.type)
    if len(kinds) != 2 or kinds[1] is not type(None) or kinds[0] not in (int, float, str, Path):
        return None
    kind = kinds[0]
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar=kind.__name__.upper(),
        instance_from_str=lambda words: None if words == ["None"] else kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: ["not", "given"] if value is None else [str(value)])


@SHOWN.primitive_rule
def several(option: tyro.constructors.PrimitiveTypeInfo):
    """How an option of any number of words reads: help says [INT ...], and not that none is the
    default, but that it is not given."""
    kinds = typing.get_args(option.type)
    if kinds[1:] != (...,) or kinds[0] not in (int, float, str, Path):
        return None
    kind = kinds[0]
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*", metavar=f"[{kind.__name__.upper()} ...]",
        instance_from_str=lambda words: tuple(map(kind, words)),
        is_instance=lambda value: (isinstance(value, tuple)
                                   and all(isinstance(one, kind) for one in value)),
        str_from_instance=lambda value: [*map(str, value)] or ["not", "given"])


class Folding:
    """A stream that folds lines of words which are wider than the terminal, when they come alone.
    """

    def __init__(self, stream):
        self.stream, self.width = stream, shutil.get_terminal_size().columns

    def write(self, text):
        plain = re.sub(r"\x1b\[[\d;]*m", "", text)  # without colours
        if len(plain) > self.width and plain[0].isalpha():  # no part of a box
            text = textwrap.fill(plain, self.width, break_on_hyphens=False,
                                 subsequent_indent=" " * 7 * plain.startswith("usage: "))
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def narrow_help():
    """Inside, help fits the terminal: tyro leaves the usage and the first line as wide as they are,
    and what is said of an option, also beside one that is not known, in the source's lines."""
    readers = {name: getattr(docstring_parser, name) for name in ("parse", "parse_from_object")}
    for name, read in readers.items():
        setattr(docstring_parser, name, functools.partial(in_one_line, read))
    try:
        asked = {"-h", "--help"} & {*sys.argv[1:]}
        with (contextlib.redirect_stdout(Folding(sys.stdout)) if asked
              else contextlib.nullcontext()):
            yield
    finally:
        for name, read in readers.items():
            setattr(docstring_parser, name, read)


def in_one_line(read, source):
    """What `read` finds in a docstring, with each option's text in one line."""
    found = read(source)
    for param in found.params:
        param.description = " ".join((param.description or "").split())
    return found


@contextlib.contextmanager
def no_ctrl_c_lost():
    """Inside, a Ctrl-C that comes while an object is let go of, comes again a moment later.

    What is raised in `__del__` or by a weak reference goes no further: Python would print it, and
    the program would go on.
    """
    before, main = sys.unraisablehook, threading.main_thread().ident

    def again():
        time.sleep(0.2)  # the hook ends first, on a busy machine, too: it would be lost in there
        signal.pthread_kill(main, signal.SIGINT)

    def hook(lost):
        if issubclass(lost.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(again, ())  # Thread.start waits until the thread runs
        else:
            before(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def notes(error) -> str:
    """Lines that go with an error, such as how to go on after it."""
    return "".join(f"\n{note}" for note in getattr(error, "__notes__", []))


def options(words: list[str]) -> frozenset[str]:
    """The names of the options among a command line's words.

    >>> sorted(options(["--save-every", "5", "--clip=inf", "--threads", "-1"]))
    ['clip', 'save_every', 'threads']
    """
    names = (word[2:].partition("=")[0] for word in words if word.startswith("--"))
    return frozenset(name.replace("-", "_") for name in names)


def ready_streams():
    """Make stdout and stderr take what is written: none is missing, no character is refused.

    What goes to stderr is said beside the work: if a full disk or a closed pipe refuses it, it is
    lost, and the program goes on.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by >&-; a file opened later must not take its place
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif stream.errors in ("strict", "surrogateescape"):  # or else the user has chosen
            stream.reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__:  # not a stream that its user has put there
        raw = io.BufferedWriter(Forgiving(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, sys.stderr.errors,
                                      line_buffering=True)


class Forgiving(io.FileIO):
    """A file that loses what it cannot take."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def lost_output() -> OSError | None:
    """Write what stdout holds back; the error if it takes no more, as a closed pipe or a full disk.

    From then on what is printed goes nowhere, or the interpreter would fail once more as it ends.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return error
    return None


def utf8(name: str, text: str) -> str:
    """A text of the command line, of bytes in UTF-8 whatever the locale. ValueError for others."""
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        byte, before = error.object[error.start], error.object[: error.start].decode()
        raise ValueError(f"{name} must be UTF-8, got the byte 0x{byte:02x} after "
                         f"{before!r:.80}") from None


def many(count: int, what: str) -> str:
    """How many there are of something.

    >>> many(1, "document"), many(2000, "token")
    ('1 document', '2,000 tokens')
    """
    return f"{count:,} {what}{'s' * (count != 1)}"


def typed(program: str | Path, *words, **options) -> str:
    """What to type to run a program with these words and options, from where the user is.

    It is for a shell: every word is quoted if it needs to be.
    """
    words = [python(), near(program), *map(str, words)]
    for option, value in options.items():
        option, value = "--" + option.replace("_", "-"), str(value)
        words += [f"{option}={value}"] if value.startswith("-") else [option, value]
    return " ".join(map(quoted, words))
