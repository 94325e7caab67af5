"""Folders that transformers makes with bitsandbytes: linear layers in 4 bits, or in LLM.int8()'s 8.

How a weight is stored is said in four_bits.py and eight_bits.py. GPT-2 keeps W_q, W_k and W_v in
one c_attn, here below each other as (3C, C), and so does Phi-3. Reading cuts it into parts, writing
joins them.
"""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilm.files import FormatError, read_json
from minilm.interop import eight_bits, four_bits
from minilm.interop.eight_bits import join_8bit, load_8bit, require_rows, save_8bit, split_8bit
from minilm.interop.four_bits import (
    DTYPES,
    STATE,
    join_4bit,
    load_4bit,
    require_known,
    save_4bit,
    split_4bit,
)
from minilm.interop.huggingface import (
    Coded,
    arrays_of,
    as_it_is,
    build,
    describe,
    parse,
    require_parts,
    write_folder,
)
from minilm.interop.shards import open_arrays, require_folder
from minilm.nn import Linear
from minilm.quantize.linear import QuantizedLinear
from minilm.tensorfiles import Stored
from minilm.together import settle
from minilm.transformer import Transformer


class Settings(NamedTuple):
    """What quantization_config says of all layers."""

    bits: int
    compute_dtype: str | None = None  # of 4 bits
    threshold: float | None = None  # of 8 bits: from here on an input is an outlier


def load_model(
    path: str | os.PathLike, dtype: str = "float32", dropout: float = 0.0
) -> Transformer:
    """The Transformer in a folder with 4-bit or 8-bit weights; what is not quantized is cast to
    dtype.

    Its layers multiply in the folder's compute dtype, or as LLM.int8() does. Raises what
    huggingface.load_model raises, and FormatError for other quantizations.
    """
    settle(path := Path(path))
    require_folder(path)
    raw = read_json(path / "config.json")
    settings = read_settings(path / "config.json", raw)
    with open_arrays(path) as (file, stored):
        family, config = parse(path, raw | {"quantization_config": None}, stored)
        arrays, weights = take_weights(file, stored, settings.bits)
        model = build(family, replace(config, dropout=dropout), file, arrays, dtype)
        layers = {p: m for p, m in model.named_modules()
                  if type(m) is Linear and m.weight is not model.embed.weight}
        for module, paths in family.joined(config.layers, layers).items():
            if parts := weights.pop(module, None):
                rows = [len(layers[ours].weight) for ours in paths]
                for ours, weight in zip(paths, _read(file, module, parts, rows, settings.bits)):
                    model.replace(ours, QuantizedLinear(weight, layers[ours].bias, *settings[1:]))
    if weights:
        raise FormatError(file, f"{min(weights)}.weight is quantized, but no linear layer's own "
                                "weight")
    return model


def save_model(model: Transformer, path: str | os.PathLike, tokenizer=None) -> None:
    """Write a model of `quantize_model` as a folder that transformers and `load_model` read.

    Its kind is nf4, fp4 or llm.int8. tokenizer: as for huggingface.save_model. Raises what that
    raises. ValueError, before anything is written, if the layers have several kinds, compute dtypes
    or thresholds, or if the format cannot express them.
    """
    family, raw = describe(model)
    layers = {p: m for p, m in model.named_modules() if type(m) is QuantizedLinear}
    in_8_bits = any(m.threshold is not None for m in layers.values())
    raw["quantization_config"] = (_in_8_bits if in_8_bits else _in_4_bits)(layers, raw["dtype"])
    plain = Transformer(as_it_is(model), seed=None)
    linear = {p: m for p, m in plain.named_modules() if type(m) is Linear}
    modules = family.joined(model.config.layers, linear)
    for p, m in layers.items():
        own = p in linear and linear[p].weight is not plain.embed.weight
        if own and linear[p].weight.shape == m.weight.shape:
            plain.replace(p, QuantizedLinear(m.weight, linear[p].bias))
    require_parts(model, plain)
    model.require_finite()
    arrays, left = arrays_of(model, family), []
    for module, paths in modules.items():
        weights = [layers[ours].weight for ours in paths if ours in layers]
        if not weights:
            left.append(module)
        elif len(weights) < len(paths):
            raise ValueError(f"{paths} are one weight there: quantize all or none of them")
        elif in_8_bits:
            arrays |= save_8bit(join_8bit(weights), module)
        else:
            arrays |= save_4bit(join_4bit(module, weights), f"{module}.weight", raw["dtype"])
    raw["quantization_config"]["llm_int8_skip_modules"] = left
    write_folder(model, path, raw, arrays, tokenizer)


