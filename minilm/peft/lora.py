"""LoRA: a frozen weight plus a trained update of low rank.

Hu et al. 2021, arXiv:2106.09685, section 4.1, for W0 (O, I), A (r, I), B (O, r):

    h = W0 x + (alpha / r) B A x                                              (3)

A starts normal and B at zero, so training starts from the model as it is; W0 gets no gradient. Only
A and B are trained, r (I + O) numbers instead of I O. Kalajdzievski 2023, arXiv:2312.03732, shows
that alpha / sqrt(r) keeps the update's size at any rank (rslora).

    add_lora        put an adapter on chosen layers, and freeze everything else
    use_adapter     which of several named adapters acts, or none
    merge_lora      h = (W0 + (alpha / r) B A) x, one product again; unmerge_lora takes it back
    unload_lora     plain layers again, merged ones with their update (requantize.py: in codes)

The paper leaves open how wide A is drawn: here N(0, 1/I), so that A x is of x's size.
"""

import math

import numpy as np

from minilm.arrays import one_dtype, rows
from minilm.backend import array_module
from minilm.blas import matmul as product
from minilm.graph import once
from minilm.nn import Dropout, Linear, Module
from minilm.peft.qlora import quantized_lora
from minilm.quantize.linear import QuantizedLinear
from minilm.tensor import Tensor, op


@op
def add_low_rank(y, x, A, B, scale):  # (..., O), (..., I), (r, I), (O, r) -> (..., O)
    """y + scale x A^T B^T, for y = x W0^T: eq. (3) with rows for columns. All of one dtype."""
    one_dtype("add_low_rank", y=y, x=x, A=A, B=B)
    lead, scale = x.shape[:-1], x.dtype.type(scale)
    h = product(rows(x), A.T) * scale  # (N, r)

    @once
    def dh(dy): return product(rows(dy), B) * scale  # before A: (N, r)
    def dx(dy): return product(dh(dy), A).reshape(*lead, -1)
    def dA(dy): return product(dh(dy).T, rows(x))
    def dB(dy): return product(rows(dy).T, h)
    z = product(h, B.T)
    z += rows(y)  # eq. (3)
    return z.reshape(*lead, -1), lambda dy: dy, dx, dA, dB


class Adapter(Module):
    """One layer's A (r, I) and B (O, r), and how they act; the settings are add_lora's."""

    tokenwise = True

    def __init__(self, A, B, alpha: float, dropout: float = 0.0, rslora: bool = False):
        if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1] or not len(A):
            raise ValueError(f"A must be (r, I) and B (O, r), got {A.shape} and {B.shape}")
        if not math.isfinite(alpha) or not 0 <= dropout < 1:
            raise ValueError(f"alpha must be finite, dropout in [0, 1); got {alpha=}, {dropout=}")
        self.A, self.B = Tensor(A, requires_grad=True), Tensor(B, requires_grad=True)
        self.r, self.alpha, self.rslora, self.drop = len(A), alpha, rslora, Dropout(dropout)
        self.scale = alpha / (math.sqrt(self.r) if rslora else self.r)
        self.resting = None  # the nodes of A and B while another adapter acts

    def forward(self, y, x):
        return add_low_rank(y, self.drop(x), self.A, self.B, scale=self.scale)

    def update(self):
        """(alpha / r) B A: (O, I)."""
        return product(self.B.data, self.A.data) * self.B.dtype.type(self.scale)

    def activate(self, active: bool):
        """An adapter that does not act needs no gradients, but keeps its place in an optimizer."""
        if not active and self.A.node:
            self.resting = self.A.node, self.B.node
            self.A.node = self.B.node = None
        elif active and self.resting:
            (self.A.node, self.B.node), self.resting = self.resting, None

    def astype(self, dtype):
        """Convert A and B; gradients start anew, those of an adapter that rests included."""
        acts = self.resting is None
        self.activate(True)
        super().astype(dtype)
        self.activate(acts)
        return self


