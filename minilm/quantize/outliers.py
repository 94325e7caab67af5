"""Outlier features: planted in a small model, found, and zeroed.

Dettmers et al. 2022, arXiv:2208.07339, sections 3 and 4. From 6.7 billion parameters on, a few
features h of the inputs of all layers are far larger than the rest. A product of 8-bit matrices is
then lost in rounding, and without these features the model is ruined, while as many others are not
missed. Small models have no such features. They can be given some without a change of what they
compute. A feature that is the same number c in every row adds W_j c to what reads it, and the
reader's bias can take that away again:

    W (x + c e_j) + (b - W_j c) = W x + b,        W_j: column j of W                  (1)

Two places have a bias whose number j reaches the reader unchanged:

    a LayerNorm in front of a branch   q, k and v, or the MLP's first layers, read its bias
    v                                  o reads its bias, since attention's weights have the sum 1

An RMSNorm has no bias, so a Llama with biases has only the second place, and one without biases
none. For scaled features (norm j times s, columns W_j / s) the function stays, too, but such a
column is lost in 8 bits even in a product of floats, since its row's largest weight sets the step.
"""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from minilm.arrays import rows, wide
from minilm.nn import LayerNorm, Linear, Module
from minilm.quantize.linear import QuantizedLinear
from minilm.ranges import AT_LEAST_0, check, whole
from minilm.tensor import Tensor
from minilm.transformer import Transformer


class Place(NamedTuple):
    """Where outliers can be planted: a bias, and the layers that read it."""

    bias: Tensor  # (n,)
    readers: dict[str, Linear]  # by their paths
    copies: np.ndarray  # (n, k): the k features of the readers' input that number j comes to


def places(model: Transformer) -> list[Place]:
    """Every place of a model where outliers can be planted.

    None of them passes through a layer that is adapted, quantized or without a bias.
    """
    found = []
    for i, block in enumerate(model.blocks):
        norms = [(block.norm1, block.attention, ("q", "k", "v"), "attention"),
                 (block.norm2, block.mlp, ("gate", "up"), "mlp")]
        for norm, branch, names, where in norms:
            readers = {f"blocks.{i}.{where}.{name}": getattr(branch, name) for name in names
                       if hasattr(branch, name)}
            if (block.norm_first and not block.norm_output and type(norm) is LayerNorm
                    and all(map(plain, readers.values()))):
                found.append(Place(norm.bias, readers, np.arange(norm.bias.size)[:, None]))
        a = block.attention
        if plain(a.v) and plain(a.o):
            D = len(a.v.weight.data) // a.kv_heads
            o = np.arange(a.heads * D).reshape(a.kv_heads, -1, D)  # K, H / K, D
            found.append(Place(a.v.bias, {f"blocks.{i}.attention.o": a.o},
                               o.transpose(0, 2, 1).reshape(a.kv_heads * D, -1)))
    return found


def plain(layer) -> bool:
    """Whether it is a Linear with a bias."""
    return type(layer) is Linear and layer.bias is not None


def plant_outliers(model: Transformer, size: float, count: int = 2,
                   seed: int = 0) -> dict[str, np.ndarray]:
    """Add `size` to `count` features at every place; the function stays, eq. (1), up to rounding.

    Returns path -> the features that are outliers now, for each layer that reads some. `seed` draws
    them. ValueError if the model has no place for them, or a place has no so many features.
    """
    check({"size": AT_LEAST_0, "count": whole(1)}, size=size, count=count)
    if not (found := places(model)):
        raise ValueError("outliers are carried by biases: this model has neither LayerNorms whose "
                         "readers have biases, nor biases of v and o")
    if (least := min(place.bias.size for place in found)) < count:
        raise ValueError(f"{count} outliers do not fit among {least} features")
    rng, planted = np.random.default_rng(seed), {}
    for place in found:
        chosen = np.sort(rng.choice(place.bias.size, count, replace=False))
        place.bias.data[chosen] += size
        for path, layer in place.readers.items():
            planted[path] = place.copies[chosen].ravel()
            W, b = layer.weight.data, layer.bias.data
            b -= size * W[:, planted[path]].sum(-1)  # eq. (1)
    return planted


def zero_features(model: Module, features: dict[str, np.ndarray]) -> Module:
    """Let each layer, by its path, see 0 in the place of these features of its input."""
    layers = dict(model.named_modules())
    for path, zeroed in features.items():
        layers[path].weight.data[:, zeroed] = 0
    return model


def other_features(model: Module, features: dict[str, np.ndarray],
                   seed: int = 0) -> dict[str, np.ndarray]:
    """path -> as many features of that layer's input, but none of these."""
    layers, rng, others = dict(model.named_modules()), np.random.default_rng(seed), {}
    for path, taken in features.items():
        left = np.setdiff1d(np.arange(layers[path].weight.shape[1]), taken)
        others[path] = np.sort(rng.choice(left, len(taken), replace=False))
    return others


class Seen:
    """What the inputs of LLM.int8()'s layers had in them."""

    def __init__(self):
        self.features, self.outliers, self.largest = 0, 0, 0.0

    @property
    def share(self) -> float:
        """The share of features in O, of the features of all calls."""
        return self.outliers / max(self.features, 1)


class Watched(Module):
    """A layer of LLM.int8() that says what it sees."""

    tokenwise = True

    def __init__(self, layer: QuantizedLinear, seen: Seen):
        self.layer, self.seen = layer, seen

    def forward(self, x):
        size = abs(wide(rows(x.data))).max(0)
        self.seen.features += size.size
        self.seen.outliers += int((size >= self.layer.threshold).sum())
        self.seen.largest = max(self.seen.largest, float(size.max()))
        return self.layer(x)


@contextmanager
def watched(model: Module):
    """Inside, every layer of LLM.int8() adds the features of its calls to the Seen that is given.
    """
    seen, layers = Seen(), {path: m for path, m in model.named_modules()
                            if type(m) is QuantizedLinear and m.threshold is not None}
    for path, layer in layers.items():
        model.replace(path, Watched(layer, seen))
    try:
        yield seen
    finally:
        for path, layer in layers.items():
            model.replace(path, layer)
