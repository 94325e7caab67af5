"""How every program of scripts/ ends: with one line if something is wrong, or after Ctrl-C."""

import sys
from pathlib import Path

import tyro

from minilm.train import Diverged

WRONG = (ValueError, OSError, ImportError, RuntimeError, Diverged)  # what a user can mend


def command(main, stopped: str = "stopped"):
    """Call main with the command line's options. If it fails, print a line and exit with 1.

    stopped: what to say after Ctrl-C.
    """
    try:
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
