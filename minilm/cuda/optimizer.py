"""Launchers of AdamW's step, and of the copy that gathers gradients for it."""

import math

import numpy as np

from minilm.arrays import one_dtype
from minilm.backend import array_module
from minilm.cuda.raw import kernel


def adamw(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay, scale=1.0):
    """minilm.optim.adamw on float32 arrays, with gradients g scale, in one pass: the same bits."""
    sizes = [a.size for a in (p, g, m, v)]
    if len(set(sizes)) > 1:
        raise ValueError(f"adamw: p, g, m and v must be of one size, got {sizes}")
    correction = math.sqrt(1 - beta2**t)
    if p.size:
        kernel("adamw.cu", "adamw")(
            (p.size // 1024 + 1,), (256,), p, g, m, v, p.size, scale, 1 - beta1, 1 - beta2,
            1 - lr * weight_decay, eps * correction, lr * correction / (1 - beta1**t))


def gather(pieces, places, flat):
    """flat[place : place + x.size] = x for each of the contiguous pieces x and its place.

    pieces: all of one dtype of COMPUTES. flat: float32. ValueError if a piece does not fit.
    """
    if not pieces:
        return
    one_dtype("gather", **{f"piece {i}": x for i, x in enumerate(pieces)})
    for x, place in zip(pieces, places, strict=True):
        if place < 0 or place + x.size > flat.size or not x.flags.c_contiguous:
            raise ValueError(f"gather: a piece of {x.size} numbers, strides {x.strides}, does not "
                             f"fit {flat.size} numbers from {place} on")
    table = np.array([(x.data.ptr, place, x.size) for x, place in zip(pieces, places)], np.int64)
    blocks = min(64, max(1, -(-int(table[:, 2].max()) // 2048)))
    kernel("gather.cu", "gather", pieces[0].dtype)(
        (blocks, len(table)), (256,), array_module(flat).asarray(table), flat)
