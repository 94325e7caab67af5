"""What a training step keeps for its backward pass, method by method: the arrays that the graph
holds when the forward pass is done. Of a frozen base it is what measure/activations.py says that
the method needs, to the byte. (The peak of a whole step is in test_plan_memory.py.)"""

import numpy as np
import pytest

from minilm import ops
from minilm.measure import activations
from minilm.measure.memory import ADD, make_model
from minilm.measure.step import METHODS, Step
from minilm.quantize import quantize_model
from minilm.tensor import Tensor
from minilm.transformer import Config, Transformer

SIZES = dict(vocab_size=41, context=40, layers=3, heads=2, width=24)
CONFIGS = {
    "gpt2": Config.gpt2(**SIZES),
    "llama": Config.llama(**SIZES, hidden=44, kv_heads=1, bias=("q", "k", "v")),
    "both": Config.llama(**SIZES, hidden=44, norm_both=True, bias=("q", "o")),
    "bert": Config.bert(**SIZES, hidden=52),
}
B, T = 3, 20
families = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
steps = pytest.mark.parametrize("method, settings", [
    *((method, {}) for method in METHODS), ("top", dict(k=1)), ("top", dict(k=3)),
    *((method, dict(targets=targets)) for method in ("lora", "qlora", "dora", "adalora", "ia3")
      for targets in ("all-linear", ("k", "o"), ("mlp.up", "down"))),
    *(("bottleneck", dict(form=form, skip=skip)) for form in "HPL" for skip in (0, 1, 2)),
    ("prefix", dict(prefix_hidden=7))], ids=str)


def held(x, found, seen):
    """Put the arrays that x holds on to in found, by their id; of a view what it is a view of."""
    if id(x) in seen:
        return
    seen[id(x)] = x
    if isinstance(x, np.ndarray):
        while isinstance(x.base, np.ndarray):
            x = x.base
        found[id(x)] = x
    elif isinstance(x, (tuple, list)):
        for part in x:
            held(part, found, seen)
    elif isinstance(x, Tensor):
        held(x.data, found, seen)
    elif hasattr(x, "__closure__"):
        held([cell.cell_contents for cell in x.__closure__ or ()], found, seen)
        held(x.__defaults__ or (), found, seen)


def kept(model) -> int:
    """Bytes of the floats in a step's graph that are none of the model's."""
    tokens, targets = np.random.default_rng(0).integers(0, 41, (2, B, T))
    nodes, found, own, seen, visited = [], {}, {}, {}, set()
    nodes.append(ops.cross_entropy(model(tokens), targets).node)
    while nodes:
        node = nodes.pop()
        if id(node) not in visited:
            visited.add(id(node))
            nodes += node.parents
            held(node.vjps, found, seen)
    held([t.data for _, t in model.named_tensors()], own, {})
    return sum(a.nbytes for key, a in found.items() if key not in own and a.dtype.kind == "f")


def whatever_the_batch(model, s) -> int:
    """Bytes that do not grow with the batch: the tables of rotary positions, DoRA's ||W0 + s B A||
    and m over it, AdaLoRA's lam Q if a gradient goes on to x, and the middle of a prefix's MLP."""
    sizes = {path: t.size for path, t in model.named_parameters()}
    first = ("attention.q", "attention.k", "attention.v")
    if s.adapted.isdisjoint(first):
        first = ("mlp.up",)
    turned = not model.position and s.skip < s.config.layers - 1  # is there a gradient to turn?
    numbers = turned * s.rows * s.config.D  # cos and sin
    if s.method == "dora":
        numbers += 2 * sum(n for path, n in sizes.items() if path.endswith(".m"))
    if s.method == "adalora":
        begin = tuple(f"blocks.0.{path}" for path in first)
        numbers += sum(n for path, n in sizes.items()
                       if path.endswith(".Q") and not path.startswith(begin))
    return 4 * (numbers + s.length * (s.prefix_hidden or 0))


@families
@steps
def test_nothing_is_kept_that_the_method_does_not_need(config, method, settings):
    s = Step(config, method, B, T, **dict(r=2, m=5, length=4) | settings)
    model, needed = make_model(s), sum(op.saved for op in activations.step(s))
    assert kept(model) == needed + whatever_the_batch(model, s)


@families
@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "bottleneck", "bitfit",
                                    "prompt", "prefix"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_in_codes_keeps_no_more(config, method, kind):
    """No weight that was dequantized for the forward pass is among what is kept."""
    s = Step(config, method, B, T, r=2, m=5, length=4)
    model = quantize_model(Transformer(config), kind)
    ADD[method](model, s)
    assert kept(model) == kept(make_model(s))
