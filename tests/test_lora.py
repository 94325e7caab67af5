"""minilm.peft.lora: the laws of an adapter (nothing at first, merged the same, of low rank), its
gradients against PyTorch's, what a frozen base keeps in memory, several adapters by name, merging
into codes, what is refused without a trace, and adapters under checkpoints, workers, generation.
"""

import dataclasses
import itertools
import math
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from conftest import close
from hypothesis import given
from hypothesis import strategies as st
from torch_families import forward as torch_forward

from minilm import ops
from minilm.generate import generate
from minilm.nn import Linear, Module
from minilm.optim import SGD, AdamW
from minilm.peft import (
    add_lora,
    merge_lora,
    requantize_lora,
    trainable_parameters,
    unload_lora,
    unmerge_lora,
    use_adapter,
)
from minilm.peft.adapted import AdaptedLinear, adapted_layers, insert_adapters
from minilm.peft.lora import LoRA, add_low_rank
from minilm.quantize import QuantizedLinear, quantize_model
from minilm.tensor import Tensor, no_grad, randomness
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

# Python 3.12 warns of every fork in a process that has threads, as BLAS does.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

V, CONTEXT, LAYERS = 23, 8, 2
SIZES = dict(vocab_size=V, context=CONTEXT, layers=LAYERS, width=16)
CONFIGS = {
    "gpt2": Config.gpt2(**SIZES, heads=2),
    "llama": Config.llama(**SIZES, heads=4, hidden=24, kv_heads=2),
    "bert": Config.bert(**SIZES, heads=2, hidden=24),
}
families = pytest.mark.parametrize("family", CONFIGS)
bases = pytest.mark.parametrize("base", ["plain", "nf4", "int8"])
seeds = st.integers(0, 2**32 - 1)


def make(family, base="plain", dtype="float32", **changes):
    """A tiny model; noise moves every parameter from its first value."""
    model = Transformer(dataclasses.replace(CONFIGS[family], **changes))
    rng = np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += 0.3 * rng.standard_normal(t.shape, dtype=np.float32)
    model.astype(dtype)
    return (model if base == "plain" else quantize_model(model, base)).eval()


def stir(model, seed=0, size=0.3):
    """Move A and B of the acting adapter away from where they start; returns the model."""
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.data += (size * rng.standard_normal(p.shape)).astype(p.dtype)
    return model


def draw(seed=0, B=3):
    """tokens and targets: integers (B, T) each."""
    return np.random.default_rng(seed).integers(0, V, (2, B, CONTEXT))


def logits(model, seed=0):
    with no_grad():
        return model(draw(seed)[0]).data


def backward(model, tokens, targets, seed=0):
    """The loss, with dropout drawn from seed; gradients arrive in the parameters."""
    with randomness(np.random.default_rng(seed)):
        loss = ops.cross_entropy(model(tokens), targets)
    loss.backward()
    return float(loss.data)


def state(model):
    """A copy of all arrays, and who requires a gradient."""
    arrays = {name: a.copy() for name, a in model.state_dict().items()}
    return arrays, [name for name, _ in model.named_parameters()]


def equal(a, b):
    """The same bits, in arrays or in dicts of them."""
    if not isinstance(a, dict):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


def unchanged(model, before):
    now = state(model)
    return equal(now[0], before[0]) and now[1] == before[1]


class One(Module):
    """A linear layer (O, I) alone."""

    def __init__(self, I, O, base="plain", dtype="float64", seed=0):
        self.fc = Linear(I, O, np.random.default_rng(seed), std=1.0)
        self.fc.bias.data += 1
        self.astype(dtype)
        if base != "plain":
            quantize_model(self, base)

    def forward(self, x):
        return self.fc(x)


# The laws


@families
@bases
def test_a_new_adapter_changes_no_bit(family, base):
    model = make(family, base)
    before = logits(model)
    assert add_lora(model, 3, 6, targets="all-linear") is model
    assert len(adapted_layers(model)) == LAYERS * (7 if family == "llama" else 6)
    assert equal(logits(model), before)
    assert not equal(logits(stir(model)), before)


@given(seed=seeds, I=st.integers(1, 9), O=st.integers(1, 9), alpha=st.floats(0.1, 64),
       data=st.data(), rslora=st.booleans(), base=st.sampled_from(["plain", "nf4", "int8"]))
