"""Clean a heap of texts: what is left is fit to train on, and what went can be looked at.

    python scripts/clean.py --source pages/ mails.jsonl
    python scripts/clean.py --source pages/ --stages language near private --show 5
    python scripts/pretrain.py --corpus runs/clean-1/clean.jsonl

Reads files one after another (text, HTML, mail, JSON lines with a field "text") and sends each
document through the stages: size, language, repetition, quality, lines, words, private. What they
are is in minilm/data/cleaning. Then copies go, exact and near ones, and with --passages also
passages that stand twice. With --model the rest is sorted into three buckets by what a model of
pretrain.py finds likely.

Prints what each stage took in and let out, and why, and leaves clean.jsonl, a picture and the
numbers in the run's folder. The sources stay as they are. Memory does not grow with the documents,
but for 150 bytes each while copies are looked for. Needs the extra `clean` for languages.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from minilm.command import Given, command, many, typed
from minilm.data.cleaning.duplicates import NEAR
from minilm.data.cleaning.funnel import Dropped, Funnel, Passed
from minilm.data.cleaning.reading import files_in, read_documents
from minilm.data.cleaning.stages import LARGEST, NAMES, make_stages
from minilm.data.cleaning.store import Kept, Store
from minilm.data.cleaning.substrings import without_repeats
from minilm.data.tokenizers import load_tokenizer
from minilm.extras import told
from minilm.files import read_json, temporary, write_json
from minilm.interop import load_model
from minilm.loop import finish_on_interrupt, refuse_unused
from minilm.measure.likely import BUCKETS, bits_of, buckets
from minilm.picture import COLORS, save_png
from minilm.run import RunDirectory

COPIES = ("exact", "near")
EVERY = 1000  # documents between two saves


@dataclass(frozen=True)
class Settings:
    """What decides the run."""

    source: tuple[str, ...] = ()
    """files and folders"""
    stages: tuple[str, ...] = (*NAMES, *COPIES)
    """those that are used; their order is fixed"""
    language: str = "en"
    """that is kept, as en or de"""
    least: float = 0.5
    """its least probability"""
    words: str | None = None
    """a file of words, one a line, that no page may have"""
    largest: int = LARGEST
    """bytes of a document"""
    near: float = NEAR
    """share of words in a row that two documents have in common if one is a copy"""
    passages: int | None = None
    """characters of a passage that may stand only once; by default any may come again. Takes 80
    bytes a character"""
    model: str | None = None
    """a model's folder, with a tokenizer.json, which sorts the texts into buckets"""
    buckets: tuple[str, ...] = BUCKETS
    """those that are kept: head is what the model finds likely"""


def main(settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),
         out: Path = Path("runs"), resume: Path | None = None, show: int = 3,
         given: Given = frozenset()):
    """Clean a heap of texts.

    Args:
        settings: what decides the run.
        out: the run gets a folder of its own in here.
        resume: folder of a run to go on with, under its own settings.
        show: how many examples of what went are printed, for each stage.
        given: names of the options on the command line.
    """
    if resume:
        refuse_unused(given, ("out", "show"), "the run keeps its own")
        run = RunDirectory(resume)
        s = run.settings(settings, given)
    else:
        s = settings
        refuse_idle(s, given)
    if not s.source:
        raise ValueError("source must name a file or a folder")
    stages = stages_of(s)
    described = [{"name": path, "sha256": listing(path)} for path in s.source]
    if resume:
        run.check(described, "the files are not those that")
    else:
        run = RunDirectory.create(out, "clean", asdict(s), described)
    with run.going_on():
        funnel = collect(run.path, s, Funnel(stages, show))
        if funnel:
            finish(run.path, s, funnel)


def refuse_idle(s: Settings, given):
    """ValueError for an option that was given and decides nothing."""
    for stage, names in {"language": ("language", "least"), "words": ("words",),
                         "near": ("near",)}.items():
        if stage not in s.stages:
            refuse_unused(given, names, f"--stages leave {stage} out")
    if not s.model:
        refuse_unused(given, ("buckets",), "there is no --model that could sort texts")


