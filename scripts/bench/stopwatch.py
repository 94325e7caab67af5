"""A stopwatch around the functions of the package, put there from outside: for profile_step.py.

Each function has a kind. A kind's time is that of its functions without those inside of them that
have a kind as well, so all kinds together are the time of the outermost one, Trainer.step. A
product's kind is its shape (rows, inner, columns). A vjp has its op's kind.
"""

import contextlib
import functools
import threading
import time
from collections import Counter

PRODUCT = "products of linear layers"
WAITING = "waiting"
OPS = {  # op -> kind
    "linear": "linear layers: biases", "attention": "attention",
    "split_heads": "attention: heads apart and together",
    "merge_heads": "attention: heads apart and together", "layer_norm": "norms",
    "gelu": "activations", "cross_entropy": "loss", "embedding": "embeddings",
    "add": "residual sums", "getitem": "other ops"}
METHODS = {  # (module, class or "", function) -> kind
    ("graph", "", "_unbroadcast"): "sums over rows: gradients of biases and gains",
    ("tensor", "", "backward"): "the walk back: Python, and sums if paths join",
    ("train", "Trainer", "_squares"): "optimizer: the gradient's norm",
    ("train", "Trainer", "_update"): "optimizer: AdamW",
    ("parallel.cores", "GradientQueue", "_wait_for"): WAITING,
    ("parallel.cores", "Workers", "_receive"): WAITING,
    ("parallel.cores", "Workers", "run"): "workers: parts out, results in",
    ("parallel.cores", "Workers", "_run"): "workers: parts out, results in",
    ("train", "Trainer", "_backward"): "Python: modules and ops forward",
    ("train", "Trainer", "step"): "Python: the trainer",
}
RECEIVED = "gradients into the flat buffer"
KINDS = tuple(dict.fromkeys([PRODUCT, *OPS.values(), RECEIVED, *METHODS.values()]))


class Clock(threading.local):
    """What a thread has spent since `switch`: kind -> seconds, and kind -> calls.

    inside: for each function that runs now, the seconds that timed functions took inside of it;
    the first number is that of `whole`.
    """

    def __init__(self):
        self.on, self.spent, self.calls, self.inside = False, Counter(), Counter(), [0.0]

    def whole(self, work) -> float:
        """Seconds of work(), which the kinds share."""
        self.spent.clear()
        self.calls.clear()
        self.inside[-1] = 0.0
        work()
        return self.inside[-1]


CLOCK = Clock()


def switch(_owner, on: bool):
    """What a worker does when asked to: start the stopwatch at zero, or stop it."""
    CLOCK.on = on
    CLOCK.spent.clear()
    CLOCK.calls.clear()


def report(_owner) -> tuple[dict, dict]:
    """What a worker does when asked to: stop, and say what was spent and how often."""
    CLOCK.on = False
    return dict(CLOCK.spent), dict(CLOCK.calls)


def timed(kind, fn):
    """fn under the stopwatch. kind: a text, or a function of fn's arguments that gives the kind."""
    def run(*args, **settings):
        if not CLOCK.on:
            return fn(*args, **settings)
        CLOCK.inside.append(0.0)
        start = time.perf_counter()
        try:
            return fn(*args, **settings)
        finally:
            took = time.perf_counter() - start
            own = took - CLOCK.inside.pop()
            CLOCK.inside[-1] += took
            key = kind if type(kind) is str else kind(*args)
            CLOCK.spent[key] += own
            CLOCK.calls[key] += 1
    return run


def shape_of(a, b, *_):
    """The kind of a product: (rows, inner, columns)."""
    return a.shape[0], a.shape[1], b.shape[1]


@contextlib.contextmanager
def around_the_package():
    """Inside, what the package does in a training step is under the stopwatch."""
    from minilm import ops, tensor
    from minilm.graph import Node
    from minilm.optim.flat import FlatParameters

    def node(like, parents=(), vjps=(), op="leaf"):
        if CLOCK.on:
            vjps = [timed(OPS.get(op, "other ops"), vjp) for vjp in vjps]
        return Node(like, parents, vjps, op)

    def receiver(flat, *args, make=FlatParameters._receiver):
        return timed(RECEIVED, make(flat, *args))

    put = [(tensor, "Node", node), (FlatParameters, "_receiver", receiver)]
    put += [(module, "product", timed(shape_of, module.product)) for module in (ops, tensor)]
    for name, kind in OPS.items():
        put += [(module, name, timed(kind, getattr(module, name))) for module in (ops, tensor)
                if hasattr(module, name)]
    for (module, of, name), kind in METHODS.items():
        place = home(module, of)
        fn = getattr(place, name)  # wraps: a pipe sends a method by its name
        put.append((place, name, functools.wraps(fn)(timed(kind, fn))))
    before = [(place, name, getattr(place, name)) for place, name, _ in put]
    for place, name, new in put:
        setattr(place, name, new)
    try:
        yield
    finally:
        for place, name, old in before:
            setattr(place, name, old)


def home(module: str, of: str):
    """The module, or a class in it."""
    import importlib

    found = importlib.import_module(f"minilm.{module}")
    return getattr(found, of) if of else found
