"""LoRA adapters in PEFT's folders: adapter_config.json and adapter_model.safetensors.

Each adapted module has A (r, I) and B (O, r), as here, under the keys

    base_model.model.<module>.lora_A.weight        base_model.model.<module>.lora_B.weight

GPT-2 keeps W_q, W_k and W_v in one c_attn. Reading, each of ours gets c_attn's A and its third of
B. Writing, the A's are stacked and the B's become blocks, for

    [ Bq Aq ]   [ Bq       ] [ Aq ]
    [ Bk Ak ] = [    Bk    ] [ Ak ]
    [ Bv Av ]   [       Bv ] [ Av ]

of rank 3r; alpha grows with it (threefold, for rsLoRA by sqrt(3)), so that the scale stays. Where
the A's are equal bit for bit, as after reading, one of them does, and the B's are put below each
other. One of the three without an adapter is zeros. No other number is changed.

Refused is what these modules cannot express: other methods, biases, whole modules, and ways to
draw A and B that change the base. target_modules and the rest of the choice of modules only have
to agree with the keys that are there; a pattern in the place of names is not run.
"""

import math
import os
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np

from minilm.backend import array_module, to_device
from minilm.files import FormatError, read_json, read_tensors, write_json, write_tensors
from minilm.interop.families import GPT2
from minilm.interop.huggingface import check, describe
from minilm.peft.lora import Adapter, adaptable_layers, insert_adapters, lora_layers
from minilm.transformer import Transformer


def _number(value): return type(value) in (int, float) and abs(value) < 1e38
def _rank(value): return type(value) is int and value > 0
def _names(value): return type(value) is list and all(type(name) is str for name in value)


def _table(value, fits):  # of plain names, possibly anchored: others could be built to never end
    return value is None or (isinstance(value, dict) and all(
        re.fullmatch(r"\^?[\w.-]+", key) and fits(entry) for key, entry in value.items()))


FIELDS = {  # what is read: (by default, which values are, and these in words)
    "peft_type": (None, lambda v: v == "LORA", "'LORA'"),
    "r": (None, _rank, "a positive integer"),
    "lora_alpha": (None, _number, "a number"),
    "lora_dropout": (0.0, lambda v: _number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "use_rslora": (False, lambda v: type(v) is bool, "true or false"),
    "rank_pattern": (None, lambda v: _table(v, _rank), "modules' names and positive integers"),
    "alpha_pattern": (None, lambda v: _table(v, _number), "modules' names and numbers"),
    "bias": ("none", lambda v: v == "none", "'none'"),
    "init_lora_weights": (True, lambda v: v in (None, True, False, "gaussian", "orthogonal"),
                          "an initialisation that leaves the base as it is"),
    "target_modules": (None, lambda v: v is None or type(v) is str or _names(v), "names"),
    "exclude_modules": (None, lambda v: not v or _names(v), "names"),
    "layers_to_transform": (None, lambda v: True, ""),
}
INERT = ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
         "inference_mode", "fan_in_fan_out", "layers_pattern", "megatron_core",
         "qalora_group_size")  # fields that change no number


def load_adapter(model: Transformer, path: str | os.PathLike, name: str = "default") -> Transformer:
    """Put the folder's adapter on the model, in the model's dtype; it acts. Returns the model.

    Raises FileNotFoundError; FormatError, naming the field or the keys, where a file is damaged or
    not an adapter for this model; ValueError where this name is taken or another adapter is merged.
    The model is then as it was.
    """
    path, file = Path(path) / "adapter_config.json", Path(path) / "adapter_model.safetensors"
    family, _ = describe(model)
    config, arrays, layers = _config(path), read_tensors(file), adaptable_layers(model)
    modules = family.joined(model.config.layers, layers)
    shapes, forms = {}, {}
    for module in _adapted(path, config, modules, arrays):
        bases = [getattr(layers[ours], "base", layers[ours]).weight for ours in modules[module]]
        r, alpha = _form(config, module)
        shapes[_key(module, "A")] = (r, bases[0].shape[1])
        shapes[_key(module, "B")] = (sum(base.shape[0] for base in bases), r)
        forms[module] = alpha, config["lora_dropout"], config["use_rslora"]
    check(file, arrays, shapes)
    if not arrays:
        raise FormatError(file, "holds no adapter")
    like = next(t.data for _, t in model.named_tensors() if t.dtype.kind in "fV")
    xp, adapters = array_module(like), {}
    for module, form in forms.items():
        A, B = arrays[_key(module, "A")], arrays[_key(module, "B")]
        for ours, part in zip(modules[module], np.split(B, len(modules[module]))):
            adapters[ours] = Adapter(xp.array(A, like.dtype), xp.array(part, like.dtype), *form)
    return insert_adapters(model, name, adapters)


