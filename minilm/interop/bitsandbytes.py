"""4-bit weights as bitsandbytes stores them, and the folders that transformers makes of them.

A weight X of n numbers in b blocks is

    X                              uint8 (n/2, 1)    the codes, the first one in the high bits
    X.quant_map                    float32 (16,)     what they stand for
    X.absmax                       float32 (b,)      the constants c2, or with double quantization
                                   uint8 (b,)        codes for them,
    X.nested_quant_map             float32 (256,)    what these stand for,
    X.nested_absmax                float32 (b/256,)  and the constants c1
    X.quant_state.bitsandbytes__*  uint8             JSON with the sizes and the offset of c2

The * is nf4 or fp4. Codes and constants are taken as they are: nothing is quantized again.

GPT-2 keeps W_q, W_k and W_v in one c_attn, here below each other as (3C, C), and so does Phi-3.
Reading cuts it into parts, writing joins them. A part must be whole blocks, or the weight is
refused. Its c2 stay 8-bit codes if it is also whole groups of 256 blocks, and, for joining, if all
parts have the same offset. Otherwise c2 become the float32 numbers that the codes stand for: the
weights are the same.

8-bit folders, made by LLM.int8(), cannot be read.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from minilm.backend import to_device
from minilm.files import FormatError, read_json
from minilm.interop.huggingface import (
    arrays_of,
    build,
    describe,
    parse,
    read_arrays,
    require_parts,
    turned,
    write_folder,
)
from minilm.nn import Linear
from minilm.quantize.codebooks import dynamic_map, levels
from minilm.quantize.fourbit import BLOCK_SIZES, GROUP, FourBit
from minilm.quantize.linear import QuantizedLinear
from minilm.strict import parse as parse_json
from minilm.together import settle
from minilm.transformer import Transformer

KINDS = ("nf4", "fp4")
DTYPES = ("float32", "float16", "bfloat16")
STATE = ".quant_state.bitsandbytes__"
PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
         *(STATE + kind for kind in KINDS))


def load_4bit(tensors: dict[str, np.ndarray], name: str) -> FourBit:
    """The weight of this name, such as "model.layers.0.mlp.up_proj.weight".

    ValueError naming the tensor that is missing, unexpected, of another size or dtype, not finite,
    or a map that is not bitsandbytes', or naming the field of the state that does not fit.
    """
    parts = {part: tensors[name + part] for part in PARTS if name + part in tensors}
    states = [kind for kind in KINDS if STATE + kind in parts]
    if len(states) != 1:
        raise ValueError(f"{name}{STATE}nf4 or fp4 must be there, and only one of them")
    kind, nested = states[0], ".nested_absmax" in parts
    state = _state(name + STATE + kind, parts.pop(STATE + kind), kind, nested)
    n, size = math.prod(state["shape"]), state["blocksize"]
    blocks = -(-n // size)
    sizes = {"": ("uint8", -(-n // 2)), ".quant_map": ("float32", 16),
             ".absmax": ("uint8" if nested else "float32", blocks)}
    if nested:
        sizes |= {".nested_absmax": ("float32", -(-blocks // GROUP)),
                  ".nested_quant_map": ("float32", 256)}
    if wrong := sorted(parts.keys() ^ sizes.keys()):
        raise ValueError(f"{name}{wrong[0]} is {'there' if wrong[0] in parts else 'missing'}, "
                         f"expected {[name + part for part in sizes]}")
    parts[""] = parts[""].reshape(-1).view(np.uint8)  # quant_storage may name another dtype
    for part, (dtype, length) in sizes.items():
        array = parts[part]
        if array.dtype != dtype or array.shape != (length,) or not np.isfinite(array).all():
            raise ValueError(f"{name}{part} is {array.dtype} {array.shape}, "
                             f"expected finite {dtype} ({length},)")
    for part, known in {".quant_map": levels(kind), ".nested_quant_map": dynamic_map()}.items():
        if part in parts and np.abs(parts[part] - known).max() > 1e-6:
            raise ValueError(f"{name}{part} is not bitsandbytes' map")
    offset = np.array(state["nested_offset"], np.float32) if nested else None
    weight = FourBit(parts[""], parts[".absmax"], tuple(state["shape"]), kind, size,
                     parts.get(".nested_absmax"), offset)
    with np.errstate(over="ignore"):
        if not np.isfinite(weight.absmax).all():
            raise ValueError(f"{name}.absmax stands for numbers that are not finite")
    return weight


def save_4bit(x: FourBit, name: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The tensors of x, for `load_4bit` and bitsandbytes.

    dtype: what bitsandbytes dequantizes to by default. ValueError if its format cannot express x.
    """
    _require_known(x)
    state = {"quant_type": x.codebook, "blocksize": x.block_size, "dtype": dtype,
             "shape": list(x.shape)}
    parts = {"": x.packed[:, None], ".absmax": x.c2, ".quant_map": levels(x.codebook).copy()}
    if x.c1 is not None:
        parts |= {".nested_absmax": x.c1, ".nested_quant_map": dynamic_map().copy()}
        state |= {"nested_blocksize": GROUP, "nested_dtype": "float32",
                  "nested_offset": float(x.offset)}
    parts[STATE + x.codebook] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {name + part: to_device(array, "cpu") for part, array in parts.items()}


