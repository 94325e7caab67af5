"""What a checkpoint holds of a training: the parameters and the optimizer's moments, by name."""

from pathlib import Path

import numpy as np

from minilm.backend import array_module, to_device
from minilm.files import FormatError
from minilm.nn import Module
from minilm.optim import AdamW, LossScaler
from minilm.parallel.zero import Zero
from minilm.stored import fits


def by_name(model: Module, optimizer: AdamW, states: dict) -> dict:
    """Masters and states by parameter, as views of flat buffers.

    A state that has one number a block, not one a parameter, is kept whole. Those of ranks have the
    same names and shapes as those of one process, so that either goes on from the other's.
    """
    if isinstance(optimizer, Zero):
        return _of_ranks(model, optimizer, states)
    if not hasattr(optimizer, "flat"):  # MeZO's parameters are where they were
        return {f"model.{name}": p.data for name, p in model.named_parameters()}
    flat, named = optimizer.flat, {}
    place = {id(p): i for i, p in enumerate(flat.params)}
    for kind, buffer in ({"model": flat.data} | states).items():
        if buffer.size != flat.size:
            named[kind] = buffer
            continue
        views = flat.views(buffer)
        named |= {f"{kind}.{name}": views[place[id(p)]] for name, p in model.named_parameters()}
    return named


def _of_ranks(model, zero, states):
    names, found = {id(p): name for name, p in model.named_parameters()}, {}
    for key, whole in states.items():
        number, kind = key.split(".")
        bucket = zero.trained[int(number)]
        for p, place in zip(bucket.tensors, bucket.places):
            found[kind, names[id(p)]] = whole[place].reshape(p.shape)
    kinds = {"parameters": "model", "m": "m", "v": "v"}
    return {f"{kinds[kind]}.{name}": found[kind, name] for kind in kinds for name in names.values()}


def put_back(tensors: dict, model: Module, optimizer: AdamW, path: Path):
    """Copy what `by_name` gave into the model and the optimizer of the run at `path`.

    FormatError, before anything is changed, if a tensor is missing, unknown or of another shape or
    dtype.
    """
    states = dict(optimizer.states())
    places = by_name(model, optimizer, states)
    own = {name for name in places if not name.startswith("model.")}
    stored = {name for name in tensors if not name.startswith("model.")}
    if own != stored:
        differ = sorted(own ^ stored)
        raise FormatError(path, f"the checkpoint's moments are of another model: {differ}")
    wanted = {f"model.{name}": array for name, array in model.state_dict().items()} | places
    if missing := sorted(places.keys() - tensors.keys()):
        raise FormatError(path, f"the checkpoint has no {missing[0]}")
    if unknown := sorted(tensors.keys() - wanted.keys()):
        raise FormatError(path, f"the checkpoint's {unknown[0]} is of another model")
    wrong = [f"{name} is {found}, expected {expected}" for name, array in tensors.items()
             for found, expected in [(array.shape, wanted[name].shape),
                                     (array.dtype, wanted[name].dtype)] if found != expected]
    if wrong:
        raise FormatError(path, f"the checkpoint is of another model: {', '.join(wrong)}")
    if not isinstance(optimizer, Zero):  # which writes its own part alone
        state = {n.removeprefix("model."): t for n, t in tensors.items() if n not in own}
        model.load_state_dict(model.state_dict() | state)
    for name, place in places.items():
        device = "cpu" if array_module(place) is np else "cuda"
        place[...] = to_device(tensors[name], device)
    optimizer.put_back(states)


def check(state: dict, scaler: LossScaler | None, path: Path):
    """FormatError if state.json is not that of a run at `path` with this scaler."""
    if (scaler is None) == ("scaler" in state):
        raise FormatError(path, "the checkpoint is of a run "
                          f"{'with' if scaler is None else 'without'} a loss scaler")
    limits = {("samples",): (int, 0, 2**63)} if "samples" in state else {}
    if scaler:
        limits |= {("scaler", "scale"): (float, 2.0**-149, 2.0**128),
                   ("scaler", "good"): (int, 0, state["step"]),
                   ("scaler", "skipped"): (int, 0, state["step"])}
    for place, (kind, low, high) in limits.items():
        value = state
        for name in place:
            value = value.get(name) if isinstance(value, dict) else None
        if not (fits(value, kind) and low <= value <= high):
            raise FormatError(path / "checkpoints", f"state.json: {'.'.join(place)} is "
                              f"{value!r:.100}, expected {low:g} to {high:g}")
