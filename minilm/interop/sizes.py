"""What a folder will take in memory, from its config.json and the headers of its files alone."""

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilm.config import Config
from minilm.files import FormatError, read_json
from minilm.interop.bitsandbytes import read_settings, take_weights
from minilm.interop.four_bits import STATE
from minilm.interop.huggingface import parse
from minilm.interop.shards import open_arrays, require_folder
from minilm.quantize.fourbit import GROUP
from minilm.shapes import tensor_shapes
from minilm.together import settle


class Sizes(NamedTuple):
    """Bytes of a folder's model."""

    stored: int  # its tensors in the files
    weights: int  # the model in memory
    largest: int  # at most so much more while it is loaded: one tensor of the files

    loading = property(lambda self: self.weights + self.largest)


def read_shape(path: str | os.PathLike) -> tuple[Config, int | None]:
    """What the folder's config.json says: (the model's facts, the bits of its linear layers or None
    if they are not quantized). Raises what `load_model` raises for that file."""
    settle(path := Path(path))
    require_folder(path)
    _, config, settings = _described(path)
    return config, settings and settings.bits


def sizes(path: str | os.PathLike, dtype: str = "float32") -> Sizes:
    """What `load_model(path, dtype)` will take.

    No number of the weights is read. Raises FileNotFoundError, and FormatError for damage that can
    be seen without it.
    """
    settle(path := Path(path))
    require_folder(path)
    with open_arrays(path) as (file, arrays):
        family, config, settings = _described(path, arrays)
        size, shapes, coded = np.dtype(dtype).itemsize, tensor_shapes(config), {}
        stored = sum(tensor.nbytes for tensor in arrays.values())
        plain = arrays
        if settings:
            plain, coded = take_weights(file, arrays, settings.bits)
        paths = family.joined(config.layers, {name.rpartition(".")[0] for name in shapes})
        if lost := sorted(coded.keys() - paths.keys()):
            raise FormatError(file, f"{lost[0]}.weight is quantized, but no linear layer's own "
                                    "weight")
        in_codes = [f"{ours}.weight" for module in coded for ours in paths[module]]
        weights = sum(size * math.prod(shape) for name, shape in shapes.items()
                      if name not in in_codes)
        held = [_held(parts, [shapes[f"{ours}.weight"] for ours in paths[module]])
                for module, parts in coded.items()]
        largest = max([size * math.prod(array.shape) for key, array in plain.items()
                       if key in arrays and array.dtype.kind in "fV"], default=0)
    return Sizes(stored, weights + sum(held), max([largest, *held]))


def _described(path, keys=None):
    """(family, Config, the settings of a quantization or None)"""
    raw = read_json(path / "config.json")
    if not isinstance(raw, dict) or raw.get("quantization_config") is None:
        return *parse(path, raw, keys), None
    settings = read_settings(path / "config.json", raw)
    family, config = parse(path, raw | {"quantization_config": None}, keys)
    return family, config, settings


def _held(parts: dict, shapes: list[tuple[int, int]]) -> int:
    """Bytes of a module's codes and constants in memory, as so many layers of these shapes."""
    kept = [tensor.nbytes for key, tensor in parts.items()
            if STATE not in key and not key.endswith(("quant_map", "weight_format"))]
    nested = [key for key in parts if key.endswith(".nested_absmax")]
    if not nested:
        return sum(kept)
    name = nested[0].removesuffix(".nested_absmax")
    blocks = parts[f"{name}.absmax"].nbytes
    ends = np.cumsum([O * I for O, I in shapes])[:-1] * blocks // sum(O * I for O, I in shapes)
    if (ends % GROUP).any():  # the constants of such parts become float32
        return parts[name].nbytes + 4 * blocks
    return sum(kept) + 4 * len(shapes)  # an offset each
