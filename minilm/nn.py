"""Modules: objects that hold parameters and call ops.

A parameter is an attribute that is a Tensor; a submodule is an attribute that is a Module, or a
list or dict of Modules. Adaptation methods swap modules with `replace` and never subclass a model.
"""

from collections.abc import Mapping

import numpy as np

from minilm import ops
from minilm.arrays import wide
from minilm.backend import array_module, to_device
from minilm.graph import current_rng, thread
from minilm.tensor import Tensor

PIECE = 1 << 24  # elements that are looked at together


class Module:
    """Base of everything with parameters.

    tokenwise: True if each result (..., O) depends only on its own row (..., I). Generation then
    gives the module one token at a time. Each class must say so itself. If one does not, generation
    runs the whole text for each token, which is slow but right whatever the module does.
    """

    training = True
    tokenwise = False

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def children(self):
        """(name, module) of each module right below; "list.0" or "dict.k" if in a list or dict."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, (list, dict)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                yield from ((f"{name}.{k}", child) for k, child in items
                            if isinstance(child, Module))

    def named_modules(self, prefix=""):
        """(path, module) of this module, whose path is "", and of all below it."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_tensors(self):
        """(path, tensor) of every tensor once, frozen or not; a shared one by its first path."""
        seen = set()
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{prefix}.{name}" if prefix else name, value

    def named_parameters(self):
        """(path, tensor) of every tensor that requires a gradient."""
        return ((name, t) for name, t in self.named_tensors() if t.requires_grad)

    def parameters(self) -> list[Tensor]:
        """The tensors that require a gradient."""
        return [t for _, t in self.named_parameters()]

    def replace(self, path: str, module: "Module"):
        """Put `module` in the place that `path` names, such as "blocks.0.attention.q".

        ValueError if there is no module at that path.
        """
        if not path or path not in dict(self.named_modules()):
            raise ValueError(f"there is no module {path!r} to replace")
        *parents, name = path.split(".")
        place = vars(self)  # a module's attributes, or a list or dict of modules
        for part in parents:
            child = place[_key(place, part)]
            place = vars(child) if isinstance(child, Module) else child
        place[_key(place, name)] = module

    def plain(self):
        """A plain layer that computes the same: itself. Quantized and adapted layers make one."""
        return self

    def state_dict(self) -> dict:
        """path -> array, not copied; a shared tensor appears once."""
        return {name: t.data for name, t in self.named_tensors()}

    def load_state_dict(self, state: dict):
        """Copy arrays into the tensors, which keep their dtypes and devices.

        ValueError if names or shapes differ, TypeError if it is no dict of arrays of such dtypes;
        then nothing is copied.
        """
        own = dict(self.named_tensors())
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict of arrays by name, got {type(state).__name__}")
        for k, a in state.items():
            if isinstance(a, Tensor) or not hasattr(a, "shape"):
                raise TypeError(f"state must hold arrays, but {k} is a {type(a).__name__}")
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        wrong = [f"{k} is {state[k].shape}, expected {own[k].shape}"
                 for k in own.keys() & state.keys() if state[k].shape != own[k].shape]
        if missing or unexpected or wrong:
            raise ValueError(f"state does not fit: {missing=}, {unexpected=}, misshapen={wrong}")
        if wrong := [f"{k} is {state[k].dtype}, expected {t.dtype}" for k, t in own.items()
                     if not _fits(state[k].dtype, t.dtype)]:
            raise TypeError(f"state does not fit: {wrong[0]}")
        for name, t in own.items():
            t.data[...] = to_device(state[name], t.device)

    def require_finite(self):
        """ValueError if a tensor of this module or those below holds NaN or infinity."""
        for name, t in self.named_tensors():
            flat, bad = t.data.reshape(-1), 0
            for i in range(0, flat.size, PIECE):
                piece = wide(flat[i : i + PIECE])
                bad += piece.size - int(array_module(piece).isfinite(piece).sum())
            if bad:
                raise ValueError(f"{name}: {bad:,} of its {t.size:,} numbers are not finite")

    def train(self, mode: bool = True):
        """Switch dropout on (or, with False, off) in this module and all below it."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self):
        """Switch dropout off in this module and all below it."""
        return self.train(False)

    def freeze(self):
        """Make no tensor of this module and those below require a gradient any more."""
        for _, t in self.named_tensors():
            t.node = None
        return self

    def astype(self, dtype):
        """Convert every tensor. Gradients start anew, so call this before making an optimizer."""
        for value in vars(self).values():
            if isinstance(value, Tensor):  # in place: a shared tensor stays shared
                value.become(value.data.astype(dtype))
        for _, child in self.children():
            child.astype(dtype)
        return self

    def to(self, device: str):
        """Move every tensor to "cpu" or "cuda". RuntimeError says why if that is not possible."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.data = to_device(value.data, device)
        for _, child in self.children():
            child.to(device)
        return self


