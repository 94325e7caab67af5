"""Every op against finite differences and against PyTorch, drawn from the table in `op_table.py`;
then what single ops promise: bad input, attention's masks and tiles, erf, dropout, cross-entropy.
"""

import importlib
import math
import pkgutil
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from compare_torch import FAMILIES, train_ours, train_torch, training_error
from conftest import close
from hypothesis import given
from hypothesis import strategies as st
from op_table import TOLERANCE, cast, error, op_error, run_ours, run_torch, table, weights

import minilm
from minilm import activations, arrays, attention, losses, ops, tensor
from minilm.tensor import Tensor

LOSSES = ("cross_entropy", "kl_divergence", "cosine_embedding", "top_k_divergence", "mse",
          "log_prob", "summed", "policy_loss", "value_loss", "ranking_loss", "kl_penalty")
LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.T.copy().T,
    "reversed": lambda x: x[..., ::-1].copy()[..., ::-1] if x.ndim else x,
    "strided": lambda x: np.repeat(x, 2, -1)[..., ::2] if x.ndim else x,
}

every_row = pytest.mark.parametrize("row", table(), ids=lambda row: row.name)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))  # B, T, C
seeds = st.integers(0, 2**32 - 1)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_every_op_has_a_row():
    lifted = tensor.add.__code__  # what @op returns
    modules = [importlib.import_module(module.name)
               for module in pkgutil.walk_packages(minilm.__path__, "minilm.")]
    found = {f.__name__ for module in modules for f in vars(module).values()
             if getattr(f, "__code__", None) is lifted}
    assert {"add", "getitem", "sum_", "quantized_linear", "add_low_rank", "quantized_lora"} <= found
    assert found | set(ops.__all__) == {row.name.split()[0] for row in table()}


@every_row
@given(sizes=sizes, seed=seeds)
def test_gradient_along_a_random_direction(row, sizes, seed):
    """<dL/dx, v> is the slope of L = <dy, f(x + t v)> at t = 0, for every input by itself."""
    rng, step = np.random.default_rng(seed), 1e-6
    variables, others = row.draw(rng, *sizes)
    y, *grads = run_ours(row.ours, variables, others)
    dy = weights(y, variables)
    for i, (x, grad) in enumerate(zip(variables, grads)):
        v = rng.standard_normal(x.shape)

        def L(t):
            moved = [a + t * v if i == j else a for j, a in enumerate(variables)]
            return (row.ours(*map(Tensor, moved), *others).data * dy).sum()

        slope = (L(step) - L(-step)) / (2 * step)
        assert error((grad * v).sum(), slope, scale=1) < 1e-6


@every_row
@given(
    dtype=st.sampled_from(["float32", "float64"]),
    sizes=sizes,
    seed=seeds,
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_value_and_gradients_are_pytorchs(row, dtype, sizes, seed, layout):
    layout = LAYOUTS[layout]
    variables, others = cast(dtype, *row.draw(np.random.default_rng(seed), *sizes))
    expected = run_torch(row.twin, *cast("float64", variables, others))
    actual = run_ours(row.ours, [layout(x) for x in variables], [layout(x) for x in others])
    assert {a.dtype for a in actual} == {np.dtype(dtype)}
    assert max(op_error(actual, expected)) <= TOLERANCE[dtype]


@every_row
@given(dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16]), sizes=sizes, seed=seeds)
def test_16_bit_inputs_give_16_bits(row, dtype, sizes, seed):
    inputs = cast(dtype, *row.draw(np.random.default_rng(seed), *sizes))
    actual = run_ours(row.ours, *inputs)
    y, *grads = [a.dtype for a in actual]
    assert y == (np.float32 if row.name.split()[0] in LOSSES else dtype)
    assert set(grads) == {np.dtype(dtype)}
    expected = run_ours(row.ours, *cast("float32", *inputs))
    assert max(op_error(actual, expected)) <= TOLERANCE[np.dtype(dtype).name]


@every_row
def test_an_op_changes_neither_its_inputs_nor_dy(row):
    variables, others = row.draw(np.random.default_rng(0), 2, 5, 4)
    for x in [*variables, *others]:
        x.flags.writeable = False
    y = row.ours(*[Tensor(x, requires_grad=True) for x in variables], *others)
    dy = weights(y, variables)
    dy.flags.writeable = False
    y.backward(dy)  # a write would raise


