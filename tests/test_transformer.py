"""Checks the Transformer in its three families, and the Module that it is made of.

The laws (who sees whom, padding, packing, checkpoint == plain, split batch == whole batch) are
drawn with hypothesis on tiny models whose parameters have all been moved from where they start.
"""

import dataclasses
import functools
import math
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st

from minilm import backend, ops
from minilm.graph import no_dropout
from minilm.nn import Linear, Module
from minilm.tensor import Tensor, randomness
from minilm.transformer import Config, Transformer

V, CONTEXT, LAYERS = 23, 8, 3
CONFIGS = {
    "gpt2": Config.gpt2(V, CONTEXT, LAYERS, heads=2, width=8),
    "llama": Config.llama(V, CONTEXT, LAYERS, heads=4, width=16, hidden=12, kv_heads=2),
    "bert": Config.bert(V, CONTEXT, LAYERS, heads=2, width=8, hidden=20),
}
CAUSAL = ["gpt2", "llama"]
families = pytest.mark.parametrize("family", CONFIGS)
seeds = st.integers(0, 2**32 - 1)


def make(family, dtype="float64", **changes):
    """A tiny model in dtype; noise moves every parameter from its first value."""
    model = Transformer(dataclasses.replace(CONFIGS[family], **changes))
    rng = np.random.default_rng(1)
    for _, t in list(model.named_tensors()):
        moved = t.data + 0.3 * rng.standard_normal(t.shape)
        t.become(moved.astype(dtype))  # and so does a tied head, which holds it too
    return model.eval()


model_of = functools.cache(make)  # for tests that leave the model as it is


def draw(seed, B=2, T=CONTEXT):
    """tokens and targets: integers (B, T) each."""
    return np.random.default_rng(seed).integers(0, V, (2, B, T))


def forward(model, tokens, mask=None, seed=0):
    """The logits, with dropout drawn from seed."""
    with randomness(np.random.default_rng(seed)):
        return model(tokens, mask)


def run(model, tokens, targets, total=None, mask=None):
    """(logits, loss, {name: gradient}) of one step."""
    for p in model.parameters():
        p.grad = None
    logits = forward(model, tokens, mask)
    loss = ops.cross_entropy(logits, targets, total=total)
    loss.backward()
    return logits.data, loss.data, {name: p.grad for name, p in model.named_parameters()}


def equal(a, b):
    """The same bits, in arrays or in dicts of them."""
    if not isinstance(a, dict):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


def unfreeze(model, names):
    own = dict(model.named_tensors())
    for name in names:
        own[name].become(own[name].data, requires_grad=True)


# Who sees whom


@pytest.mark.parametrize("family", CAUSAL)
@given(seed=seeds, t=st.integers(0, CONTEXT - 1))
def test_a_causal_model_sees_no_later_token(family, seed, t):
    model, (tokens, _) = model_of(family), draw(seed)
    changed = tokens.copy()
    changed[:, t] = (changed[:, t] + 1) % V
    before, after = model(tokens).data, model(changed).data
    assert equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).any(-1).all()  # and every later token sees this one


@given(seed=seeds, t=st.integers(0, CONTEXT - 1))
def test_bert_sees_both_sides(seed, t):
    model, (tokens, _) = model_of("bert"), draw(seed)
    changed = tokens.copy()
    changed[:, t] = (changed[:, t] + 1) % V
    assert (model(tokens).data != model(changed).data).any(-1).all()


@families
@given(seed=seeds, data=st.data())
def test_nobody_sees_a_masked_token(family, seed, data):
    """Wherever the padding is, what stands there changes no bit elsewhere."""
    model, (tokens, other) = model_of(family), draw(seed)
    mask = np.array(data.draw(st.lists(st.integers(0, 1), min_size=16, max_size=16)))
    mask = mask.reshape(tokens.shape)
    a, b = (model(np.where(mask, tokens, ids), mask).data for ids in (tokens, other))
    assert np.isfinite(a).all()
    assert equal(a[mask == 1], b[mask == 1])


@families
@given(seed=seeds, lengths=st.lists(st.integers(1, CONTEXT), min_size=1, max_size=3))
def test_padding_on_the_right_changes_nothing(family, seed, lengths):
    model, (tokens, _) = model_of(family), draw(seed, len(lengths))
    mask = np.arange(CONTEXT) < np.array(lengths)[:, None]
    padded = model(tokens, mask.astype(np.int64)).data
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length]).data
        close(padded[row, :length], alone[0], "float64")


