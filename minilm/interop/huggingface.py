"""Models in Hugging Face folders: config.json and model.safetensors.

The tables of families.py say what each architecture calls its parts. The loader reads them one way,
the saver the other. What Transformer cannot express is refused, never ignored. Neither read nor
written are dropout, which belongs to a training run and not to the weights, and settings that serve
only generation, initialisation or other tasks.
"""

import os
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from minilm.backend import to_device
from minilm.files import FormatError, read_json, read_tensors, write_json, write_tensors
from minilm.interop.families import BERT, DISTILBERT, FAMILIES, GPT2, LLAMA, Family
from minilm.transformer import Config, Transformer

FLOATS = ("float32", "float16", "bfloat16", "float64")
OPTIONAL = ("n_inner", "num_key_value_heads")  # the sizes that may be null or absent
ONLY = {"add_cross_attention": False, "is_encoder_decoder": False, "quantization_config": None}


def load_model(
    path: str | os.PathLike, dtype: str = "float32", dropout: float = 0.0
) -> Transformer:
    """The Transformer in a folder, its weights cast to dtype, one of FLOATS.

    Reads one file or shards, today's keys or older ones. Raises FileNotFoundError, or FormatError
    naming the field or the keys, where a file is damaged or says what Transformer cannot express.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {FLOATS}, got {dtype!r}")
    path = Path(path)
    raw = read_json(path / "config.json")
    try:
        family, config = _parse(raw)
    except ValueError as error:
        raise FormatError(path / "config.json", str(error)) from None
    file, arrays = _read_arrays(path)
    arrays = _normalised(file, arrays, family, config)
    numbers, held = _fewest_numbers(config), sum(a.size for a in arrays.values())
    if numbers > 2 * held + 10**6:  # a damaged size must not ask for all the memory there is
        raise FormatError(path / "config.json", f"describes a model of at least {numbers} numbers, "
                          f"but {file.name} holds {held}")
    model = Transformer(replace(config, dropout=dropout))
    places = _places(model, family)
    _check(file, arrays, places)
    for key, tensors in places.items():
        ends = np.cumsum([len(t) for t in tensors])
        for tensor, part in zip(tensors, np.split(_turned(key, arrays[key]), ends[:-1])):
            tensor.__init__(part.astype(dtype, order="C"), requires_grad=True)  # keeps ties
    return model


def save_model(model: Transformer, path: str | os.PathLike) -> None:
    """Write a folder that transformers and `load_model` read, in the model's own dtype.

    config.json comes last, so a part of a folder does not load. A model that no family expresses,
    or that has other modules than its Config says, is a ValueError before anything is written.
    """
    c, path = model.config, Path(path)
    family = (LLAMA if c.positions == "rotary" else GPT2 if c.head == "linear"
              else BERT if c.segments else DISTILBERT)
    raw = _describe(family, c)
    raw["dtype"] = raw["torch_dtype"] = model.embed.weight.dtype.name  # the latter before version 5
    if differences := _parts(model) ^ _parts(Transformer(c)):
        raise ValueError(f"not the modules of Transformer(config); differing: {_some(differences)}")
    arrays = {}
    for key, tensors in _places(model, family).items():
        arrays[key] = _turned(key, np.concatenate([to_device(t.data, "cpu") for t in tensors]))
    arrays |= {copy: arrays[key] for copy, key in family.copies.items()}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").unlink(missing_ok=True)
    write_tensors(path / "model.safetensors", arrays, {"format": "pt"})
    write_json(path / "config.json", raw)


def _parse(raw) -> tuple[Family, Config]:
    """What config.json describes; ValueError naming the field that Transformer cannot express."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type is {kind!r}, expected one of {list(FAMILIES)}")
    family = FAMILIES[kind]
    raw = family.absent | raw
    for field, value in (ONLY | family.only).items():
        _require(raw.get(field, value) == value, raw, field, repr(value))
    values, types = {}, {field.name: field.type for field in fields(Config)}
    for ours, theirs in family.fields.items():
        null = theirs in OPTIONAL and raw.get(theirs) is None
        if not null and (theirs in raw or types[ours] is int):  # else Config's default is theirs
            values[ours] = _value(raw, theirs, types[ours])
    if "activation" in values:
        known, name = family.activations, values["activation"]
        _require(name in known, raw, family.fields["activation"], f"one of {list(known)}")
        values["activation"] = known[name]
    config = family.config(**values)
    return family, _rotary(raw, config) if config.positions == "rotary" else config


def _rotary(raw, c: Config) -> Config:
    """c with its rotary base, once the fields that only Llama and Mistral have are checked."""
    width, window = c.width // c.heads, raw.get("sliding_window")
    _require(raw.get("head_dim") in (None, width), raw, "head_dim", f"{width}, hidden_size / heads")
    _require(raw.get("mlp_bias", False) == c.bias, raw, "mlp_bias", "the value of attention_bias")
    wide = window is None or (type(window) is int and window >= c.context)
    _require(wide, raw, "sliding_window", "null or at least max_position_embeddings")
    ropes = [raw]
    for field in ("rope_parameters", "rope_scaling"):  # of version 5 and of those before
        rope = raw.get(field) or {}
        plain = isinstance(rope, dict) and all(
            key == "rope_theta" or (key in ("rope_type", "type") and value == "default")
            for key, value in rope.items()
        )
        _require(plain, raw, field, 'rope_theta and rope_type "default" alone')
        ropes.append(rope)
    bases = {_value(rope, "rope_theta", float) for rope in ropes if "rope_theta" in rope}
    _require(len(bases) < 2, raw, "rope_theta", f"one value everywhere, not {sorted(bases)}")
    return replace(c, rope_theta=min(bases, default=c.rope_theta))


