"""What a step of training does to the loss, beside what its gradient promises.

A step goes from the weights W to W + eta d. For gradient descent d = -g, with g = dL/dW (Cauchy
1847, Méthode générale pour la résolution des systèmes d'équations simultanées). Taylor:

    L(W + eta d) = L(W) + eta g.d + eta^2 / 2 d.H d + O(eta^3)                               (1)

so the loss falls by

    expected = -eta g.d    to first order; for gradient descent eta |g|^2                    (2)
    expected - measured = eta^2 / 2 d.H d + O(eta^3)                                         (3)

Expected and measured agree for small eta. Their difference falls as eta^2.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from minilm.arrays import wide
from minilm.nn import Module


class Seen(NamedTuple):
    """What a module gave."""

    shape: tuple[int, ...]
    rms: float  # the size of its numbers: the root of their mean square


@contextmanager
def watched(model: Module) -> Iterator[dict[str, Seen]]:
    """Inside, note what each module gives: path -> Seen, in the order in which they began.

    >>> from minilm.nn import Linear
    >>> from minilm.tensor import Tensor
    >>> layer = Linear(2, 1, np.random.default_rng(0))
    >>> layer.weight.data[...] = [[3, 4]]
    >>> with watched(layer) as seen:
    ...     y = layer(Tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> seen[""].shape, round(seen[""].rms, 3)
    ((2, 1), 3.536)
    """
    seen, modules = {}, dict(model.named_modules())

    def noting(path, forward):
        def noted(*args, **kwargs):
            seen.setdefault(path)
            y = forward(*args, **kwargs)
            seen[path] = Seen(y.shape, math.sqrt(float((wide(y.data) ** 2).mean())))
            return y
        return noted

    for path, module in modules.items():
        module.forward = noting(path, module.forward)  # in front of the class's
    try:
        yield seen
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)


class Fall(NamedTuple):
    """By how much the loss falls in a step of this size."""

    eta: float
    expected: float
    measured: float

    @property
    def ratio(self) -> float:
        """measured / expected; NaN if nothing is expected."""
        return self.measured / self.expected if self.expected else math.nan

    @property
    def bend(self) -> float:
        """(expected - measured) / eta^2: half of the curvature along d, if eta is small."""
        return (self.expected - self.measured) / self.eta**2  # eq. (3)


def falls(loss: Callable[[], float], W: np.ndarray, g: np.ndarray, d: np.ndarray,
          etas: Iterable[float]) -> list[Fall]:
    """The falls of loss() in steps from W along d, which start anew for each eta.

    W: the weights (n,), which loss() depends on; they are changed in place, and put back. g: their
    gradient (n,). For small eta use float64: a loss near 5 has steps of 5e-7 in float32.
    """
    start, before, slope = W.copy(), loss(), float(np.vdot(g, d))
    found = []
    try:
        for eta in etas:
            W[...] = start + eta * d
            found.append(Fall(eta, -eta * slope, before - loss()))  # eq. (2)
    finally:
        W[...] = start
    return found