@given(seed=seeds, length=st.integers(1, CONTEXT))
def test_rotary_positions_allow_padding_on_the_left(seed, length):
    """They act by their differences alone, up to float32, in which the angles are computed."""
    model, (tokens, _) = model_of("llama"), draw(seed)
    mask = np.zeros(tokens.shape, np.int64)
    mask[:, CONTEXT - length :] = 1
    padded = model(tokens, mask).data[:, CONTEXT - length :]
    close(padded, model(tokens[:, CONTEXT - length :]).data, "float32")


@families
@given(seed=seeds, B=st.integers(1, 4), T=st.integers(1, CONTEXT))
def test_a_row_does_not_know_its_batch(family, seed, B, T):
    model, (tokens, _) = model_of(family), draw(seed, B, T)
    whole = model(tokens).data
    assert whole.shape == (B, T, V)
    for row in range(B):
        close(whole[row], model(tokens[row : row + 1]).data[0], "float64")


# Gradients


@families
@given(seed=seeds)
def test_the_gradient_is_the_slope(family, seed):
    """Along a random direction, to a precision that only float64 throughout can give."""
    model, (tokens, targets) = make(family), draw(seed)
    _, _, grads = run(model, tokens, targets)
    rng, h, losses = np.random.default_rng(seed), 1e-5, []
    length = math.sqrt(sum(g.size for g in grads.values()))
    direction = {name: rng.standard_normal(g.shape) / length for name, g in grads.items()}
    for step in (h, -2 * h):
        for name, p in model.named_parameters():
            p.data = p.data + step * direction[name]
        losses.append(ops.cross_entropy(model(tokens), targets).data)
    slope = sum((grads[name] * direction[name]).sum() for name in grads)
    norm = math.sqrt(sum((g * g).sum() for g in grads.values()))
    assert abs((losses[0] - losses[1]) / (2 * h) - slope) < 1e-8 * norm


@families
@given(seed=seeds, B=st.integers(2, 5), data=st.data())
def test_the_parts_of_a_batch_add_up_to_the_whole(family, seed, B, data):
    model, (tokens, targets) = make(family), draw(seed, B)
    targets[:, 1:][np.random.default_rng(seed).random((B, CONTEXT - 1)) < 0.3] = -100
    total, cut = int((targets != -100).sum()), data.draw(st.integers(1, B - 1))
    _, loss, whole = run(model, tokens, targets)
    parts = [run(model, tokens[r], targets[r], total) for r in (slice(cut), slice(cut, None))]
    close(sum(part[1] for part in parts), loss, "float64")
    for name in whole:
        # k.bias moves all scores of a row alike, so its gradient is what rounding leaves of 0.
        close(sum(part[2][name] for part in parts), whole[name], "float64", scale=0.1)


FEW = ["blocks.1.attention.v.weight", "blocks.1.norm2.weight", "blocks.2.mlp.up.weight"]


