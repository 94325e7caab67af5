"""The names and signatures of the real CuPy, if it is installed.

Importing it needs no GPU. If it is not installed, every check passes.
"""

import functools
import inspect
import re
import warnings
from inspect import Parameter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it looks for a CUDA toolkit
    try:
        import cupy as REAL
        import cupyx.scipy.special  # noqa: F401  so that both are loaded before one is replaced
    except ImportError:
        REAL = None


def require(path: str, name: str):
    """AttributeError if `path`, "" or "ndarray", of the real cupy has no attribute `name`."""
    if REAL is not None and not hasattr(getattr(REAL, path) if path else REAL, name):
        raise AttributeError(f"cupy{path and '.' + path} has no {name!r}")


def bind(path: str, args, kwargs):
    """TypeError if real cupy's function at `path` does not take these arguments."""
    taken = REAL and signature(path)
    if taken:
        try:
            taken.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"cupy.{path}: {error}") from None


@functools.cache
def signature(path: str) -> inspect.Signature | None:
    """The signature of real cupy's function, from its docstring if compiled; None if unknown."""
    fn = functools.reduce(getattr, path.split("."), REAL)
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        line = (fn.__doc__ or "").strip().partition("\n")[0]
        found = re.fullmatch(r"[\w.]+\((.*)\)(?: -> \w+)?", line)
        return found and parse(found[1])


def parse(text: str) -> inspect.Signature:
    """A signature that Cython wrote, such as "self, int axis=-1, *, tuple options=()"."""
    parameters, kind = [], Parameter.POSITIONAL_OR_KEYWORD
    for piece in re.split(r",\s*", text):
        name, equals, _ = piece.partition("=")
        name, this = name.split()[-1], kind
        if name == "*":
            kind = Parameter.KEYWORD_ONLY
            continue
        if name.startswith("**"):
            this = Parameter.VAR_KEYWORD
        elif name.startswith("*"):
            this, kind = Parameter.VAR_POSITIONAL, Parameter.KEYWORD_ONLY
        default = None if equals else Parameter.empty
        parameters.append(Parameter(name.lstrip("*"), this, default=default))
    return inspect.Signature(parameters)