def load_model(
    path: str | os.PathLike, dtype: str = "float32", dropout: float = 0.0
) -> Transformer:
    """The Transformer in a folder with 4-bit weights; what is not quantized is cast to dtype.

    Its layers multiply in the folder's compute dtype. Loading takes as much memory as the model in
    float32. Raises what huggingface.load_model raises, and FormatError for other quantizations.
    """
    settle(path := Path(path))
    raw = read_json(path / "config.json")
    compute_dtype = _compute_dtype(path / "config.json", raw)
    family, config = parse(path, raw | {"quantization_config": None})
    file, arrays = read_arrays(path)
    weights = _take_weights(file, arrays)
    model = build(family, replace(config, dropout=dropout), file, arrays, dtype)
    layers = {p: m for p, m in model.named_modules()
              if type(m) is Linear and m.weight is not model.embed.weight}
    for module, paths in family.joined(config.layers, layers).items():
        if weight := weights.pop(f"{module}.weight", None):
            rows = [len(layers[ours].weight) for ours in paths]
            for ours, part in zip(paths, _split(file, module, weight, rows)):
                model.replace(ours, QuantizedLinear(part, layers[ours].bias, compute_dtype))
    if weights:
        raise FormatError(file, f"{min(weights)} is quantized, but no linear layer's own weight")
    return model


def save_model(model: Transformer, path: str | os.PathLike) -> None:
    """Write a model of `quantize_model` as a folder that transformers and `load_model` read.

    Raises what huggingface.save_model raises. ValueError, before anything is written, if the layers
    have several kinds or compute dtypes, or if the format cannot express them.
    """
    family, raw = describe(model)
    layers = {p: m for p, m in model.named_modules() if type(m) is QuantizedLinear}
    raw["quantization_config"] = _quantization(layers, raw["dtype"])
    plain = Transformer(model.config)
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
        else:
            arrays |= save_4bit(_join(module, weights), f"{module}.weight", raw["dtype"])
    raw["quantization_config"]["llm_int8_skip_modules"] = left
    write_folder(path, raw, arrays, model.ends)


