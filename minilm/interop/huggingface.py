"""Models in Hugging Face folders: config.json, generation_config.json and model.safetensors.

The tables of families.py say what each architecture calls its parts. The loader reads them one way,
the saver the other. heads.py has the same families without a head, or with one for classes of
texts. What Transformer cannot express is refused, never ignored. Two things do not matter here:
dropout, which belongs to a training run and not to the weights, and settings for sampling,
initialisation or other tasks. They are remembered, and saved again.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilm.backend import to_device
from minilm.config import Config
from minilm.files import FormatError, json_bytes, read_json
from minilm.interop.config_json import describe_config, read_folder
from minilm.interop.ends import ends_of, read_ends, tokenizer_fields, with_ends
from minilm.interop.families import Family
from minilm.interop.remembered import (
    generation_config,
    kept_fields,
    model_type,
    own_spelling,
    remember,
    tokenizer_files,
)
from minilm.interop.shards import open_arrays, require_folder, some
from minilm.nn import Embedding, Linear
from minilm.peft.adapted import AdaptedLinear
from minilm.quantize.linear import QuantizedLinear
from minilm.tensorfiles import Stored, all_finite, tensor_parts
from minilm.together import settle, write_together
from minilm.transformer import Transformer

FLOATS = ("float32", "float16", "bfloat16", "float64")
# Beside its tensors, these decide a module's results. A Config has one value for all its blocks.
FACTS = ("heads", "kv_heads", "causal", "window", "rotates", "qk_norm", "activation", "norm_first",
         "norm_output", "norm_both", "eps", "plus_one", "scale", "cap", "padding")


def load_model(
    path: str | os.PathLike, dtype: str = "float32", dropout: float = 0.0
) -> Transformer:
    """The Transformer in a folder, its weights cast to dtype, one of FLOATS.

    Reads one file or shards, with today's keys or older ones. Raises FileNotFoundError. Raises
    FormatError, naming the field or the keys, if a file is damaged or Transformer cannot express
    what it says.
    """
    settle(path := Path(path))
    require_folder(path)
    raw = read_json(path / "config.json")
    with open_arrays(path) as (file, arrays):
        family, config = parse(path, raw, arrays)
        return build(family, replace(config, dropout=dropout), file, arrays, dtype)


def save_model(model: Transformer, path: str | os.PathLike, tokenizer=None) -> None:
    """Write a folder that transformers and `load_model` read, in the model's own dtype.

    A model that was loaded gives back what its folder said beside the weights (remembered.py).
    tokenizer: written into the folder too, for AutoTokenizer and `data.load_tokenizer`, in place of
    another one that is remembered; a model that knows no end of a text gets the tokenizer's. A
    model that is there is replaced as a whole or, after an error, not at all. ValueError, before
    anything is written, if no family expresses the model, if its modules are not those of its
    Config, or if a weight is not finite.
    """
    family, raw = describe(model)
    require_parts(model, Transformer(as_it_is(model), seed=None))
    model.require_finite()
    write_folder(model, path, raw, arrays_of(model, family), tokenizer)


def parse(folder: Path, raw, keys=None) -> tuple[Family, Config]:
    """What config.json describes, for weights with these keys if they are known. FormatError if
    Transformer cannot express it."""
    try:
        return read_folder(raw, keys)
    except ValueError as error:
        raise FormatError(folder / "config.json", str(error)) from None


class Coded(NamedTuple):
    """The place of a weight that bitsandbytes.py reads: `build` leaves it unwritten."""

    shape: tuple[int, ...]
    dtype: np.dtype = np.dtype("float32")

    def equals(self, other):
        return self is other


def build(family: Family, config: Config, file: Path, arrays: dict, dtype: str) -> Transformer:
    """The model with the arrays, {key: Stored or Coded}, of an open file, each cast to dtype.

    One after another is read, straight into its place if it is a tensor here too. So this takes as
    much memory as the model, and for a moment its largest tensor. What needs no cast is not even
    read, but is the file's own pages.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {FLOATS}, got {dtype!r}")
    # A damaged size must not ask for all the memory and time there is: nothing is built before the
    # arrays are known to be those that config describes. Each layer has some, so this comes first.
    if config.layers > len(arrays):
        raise FormatError(file.with_name("config.json"), f"{family.fields['layers']} is "
                          f"{config.layers}, but {file.name} holds {len(arrays)} tensors")
    arrays, config = _normalised(file, arrays, family, config)
    pooler = f"{family.modules.get('pooler.dense')}.weight"
    if config.head == "none" and pooler not in arrays:  # transformers' add_pooling_layer=False
        config = replace(config, pooler=None)
    check(file, arrays, _shapes(config, family))
    model = family.model(config, seed=None)
    ends, model.origin = read_ends(file.parent), remember(file.parent)
    model.ends = ends._replace(pad=config.padding) if ends.pad is None else ends
    for key, tensors in _places(family, config, dict(model.named_tensors())).items():
        if isinstance(arrays[key], Coded):
            continue
        whole = arrays[key].mapped(dtype, finite=True)
        parts = np.split(turned(key, whole), np.cumsum([len(t) for t in tensors])[:-1])
        for tensor, part in zip(tensors, parts):  # a tensor that is shared stays so
            tensor.become(whole if part.shape == whole.shape and part.flags.c_contiguous
                          else part.copy("C"))
    return model


