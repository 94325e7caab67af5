"""The graph behind the tensors, and the walk back through it.

A node says how a tensor was made: from which nodes, and with which vjps (vector-Jacobian products).
A vjp turns the gradient of the node's output into the gradient of one input. `backward` visits the
nodes from the output to the leaves and adds up the gradients that arrive at each. The settings at
the end belong to a thread: whether graphs are built, whether dropout acts, and its generator.
"""

import contextlib
import threading

import numpy as np

from minilm.arrays import column_sum, wide


class Node:
    """How a tensor was made. It holds no value: only its vjps keep arrays alive."""

    __slots__ = ("dtype", "grad", "on_grad", "op", "parents", "shape", "vjps")

    def __init__(self, like, parents=(), vjps=(), op="leaf"):
        self.shape, self.dtype = like.shape, like.dtype
        self.parents, self.vjps, self.op = parents, vjps, op
        self.grad = self.on_grad = None


_leaf_lock = threading.Lock()


def backward(root: Node, dy):
    """Add dy d(root)/d(leaf) into every leaf below root. Each vjp runs once and is then dropped."""
    try:
        _walk(root, dy)
    except BaseException:
        thread.finish.clear()  # the next walk has nothing to do with this one's hooks
        raise
    while thread.finish:
        thread.finish.pop()()


def _walk(root, dy):
    grads, sums = {root: dy}, set()
    for node in reversed(_parents_first(root)):
        dy = grads.pop(node)
        if node.op == "leaf":
            _deposit(node, dy)
            continue
        if node.vjps is None:
            raise RuntimeError(f"backward() has used up this {node.op}; run it forward again")
        vjps, node.vjps = list(node.vjps), None
        for i, parent in enumerate(node.parents):
            dx = vjps[i](dy)
            vjps[i] = None
            if dx.shape != parent.shape or dx.dtype != parent.dtype:
                dx = _unbroadcast(dx, parent)
            if parent not in grads:
                grads[parent] = dx
            elif parent in sums:  # made by this loop, so nobody else holds it
                grads[parent] += dx
            else:
                grads[parent] = grads[parent] + dx
                sums.add(parent)
        del dy, dx, vjps  # or they would stay until the next node's replace them


def _deposit(leaf, dy):
    """A leaf's gradient is final here."""
    if leaf.on_grad is not None:
        leaf.on_grad(dy)
        return
    with _leaf_lock:
        leaf.grad = dy.copy() if leaf.grad is None else leaf.grad + dy


def _parents_first(root):
    """The nodes below root in topological order, without recursion.

    What the first input was made from comes first. So a linear layer's weight, the second input,
    stands right before the layer, and the walk back deposits the weight's gradient before it goes
    on to the layer's input.
    """
    order, seen, stack = {}, set(), [root]  # a dict keeps its keys in order
    while stack:
        node = stack[-1]
        if node in seen:  # all that it was made from is in order now
            order[stack.pop()] = None
        else:
            seen.add(node)
            stack.extend(reversed(node.parents))
    return order


def _unbroadcast(dx, node):
    """dx in the shape and dtype of its input: the adjoint of broadcasting is summation."""
    if dx.shape != node.shape:
        if node.shape == dx.shape[-1:]:
            dx = column_sum(dx)
        else:
            dx = wide(dx).sum(axis=tuple(range(dx.ndim - len(node.shape))))
            stretched = tuple(i for i, n in enumerate(node.shape) if n != dx.shape[i])
            dx = dx.sum(axis=stretched, keepdims=True)
    return dx.astype(node.dtype, copy=False)


def after_backward(finish):
    """For a leaf's hook: have this thread's `backward` call finish() once, after its walk."""
    thread.finish.add(finish)


def once(fn):
    """Share work between the vjps of one op: fn(dy) runs once, and later calls get its result."""
    result = []

    def run(dy):
        if not result:
            result.append(fn(dy))
        return result[0]

    return run


class ThreadState(threading.local):
    graph = True  # are graphs being built?
    marks = False  # if graph is False: does a bare node mark what would have a gradient?
    rng = None  # the generator that dropout draws from
    dropout = True  # does dropout act at all?

    def __init__(self):
        self.finish = set()  # see after_backward


thread = ThreadState()


@contextlib.contextmanager
def no_grad(marks: bool = False):
    """Inside, this thread's ops compute values only.

    marks, for `checkpoint`: a tensor that would have a gradient gets a bare node, which keeps
    nothing.
    """
    before = thread.graph, thread.marks
    thread.graph, thread.marks = False, marks
    try:
        yield
    finally:
        thread.graph, thread.marks = before


@contextlib.contextmanager
def no_dropout(off: bool = True):
    """Inside, dropout does nothing in this thread, whatever mode its modules are in.

    off=False, for `checkpoint`: the mode of the modules decides.
    """
    before, thread.dropout = thread.dropout, not off
    try:
        yield
    finally:
        thread.dropout = before


@contextlib.contextmanager
def randomness(rng: np.random.Generator):
    """Inside, this thread's dropout draws from rng."""
    before, thread.rng = thread.rng, rng
    try:
        yield
    finally:
        thread.rng = before


def current_rng() -> np.random.Generator:
    """The generator set by `randomness`. ValueError if there is none."""
    if thread.rng is None:
        raise ValueError(
            "dropout needs a generator: run the step inside "
            "`with randomness(np.random.default_rng(seed)):`, or call model.eval()"
        )
    return thread.rng
