"""How to get the optional packages: an extra is a line of pyproject.toml."""

from minilm.shell import python, quoted


def install(extra: str) -> str:
    """The command that brings an extra's packages to the Python that runs.

    >>> install("plots").partition(" -m ")[2]
    'pip install "minilm[plots]"'
    """
    return f'{quoted(python())} -m pip install "minilm[{extra}]"'


def told(what: str, picture) -> str:
    """Where a picture is, or, if there is none, how to get it."""
    return f"{what}: {picture}" if picture else f"for {what}: {install('plots')}"
