"""Models in Hugging Face folders: config.json and model.safetensors.

The tables of families.py say what each architecture calls its parts. The loader reads them one way,
the saver the other. What Transformer cannot express is refused, never ignored. Two things are
neither read nor written: dropout, which belongs to a training run and not to the weights, and
settings that only matter for generation, initialisation or other tasks.
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
OPTIONAL = ("n_inner", "num_key_value_heads")  # sizes that may be null or absent
# Beside its tensors, these decide a module's results. A Config has one value for all its blocks.
FACTS = ("heads", "kv_heads", "causal", "activation", "norm_first", "eps")
ONLY = {"add_cross_attention": False, "is_encoder_decoder": False}


def load_model(
    path: str | os.PathLike, dtype: str = "float32", dropout: float = 0.0
) -> Transformer:
    """The Transformer in a folder, its weights cast to dtype, one of FLOATS.

    Reads one file or shards, with today's keys or older ones. Raises FileNotFoundError. Raises
    FormatError, naming the field or the keys, if a file is damaged or Transformer cannot express
    what it says.
    """
    path = Path(path)
    family, config = parse(path, read_json(path / "config.json"))
    return build(family, replace(config, dropout=dropout), *read_arrays(path), dtype)


def save_model(model: Transformer, path: str | os.PathLike) -> None:
    """Write a folder that transformers and `load_model` read, in the model's own dtype.

    config.json is written last, so a part of a folder does not load. ValueError, before anything is
    written, if no family expresses the model, if its modules are not those of its Config, or if a
    weight is not finite.
    """
    family, raw = describe(model)
    require_parts(model, Transformer(model.config))
    model.require_finite()
    write_folder(path, raw, arrays_of(model, family))


def parse(folder: Path, raw) -> tuple[Family, Config]:
    """What the folder's config.json describes; FormatError if Transformer cannot express it."""
    try:
        return _parse(raw)
    except ValueError as error:
        raise FormatError(folder / "config.json", str(error)) from None


def build(family: Family, config: Config, file: Path, arrays: dict, dtype: str) -> Transformer:
    """The model with the arrays that were read from file, each cast to dtype."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {FLOATS}, got {dtype!r}")
    arrays = _normalised(file, arrays, family, config)
    numbers, held = _fewest_numbers(config), sum(a.size for a in arrays.values())
    if numbers > 2 * held + 10**6:  # a damaged size must not ask for all the memory there is
        raise FormatError(file.with_name("config.json"), "describes a model of at least "
                          f"{numbers} numbers, but {file.name} holds {held}")
    model = Transformer(config)
    places = _places(model, family)
    check(file, arrays, _shapes(places))
    for key, tensors in places.items():
        ends = np.cumsum([len(t) for t in tensors])
        for tensor, part in zip(tensors, np.split(turned(key, arrays[key]), ends[:-1])):
            tensor.become(part.astype(dtype, order="C"))  # keeps ties
    return model


def describe(model: Transformer) -> tuple[Family, dict]:
    """The model's family and its config.json; ValueError if no family expresses its Config."""
    c = model.config
    family = (LLAMA if c.positions == "rotary" else GPT2 if c.head == "linear"
              else BERT if c.segments else DISTILBERT)
    raw = _describe(family, c)
    _, first = next(model.named_tensors())
    raw["dtype"] = raw["torch_dtype"] = first.dtype.name  # torch_dtype before version 5
    return family, raw


def require_parts(model, expected):
    """ValueError if the two models differ in their modules, shapes or FACTS."""
    if differences := _parts(model) ^ _parts(expected):
        texts = {f"{path}: {getattr(what, '__name__', what)}" for path, what in differences}
        raise ValueError(f"not the modules of Transformer(config); differing: {_some(texts)}")


def arrays_of(model, family: Family) -> dict:
    """{their key: array} of the model's weights and biases."""
    arrays = {}
    for key, tensors in _places(model, family).items():
        if key.endswith((".weight", ".bias")):  # not the arrays inside a quantized weight
            arrays[key] = turned(key, np.concatenate([to_device(t.data, "cpu") for t in tensors]))
    return arrays | {copy: arrays[key] for copy, key in family.copies.items()}


