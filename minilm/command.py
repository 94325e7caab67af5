"""How every program of scripts/ begins and ends: its options, and one line if something is wrong.

A program with a parameter `given` gets the names of the options that stand on the command line. So
`--steps 2400` is not the same as no word about steps, even if 2400 is the default.
"""

import functools
import inspect
import sys
from pathlib import Path

import tyro

from minilm.train import Diverged

WRONG = (ValueError, OSError, ImportError, RuntimeError, Diverged)  # what a user can mend

Given = tyro.conf.Suppress[frozenset[str]]  # the type of a program's parameter `given`


def command(main, stopped: str = "stopped"):
    """Call main with the command line's options. If it fails, print a line and exit with 1.

    stopped: what to say after Ctrl-C.
    """
    try:
        if "given" in inspect.signature(main).parameters:
            main = functools.partial(main, given=options(sys.argv[1:]))
        tyro.cli(main)
    except WRONG as error:
        if isinstance(error, OSError) and error.filename:
            said = f"{error.filename}: {error.strerror}"
        else:
            said = str(error)
        notes = getattr(error, "__notes__", [])  # how to go on
        sys.exit("\n".join([f"{Path(sys.argv[0]).name}: {said}", *notes]))
    except KeyboardInterrupt:
        sys.exit(f"\n{stopped}")


def options(words: list[str]) -> frozenset[str]:
    """The names of the options among a command line's words.

    >>> sorted(options(["--save-every", "5", "--clip=inf", "--no-threads", "-1"]))
    ['clip', 'save_every', 'threads']
    """
    names = (word[2:].partition("=")[0] for word in words if word.startswith("--"))
    return frozenset(name.replace("-", "_").removeprefix("no_") for name in names)
