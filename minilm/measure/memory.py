"""What a training step takes, in bytes by kind.

    with Ledger(model, optimizer) as ledger:
        optimizer.zero_grad()
        loss = ops.cross_entropy(model(tokens), targets)
        ledger.forward_done()
        loss.backward()
        optimizer.step()
    ledger.peak                     # {"weights": ..., "adapters": ..., ..., "workspace": ...}

Four kinds are counted from the objects that hold them, and stay. The other two come and go, and are
what memory has grown by since the step began: `activations` are alive when the forward pass is
done, kept for the backward pass; `workspace` is what the highest moment has beyond them, whenever
that is: temporaries, gradients on their way, under checkpoints also what is computed again.

On a CPU Python's tracemalloc sees every array of NumPy's; Python's own objects are among what it
sees, about 0.1 MB. On a GPU it is the hook of CuPy's memory pool. Other threads are measured on a
CPU, other processes nowhere.
"""

import tracemalloc

import numpy as np

from minilm import ops
from minilm.backend import array_module, peak_memory
from minilm.measure.plan import Step
from minilm.nn import Module
from minilm.optim import AdamW
from minilm.peft import add_lora
from minilm.peft.adapted import Adapter
from minilm.quantize import quantize_model
from minilm.transformer import Transformer

KINDS = ("weights", "adapters", "gradients", "optimizer", "activations", "workspace")


class Ledger:
    """The memory of what runs inside `with`: see above. `peak` is there afterwards."""

    def __init__(self, model: Module, optimizer):
        self.model, self.optimizer, self.saved, self.peak = model, optimizer, 0, {}

    def __enter__(self):
        on_cpu = array_module(self.optimizer.flat.data) is np
        self.memory = TracedMemory() if on_cpu else peak_memory()
        self.memory.__enter__()
        self.before = self.memory.held
        return self

    def forward_done(self):
        """What is alive now, and was not before the step, is activations."""
        self.saved = max(self.saved, self.memory.held - self.before)

    def __exit__(self, *error):
        grown = self.memory.bytes - self.before
        self.memory.__exit__(*error)
        self.peak = held(self.model, self.optimizer) | {
            "activations": self.saved, "workspace": grown - self.saved}


def held(model: Module, optimizer) -> dict[str, int]:
    """Bytes of weights, adapters, gradients and the optimizer's states: what is there all the time.

    optimizer: over the model's parameters. Of a paged one what is on the device counts now.
    """
    flat = optimizer.flat
    masters = 0 if flat.rounded is flat.data else flat.data.nbytes
    states = sum(a.nbytes for a in vars(optimizer).values() if hasattr(a, "nbytes"))
    everything = sum(t.data.nbytes for _, t in model.named_tensors())
    added = {id(t): t.data.nbytes for _, m in model.named_modules() if isinstance(m, Adapter)
             for _, t in m.named_tensors()}  # once, though adapters may hold adapters
    adapters = sum(added.values())
    return {"weights": everything - adapters, "adapters": adapters,
            "gradients": flat.grad.nbytes, "optimizer": masters + states}


class TracedMemory:
    """backend.peak_memory on a CPU: bytes held now, and the most since `with` began."""

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
    """Bytes by kind at the highest moment of a training step, the second one."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, step.config.vocab_size, (2, step.batch, step.T))
    model = make_model(step)
    optimizer = make_optimizer(model.parameters())
    for _ in range(2):
        with Ledger(model, optimizer) as ledger:
            optimizer.zero_grad()
            loss = ops.cross_entropy(model(tokens), targets)
            ledger.forward_done()
            loss.backward()
            optimizer.step()
    return ledger.peak


def make_model(step: Step) -> Transformer:
    """A model that is trained as the step says, in float32."""
    model = Transformer(step.config)
    model.checkpoint_every = step.checkpoint_every
    if step.method == "qlora":
        quantize_model(model)
    if step.method != "full":
        add_lora(model, step.r, 2 * step.r, step.targets)
    return model.to(step.device)
