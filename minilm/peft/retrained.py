"""A layer with tensors of its own: what is trained whole beside a method, or without one.

    h = f(x; W', b')             in place of f(x; W, b), for any module f
    h = method(x, f(.; W', b'))  if the layer has a method too, such as LoRA

W' and b' start as W and b; either may also stay what it was. So this is a head or an embedding that
is trained with an adapter, and the biases of BitFit (Ben Zaken et al. 2021, arXiv:2106.10199).
The base keeps its own tensors and acts again when the adapter does not.
"""

from collections.abc import Iterable
from copy import copy

from minilm.nn import Linear, Module
from minilm.peft.adapted import (
    AdaptedLinear,
    Adapter,
    adapted_layers,
    unadapted,
    use_adapter,
    words,
)
from minilm.quantize.linear import QuantizedLinear
from minilm.tensor import Tensor


class Retrained(Adapter):
    """`layer` in its base's place; then `inner`, a method's adapter, has that for its base."""

    tokenwise = anywhere = True

    def __init__(self, layer: Module, inner: Adapter | None = None):
        self.layer, self.inner = layer, inner

    def forward(self, x, base):
        return self.inner(x, self.layer) if self.inner else self.layer(x)

    def merged(self, base):
        """A frozen layer; None if the method has none."""
        plain = self.inner.merged(self.layer) if self.inner else self.layer.plain()
        return plain and with_tensors(plain, **{name: Tensor(t.data) for name, t
                                                in vars(plain).items() if isinstance(t, Tensor)})


def retrained(layer: Module, *names: str, inner: Adapter | None = None) -> Retrained:
    """Train copies of the layer's tensors of these names, or of all that it holds itself."""
    own = {name: t for name, t in vars(layer).items() if isinstance(t, Tensor)}
    return Retrained(with_tensors(layer, **{
        name: Tensor(own[name].data.copy(), requires_grad=True) for name in names or own}), inner)


def retrain(model: Module, paths: Iterable[str], name: str = "default") -> Module:
    """Train the layers at these paths whole, beside the adapter of this name; returns the model.

    So a new head learns together with LoRA. Each layer begins as it is, with tensors of its own: a
    tied head is then no longer the embedding. A layer whose bias alone is trained, as BitFit's, is
    trained whole from now on. The adapter acts from now on. ValueError if there is none, if there
    are no paths, if one has no layer with floats for a weight or one whose weight is retrained
    already, and while an adapter is merged; the model is then as it was.

    >>> from minilm.peft import add_lora
    >>> from minilm.transformer import Config, Transformer
    >>> model = Transformer(Config.gpt2(vocab_size=50, context=16, layers=1, heads=2, width=8))
    >>> model = retrain(add_lora(model, r=1, alpha=1), ["head"])
    >>> [path for path, _ in model.named_parameters()][-1]
    'head.adapters.default.layer.weight'
    """
    paths, bases, slots = words("paths", paths), unadapted(model), adapted_layers(model)
    if not paths:
        raise ValueError("there are no paths of layers to train")
    for path in paths:
        if not isinstance(getattr(bases.get(path), "weight", None), Tensor):
            raise ValueError(f"{path} is no layer whose weight can be trained")
        own = slots[path].adapters.get(name) if path in slots else None
        if isinstance(own, Retrained) and own.layer.weight is not bases[path].weight:
            raise ValueError(f"{path} is trained whole already")
    use_adapter(model, name)
    for path in paths:
        if path not in slots:
            slots[path] = AdaptedLinear(bases[path])
            model.replace(path, slots[path])
        adapters = slots[path].adapters
        own = adapters.get(name)
        layer, inner = (own.layer, own.inner) if isinstance(own, Retrained) else (bases[path], own)
        adapters[name] = retrained(layer, inner=inner)
        slots[path].train(model.training)
    return use_adapter(model, name)


def with_tensors(layer: Module, **tensors: Tensor) -> Module:
    """A layer like this one that has these tensors, and shares all others with it."""
    if type(layer) is QuantizedLinear and "weight" in tensors:
        return Linear.of(**{"bias": layer.bias} | tensors)
    new = copy(layer)
    vars(new).update(tensors)
    return new
