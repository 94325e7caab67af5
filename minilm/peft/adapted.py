"""The slot of a model: a linear layer and its adapters, whatever their method is.

A method is a subclass of Adapter and one verb. The adapter is given its layer and computes the
layer's whole output; the verb puts such adapters on a model. All methods share what is here:

    chosen           find the layers that targets name
    insert_adapters  put adapters on layers, and freeze everything else
    use_adapter      choose which of several named adapters acts, or none
    merge            put a plain layer of the same function in each layer's place
    merges           say whether that can be done
    unmerge          undo merge, exactly
    unload           remove the adapters; what was merged stays in the weights

This method takes ten lines. It adds a trained vector to its layer's output:

    class Shift(Adapter):
        def __init__(self, O): self.s = Tensor(np.zeros(O, np.float32), requires_grad=True)
        def forward(self, x, base): return base(x) + self.s

    insert_adapters(model, "shift", {path: Shift(base.weight.shape[0])
                                     for path, base in chosen(model, ["q"]).items()})
"""

from collections.abc import Iterable

from minilm.backend import array_module
from minilm.nn import Linear, Module
from minilm.quantize.linear import QuantizedLinear
from minilm.tensor import Tensor
from minilm.transformer import Transformer

LINEAR = (Linear, QuantizedLinear)
FRONT = "front"  # where a model has what is in front of the text


