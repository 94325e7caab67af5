"""Reverse-mode automatic differentiation: tensors, and ops that know their gradients.

A function and its gradients stand in one body. An op is a function of arrays that returns its
value and one vjp (vector-Jacobian product) per input, named after that input's gradient:

    @op
    def linear(x, W):                       # (..., I), (O, I) -> (..., O)
        def dx(dy): return dy @ W           # dL/dx = dL/dy W
        def dW(dy): return rows(dy).T @ rows(x)
        return x @ W.T, dx, dW

`@op` lifts it to Tensors and keeps only the vjps of inputs that require a gradient; a dropped vjp
frees what it closed over. So a frozen weight costs neither its gradient nor its saved input.

Rules: an op never changes its inputs. A vjp runs at most once. Scalars are Python numbers, so the
data's dtype wins. There are no second derivatives. Threads may each run a graph over the same
parameters, because all other state is thread-local.
"""

import copy
import functools
import itertools

import numpy as np

from minilm import cuda
from minilm.arrays import described, explain, is_basic, one_dtype, wide
from minilm.backend import array_module
from minilm.blas import matmul as product
from minilm.graph import (
    Node,
    after_backward,
    backward,
    no_dropout,
    no_grad,
    once,
    randomness,
    thread,
)

__all__ = ["Tensor", "after_backward", "checkpoint", "no_grad", "op"]


class Tensor:
    """An array and, if it requires a gradient, its node in the graph.

    data: a NumPy or CuPy array, or anything that np.asarray takes (floats become float32).
    requires_grad=True makes a leaf: `backward` adds into its `.grad`. TypeError for integers.

    >>> x = Tensor([3.0, 4.0], requires_grad=True)
    >>> (x * x).sum().backward()
    >>> x.grad
    array([6., 8.], dtype=float32)
    """

    __slots__ = ("data", "node")
    __array_ufunc__ = None  # array * tensor is tensor.__rmul__, not an array of objects

    def __init__(self, data, requires_grad: bool = False):
        if not isinstance(getattr(data, "dtype", None), np.dtype):
            data = np.asarray(data)
            data = data.astype(np.float32) if data.dtype.kind == "f" else data
        if requires_grad and data.dtype.kind not in "fV":  # V: bfloat16
            raise TypeError(f"only floating-point tensors have gradients, got dtype {data.dtype}")
        self.data = data
        self.node = Node(data) if requires_grad else None

    def become(self, data, requires_grad: bool | None = None):
        """Hold other data from now on, for all who share this tensor; its gradient starts anew.

        It becomes a leaf. It requires a gradient if it did before, unless requires_grad is given.
        """
        self.__init__(data, self.requires_grad if requires_grad is None else requires_grad)

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    device = property(lambda self: "cpu" if array_module(self.data) is np else "cuda")
    requires_grad = property(lambda self: self.node is not None)

    @property
    def grad(self):
        """The gradient that `backward` has added up for this leaf, an array like data, or None."""
        return self.node and self.node.grad

    @grad.setter
    def grad(self, value):
        self.node.grad = value

    @property
    def on_grad(self):
        """If this is set on a leaf, `backward` calls on_grad(gradient) and leaves .grad alone."""
        return self.node.on_grad

    @on_grad.setter
    def on_grad(self, hook):
        self.node.on_grad = hook

    def backward(self, dy=None):
        """Add d(self)/d(leaf), weighted by dy (1 for a scalar), into every leaf of the graph.

        The graph is used up: the walk drops saved arrays as it passes them. ValueError if nothing
        requires a gradient or dy does not fit. RuntimeError if it is called a second time.
        """
        if self.node is None:
            raise ValueError("backward() needs a tensor computed from one with requires_grad=True")
        if dy is None:
            if self.size != 1:
                raise ValueError(f"backward() without a gradient needs a scalar, got {self.shape}")
            dy = array_module(self.data).ones_like(self.data)
        elif getattr(dy, "shape", None) != self.shape:
            raise ValueError(f"the gradient is {described(dy)}, the tensor {described(self.data)}")
        backward(self.node, dy)

    def __repr__(self):
        made = f", from {self.node.op}" if self.node else ""
        return f"Tensor({self.data}, dtype={self.dtype}{made})"

    def __len__(self): return len(self.data)
    def __add__(self, other): return add(self, other)
    def __radd__(self, other): return add(other, self)
    def __sub__(self, other): return sub(self, other)
    def __rsub__(self, other): return sub(other, self)
    def __mul__(self, other): return mul(self, other)
    def __rmul__(self, other): return mul(other, self)
    def __truediv__(self, other): return div(self, other)
    def __rtruediv__(self, other): return div(other, self)
    def __neg__(self): return mul(self, -1.0)
    def __matmul__(self, other): return matmul(self, other)
    def __rmatmul__(self, other): return matmul(other, self)
    def __getitem__(self, index): return getitem(self, index=index)
    def reshape(self, *shape): return reshape(self, shape=shape)
    def transpose(self, *axes): return transpose(self, axes=axes)
    def sum(self, axis=None, keepdims=False): return sum_(self, axis=axis, keepdims=keepdims)
    def mean(self): return sum_(self) * (1 / self.size)