def save_adapter(model: Transformer, path: str | os.PathLike, name: str = "default") -> None:
    """Write the model's adapter of this name as a folder for PEFT and `load_adapter`.

    adapter_config.json comes last, so a part of a folder does not load. ValueError, before anything
    is written, where there is no such adapter or it has settings that one folder cannot express.
    """
    path, (family, _) = Path(path), describe(model)
    adapters = {p: m.adapters[name] for p, m in lora_layers(model).items() if name in m.adapters}
    if not adapters:
        raise ValueError(f"this model has no adapter {name!r}")
    modules = family.joined(model.config.layers, adaptable_layers(model))
    if lost := sorted(adapters.keys() - set(chain(*modules.values()))):
        raise ValueError(f"{lost[0]} is no layer that PEFT would find in a {family.architecture}")
    arrays, forms = {}, {}
    for module, paths in modules.items():
        if any(ours in adapters for ours in paths):
            A, B, alpha = _join(module, [adapters.get(ours) for ours in paths])
            arrays |= {_key(module, "A"): A, _key(module, "B"): B}
            forms[module] = len(A), int(alpha) if alpha == int(alpha) else float(alpha)
    settings = {(adapter.rslora, adapter.drop.p) for adapter in adapters.values()}
    if len(settings) > 1:
        raise ValueError(f"PEFT has one use_rslora and lora_dropout for all, not {settings}")
    raw = _describe(family, modules, forms, *settings.pop())
    raw["task_type"] = "CAUSAL_LM" if model.config.causal else None
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").unlink(missing_ok=True)
    write_tensors(path / "adapter_model.safetensors", arrays, {"format": "pt"})
    write_json(path / "adapter_config.json", raw)


def _config(path) -> dict:
    """The fields of FIELDS; FormatError where one cannot be, or where another plays a part."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise FormatError(path, f"is {type(raw).__name__}, expected fields")
    config = {field: raw.get(field, default) for field, (default, _, _) in FIELDS.items()}
    for field, (_, fits, expected) in FIELDS.items():
        if not fits(config[field]):
            raise FormatError(path, f"{field} is {config[field]!r}, expected {expected}")
    for field, value in raw.items():
        if value and field not in FIELDS and field not in INERT:
            raise FormatError(path, f"{field} is {value!r}, which is not supported")
    return config


def _adapted(path, config, modules, arrays) -> list[str]:
    """The modules that should have tensors: those named, or else those that have."""
    targets, excluded = config["target_modules"], config["exclude_modules"] or ()
    found = [m for m in modules if {_key(m, "A"), _key(m, "B")} & arrays.keys()]
    if wrong := [m for m in found if _named(m, excluded)]:
        raise FormatError(path, f"exclude_modules names {wrong[0]}, which has tensors")
    if type(targets) is list and config["layers_to_transform"] is None:
        return [m for m in modules if _named(m, targets) and not _named(m, excluded)]
    return found


def _named(module, ends):
    return any(f".{module}".endswith(f".{end}") for end in ends)


def _form(config, module):
    """r and alpha of a module: of the first pattern that its name ends with, if there is one."""
    def look_up(patterns, default):
        found = (value for key, value in (config[patterns] or {}).items()
                 if re.fullmatch(rf"(.*\.)?({key})", module))
        return next(found, default)
    return look_up("rank_pattern", config["r"]), look_up("alpha_pattern", config["lora_alpha"])


def _join(module, adapters):
    """A, B and alpha of several adapters, None where there is none, as one."""
    present = [a for a in adapters if a]
    if len({(a.r, a.alpha, a.rslora) for a in present}) > 1:
        raise ValueError(f"the parts of {module} have different r, alpha or rslora")
    As, Bs = ([to_device(t.data, "cpu") for t in tensors]
              for tensors in zip(*((a.A, a.B) for a in present)))
    r, alpha, equal = present[0].r, present[0].alpha, len({A.tobytes() for A in As}) == 1
    blocks = 1 if equal else len(present)
    B = np.zeros((len(adapters), len(Bs[0]), blocks, r), Bs[0].dtype)
    for i, j in enumerate(i for i, a in enumerate(adapters) if a):
        B[j, :, 0 if equal else i] = Bs[i]
    A = As[0] if equal else np.concatenate(As)
    alpha *= math.sqrt(blocks) if present[0].rslora else blocks
    return A, B.reshape(-1, blocks * r), alpha


def _describe(family, modules, forms, rslora, dropout) -> dict:
    """adapter_config.json for forms, {module: (r, alpha)}; the rarer forms become patterns."""
    (r, alpha), _ = Counter(forms.values()).most_common(1)[0]
    others = modules.keys() - forms.keys()
    targets = {_shortest_end(module, others) for module in forms}
    return {
        "peft_type": "LORA", "base_model_name_or_path": None, "inference_mode": True,
        "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora,
        "rank_pattern": {m: form[0] for m, form in forms.items() if form[0] != r},
        "alpha_pattern": {m: form[1] for m, form in forms.items() if form[1] != alpha},
        "target_modules": sorted(targets), "modules_to_save": None, "bias": "none",
        "fan_in_fan_out": family is GPT2, "init_lora_weights": True,
    }


def _shortest_end(module, others):
    """The fewest last parts of the module's name with which no other one ends."""
    parts = module.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
    return next(end for end in ends if not any(_named(other, [end]) for other in others))


def _key(module, matrix):
    return f"base_model.model.{module}.lora_{matrix}.weight"