@families
@pytest.mark.parametrize("trained", ["all", "blocks", "few"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpoints_give_the_same_bits(family, trained, every):
    """Dropout included, and also where the embedding is frozen and no input needs a gradient."""
    model, (tokens, targets) = make(family, "float32", dropout=0.2).train(), draw(0)
    mask = np.array([[1] * CONTEXT, [1] * (CONTEXT - 2) + [0] * 2])
    if trained != "all":
        names = [name for name, _ in model.freeze().named_tensors() if name.startswith("blocks.")]
        unfreeze(model, FEW if trained == "few" else names)
    plain = run(model, tokens, targets, mask=mask)
    model.checkpoint_every = every
    again = run(model, tokens, targets, mask=mask)
    assert all(equal(a, b) for a, b in zip(plain, again))
    assert all(g is not None for g in plain[2].values())
    assert not equal(plain[0], forward(model, tokens, mask, seed=1).data)
    frozen = every == 1 and trained == "few"  # the first block alone, behind a frozen embedding
    assert checkpoints(forward(model, tokens)) == math.ceil(LAYERS / every) - frozen


@pytest.mark.parametrize("off", [True, False])
def test_a_checkpoint_remembers_whether_dropout_was_off(off):
    """Whatever holds when the backward pass runs it again."""
    model, (tokens, targets) = make("gpt2", "float32", dropout=0.2).train(), draw(0)
    grads = []
    for model.checkpoint_every in (0, 1):
        with no_dropout(off):
            loss = ops.cross_entropy(forward(model, tokens), targets)
        with no_dropout(not off):
            loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        for p in model.parameters():
            p.grad = None
    assert equal(*grads)
    assert equal(grads[0], run(model.train(not off), tokens, targets)[2])


def checkpoints(y):
    """How many checkpoints are in the graph behind y."""
    seen, stack = set(), [y.node]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.parents)
    return sum(node.op == "checkpoint" for node in seen)


@families
def test_a_tied_head_is_the_embedding(family):
    """One tensor in two places: its gradient is the sum of both places' gradients."""
    model, apart = make(family, tied=True), make(family, tied=False)
    head = "head.out" if family == "bert" else "head"
    assert dict(model.named_modules())[head].weight is model.embed.weight
    assert f"{head}.weight" not in model.state_dict()
    apart.load_state_dict(model.state_dict() | {f"{head}.weight": model.embed.weight.data})
    one, two = run(model, *draw(0)), run(apart, *draw(0))
    both = two[2].pop(f"{head}.weight") + two[2]["embed.weight"]
    assert equal(one[0], two[0])
    close(one[2].pop("embed.weight"), both, "float64")
    two[2].pop("embed.weight")
    assert equal(one[2], two[2])


# Parameters


def linear(*paths):
    return [f"{path}.{kind}" for path in paths for kind in ("weight", "bias")]


PATHS = {
    "gpt2": ["embed.weight", "position.weight"]
    + linear(*(f"blocks.0.{path}" for path in ("norm1", "norm2")))
    + linear(*(f"blocks.0.attention.{name}" for name in "qkvo"))
    + linear("blocks.0.mlp.up", "blocks.0.mlp.down", "norm"),
    "llama": ["embed.weight", "blocks.0.norm1.weight", "blocks.0.norm2.weight"]
    + [f"blocks.0.attention.{name}.weight" for name in "qkvo"]
    + [f"blocks.0.mlp.{name}.weight" for name in ("gate", "up", "down")]
    + ["norm.weight", "head.weight"],
    "bert": ["embed.weight", "position.weight", "segment.weight"]
    + linear("embed_norm", "blocks.0.norm1", "blocks.0.norm2")
    + linear(*(f"blocks.0.attention.{name}" for name in "qkvo"))
    + linear("blocks.0.mlp.up", "blocks.0.mlp.down", "head.transform", "head.norm")
    + ["head.out.bias"],
}


@families
def test_paths_are_complete_and_stay_as_they_are(family):
    """They are the keys of files, so a new name here is a new format."""
    model = make(family, layers=1)
    assert [name for name, _ in model.named_parameters()] == PATHS[family]
    _, _, grads = run(model, *draw(0))
    grads.pop("segment.weight", None)
    assert all(g is not None and g.any() for g in grads.values())


@families
def test_state_goes_from_one_model_to_another(family):
    source, target = make(family), Transformer(CONFIGS[family], seed=5)
    for _, t in list(target.named_tensors()):
        t.become(t.data.astype(np.float64))
    tokens, _ = draw(0)
    before = target(tokens).data
    target.load_state_dict(source.state_dict())
    assert not equal(before, source(tokens).data)
    assert equal(target(tokens).data, source(tokens).data)
    source.embed.weight.data += 1
    assert not equal(target.state_dict(), source.state_dict())  # copies, not the same memory


@pytest.mark.parametrize("wrong, message", [
    ({"norm.bias": None}, "missing=['norm.bias']"),
    ({"norm.scale": np.ones(8)}, "unexpected=['norm.scale']"),
    ({"norm.bias": np.ones(9)}, "norm.bias is (9,), expected (8,)"),
    ({"norm.bias": np.ones(())}, "norm.bias is (), expected (8,)"),
])
def test_a_state_that_does_not_fit_changes_nothing(wrong, message):
    model = make("gpt2")
    before = {name: array.copy() for name, array in model.state_dict().items()}
    state = {name: array + 1 for name, array in before.items()} | wrong
    state = {name: array for name, array in state.items() if array is not None}
    with pytest.raises(ValueError) as error:
        model.load_state_dict(state)
    assert message in str(error.value)
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("path", ["head", "blocks.1", "blocks.1.mlp.up", "blocks.0.attention.q"])
def test_replace_swaps_one_module(path):
    model, new = make("gpt2"), Linear(8, 8, np.random.default_rng(0))
    before = dict(model.named_modules())
    model.replace(path, new)
    after = dict(model.named_modules())
    assert after[path] is new
    assert all(after.get(name) is module for name, module in before.items()
               if name != path and not name.startswith(f"{path}."))


@pytest.mark.parametrize("path", [
    "", "nope", "blocks", "blocks.3", "blocks.-1", "blocks.x.mlp", "blocks.0.mlp.nope",
    "blocks.0.mlp.activation", "embed.weight", "nope.q",
])
def test_replace_needs_a_module_there(path):
    model = make("gpt2")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="there is no module") as error:
        model.replace(path, Module())
    assert repr(path) in str(error.value)
    assert dict(model.named_modules()) == before and not hasattr(model, "nope")