def op(fn):
    """Lift fn(*arrays, **settings) -> (y, *vjps) to Tensors; vjp i maps dL/dy to dL/d(input i).

    Tensors are given by position. What is given by name reaches fn as it is.

    >>> @op
    ... def square(x):
    ...     def dx(dy): return dy * 2 * x
    ...     return x * x, dx
    >>> x = Tensor(3.0, requires_grad=True)
    >>> square(square(x)).backward()
    >>> float(x.grad)
    108.0
    """

    @functools.wraps(fn)
    def apply(*inputs, **settings):
        arrays = [x.data if type(x) is Tensor else x for x in inputs]
        out = Tensor.__new__(Tensor)
        try:
            out.data, *vjps = fn(*arrays, **settings)
        except Exception as error:
            explain(error, fn.__name__, arrays, settings)
            raise
        out.node = None
        if thread.graph or thread.marks:
            kept = [(x.node, vjp) for x, vjp in zip(inputs, vjps) if type(x) is Tensor and x.node]
            if kept and thread.graph:
                parents, vjps = zip(*kept)
                out.node = Node(out.data, parents, vjps, fn.__name__)
            elif kept:
                out.node = Node(out.data)
        return out

    return apply


def checkpoint(segment, *inputs):
    """segment(*inputs), which keeps only the inputs: the backward pass runs the segment again.

    inputs: Tensors or plain arrays; segment returns one Tensor. Gradients equal the plain run's
    bit for bit, dropout included. They reach parameters inside the segment even if no input needs
    one. If nothing in the segment needs a gradient, it is not run again.
    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    if not thread.graph:
        return segment(*inputs)
    rng, off = copy.deepcopy(thread.rng), not thread.dropout  # to draw the same dropout again
    with no_grad(marks=True):
        y = segment(*inputs)
    if not y.node:
        return y

    @once
    def run_again(dy):
        again = [Tensor(x.data, bool(x.node)) if type(x) is Tensor else x for x in inputs]
        with randomness(rng), no_dropout(off):
            segment(*again).backward(dy)
        for x in again:
            if type(x) is Tensor and x.node and x.grad is None:  # the segment did not use it
                x.grad = array_module(x.data).zeros_like(x.data)
        return again

    needed = [i for i, x in enumerate(inputs) if type(x) is Tensor and x.node]
    parents = [inputs[i].node for i in needed]
    vjps = [lambda dy, i=i: run_again(dy)[i].grad for i in needed]
    if not needed:  # parameters inside may need one: hang the run on a leaf that nobody reads
        def run_for_parameters(dy):
            run_again(dy)
            return dy
        parents, vjps = [Node(y.data)], [run_for_parameters]
    out = Tensor(y.data)
    out.node = Node(y.data, parents, vjps, "checkpoint")
    return out


def _alike(a, b):
    """A Python float beside a bfloat16 array becomes bfloat16, as NumPy does for its own dtypes."""
    if type(b) is float and a.dtype.kind == "V":
        b = a.dtype.type(b)
    elif type(a) is float and b.dtype.kind == "V":
        a = b.dtype.type(a)
    return a, b


@op
def add(a, b):
    """a + b, broadcast as in NumPy."""
    a, b = _alike(a, b)
    return a + b, lambda dy: dy, lambda dy: dy


@op
def sub(a, b):
    a, b = _alike(a, b)
    return a - b, lambda dy: dy, lambda dy: -dy


@op
def mul(a, b):
    """a * b element by element, broadcast as in NumPy."""
    a, b = _alike(a, b)
    return a * b, lambda dy: dy * b, lambda dy: dy * a


@op
def div(a, b):
    a, b = _alike(a, b)
    return a / b, lambda dy: dy / b, lambda dy: -dy * a / (b * b)


@op
def matmul(a, b):
    """a b, summed in at least float32: (..., I, K), (..., K, J) -> (..., I, J)."""
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError(f"matmul needs at least two axes each, got shapes {a.shape} and {b.shape}")
    one_dtype("matmul", a=a, b=b)

    def da(dy): return product(dy, b.swapaxes(-1, -2))
    def db(dy): return product(a.swapaxes(-1, -2), dy)
    return product(a, b), da, db


@op
def getitem(x, index):
    shape = x.shape

    def dx(dy):
        xp = array_module(dy)
        dy = wide(dy)
        whole = xp.zeros(shape, dy.dtype)
        if is_basic(index):  # it names no element twice
            whole[index] += dy
        elif xp is not np and dy.dtype in cuda.COMPUTES:  # in a fixed order, unlike add.at
            places = xp.arange(whole.size).reshape(shape)[index].reshape(-1)
            return cuda.scatter_add(places, dy.reshape(-1, 1), whole.size).reshape(shape)
        else:
            xp.add.at(whole, index, dy)
        return whole
    return x[index], dx


@op
def reshape(x, shape):
    before = x.shape
    return x.reshape(*shape), lambda dy: dy.reshape(before)


@op
def transpose(x, axes):
    """x with its axes in the given order, or reversed if none are given."""
    axes = tuple(a % x.ndim for a in axes) or tuple(reversed(range(x.ndim)))
    inverse = tuple(axes.index(i) for i in range(x.ndim))
    return x.transpose(axes), lambda dy: dy.transpose(inverse)


@op
def concat(*xs, axis):
    """The inputs end to end along one axis. Their other axes and their dtypes must be equal."""
    one_dtype("concat", **{f"input {i}": x for i, x in enumerate(xs)})
    shapes = [x.shape for x in xs]
    axis = range(len(shapes[0]))[axis]  # IndexError if there is no such axis
    if len({s[:axis] + s[axis + 1 :] for s in shapes}) > 1 or len({len(s) for s in shapes}) > 1:
        raise ValueError(f"concat along axis {axis}: shapes {shapes} do not fit together")
    lead, ends = (slice(None),) * axis, list(itertools.accumulate(s[axis] for s in shapes))
    parts = [(*lead, slice(end - s[axis], end)) for s, end in zip(shapes, ends)]
    shape = (*shapes[0][:axis], ends[-1], *shapes[0][axis + 1 :])
    y = array_module(xs[0]).empty(shape, xs[0].dtype)
    for part, x in zip(parts, xs):
        y[part] = x
    return y, *(lambda dy, part=part: dy[part] for part in parts)


@op
def sum_(x, axis=None, keepdims=False):
    shape = x.shape

    def dx(dy):
        xp = array_module(dy)
        dy = dy if keepdims or axis is None else xp.expand_dims(dy, axis)
        return xp.broadcast_to(dy, shape)
    return wide(x).sum(axis=axis, keepdims=keepdims).astype(x.dtype, copy=False), dx
