"""Flat memory: the parameters end to end in one buffer, their gradients in another.

An update rule is then one loop over chunks of four flat arrays. A chunk is a cache block on the
CPU, a page in a paged optimizer, a shard in ZeRO, a bucket in data parallelism.

Parameters of 16 bits have masters: float32 numbers that the update rule changes. The parameters are
the masters, rounded. Their gradients are added up in float32 too.
"""

import math
import mmap
import operator
import threading

import numpy as np

from minilm import cuda
from minilm.arrays import wide
from minilm.backend import array_module
from minilm.blas import dot
from minilm.ranges import LIMIT, check
from minilm.tensor import Tensor, after_backward

PIECE = 1 << 24  # elements


class FlatParameters:
    """Takes over the given leaves: param.data and param.grad become views of flat buffers.

    data: what the update rule changes: the parameters, or their float32 masters
    grad: the gradients, in data's dtype
    rounded: what the parameters are views of: data itself, or 16-bit numbers

    All must have one dtype and device. Gradients that are there already stay. Without one, the
    first gradient of a step overwrites its place, and later ones add to it. ValueError for an empty
    list, a parameter given twice, a frozen one, or several dtypes.
    """

    def __init__(self, params):
        self.params = leaves(params)
        if not self.params:
            raise ValueError("no parameters were given; is the whole model frozen?")
        if len({id(p) for p in self.params}) < len(self.params):
            raise ValueError("a parameter was given twice")
        if any(p.node is None or p.node.op != "leaf" for p in self.params):
            raise ValueError("every parameter must be a leaf with requires_grad=True")
        dtypes = {str(p.dtype) for p in self.params}
        if len(dtypes) > 1:
            raise ValueError(f"the parameters must share one dtype, got {sorted(dtypes)}")
        self.places, self.size = end_to_end(self.params)
        dtype = self.params[0].dtype
        self.data, self.grad = self.zeros(), self.zeros()
        self.rounded = self.data if self.data.dtype == dtype else self.zeros(dtype)
        self.waiting, self.lock = [], threading.Lock()  # (gradient, its place), for gather()
        # Which parameters have a gradient in this step; in memory that processes share.
        self.present = np.frombuffer(mmap.mmap(-1, len(self.params)), np.uint8)
        self.present[...] = 1
        self.nodes = [p.node for p in self.params]
        self.own, self.grads = self.views(self.rounded), self.views(self.grad)
        for p, place, master, data, grad in zip(self.params, self.places, self.views(self.data),
                                                self.own, self.grads):
            master[...] = wide(p.data)
            data[...] = p.data
            p.data = data
            p.on_grad = self._receiver(p, grad, place.start)
            if p.grad is not None:  # of a backward pass before
                grad[...] = p.grad
                p.grad = grad

    def zeros(self, dtype=None):
        """A new buffer like .data. On a CPU it lies in memory that processes share after a fork."""
        like = self.params[0].data
        xp, dtype = array_module(like), dtype or np.promote_types(like.dtype, np.float32)
        if xp is not np:
            return xp.zeros(self.size, dtype)
        return np.frombuffer(mmap.mmap(-1, self.size * dtype.itemsize), dtype)

    def views(self, flat):
        """Views of a flat array like .data: one for each parameter, in its shape."""
        return [flat[place].reshape(p.shape) for p, place in zip(self.params, self.places)]

    def round(self, part: slice):
        """Round the masters of a part to the 16-bit parameters; without masters, do nothing."""
        if self.rounded is not self.data:
            self.rounded[part] = self.data[part]  # converts without an array in between

    def zero_grad(self):
        """Forget the gradients; nothing is written until new ones arrive."""
        self.waiting.clear()
        for p in self.params:
            if p.node:  # an adapter that does not act has none
                p.grad = None

    def check(self):
        """ValueError if a parameter no longer trains: it would stay as it is without a word."""
        for i, (p, node, own) in enumerate(zip(self.params, self.nodes, self.own)):
            if p.node is None:
                raise ValueError(f"parameter {i} of the optimizer, {p.shape}, is frozen, or its "
                                 "adapter rests: make the optimizer after add_lora and its like, "
                                 "over what acts (use_adapter)")
            if p.node is not node or p.data is not own:
                raise ValueError(f"parameter {i} of the optimizer, {p.shape}, has been given other "
                                 "memory since (another optimizer, astype or to): make the "
                                 "optimizer after that")

    def complete(self):
        """Note which parameters have a gradient, and write zeros where none arrived, so that all
        of .grad counts. ValueError as `check` says."""
        self.check()
        self.gather()
        for i, (p, place) in enumerate(zip(self.params, self.grads)):
            grad = p.grad
            self.present[i] = grad is not None
            if grad is None:
                place[...] = 0
            elif grad is not place:  # a user's own
                place[...] = grad

    def with_gradient(self, part: slice) -> list[slice]:
        """The runs of a part whose parameters had a gradient at the last `complete`."""
        return runs(self.present, self.places, self.size, part)

    def gather(self):
        """Copy the waiting gradients to their places, all in one launch."""
        with self.lock:
            if self.waiting:
                cuda.gather(*zip(*self.waiting), self.grad)
                self.waiting.clear()

    def _receiver(self, param, view, place):
        """A function that takes in a gradient. On a GPU a small one waits until `backward` ends."""
        lock = threading.Lock()  # threads may bring gradients of one parameter at once

        def receive(dy):
            with lock:
                if param.grad is None:
                    param.grad = view
                    if _is_small(dy):
                        with self.lock:  # another thread may be gathering
                            self.waiting.append((cuda.aligned(dy), place))
                        after_backward(self.gather)
                    else:
                        view[...] = dy
                else:
                    self.gather()
                    with np.errstate(invalid="ignore"):  # inf - inf: the norm will show it
                        operator.iadd(view, dy)

        return receive