def test_a_frozen_model_has_no_graph():
    model = make("gpt2")
    state = dict(model.state_dict())
    assert model.freeze() is model
    assert model.parameters() == []
    assert not model(draw(0)[0]).requires_grad
    assert equal(model.state_dict(), state)


@families
def test_dropout_acts_in_training_only(family):
    model, (tokens, _) = make(family, dropout=0.3), draw(0)
    plain = model(tokens).data
    assert model.train() is model and all(m.training for _, m in model.named_modules())
    one, again, other = (forward(model, tokens, seed=s).data for s in (1, 1, 2))
    assert equal(one, again) and not equal(one, other) and not equal(one, plain)
    with pytest.raises(ValueError, match="dropout needs a generator"):
        model(tokens)
    assert model.eval() is model and not any(m.training for _, m in model.named_modules())
    assert equal(model(tokens).data, plain)


@families
def test_weights_start_as_they_should(family):
    """N(0, 0.02^2), divided by sqrt(2 layers) where a residual branch ends; 0 and 1 elsewhere."""
    c = dataclasses.replace(CONFIGS[family], vocab_size=200, width=64, hidden=100, layers=2)
    for name, t in Transformer(c).named_tensors():
        assert t.dtype == np.float32
        if t.ndim == 1:
            assert (t.data == ("norm" in name and "weight" in name)).all()
        else:
            std = 0.02 / math.sqrt(4) if "attention.o" in name or "down" in name else 0.02
            assert abs(t.data.std() / std - 1) < 5 / math.sqrt(2 * t.size), name
            assert abs(t.data.mean()) < 5 * std / math.sqrt(t.size), name


@families
def test_the_seed_decides_the_weights(family):
    states = [Transformer(CONFIGS[family], seed).state_dict() for seed in (0, 0, 1)]
    assert equal(states[0], states[1])
    differ = [name for name in states[0] if not equal(states[0][name], states[2][name])]
    assert differ == [name for name, array in states[0].items() if array.ndim == 2]


# Dtypes and devices


@families
def test_float64_stays_float64(family):
    mask = np.array([[1] * 8, [1] * 5 + [0] * 3])
    logits, loss, grads = run(make(family, dropout=0.1).train(), *draw(0), mask=mask)
    assert {logits.dtype, loss.dtype, *(g.dtype for g in grads.values())} == {np.dtype("float64")}


@families
@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16], ids=str)
def test_16_bit_models_stay_16_bit(family, dtype):
    model, (tokens, targets) = make(family, dtype, layers=1, dropout=0.1).train(), draw(0)
    mask = np.array([[1] * 8, [1] * 5 + [0] * 3])
    logits, loss, grads = run(model, tokens, targets, mask=mask)
    assert {logits.dtype, *(g.dtype for g in grads.values())} == {np.dtype(dtype)}
    assert loss.dtype == np.float32
    exact = make(family, layers=1)
    exact.load_state_dict(model.state_dict())
    close(model.eval()(tokens).data, exact(tokens).data, np.dtype(dtype))


def test_cuda_without_cupy_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it fails, also where it is installed
    backend.cupy.cache_clear()
    model = make("gpt2")
    with pytest.raises(RuntimeError, match=r'^device "cuda" needs CuPy: .* -m pip install .*$'):
        model.to("cuda")
    with pytest.raises(ValueError, match="'tpu'"):
        model.to("tpu")
    assert equal(model.to("cpu").state_dict(), make("gpt2").state_dict())


# Bad input


