"""A small fuzzer of folders: damage a good one in many ways, and watch how it is read.

A Format says how to write a good folder, and how to read it. Each input is the good folder after
one to three mutations: of a file's bytes, or of what the bytes mean (JSON, JSON lines, safetensors,
and JSON inside of a tensor). Input i of a seed is always the same.

What is read must load or raise FormatError. FileNotFoundError may come only if a file was taken
away. A reader has SECONDS of CPU time and BYTES of memory. What loads is saved and loaded again,
and must be the same.
"""

import faulthandler
import json
import math
import os
import random
import resource
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilm.files import FormatError
from minilm.tensorfiles import DTYPES

SECONDS, BYTES = 2, 1 << 30
HANGS = 60  # seconds on the clock for a hundred inputs, then the process ends
PLACE = "@@place@@"  # stands for a value that json.dumps could not write

VALUES = [  # JSON texts
    "null", "true", "false", "0", "-1", "1", "2", "3", "7", "255", "65536", "4294967295",
    "2147483647", "4294967296", "9223372036854775807", "9223372036854775808", "240000",
    "1" + "0" * 30, "1" + "0" * 400, "1" + "0" * 5000, "0.5", "1.0", "1e-320", "-0.0", "1e308",
    "-1e308", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", '""', '"a"', '" "', '"\\n"',
    '"\\ud800"', '"\\u0000"', '"é漢😀"', '"../x"', '"' + "a" * 300 + '"', '"' + "a" * 10**5 + '"',
    "[]", "{}", "[1]", "[[]]", "[null]", '["a"]', '{"a": 1}', '{"a": {"b": []}}', '{"": 0}',
    "[0, 0]", "[-1, 2]", "[0, 1" + "0" * 30 + "]", "[1.5, 2]", "[true]", "[" + "0," * 9999 + "0]",
    "[" * 90 + "]" * 90, "[" * 400 + "]" * 400, *("[" * n + "]" * n for n in range(880, 1000, 6)),
    "[" * 10**5 + "]" * 10**5, '{"a":' * 400 + "1" + "}" * 400,
]
PATCHES = [b"", b"null", b"-1", b"4294967295", b"1e999", b"NaN", b'"', b"[[", b"{", b"}", b",",
           b"\n", b"\0", b"<a>", b"<script/>", b"</g>", b"&a;", b' onload="x"', b"utf-7", b"cp037",
           b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"\r\n", b"0", b"9" * 40]


class Format(NamedTuple):
    """A kind of folder. A file's ending says how it can be mutated."""

    write: Callable[[Path], None]  # a good one, into an empty folder
    read: Callable[[Path], object]  # under test
    facts: Callable[[object], object]  # what must be the same after saving and loading
    save: Callable[[object, Path], None] | None = None  # what was read, into an empty folder
    mend: Callable[[Path], None] = lambda folder: None  # make the hashes right again


class Escape(NamedTuple):
    """An input that was not handled as it should be."""

    number: int
    what: str  # was done to the folder
    why: str


def fuzz(form: Format, folder: Path, inputs: int, seed: int) -> tuple[list[Escape], int]:
    """(what escaped, at most one of a kind; how many inputs were loaded)."""
    good, escapes, loaded = folder / "good", {}, 0
    good.mkdir()
    (folder / "two").mkdir()
    form.write(good)
    files = {p.relative_to(good): p.read_bytes() for p in sorted(good.rglob("*")) if p.is_file()}
    form.facts(form.read(restored(folder / "one", files)))
    with limited():
        for number in range(inputs):
            (folder / "input").write_text(f"{number} of seed {seed}")  # should the process die
            if number % 100 == 0:
                faulthandler.dump_traceback_later(HANGS, exit=True)
            rng = random.Random(f"{seed} {number}")
            what, gone = damage(rng, restored(folder / "one", files), files, form.mend)
            why, loads = watched(form, folder, gone)
            loaded += loads
            if why:
                escapes.setdefault(kind(why), Escape(number, what, why))
    return list(escapes.values()), loaded


class limited:
    """No warning, no fsync that takes time, and no more than BYTES of memory beyond what is held.
    """

    def __enter__(self):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        self.limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, self.limits[1]))
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "skipped a damaged checkpoint")  # that is what it is for

    def __exit__(self, *error):
        faulthandler.cancel_dump_traceback_later()
        self.warnings.__exit__(*error)
        resource.setrlimit(resource.RLIMIT_AS, self.limits)