def _state(name, array, kind, nested) -> dict:
    """The fields of a quant_state, checked."""
    try:
        state = parse_json(array.tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{name} is {state!r}, expected fields")
    shape, offset = state.get("shape"), state.get("nested_offset")
    size = state.get("blocksize")
    fits = {"quant_type": state.get("quant_type") == kind, "dtype": state.get("dtype") in DTYPES,
            "blocksize": type(size) is int and size in BLOCK_SIZES,
            "shape": _possible(shape)}
    if nested:
        fits |= {"nested_blocksize": state.get("nested_blocksize") == GROUP,
                 "nested_dtype": state.get("nested_dtype") == "float32",
                 "nested_offset": type(offset) in (int, float) and abs(offset) < 1e38}
    for field in [*fits, *state]:
        if not fits.get(field):
            raise ValueError(f"{name} has {field} {state.get(field)!r}, which is not supported")
    return state


def _possible(shape) -> bool:
    """Can an array have this shape? If a size is 0, the others still have a limit."""
    return (type(shape) is list and len(shape) <= 32
            and all(type(s) is int and s >= 0 for s in shape)
            and math.prod(s or 1 for s in shape) < 2**60)


def _compute_dtype(path, raw):
    """bnb_4bit_compute_dtype from a config.json. FormatError if that is not for 4 bits."""
    config = raw.get("quantization_config") if isinstance(raw, dict) else None
    if not isinstance(config, dict):
        raise FormatError(path, f"quantization_config is {config!r}, expected bitsandbytes'")
    found = {"bnb_4bit_compute_dtype": "float32"} | config
    for field, expected in {"quant_method": ["bitsandbytes"], "load_in_4bit": [True],
                            "bnb_4bit_compute_dtype": DTYPES}.items():
        if found.get(field) not in expected:
            raise FormatError(path, f"quantization_config has {field} {found.get(field)!r}, "
                                    f"expected one of {list(expected)}")
    return found["bnb_4bit_compute_dtype"]


def _take_weights(file, arrays) -> dict[str, FourBit]:
    """The quantized weights by name. In `arrays` zeros replace them."""
    weights = {}
    for name in {key.partition(STATE)[0] for key in arrays if STATE in key}:
        try:
            weights[name] = load_4bit(arrays, name)
        except ValueError as error:
            raise FormatError(file, str(error)) from None
        if len(shape := weights[name].shape) != 2 or 0 in shape:
            raise FormatError(file, f"{name} has shape {shape}, expected (O, I)")
        for part in PARTS:
            arrays.pop(name + part, None)
        arrays[name] = turned(name, np.broadcast_to(np.float32(0), shape))
    return weights


def _quantization(layers, dtype) -> dict:
    """quantization_config for these layers of a model of this dtype."""
    for m in layers.values():
        _require_known(m.weight)
    kinds = {m.weight.codebook for m in layers.values()}
    dtypes = {str(np.dtype(m.compute_dtype or dtype)) for m in layers.values()}
    if len(kinds) != 1 or len(dtypes) != 1 or not {dtype, *dtypes} <= set(DTYPES):
        raise ValueError("the model must have quantized layers, of one codebook and compute dtype "
                         f"of {DTYPES}, got {sorted(kinds)}, {sorted({dtype, *dtypes})}")
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
            "bnb_4bit_quant_type": kinds.pop(), "bnb_4bit_compute_dtype": dtypes.pop(),
            "bnb_4bit_use_double_quant": any(m.weight.c1 is not None for m in layers.values()),
            "bnb_4bit_quant_storage": "uint8"}


def _require_known(x):
    """ValueError for what bitsandbytes cannot store in 4 bits."""
    if not isinstance(x, FourBit) or x.codebook not in KINDS:
        raise ValueError(f"the 4 bits of bitsandbytes are {KINDS}, got "
                         f"{getattr(x, 'codebook', type(x).__name__)}")
    if x.c1 is not None and x.offset is None:
        raise ValueError("bitsandbytes has no double_quant='int8': quantize with True or False")


def _split(file, module, x: FourBit, rows: list[int]) -> list[FourBit]:
    """x cut into parts of so many rows, one below the other."""
    if len(rows) == 1:
        return [x]
    I, size = x.shape[1], x.block_size
    blocks = np.cumsum([O * I // size for O in rows])[:-1]  # where the next part begins
    if any(O * I % size for O in rows):
        raise FormatError(file, f"{module}.weight {x.shape}: its {len(rows)} parts share blocks")
    if (blocks % GROUP).any():
        x = _with_plain_constants(x)
    c1 = [None] * len(rows) if x.c1 is None else np.split(x.c1, blocks // GROUP)
    return [replace(x, packed=packed, c2=c2, c1=c1, shape=(O, I)) for O, packed, c2, c1 in
            zip(rows, np.split(x.packed, blocks * (size // 2)), np.split(x.c2, blocks), c1)]


def _join(module, parts: list[FourBit]) -> FourBit:
    """The parts as one, one below the other."""
    x, (O, I) = parts[0], parts[0].shape
    if len(parts) == 1:
        return x
    if len({part.block_size for part in parts}) > 1 or O * I % x.block_size:
        raise ValueError(f"the parts of {module} need one block_size that divides {O} x {I}")
    offsets = {None if part.c1 is None else float(part.offset) for part in parts}
    if len(offsets) > 1 or x.c2.size % GROUP:
        parts = [_with_plain_constants(part) for part in parts]
    packed, c2 = (np.concatenate([to_device(a, "cpu") for a in arrays])
                  for arrays in zip(*((part.packed, part.c2) for part in parts)))
    c1 = None if parts[0].c1 is None else (
        np.concatenate([to_device(part.c1, "cpu") for part in parts]))
    return replace(parts[0], packed=packed, c2=c2, c1=c1, shape=(O * len(parts), I))


def _with_plain_constants(x):
    return replace(x, c2=x.absmax, c1=None, offset=None)