def _value(raw, field, kind):
    """The field as a positive int or float, a bool or a str."""
    value = raw.get(field)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if kind in (int, float):
        fits = fits and 0 < value < 1e38  # and so a float32
    _require(fits, raw, field, f"{'positive ' * (kind in (int, float))}{kind.__name__}")
    return kind(value)


def _require(fits, raw, field, expected):
    if not fits:
        found = repr(raw[field]) if field in raw else "missing"
        raise ValueError(f"{field} is {found}, expected {expected}")


def _describe(family: Family, c: Config) -> dict:
    """config.json for c; ValueError where it would not be read as c again."""
    names = {ours: theirs for theirs, ours in reversed(family.activations.items())}
    model_type = next(name for name, known in FAMILIES.items() if known is family)
    raw = {"architectures": [family.architecture], "model_type": model_type}
    raw |= {theirs: getattr(c, ours) for ours, theirs in family.fields.items()}
    raw[family.fields["activation"]] = names.get(c.activation, next(iter(family.activations)))
    if c.positions == "rotary":
        rope = {"rope_type": "default", "rope_theta": c.rope_theta}
        raw |= {"mlp_bias": c.bias, "head_dim": c.width // c.heads, "rope_parameters": rope}
        raw["rope_theta"] = c.rope_theta  # where transformers before 5 looks
    read = replace(_parse(raw)[1], dropout=c.dropout)
    for name, value in vars(c).items():
        if value != getattr(read, name):
            raise ValueError(f"{family.architecture}, the nearest, cannot express {name}={value!r}")
    return raw


def _fewest_numbers(c: Config) -> int:
    """A lower bound of the model's size: its embeddings and the matrices of Q, O and the MLP."""
    rows = c.vocab_size + c.segments + (c.context if c.positions == "learned" else 0)
    return c.width * (rows + c.layers * 2 * (c.width + c.hidden))


def _parts(model) -> set:
    """What every module and every tensor is, as "path: type or shape"."""
    tensors = {f"{name}: {tensor.shape}" for name, tensor in model.named_tensors()}
    return tensors | {f"{name}: {type(module).__name__}" for name, module in model.named_modules()}


def _places(model, family: Family) -> dict:
    """{their key: [the Tensors that are joined there]}."""
    modules = dict(family.modules)
    for i in range(model.config.layers):
        for ours, theirs in family.block.items():
            modules[f"blocks.{i}.{ours}"] = family.layer.format(i=i) + theirs
    places = {}
    for name, tensor in model.named_tensors():
        module, _, kind = name.rpartition(".")
        places.setdefault(f"{modules[module]}.{kind}", []).append(tensor)
    return places


def _turned(key, array):
    """GPT-2's Conv1D modules, all named c_*, hold W as (I, O)."""
    return array.T if ".c_" in key else array


def _read_arrays(folder) -> tuple[Path, dict]:
    """The arrays of model.safetensors or of the shards that an index names, and that file."""
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if file.exists() or not index.exists():
        return file, read_tensors(file)
    raw, arrays = read_json(index), {}
    shards = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(shards, dict):
        raise FormatError(index, f"weight_map is {shards!r}, expected keys and their files")
    for shard in sorted(set(map(str, shards.values()))):
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard, re.ASCII):
            raise FormatError(index, f"weight_map names {shard!r}, expected a .safetensors file")
        if not (folder / shard).exists():
            raise FormatError(index, f"weight_map names {shard!r}, which is not there")
        part = read_tensors(folder / shard)
        if twice := part.keys() & arrays.keys():
            raise FormatError(folder / shard, f"has what another shard has: {_some(twice)}")
        arrays |= part
    return index, arrays


def _normalised(file, arrays, family: Family, c: Config) -> dict:
    """The arrays under today's keys, each once, without those that play no part."""
    plain = {}
    for key, array in arrays.items():
        for pattern, replacement in family.respell.items():
            key = re.sub(pattern, replacement, key)
        if key in plain:
            raise FormatError(file, f"{key} is there in two spellings")
        plain[key] = array
    ignored = "|".join(re.escape(key).replace(r"\{i\}", r"\d+") for key in family.ignored)
    plain = {key: array for key, array in plain.items() if not re.fullmatch(ignored, key)}
    head = family.modules["head" if c.head == "linear" else "head.out"]
    tied = {f"{head}.weight": f"{family.modules['embed']}.weight"} if c.tied else {}
    for copy, key in (family.copies | tied).items():
        if copy in plain and not np.array_equal(plain.setdefault(key, plain[copy]), plain[copy]):
            raise FormatError(file, f"{copy} differs from {key}, of which it should be a copy")
        plain.pop(copy, None)
    return plain


def _check(file, arrays, places):
    """FormatError naming the keys that are missing, unexpected, or of a wrong shape or dtype."""
    wrong = []
    for key in places.keys() & arrays.keys():
        rows, rest = sum(len(t) for t in places[key]), places[key][0].shape[1:]
        expected = (rows, *rest)[::-1] if ".c_" in key else (rows, *rest)
        found, dtype = arrays[key].shape, arrays[key].dtype
        if found != expected or dtype.name not in FLOATS:
            wrong.append(f"{key} is {dtype} {found}, expected float {expected}")
    problems = {"missing keys: ": places.keys() - arrays.keys(),
                "unexpected keys: ": arrays.keys() - places.keys(), "": wrong}
    if text := "; ".join(kind + _some(names) for kind, names in problems.items() if names):
        raise FormatError(file, text)


def _some(names) -> str:
    """The first five, and how many more there are."""
    first, more = sorted(names)[:5], len(names) - 5
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")