class LoRALinear(Module):
    """A frozen linear layer, plain or quantized, and its adapters by name."""

    tokenwise = True

    def __init__(self, base: Linear | QuantizedLinear):
        self.base, self.adapters, self.active, self.merged = base, {}, None, None

    def forward(self, x):
        if self.merged:
            return self.merged(x)
        adapter = self.adapters.get(self.active)
        if adapter and type(self.base) is QuantizedLinear and self._as_one(x, adapter):
            return quantized_lora(x, self.base.weight, adapter.A, adapter.B, self.base.bias,
                                  scale=adapter.scale)
        y = self.base(x)
        return adapter(y, x) if adapter else y

    def _as_one(self, x, adapter):
        """Whether base and adapter see the same x in the same dtype."""
        base, drops = self.base, adapter.drop.acts
        # `is None`, for NumPy finds its dtype of float64 equal to None
        same = base.compute_dtype is None or base.compute_dtype == x.dtype
        return same and base.threshold is None and not drops

    def use(self, name):
        """Let the adapter of this name act, if there is one here."""
        self.active = name
        for other, adapter in self.adapters.items():
            adapter.activate(other == name)

    def plain(self) -> Linear:
        """A Linear of what acts: the base's weight and the adapter's update."""
        base, adapter = self.base.plain(), self.adapters.get(self.active)
        if self.merged or not adapter:
            return self.merged or base
        update = adapter.update()
        return Linear.of(Tensor((base.weight.data + update).astype(update.dtype)), base.bias)


def add_lora(model: Module, r: int, alpha: float, targets=("q", "v"), dropout: float = 0.0,
             rslora: bool = False, name: str = "default", seed: int = 0) -> Module:
    """Freeze the model, and put an adapter of rank r on each target; returns the model.

    alpha: the update's factor is alpha / r, with rslora alpha / sqrt(r). targets: last parts of
    layers' paths, such as "q", "mlp.up" or "blocks.0.attention.q", or "all-linear" for all but the
    head. dropout: of what A sees while training. seed: of A. A second adapter needs another name;
    the newest one acts. ValueError for targets that match nothing, r < 1 or above a layer's size,
    a name that is taken, and while another adapter is merged; the model is then as it was.

    >>> from minilm.transformer import Config, Transformer
    >>> model = Transformer(Config.gpt2(vocab_size=50, context=16, layers=2, heads=2, width=8))
    >>> model = add_lora(model, r=2, alpha=4, targets=("q", "v"))
    >>> [name for name, _ in model.named_parameters()][:2]
    ['blocks.0.attention.q.adapters.default.A', 'blocks.0.attention.q.adapters.default.B']
    >>> sum(p.size for p in trainable_parameters(model))  # 2 blocks x 2 targets x r (I + O)
    128
    """
    layers = _chosen(model, targets)
    for path, layer in layers.items():
        O, I = _base(layer).weight.shape
        if not isinstance(r, (int, np.integer)) or not 1 <= r <= min(I, O):
            raise ValueError(f"r must be 1 to {min(I, O)}, the size of {path} {O, I}; got {r}")
    like = next(t.data for _, t in model.named_tensors() if t.dtype.kind in "fV")  # dtype, device
    xp, rng, adapters = array_module(like), np.random.default_rng(seed), {}
    for path, layer in layers.items():
        O, I = _base(layer).weight.shape
        A = rng.standard_normal((r, I), dtype=np.float32) / math.sqrt(I)
        A, B = (xp.asarray(a, like.dtype) for a in (A, np.zeros((O, r))))
        adapters[path] = Adapter(A, B, alpha, dropout, rslora)
    return insert_adapters(model, name, adapters)


def insert_adapters(model: Module, name: str, adapters: dict[str, Adapter]) -> Module:
    """Freeze the model, and put each adapter on the layer at its path, under one name.

    ValueError where a path has no linear layer, or one of another size, and as in add_lora.
    """
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"an adapter's name must be a word without dots, got {name!r}")
    layers = adaptable_layers(model)
    if taken := [path for path, m in lora_layers(model).items() if name in m.adapters]:
        raise ValueError(f"there is an adapter {name!r} already, on {taken[0]} and others")
    _refuse_merged(model, "adding an adapter")
    if not adapters:
        raise ValueError(f"there are no adapters to insert as {name!r}")
    for path, adapter in adapters.items():
        if path not in layers:
            raise ValueError(f"{path} is no linear layer of this model")
        has, fits = _base(layers[path]).weight.shape, (len(adapter.B.data), adapter.A.shape[1])
        if fits != has:
            raise ValueError(f"the adapter of {path} is for a weight {fits}, which is {has} here")
    use_adapter(model, None)
    model.freeze()
    for path, adapter in adapters.items():
        if type(layers[path]) is not LoRALinear:
            layers[path] = LoRALinear(layers[path])
            model.replace(path, layers[path])
        layers[path].adapters[name] = adapter
        layers[path].train(model.training)  # modules are made in training mode
    return use_adapter(model, name)


