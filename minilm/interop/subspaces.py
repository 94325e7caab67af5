"""A model's place in its subspace, in a folder of our own: PEFT knows no such method.

    subspace.json          the settings of add_subspace, D, and the folder of the base
    subspace.safetensors   theta (d,); for SAID the last m numbers are lambda

P is drawn again from its seed, so the folder is small, however large the model is. On a machine and
with a NumPy that draw the same P, the weights are the trained ones to the bit.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from minilm.backend import array_module, to_device
from minilm.files import FormatError, json_bytes, read_json
from minilm.interop.huggingface import check, finite
from minilm.nn import Module
from minilm.peft.adapted import adapted_layers, insert_adapters
from minilm.peft.subspace import Moved, moved, subspace_of
from minilm.stored import revive
from minilm.tensorfiles import read_tensors, tensor_parts
from minilm.together import write_together

CONFIG, TENSORS = "subspace.json", "subspace.safetensors"


@dataclass(frozen=True)
class Place:
    """What subspace.json says; all but D and `base` are add_subspace's."""

    d: int
    said: bool
    projection: Literal["fastfood", "dense"]
    seed: int
    D: int
    base: str | None


def load_adapter(model: Module, path: str | os.PathLike, name: str = "default") -> Module:
    """Move the model to the folder's place in its subspace; returns the model.

    Raises FileNotFoundError. Raises FormatError, naming the field or the key, if a file is damaged
    or not for this model. ValueError if the name is taken or another adapter is merged. The model
    is then as it was.
    """
    file, place = Path(path) / TENSORS, read(path)
    arrays = read_tensors(file)
    check(file, arrays, {"theta": (place.d,)})
    try:
        adapters, subspace = moved(model, place.d, place.said, place.projection, place.seed)
    except ValueError as error:
        raise FormatError(Path(path) / CONFIG, f"is not for this model: {error}") from None
    if subspace.D != place.D:
        raise FormatError(Path(path) / CONFIG, f"is not for this model: D is {place.D:,}, and the "
                          f"model has {subspace.D:,} numbers")
    theta = finite(file, "theta", arrays["theta"], subspace.theta.dtype)
    subspace.theta[...] = array_module(subspace.theta).asarray(theta)
    subspace.place()
    return insert_adapters(model, name, adapters)


def save_adapter(model: Module, path: str | os.PathLike, name: str = "default",
                 base: str | os.PathLike | None = None) -> None:
    """Write where the model is in its subspace of this name, as a folder for `load_adapter`.

    base: the folder of the model that it is for. What is there is replaced as a whole or, after an
    error, not at all. ValueError, before anything is written, if there is no such subspace, or if
    a number is not finite.
    """
    subspace = subspace_of(model, name)
    if subspace is None:
        raise ValueError(f"this model has no subspace {name!r}")
    found = {type(m.adapters[name]) for m in adapted_layers(model).values() if name in m.adapters}
    if found != {Moved}:
        raise ValueError(f"a folder holds a subspace alone, but {name!r} is of "
                         f"{sorted(kind.__name__ for kind in found)}")
    theta = to_device(subspace.theta, "cpu")
    if bad := int((~np.isfinite(theta)).sum()):
        raise ValueError(f"theta: {bad:,} of its {theta.size:,} numbers are not finite")
    place = Place(subspace.d, subspace.said, subspace.projection, subspace.seed, subspace.D,
                  base and os.fspath(base))
    write_together(path, {TENSORS: tensor_parts({"theta": theta}),
                          CONFIG: [json_bytes(asdict(place))]})


def read(path: str | os.PathLike) -> Place:
    """What subspace.json says. Raises FileNotFoundError and FormatError."""
    file = Path(path) / CONFIG
    return revive(Place, read_json(file), file)
