"""What a training step takes, in bytes by kind.

    with Ledger(model, optimizer) as ledger:
        optimizer.zero_grad()
        loss = ops.cross_entropy(model(tokens), targets)
        ledger.forward_done()
        loss.backward()
        optimizer.step()
    ledger.peak                     # {"weights": ..., "adapters": ..., ..., "workspace": ...}

Four kinds are there all the time, and are counted from the objects that hold them. The other two
come and go, and are measured as the growth of memory since the step began:

    activations  what is alive when the forward pass is done, kept for the backward pass
    workspace    what the highest moment takes beyond that: temporaries, gradients on their way,
                 and, with checkpoints, what is computed again

On a CPU Python's tracemalloc sees every NumPy array. It also sees Python's own objects, about
0.1 MB. On a GPU a hook of CuPy's memory pool measures. Other threads are included on a CPU; other
processes never are.
"""

import tracemalloc
from functools import partial

import numpy as np

from minilm import ops
from minilm.backend import array_module, peak_memory
from minilm.measure.step import Step
from minilm.nn import Module
from minilm.optim import AdamW
from minilm.optim.inside import Inside
from minilm.peft import (
    add_adalora,
    add_bitfit,
    add_bottleneck,
    add_dora,
    add_ia3,
    add_lora,
    add_prefix,
    add_prompt,
    add_subspace,
    subspace_of,
    train_top,
)
from minilm.peft.adapted import Adapter, adapted_layers
from minilm.quantize import quantize_model
from minilm.transformer import Transformer

KINDS = ("weights", "adapters", "gradients", "optimizer", "activations", "workspace")


class Ledger:
    """The memory that the body of a `with` takes. After it, `peak` holds the bytes by kind.

    optimizer: None for inference.
    """

    def __init__(self, model: Module, optimizer):
        self.model, self.optimizer, self.saved, self.peak = model, optimizer, 0, {}

    def __enter__(self):
        on_cpu = array_module(next(t.data for _, t in self.model.named_tensors())) is np
        self.memory = TracedMemory() if on_cpu else peak_memory()
        self.memory.__enter__()
        self.before = self.memory.held
        return self

    def forward_done(self):
        """Note that the forward pass is done: what is alive now beyond the start is activations."""
        self.saved = max(self.saved, self.memory.held - self.before)

    def __exit__(self, *error):
        grown = self.memory.bytes - self.before
        self.memory.__exit__(*error)
        self.peak = held(self.model, self.optimizer) | {
            "activations": self.saved, "workspace": grown - self.saved}


def held(model: Module, optimizer) -> dict[str, int]:
    """Bytes of what is there all the time: weights, adapters, gradients, the optimizer's states.

    optimizer: over the model's parameters, or None. If it is paged, what is on the device now
    counts. MeZO has neither gradients nor states.
    """
    flat = getattr(optimizer, "flat", None)
    masters = 0 if flat is None or flat.rounded is flat.data else flat.data.nbytes
    states = sum(a.nbytes for a in getattr(optimizer, "__dict__", {}).values()
                 if hasattr(a, "nbytes"))
    everything = sum(t.data.nbytes for _, t in model.named_tensors())
    own = {id(t) for m in adapted_layers(model).values() for _, t in m.base.named_tensors()}
    added = {id(t): t.data.nbytes for _, m in model.named_modules() if isinstance(m, Adapter)
             for _, t in m.named_tensors() if id(t) not in own}  # each once: some are nested
    adapters = sum(added.values())
    return {"weights": everything - adapters, "adapters": adapters,
            "gradients": flat.grad.nbytes if flat else 0, "optimizer": masters + states}


class TracedMemory:
    """backend.peak_memory for a CPU: bytes held now, and the most since `with` began."""

    held = property(lambda self: tracemalloc.get_traced_memory()[0])
    bytes = property(lambda self: tracemalloc.get_traced_memory()[1])

    def __enter__(self):
        self.starts = not tracemalloc.is_tracing()
        if self.starts:
            tracemalloc.start()
        tracemalloc.reset_peak()
        return self

    def __exit__(self, *error):
        if self.starts:
            tracemalloc.stop()


def measured(step: Step, make_optimizer=AdamW) -> dict[str, int]:
    """Bytes by kind at the highest moment of a training step, measured on the second step."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, step.config.vocab_size, (2, step.batch, step.T))
    model = make_model(step)
    inside = step.method == "subspace" and partial(Inside, subspace_of(model))
    optimizer = (inside or make_optimizer)(model.parameters())
    for _ in range(2):
        with Ledger(model, optimizer) as ledger:
            optimizer.zero_grad()
            loss = ops.cross_entropy(model(tokens), targets)
            ledger.forward_done()
            loss.backward()
            optimizer.step()
    return ledger.peak


def make_model(step: Step) -> Transformer:
    """A model in float32, ready to be trained as the step says."""
    model = Transformer(step.config)
    model.checkpoint_every = step.checkpoint_every
    if step.method == "qlora":
        quantize_model(model)
    ADD[step.method](model, step)
    return model.to(step.device)


def low_rank(add):
    """What puts adapters of low rank on a model as a Step says."""
    return lambda model, s: add(model, s.r, 2 * s.r, s.targets)


ADD = {
    "full": lambda model, s: model, "top": lambda model, s: train_top(model, s.k),
    "bitfit": lambda model, s: add_bitfit(model),
    "lora": low_rank(add_lora), "qlora": low_rank(add_lora), "dora": low_rank(add_dora),
    "adalora": low_rank(add_adalora),
    "ia3": lambda model, s: add_ia3(model, s.targets, [
        path for path in s.adapted if path.endswith("down")]),
    "bottleneck": lambda model, s: add_bottleneck(model, s.m, s.form, s.skip),
    "prompt": lambda model, s: add_prompt(model, s.length),
    "prefix": lambda model, s: add_prefix(model, s.length, hidden=s.prefix_hidden),
    "subspace": lambda model, s: add_subspace(model, s.d),
}