def leaves(params, name: str = "params") -> list[Tensor]:
    """The Tensors of a list or an iterator. TypeError if it is neither, or holds something else."""
    if isinstance(params, Tensor) or not hasattr(params, "__iter__"):
        raise TypeError(f"{name} must be a list of Tensors, such as model.parameters(), got "
                        f"{type(params).__name__}")
    params = list(params)
    if others := sorted({type(p).__name__ for p in params if not isinstance(p, Tensor)}):
        raise TypeError(f"{name} must be a list of Tensors, such as model.parameters(), got one "
                        f"with {', '.join(others)}")
    return params


def end_to_end(params):
    """(a slice of the flat buffers for each parameter, the size of such a buffer).

    Each slice begins at a multiple of 16 bytes, as the CUDA kernels need it. Gaps stay zero.
    """
    step, places, end = max(1, 16 // params[0].dtype.itemsize), [], 0
    for p in params:
        places.append(slice(end, end + p.size))
        end = -(-places[-1].stop // step) * step
    return places, end


def runs(present, places, size: int, part: slice) -> list[slice]:
    """The runs of a part whose parameters are present: slices of a flat buffer of this size."""
    if present.all():
        return [part]
    found, stops = [], [place.start for place in places[1:]] + [size]
    for here, place, stop in zip(present, places, stops):
        start, stop = max(place.start, part.start), min(stop, part.stop)
        if not here or start >= stop:
            continue
        if found and found[-1].stop == start:
            start = found.pop().start
        found.append(slice(start, stop))
    return found


def _is_small(dy):
    """Does copying this gradient take hardly longer than launching the copy? Adapters' do."""
    return array_module(dy) is not np and dy.dtype.itemsize == 2 and dy.size <= 1 << 20


def squares(x) -> float:
    """The sum of x^2 over a flat array, in float32 or wider. 16-bit numbers are widened by pieces.
    """
    if x.dtype.itemsize > 2:
        return dot(x, x)
    pieces = (wide(x[i : i + PIECE]) for i in range(0, x.size, PIECE))
    return float(sum(np.float32(dot(piece, piece)) for piece in pieces))


def clip_grad_norm(params: list[Tensor], max_norm: float) -> float:
    """Scale the gradients to a global L2 norm of at most max_norm; returns the norm they had.

    With max_norm=inf it only measures. ValueError if max_norm is not positive, TypeError for what
    is no list of Tensors.
    Source: Pascanu et al. 2013, arXiv:1211.5063, algorithm 1.

    >>> p = Tensor([3.0, 4.0], requires_grad=True)
    >>> (p * p).sum().backward()
    >>> clip_grad_norm([p], max_norm=5.0), p.grad.tolist()
    (10.0, [3.0, 4.0])
    """
    check({"max_norm": LIMIT}, max_norm=max_norm)
    grads = [p.grad.reshape(-1) for p in leaves(params) if p.grad is not None]
    norm = math.sqrt(sum(squares(g) for g in grads))
    if (scale := clip_scale(norm, max_norm)) < 1:
        for g in grads:
            g *= scale
    return norm


def clip_scale(norm: float, max_norm: float) -> float:
    """The factor that brings a gradient of this norm down to max_norm; 1 if it is no larger."""
    return max_norm / norm if norm > max_norm else 1.0