def write_folder(path, raw, arrays):
    """config.json and model.safetensors."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").unlink(missing_ok=True)
    write_tensors(path / "model.safetensors", arrays, {"format": "pt"})
    write_json(path / "config.json", raw)


def _parse(raw) -> tuple[Family, Config]:
    """What config.json describes. ValueError, with the field's name, if Transformer cannot express
    it."""
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type is {kind!r}, expected one of {list(FAMILIES)}")
    family = FAMILIES[kind]
    raw = family.absent | raw
    for field, value in (ONLY | family.only).items():
        _require(raw.get(field, value) == value, raw, field, repr(value))
    plain = raw.get("quantization_config") is None
    _require(plain, raw, "quantization_config", "null; minilm.interop.bitsandbytes reads 4 bits")
    values, types = {}, {field.name: field.type for field in fields(Config)}
    for ours, theirs in family.fields.items():
        null = theirs in OPTIONAL and raw.get(theirs) is None
        if not null and (theirs in raw or types[ours] is int):  # else both have the same default
            values[ours] = _value(raw, theirs, types[ours])
    if "activation" in values:
        known, name = family.activations, values["activation"]
        _require(name in known, raw, family.fields["activation"], f"one of {list(known)}")
        values["activation"] = known[name]
    config = family.config(**values)
    return family, _rotary(raw, config) if config.positions == "rotary" else config


def _rotary(raw, c: Config) -> Config:
    """c with its rotary base. Checks the fields that only Llama and Mistral have."""
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
        fits = fits and 0 < value < 1e38  # so it fits float32
    _require(fits, raw, field, f"{'positive ' * (kind in (int, float))}{kind.__name__}")
    return kind(value)


def _require(fits, raw, field, expected):
    if not fits:
        found = repr(raw[field]) if field in raw else "missing"
        raise ValueError(f"{field} is {found}, expected {expected}")


def _describe(family: Family, c: Config) -> dict:
    """config.json for c; ValueError if it would not be read as c again."""
    names = {ours: theirs for theirs, ours in reversed(family.activations.items())}
    model_type = next(name for name, known in FAMILIES.items() if known is family)
    raw = {"architectures": [family.architecture], "model_type": model_type}
    raw |= {theirs: getattr(c, ours) for ours, theirs in family.fields.items()}
    raw[family.fields["activation"]] = names.get(c.activation, next(iter(family.activations)))
    if c.positions == "rotary":
        rope = {"rope_type": "default", "rope_theta": c.rope_theta}
        raw |= {"mlp_bias": c.bias, "head_dim": c.width // c.heads, "rope_parameters": rope}
        raw["rope_theta"] = c.rope_theta  # transformers before 5 looks here
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
    """What describes a model: each module's type and FACTS, and each tensor's shape, by path."""
    modules = dict(model.named_modules())
    facts = {(f"{name}.{fact}", vars(module)[fact])
             for name, module in modules.items() for fact in FACTS if fact in vars(module)}
    return (facts | {(name, tensor.shape) for name, tensor in model.named_tensors()}
            | {(name, type(module)) for name, module in modules.items()})


def _places(model, family: Family) -> dict:
    """{their key: [the Tensors that are joined there]}."""
    names, places = family.names(model.config.layers), {}
    for name, tensor in model.named_tensors():
        module, _, kind = name.rpartition(".")
        places.setdefault(f"{names[module]}.{kind}", []).append(tensor)
    return places


def turned(key, array):
    """GPT-2's Conv1D modules, all named c_*, hold W as (I, O)."""
    return array.T if ".c_" in key else array


def read_arrays(folder) -> tuple[Path, dict]:
    """(model.safetensors or the index of its shards, the arrays in them)."""
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
    """The arrays under today's keys, each once, without those that are ignored."""
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


def _shapes(places) -> dict:
    """{their key: the shape that it should have in the file}."""
    shapes = {}
    for key, tensors in places.items():
        shape = (sum(len(t) for t in tensors), *tensors[0].shape[1:])
        shapes[key] = shape[::-1] if ".c_" in key else shape
    return shapes


def check(file: Path, arrays: dict, shapes: dict):
    """FormatError naming the keys that are missing, unexpected, or of a wrong shape or dtype."""
    wrong = [f"{key} is {arrays[key].dtype} {arrays[key].shape}, expected float {shapes[key]}"
             for key in shapes.keys() & arrays.keys()
             if arrays[key].shape != shapes[key] or arrays[key].dtype.name not in FLOATS]
    problems = {"missing keys: ": shapes.keys() - arrays.keys(),
                "unexpected keys: ": arrays.keys() - shapes.keys(), "": wrong}
    if text := "; ".join(kind + _some(names) for kind, names in problems.items() if names):
        raise FormatError(file, text)


def _some(names) -> str:
    """The first five, and how many more there are."""
    first, more = sorted(names)[:5], len(names) - 5
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")
