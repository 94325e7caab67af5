"""Adapters in PEFT's folders: adapter_config.json and adapter_model.safetensors.

    peft_config.py   what the fields mean, and which modules they choose
    peft_formats.py  what PEFT calls the numbers and settings of each method
    peft_front.py    the same for methods that put rows in front of the text
    peft_whole.py    what is trained whole beside a method: heads, embeddings, norms, biases

What they choose and what the file holds must agree. A folder is refused if our modules cannot
express it: other methods, and initialisations that change the base.
"""

import os
from itertools import chain
from pathlib import Path

from minilm.files import FormatError, json_bytes
from minilm.interop import t5
from minilm.interop.families import Family
from minilm.interop.huggingface import check, describe, finite
from minilm.interop.peft_config import choose, read_config, resolve
from minilm.interop.peft_formats import FORMATS, Format
from minilm.interop.peft_front import FRONTS, read_front, write_front
from minilm.interop.peft_whole import CLASSIFIER, PREFIX, Whole, without_copies
from minilm.peft.adapted import (
    FRONT,
    LINEAR,
    adapted_layers,
    insert_adapters,
    placed,
    unadapted,
)
from minilm.peft.retrained import Retrained
from minilm.peft.subspace import Moved
from minilm.seq2seq import EncoderDecoder
from minilm.tensorfiles import read_tensors, tensor_parts
from minilm.together import settle, write_together
from minilm.transformer import Transformer


def load_adapter(model: Transformer | EncoderDecoder, path: str | os.PathLike,
                 name: str = "default") -> Transformer | EncoderDecoder:
    """Put the folder's adapter on the model, in the model's dtype, and let it act.

    Returns the model. Raises FileNotFoundError. Raises FormatError, naming the field or the keys,
    if a file is damaged or not an adapter for this model. Raises ValueError if the name is taken or
    another adapter is merged. The model is then as it was.
    """
    settle(path)
    path, file = Path(path) / "adapter_config.json", Path(path) / "adapter_model.safetensors"
    family = _family(model)
    method, config = read_config(path)
    whole = _whole(model, family, method in FRONTS.values())
    if not file.exists() and (old := file.with_suffix(".bin")).exists():
        raise FormatError(old, "is a pickle, which may run any program; PEFT reads it, and its "
                               "save_pretrained writes adapter_model.safetensors")
    arrays = read_tensors(file)
    if method in FRONTS.values():
        return insert_adapters(model, name, read_front(path, file, method, config, arrays, whole))
    config = resolve(path, config, whole.modules)
    arrays = without_copies(file, arrays, family, config)
    sizes, there = _sizes(whole), {m for m in whole.modules if _tensors(method, m, arrays)}
    head = family.names(model.config.layers).get(whole.ends()[1])
    adapted = choose(path, config, [*sizes], head, there)
    trained = whole.wanted(config, adapted, arrays)
    shapes = {key: whole.shape(module, kind) for key, (module, kind, _) in trained.items()}
    for module in adapted:
        here = _tensors(method, module, arrays)
        for end, shape in method.shapes(config, module, sizes[module], here).items():
            shapes[_key(module, end)] = shape
    check(file, arrays, shapes)
    adapters, dtype = {}, placed(model, ()).dtype
    for module in adapted:
        ours = {end: placed(model, finite(file, _key(module, end), a, dtype))
                for end, a in _tensors(method, module, arrays).items()}
        adapters |= zip(whole.modules[module], method.split(config, module, sizes[module], ours))
    adapters = whole.read(file, arrays, trained, adapters)
    if not adapters:
        raise FormatError(file, "holds no adapter")
    return insert_adapters(model, name, adapters)


def base_of(path: str | os.PathLike) -> str | None:
    """The folder or name of the model that the folder's adapter is for, if the folder says it.

    Raises FileNotFoundError and FormatError.
    """
    settle(path)
    return read_config(Path(path) / "adapter_config.json")[1]["base_model_name_or_path"] or None


