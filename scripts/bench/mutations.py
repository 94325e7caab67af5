"""Small bugs: every change of a module that mutants.py may plant, one at a time.

Docstrings, annotations and the words of errors stay as they are; no string is changed at all.
"""

import ast
import contextlib
import importlib.util
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
         ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
         ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div,
         ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
         ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And}


class Mutant(NamedTuple):
    """A piece of a module, and what stands there instead."""

    path: Path  # from the tree's root
    lines: range  # of the piece
    piece: slice  # of the file's bytes
    before: str
    after: str
    written: str  # the same, in brackets if they change nothing but the order

    def __str__(self):
        return f"{self.path.as_posix()}:{self.lines.start}  {self.before}  ->  {self.after}"


def changes(node):
    """(what is replaced, by what) for each change of a node."""
    def other(**fields): return type(node)(**dict(ast.iter_fields(node)) | fields)
    one = ast.Constant(1)
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield node, other(ops=[*ops[:i], SWAPS[type(op)](), *ops[i + 1:]])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            yield node, other(op=SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node, node.operand
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield node, ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield node, ast.Constant(2 * value or 1.0)
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield node, other(value=ast.Constant(None))
        case ast.Raise() | ast.Expr(value=ast.Call()):
            yield node, ast.Pass()
        case ast.Call(keywords=keywords):
            for dropped in keywords:
                yield node, other(keywords=[word for word in keywords if word is not dropped])
        case ast.Slice(lower=lower, upper=upper):
            yield node, other(lower=ast.BinOp(lower, ast.Add(), one) if lower else one)
            yield node, other(upper=ast.BinOp(upper, ast.Sub(), one) if upper else ast.Constant(-1))
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            if not isinstance(test, ast.Compare | ast.UnaryOp):  # these have changes of their own
                yield test, ast.UnaryOp(ast.Not(), test)


def walk(node):
    """The nodes that may be changed."""
    yield node
    if not isinstance(node, ast.Raise | ast.JoinedStr):
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "msg"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from walk(child)


def mutants(tree: Path, path: Path):
    """Every mutant of the module tree/path."""
    source = (tree / path).read_bytes()
    first = list(accumulate(map(len, source.splitlines(keepends=True)), initial=0))
    for node in walk(ast.parse(source)):
        for old, new in changes(node):
            piece = slice(first[old.lineno - 1] + old.col_offset,
                          first[old.end_lineno - 1] + old.end_col_offset)
            before, after = ast.unparse(old), ast.unparse(new)
            bare = isinstance(new, ast.stmt | ast.Slice)
            yield Mutant(path, range(old.lineno, old.end_lineno + 1), piece, before, after,
                         after if bare else f"({after})")


@contextlib.contextmanager
def planted(tree: Path, mutant: Mutant):
    """Inside, the module has the change."""
    file = tree / mutant.path
    compiled = Path(importlib.util.cache_from_source(file))  # may hide a change of the same second
    source = file.read_bytes()
    changed = bytearray(source)
    changed[mutant.piece] = mutant.written.encode()
    file.write_bytes(changed)
    compiled.unlink(missing_ok=True)
    yield
    file.write_bytes(source)
    compiled.unlink(missing_ok=True)
