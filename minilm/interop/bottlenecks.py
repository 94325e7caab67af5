"""Bottleneck adapters in a folder of our own: PEFT knows no such method.

    bottleneck.json          the settings of add_bottleneck, and the folder of the base
    bottleneck.safetensors   the trained tensors; a key is the layer's path and the tensor's name,
                             as blocks.0.attention.o.W_down

The settings say which tensors there must be, and of which shapes.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from minilm.backend import to_device
from minilm.files import FormatError, json_bytes, read_json
from minilm.interop.huggingface import check, finite
from minilm.nn import Module
from minilm.peft.adapted import adapted_layers, insert_adapters, placed
from minilm.peft.bottleneck import Bottleneck, bottlenecks
from minilm.peft.retrained import Retrained
from minilm.stored import revive
from minilm.tensorfiles import read_tensors, tensor_parts
from minilm.together import write_together

CONFIG, TENSORS = "bottleneck.json", "bottleneck.safetensors"


@dataclass(frozen=True)
class Shape:
    """What bottleneck.json says; all but `base` are add_bottleneck's."""

    m: int
    form: Literal["H", "P", "L"]
    skip: int
    norms: bool
    activation: Literal["relu", "gelu", "silu"]
    base: str | None

    def adapters(self, model) -> dict:
        """path -> adapter of this shape, untrained."""
        return bottlenecks(model, self.m, self.form, self.skip, self.norms, self.activation)


def load_adapter(model: Module, path: str | os.PathLike, name: str = "default") -> Module:
    """Put the folder's adapters on the model, in its dtype, and let them act; returns the model.

    Raises FileNotFoundError. Raises FormatError, naming the field or the keys, if a file is damaged
    or not of adapters for this model. ValueError if the name is taken or another adapter is merged.
    The model is then as it was.
    """
    file, dtype = Path(path) / TENSORS, placed(model, ()).dtype
    shape, arrays = read(path), read_tensors(file)
    if not any(key.endswith(".W_down") and a.shape[:1] == (shape.m,) for key, a in arrays.items()):
        raise FormatError(file, f"has no W_down of {shape.m} rows, which {CONFIG} says")
    try:
        adapters = shape.adapters(model)
    except ValueError as error:
        raise FormatError(Path(path) / CONFIG, f"is not for this model: {error}") from None
    tensors = named(adapters)
    check(file, arrays, {key: t.shape for key, t in tensors.items()})
    for key, t in tensors.items():
        t.become(placed(model, finite(file, key, arrays[key], dtype)), requires_grad=True)
    return insert_adapters(model, name, adapters)


def save_adapter(model: Module, path: str | os.PathLike, name: str = "default",
                 base: str | os.PathLike | None = None) -> None:
    """Write the model's bottlenecks of this name as a folder for `load_adapter`.

    base: the folder of the model that they are for. What is there is replaced as a whole or, after
    an error, not at all. ValueError, before anything is written, if there are no such adapters, if
    others have this name too, or if a number is not finite.
    """
    adapters = {p: m.adapters[name] for p, m in adapted_layers(model).items() if name in m.adapters}
    shape = shape_of(name, adapters, base and os.fspath(base))
    if {p: type(a) for p, a in adapters.items()} != {
            p: type(a) for p, a in shape.adapters(model).items()}:
        raise ValueError(f"{name!r} is not what add_bottleneck makes: {sorted(adapters)}")
    for adapter in adapters.values():
        adapter.require_finite()
    arrays = {key: to_device(t.data, "cpu") for key, t in named(adapters).items()}
    write_together(path, {TENSORS: tensor_parts(arrays), CONFIG: [json_bytes(asdict(shape))]})


def read(path: str | os.PathLike) -> Shape:
    """What bottleneck.json says. Raises FileNotFoundError and FormatError."""
    file = Path(path) / CONFIG
    return revive(Shape, read_json(file), file)


def shape_of(name: str, adapters: dict, base: str | None) -> Shape:
    """The settings that make such adapters. ValueError if none of them is a bottleneck."""
    own = {path: a for path, a in adapters.items() if type(a) is Bottleneck}
    if not own:
        raise ValueError(f"this model has no bottlenecks {name!r}")
    first = next(iter(own.values()))
    both = any(path.endswith("attention.o") for path in own)
    form = "L" if first.norm else "H" if both else "P"
    skip = min(int(path.split(".")[1]) for path in own)
    norms = any(type(a) is Retrained for a in adapters.values())
    return Shape(len(first.b_down.data), form, skip, norms, first.activation, base)


def named(adapters: dict) -> dict:
    """The trained tensors by key."""
    return {f"{path}.{name}": t for path, adapter in adapters.items()
            for name, t in adapter.named_parameters()}