def finite(file: Path, key: str, array, dtype):
    """The array in dtype, copied; FormatError if a number is not finite there."""
    with np.errstate(over="ignore", invalid="ignore"):
        array = array.astype(dtype, order="C")
    if not all_finite(array):
        raise FormatError(file, f"{key} has numbers that are not finite in {dtype}")
    return array


def describe(model: Transformer) -> tuple[Family, dict]:
    """The model's family and its config.json; ValueError if no family expresses its Config."""
    c = as_it_is(model)
    family, raw = describe_config(c, model_type(model.origin))
    raw = own_spelling(model.origin, family, c) or raw
    _, first = next(model.named_tensors())
    raw["dtype"] = raw["torch_dtype"] = first.dtype.name  # torch_dtype before version 5
    raw = with_ends(raw, model.ends)
    return family, raw | {field: value for field, value in kept_fields(model.origin, family).items()
                          if field not in raw}


def as_it_is(model) -> Config:
    """The model's Config. A tied head or embedding that was trained by itself is tied no more."""
    c = model.config
    if not c.shared:
        return c
    ends = model.embed, model.head.out if c.head == "masked" else model.head
    plain = [type(end) for end in ends] == [Embedding, Linear]
    return replace(c, tied=False) if plain and ends[0].weight is not ends[1].weight else c


def require_parts(model, expected):
    """ValueError if the two models differ in their modules, shapes or FACTS."""
    if differences := _parts(model) ^ _parts(expected):
        texts = {f"{path}: {getattr(what, '__name__', what)}" for path, what in differences}
        kinds = {type(module) for _, module in model.named_modules()}
        hints = {AdaptedLinear: "; interop.peft.save_adapter saves the adapters, or merge_lora and "
                                "unload_lora put them into the weights",
                 QuantizedLinear: "; interop.save_model writes quantized layers"}
        raise ValueError(f"not the modules of Transformer(config); differing: {some(texts)}"
                         + "".join(hint for kind, hint in hints.items() if kind in kinds))


def arrays_of(model, family: Family) -> dict:
    """{their key: array} of the model's weights and biases."""
    arrays, c = {}, as_it_is(model)
    for key, tensors in _places(family, c, dict(model.named_tensors())).items():
        if key.endswith((".weight", ".bias")):  # not the arrays inside a quantized weight
            parts = [to_device(t.data, "cpu") for t in tensors]
            arrays[key] = turned(key, parts[0] if len(parts) == 1 else np.concatenate(parts))
    return arrays | {copy: arrays[key] for copy, key in family.copies.items()}


