"""Update rules, in the order of their complexity: SGD, AdamW.

AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; Kingma & Ba 2015):

    m = beta1 m + (1 - beta1) g                                    (1)
    v = beta2 v + (1 - beta2) g^2                                  (2)
    p = p - lr weight_decay p                                      (3)
    p = p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) (4)

A rule works elementwise on flat arrays and changes them in place, so any part can be updated apart
from the rest: `step()` updates all, `update(part, ...)` a slice. If the parameters have 16 bits,
the rule changes their float32 masters, and the parameters are rounded from these (see flat.py).
"""

import math

import numpy as np

from minilm import cuda
from minilm.arrays import BLOCK
from minilm.backend import array_module
from minilm.optim.flat import FlatParameters, leaves
from minilm.ranges import AT_LEAST_0, BELOW_1, FINITE, check, each

STEP = {"lr": AT_LEAST_0, "scale": FINITE}  # of a step; lr may have been changed since the last


class SGD:
    """p = p - lr (g + weight_decay p). `lr` may be changed between steps.

    ValueError for settings out of range, and whenever FlatParameters raises it.
    """

    RANGES = {"lr": AT_LEAST_0, "weight_decay": AT_LEAST_0}

    def __init__(self, params, lr: float = 1e-2, weight_decay: float = 0.0):
        check(self.RANGES, lr=lr, weight_decay=weight_decay)
        self.flat, self.lr, self.weight_decay = FlatParameters(params), lr, weight_decay
        self.steps = 0

    def step(self, scale: float = 1.0, everywhere=None):
        """Update all parameters by their gradients times scale. Those without one stay as they are.

        everywhere(t, lr, scale): calls `update` on parts that together cover everything, so that
        workers can share the step; by default there is one part. ValueError if a parameter no
        longer trains (see FlatParameters.complete), or if lr is out of its range.
        """
        check(STEP, lr=self.lr, scale=scale)
        self.flat.complete()
        self.steps += 1
        (everywhere or self.update_all)(self.steps, self.lr, scale)

    def update_all(self, t: int, lr: float, scale: float = 1.0):
        """Step t of all parameters, as one part."""
        self.update(slice(0, self.flat.size), t, lr, scale)

    def zero_grad(self):
        """Forget the gradients."""
        self.flat.zero_grad()

    def update(self, part: slice, t: int, lr: float, scale: float = 1.0):
        """Step t of a part, with gradients multiplied by scale."""
        f = self.flat
        for run in f.with_gradient(part):
            p, g = f.data[run], f.grad[run]
            p -= lr * (scale * g + self.weight_decay * p)
            f.round(run)

    def states(self) -> dict:
        """What the optimizer remembers of the gradients: nothing."""
        return {}

    def put_back(self, states: dict):
        """Go on from what states() gave."""


class AdamW:
    """AdamW over one flat buffer. `lr` may be changed between steps.

    params: leaves, whose .data and .grad become views of flat buffers (see FlatParameters).
    undecayed: those of them that have no weight decay (usually norms and biases).
    A parameter without a gradient stays as it is, and so do its m and v, as in PyTorch. But t
    counts the optimizer's steps, PyTorch's the steps in which the parameter had a gradient.
    ValueError for settings out of range, and whenever FlatParameters raises it.

    The first step moves each coordinate by lr, however large its gradient is:

    >>> from minilm.tensor import Tensor
    >>> p = Tensor([1.0, -20.0], requires_grad=True)
    >>> optimizer = AdamW([p], lr=0.5, weight_decay=0.0)
    >>> (p * p).sum().backward()
    >>> optimizer.step()
    >>> p.data.tolist()
    [0.5, -19.5]
    """

    RANGES = {"lr": AT_LEAST_0, "betas": each(BELOW_1), "eps": AT_LEAST_0,
              "weight_decay": AT_LEAST_0}

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, undecayed=()):
        check(self.RANGES, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas}")
        params, without = leaves(params), {id(p) for p in leaves(undecayed, "undecayed")}
        if foreign := without - {id(p) for p in params}:
            raise ValueError(f"{len(foreign)} of undecayed are none of the parameters")
        decayed = [p for p in params if id(p) not in without]
        self.flat = FlatParameters(decayed + [p for p in params if id(p) in without])
        places = self.flat.places[len(decayed) :]
        self.decayed = places[0].start if places else self.flat.size  # this many come first
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        self.steps = 0
        self._make_states()

    def _make_states(self):
        self.m, self.v = self.flat.zeros(), self.flat.zeros()

    step, update_all, zero_grad = SGD.step, SGD.update_all, SGD.zero_grad  # as for any rule

    def states(self) -> dict:
        """What the optimizer remembers of the gradients, by name: flat arrays."""
        return {"m": self.m, "v": self.v}

    def put_back(self, states: dict):
        """Go on from what states() gave."""
        self.m[...], self.v[...] = states["m"], states["v"]

    def update(self, part: slice, t: int, lr: float, scale: float = 1.0):
        """Step t of a part, with gradients multiplied by scale; in chunks that fit the cache."""
        f = self.flat
        for run in f.with_gradient(part):
            for chunk in chunks(run, self.decayed, array_module(self.m)):
                decay = self.weight_decay if chunk.stop <= self.decayed else 0.0
                adamw(f.data[chunk], f.grad[chunk], self.m[chunk], self.v[chunk], t, lr,
                      *self.betas, self.eps, decay, scale)
                f.round(chunk)


def plain_adamw(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    """Step t = 1, 2, ... of AdamW, as the equations say it: the new (p, m, v)."""
    m = beta1 * m + (1 - beta1) * g  # eq. (1)
    v = beta2 * v + (1 - beta2) * g * g  # eq. (2)
    p = p - lr * weight_decay * p  # eq. (3)
    return p - lr * m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps), m, v  # eq. (4)


def adamw(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay, scale=1.0):
    """Step t of AdamW on flat arrays, for gradients g * scale; p, m and v change in place.

    Two things differ from the plain form. All results go through one temporary, u. And m moves by
    (1 - beta1) (g - m), which saves a product an element; so does v. On a GPU float32 arrays go to
    kernels/adamw.cu, which gives the same bits.
    """
    xp = array_module(v)
    if xp is not np and p.dtype == np.float32:
        return cuda.adamw(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay, scale)
    if scale != 1:
        g = g * scale
    u = g - m
    u *= 1 - beta1
    m += u  # eq. (1)
    xp.multiply(g, g, out=u)
    u -= v
    u *= 1 - beta2
    v += u  # eq. (2)
    if weight_decay:
        p *= 1 - lr * weight_decay  # eq. (3)
    # Both sides of the fraction in (4) are multiplied by sqrt(1 - beta2^t): this saves a division.
    correction = math.sqrt(1 - beta2**t)
    xp.sqrt(v, out=u)
    u += eps * correction
    xp.divide(m, u, out=u)
    u *= lr * correction / (1 - beta1**t)
    p -= u  # eq. (4)


def chunks(part, decayed, xp):
    """Slices that cover a part. In each, either all elements are decayed or none."""
    n = BLOCK if xp is np else part.stop
    border = min(max(decayed, part.start), part.stop)
    sides = (part.start, border), (border, part.stop)
    return [slice(i, min(i + n, stop)) for start, stop in sides for i in range(start, stop, n)]