def listing(path: str) -> str:
    """A hash of the names, sizes and dates of the files that are read, which tells of changes."""
    root, digest = Path(path), hashlib.sha256()
    root.stat()
    for file in sorted(files_in(root)) if root.is_dir() else [root]:
        said = file.stat()
        digest.update(f"{file} {said.st_size} {said.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()


def stages_of(s: Settings) -> dict:
    """The stages that look at one document. ValueError for settings that mean nothing."""
    if unknown := [name for name in s.stages if name not in (*NAMES, *COPIES)]:
        raise ValueError(f"there is no stage {unknown[0]!r}, only {', '.join((*NAMES, *COPIES))}")
    if not 0 < s.near <= 1:
        raise ValueError(f"near must be above 0 and at most 1, got {s.near}")
    if s.passages is not None and s.passages < 1:
        raise ValueError(f"passages must have 1 character or more, got {s.passages}")
    if unknown := [name for name in s.buckets if name not in BUCKETS]:
        raise ValueError(f"there is no bucket {unknown[0]!r}, only {', '.join(BUCKETS)}")
    if s.model:
        load_model(s.model).config.require_writer(s.model, "finds texts likely")
    unwanted = Path(s.words).read_text("utf-8").splitlines() if s.words else []
    return make_stages([name for name in s.stages if name in NAMES], s.language, s.least,
                       [word.strip() for word in unwanted if word.strip()], s.largest)


def collect(folder: Path, s: Settings, funnel: Funnel) -> Funnel | None:
    """Send every document that was not read yet through the stages; None after Ctrl-C."""
    state = folder / "state.json"
    done = read_json(state) if state.exists() else {"read": 0, "count": 0, "size": 0, "passed": {}}
    funnel.passed = {"reading": Passed()} | funnel.passed
    funnel.passed |= {name: Passed(**passed) for name, passed in done["passed"].items()}

    def save(read: int):
        store.save()
        write_json(state, {"read": read, "count": store.count, "size": store.size,
                           "passed": {n: asdict(p) for n, p in funnel.passed.items()}})

    read, start = 0, time.perf_counter()
    with closing(Store(folder, done["count"], done["size"])) as store, \
            finish_on_interrupt() as stopped:
        for document in tqdm(read_documents(s.source, s.largest), "cleaning", unit=" documents",
                             leave=False, disable=None):
            read += 1
            if read <= done["read"]:
                continue
            take(document, funnel, store)
            if read % EVERY == 0 or stopped():
                save(read)
            if stopped():
                print(f"\nstopped after {many(read, 'document')}; go on with: "
                      f"{typed(__file__, resume=folder)}")
                return None
        save(read)
    seconds = time.perf_counter() - start
    print(f"{many(read - done['read'], 'document')} in {seconds:.1f} s, "
          f"{(read - done['read']) / seconds:,.0f} a second")
    return funnel


def take(document, funnel: Funnel, store: Store):
    """One document: into the store, or gone."""
    source, text = document
    read = "" if isinstance(text, Dropped) else text
    funnel.passed["reading"].count(source, read, text, funnel.show)
    if text is read and isinstance(text := funnel(source, text), str):
        store.add(text, source)


def finish(folder: Path, s: Settings, funnel: Funnel):
    """Leave out what stands twice or in no bucket, write what is left, and say what went where."""
    with closing(Kept(folder)) as kept:
        records = without_copies(kept, s, funnel)
        if s.passages:
            records = without_passages([*records], s.passages, funnel)
        if s.model:
            records = of_buckets([*records], s, funnel)
        count = write_records(folder / "clean.jsonl", records)
    write_json(folder / "funnel.json", {n: asdict(p) for n, p in funnel.passed.items()})
    print(table(funnel.passed))
    print(examples(funnel.passed))
    picture = plot(funnel.passed, folder / "funnel.png")
    print(f"\n{told('a picture', picture)}")
    print(f"{many(count, 'document')}: {folder / 'clean.jsonl'}" if count else
          "nothing is left: look at the examples, and choose --stages")


def without_copies(kept: Kept, s: Settings, funnel: Funnel) -> Iterator[dict]:
    """The first of those documents that are copies of one another, exact or near ones."""
    chosen = np.arange(len(kept))
    for name in COPIES:
        if name in s.stages:
            first = kept.exact()[chosen] if name == "exact" else kept.near(chosen, s.near)
            funnel.passed[name] = passed = Passed()
            for i, original in zip(chosen, first):
                text, source = kept[i].values()
                copy = Dropped(f"copy: of {kept[original]['source']}")
                passed.count(source, text, text if i == original else copy, funnel.show)
            chosen = chosen[chosen == first]
    return (kept[i] for i in chosen)


def without_passages(records: list[dict], L: int, funnel: Funnel) -> Iterator[dict]:
    """The records without passages that stood before."""
    funnel.passed["passages"] = Passed()
    for record, text in zip(records, without_repeats([r["text"] for r in records], L)):
        after = text if text.strip() else Dropped("passages alone")
        funnel.passed["passages"].count(record["source"], record["text"], after, funnel.show)
        if after is text:
            yield record | {"text": text}


def of_buckets(records: list[dict], s: Settings, funnel: Funnel) -> Iterator[dict]:
    """The records of these buckets, with their bits a byte and their bucket."""
    model, tokenizer = load_model(s.model), load_tokenizer(Path(s.model, "tokenizer.json"))
    bits = [bits_of(model, tokenizer, record["text"])
            for record in tqdm(records, "sorting", unit=" documents", leave=False, disable=None)]
    funnel.passed["buckets"] = passed = Passed()
    for record, found, bucket in zip(records, bits, buckets(bits)):
        gone = Dropped(f"{bucket}: {found:.2f} bits a byte")
        text = record["text"]
        passed.count(record["source"], text, text if bucket in s.buckets else gone, funnel.show)
        if bucket in s.buckets:
            yield record | {"bits a byte": round(found, 4), "bucket": bucket}


def write_records(path: Path, records) -> int:
    """Write JSON lines as one whole file; how many there are."""
    count = 0
    with temporary(path) as new:
        with open(new, "w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    return count


def table(passed: dict[str, Passed]) -> str:
    """A line a stage: what is left after it, of what came in at all."""
    first = next(iter(passed.values()))
    lines = [f"\n{'left after':12}{'documents':>12}{'':8}{'MB':>10}{'':8}  why others went"]
    lines.append(f"{'':12}{first.documents:12,}{'':8}{first.bytes / 1e6:10.2f}")
    for name, p in passed.items():
        why = sorted(p.reasons.items(), key=lambda reason: -reason[1])
        said = ", ".join(f"{kind} {count:,}" for kind, count in why[:3])
        lines.append(f"{name:12}{p.kept:12,}{share(p.kept, first.documents)}"
                     f"{p.kept_bytes / 1e6:10.2f}{share(p.kept_bytes, first.bytes)}  {said}")
    return "\n".join(lines)


def share(part: int, whole: int) -> str:
    """Of eight characters."""
    return f"{part / whole:8.1%}" if whole else " " * 8


def examples(passed: dict[str, Passed]) -> str:
    """What some of those that went look like."""
    lines = []
    for name, p in passed.items():
        lines += [f"\n{name}:"] * bool(p.examples)
        lines += [f"  {source}\n    {reason}" + f"\n    {text!r}" * bool(text)
                  for source, reason, text in p.examples]
    return "\n".join(lines)


def plot(passed: dict[str, Passed], path: Path) -> Path | None:
    """The share that is left after each stage; None if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    first = next(iter(passed.values()))
    axes = (figure := Figure(figsize=(6, 3.6), layout="constrained")).subplots()
    names = [*passed][::-1]
    for offset, whole, part, color, label in (
            (0.2, first.documents, "kept", COLORS[0], "documents"),
            (-0.2, first.bytes, "kept_bytes", COLORS[1], "bytes")):
        axes.barh([i + offset for i in range(len(names))],
                  [100 * getattr(passed[name], part) / max(1, whole) for name in names], 0.4,
                  color=color, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="left after the stage, %")
    axes.legend(frameon=False, loc="lower right")
    return save_png(figure, path)


if __name__ == "__main__":
    command(main)