def use_adapter(model: Module, name: str | None) -> Module:
    """Let the adapter of this name act from now on, in place; None: the base alone.

    ValueError for a name that no layer has, and while an adapter is merged.
    """
    layers = lora_layers(model)
    names = {n for layer in layers.values() for n in layer.adapters}
    if name is not None and name not in names:
        raise ValueError(f"there is no adapter {name!r}, only {sorted(names)}")
    _refuse_merged(model, "another adapter can act")
    for layer in layers.values():
        layer.use(name)
    return model


def merge_lora(model: Module) -> Module:
    """Add the acting adapter's update into the weights: the same function, one product a layer.

    A quantized base is dequantized for it. The base is kept, so that unmerge_lora is exact.
    ValueError where no adapter acts or one is merged already.
    """
    _refuse_merged(model, "merging again")
    layers = [m for m in lora_layers(model).values() if m.active in m.adapters]
    if not layers:
        raise ValueError("no adapter acts on this model: there is nothing to merge")
    for layer in layers:
        layer.merged = layer.plain()
    return model


def unmerge_lora(model: Module) -> Module:
    """Undo merge_lora: the base's weights bit for bit, and the adapter beside them.

    ValueError where nothing is merged.
    """
    for layer in merged_layers(model).values():
        layer.merged = None
    return model


def unload_lora(model: Module) -> Module:
    """Replace the layers by plain ones: merged where an adapter was merged, else the base."""
    for path, layer in lora_layers(model).items():
        model.replace(path, layer.merged or layer.base)
    return model


def lora_layers(model: Module) -> dict[str, LoRALinear]:
    """path -> layer that has adapters."""
    return {path: m for path, m in model.named_modules() if type(m) is LoRALinear}


def merged_layers(model: Module) -> dict[str, LoRALinear]:
    """path -> layer whose adapter is merged; ValueError where none is."""
    layers = {path: m for path, m in lora_layers(model).items() if m.merged}
    if not layers:
        raise ValueError("nothing is merged in this model")
    return layers


def adaptable_layers(model: Module) -> dict[str, Module]:
    """path -> layer that can have adapters, or has: the linear ones, plain or quantized.

    Not the model itself, where that is one: it could not be replaced in its own place.
    """
    adapted = lora_layers(model)
    inside = tuple(f"{path}." for path in adapted)
    return {path: m for path, m in model.named_modules() if path in adapted
            or (path and type(m) in (Linear, QuantizedLinear) and not path.startswith(inside))}


def trainable_parameters(model: Module) -> list[Tensor]:
    """What an optimizer should get: after add_lora, A and B of the acting adapter."""
    return model.parameters()


def _chosen(model, targets):
    layers = adaptable_layers(model)
    if targets == "all-linear":
        layers = {path: m for path, m in layers.items() if "head" not in path.split(".")}
        if not layers:
            raise ValueError("there is no linear layer outside of the head")
        return layers
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    def fits(path, target): return f".{path}".endswith(f".{target}")
    wrong = [t for t in targets if not any(fits(path, t) for path in layers)]
    if wrong or not targets:
        names = sorted({path.rpartition(".")[2] for path in layers})
        raise ValueError(f"targets {wrong} match no layer; there are {names} and 'all-linear'")
    return {path: m for path, m in layers.items() if any(fits(path, t) for t in targets)}


def _base(layer):
    return layer.base if type(layer) is LoRALinear else layer


def _refuse_merged(model, verb):
    if any(m.merged for m in lora_layers(model).values()):
        raise ValueError(f"an adapter is merged: call unmerge_lora before {verb}")