def read_settings(path: Path, raw) -> Settings:
    """quantization_config of a config.json. FormatError if it is none of bitsandbytes'."""
    config = raw.get("quantization_config") if isinstance(raw, dict) else None
    if not isinstance(config, dict):
        raise FormatError(path, f"quantization_config is {config!r}, expected bitsandbytes'")
    found = {"bnb_4bit_compute_dtype": "float32", "llm_int8_threshold": 6.0,
             "llm_int8_has_fp16_weight": False} | config
    in_8_bits = found.get("load_in_8bit") is True
    known = ({"load_in_4bit": (False, None), "llm_int8_has_fp16_weight": (False,)} if in_8_bits
             else {"load_in_4bit": (True,), "bnb_4bit_compute_dtype": DTYPES})
    for field, expected in ({"quant_method": ("bitsandbytes",)} | known).items():
        if found.get(field) not in expected:
            raise FormatError(path, f"quantization_config has {field} {found.get(field)!r}, "
                                    f"expected one of {list(expected)}")
    if not in_8_bits:
        return Settings(4, compute_dtype=found["bnb_4bit_compute_dtype"])
    threshold = found["llm_int8_threshold"]
    if type(threshold) not in (int, float) or not 0 <= threshold < 1e38:
        raise FormatError(path, f"quantization_config has llm_int8_threshold {threshold!r:.80}, "
                                "expected a number from 0 on")
    return Settings(8, threshold=float(threshold) or math.inf)


def take_weights(file, stored: dict[str, Stored], bits: int) -> tuple[dict, dict]:
    """(the other arrays and places for the weights, {module: its tensors}). Their sizes fit."""
    arrays, weights = dict(stored), {}
    mark, parts = (STATE, four_bits.PARTS) if bits == 4 else (".SCB", eight_bits.PARTS)
    for name in sorted({key.partition(mark)[0] for key in stored if mark in key}):
        module = name.removesuffix(".weight")
        keys = [f"{name}{part}" if bits == 4 else f"{name}.{part}" for part in parts]
        taken = {key: arrays.pop(key) for key in keys if key in arrays}
        try:
            if bits == 4:
                taken = {key: tensor.read() if STATE in key else tensor
                         for key, tensor in taken.items()}
                shape = tuple(four_bits.checked(taken, name)[1]["shape"])
            else:
                shape = eight_bits.checked(taken, name)
        except ValueError as error:
            raise FormatError(file, str(error)) from None
        if len(shape) != 2 or 0 in shape:
            raise FormatError(file, f"{name} has shape {shape}, expected (O, I)")
        if bits == 4 and name == module:
            raise FormatError(file, f"{name} is quantized, but no weight")
        weights[module] = taken
        key = f"{module}.weight"
        arrays[key] = Coded(shape[::-1] if ".c_" in key else shape)
    return arrays, weights


def _read(file, module: str, parts: dict, rows: list[int], bits: int) -> list:
    """The weights that a module joins, with so many rows each."""
    arrays = {key: part.mapped() if isinstance(part, Stored) else part
              for key, part in parts.items()}
    try:
        if bits == 8:
            return split_8bit(load_8bit(arrays, module), rows)
        whole = load_4bit(arrays, f"{module}.weight")
    except ValueError as error:
        raise FormatError(file, str(error)) from None
    return split_4bit(file, module, whole, rows)


def _in_4_bits(layers, dtype) -> dict:
    """quantization_config for these layers of a model of this dtype."""
    for m in layers.values():
        require_known(m.weight)
    kinds = {m.weight.codebook for m in layers.values()}
    dtypes = {str(np.dtype(m.compute_dtype or dtype)) for m in layers.values()}
    if len(kinds) != 1 or len(dtypes) != 1 or not {dtype, *dtypes} <= set(DTYPES):
        raise ValueError("the model must have quantized layers, of one codebook and compute dtype "
                         f"of {DTYPES}, got {sorted(kinds)}, {sorted({dtype, *dtypes})}")
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
            "bnb_4bit_quant_type": kinds.pop(), "bnb_4bit_compute_dtype": dtypes.pop(),
            "bnb_4bit_use_double_quant": any(m.weight.c1 is not None for m in layers.values()),
            "bnb_4bit_quant_storage": "uint8"}


def _in_8_bits(layers, dtype) -> dict:
    """The same for LLM.int8()."""
    for m in layers.values():
        require_rows(m.weight)
    thresholds = {m.threshold for m in layers.values()}
    if len(thresholds) != 1 or not thresholds.isdisjoint({0, None}):
        raise ValueError("the model must have layers of one threshold above 0 for outliers, got "
                         f"{sorted(map(str, thresholds))}")
    threshold = thresholds.pop()
    return {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True,
            "llm_int8_threshold": 0.0 if math.isinf(threshold) else float(threshold),
            "llm_int8_has_fp16_weight": False}
