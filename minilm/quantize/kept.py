"""Weights of few bits, kept as floats for a while, within a limit of memory.

A layer of few bits makes its weight again in each pass. For a batch that trains this is a small
part of the work. A model that writes makes every weight for one token, and that takes about ten
times as long as the product with it. `dequantized` keeps as many of the weights as fit:

    with dequantized(model, 200_000_000) as kept:  # bytes
        generate(model, tokens, 100)

What is kept is what `dequantize` gives, so every result has the same bits as without, with adapters
beside the codes too. All weights of one kind save the same time a byte. Kinds of different speed
are measured, and the slowest to make are kept first.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from minilm.nn import Module
from minilm.quantize.linear import QuantizedLinear
from minilm.ranges import check, whole


@contextmanager
def dequantized(model: Module, limit: int) -> Iterator[dict[str, np.ndarray]]:
    """Keep weights of the model as floats inside the `with`: {path of the layer: its weight}.

    limit: bytes that these floats may take together. Beside them one more weight exists at a time,
    as in every pass. They have the dtype in which the layer multiplies, and are read-only. After
    the `with`, also after an error in it, the model is as it was and the dict is empty. Codes must
    not change inside. Weights that are kept already, by a `with` around this one, stay so and do
    not count. ValueError for a negative limit, if no layer dequantizes its weight (LLM.int8() does
    not), and for a model that is not on the CPU: a GPU's kernels multiply the codes.
    """
    check({"limit": whole(0)}, limit=limit)
    layers = {path: m for path, m in model.named_modules()
              if type(m) is QuantizedLinear and m.threshold is None}
    if not layers:
        raise ValueError("no layer of this model dequantizes its weight: there is nothing to keep")
    like = next(t for _, t in model.named_tensors() if t.dtype.kind in "fV")
    if like.device != "cpu":
        raise ValueError("weights are kept as floats on the CPU alone, and the model is on cuda")
    kept, weights = {}, []
    try:
        for path, dtype in slowest_first(layers, like.dtype):
            weight = layers[path].weight
            size = math.prod(weight.shape) * dtype.itemsize
            if weight.floats is None and size <= limit:
                floats = weight.dequantize(dtype)
                floats.flags.writeable = False  # all passes share it
                weights.append(weight)  # first, since Ctrl-C may come at any time
                vars(weight)["floats"] = kept[path] = floats
                limit -= size
        yield kept
    finally:
        kept.clear()
        for weight in weights:
            vars(weight).pop("floats", None)


def slowest_first(layers: dict[str, QuantizedLinear], dtype) -> list:
    """(path, dtype of the products) of each layer, most seconds a byte of floats first."""
    def kind(m):
        W = m.weight
        return (type(W), getattr(W, "codebook", None), getattr(W, "block_size", None),
                np.dtype(m.compute_dtype or dtype))

    smallest = {kind(m): m for m in sorted(layers.values(),
                                           key=lambda m: -math.prod(m.weight.shape))}
    cost = {k: seconds_a_byte(m.weight, k[-1]) if len(smallest) > 1 else 0
            for k, m in smallest.items()}
    kinds = {path: kind(m) for path, m in layers.items()}
    return [(path, kinds[path][-1]) for path in sorted(kinds, key=lambda p: -cost[kinds[p]])]


def seconds_a_byte(weight, dtype, times: int = 3) -> float:
    """How long a weight is made for each byte of its floats."""
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        floats = weight.dequantize(dtype)
        best = min(best, time.perf_counter() - start)
    return best / floats.nbytes
