"""Run directories: everything that a training run leaves behind, and what resuming it needs.

    run.json          settings, corpora with their SHA-256, versions, threads
    metrics.jsonl     one line a record
    samples.txt       what the model wrote
    loss.png          the curves (needs the extra `plots`)
    checkpoints/      the last two, see checkpoint.py
"""

import json
import math
import platform
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np
from threadpoolctl import threadpool_info

import minilm
from minilm import checkpoint
from minilm.backend import array_module, to_device
from minilm.files import FormatError, read_json, write_atomically, write_json
from minilm.nn import Module
from minilm.optim import AdamW, LossScaler


class RunDirectory:
    """The folder of one run. `settings` and `corpora` decide the run, and are stored as JSON."""

    def __init__(self, path: Path):
        self.path = Path(path)

    @classmethod
    def create(cls, parent: Path, name: str, settings: dict, corpora: list[dict]):
        """Make a new folder parent/name-1, or with the first number that is free."""
        number = 1
        while True:
            path = Path(parent) / f"{name}-{number}"
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        settings = {k: "inf" if v == math.inf else v for k, v in settings.items()}  # for JSON
        write_json(path / "run.json", {"settings": settings, "corpora": corpora, **versions()})
        return cls(path)

    def describe(self) -> dict:
        """What run.json says. FormatError if a field is missing."""
        run = read_json(self.path / "run.json")
        if not isinstance(run, dict):
            raise FormatError(self.path / "run.json", "must hold an object")
        for field in ("settings", "corpora"):
            if field not in run:
                raise FormatError(self.path / "run.json", f"the field {field!r} is missing")
        return run

    def settings(self, given, names=frozenset()):
        """The run's own settings, a dataclass like `given`.

        names: those that were given; others count as given if they differ from their defaults.
        ValueError if one that was given differs from the run's own.
        """
        stored, defaults, asked = self.describe()["settings"], asdict(type(given)()), asdict(given)
        if not isinstance(stored, dict):
            raise FormatError(self.path / "run.json", "settings must be an object")
        if defaults.keys() != stored.keys():
            missing, unknown = sorted(defaults.keys() - stored), sorted(stored.keys() - defaults)
            raise FormatError(self.path / "run.json", "the run is of another program or version: "
                              f"settings missing: {missing}, unknown: {unknown}")
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        kept |= {k: math.inf for k, v in kept.items() if v == "inf" and type(defaults[k]) is float}
        changed = [f"{k} {asked[k]} (it has {kept[k]})" for k in kept
                   if asked[k] != kept[k] and (k in names or asked[k] != defaults[k])]
        if changed:
            raise ValueError(f"{self.path} keeps its settings, but others are given: "
                             + ", ".join(changed))
        try:
            return type(given)(**kept)
        except (TypeError, ValueError) as error:
            raise FormatError(self.path / "run.json", f"settings: {error}") from None

    def check(self, corpora: list[dict], words: str):
        """ValueError, with these words, if the run was started on other corpora."""
        if self.describe()["corpora"] != corpora:
            raise ValueError(f"{self.path}: {words} this run was started on")

    def log(self, **record):
        """Add a line to metrics.jsonl; a number that is not finite becomes null."""
        record = {name: None if type(x) is float and not math.isfinite(x) else x
                  for name, x in record.items()}
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl, without a last line that a crash has cut short."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        records = []
        for i, line in enumerate(lines):
            try:
                records.append(json.loads(line))
            except ValueError:
                if i + 1 < len(lines):
                    raise FormatError(file, f"line {i + 1} is not JSON") from None
        return records

    def write_sample(self, step: int, text: str):
        """Add a sample to samples.txt."""
        with open(self.path / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"=== after step {step}\n{text}\n\n")

    def save(self, step: int, model: Module, optimizer: AdamW, scaler: LossScaler | None = None):
        """Save a checkpoint: the parameters that train and the optimizer's moments, by name.

        16-bit parameters are saved as the float32 masters from which they are rounded.
        """
        tensors = _by_name(model, optimizer, optimizer.states())
        tensors = {name: to_device(array, "cpu") for name, array in tensors.items()}
        state = {"step": step} | ({"scaler": scaler.state()} if scaler else {})
        checkpoint.save(self.path / "checkpoints", tensors, state)

    def restore(self, model: Module, optimizer: AdamW, scaler: LossScaler | None = None) -> int:
        """Restore the last whole checkpoint, and cut the metrics to it; returns its step.

        Frozen tensors stay as they are. If there is no checkpoint yet, everything does, and the
        step is 0.
        """
        try:
            tensors, state = checkpoint.load(self.path / "checkpoints")
        except FileNotFoundError:
            step = 0
        else:
            if (scaler is None) == ("scaler" in state):
                raise FormatError(self.path, "the checkpoint is of a run "
                                  f"{'with' if scaler is None else 'without'} a loss scaler")
            self._put_back(tensors, model, optimizer)
            step = optimizer.steps = state["step"]
            if scaler:
                scaler.restore(state["scaler"])
                optimizer.steps -= scaler.skipped
        kept = [r for r in self.records() if r["step"] <= step]
        write_atomically(self.path / "metrics.jsonl",
                         "".join(json.dumps(r) + "\n" for r in kept).encode())
        return step

    def _put_back(self, tensors, model, optimizer):
        states = optimizer.states()
        places = _by_name(model, optimizer, states)
        own = {name for name in places if not name.startswith("model.")}
        stored = {name for name in tensors if not name.startswith("model.")}
        if own != stored:
            differ = sorted(own ^ stored)
            raise FormatError(self.path, f"the checkpoint's moments are of another model: {differ}")
        state = {n.removeprefix("model."): t for n, t in tensors.items() if n not in own}
        model.load_state_dict(model.state_dict() | state)
        for name, place in places.items():
            device = "cpu" if array_module(place) is np else "cuda"
            place[...] = to_device(tensors[name], device)
        optimizer.put_back(states)

    def plot(self) -> Path | None:
        """Draw loss.png; None if matplotlib is missing."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        axes = (figure := Figure(figsize=(6, 3.6), layout="constrained")).subplots()
        for name in ("loss", "validation_loss"):
            points = [(r["step"], r[name]) for r in self.records() if r.get(name) is not None]
            if points:
                axes.plot(*zip(*points), label=name.replace("_", " "), linewidth=1)
        axes.set(xlabel="step", ylabel="loss (nats a token)")
        axes.legend(frameon=False)
        figure.savefig(self.path / "loss.png", dpi=110)
        return self.path / "loss.png"


def newest_model(runs: Path, run: str = "*") -> Path:
    """The model that was saved last, among the folders of `runs` whose names match `run`."""
    # save_model writes config.json last, so only whole models are found.
    found = runs.glob(f"{run}/model/config.json")
    configs = sorted(found, key=lambda path: path.stat().st_mtime)
    if not configs:
        raise ValueError(f"no model in {runs}/{run}/model: run pretrain.py first, or give --model")
    return configs[-1].parent


def versions() -> dict:
    """Versions and libraries, which also decide the bits of a run."""
    told = ("internal_api", "version", "architecture", "num_threads")
    blas = [{key: library.get(key) for key in told}
            for library in threadpool_info() if library["user_api"] == "blas"]
    return {"minilm": minilm.__version__, "python": platform.python_version(),
            "numpy": np.__version__, "ml_dtypes": ml_dtypes.__version__,
            "platform": platform.platform(), "blas": blas}


def _by_name(model, optimizer, states):
    """Masters and states by parameter, as views of flat buffers. A state that has one number a
    block, not one a parameter, is kept whole."""
    flat, named = optimizer.flat, {}
    place = {id(p): i for i, p in enumerate(flat.params)}
    for kind, buffer in ({"model": flat.data} | states).items():
        if buffer.size != flat.size:
            named[kind] = buffer
            continue
        views = flat.views(buffer)
        named |= {f"{kind}.{name}": views[place[id(p)]] for name, p in model.named_parameters()}
    return named