def save_adapter(model: Transformer | EncoderDecoder, path: str | os.PathLike,
                 name: str = "default", base: str | os.PathLike | None = None) -> None:
    """Write the model's adapter of this name as a folder for PEFT and `load_adapter`.

    base: the folder of the model that the adapter is for, which `base_of` tells. PEFT looks there
    too. An adapter that is there is replaced as a whole or, after an error, not at all. ValueError,
    before anything is written, if there is no such adapter, if PEFT's format cannot express it, or
    if a number of it is not finite.
    """
    family = _family(model)
    layers = adapted_layers(model)
    adapters = {p: m.adapters[name] for p, m in layers.items() if name in m.adapters}
    if not adapters:
        raise ValueError(f"this model has no adapter {name!r}")
    if any(type(a) is Moved for a in adapters.values()):
        raise ValueError("PEFT has no form for a subspace: interop.save_adapter writes one of ours")
    whole = _whole(model, family, FRONT in adapters)
    raw = {"peft_type": None, "base_model_name_or_path": base and os.fspath(base),
           "inference_mode": True, "modules_to_save": None,
           "fan_in_fan_out": ".c_" in family.block.get("mlp.up", ""), "task_type": _task(model)}
    if FRONT in adapters:
        return _write(path, *write_front(name, adapters, whole, raw))
    if lost := sorted(adapters.keys() - set(chain(*whole.modules.values()))):
        raise ValueError(f"{lost[0]} is no layer that PEFT would find in a {family.architecture}")
    for adapter in adapters.values():
        adapter.require_finite()
    retrained = {p: a for p, a in adapters.items() if isinstance(a, Retrained)}
    adapters = {p: a.inner if p in retrained else a for p, a in adapters.items()}
    adapters = {p: a for p, a in adapters.items() if a}
    kind, method = _method(name, adapters)
    arrays, forms = {}, {}
    for module in _sizes(whole):
        paths = whole.modules[module]
        parts = [adapters.get(ours) for ours in paths]
        if any(parts):
            bases = [whole.bases[ours] for ours in paths]
            tensors, forms[module] = method.join(module, bases, parts)
            arrays |= {_key(module, end): array for end, array in tensors.items()}
    tensors, saved, bias = whole.write(retrained, forms)
    others = [module for module in whole.modules if module not in forms]
    raw |= {"peft_type": kind, "modules_to_save": saved or None, "task_type": _task(model, saved)}
    raw |= method.describe(forms, others, adapters.values(), bias)
    _write(path, arrays | tensors, raw)


def _write(path, arrays, raw):
    parts = tensor_parts(arrays, {"format": "pt"})
    write_together(path, {"adapter_model.safetensors": parts,
                          "adapter_config.json": [json_bytes(raw)]})


def _task(model, saved=()) -> str | None:
    """What PEFT wraps the model for. For SEQ_CLS it trains the classifier as a whole."""
    if type(model) is EncoderDecoder:
        return "SEQ_2_SEQ_LM"
    if model.config.language and model.config.causal:
        return "CAUSAL_LM"
    return "SEQ_CLS" if {CLASSIFIER, "score"} & {*saved} else None


def _family(model) -> Family:
    return (t5.describe if type(model) is EncoderDecoder else describe)(model)[0]


def _whole(model, family, in_front: bool) -> Whole:
    """in_front: PEFT puts no module of its own around a model with rows in front."""
    bases, prefix = unadapted(model), "base_model." if in_front else PREFIX
    return Whole(model, family, bases, family.joined(model.config.layers, bases), prefix)


def _sizes(whole) -> dict:
    """{their linear module: (O, I) of each of our layers that it joins}."""
    return {module: [whole.bases[path].weight.shape for path in paths]
            for module, paths in whole.modules.items()
            if all(type(whole.bases[path]) in LINEAR for path in paths)}


def _method(name, adapters) -> tuple[str, Format]:
    """What PEFT calls the adapters' method, and its Format."""
    types = {type(adapter) for adapter in adapters.values()}
    for kind, method in FORMATS.items():
        if len(types) == 1 and types <= {*method.methods}:
            return kind, method
    found = sorted(t.__name__ for t in types) or "whole tensors, without a method beside them"
    raise ValueError(f"the adapter {name!r} is of {found}; PEFT's are {list(FORMATS)}")


def _tensors(method, module, arrays) -> dict:
    """{end of a key: array} of a module."""
    return {end: arrays[_key(module, end)] for end in method.ends if _key(module, end) in arrays}


def _key(module, end):
    return f"{PREFIX}{module}.{end}"
