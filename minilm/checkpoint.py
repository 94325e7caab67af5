"""Crash-safe checkpoints inside a run directory: named arrays and a small state.

    checkpoints/step-00000100/tensors.safetensors
                              state.json
                              manifest.json    size and SHA-256 of the other two, written last

A save builds its folder under a temporary name, forces it to the disk, and makes it a checkpoint
by one rename. Nothing that exists is touched before the rename, and older checkpoints are removed
only after it. So a kill, a full disk or an exception at any moment leaves a whole checkpoint. If a
step is saved again, it gets a new folder, step-00000100.1, since a rename cannot replace a folder
that is not empty. Only one process may save into a folder at a time.
"""

import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np

from minilm.files import FormatError, read_json, remove, sha256, sync_folder, write_json
from minilm.tensorfiles import read_tensors, write_tensors

FILES = ("tensors.safetensors", "state.json")


def save(
    path: str | os.PathLike, tensors: dict[str, np.ndarray], state: dict, keep: int = 2
) -> None:
    """Save a checkpoint into the folder `path`, then remove all but the newest `keep`.

    `state` can be stored as JSON and has an int "step" of at least 0; otherwise ValueError.
    Checkpoints of later steps are left alone. The disk must have room for one more than `keep`.
    """
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f'state["step"] must be an int >= 0, got {step!r}')
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    sync_folder(path.parent)
    for dead in path.glob("step-*.tmp"):
        remove(dead)
    found = _checkpoints(path)
    attempt = 1 + max((a for s, a, _ in found if s == step), default=-1)
    folder = path / (f"step-{step:08d}.{attempt}" if attempt else f"step-{step:08d}")
    _write(_temporary(folder), tensors, state)
    os.replace(_temporary(folder), folder)
    sync_folder(path)
    remove_older(path, step, keep)


def remove_older(path: str | os.PathLike, step: int, keep: int = 2) -> None:
    """Remove what a save of this step replaces: all but `keep` checkpoints up to this step.

    A save does it at its end; after one that was killed before, whoever goes on may do it.
    """
    found = _checkpoints(Path(path))
    _, *replaced = [other for s, _, other in found if s == step] or [None]
    older = [other for s, _, other in found if s < step]
    for other in replaced + older[keep - 1 :]:
        # Rename first: a folder that is half removed must not look like a checkpoint.
        os.replace(other, _temporary(other))
        remove(_temporary(other))


def load(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
    """Read (tensors, state) of the newest checkpoint in `path` that is whole.

    Warns of each newer one that is damaged. FileNotFoundError if there is no checkpoint,
    FormatError if none is whole.
    """
    found = _checkpoints(Path(path))
    if not found:
        raise FileNotFoundError(f"{path}: no checkpoint, looked for folders named step-*")
    for _, _, folder in found:
        try:
            return _read(folder)
        except (FormatError, OSError) as error:
            warnings.warn(f"skipped a damaged checkpoint, {folder}: {error}", stacklevel=2)
    names = ", ".join(folder.name for _, _, folder in found)
    raise FormatError(path, f"no whole checkpoint, looked at {names}")


def _write(folder, tensors, state):
    folder.mkdir()
    try:
        write_tensors(folder / "tensors.safetensors", tensors)
        write_json(folder / "state.json", state)
        write_json(folder / "manifest.json", {name: _fingerprint(folder / name) for name in FILES})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _read(folder):
    manifest = read_json(folder / "manifest.json")
    for name in FILES:
        found = _fingerprint(folder / name)
        stated = manifest.get(name) if isinstance(manifest, dict) else None
        if stated != found:
            raise FormatError(folder / name, f"is {found}, but manifest.json has {stated}")
    state = read_json(folder / "state.json")
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int or not 0 <= step < 2**63:
        raise FormatError(folder / "state.json", f"step is {step!r:.100}, expected an int >= 0")
    return read_tensors(folder / "tensors.safetensors"), state


def _fingerprint(file):
    return {"size": file.stat().st_size, "sha256": sha256(file)}


def _temporary(folder):
    return folder.with_name(folder.name + ".tmp")


def _checkpoints(path):
    """(step, attempt, folder) of every checkpoint in the folder, newest first."""
    found = []
    for folder in path.glob("step-*"):
        if match := re.fullmatch(r"step-(\d{8,})(?:\.(\d+))?", folder.name):
            found.append((int(match[1]), int(match[2] or 0), folder))
    return sorted(found, reverse=True)