class Linear(Module):
    """x W^T + b, with W (O, I) as in PyTorch, drawn from N(0, std^2), and b (O,) zero."""

    tokenwise = True

    def __init__(self, inputs, outputs, rng, bias=True, std=0.02):
        self.weight = normal(rng, (outputs, inputs), std)
        self.bias = parameter(np.zeros(outputs)) if bias else None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None):
        """A layer with the given tensors."""
        layer = cls.__new__(cls)
        layer.weight, layer.bias = weight, bias
        return layer

    def forward(self, x):  # (..., I) -> (..., O)
        return ops.linear(x, self.weight, self.bias)


class Embedding(Module):
    """A table of `count` rows, looked up by integers. padding: as in ops.embedding."""

    tokenwise = True

    def __init__(self, count, width, rng, std=0.02, padding=None):
        self.weight, self.padding = normal(rng, (count, width), std), padding

    def forward(self, ids):  # (...) -> (..., C)
        return ops.embedding(ids, self.weight, padding=self.padding)


class LayerNorm(Module):
    """ops.layer_norm with a weight and a bias, (C,) each."""

    tokenwise = True

    def __init__(self, width, eps):
        self.weight, self.bias = parameter(np.ones(width)), parameter(np.zeros(width))
        self.eps = eps

    def forward(self, x):
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class RMSNorm(Module):
    """ops.rms_norm with a weight (C,), or with plus_one by 1 + weight."""

    tokenwise = True

    def __init__(self, width, eps, plus_one=False):
        self.weight = parameter(np.zeros(width) if plus_one else np.ones(width))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x):
        g = self.weight
        if self.plus_one:  # in float32 at least: in 16 bits 1 + weight would lose the weight
            g = g + array_module(g.data).ones(1, np.float32)
        return ops.rms_norm(x, g, eps=self.eps)


class Dropout(Module):
    """Dropout while training, drawn from the generator of the surrounding `randomness`."""

    tokenwise = True

    def __init__(self, p):
        self.p = p

    @property
    def acts(self) -> bool:
        """Whether anything is dropped in this thread now."""
        return self.training and self.p > 0 and thread.dropout

    def forward(self, x):
        return ops.dropout(x, self.p, current_rng()) if self.acts else x


def _fits(given, own) -> bool:
    """May numbers of the dtype `given` go into a tensor of the dtype `own`?"""
    if own.kind in "fV":  # V: bfloat16
        return given.kind in "biuf" or str(given) == "bfloat16"
    return np.can_cast(given, own, "same_kind")  # codes


def _key(place, name):
    return int(name) if isinstance(place, list) else name


def parameter(data) -> Tensor:
    """A float32 leaf that requires a gradient."""
    return Tensor(np.asarray(data, np.float32), requires_grad=True)


def normal(rng, shape, std) -> Tensor:
    """A parameter drawn from N(0, std^2); without a generator it is memory that nobody has written.
    """
    if rng is None:
        return parameter(np.empty(shape, np.float32))
    return parameter(rng.standard_normal(shape, dtype=np.float32) * np.float32(std))