def watched(form: Format, folder: Path, gone: bool) -> tuple[str, bool]:
    """(why this input escaped, or ""; whether it was loaded)."""
    start, stage = time.process_time(), "reading"
    try:
        found = form.read(folder / "one")
        facts, stage = form.facts(found), "saving and loading again"
        if form.save:
            form.save(found, folder / "two")
            if form.facts(form.read(folder / "two")) != facts:
                return f"{stage}: not the same", True
    except FormatError as error:
        if stage == "reading":
            return "" if len(str(error)) < 2000 else "reading: a FormatError without end", False
        return f"{stage}: {shown(error)}", True
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of other languages are no Exception
        if gone and stage == "reading" and type(error) is FileNotFoundError:
            return "", False
        return f"{stage}: {shown(error)}", False
    if (seconds := time.process_time() - start) > SECONDS:
        return f"took {seconds:.1f} s", True
    return "", True


def kind(why: str) -> str:
    """The same for all errors of one type from one place."""
    first, _, last = why.partition("\n")
    return first.partition(" <- ")[0] + last.partition(":")[0]


def shown(error) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = " <- ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-5:-1])
    return f"{place}\n{type(error).__name__}: {str(error)[:300]}"


def restored(folder: Path, files: dict) -> Path:
    """The good folder again."""
    for name, data in files.items():
        file = folder / name
        if file.is_dir():
            file.rmdir()
        elif not file.is_file() or file.is_symlink():
            file.unlink(missing_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return folder


def damage(rng, folder: Path, files: dict, mend) -> tuple[str, bool]:
    """Mutate one to three times. (What was done, whether a file is gone.)"""
    done, gone = [], False
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(sorted(files))
        file = folder / name
        if not file.is_file():
            continue
        if rng.random() < 0.02:
            change = rng.choice(TO_FILES)
            gone |= change in (taken_away, dangling)
            change(file)
        else:
            meaning = MEANINGS.get(file.suffix)
            change = meaning if meaning and rng.random() < 0.6 else rng.choice(TO_BYTES)
            data = file.read_bytes()
            try:
                file.write_bytes(change(rng, data, rng.choice([*files.values()])))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError,
                    OverflowError):
                # An earlier mutation broke its form.
                file.write_bytes(cut(rng, data, b""))
        done.append(f"{name}: {change.__name__}")
    mend(folder)
    return "; ".join(done), gone


def taken_away(file): file.unlink()


def emptied(file): file.write_bytes(b"")


def a_folder(file):
    file.unlink()
    file.mkdir()


def dangling(file):
    file.unlink()
    file.symlink_to("nowhere")


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)


TO_FILES = [taken_away, emptied, a_folder, dangling, a_pipe]


def flip(rng, data, other):
    broken = bytearray(data)
    near = len(data) if rng.random() < 0.5 else min(len(data), 1000)  # headers are in front
    for _ in range(rng.randint(1, 4) if broken else 0):
        broken[rng.randrange(near)] = rng.choice(b'0123-"{}[],: anx\xff\0') if rng.random() < 0.7 \
            else rng.randrange(256)
    return bytes(broken)


def cut(rng, data, other): return data[: rng.randrange(len(data) + 1)]


def insert(rng, data, other):
    i = rng.randint(0, len(data))
    return data[:i] + rng.choice(PATCHES) + data[i + rng.choice([0, 0, 1, 2, 20]):]


def repeat(rng, data, other):
    i, n = rng.randint(0, len(data)), rng.choice([1, 8, 100])
    return data[:i] + data[i : i + n] * rng.choice([2, 3, 1000]) + data[i:]


def swap(rng, data, other): return other


TO_BYTES = [flip, flip, flip, cut, insert, insert, insert, repeat, swap]


def json_mutated(rng, data, other):
    root = [json.loads(data)]
    places = list(walk(root))
    parent, key = rng.choice(places)
    value, text = parent[key], rng.choice(VALUES)
    kind = rng.choice(["replace"] * 4 + ["twin", "near", "near", "drop", "add", "rename", "wrap"])
    if kind == "replace":
        parent[key] = PLACE
    elif kind == "twin":  # the value of another place
        a, b = rng.choice(places)
        text, parent[key] = json.dumps(a[b]), PLACE
    elif kind == "near" and type(value) in (int, float):
        changed = [value + 1, value - 1, -value, value * 2, float(value), value * 10**6]
        text, parent[key] = json.dumps(rng.choice(changed)), PLACE
    elif kind == "near" and isinstance(value, str) and value:
        i = rng.randrange(len(value))
        parent[key] = value[:i] + rng.choice(["", "é", " ", ".", "/", "0", value]) + value[i + 1 :]
    elif isinstance(parent, dict) and kind in ("drop", "rename"):
        del parent[key]
        if kind == "rename":
            parent[rng.choice([key + "_", key[:-1], "type", "\ud800", "a" * 300])] = value
    elif kind == "drop" and parent is not root:
        del parent[key]
    elif kind == "add" and isinstance(value, dict):
        value[rng.choice(["extra", "type", "", *map(str, value)])] = PLACE
    elif kind == "add" and isinstance(value, list):
        value.insert(rng.randint(0, len(value)), PLACE)
    else:
        parent[key] = [value] if rng.random() < 0.5 else {"a": value}
    return json.dumps(root[0]).replace(f'"{PLACE}"', text).encode("utf-8", "surrogatepass")


