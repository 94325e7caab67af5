"""Run directories: everything that a training run leaves behind, and what resuming it needs.

    run.json          settings, corpora and the base's files with their SHA-256, versions, threads
    metrics.jsonl     one line a record
    samples.txt       what the model wrote
    loss.png          the curves (needs the extra `plots`)
    checkpoints/      the last two, see checkpoint.py
    .lock             while a process writes here

A run has one writer at a time. What lies behind the last checkpoint is cut off when the run goes
on, and made again. So a run that was killed, at any moment and any number of times, ends with the
files of one that was not.
"""

import errno
import itertools
import json
import math
import os
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from minilm import checkpoint
from minilm.backend import to_device
from minilm.files import (
    FormatError,
    read_bytes,
    read_json,
    remove,
    sync_file,
    sync_folder,
    temporary,
    write_atomically,
    write_json,
)
from minilm.locks import alone
from minilm.nn import Module
from minilm.optim import AdamW, LossScaler
from minilm.picture import save_png
from minilm.records import append_record, read_records, with_nan
from minilm.state import by_name, check, put_back
from minilm.stored import fits, revive
from minilm.together import settle
from minilm.versions import differing, versions


class RunDirectory:
    """The folder of one run. `settings` and `corpora` decide the run, and are stored as JSON."""

    writes = True  # may this process?

    def __init__(self, path: Path):
        self.path, self.mine = Path(path), False

    @classmethod
    def create(cls, parent: Path, name: str, settings: dict, corpora: list[dict],
               base: list[dict] = (), fill: Callable[[Path], None] = lambda folder: None):
        """Make a new folder parent/name-1, or with the first number that is free.

        base: what else decides the run, as `fingerprints` of a model give it. fill(folder) writes
        what else a new run has. The folder appears when all of it is written, so any run that is
        there can go on.
        """
        parent = Path(parent)
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            said = f"cannot be a folder for runs: {error.strerror}"
            raise OSError(error.errno, said, str(parent)) from None
        settings = {k: "inf" if v == math.inf else v for k, v in settings.items()}  # for JSON
        with temporary(parent / name, folder=True) as new:
            write_json(new / "run.json", {"settings": settings, "corpora": corpora,
                                          "base": list(base), **versions()})
            fill(new)
            path = _named(new, parent / name)
        sync_folder(parent)
        return cls(path)

    def inside(self, name: str) -> "RunDirectory":
        """A run in a folder of this one, which is there already if this one goes on."""
        (folder := self.path / name).mkdir(exist_ok=True)
        return RunDirectory(folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the run's only writer. What killed processes left half-written is removed first.

        RuntimeError if another process, or another object in this one, is the writer.
        """
        if self.mine:
            yield
            return
        with alone(self.path):
            for pattern in (".*.tmp", "step-*.tmp"):
                for dead in sorted(self.path.rglob(pattern)):
                    remove(dead)
            self.mine = True
            try:
                yield
            finally:
                self.mine = False

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """alone(), for a program: an error that is not the run's own says how to go on after it."""
        with self.alone():
            try:
                yield
            except (OSError, RuntimeError) as error:
                path = str(self.path)
                joint = "=" if path.startswith("-") else " "
                error.add_note(f"go on with: --resume{joint}{shlex.quote(path)}")
                raise

    def describe(self) -> dict:
        """What run.json says. FormatError if a field is missing, FileNotFoundError if all is."""
        file = self.path / "run.json"
        try:
            run = read_json(file)
        except FileNotFoundError:
            around = [f": give {f}" for f in self.path.parents if (f / "run.json").exists()]
            said = "is missing, so there is no run to go on with" + "".join(around[:1])
            raise FileNotFoundError(errno.ENOENT, said, str(file)) from None
        if not isinstance(run, dict):
            raise FormatError(file, "must hold an object")
        for field, kind in (("settings", dict), ("corpora", list), ("base", list)):
            if field not in run and field != "base":  # runs of 0.1.0 have no base
                raise FormatError(file, f"the field {field!r} is missing")
            if not isinstance(run.get(field, []), kind) and field in run:
                raise FormatError(file, f"{field} is {run[field]!r:.100}, expected {kind.__name__}")
        return run

    def settings(self, given, names=frozenset()):
        """The run's own settings, a dataclass like `given`.

        names: those that were given; others count as given if they differ from their defaults.
        A run may lack what given.LATER names, which earlier versions did not have: it gets the
        default, which does what they did. ValueError if one that was given differs from its own.
        """
        stored, defaults, asked = self.describe()["settings"], asdict(type(given)()), asdict(given)
        if not isinstance(stored, dict):
            raise FormatError(self.path / "run.json", "settings must be an object")
        later = {name: defaults[name] for name in getattr(given, "LATER", ())}
        stored = json.loads(json.dumps(later)) | stored
        if defaults.keys() != stored.keys():
            missing, unknown = sorted(defaults.keys() - stored), sorted(stored.keys() - defaults)
            raise FormatError(self.path / "run.json", "the run is of another program or version: "
                              f"settings missing: {missing}, unknown: {unknown}")
        own = revive(type(given), stored, self.path / "run.json", "settings")
        kept = asdict(own)
        changed = [f"{k} {asked[k]} (it has {kept[k]})" for k in kept
                   if asked[k] != kept[k] and (k in names or asked[k] != defaults[k])]
        if changed:
            raise ValueError(f"{self.path} keeps its settings, but others are given: "
                             + ", ".join(changed))
        return own

    def check(self, corpora: list[dict], words: str, base: list[dict] = ()):
        """ValueError, with these words, if the run was started on other corpora or another base.

        Runs of earlier versions say nothing of their base; then nothing of it is compared.
        """
        run, base = self.describe(), list(base)
        if run["corpora"] != corpora:
            raise ValueError(f"{self.path}: {words} this run was started on")
        if (then := run.get("base", base)) != base:
            changed = [file["name"] for file in base if file not in then]
            raise ValueError(f"{self.path}: {words} this run was started on: "
                             + (f"{', '.join(changed)} changed" if changed else "files are gone"))

    def warn_of_other_bits(self, workers: int):
        """Warn if this machine or its libraries give other bits than those the run began with."""
        if changed := differing(self.describe(), versions(), workers):
            warnings.warn(f"{self.path} cannot go on bit for bit: {changed}", stacklevel=3)

    def log(self, **record):
        """Add a line to metrics.jsonl; a number that is not finite becomes null."""
        append_record(self.path / "metrics.jsonl", record)

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl, without a last line that a crash has cut short."""
        return read_records(self.path / "metrics.jsonl")

    def require(self, record: dict, **kinds: type) -> dict:
        """The record, with nan for null. FormatError if a field is missing or of another kind."""
        full = with_nan(record)
        for name, kind in kinds.items():
            if not fits(full.get(name), kind):
                raise FormatError(self.path / "metrics.jsonl", f"step {record.get('step')}: {name} "
                                  f"is {record.get(name)!r:.100}, expected {kind.__name__}")
        return full

    def write_sample(self, step: int, text: str):
        """Add a sample to samples.txt."""
        with open(self.path / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"=== after step {step}\n{text}\n\n")

    def save(self, step: int, model: Module, optimizer: AdamW, scaler: LossScaler | None = None):
        """Save a checkpoint: the parameters that train and the optimizer's moments, by name.

        16-bit parameters are saved as the float32 masters from which they are rounded. What was
        logged and sampled before is forced to the disk first.
        """
        tensors = by_name(model, optimizer, dict(optimizer.states()))
        tensors = {name: to_device(array, "cpu") for name, array in tensors.items()}
        state = {"step": step} | ({"scaler": scaler.state()} if scaler else {})
        for file in (self.path / "metrics.jsonl", samples := self.path / "samples.txt"):
            sync_file(file)
        if samples.exists():
            state["samples"] = samples.stat().st_size
        checkpoint.save(self.path / "checkpoints", tensors, state)

    def restore(self, model: Module, optimizer: AdamW, scaler: LossScaler | None = None) -> int:
        """Restore the last whole checkpoint, cut metrics and samples to it, and return its step.

        Frozen tensors stay as they are. If there is no checkpoint yet, everything does, and the
        step is 0. FormatError, before anything is changed, if the checkpoint does not fit.
        """
        try:
            tensors, state = checkpoint.load(self.path / "checkpoints")
        except FileNotFoundError:
            tensors, state = {}, {"step": 0, "samples": 0}
        else:
            check(state, scaler, self.path)
            put_back(tensors, model, optimizer, self.path)
            optimizer.steps = state["step"]
            if scaler:
                scaler.restore(state["scaler"])
                optimizer.steps -= scaler.skipped
        self._cut(state)
        return state["step"]

    def _cut(self, state: dict):
        """Remove what lies behind the checkpoint of this state."""
        if (checkpoints := self.path / "checkpoints").exists():
            checkpoint.remove_older(checkpoints, state["step"])
        kept = [r for r in self.records() if r["step"] <= state["step"]]
        write_atomically(self.path / "metrics.jsonl",
                         "".join(json.dumps(r) + "\n" for r in kept).encode())
        if os.path.lexists(samples := self.path / "samples.txt"):
            sampled = read_bytes(samples)  # 0.1.0 did not write down how many there were
            write_atomically(samples, sampled[: state.get("samples")])

    def plot(self) -> Path | None:
        """Draw loss.png; None if matplotlib is missing."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        axes = (figure := Figure(figsize=(6, 3.6), layout="constrained")).subplots()
        for name in ("loss", "validation_loss"):
            points = [(r["step"], r[name]) for r in self.records()
                      if fits(r.get(name), float) and abs(r[name]) < 1e100]
            if points:
                axes.plot(*zip(*points), label=name.replace("_", " "), linewidth=1)
        axes.set(xlabel="step", ylabel="loss (nats a token)")
        if axes.lines:
            axes.legend(frameon=False)
        return save_png(figure, self.path / "loss.png")


def newest_model(runs: Path, run: str = "*", fits=lambda folder: True) -> Path:
    """The model that was saved last, of those that fit in folders of `runs` that match `run`.

    ValueError if there is none, or if one of several has a date that is still to come.
    """
    for folder in runs.glob(f"{run}/model"):
        settle(folder)
    # config.json comes last, so only whole models are found.
    found = [path for path in runs.glob(f"{run}/model/config.json") if fits(path.parent)]
    configs = sorted(found, key=lambda path: path.stat().st_mtime)
    if not configs:
        raise ValueError(f"no model in {runs}/{run}/model: run pretrain.py first, or give --model")
    date = configs[-1].stat().st_mtime
    if len(configs) > 1 and date > time.time() + 60:  # a minute: a server's clock may be ahead
        raise ValueError(f"{configs[-1].parent} is dated {time.ctime(date)}, which is still to "
                         "come, so the newest model cannot be told: give --model")
    return configs[-1].parent


def behind(folder: str | os.PathLike) -> Iterator[tuple[Path, dict]]:
    """run.json, and what it says, of the run that made a model's folder, then of the run that made
    that run's base, and so on. FormatError for one that is no JSON."""
    for _ in range(10):  # bases of bases
        file = Path(folder).absolute().parent / "run.json"
        run = read_json(file) if file.exists() else None
        s = run.get("settings") if isinstance(run, dict) else None
        if not isinstance(s, dict):
            return
        yield file, run
        folder = s.get("init") or s.get("model")
        if not fits(folder, str) or not folder:
            return


def share_held_out(model: str | os.PathLike) -> float | None:
    """The share of its corpora that the run held out which made the folder of this model, or the
    run that made its base. None if no run says one. FormatError if a run's file is no JSON."""
    shares = (run["settings"].get("validation") for _, run in behind(model))
    return next((share for share in shares if fits(share, float) and 0 < share < 1), None)


def _named(new: Path, wanted: Path) -> Path:
    """Rename a folder to wanted-1, or with the first number that is free."""
    for number in itertools.count(1):
        path = wanted.with_name(f"{wanted.name}-{number}")
        if os.path.lexists(path):  # also a link to nowhere
            continue
        try:
            os.rename(new, path)
            return path
        except OSError:
            if not os.path.lexists(path):
                raise