def test_forward_merge_and_rank_are_the_formulas(seed, I, O, alpha, data, rslora, base):
    """W0 x + b + scale B A x, which is (W0 + scale B A) x + b, an update of rank r."""
    r = data.draw(st.integers(1, min(I, O)))
    model, rng = One(I, O, base, seed=seed), np.random.default_rng(seed)
    W0 = model.fc.weight.data if base == "plain" else model.fc.weight.dequantize("float64")
    add_lora(model, r, alpha, targets="fc", rslora=rslora).astype("float64")
    stir(model, seed, 1.0)
    A, B = (p.data for p in model.parameters())
    update = alpha / (math.sqrt(r) if rslora else r) * B @ A
    for lead in [(), (3,), (2, 3)]:
        x = rng.standard_normal((*lead, I))
        expected = np.einsum("...i,oi->...o", x, W0 + update) + model.fc.base.bias.data
        size = abs(expected).max() + abs(update).max() * abs(x).max()
        close(model(Tensor(x)).data, expected, "float64", size)
        close(merge_lora(model)(Tensor(x)).data, expected, "float64", size)
        unmerge_lora(model)
    assert np.linalg.matrix_rank(model.fc.adapters["default"].update()) == r
    merge_lora(model)
    close(model.fc.merged.weight.data, W0 + update, "float64")


@families
@bases
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_merged_is_the_same_function_and_unmerged_the_same_bits(family, base, dtype):
    model = stir(add_lora(make(family, base, dtype), 3, 6, ("q", "v", "up", "down")))
    before, apart = state(model), logits(model)
    assert merge_lora(model) is model
    together = logits(model)
    assert not equal(together, apart)
    assert abs(together - apart).max() < (1e-4 if dtype == "float32" else 1e-12) * abs(apart).max()
    assert unmerge_lora(model) is model
    assert unchanged(model, before) and equal(logits(model), apart)
    assert equal(logits(merge_lora(model)), together)


@families
@bases
def test_unloaded_layers_are_plain(family, base):
    model = make(family, base)
    before, names = state(model)[0], list(make(family).state_dict())
    add_lora(model, 3, 6, "all-linear")
    kinds = {path: type(layer.base) for path, layer in adapted_layers(model).items()}
    plain = logits(model)
    together = logits(merge_lora(stir(model)))
    assert unload_lora(model) is model and not adapted_layers(model)
    assert equal(logits(model), together) and not equal(together, plain)
    assert list(model.state_dict()) == names
    modules = dict(model.named_modules())
    assert all(type(modules[path]) is Linear for path in kinds)
    assert type(modules["blocks.0.mlp"]) is type(make(family).blocks[0].mlp)

    model = unload_lora(stir(add_lora(make(family, base), 3, 6, "all-linear")))  # nothing merged
    modules = dict(model.named_modules())
    assert equal(model.state_dict(), before) and equal(logits(model), plain)
    assert {path: type(modules[path]) for path in kinds} == kinds


@families
@bases
@pytest.mark.parametrize("targets, layers", [
    (("q", "v"), ["attention.q", "attention.v"]),
    ("mlp.up", ["mlp.up"]),
    (["o", "mlp.down"], ["attention.o", "mlp.down"]),
])
def test_what_is_trained_is_a_and_b(family, base, targets, layers):
    """r (I + O) numbers a layer, and everything else is frozen."""
    model, r = make(family, base), 3
    shapes = {name: array.shape for name, array in make(family).state_dict().items()}
    add_lora(model, r, 6, targets)
    expected = {}
    for i, layer in itertools.product(range(LAYERS), layers):
        O, I = shapes[f"blocks.{i}.{layer}.weight"]
        expected[f"blocks.{i}.{layer}.adapters.default.A"] = (r, I)
        expected[f"blocks.{i}.{layer}.adapters.default.B"] = (O, r)
    assert {name: p.shape for name, p in model.named_parameters()} == expected
    assert [id(p) for p in trainable_parameters(model)] == [id(p) for p in model.parameters()]
    assert len(expected) == len(model.parameters())
    one_way = add_lora(make(family, base), r, 6, ["blocks.1.attention.q"])
    assert list(adapted_layers(one_way)) == ["blocks.1.attention.q"]


def test_a_starts_normal_by_its_seed_and_b_at_zero():
    def start(**settings):
        return [p.data for p in add_lora(One(400, 300, dtype="float32"), 50, 4, "fc", **settings)
                .parameters()]

    (A, B), again, other = start(), start(seed=0), start(seed=1)
    assert A.dtype == B.dtype == np.float32 and not B.any()
    assert equal(A, again[0]) and not np.isclose(A, other[0]).all()
    n = A.size
    assert abs(A.std() * math.sqrt(400) - 1) < 5 / math.sqrt(2 * n)
    assert abs(A.mean() * math.sqrt(400)) < 5 / math.sqrt(n)
    assert abs((A**4).mean() / A.var() ** 2 - 3) < 5 * math.sqrt(24 / n)  # a normal's, not a box's
    both = add_lora(make("gpt2"), 3, 6)
    A = [layer.adapters["default"].A.data for layer in adapted_layers(both).values()]
    assert not any(np.isclose(a, b).all() for a, b in itertools.combinations(A, 2))


# Gradients


