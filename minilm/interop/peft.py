"""Adapters in PEFT's folders: adapter_config.json and adapter_model.safetensors.

peft_formats.py has an entry for each method: what PEFT calls its numbers and settings. What all
folders have in common is here. A folder is refused if our modules cannot express it: other methods,
biases, whole modules, and initialisations that change the base. target_modules and the other
settings that choose modules must agree with the keys in the file. A regular expression in their
place is not run.
"""

import os
from itertools import chain
from pathlib import Path

from minilm.files import FormatError, json_bytes, read_json, read_tensors, tensor_parts
from minilm.interop.families import GPT2
from minilm.interop.huggingface import check, describe, finite
from minilm.interop.peft_formats import FORMATS, Format, names
from minilm.peft.adapted import (
    adaptable_layers,
    adapted_layers,
    ends_with,
    insert_adapters,
    placed,
)
from minilm.together import settle, write_together
from minilm.transformer import Transformer

FIELDS = {  # of all methods: (default, test of a value, the values that pass, in words)
    "target_modules": (None, lambda v: v is None or type(v) is str or names(v), "names"),
    "exclude_modules": (None, lambda v: not v or names(v), "names"),
    "base_model_name_or_path": (None, lambda v: v is None or type(v) is str, "a name or null"),
}
INERT = ("peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode",
         "fan_in_fan_out", "layers_pattern", "megatron_core", "qalora_group_size",
         "init_ia3_weights")  # fields that change no number


def load_adapter(model: Transformer, path: str | os.PathLike, name: str = "default") -> Transformer:
    """Put the folder's adapter on the model, in the model's dtype, and let it act.

    Returns the model. Raises FileNotFoundError. Raises FormatError, naming the field or the keys,
    if a file is damaged or not an adapter for this model. Raises ValueError if the name is taken or
    another adapter is merged. The model is then as it was.
    """
    settle(path)
    path, file = Path(path) / "adapter_config.json", Path(path) / "adapter_model.safetensors"
    family, _ = describe(model)
    (method, config), arrays, layers = _config(path), read_tensors(file), adaptable_layers(model)
    modules = family.joined(model.config.layers, layers)
    sizes = {m: [layers[ours].weight.shape for ours in paths] for m, paths in modules.items()}
    wanted, shapes = _wanted(path, method, config, modules, arrays), {}
    for module in wanted:
        here = _tensors(method, module, arrays)
        for end, shape in method.shapes(config, module, sizes[module], here).items():
            shapes[_key(module, end)] = shape
    check(file, arrays, shapes)
    if not arrays:
        raise FormatError(file, "holds no adapter")
    adapters, dtype = {}, placed(model, ()).dtype
    for module in wanted:
        ours = {end: placed(model, finite(file, _key(module, end), a, dtype))
                for end, a in _tensors(method, module, arrays).items()}
        adapters |= zip(modules[module], method.split(config, module, sizes[module], ours))
    return insert_adapters(model, name, adapters)


def base_of(path: str | os.PathLike) -> str | None:
    """The folder or name of the model that the folder's adapter is for, if the folder says it.

    Raises FileNotFoundError and FormatError.
    """
    settle(path)
    return _config(Path(path) / "adapter_config.json")[1]["base_model_name_or_path"] or None


def save_adapter(model: Transformer, path: str | os.PathLike, name: str = "default",
                 base: str | os.PathLike | None = None) -> None:
    """Write the model's adapter of this name as a folder for PEFT and `load_adapter`.

    base: the folder of the model that the adapter is for, which `base_of` tells. PEFT looks there
    too. An adapter that is there is replaced as a whole or, after an error, not at all. ValueError,
    before anything is written, if there is no such adapter, if PEFT's format cannot express it, or
    if a number of it is not finite.
    """
    (family, _), layers = describe(model), adaptable_layers(model)
    adapters = {p: m.adapters[name] for p, m in adapted_layers(model).items() if name in m.adapters}
    if not adapters:
        raise ValueError(f"this model has no adapter {name!r}")
    for adapter in adapters.values():
        adapter.require_finite()
    kind, method = _method(name, adapters)
    modules, arrays, forms, others = family.joined(model.config.layers, layers), {}, {}, []
    if lost := sorted(adapters.keys() - set(chain(*modules.values()))):
        raise ValueError(f"{lost[0]} is no layer that PEFT would find in a {family.architecture}")
    for module, paths in modules.items():
        parts = [adapters.get(ours) for ours in paths]
        if not any(parts):
            others.append(module)
            continue
        sizes = [layers[ours].weight.shape for ours in paths]
        tensors, forms[module] = method.join(module, sizes, parts)
        arrays |= {_key(module, end): array for end, array in tensors.items()}
    raw = {"peft_type": kind, "base_model_name_or_path": base and os.fspath(base),
           "inference_mode": True,
           "modules_to_save": None, "fan_in_fan_out": family is GPT2,
           "task_type": "CAUSAL_LM" if model.config.causal else None}
    raw |= method.describe(forms, others, adapters.values())
    write_together(path, {"adapter_model.safetensors": tensor_parts(arrays, {"format": "pt"}),
                          "adapter_config.json": [json_bytes(raw)]})


def _config(path) -> tuple[Format, dict]:
    """(the method, its fields). FormatError if a value does not fit, or for an unknown field."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise FormatError(path, f"is {type(raw).__name__}, expected fields")
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise FormatError(path, f"peft_type is {kind!r}, expected one of {list(FORMATS)}")
    fields = FIELDS | FORMATS[kind].fields
    config = {field: raw.get(field, default) for field, (default, _, _) in fields.items()}
    for field, (_, fits, expected) in fields.items():
        if not fits(config[field]):
            raise FormatError(path, f"{field} is {config[field]!r}, expected {expected}")
    for field, value in raw.items():
        if value and field not in fields and field not in INERT:
            raise FormatError(path, f"{field} is {value!r}, which is not supported")
    return FORMATS[kind], config


def _method(name, adapters) -> tuple[str, Format]:
    """What PEFT calls the adapters' method, and its Format."""
    types = {type(adapter) for adapter in adapters.values()}
    for kind, method in FORMATS.items():
        if types == {method.method}:
            return kind, method
    found = sorted(t.__name__ for t in types)
    raise ValueError(f"the adapter {name!r} is of {found}; PEFT's are {list(FORMATS)}")


def _wanted(path, method, config, modules, arrays) -> list[str]:
    """The modules that should have tensors: those that are named, or else those that have some."""
    targets, excluded = config["target_modules"], config["exclude_modules"] or ()
    found = [m for m in modules if _tensors(method, m, arrays)]
    if wrong := [m for m in found if _named(m, excluded)]:
        raise FormatError(path, f"exclude_modules names {wrong[0]}, which has tensors")
    if type(targets) is list and config.get("layers_to_transform") is None:
        return [m for m in modules if _named(m, targets) and not _named(m, excluded)]
    return found


def _named(module, ends):
    return any(ends_with(module, end) for end in ends)


def _tensors(method, module, arrays) -> dict:
    """{end of a key: array} of a module."""
    return {end: arrays[_key(module, end)] for end in method.ends if _key(module, end) in arrays}


def _key(module, end):
    return f"base_model.model.{module}.{end}"