@every_row
def test_blocks_of_rows_change_nothing(row, monkeypatch):
    inputs = row.draw(np.random.default_rng(0), 2, 9, 5)
    whole = run_ours(row.ours, *inputs)
    monkeypatch.setattr(arrays, "BLOCK", 16)
    monkeypatch.setattr(arrays, "WHOLE", 16)
    monkeypatch.setattr(attention, "BLOCK", 16)
    assert max(op_error(run_ours(row.ours, *inputs), whole)) <= TOLERANCE["float64"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_training_is_pytorchs(family, dtype):
    config, steps = FAMILIES[family], 5
    expected = train_torch(config, "float64", steps)
    assert max(training_error(train_ours(config, dtype, steps), expected)) <= TOLERANCE[dtype]


f, i = normal, np.arange
BAD = {
    "embedding: float ids": (lambda: ops.embedding(f(2), f(3, 4)), TypeError, "float64"),
    "embedding: negative": (lambda: ops.embedding(i(-1, 2), f(3, 4)), ValueError, "-1 to 1"),
    "embedding: too large": (lambda: ops.embedding(i(4), f(3, 4)), ValueError, "to 3.* 3 rows"),
    "linear": (lambda: ops.linear(f(2, 3), f(5, 4)), ValueError, "3 features.*4"),
    "matmul": (lambda: ops.matmul(f(3), f(3, 2)), ValueError, r"\(3,\)"),
    "linear: dtypes": (lambda: ops.linear(f(2, 3), single(5, 3)), TypeError, "W float32"),
    "matmul: dtypes": (lambda: ops.matmul(single(2, 3), f(3, 2)), TypeError, "b float64"),
    "attention: dtypes": (lambda: attend(k=single(2, 4, 5, 6)), TypeError, "k float32, v float64"),
    "gelu": (lambda: ops.gelu(f(3), approximate="erf"), ValueError, "'erf'"),
    "swiglu": (lambda: ops.swiglu(f(2, 3), f(3)), ValueError, r"up \(3,\)"),
    "swiglu: dtypes": (lambda: ops.swiglu(f(2, 3), single(2, 3)), TypeError, "up float32"),
    "split_heads": (lambda: ops.split_heads(f(2, 3, 7), 2), ValueError, "7.* 2 heads"),
    "dropout: 1": (lambda: ops.dropout(f(3), 1.0, np.random.default_rng()), ValueError, "1.0"),
    "dropout: < 0": (lambda: ops.dropout(f(3), -0.1, np.random.default_rng()), ValueError, "-0.1"),
    "rotary: odd width": (lambda: ops.rotary(f(4, 3), f(4, 1), f(4, 1)), ValueError, "rotary"),
    "rotary: short table": (lambda: ops.rotary(f(4, 6), f(3, 3), f(3, 3)), ValueError, r"\(4, 3\)"),
    "rotary: sin": (lambda: ops.rotary(f(4, 6), f(4, 3), f(4, 2)), ValueError, "rotary"),
    "rotary: x's dtype": (lambda: ops.rotary(i(4, 6), f(4, 3), f(4, 3)), TypeError, "x int64"),
    "rotary: cos's": (lambda: ops.rotary(f(4, 6), i(4, 3), f(4, 3)), TypeError, "cos int64"),
    "rotary: sin's": (lambda: ops.rotary(f(4, 6), f(4, 3), i(4, 3)), TypeError, "sin int64"),
    "attention: v": (lambda: attend(v=f(2, 4, 5, 7)), ValueError, r"v \(2, 4, 5, 7\)"),
    "attention: batch": (lambda: attend(q=f(3, 4, 5, 6)), ValueError, r"q \(3, 4, 5, 6\)"),
    "attention: heads": (lambda: attend(q=f(2, 6, 5, 6)), ValueError, r"q \(2, 6, 5, 6\)"),
    "attention: width": (lambda: attend(q=f(2, 4, 5, 8)), ValueError, r"q \(2, 4, 5, 8\)"),
    "attention: T > S": (lambda: attend(q=f(2, 4, 6, 6), causal=True), ValueError, "does not go"),
    "attention: window": (lambda: attend(window=2), ValueError, "window 2"),
    "attention: no window": (lambda: attend(window=0, causal=True), ValueError, "window 0"),
    "attention: scale": (lambda: attend(scale=0.0), ValueError, "scale 0.0"),
    "attention: cap": (lambda: attend(cap=-1.0), ValueError, "cap -1.0"),
    "soft_cap": (lambda: ops.soft_cap(f(2), 0.0), ValueError, "got 0.0"),
    "attention: mask": (lambda: attend(mask=f(5, 4)), ValueError, r"\(5, 4\)"),
    "attention: bias": (lambda: attend(bias=f(1, 4, 5, 4)), ValueError, r"\(1, 4, 5, 4\) must"),
    "attention: drop": (lambda: attend(drop=f(1, 4, 5, 4)), ValueError, r"drop \(1, 4, 5, 4\)"),
    "attention: drop's dtype": (lambda: attend(drop=f(2, 4, 5, 5) > 0), TypeError, "drop bool"),
    "attention: bias's axes": (lambda: attend(bias=f(5, 5)), ValueError, r"bias \(5, 5\) must"),
    "attention: bias's dtype": (lambda: attend(bias=single(1, 4, 5, 5)), TypeError, "bias float32"),
    "cross_entropy: shapes": (lambda: ops.cross_entropy(f(2, 3, 4), i(6)), ValueError, r"\(6,\)"),
    "cross_entropy: class": (lambda: ops.cross_entropy(f(2, 4), i(3, 5)), ValueError,
                             "3 to 4, but V is 4"),
    "cross_entropy: negative": (lambda: ops.cross_entropy(f(2, 4), i(-1, 1)), ValueError, "-1 to"),
    "cross_entropy: none": (lambda: ops.cross_entropy(f(1, 4), i(1) - 100), ValueError, "nothing"),
    "kl_divergence": (lambda: ops.kl_divergence(f(2, 3), f(2, 4)), ValueError, r"\(2, 4\)"),
    "cosine_embedding": (lambda: ops.cosine_embedding(f(2, 3), f(1, 3)), ValueError, r"\(1, 3\)"),
    "mse": (lambda: ops.mse(f(2, 3), f(3)), ValueError, r"\(3,\)"),
    "embedding: table": (lambda: ops.embedding(i(2), f(3)), ValueError, r"\(V, C\), got \(3,\)"),
    "linear: W": (lambda: ops.linear(f(2, 3), f(3)), ValueError, r"W \(O, I\), got \(2, 3\) and"),
    "layer_norm": (lambda: ops.layer_norm(f(2, 3), f(4), f(3)), ValueError, r"with g \(4,\), b"),
    "rms_norm": (lambda: ops.rms_norm(f(2, 3), f(1)), ValueError, r"x \(2, 3\) does .*g \(1,\)"),
    "split_heads: axes": (lambda: ops.split_heads(f(3, 8), 2), ValueError, r"got \(3, 8\), 2"),
    "split_heads: 0": (lambda: ops.split_heads(f(2, 3, 8), 0), ValueError, r"\(2, 3, 8\), 0"),
    "merge_heads": (lambda: ops.merge_heads(f(2, 3, 8)), ValueError, r"got \(2, 3, 8\)"),
    "attention: axes": (lambda: attend(q=f(4, 5, 6)), ValueError, r"got \(4, 5, 6\), \(2, 4, 5"),
    "rotary: axes": (lambda: ops.rotary(f(4), f(4, 2), f(4, 2)), ValueError, r"got \(4,\)"),
    "dropout: rng": (lambda: ops.dropout(f(3), 0.5, 7), TypeError, "a NumPy Generator, got int"),
    "dropout: p": (lambda: ops.dropout(f(3), "x", None), TypeError, r"float64 \(3,\), str, None"),
    "split_heads: heads": (lambda: ops.split_heads(f(1, 2, 4), 2.0), TypeError, r"4\), float"),
    "concat: no axis": (lambda: ops.concat(f(2), f(2), axis=None), TypeError, "axis: NoneType"),
    "cross_entropy: floats": (lambda: ops.cross_entropy(f(2, 4), f(2)), TypeError,
                              r"targets must be integers, got float64 \(2,\)"),
    "cross_entropy: booleans": (lambda: ops.cross_entropy(f(2, 4), i(2) > 0), TypeError,
                                r"targets must be integers, got bool \(2,\)"),
    "cross_entropy: number": (lambda: ops.cross_entropy(f()[()], i(1)[0]), ValueError, r"\(\)"),
    "kl_divergence: 0": (lambda: ops.kl_divergence(f(2, 3), f(2, 3), 0.0), ValueError, "got 0.0"),
    "kl_divergence: nan": (lambda: ops.kl_divergence(f(2, 3), f(2, 3), math.nan), ValueError,
                           "temperature must be positive and finite, got nan"),
    "add: shapes": (lambda: ops.add(f(2), f(3)), ValueError, r"float64 \(2,\), float64 \(3,\)"),
    "add: text": (lambda: ops.add(f(2), "x"), TypeError, r"add takes .* float64 \(2,\), str"),
    "concat: axis": (lambda: ops.concat(f(2), f(2), axis=1), IndexError, "axis: int"),
}


def single(*shape):
    return normal(*shape).astype(np.float32)


def attend(q=None, k=None, v=None, **settings):
    q, k, v = (normal(2, 4, 5, 6) if x is None else x for x in (q, k, v))
    return ops.attention(q, k, v, **settings)


@pytest.mark.parametrize("call, kind, message", BAD.values(), ids=BAD)
def test_bad_input_raises(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("strange, said", [
    ([0, 1], "list"), ("text", "str"), (None, "NoneType")])
@pytest.mark.parametrize("call", [
    lambda x: ops.cross_entropy(f(2, 3), x), lambda x: ops.cross_entropy(x, i(2)),
    lambda x: ops.embedding(x, f(3, 4)), lambda x: ops.linear(x, f(3, 4)), ops.softmax, ops.relu,
    lambda x: ops.layer_norm(x, f(3), f(3)), lambda x: ops.swiglu(x, f(2, 3)),
    lambda x: ops.concat(f(2), x, axis=0), lambda x: ops.kl_divergence(f(2, 3), x),
    lambda x: attend(k=attend, mask=x), lambda x: ops.mse(x, f(2, 3))])
def test_what_is_no_array_is_named(call, strange, said):
    """Lists, texts, nothing: never a bare AttributeError."""
    with pytest.raises(TypeError, match=f"takes Tensors and arrays, got .*{said}"):
        call(strange)


@pytest.mark.parametrize("call", [
    ops.softmax, lambda x: ops.cross_entropy(f(2, 3), x), lambda x: ops.embedding(x, f(3, 4))])
def test_another_librarys_array_is_named(call):
    with pytest.raises(TypeError, match=r"takes Tensors and arrays, got .*torch\.Tensor"):
        call(torch.ones(2))


FLOATS = {
    "softmax": ops.softmax, "soft_cap": lambda x: ops.soft_cap(x, 1.0), "tanh": ops.tanh,
    "log_softmax": ops.log_softmax, "gelu": ops.gelu, "silu": ops.silu,
    "swiglu": lambda x: ops.swiglu(x, x), "rms_norm": lambda x: ops.rms_norm(x, f(3)),
    "layer_norm": lambda x: ops.layer_norm(x, f(3), f(3)),
    "dropout": lambda x: ops.dropout(x, 0.5, np.random.default_rng(0)),
    "kl_divergence": lambda x: ops.kl_divergence(x, x),
    "cosine_embedding": lambda x: ops.cosine_embedding(x, x),
    "cross_entropy": lambda x: ops.cross_entropy(x, i(2)),
    "attention": lambda x: ops.attention(x, x, x), "rotary": lambda x: ops.rotary(x, x, x),
}


@pytest.mark.parametrize("name", [name for name, call in FLOATS.items() if call])
@pytest.mark.parametrize("dtype", [int, bool, complex])
def test_numbers_that_would_be_rounded_are_refused(name, dtype):
    """softmax of integers was all zeros."""
    said = f"{name} needs floating-point numbers, got .*{dtype.__name__}"
    with pytest.raises(TypeError, match=said):
        FLOATS[name](np.ones((2, 3), dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("act", [
    ops.relu, ops.gelu, lambda x: ops.gelu(x, "tanh"), ops.silu,
    lambda x: ops.swiglu(x, np.ones_like(x.data))])
def test_far_from_zero_activations_are_0_or_x(act, dtype):
    """e^1000 is infinite, of which nobody need hear."""
    x = Tensor(np.array([-1000.0, -200.0, 200.0, 1000.0], dtype), requires_grad=True)
    y = act(x)
    y.sum().backward()
    assert y.data == pytest.approx([0, 0, 200, 1000], abs=1e-80)
    assert x.grad == pytest.approx([0, 0, 1, 1], abs=1e-80)


@st.composite
def attention_inputs(draw):
    """q, k, v in float64, a mask and settings; sizes around the 64 rows of a tile."""
    rng = np.random.default_rng(draw(seeds))
    B, K, group, D = (draw(st.integers(1, n)) for n in (3, 2, 3, 5))
    T, past = draw(st.sampled_from([1, 2, 63, 64, 65, 127, 128, 200])), draw(st.integers(0, 70))
    q, S = rng.standard_normal((B, K * group, T, D)), T + past
    k, v = rng.standard_normal((2, B, K, S, D))
    shape = draw(st.sampled_from([(B, 1, 1, S), (T, S), (K * group, T, 1), (B, K * group, T, S)]))
    seen = rng.random(shape) < 0.8
    masks = [None, seen, rng.standard_normal(shape), np.where(seen, 0.0, -np.inf)]
    causal, window = draw(st.booleans()), draw(st.none() | st.integers(1, 90))
    scale = draw(st.sampled_from([None, 0.3, 1.0]))
    settings = dict(causal=causal, window=window if causal else None, scale=scale,
                    cap=draw(st.none() | st.just(0.8)))
    return [q, k, v], masks[draw(st.integers(0, 3))], settings


def with_bias(inputs, biased):
    """[q, k, v] or [q, k, v, bias], the mask, the settings; a bias for all texts, or for each."""
    (q, k, v), mask, settings = inputs
    shape = (1 if biased == "one" else len(q), *q.shape[1:3], k.shape[2])
    return [q, k, v] + [normal(*shape)] * (biased != "none"), mask, settings


def dropped(p, q, k):
    """What dropout multiplies the weights of the values by; None if p is 0."""
    shape = (*q.shape[:3], k.shape[2])
    return ops.dropout(np.ones(shape), p, np.random.default_rng(len(q))).data if p else None


biases, drops = st.sampled_from(["none", "one", "each"]), st.sampled_from([0, 0.2, 0.9])


@given(inputs=attention_inputs(), biased=biases, p=drops, block=st.sampled_from([1 << 10, 1 << 16]))
def test_attention_is_pytorchs(inputs, biased, p, block):
    """Tiles over rows and batch, every kind of mask, S > T, queries that see nothing, dropout."""
    inputs, mask, settings = with_bias(inputs, biased)
    drop = dropped(p, *inputs[:2])
    q, k = inputs[:2]
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    causal, window, scale, cap = settings.values()

    def ours(q, k, v, bias=None):
        return ops.attention(q, k, v, mask, bias, drop=drop, **settings)

    def twin(q, k, v, bias=None):
        bias = torch.zeros(T, S, dtype=q.dtype) if bias is None else bias
        if mask is not None:
            hidden = np.where(mask, 0, -np.inf) if mask.dtype == bool else mask
            bias = bias + torch.tensor(hidden)
        if causal:
            bias = bias.masked_fill(torch.ones(T, S, dtype=bool).triu(S - T + 1), -math.inf)
        if window:
            past = torch.ones(T, S, dtype=bool).tril(S - T - window)
            bias = bias.masked_fill(past, -math.inf)
        if cap is None and drop is None:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, bias, scale=scale, enable_gqa=True)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
        scores = (cap * torch.tanh(scores / cap) if cap else scores) + bias
        nothing = (scores == -math.inf).all(-1, keepdim=True)  # such a row gives 0
        P = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
        return (P if drop is None else P * torch.tensor(drop)) @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        actual = run_ours(ours, inputs, [])
    assert max(op_error(actual, run_torch(twin, inputs, []))) <= TOLERANCE["float64"]


@given(inputs=attention_inputs(), biased=biases, p=drops, block=st.sampled_from([1 << 10, 1 << 16]))
def test_attention_is_the_papers(inputs, biased, p, block):
    (q, k, v, *bias), mask, settings = with_bias(inputs, biased)
    given = settings | dict(bias=bias[0] if bias else None)
    given |= dict(drop=dropped(p, q, k)) if p else {}
    with np.errstate(invalid="ignore"):  # a query that may see nothing
        expected = attention.plain_attention(q, k, v, mask, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        y = ops.attention(q, k, v, mask=mask, **given).data
    close(y, np.nan_to_num(expected, nan=0.0), "float64", scale=1)


PLAIN = {
    "layer_norm": (lambda x, g, b: ops.layer_norm(x, g, b, eps=0.1),
                   lambda x, g, b: ops.plain_layer_norm(x, g, b, eps=0.1)),
    "rms_norm": (lambda x, g, b: ops.rms_norm(x, g, eps=0.1),
                 lambda x, g, b: ops.plain_rms_norm(x, g, eps=0.1)),
    "gelu": (lambda x, *_: ops.gelu(x), lambda x, *_: activations.plain_gelu(x)),
    "gelu tanh": (lambda x, *_: ops.gelu(x, approximate="tanh"),
                  lambda x, *_: activations.plain_gelu_tanh(x)),
    "cross_entropy": (lambda x, *_: ops.cross_entropy(x, np.arange(len(x)) % x.shape[1]),
                      lambda x, *_: losses.plain_cross_entropy(x, np.arange(len(x)) % x.shape[1])),
}


@pytest.mark.parametrize("fast, plain", PLAIN.values(), ids=PLAIN)
@given(N=st.integers(1, 9), C=st.integers(1, 9), size=st.sampled_from([0.1, 1, 30]), seed=seeds)
def test_the_fast_version_is_the_formula(fast, plain, N, C, size, seed):
    """In blocks of two rows or so, and in one."""
    x, (g, b) = size * normal(N, C, seed=seed), normal(2, C, seed=seed + 1)
    expected = plain(x, g, b)
    for block in (16, arrays.BLOCK):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arrays, "BLOCK", block)
            patch.setattr(arrays, "WHOLE", block)
            close(fast(x, g, b).data, expected, "float64", scale=1)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_a_query_that_sees_nothing_gives_zeros(dtype):
    q, k, v = (Tensor(x.astype(dtype), requires_grad=True) for x in normal(3, 1, 2, 3, 4))
    mask = np.array([[True] * 3, [False] * 3, [True] * 3])
    y = ops.attention(q, k, v, mask=mask)
    y.backward(np.full(y.shape, 100, dtype))
    assert (y.data[:, :, 1] == 0).all() and (q.grad[:, :, 1] == 0).all()
    assert all(np.isfinite(x.grad).all() for x in (q, k, v))
    assert (y.data[:, :, ::2] != 0).all() and (v.grad != 0).all()


def test_causal_attention_takes_no_notice_of_the_future():
    q, k, v = normal(3, 1, 2, 130, 4)
    before = ops.attention(q, k, v, causal=True).data
    k[:, :, 100:], v[:, :, 100:] = 1e3, 1e3
    after = ops.attention(q, k, v, causal=True).data
    assert (after[:, :, :100] == before[:, :, :100]).all()


def test_erf_is_maths():
    x = np.concatenate([np.linspace(-7, 7, 20_001), [1e-300, -1e-9, 1e300, np.inf, -np.inf]])
    for dtype, ulps in ((np.float64, 2), (np.float32, 3)):
        with np.errstate(over="ignore", under="ignore"):
            x = x.astype(dtype)
        expected = np.array([math.erf(v) for v in x])
        unit = np.spacing(np.abs(expected).astype(dtype)).astype(np.float64)
        assert (np.abs(arrays.erf(x) - expected) / unit).max() <= ulps
        assert np.isnan(arrays.erf(np.array([np.nan], dtype))).all()


@given(ids=st.lists(st.integers(0, 6), min_size=1, max_size=40), padding=st.integers(0, 6))
def test_padding_gives_its_row_no_gradient(ids, padding):
    """PyTorch's padding_idx: the row is looked up, but it does not learn."""
    W, dy = normal(7, 3), normal(len(ids), 3, seed=1)
    ours, theirs = Tensor(W, requires_grad=True), torch.tensor(W, requires_grad=True)
    y = ops.embedding(np.array(ids), ours, padding=padding)
    expected = torch.nn.functional.embedding(torch.tensor(ids), theirs, padding_idx=padding)
    assert np.array_equal(y.data, expected.detach().numpy())
    (y * dy).sum().backward()
    (expected * torch.tensor(dy)).sum().backward()
    assert np.abs(ours.grad - theirs.grad.numpy()).max() < 1e-12
    assert not ours.grad[padding].any()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
@given(ids=st.lists(st.integers(0, 6), max_size=40), C=st.integers(1, 5), seed=seeds)
def test_scatter_add_is_add_at(dtype, ids, C, seed):
    ids, dy = np.array(ids, np.int64), normal(len(ids), C, seed=seed).astype(dtype)
    expected = np.zeros((7, C))
    np.add.at(expected, ids, dy.astype(np.float64))
    total = arrays.scatter_add(ids, dy, 7)
    assert total.dtype == (np.float64 if dtype == np.float64 else np.float32)
    close(total, expected, total.dtype, scale=1)


@given(p=st.floats(0.05, 0.9), seed=seeds)
def test_dropout_drops_a_share_p_and_scales_the_rest(p, seed):
    n = 10_000
    x = Tensor(np.ones(n), requires_grad=True)
    y = ops.dropout(x, p, np.random.default_rng(seed))
    kept = y.data != 0
    assert abs(kept.sum() - n * (1 - p)) <= 6 * math.sqrt(n * p * (1 - p))  # six sigma
    close(y.data[kept], np.full(kept.sum(), 1 / (1 - p)), "float64")
    y.backward(np.full(n, 3.0))
    assert ((x.grad != 0) == kept).all()
    close(x.grad, 3 * y.data, "float64")


def test_a_draw_of_exactly_p_is_kept():
    """Numbers from 0 to below 1 are below p with probability p; p itself is one of the others."""
    class Generator:
        def random(self, shape, dtype):
            return np.array([0, 0.25, 0.5, 0.75], dtype)
    y = ops.dropout(np.ones(4), 0.5, Generator())
    assert y.data.tolist() == [0, 0, 2, 2]


def test_eps_and_temperature_where_none_is_given():
    x, one = np.array([[1e-3, -1e-3]]), np.ones(2)  # so small that eps is what counts
    close(ops.layer_norm(x, one, 0 * one).data, x / math.sqrt(1e-6 + 1e-5), "float64")
    close(ops.rms_norm(x, one).data, x / math.sqrt(1e-6 + 1e-6), "float64")
    assert (ops.plain_layer_norm(x, one, 0 * one) == ops.plain_layer_norm(x, one, 0, 1e-5)).all()
    assert (ops.plain_rms_norm(x, one) == ops.plain_rms_norm(x, one, 1e-6)).all()
    s, t = normal(2, 3, 4)
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (t, s))
    close(ops.kl_divergence(s, t).data, (p * np.log(p / q)).sum(-1).mean(), "float64")


def test_dropout_of_nothing_draws_nothing():
    x = normal(3, 4)
    assert (ops.dropout(Tensor(x), 0.0, None).data == x).all()


def test_an_ignored_target_has_no_gradient():
    logits = Tensor(normal(5, 7), requires_grad=True)
    ops.cross_entropy(logits, np.array([3, 9, 0, 9, 6]), ignore_index=9).backward()
    assert (np.abs(logits.grad).max(-1) > 0).tolist() == [True, False, True, False, True]


@given(cuts=st.sets(st.integers(1, 11), max_size=4), seed=seeds)
def test_the_losses_of_a_split_batch_add_up(cuts, seed):
    """With `total`, also where a part counts nothing."""
    z, rng = normal(12, 6, seed=seed), np.random.default_rng(seed)
    targets = np.where(rng.random(12) < 0.5, -100, rng.integers(0, 6, 12))
    targets[0], total = 2, int((targets != -100).sum()) + (targets[0] == -100)
    whole = Tensor(z, requires_grad=True)
    loss = ops.cross_entropy(whole, targets)
    loss.backward()
    edges = [0, *sorted(cuts), 12]
    losses, grads = [], []
    for start, stop in pairwise(edges):
        part = Tensor(z[start:stop], requires_grad=True)
        of_part = ops.cross_entropy(part, targets[start:stop], total=total)
        of_part.backward()
        losses.append(of_part.data)
        grads.append(part.grad)
    close(sum(losses), loss.data, "float64")
    close(np.concatenate(grads), whole.grad, "float64")
