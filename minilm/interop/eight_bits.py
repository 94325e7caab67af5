"""8-bit weights as LLM.int8() has them and bitsandbytes stores them.

A weight W (O, I) of a module M is

    M.weight         int8 (O, I)   the codes
    M.SCB            float32 (O,)  the largest magnitude of each row: W = M.weight M.SCB / 127
    M.weight_format  uint8 ()      0: the codes are in order; older files may lack it

What is an outlier is decided when the layer runs, by llm_int8_threshold of config.json. 0 there
means that nothing is one, as infinity does here.
"""

import math

import numpy as np

from minilm.backend import to_device
from minilm.quantize.int8 import Int8

PARTS = ("weight", "SCB", "weight_format")


def load_8bit(tensors: dict[str, np.ndarray], module: str) -> Int8:
    """The weight of a module, such as "model.layers.0.mlp.up_proj".

    ValueError naming the tensor that is missing, or of another size or dtype, or has a constant
    that no row can have.
    """
    checked(tensors, module)
    codes, absmax = (tensors[f"{module}.{part}"] for part in PARTS[:2])
    if not (np.isfinite(absmax) & (absmax >= 0)).all():
        raise ValueError(f"{module}.SCB has numbers that are negative or not finite")
    if (form := tensors.get(f"{module}.weight_format")) is not None and int(form.reshape(())):
        raise ValueError(f"{module}.weight_format is {int(form.reshape(()))}, expected 0, codes "
                         "in order")
    return Int8(codes, absmax[:, None])


def checked(tensors: dict, module: str) -> tuple[int, int]:
    """The weight's shape, if dtypes and sizes fit; nothing need be in memory. Else ValueError."""
    parts = {part: tensors.get(f"{module}.{part}") for part in PARTS}
    for part in PARTS[:2]:
        if parts[part] is None:
            raise ValueError(f"{module}.{part} is missing")
    shape = parts["weight"].shape
    if len(shape) != 2 or 0 in shape or parts["weight"].dtype != np.int8:
        raise ValueError(f"{module}.weight is {parts['weight'].dtype} {shape}, expected int8 "
                         "(O, I)")
    sizes = {"SCB": ("float32", shape[0]), "weight_format": ("uint8", 1)}
    for part, (dtype, size) in sizes.items():
        array = parts[part]
        if array is not None and (array.dtype.name, math.prod(array.shape)) != (dtype, size):
            raise ValueError(f"{module}.{part} is {array.dtype} {array.shape}, expected {dtype} "
                             f"({size},)")
        if part == "SCB" and array.shape != (size,):
            raise ValueError(f"{module}.SCB is {array.shape}, expected ({size},)")
    return shape


def save_8bit(x: Int8, module: str) -> dict[str, np.ndarray]:
    """The tensors of x, for `load_8bit` and bitsandbytes. ValueError unless x has a constant a row.
    """
    require_rows(x)
    return {f"{module}.weight": to_device(x.codes, "cpu"),
            f"{module}.SCB": to_device(x.absmax[:, 0], "cpu"),
            f"{module}.weight_format": np.zeros((), np.uint8)}


def require_rows(x) -> None:
    """ValueError for what is no matrix in 8 bits with a constant a row."""
    if not isinstance(x, Int8) or x.absmax.shape != (len(x.codes), 1):
        raise ValueError("the 8 bits of bitsandbytes have a constant a row, got "
                         f"{getattr(x, 'codebook', type(x).__name__)}")


def split_8bit(x: Int8, rows: list[int]) -> list[Int8]:
    """x cut into parts of so many rows, one below the other."""
    if len(rows) == 1:
        return [x]
    at = np.cumsum(rows)[:-1]
    return [Int8(codes.copy(), absmax.copy()) for codes, absmax
            in zip(np.split(x.codes, at), np.split(x.absmax, at))]


def join_8bit(parts: list[Int8]) -> Int8:
    """The parts as one, one below the other."""
    return Int8(*(np.concatenate([to_device(a, "cpu") for a in arrays])
                  for arrays in zip(*((part.codes, part.absmax) for part in parts))))
