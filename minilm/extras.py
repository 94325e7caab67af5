"""How to get the optional packages: an extra is a line of pyproject.toml."""


def install(extra: str) -> str:
    """The command that brings an extra's packages.

    >>> install("plots")
    'pip install "minilm[plots]"'
    """
    return f'pip install "minilm[{extra}]"'


def told(what: str, picture) -> str:
    """Where a picture is, or, if there is none, how to get it."""
    return f"{what}: {picture}" if picture else f"for {what}: {install('plots')}"
