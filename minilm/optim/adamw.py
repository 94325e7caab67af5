"""Update rules, in the order of their complexity: SGD, AdamW.

AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; Kingma & Ba 2015):

    m = beta1 m + (1 - beta1) g                                    (1)
    v = beta2 v + (1 - beta2) g^2                                  (2)
    p = p - lr weight_decay p                                      (3)
    p = p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) (4)

Each rule is elementwise over flat arrays and changes them in place.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from minilm.backend import BLOCK, array_module
from minilm.optim.flat import FlatParameters


class SGD:
    """p = p - lr (g + weight_decay p)."""

    def __init__(self, params, lr: float = 1e-2, weight_decay: float = 0.0):
        self.flat, self.lr, self.weight_decay = FlatParameters(params), lr, weight_decay

    def step(self):
        self.flat.complete()
        p, g = self.flat.data, self.flat.grad
        p -= self.lr * (g + self.weight_decay * p)

    def zero_grad(self):
        self.flat.zero_grad()


class AdamW:
    """AdamW over one flat buffer; `lr` may be changed between steps.

    undecayed: those of `params` that weight decay leaves alone (usually norms and biases).
    threads: how many threads share the update.
    """

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, undecayed=(), threads: int = 1):  # fmt: skip
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"bad settings: {lr=}, {betas=}, {eps=}, {weight_decay=}")
        params, without = list(params), {id(p) for p in undecayed}
        decayed = [p for p in params if id(p) not in without]
        self.flat = FlatParameters(decayed + [p for p in params if id(p) in without])
        self.decayed = sum(p.size for p in decayed)  # elements; they come first
        self.m, self.v = self.flat.zeros(), self.flat.zeros()
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps, self.threads = 0, threads

    def step(self):
        self.flat.complete()
        self.steps += 1
        chunks = _chunks(self.decayed, self.m.size, array_module(self.m) is np)
        if self.threads == 1:
            for chunk in chunks:
                self._update(chunk)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(self._update, chunks))

    def zero_grad(self):
        self.flat.zero_grad()

    def _update(self, chunk):
        decay = self.weight_decay if chunk.stop <= self.decayed else 0.0
        f = self.flat
        adamw(f.data[chunk], f.grad[chunk], self.m[chunk], self.v[chunk], self.steps,
              self.lr, *self.betas, self.eps, decay)  # fmt: skip


def adamw(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    """Step t of AdamW on flat arrays; p, m and v change in place."""
    m *= beta1
    m += (1 - beta1) * g  # eq. (1)
    v *= beta2
    u = g * g
    u *= 1 - beta2
    v += u  # eq. (2)
    if weight_decay:
        p *= 1 - lr * weight_decay  # eq. (3)
    xp = array_module(v)
    xp.sqrt(v, out=u)
    u *= 1 / math.sqrt(1 - beta2**t)
    u += eps
    xp.divide(m, u, out=u)
    u *= lr / (1 - beta1**t)
    p -= u  # eq. (4)


def _chunks(decayed, size, on_cpu):
    """Slices that cover [0, size), none of them across the end of the decayed part."""
    n = 2 * BLOCK if on_cpu else size
    return [slice(i, min(i + n, stop)) for start, stop in ((0, decayed), (decayed, size))
            for i in range(start, stop, n)]  # fmt: skip
