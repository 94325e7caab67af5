"""Keys and values of earlier rows, which attention joins with those of new ones.

Generation keeps those of all tokens so far, in buffers that are filled in place. Training may put
keys and values of its own in front (prefix tuning: Li & Liang 2021, arXiv:2101.00190). Those are
Tensors, and gradients flow through them.

A cache counts as `cache.length` tokens in front of the new ones. The first new token has that
position, and all tokens together must fit the model's context. A mask covers all keys, (B, S), the
cached ones first. Causal attention lets every new token see the whole cache. Cached keys are used
as they are: rotary positions turned those of earlier tokens before, and never turn a prefix's.

Shapes: B batch, T new tokens, P rows of a prefix, S keys in all, K key/value heads, D head width.
"""

from minilm import ops
from minilm.backend import array_module
from minilm.tensor import Tensor


class Cache:
    """One store per block. `model(tokens, cache=cache)` reads it and adds the new tokens."""

    def __init__(self, layers, length: int = 0):
        self.layers, self.length = layers, length

    @classmethod
    def empty(cls, model):
        """Buffers for up to the model's context, for generation."""
        return cls([Buffer(model.config.context) for _ in model.blocks])

    def keep(self, length: int):
        """Forget all but the first `length` tokens, also of a pass that was interrupted."""
        for layer in self.layers:
            layer.length = length
        self.length = length

    @classmethod
    def of(cls, prefix):
        """A prefix, (k, v) for each block: Tensors (B, K, P, D), or (1, K, P, D) for any batch.

        Make one for each pass: the cache grows, or is used up by a model that checkpoints; the
        Tensors themselves stay as they are. ValueError if the blocks differ in P.
        """
        layers = [Joined(k, v) for k, v in prefix]
        lengths = {x.shape[2] for layer in layers for x in (layer.k, layer.v)}
        if len(lengths) != 1:
            raise ValueError(f"a prefix must have one length in all blocks, got {sorted(lengths)}")
        return cls(layers, *lengths)


class Buffer:
    """One block's keys and values without a graph, for up to `context` tokens.

    The room grows with the text: a model may claim a context that no memory holds.
    """

    FIRST = 128  # tokens that there is room for at first

    def __init__(self, context: int):
        self.context, self.length, self.k, self.v = context, 0, None, None

    def append(self, k: Tensor, v: Tensor):  # (B, K, T, D) twice -> arrays (B, K, S, D) twice
        """Add keys and values. ValueError if they require a gradient, which would be lost."""
        if k.requires_grad or v.requires_grad:
            raise ValueError("a buffer keeps no graph: run the model inside no_grad(), or give it "
                             "Cache.of(prefix) to train")
        return self.put(k.data, v.data)

    def put(self, k, v):
        """append() for plain arrays."""
        start, self.length = self.length, self.length + k.shape[2]
        if self.k is None or self.length > self.k.shape[2]:
            self.k, self.v = self._larger(self.k, k), self._larger(self.v, v)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def _larger(self, old, new):
        """Room for old and new tokens, and for as many again, with the old ones in it."""
        B, K, _, D = new.shape
        room = min(self.context, max(self.FIRST, 2 * self.length))
        larger = array_module(new).empty((B, K, room, D), new.dtype)
        if old is not None:
            larger[:, :, : old.shape[2]] = old
        return larger


class Joined:
    """One block's keys and values as Tensors, to which later ones are joined."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v

    def append(self, k: Tensor, v: Tensor):  # (B, K, T, D) twice -> Tensors (B, K, S, D) twice
        self.k = ops.concat(for_rows(self.k, len(k)), k, axis=2)
        self.v = ops.concat(for_rows(self.v, len(v)), v, axis=2)
        return self.k, self.v


def for_rows(x: Tensor, B: int) -> Tensor:  # (1, ...) or (B, ...) -> (B, ...)
    """x for a batch of B rows; one that is alone serves them all."""
    if len(x) == 1 < B:
        return x + array_module(x.data).zeros((B,) + (1,) * (x.ndim - 1), x.dtype)
    return x