def torch_gradients(model, plain, tokens, targets):
    """{path: gradient} of A and B, from PyTorch in float64 with the weights W0 + scale B A."""
    weights = {name: torch.tensor(a.astype(np.float64)) for name, a in plain.items()}
    trained = {}
    for path, layer in adapted_layers(model).items():
        adapter = layer.adapters[layer.active]
        A, B = (torch.tensor(t.data.astype(np.float64), requires_grad=True)
                for t in (adapter.A, adapter.B))
        prefix = f"{path}.adapters.{layer.active}"
        trained |= {f"{prefix}.A": A, f"{prefix}.B": B}
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + adapter.alpha / len(A) * B @ A
    y = torch_forward(model.config, weights, torch.tensor(tokens))
    loss = torch.nn.functional.cross_entropy(y.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    return loss.item(), {name: t.grad.numpy() for name, t in trained.items()}


@families
@bases
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients_are_pytorchs(family, base, dtype):
    model = make(family, base, dtype)
    plain = dict(make(family, dtype=dtype).state_dict())
    for path, m in model.named_modules():
        if type(m) is QuantizedLinear:
            plain[f"{path}.weight"] = m.weight.dequantize(dtype)
    stir(add_lora(model, 3, 6, "all-linear"), size=0.1)
    tokens, targets = draw()
    loss = backward(model, tokens, targets)
    expected, grads = torch_gradients(model, plain, tokens, targets)
    close(loss, expected, dtype)
    assert grads.keys() == dict(model.named_parameters()).keys() and len(grads) > 8 * LAYERS
    largest = max(abs(g).max() for g in grads.values())
    for name, p in model.named_parameters():
        assert p.grad.dtype == dtype
        # k's gradient is nearly nothing, a difference of large numbers.
        close(p.grad, grads[name], dtype, scale=0.1 * largest)


@given(seed=seeds)
def test_the_gradient_is_the_slope_with_dropout(seed):
    """The same mask for every step along a random direction."""
    model, (tokens, targets) = make("llama", dtype="float64", dropout=0.1), draw(seed)
    stir(add_lora(model, 3, 6, "all-linear", dropout=0.4), seed).train()
    backward(model, tokens, targets, seed)
    params, rng, h, losses = model.parameters(), np.random.default_rng(seed), 1e-6, []
    grads = [p.grad for p in params]
    direction = [rng.standard_normal(p.shape) for p in params]
    length = math.sqrt(sum((d * d).sum() for d in direction))
    for step in (h, -2 * h):
        for p, d in zip(params, direction):
            p.data = p.data + step / length * d
        losses.append(backward(model, tokens, targets, seed))
    slope = sum((g * d).sum() for g, d in zip(grads, direction)) / length
    norm = math.sqrt(sum((g * g).sum() for g in grads))
    assert abs((losses[0] - losses[1]) / (2 * h) - slope) < 1e-7 * norm


def test_dropout_is_on_the_adapters_input_alone():
    """y = W0 x + scale B A (mask x / (1 - p)), and only while training."""
    model, x = One(6, 5), np.random.default_rng(3).standard_normal((50, 6))
    stir(add_lora(model, 2, 4, "fc", dropout=0.5), size=1.0).train()
    layer, update = model.fc, model.fc.adapters["default"].update()
    with randomness(np.random.default_rng(7)):
        y = model(Tensor(x)).data
    mask = ops.dropout(Tensor(np.ones((50, 6))), 0.5, np.random.default_rng(7)).data
    assert set(mask.ravel()) == {0, 2}
    base = x @ layer.base.weight.data.T + layer.base.bias.data
    close(y, base + (mask * x) @ update.T, "float64")
    with pytest.raises(ValueError, match="dropout needs a generator"):
        model(Tensor(x))
    close(model.eval()(Tensor(x)).data, base + x @ update.T, "float64")


@pytest.mark.parametrize("training", [True, False])
def test_a_new_adapter_is_in_the_models_mode(training):
    model = make("gpt2", dropout=0.1).train(training)
    add_lora(model, 2, 4, dropout=0.5)
    add_lora(model, 2, 4, dropout=0.5, name="b")
    assert {m.training for _, m in model.named_modules()} == {training}


# Training


@families
@pytest.mark.parametrize("base", ["plain", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_fits_and_leaves_the_base_alone(family, base, dtype):
    model, (tokens, targets) = make(family, base, dtype), draw(B=2)
    frozen = state(model)[0]
    add_lora(model, 4, 8, "all-linear", dropout=0.05).train()
    started = [p.data.copy() for p in model.parameters()]
    optimizer, losses = AdamW(model.parameters(), lr=0.02), []
    for step in range(25):
        optimizer.zero_grad()
        losses.append(backward(model, tokens, targets, step))
        optimizer.step()
        if step == 0:  # no adapter is without gradient, though the embeddings are frozen
            moved = [not equal(p.data, q) for p, q in zip(model.parameters(), started)]
            assert all(moved[1::2])  # every B; A's gradient is zero while B is
    assert losses[-1] < 0.6 * losses[0]
    assert not any(equal(p.data, q) for p, q in zip(model.parameters(), started))
    trained = {id(p) for p in model.parameters()}
    others = [t for _, t in model.named_tensors() if id(t) not in trained]
    assert len(others) == len(frozen)
    assert all(t.node is None and t.grad is None for t in others)
    assert equal(unload_lora(model).state_dict(), frozen)


@pytest.mark.parametrize("make_optimizer, lr", [(SGD, 0.1), (AdamW, 0.01)])
def test_float16_trains(make_optimizer, lr):
    """AdamW too, whose eps is no float16 number: the adapters have float32 masters."""
    model, (tokens, targets) = make("llama", dtype="float16"), draw(B=2)
    add_lora(model, 4, 8, "all-linear")
    optimizer = make_optimizer(model.parameters(), lr=lr)
    assert optimizer.flat.data.dtype == np.float32
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float16)}
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(backward(model, tokens, targets))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@families
@pytest.mark.parametrize("base", ["plain", "nf4"])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpoints_give_the_same_bits(family, base, every):
    """Dropout included; the embeddings are frozen, so no checkpoint's input needs a gradient."""
    def run(every):
        model = make(family, base, dropout=0.1)
        stir(add_lora(model, 3, 6, ("q", "down"), dropout=0.3)).train()
        model.checkpoint_every = every
        loss = backward(model, *draw(), seed=5)
        return loss, {name: p.grad for name, p in model.named_parameters()}

    (loss, plain), (again, grads) = run(0), run(every)
    assert loss == again and equal(grads, plain)
    assert len(plain) == 4 * LAYERS and all(g.any() for g in plain.values())


def test_checkpoints_run_frozen_blocks_below_the_lowest_adapter_once():
    """Blocks 0 and 1 of 4, a checkpoint each, have nothing to train: their input and output need no
    gradient. The same bits come out as of the plain run, dropout included."""
    def run(every):
        model, ran = Transformer(Config.gpt2(13, 8, 4, 2, 16, dropout=0.2), seed=1), []
        stir(add_lora(model, 2, 4, ("blocks.2.attention.v", "blocks.3.mlp.up"))).train()
        model.checkpoint_every = every
        for i, block in enumerate(model.blocks):
            def forward(*args, i=i, forward=block.forward):
                ran.append(i)
                return forward(*args)
            block.forward = forward
        backward(model, *np.random.default_rng(0).integers(0, 13, (2, 3, 8)), seed=5)
        return {name: p.grad for name, p in model.named_parameters()}, ran

    (plain, once), (grads, again) = run(0), run(1)
    assert equal(grads, plain) and len(plain) == 4
    assert once == [0, 1, 2, 3] and again == [0, 1, 2, 3, 3, 2]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_workers_train_adapters(dropout):
    """Two threads and two processes give the same bits, and without dropout those of one worker
    up to rounding."""
    def train(workers, processes):
        model = stir(add_lora(make("gpt2", "nf4", "float64"), 3, 6, dropout=dropout))
        trainer = Trainer(model, AdamW(model.parameters(), lr=0.01, eps=1e-3), workers,
                          processes)
        with trainer:
            for step in range(3):
                trainer.step(step, tuple(draw(step, B=4)))
        return trainer.optimizer.flat.data

    one, threads, again, processes = (train(*way) for way in
                                      [(1, False), (2, False), (2, False), (2, True)])
    assert equal(threads, again) and equal(threads, processes)
    if dropout:
        assert not np.allclose(one, threads)
    else:
        close(threads, one, "float64")


# Memory


@pytest.mark.parametrize("base", ["plain", "nf4"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_frozen_layer_keeps_its_input_for_the_adapter_alone(base, adapted):
    model = One(6, 5, base, "float32").freeze()
    if adapted:
        add_lora(model, 2, 4, "fc")
    h = Tensor(np.ones((4, 6), np.float32), requires_grad=True)  # so that there is a graph
    x = h * 2.0
    alive = weakref.ref(x.data)
    y = model(x)
    del x
    assert y.requires_grad
    assert (alive() is not None) == adapted
    y.backward(np.ones((4, 5), np.float32))
    assert alive() is None and h.grad.shape == (4, 6)


@pytest.mark.parametrize("base, settings, dropout, op", [
    ("nf4", {}, 0.0, "quantized_lora"),
    ("int8", {"compute_dtype": np.dtype("float32")}, 0.0, "quantized_lora"),
    ("nf4", {"compute_dtype": np.dtype("float64")}, 0.0, "add_low_rank"),
    ("llm.int8", {}, 0.0, "add_low_rank"),
    ("nf4", {}, 0.5, "add_low_rank"),
    ("plain", {}, 0.0, "add_low_rank"),
])  # fmt: skip
def test_codes_and_update_are_one_op_where_they_see_the_same_x(base, settings, dropout, op):
    """Dropout counts in training mode alone."""
    model = One(6, 5, "plain", "float32")
    if base != "plain":
        quantize_model(model, base, **settings)
    add_lora(model, 2, 4, "fc", dropout)
    x = Tensor(np.ones((4, 6), np.float32))
    with randomness(np.random.default_rng(0)):
        assert model(x).node.op == op
    assert model.eval()(x).node.op == ("quantized_lora" if dropout else op)


def test_the_update_keeps_its_input_and_not_what_it_is_added_to():
    h, A, B = (Tensor(np.ones(s), requires_grad=True) for s in [(4, 5), (2, 5), (5, 2)])
    y, x = h * 2.0, h * 3.0
    alive = [weakref.ref(t.data) for t in (y, x)]
    z = add_low_rank(y, x, A, B, scale=0.5)
    del y, x
    assert [a() is not None for a in alive] == [False, True]
    z.backward(np.ones((4, 5)))
    assert alive[1]() is None and (h.grad == 2 + 3 * 5 * 0.5 * 2).all()


def kept(layers, trained=None, base="plain"):
    """Bytes that the graph of a model's loss holds, with adapters from block `trained` on, or in
    training of the whole model; and which blocks' inputs are in the graph."""
    model, seen = make("gpt2", base, layers=layers), []
    if trained is not None:
        add_lora(model, 2, 4, [f"blocks.{i}.attention.q" for i in range(trained, layers)])
    for i, block in enumerate(model.blocks):
        def spy(x, *args, i=i, forward=block.forward):
            seen.append((i, x.requires_grad))
            return forward(x, *args)
        block.forward = spy
    tokens, targets = draw(B=64)
    ops.cross_entropy(model(tokens), targets)  # fills the caches
    seen.clear()
    tracemalloc.start()
    try:
        loss = ops.cross_entropy(model(tokens), targets)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert loss.requires_grad
    return held, [i for i, needs in seen if needs]


@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_below_the_lowest_adapter_nothing_is_kept(base):
    """Memory after the forward pass does not grow with the blocks below, and does with others."""
    activation = 64 * CONTEXT * 16 * 4  # bytes of one (B, T, C)
    (few, none), (many, below) = (kept(layers, layers - 1, base) for layers in (1, 4))
    assert none == below == []
    assert abs(many - few) < 0.1 * activation
    everywhere, above = kept(4, 0, base)
    assert above == [1, 2, 3]
    assert everywhere - few > 3 * 8 * activation


def test_a_frozen_base_keeps_less_than_a_trained_one():
    """The MLP's frozen layers keep neither input: C and 4 C numbers a token and block."""
    activation = 64 * CONTEXT * 16 * 4
    (adapted, _), (trained, _) = kept(3, 0), kept(3)
    assert trained - adapted > 3 * 4 * activation


# Several adapters


def two(family="gpt2", base="plain", dtype="float32"):
    """A model with adapters a (q, v; rank 3) and b (v, up; rank 2), both moved; b acts."""
    model = stir(add_lora(make(family, base, dtype), 3, 6, name="a"), 1)
    return stir(add_lora(model, 2, 5, ("v", "mlp.up"), rslora=True, name="b"), 2)


@families
@bases
def test_each_name_is_an_adapter_of_its_own(family, base):
    plain = logits(make(family, base))
    a = logits(stir(add_lora(make(family, base), 3, 6, name="a"), 1))
    b = stir(add_lora(make(family, base), 2, 5, ("v", "mlp.up"), rslora=True, name="b"), 2)
    b, model = logits(b), two(family, base)
    assert equal(logits(model), b)  # the newest acts
    arrays = state(model)[0]
    for name, expected in [("a", a), ("b", b), (None, plain), ("a", a), ("a", a), (None, plain),
                           ("b", b)]:
        assert use_adapter(model, name) is model
        assert equal(logits(model), expected)
        assert equal(state(model)[0], arrays)
        names = {n.split(".adapters.")[1].split(".")[0] for n, _ in model.named_parameters()}
        assert names == ({name} if name else set())
        assert len(model.parameters()) == (4 * LAYERS if name else 0)
    assert not equal(a, b) and not equal(a, plain) and not equal(b, plain)


@pytest.mark.parametrize("name, layers", [("a", ["q", "v"]), ("b", ["v", "up"])])
def test_the_acting_adapter_is_the_one_that_is_merged(name, layers):
    model = use_adapter(two(), name)
    apart = logits(model)
    close(logits(merge_lora(model)), apart, "float32")
    merged = {path.split(".")[-1] for path, m in adapted_layers(model).items() if m.merged}
    assert merged == set(layers)
    unload_lora(unmerge_lora(model))
    assert equal(logits(model), logits(make("gpt2")))


def test_an_optimizer_goes_on_with_its_adapter():
    """Switching away and back loses neither its parameters nor its buffers."""
    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            backward(model, *draw(step))
            optimizer.step()

    straight = stir(add_lora(make("gpt2"), 3, 6, name="a"), 1)
    optimizer = AdamW(straight.parameters(), lr=0.01)
    train(straight, optimizer, range(4))

    model = stir(add_lora(make("gpt2"), 3, 6, name="a"), 1)
    first = AdamW(model.parameters(), lr=0.01)
    params = model.parameters()
    train(model, first, range(2))
    held = first.flat.data.copy()
    stir(add_lora(model, 2, 5, ("v", "mlp.up"), name="b"), 2)
    second = AdamW(model.parameters(), lr=0.01)
    train(model, second, range(3))
    assert equal(first.flat.data, held)
    use_adapter(model, None)
    use_adapter(model, "a")
    assert [id(p) for p in model.parameters()] == [id(p) for p in params]
    train(model, first, range(2, 4))
    assert all(np.shares_memory(p.grad, first.flat.grad) for p in params)
    assert equal(first.flat.data, optimizer.flat.data) and not equal(first.flat.data, held)
    assert equal(logits(model), logits(straight))


def test_a_resting_adapter_changes_its_dtype_too():
    model = two().astype("float64")
    assert all(".adapters.b." in name for name, _ in model.named_parameters())  # a rests on
    for name in "ab":
        use_adapter(model, name)
        backward(model, *draw())
        assert {p.grad.dtype for p in model.parameters()} == {np.dtype("float64")}
    use_adapter(use_adapter(model, "a").astype("float32"), "b")
    assert {p.node.dtype for p in model.parameters()} == {np.dtype("float32")}


# Merging into codes


def requantized(kind, size, dtype="float32", double_quant=True):
    """(what survived of an update of about `size` times the weights, model, base's codes)."""
    model = make("gpt2", dtype=dtype)
    quantize_model(model, kind, double_quant, compute_dtype="float64")
    before = {path: m for path, m in model.named_modules() if type(m) is QuantizedLinear}
    add_lora(model, 4, 4, ("q", "mlp.up"))
    rng = np.random.default_rng(0)
    for p in model.parameters():
        p.data = (math.sqrt(size) * 0.4 * rng.standard_normal(p.shape)).astype(dtype)
    add_lora(model, 2, 4, "q", name="other")
    use_adapter(model, "default")
    return requantize_lora(merge_lora(model)), model, before


def test_a_large_update_survives_8_bits():
    kept, model, before = requantized("int8", 1.0)
    assert list(kept) == [f"blocks.{i}.{name}" for i in range(LAYERS)
                          for name in ("attention.q", "mlp.up")]
    for survival in kept.values():
        assert abs(survival.kept - 1) < 0.01 and 0 < survival.error < 0.02
    modules = dict(model.named_modules())
    for path, base in before.items():
        assert type(modules[path]) is QuantizedLinear
        assert (modules[path] is base) == (path not in kept)
        assert modules[path].bias is base.bias is not None
        assert modules[path].compute_dtype == "float64"
    assert not adapted_layers(model) and not model.parameters()


@pytest.mark.parametrize("kind", ["nf4", "int2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_tiny_update_is_lost_between_few_codes(kind, dtype):
    for survival in requantized(kind, 1e-3, dtype)[0].values():
        assert abs(survival.kept) < 0.5 and survival.error > 0.8


@pytest.mark.parametrize("kind, double_quant", [
    ("nf4", True), ("nf4", False), ("nf4", "int8"), ("int4", True), ("int8", True),
    ("llm.int8", True),
])
def test_what_survives_is_measured_on_the_codes(kind, double_quant):
    """The same numbers from the weights before and after; the form of the base stays."""
    reports, model, before = requantized(kind, 0.1, double_quant=double_quant)
    modules = dict(model.named_modules())
    twin = quantize_model(make("gpt2"), kind, double_quant)
    stirred = add_lora(twin, 4, 4, ("q", "mlp.up"))
    rng = np.random.default_rng(0)
    for p in stirred.parameters():
        p.data = (math.sqrt(0.1) * 0.4 * rng.standard_normal(p.shape)).astype(np.float32)
    for path, layer in adapted_layers(twin).items():
        old, new = before[path].weight, modules[path].weight
        D = layer.adapters["default"].B.data @ layer.adapters["default"].A.data
        found = new.dequantize() - old.dequantize()
        kept, noise = (found * D).sum() / (D * D).sum(), np.linalg.norm(found - D)
        assert abs(reports[path].kept - kept) < 1e-4
        assert abs(reports[path].error - noise / np.linalg.norm(D)) < 1e-4
        assert modules[path].arrays == before[path].arrays
        assert modules[path].threshold == before[path].threshold
        for name in before[path].arrays:
            a, b = getattr(before[path], name), getattr(modules[path], name)
            assert (a.dtype, a.shape) == (b.dtype, b.shape)


def test_the_size_of_a_float16_update_does_not_vanish():
    """Squares below 6e-8 are zeros in float16; all of this update is lost, and that is said."""
    kept, _, _ = requantized("int8", 1e-4, "float16")
    assert all(s.kept != 1 and s.error > 0.5 for s in kept.values())


def test_no_update_loses_nothing():
    model = merge_lora(add_lora(quantize_model(make("gpt2"), "int8"), 2, 4))
    assert set(requantize_lora(model).values()) == {(1.0, 0.0)}


def test_codes_need_a_base_of_codes_and_finite_weights():
    model = stir(add_lora(make("gpt2"), 2, 4))
    with pytest.raises(ValueError, match="nothing is merged"):
        requantize_lora(model)
    before, merged = state(merge_lora(model)), logits(model)
    with pytest.raises(ValueError, match=r"base of blocks\.0\.attention\.q is not quantized"):
        requantize_lora(model)
    assert unchanged(model, before) and equal(logits(model), merged)

    model = stir(add_lora(make("gpt2", "nf4"), 2, 4))
    model.parameters()[-1].data[0, 0] = np.inf  # in the last layer: the first ones are fine
    with np.errstate(invalid="ignore"):
        merge_lora(model)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="finite"):
        requantize_lora(model)
    assert dict(model.named_modules()) == modules


# What is refused


def adapter(O, I, r=2):
    return LoRA(np.ones((r, I), np.float32), np.ones((O, r), np.float32), 4)


REFUSED = {
    "targets: none of one": (dict(targets="w"), ["['w']", "'q'", "all-linear"]),
    "targets: none of several": (dict(targets=("q", "nope")), ["['nope']", "'q'"]),
    "targets: half a name": (dict(targets=("p",)), ["['p']"]),
    "targets: a block": (dict(targets=("blocks.0",)), ["['blocks.0']"]),
    "targets: empty": (dict(targets=()), ["'q'"]),
    "targets: an empty name": (dict(targets=("",)), ["['']"]),
    "r: 0": (dict(r=0), ["1 to 16", "got 0"]),
    "r: negative": (dict(r=-1), ["1 to 16", "got -1"]),
    "r: above the size": (dict(r=17), ["1 to 16", "blocks.0.attention.q", "(16, 16)", "got 17"]),
    "r: above a side": (dict(r=17, targets="up"), ["1 to 16", "mlp.up", "(64, 16)", "got 17"]),
    "r: a fraction": (dict(r=2.5), ["1 to 16", "got 2.5"]),
    "r: nan": (dict(r=math.nan), ["1 to 16", "got nan"]),
    "r: a string": (dict(r="4"), ["1 to 16", "got '4'"]),
    "alpha: nan": (dict(alpha=math.nan), ["alpha", "nan"]),
    "alpha: inf": (dict(alpha=math.inf), ["alpha", "inf"]),
    "dropout: 1": (dict(dropout=1.0), ["dropout", "at least 0 and below 1", "1.0"]),
    "dropout: negative": (dict(dropout=-0.1), ["dropout", "at least 0 and below 1", "-0.1"]),
    "dropout: nan": (dict(dropout=math.nan), ["dropout", "at least 0 and below 1", "nan"]),
    "name: empty": (dict(name=""), ["name", "''"]),
    "name: a path": (dict(name="a.b"), ["name", "'a.b'"]),
    "name: a number": (dict(name=3), ["name", "3"]),
    "name: taken": (dict(name="first"), ["'first'", "already", "blocks.0.attention.q"]),
    "name: taken elsewhere": (dict(name="first", targets="o"), ["'first'", "already"]),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_adapter_leaves_no_trace(case, first):
    """On a model that trains an adapter already, and on one that trains everything."""
    settings, given = REFUSED[case]
    if "taken" in case and not first:
        first, settings = True, settings | dict(r=np.int64(2))
    model = make("gpt2", dropout=0.1).train()
    if first:
        stir(add_lora(model, 2, 4, name="first"))
    refuses(model, lambda: add_lora(model, **dict(r=2, alpha=4) | settings), given)


@pytest.mark.parametrize("acting", ["a", "b", None])
def test_a_name_is_taken_whoever_acts(acting):
    model = use_adapter(two(), acting)
    refuses(model, lambda: add_lora(model, 2, 4, "o", name="a"), ["'a'", "already"])


def refuses(model, act, given):
    """ValueError that says what was given; and the model's arrays, what of it is trained, its
    modules and its logits are what they were."""
    before, modules = state(model), {k: id(m) for k, m in model.named_modules()}
    mode = [m.training for _, m in model.named_modules()]
    with randomness(np.random.default_rng(0)):
        values = logits(model)
    with pytest.raises(ValueError) as error:
        act()
    assert all(part in str(error.value) for part in given), str(error.value)
    assert unchanged(model, before)
    assert {k: id(m) for k, m in model.named_modules()} == modules
    assert [m.training for _, m in model.named_modules()] == mode
    with randomness(np.random.default_rng(0)):
        assert equal(logits(model), values)


@pytest.mark.parametrize("adapters, given", [
    ({}, ["no adapters", "'new'"]),
    ({"blocks.0.attention.q": adapter(16, 16), "blocks.9.attention.q": adapter(16, 16)},
     ["blocks.9.attention.q", "no linear layer"]),
    ({"blocks.0.attention.q": adapter(16, 16), "blocks.1.mlp": adapter(16, 16)},
     ["blocks.1.mlp", "no linear layer"]),
    ({"blocks.0.attention.q.base": adapter(16, 16)}, ["q.base", "no linear layer"]),
    ({"": adapter(16, 16)}, ["no linear layer"]),
    ({"blocks.0.attention.q": adapter(16, 16), "blocks.0.mlp.up": adapter(16, 64)},
     ["blocks.0.mlp.up", "(16, 64)", "(64, 16)"]),
    ({"blocks.0.attention.q": adapter(16, 8)}, ["blocks.0.attention.q", "(16, 8)", "(16, 16)"]),
    ({"blocks.0.attention.q": adapter(8, 16)}, ["blocks.0.attention.q", "(8, 16)", "(16, 16)"]),
])
@pytest.mark.parametrize("base", ["plain", "nf4"])
@pytest.mark.parametrize("first", [True, False])
def test_adapters_of_another_base_leave_no_trace(adapters, given, base, first):
    model = make("gpt2", base)
    if first:
        stir(add_lora(model, 2, 4, name="first"))
    refuses(model, lambda: insert_adapters(model, "new", adapters), given)


def test_adapters_that_fit_are_inserted():
    made = {"blocks.0.attention.q": adapter(16, 16, r=5), "blocks.1.mlp.up": adapter(64, 16)}
    model = insert_adapters(make("gpt2", "nf4"), "new", made)
    assert {path: layer.adapters for path, layer in adapted_layers(model).items()} == {
        path: {"new": a} for path, a in made.items()}
    assert [id(p) for p in model.parameters()] == [id(t) for a in made.values() for t in (a.A, a.B)]


@pytest.mark.parametrize("A, B", [
    ((2, 3), (4, 3)), ((0, 3), (4, 0)), ((3,), (4, 3)), ((2, 3), (2,)),
])
def test_matrices_that_do_not_fit(A, B):
    with pytest.raises(ValueError) as error:
        LoRA(np.ones(A), np.ones(B), 4)
    assert str(A) in str(error.value) and str(B) in str(error.value)


@pytest.mark.parametrize("act", [
    merge_lora,
    lambda model: use_adapter(model, "b"),
    lambda model: use_adapter(model, None),
    lambda model: add_lora(model, 2, 4, name="new"),
    lambda model: insert_adapters(model, "new", {"blocks.0.attention.q": adapter(16, 16)}),
])
def test_while_an_adapter_is_merged(act):
    model = merge_lora(use_adapter(two(), "a"))
    refuses(model, lambda: act(model), ["merged", "unmerge_lora"])


@pytest.mark.parametrize("adapters", [0, 1])
def test_there_must_be_something_to_act_on(adapters):
    model = make("gpt2")
    if adapters:
        use_adapter(stir(add_lora(model, 2, 4, name="a")), None)
    refuses(model, lambda: merge_lora(model), ["no adapter", "merge"])
    refuses(model, lambda: unmerge_lora(model), ["nothing is merged"])
    refuses(model, lambda: requantize_lora(model), ["nothing is merged"])
    refuses(model, lambda: use_adapter(model, "c"), ["'c'", "['a']" if adapters else "[]"])


@pytest.mark.parametrize("model", [Module(), One(4, 4).fc], ids=["nothing", "a bare layer"])
def test_a_model_without_layers_is_refused(model):
    with pytest.raises(ValueError, match="no linear layer"):
        add_lora(model, 2, 4, "all-linear")
    assert all(p.requires_grad for _, p in model.named_tensors())


def test_numpys_numbers_are_numbers():
    model = add_lora(make("gpt2"), np.int64(2), np.float32(4), dropout=np.float64(0.1))
    assert {p.dtype for p in model.parameters()} == {np.dtype("float32")}
    assert logits(model).dtype == np.float32


@pytest.mark.parametrize("codes", [False, True])
def test_an_adapter_of_another_dtype_is_an_error_not_a_cast(codes):
    model = make("gpt2")
    if codes:
        quantize_model(model)
    insert_adapters(model.astype("float64"), "a", {"blocks.0.attention.q": adapter(16, 16)})
    with pytest.raises(TypeError, match="A float32"):
        logits(model)


# Generation


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("base", ["plain", "nf4"])
@pytest.mark.parametrize("rows", [1, 2])
def test_an_adapted_model_writes_what_the_merged_one_does(family, base, rows):
    model = make(family, base, "float64", context=12)
    prompt, plain = draw()[0][:rows, :3], make(family, base, "float64", context=12)
    stir(add_lora(model, 3, 6, "all-linear", dropout=0.5), size=0.5).train()
    with_adapter = generate(model, prompt, 9, temperature=0)
    assert type(model.blocks[0].mlp.up) is AdaptedLinear and model.blocks[0].mlp.up.training
    merged = generate(merge_lora(model), prompt, 9, temperature=0)
    assert np.array_equal(with_adapter, merged)
    assert not np.array_equal(with_adapter, generate(plain, prompt, 9, temperature=0))
    assert np.array_equal(generate(unload_lora(model), prompt, 9, temperature=0), merged)