def walk(node):
    """(list or dict, key) of every value."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from walk(node[key])


def lines_mutated(rng, data, other):
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    kind = rng.choice(["json"] * 5 + ["twice", "swap", "drop"])
    if kind == "json" and lines[i]:
        lines[i] = json_mutated(rng, lines[i], other)
    elif kind == "twice":
        lines.insert(i, lines[i])
    elif kind == "swap":
        lines[i], lines[0] = lines[0], lines[i]
    else:
        del lines[i]
    return b"\n".join(lines)


def tensors_mutated(rng, data, other):
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.3:
        return assembled(json_mutated(rng, header, other), body)
    fields, tensors = json.loads(header), {}
    for name, field in fields.items():
        if name != "__metadata__":
            start, end = field["data_offsets"]
            tensors[name] = [field["dtype"], field["shape"], body[start:end]]
    if not tensors:
        return data
    for _ in range(rng.choice([1, 1, 2])):
        tensor_mutated(rng, tensors)
    header, body = {}, b""
    for name, (dtype, shape, part) in tensors.items():
        offsets = [len(body), len(body) + len(part)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += part
    return assembled(json.dumps(header).encode(), body)


def assembled(header, body):
    return len(header).to_bytes(8, "little") + header + body


def tensor_mutated(rng, tensors):
    """One of the tensors {name: [dtype, shape, bytes]} is changed, dropped, renamed or copied."""
    name, twin = rng.choice([*tensors]), rng.choice([*tensors])
    dtype, shape, part = tensors[name]
    kind = rng.choice(["values", "values", "shape", "shape", "dtype", "astype", "name", "drop",
                       "twin", "inner", "inner"])
    if kind == "inner" and part[:1] == b"{":
        part = json_mutated(rng, part, b"")
        tensors[name] = [dtype, [len(part)], part]
    elif kind in ("values", "inner"):
        tensors[name][2] = values_mutated(rng, dtype, part)
    elif kind == "shape":
        shapes = [shape[::-1], [*shape, 1], [1, *shape], shape[1:], [len(part)], [0, 10**12], [],
                  [*shape, 0], [n + 1 for n in shape], [0] * len(shape), [1] * 40]
        new = rng.choice(shapes)
        length = math.prod(n for n in new if type(n) is int) * DTYPES[dtype].itemsize
        tensors[name] = [dtype, new, (part * (length // max(len(part), 1) + 1))[:length]]
    elif kind == "dtype":
        other = rng.choice([d for d in DTYPES if DTYPES[d].itemsize == DTYPES[dtype].itemsize])
        tensors[name][0] = other
    elif kind == "astype":
        other = rng.choice([*DTYPES])
        with np.errstate(all="ignore"):
            array = np.frombuffer(part, DTYPES[dtype]).astype(DTYPES[other])
        tensors[name] = [other, shape, array.tobytes()]
    elif kind == "name":
        new = rng.choice([name + "x", name.replace(".0.", ".1."), name.replace("weight", "bias"),
                          name.partition(".")[2], "", "é", "a" * 10**4, twin])
        tensors[new] = tensors.pop(name)
    elif kind == "drop":
        del tensors[name]
    else:
        tensors[name] = [*tensors[twin]]


def values_mutated(rng, dtype, part):
    array = np.frombuffer(part, DTYPES[dtype]).copy()
    if array.dtype.kind in "iub" or not array.size:
        return flip(rng, part, b"")
    extremes = {2: [3e38, 65504], 4: [3.4e38], 8: [1.7e308, 3.5e38]}[array.dtype.itemsize]
    with np.errstate(all="ignore"):
        value = rng.choice([0, np.nan, np.inf, -np.inf, 1e-45, *extremes, -extremes[0]])
        array[rng.choice([slice(None), rng.randrange(array.size)])] = value
    return array.tobytes()


MEANINGS = {".json": json_mutated, ".jsonl": lines_mutated, ".safetensors": tensors_mutated}