class Adapter(Module):
    """The parameters that a method adds to one layer, and how they act: a base class."""

    tokenwise = False  # a method that works token by token sets it to True
    anywhere = False  # True: it fits any module, not linear layers alone
    shape = None, None  # (O, I) of the weights that it fits; None fits any size
    resting = None  # path -> node of its tensors, while another adapter acts

    def forward(self, x, base):  # (..., I) -> (..., O)
        """The layer's output for x; `base` is the layer without adapters, a module."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(x, base)")

    def merged(self, base) -> Module | None:
        """A plain layer that computes what base and adapter do; None if the method has none."""
        return None

    def activate(self, active: bool):
        """An adapter that does not act needs no gradients, but keeps its place in an optimizer.

        A tensor that several adapters share is laid to rest, and woken, by the first of them.
        """
        tensors = dict(self.named_tensors())
        if not active and self.resting is None:
            self.resting = {path: t.node for path, t in tensors.items() if t.requires_grad}
            self.freeze()
        elif active and self.resting is not None:
            for path, node in self.resting.items():
                tensors[path].node = node
            self.resting = None

    def astype(self, dtype):
        """Convert its tensors. Their gradients start again, even if the adapter does not act."""
        acts = self.resting is None
        self.activate(True)
        super().astype(dtype)
        self.activate(acts)
        return self


class AdaptedLinear(Module):
    """A frozen layer and its adapters by name.

    It is linear, plain or quantized; an adapter that fits `anywhere` may also have another module.
    """

    tokenwise = True

    def __init__(self, base: Module):
        self.base, self.adapters, self.active, self.merged = base, {}, None, None

    def forward(self, *x):  # what the base takes: of a linear layer x alone
        if self.merged:
            return self.merged(*x)
        adapter = self.adapters.get(self.active)
        return adapter(*x, self.base) if adapter else self.base(*x)

    @property
    def length(self) -> int:
        """Of model.front: how many rows are in front of the text."""
        return (self.adapters.get(self.active) or self.base).length

    def use(self, name):
        """Let the adapter of this name act, if this layer has it."""
        self.active = name
        for other, adapter in self.adapters.items():
            adapter.activate(other == name)

    def plain(self) -> Module:
        """A plain layer that does what this does. ValueError if its adapter cannot be merged."""
        adapter = self.adapters.get(self.active)
        if self.merged or not adapter:
            return self.merged or self.base.plain()
        plain = adapter.merged(self.base)
        if plain is None:
            raise ValueError(f"{type(adapter).__name__} cannot be merged: no plain layer does what "
                             "it does")
        return plain


def insert_adapters(model: Module, name: str, adapters: dict[str, Adapter]) -> Module:
    """Freeze the model, and put each adapter on the layer at its path, all under one name.

    From now on these adapters act. Rows in front of the text and adapters of layers may have one
    name, under which they act together. ValueError if a path has no linear layer or one of another
    size, if the name is taken, and while another adapter is merged; the model is then as it was.
    """
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"an adapter's name must be a word without dots, got {name!r}")
    slots, bases = adapted_layers(model), unadapted(model)
    kinds = {path == FRONT for path in adapters}
    if taken := [path for path, layer in slots.items()
                 if name in layer.adapters and (path == FRONT) in kinds]:
        raise ValueError(f"{taken[0]} already has an adapter {name!r}")
    _refuse_merged(slots, "adding an adapter")
    if not adapters:
        raise ValueError(f"there are no adapters to insert as {name!r}")
    for path, adapter in adapters.items():
        if not (type(bases.get(path)) in LINEAR or (adapter.anywhere and path in bases)):
            raise ValueError(f"{path} is no linear layer of this model")
        has = () if adapter.anywhere else bases[path].weight.shape
        if any(n not in (None, m) for n, m in zip(adapter.shape, has)):
            raise ValueError(f"the adapter of {path} is for a weight {adapter.shape}, which is "
                             f"{has} here")
    use_adapter(model, None)
    model.freeze()
    for path, adapter in adapters.items():
        if path not in slots:
            slots[path] = AdaptedLinear(bases[path])
            model.replace(path, slots[path])
        slots[path].adapters[name] = adapter
        slots[path].train(model.training)  # modules are made in training mode
    return use_adapter(model, name)


def use_adapter(model: Module, name: str | None) -> Module:
    """Let the adapter of this name act from now on; with None, the base acts alone.

    ValueError for a name that no layer has, and while an adapter is merged.
    """
    layers = adapted_layers(model)
    names = {n for layer in layers.values() for n in layer.adapters}
    if name is not None and name not in names:
        raise ValueError(f"there is no adapter {name!r}, only {sorted(names)}")
    _refuse_merged(layers, "another adapter can act")
    for layer in layers.values():
        layer.use(name)
    return model


def merge(model: Module) -> Module:
    """Merge the acting adapter into the weights: the same function, one product a layer.

    A quantized base is dequantized for this. The base is kept, so unmerge is exact. ValueError if
    no adapter acts, if it cannot be merged, or if one is merged already; the model is then as it
    was.
    """
    _refuse_merged(adapted_layers(model), "merging again")
    layers = [m for m in adapted_layers(model).values() if m.active in m.adapters]
    if not layers:
        raise ValueError("no adapter acts on this model: there is nothing to merge")
    for layer, plain in [(layer, layer.plain()) for layer in layers]:
        layer.merged = plain
    return model


def merges(model: Module) -> bool:
    """Whether `merge` can do its work: each acting adapter knows a plain layer that does its."""
    layers = [m for m in adapted_layers(model).values() if m.active in m.adapters]
    return all(type(m.adapters[m.active]).merged is not Adapter.merged for m in layers)


def unmerge(model: Module) -> Module:
    """Undo merge: the base's weights come back bit for bit, with the adapter beside them.

    ValueError if nothing is merged.
    """
    for layer in merged_layers(model).values():
        layer.merged = None
    return model


def unload(model: Module) -> Module:
    """Replace each adapted layer by its merged layer, or by its base if nothing is merged."""
    for path, layer in adapted_layers(model).items():
        model.replace(path, layer.merged or layer.base)
    return model


def adapted_layers(model: Module) -> dict[str, AdaptedLinear]:
    """path -> layer that has adapters."""
    return {path: m for path, m in model.named_modules() if type(m) is AdaptedLinear}


def merged_layers(model: Module) -> dict[str, AdaptedLinear]:
    """path -> layer whose adapter is merged; ValueError if none is."""
    layers = {path: m for path, m in adapted_layers(model).items() if m.merged}
    if not layers:
        raise ValueError("nothing is merged in this model")
    return layers


def unadapted(model: Module) -> dict[str, Module]:
    """path -> module, without what belongs to adapters; of a layer that has some, its base."""
    adapted = adapted_layers(model)
    inside = tuple(f"{path}." for path in adapted)
    return {path: m.base if path in adapted else m for path, m in model.named_modules()
            if path in adapted or (path and not path.startswith(inside))}


def adaptable_layers(model: Module) -> dict[str, Linear | QuantizedLinear]:
    """path -> linear layer that can have adapters; of a layer that has some, its base.

    A model that is itself a linear layer is left out, since it cannot replace itself.
    """
    return {path: m for path, m in unadapted(model).items() if type(m) in LINEAR}


def chosen(model: Module, targets: str | Iterable[str]) -> dict[str, Linear | QuantizedLinear]:
    """The adaptable layers that targets name.

    A target is the last part or parts of a path, such as "q", "mlp.up" or "blocks.0.attention.q".
    "all-linear" means all layers but the head. ValueError for a target that matches nothing.
    TypeError for what is no word.
    """
    layers = adaptable_layers(model)
    if targets == "all-linear":
        layers = {path: m for path, m in layers.items() if "head" not in path.split(".")}
        if not layers:
            raise ValueError("there is no linear layer outside of the head")
        return layers
    targets = words("targets", targets)
    wrong = [t for t in targets if not any(ends_with(path, t) for path in layers)]
    if wrong or not targets:
        names = sorted({path.rpartition(".")[2] for path in layers})
        raise ValueError(f"targets {wrong} match no layer; there are {names} and 'all-linear'")
    return {path: m for path, m in layers.items() if any(ends_with(path, t) for t in targets)}


def words(what: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """One word or several as a tuple. TypeError if that is not what was given."""
    several = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else given
    several = tuple(several)
    if wrong := [w for w in several if not isinstance(w, str)]:
        raise TypeError(f"{what} must be a word or several words, got {wrong[0]!r}")
    return several


def require_transformer(model):
    """TypeError for a model whose blocks lie elsewhere, such as an EncoderDecoder."""
    if not isinstance(model, Transformer):
        raise TypeError(f"this method is for a Transformer, not for {type(model).__name__}")


def ends_with(path: str, target: str) -> bool:
    """Is target the last part or parts of the path?"""
    return f".{path}".endswith(f".{target}")


def placed(model: Module, array):
    """A copy of the array in the model's dtype, on its device."""
    like = next(t.data for _, t in model.named_tensors() if t.dtype.kind in "fV")
    return array_module(like).array(array, like.dtype)


def trainable_parameters(model: Module) -> list[Tensor]:
    """model.parameters(): what an optimizer should get. After add_lora they are the adapter's."""
    return model.parameters()


def _refuse_merged(layers, verb):
    if any(layer.merged for layer in layers.values()):
        raise ValueError(f"an adapter is merged: call unmerge_lora before {verb}")
