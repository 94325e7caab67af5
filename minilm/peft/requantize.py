"""Quantize merged weights again as their bases were, and measure how much of the update survives.

    W = dequant(codes)                   the base
    D = (alpha / r) B A                  the update
    codes' = quantize(W + D)
    D' = dequant(codes') - W             what the new codes hold of the update

An update that is small beside the gaps between codes drowns in the noise of rounding.
"""

import math
from typing import NamedTuple

import numpy as np

from minilm.arrays import wide
from minilm.nn import Module
from minilm.peft.adapted import merged_layers
from minilm.peft.lora import LoRA
from minilm.quantize.fourbit import FourBit
from minilm.quantize.linear import QuantizedLinear, quantize_weight


class Survival(NamedTuple):
    """How much of an update D the new codes hold, as D'."""

    kept: float  # <D', D> / <D, D>: 1 means all of it, 0 nothing
    error: float  # |D' - D| / |D|: above 1 there is more noise than update


def requantize_lora(model: Module) -> dict[str, Survival]:
    """Quantize merged weights as their bases are, and leave plain quantized layers. This is lossy.

    All adapters of these layers are gone. Returns what survived, by path. ValueError if nothing is
    merged, or if what is merged is not LoRA on a quantized base; the model is then as it was.
    """
    layers = merged_layers(model)
    if plain := [path for path, m in layers.items() if type(m.base) is not QuantizedLinear]:
        raise ValueError(f"the base of {plain[0]} is not quantized")
    for path, m in layers.items():
        if type(m.adapters[m.active]) is not LoRA:
            raise ValueError(f"{path} has {type(m.adapters[m.active]).__name__} merged, not LoRA")
    done = {path: _requantized(layer) for path, layer in layers.items()}
    for path, (new, _) in done.items():
        model.replace(path, new)
    return {path: survival for path, (_, survival) in done.items()}


def _requantized(layer):
    """(the merged layer, quantized as its base is; what survived)."""
    base, old, D = layer.base, layer.base.weight, wide(layer.adapters[layer.active].update())
    if isinstance(old, FourBit):
        form = "int8" if old.c2.dtype == np.int8 else old.c1 is not None
        new = quantize_weight(layer.merged.weight.data, old.codebook, form, old.block_size)
    else:
        new = quantize_weight(layer.merged.weight.data, "int8")
    found = new.dequantize() - old.dequantize()  # D'
    size, noise = float((D * D).sum()), float(((found - D) ** 2).sum())
    kept, error = (float((found * D).sum()) / size, math.sqrt(noise / size)) if size else (1.0, 0.0)
    survival = Survival(kept, error)
    return QuantizedLinear(new, base.bias, base.compute_dtype, base.threshold), survival