def write_folder(model, path, raw: dict, arrays: dict, tokenizer=None):
    """config.json with the fields `raw`, model.safetensors, and what the model remembers: all as
    one."""
    ends, given = model.ends, None
    if tokenizer:
        ends = ends_of(model, tokenizer)
        raw, given = with_ends(raw, ends), tokenizer_fields(tokenizer, ends)
    files = tokenizer_files(model.origin, given)
    files |= generation_config(Path(path), raw, ends, model.origin)
    files["config.json"] = json_bytes(raw)
    write_together(path, {"model.safetensors": tensor_parts(arrays, {"format": "pt"}),
                          **{name: [data] for name, data in files.items()}})


def _parts(model) -> set:
    """What describes a model: each module's type and FACTS, and each tensor's shape, by path."""
    modules = dict(model.named_modules())
    facts = {(f"{name}.{fact}", vars(module)[fact])
             for name, module in modules.items() for fact in FACTS if fact in vars(module)}
    return (facts | {(name, tensor.shape) for name, tensor in model.named_tensors()}
            | {(name, type(module)) for name, module in modules.items()})


def _places(family: Family, c: Config, tensors: dict) -> dict:
    """{their key: what `tensors` has, by our paths, for those that are joined there}."""
    names, places = family.names(c.layers), {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        places.setdefault(f"{names[module]}.{kind}", []).append(tensor)
    return places


def turned(key, array):
    """GPT-2's Conv1D modules, all named c_*, hold W as (I, O)."""
    return array.T if ".c_" in key else array


def _normalised(file, arrays, family: Family, c: Config) -> tuple[dict, Config]:
    """The arrays under today's keys, each once, without those that are ignored; and c.

    As in transformers since version 5, a head beside the embedding that has other numbers is not
    tied to it, whatever config.json says: somebody trained it.
    """
    plain = {}
    for key, array in arrays.items():
        for pattern, replacement in family.respell.items():
            key = re.sub(pattern, replacement, key)
        if key in plain:
            raise FormatError(file, f"{key} is there in two spellings")
        plain[key] = array
    ignored = "|".join(re.escape(key).replace(r"\{i\}", r"\d+") for key in family.ignored)
    plain = {key: array for key, array in plain.items() if not re.fullmatch(ignored, key)}
    copies = family.copies
    if c.shared:
        head = f"{family.modules['head.out' if c.head == 'masked' else 'head']}.weight"
        embed = f"{family.modules['embed']}.weight"
        both = [plain.get(key) for key in (head, embed)]
        if all(isinstance(array, Stored) for array in both) and not both[0].equals(both[1]):
            c = replace(c, tied=False)
        else:
            copies = copies | {head: embed}
    for copy, key in copies.items():
        same = copy not in plain or plain.setdefault(key, plain[copy]).equals(plain[copy])
        if not same and c.tied:  # an untied model's copy does not act
            raise FormatError(file, f"{copy} differs from {key}, of which it should be a copy")
        plain.pop(copy, None)
    return plain, c


def _shapes(c: Config, family: Family) -> dict:
    """{their key: the shape that it should have in the file}."""
    shapes = {}
    for key, parts in _places(family, c, family.shapes(c)).items():
        shape = (sum(O for O, *_ in parts), *parts[0][1:])
        shapes[key] = shape[::-1] if ".c_" in key else shape
    return shapes


def check(file: Path, arrays: dict, shapes: dict):
    """FormatError naming the keys that are missing, unexpected, or of a wrong shape or dtype."""
    wrong = [f"{key} is {arrays[key].dtype} {arrays[key].shape}, expected float {shapes[key]}"
             for key in shapes.keys() & arrays.keys()
             if arrays[key].shape != shapes[key] or arrays[key].dtype.name not in FLOATS]
    problems = {"missing keys: ": shapes.keys() - arrays.keys(),
                "unexpected keys: ": arrays.keys() - shapes.keys(), "": wrong}
    if text := "; ".join(kind + some(names) for kind, names in problems.items() if names):
        raise FormatError(file, text)