@pytest.mark.parametrize("tokens, given", [
    (np.array([[0, V]]), [str(V), f"{V} rows"]),
    (np.array([[-1, 0]]), ["-1", f"{V} rows"]),
    (np.zeros((1, 3)), ["integers (B, T)", "float64"]),
    (np.zeros((1, 3), bool), ["integers (B, T)", "bool"]),
    (np.zeros(3, int), ["integers (B, T)", "(3,)"]),
    (np.zeros((1, 2, 3), int), ["integers (B, T)", "(1, 2, 3)"]),
    (np.zeros((1, CONTEXT + 1), int), [f"1 to {CONTEXT}", f"got {CONTEXT + 1}"]),
    (np.zeros((1, 0), int), [f"1 to {CONTEXT}", "got 0"]),
])
@families
def test_bad_tokens(family, tokens, given):
    with pytest.raises(ValueError) as error:
        model_of(family)(tokens)
    assert all(part in str(error.value) for part in given)


@pytest.mark.parametrize("name", ["causal", "tied", "bias", "norm_first"])
def test_a_choice_is_true_or_false(name):
    with pytest.raises(TypeError, match=f"^{name} must be True or False.* got 'no'$"):
        Config.gpt2(10, 8, 1, 2, 8, **{name: "no"})


@pytest.mark.parametrize("every, error", [(-1, ValueError), (0.5, TypeError)])
def test_checkpoints_are_every_so_many_blocks(every, error):
    """-1 ran none of the blocks."""
    model = model_of("gpt2")
    model.checkpoint_every = every
    try:
        with pytest.raises(error, match=r"^checkpoint_every must be "):
            model(draw(0)[0])
    finally:
        model.checkpoint_every = 0


@pytest.mark.parametrize("number", [-np.inf, np.nan, 0.5, 2, -1])
def test_a_mask_is_of_0_and_1(number):
    """So one that is to be added to the scores, 0 and -inf, is not taken for its opposite."""
    mask = np.full((2, 8), 1.0 if isinstance(number, float) else 1)
    mask[0, 3] = number
    with pytest.raises(ValueError, match=r"^mask must be 1 for a token that may be seen, 0 for"):
        model_of("llama")(draw(0)[0], mask)


@pytest.mark.parametrize("shape", [(8,), (2, 7), (1, 8), (2, 1, 1, 8)])
def test_a_mask_has_the_shape_of_tokens(shape):
    with pytest.raises(ValueError) as error:
        model_of("llama")(draw(0)[0], np.ones(shape))
    assert str(shape) in str(error.value) and "(2, 8)" in str(error.value)


@pytest.mark.parametrize("changes, given", [
    (dict(norm="batch"), ["norm", "batch", "'rms'"]),
    (dict(positions="alibi"), ["positions", "alibi", "'rotary'"]),
    (dict(activation="relu"), ["activation", "relu", "'swiglu'"]),
    (dict(head="nothing"), ["head", "nothing", "'masked'"]),
    (dict(width=9), ["width 9", "heads 2"]),
    (dict(heads=4, kv_heads=3), ["heads 4", "kv_heads 3"]),
    (dict(heads=8, kv_heads=8, positions="rotary"), ["even", "got 1"]),
    (dict(dropout=1.0), ["dropout", "below 1", "1.0"]),
    (dict(dropout=-0.1), ["dropout", "at least 0", "-0.1"]),
    (dict(norm_eps=-1e-5), ["norm_eps", "at least 0"]), (dict(norm_eps=np.nan), ["norm_eps"]),
    (dict(rope_theta=0.0), ["rope_theta", "positive"]), (dict(rope_theta=np.inf), ["rope_theta"]),
    (dict(segments=-1), ["segments", "at least 0", "-1"]),
    *((dict([(size, n)]), [size, "positive", str(n)]) for n in (0, -2)
      for size in ("vocab_size", "context", "layers", "heads", "width", "hidden", "kv_heads")),
])
def test_bad_configs(changes, given):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(CONFIGS["gpt2"], **changes)
    assert all(part in str(error.value) for part in given)


@pytest.mark.parametrize("size", ["8", 8.0, None, True])
def test_sizes_are_integers(size):
    said = f"^context must be a whole number, positive; got {size!r}$"
    with pytest.raises(TypeError, match=said):
        Config.gpt2(10, size, 1, 2, 8)
    assert Config.gpt2(10, np.int64(8), 1, 2, 8).context == 8


def test_tokens_in_a_tensor_are_refused_by_name():
    with pytest.raises(TypeError, match="expected an array of NumPy or CuPy, got Tensor"):
        Transformer(Config.gpt2(10, 8, 1, 2, 8))(Tensor(np.array([[1, 2]])))
