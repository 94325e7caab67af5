"""4-bit weights as bitsandbytes stores them.

A weight X of n numbers in b blocks is

    X                              uint8 (n/2, 1)    the codes, the first one in the high bits
    X.quant_map                    float32 (16,)     what they stand for
    X.absmax                       float32 (b,)      the constants c2, or with double quantization
                                   uint8 (b,)        codes for them,
    X.nested_quant_map             float32 (256,)    what these stand for,
    X.nested_absmax                float32 (b/256,)  and the constants c1
    X.quant_state.bitsandbytes__*  uint8             JSON with the sizes and the offset of c2

The * is nf4 or fp4. Codes and constants are taken as they are: nothing is quantized again.

Several weights of ours may be one there, one below the other. A part must be whole blocks, or the
weight is refused. Its c2 stay 8-bit codes if it is also whole groups of 256 blocks, and, for
joining, if all parts have the same offset. Otherwise c2 become the float32 numbers that the codes
stand for: the weights are the same.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from minilm.backend import to_device
from minilm.files import FormatError
from minilm.quantize.codebooks import dynamic_map, levels
from minilm.quantize.fourbit import BLOCK_SIZES, GROUP, FourBit
from minilm.strict import parse

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
    kind, state, parts = checked(tensors, name)
    for part, array in parts.items():
        if part and not np.isfinite(array).all():  # codes may be any bits, of any dtype
            raise ValueError(f"{name}{part} has numbers that are not finite")
    for part, known in {".quant_map": levels(kind), ".nested_quant_map": dynamic_map()}.items():
        if part in parts and np.abs(parts[part] - known).max() > 1e-6:
            raise ValueError(f"{name}{part} is not bitsandbytes' map")
    nested = ".nested_absmax" in parts
    offset = np.array(state["nested_offset"], np.float32) if nested else None
    packed = parts[""].reshape(-1).view(np.uint8)  # quant_storage may name another dtype
    weight = FourBit(packed, parts[".absmax"], tuple(state["shape"]), kind, state["blocksize"],
                     parts.get(".nested_absmax"), offset)
    with np.errstate(over="ignore"):
        if not np.isfinite(weight.absmax).all():
            raise ValueError(f"{name}.absmax stands for numbers that are not finite")
    return weight


def checked(tensors: dict, name: str) -> tuple[str, dict, dict]:
    """(codebook, state, the other parts) of a weight. Nothing but the state need be in memory: of
    the parts dtypes and sizes are looked at. ValueError as for `load_4bit`."""
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
    for part, (dtype, length) in sizes.items():
        array = parts[part]
        found = array.dtype.name, array.shape
        if not part:  # quant_storage may name another dtype
            found = "uint8", (array.nbytes,)
        if found != (dtype, (length,)):
            raise ValueError(f"{name}{part} is {found[0]} {found[1]}, expected finite {dtype} "
                             f"({length},)")
    return kind, state, parts


def save_4bit(x: FourBit, name: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The tensors of x, for `load_4bit` and bitsandbytes.

    dtype: what bitsandbytes dequantizes to by default. ValueError if its format cannot express x.
    """
    require_known(x)
    state = {"quant_type": x.codebook, "blocksize": x.block_size, "dtype": dtype,
             "shape": list(x.shape)}
    parts = {"": x.packed[:, None], ".absmax": x.c2, ".quant_map": levels(x.codebook).copy()}
    if x.c1 is not None:
        parts |= {".nested_absmax": x.c1, ".nested_quant_map": dynamic_map().copy()}
        state |= {"nested_blocksize": GROUP, "nested_dtype": "float32",
                  "nested_offset": float(x.offset)}
    parts[STATE + x.codebook] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {name + part: to_device(array, "cpu") for part, array in parts.items()}


def split_4bit(file: Path, module: str, x: FourBit, rows: list[int]) -> list[FourBit]:
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


def join_4bit(module: str, parts: list[FourBit]) -> FourBit:
    """The parts as one, one below the other."""
    if len(parts) == 1:
        return parts[0]
    size, shapes = parts[0].block_size, [part.shape for part in parts]
    if {part.block_size for part in parts} != {size} or any(O * I % size for O, I in shapes):
        raise ValueError(f"the parts of {module} need one block_size that divides each of {shapes}")
    offsets = {None if part.c1 is None else float(part.offset) for part in parts}
    if len(offsets) > 1 or any(part.c2.size % GROUP for part in parts):
        parts = [_with_plain_constants(part) for part in parts]
    packed, c2 = (np.concatenate([to_device(a, "cpu") for a in arrays])
                  for arrays in zip(*((part.packed, part.c2) for part in parts)))
    c1 = None if parts[0].c1 is None else (
        np.concatenate([to_device(part.c1, "cpu") for part in parts]))
    return replace(parts[0], packed=packed, c2=c2, c1=c1,
                   shape=(sum(O for O, _ in shapes), shapes[0][1]))


def require_known(x):
    """ValueError for what bitsandbytes cannot store in 4 bits."""
    if not isinstance(x, FourBit) or x.codebook not in KINDS:
        raise ValueError(f"the 4 bits of bitsandbytes are {KINDS}, got "
                         f"{getattr(x, 'codebook', type(x).__name__)}")
    if x.c1 is not None and x.offset is None:
        raise ValueError("bitsandbytes has no double_quant='int8': quantize with True or False")


def _state(name, array, kind, nested) -> dict:
    """The fields of a quant_state, checked."""
    try:
        state = parse(array.tobytes())
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


def _with_plain_constants(x):
    return replace(x, c2=x.absmax, c1=None, offset=None)
