"""Every op beside its twin in PyTorch: the table behind `compare_torch.py` and `tests/test_ops.py`.

A new op is a new row. The measure of error is here too, with the tolerances of all tests.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minilm import ops, tensor
from minilm.distill import top_k_divergence
from minilm.extras import install
from minilm.peft.lora import add_low_rank
from minilm.peft.qlora import quantized_lora
from minilm.quantize.linear import quantize_weight, quantized_linear
from minilm.tensor import Tensor

# The largest `error` of an op that computes in this dtype. With 16 bits it is four units in the
# last place: the arithmetic is float32, and only inputs and results are rounded. (One such result
# is the start of attention's gradients.) With float32 and float64 there is room for rounding to add
# up along the sums of matrix products.
TOLERANCE = {"float64": 1e-13, "float32": 5e-6, "bfloat16": 3e-2, "float16": 4e-3}


def error(actual, expected, scale: float = 0.0) -> float:
    """max|actual - expected| / max|expected|, with a divisor of at least `scale`.

    It compares with the largest element, because small ones are differences of large ones. If all
    elements may cancel to nothing, `scale` is the size of the numbers that cancel.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {actual.shape}, expected {expected.shape}")
    if not np.isfinite(actual).all():
        return math.inf
    size = max(np.abs(expected).max(initial=0), scale, np.finfo(np.float64).tiny)
    return float(np.abs(actual - expected).max(initial=0) / size)


def import_torch():
    try:
        import torch
    except ImportError:
        raise ImportError(f"PyTorch is not installed: {install('test')}") from None
    return torch


class Row(NamedTuple):
    """An op and its twin."""

    name: str  # of the op, then of the case
    ours: Callable  # of Tensors and arrays
    twin: Callable  # of torch.Tensors
    draw: Callable  # (rng, B, T, C) -> the arrays that get a gradient, the other arguments


def table() -> list[Row]:
    """Every differentiable function beside PyTorch's."""
    from preference_rows import preference_rows as last  # which imports this file
    F = import_torch().nn.functional
    return [row for rows in (layer_rows, attention_rows, loss_rows, adapted_rows, last)
            for row in rows(F)] + tensor_rows()


def tensor_rows():
    torch = import_torch()

    def product(r, B, T, C): return [normal(r, B, T, C), normal(r, C, 5)], []
    def pick(r, B, T, C): return [normal(r, B, T, C)], [r.integers(-T, T, 2 * T)]  # some twice
    def batch(r, B, T, C): return [normal(r, B, 1, T, C), normal(r, 2, C, T)], []
    def along(axis):
        def draw(r, B, T, C):
            sizes = [[B, T, C] for _ in range(3)]
            for size in sizes:
                size[axis] = r.integers(1, 4)
            return [normal(r, *size) for size in [*sizes, (B, T, C)]], []
        return draw
    return [
        Row("add", ops.add, torch.add, broadcast),
        Row("sub", tensor.sub, torch.sub, broadcast),
        Row("mul", ops.mul, torch.mul, broadcast),
        Row("div", tensor.div, torch.div, broadcast),
        Row("matmul", ops.matmul, torch.matmul, product),
        Row("matmul broadcast", ops.matmul, torch.matmul, batch),
        Row("getitem", *2 * [lambda x: x[:, ::2, -1]], one),
        Row("getitem integers", *2 * [lambda x, ids: x[:, ids]], pick),
        Row("reshape", *2 * [lambda x: x.reshape(-1, len(x))], one),
        Row("transpose", lambda x: x.transpose(1, -1, 0), lambda x: x.permute(1, -1, 0), one),
        *(Row(f"concat {axis}", lambda *x, axis=axis: ops.concat(*x, axis=axis),
              lambda *x, axis=axis: torch.cat(x, axis), along(axis)) for axis in (0, 1, -1)),
        Row("transpose all", lambda x: x.transpose(), lambda x: x.permute(2, 1, 0), one),
        Row("sum_", tensor.sum_, torch.sum, one),
        Row("sum_ axis", lambda x: x.sum(1), lambda x: x.sum(1), one),
        Row("sum_ axes kept", lambda x: x.sum((0, -1), keepdims=True),
            lambda x: x.sum((0, -1), keepdim=True), one),
    ]


def layer_rows(F):
    torch = import_torch()

    def affine(r, B, T, C): return [normal(r, B, T, C), normal(r, 7, C), normal(r, 7)], []
    def lookup(r, B, T, C): return [normal(r, 2 * C, C)], [r.integers(0, 2 * C, (B, T))]
    def gain(r, B, T, C): return [normal(r, B, T, C), normal(r, C)], []
    def gain_bias(r, B, T, C): return [normal(r, B, T, C), normal(r, C), normal(r, C)], []
    def gated(r, B, T, C): return [normal(r, B, T, C), normal(r, B, T, C)], []
    def joined(r, B, T, C): return [normal(r, B, T, 3 * C)], []
    def split(r, B, T, C): return [normal(r, B, 3, T, C)], []
    def keep(x, rng): return torch.tensor(rng.random(x.shape, np.float32) >= 0.3)
    eps = 0.1  # so large that a wrong eps shows, and that a few elements cannot cancel to nothing
    return [
        Row("linear", ops.linear, F.linear, affine),
        Row("linear without bias", ops.linear, F.linear, lambda *a: (affine(*a)[0][:2], [])),
        Row("embedding", lambda W, ids: ops.embedding(ids, W),
            lambda W, ids: F.embedding(ids, W), lookup),
        Row("relu", ops.relu, F.relu, lambda *a: ([apart(*a)], [])),
        Row("tanh", ops.tanh, torch.tanh, one),
        Row("silu", ops.silu, F.silu, one),
        Row("swiglu", ops.swiglu, lambda gate, up: F.silu(gate) * up, gated),
        Row("gelu", ops.gelu, F.gelu, one),
        Row("gelu tanh", lambda x: ops.gelu(x, approximate="tanh"),
            lambda x: F.gelu(x, approximate="tanh"), one),
        Row("soft_cap", lambda x: ops.soft_cap(x, 1.5), lambda x: 1.5 * torch.tanh(x / 1.5), one),
        Row("softmax", ops.softmax, lambda x: F.softmax(x, -1), one),
        Row("log_softmax", ops.log_softmax, lambda x: F.log_softmax(x, -1), one),
        Row("layer_norm", lambda x, g, b: ops.layer_norm(x, g, b, eps=eps),
            lambda x, g, b: F.layer_norm(x, g.shape, g, b, eps), gain_bias),
        Row("rms_norm", lambda x, g: ops.rms_norm(x, g, eps=eps),
            lambda x, g: F.rms_norm(x, g.shape, g, eps), gain),
        Row("dropout", lambda x: ops.dropout(x, 0.3, np.random.default_rng(5)),
            lambda x: x * keep(x, np.random.default_rng(5)) / 0.7, one),
        Row("split_heads", lambda x: ops.split_heads(x, 3),
            lambda x: x.unflatten(-1, (3, -1)).transpose(1, 2), joined),
        Row("merge_heads", ops.merge_heads, lambda x: x.transpose(1, 2).flatten(2), split),
    ]


def attention_rows(F):
    torch = import_torch()

    def turn(x, cos, sin):  # the pair as a complex number, times exp(i angle)
        pairs = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
        return torch.cat([pairs.real, pairs.imag], -1)

    def angles(r, B, T, C):
        a = r.uniform(0, 7, (T, C))
        return [normal(r, B, 2, T, 2 * C)], [np.cos(a), np.sin(a)]

    def qkv(r, B, T, C, K=2, more=0):
        shapes = (B, 4, T, C), (B, K, T + more, C), (B, K, T + more, C)
        return [r.uniform(-1, 1, shape) for shape in shapes]  # dk grows with the cube of their size

    def padded(r, B, T, C):  # True may be seen; now and then a row sees nothing
        return qkv(r, B, T, C, K=4), [r.random((B, 1, 1, T)) < 0.7]

    def biased(r, B, T, C): return qkv(r, B, T, C, K=1), [normal(r, 4, T, T)]
    def both(r, B, T, C): return [*qkv(r, B, T, C), normal(r, 1, 4, T, T)], [normal(r, B, 1, 1, T)]
    def sdpa(q, k, v, mask=None, causal=False, scale=None):
        if causal:  # our last query sees all keys; PyTorch's is_causal lets its first see one key
            seen = torch.ones(q.shape[2], k.shape[2], dtype=bool).tril(k.shape[2] - q.shape[2])
            mask = seen if mask is None else mask.masked_fill(~seen, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

    def capped_twin(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = 0.7 * torch.tanh(q @ k.mT / q.shape[-1] ** 0.5 / 0.7)
        seen = torch.ones(scores.shape[-2:], dtype=bool).tril(k.shape[2] - q.shape[2])
        return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
    capped = (lambda q, k, v: ops.attention(q, k, v, causal=True, cap=0.7)), capped_twin
    return [
        Row("rotary", ops.rotary, turn, angles),
        Row("attention", ops.attention, sdpa, lambda *a: (qkv(*a, K=4), [])),
        Row("attention grouped, causal, cache", lambda q, k, v: ops.attention(q, k, v, causal=True),
            lambda q, k, v: sdpa(q, k, v, causal=True), lambda *a: (qkv(*a, more=3), [])),
        Row("attention boolean mask", ops.attention, sdpa, padded),
        Row("attention additive mask, causal",
            lambda q, k, v, m: ops.attention(q, k, v, mask=m, causal=True),
            lambda q, k, v, m: sdpa(q, k, v, m, causal=True), biased),
        Row("attention scaled", lambda q, k, v: ops.attention(q, k, v, scale=1.0),
            lambda q, k, v: sdpa(q, k, v, scale=1.0), lambda *a: (qkv(*a), [])),
        Row("attention capped, causal", *capped, lambda *a: (qkv(*a, more=2), [])),
        Row("attention bias, mask", lambda q, k, v, b, m: ops.attention(q, k, v, m, b, scale=0.5),
            lambda q, k, v, b, m: sdpa(q, k, v, b + m, scale=0.5), both),
    ]


def loss_rows(F):
    torch = import_torch()

    def labels(r, B, T, C):  # the last one counts, some others do not
        targets = np.where(r.random((B, T)) < 0.3, -100, r.integers(0, C, (B, T)))
        targets[-1, -1] = 0
        return [normal(r, B, T, C)], [targets]

    def pair(r, B, T, C): return [apart(r, B, T, C), apart(r, B, T, C)], []
    def kl(s, t): return F.kl_div(*(F.log_softmax(x / 2, -1).flatten(0, 1) for x in (s, t)),
                                  reduction="batchmean", log_target=True)
    def masked(r, B, T, C):
        mask = r.random((B, T)) < 0.7
        mask[-1, -1] = True
        return pair(r, B, T, C)[0], [mask]
    def masked_kl(s, t, mask): return kl(s[mask][None], t[mask][None])
    def cosine(x, y):
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        return F.cosine_embedding_loss(x, y, torch.ones(len(x)))

    def chosen(r, B, T, C):  # k tokens of each row, whose probabilities leave some for the others
        k = r.integers(1, C, endpoint=True)
        ids = r.permuted(np.tile(np.arange(C), (B, T, 1)), axis=-1)[..., :k]
        log_p = F.log_softmax(torch.tensor(normal(r, B, T, C)), -1).numpy()
        return [apart(r, B, T, C)], [ids, np.take_along_axis(log_p, ids, -1)]
    def coarse_kl(z, ids, log_p):
        log_q = F.log_softmax(z / 2, -1)
        if ids.shape[-1] < z.shape[-1]:  # all others are one class more
            rest = log_q.exp().scatter(-1, ids, 0).sum(-1, keepdim=True)
            log_q = torch.cat([log_q.gather(-1, ids), rest.log()], -1)
            log_p = torch.cat([log_p, torch.log1p(-log_p.exp().sum(-1, keepdim=True))], -1)
        else:
            log_q = log_q.gather(-1, ids)
        return F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), reduction="batchmean",
                        log_target=True)
    return [
        Row("cross_entropy", ops.cross_entropy,
            lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()), labels),
        Row("kl_divergence", lambda s, t: ops.kl_divergence(s, t, temperature=2.0), kl, pair),
        Row("kl_divergence masked", lambda s, t, mask: ops.kl_divergence(s, t, 2.0, mask=mask),
            masked_kl, masked),
        Row("cosine_embedding", ops.cosine_embedding, cosine, pair),
        Row("cosine_embedding masked", lambda x, y, mask: ops.cosine_embedding(x, y, mask=mask),
            lambda x, y, mask: cosine(x[mask], y[mask]), masked),
        Row("top_k_divergence", lambda z, *k: top_k_divergence(z, *k, temperature=2.0), coarse_kl,
            chosen),
        Row("mse", ops.mse, F.mse_loss, pair),
    ]


def adapted_rows(F):
    torch = import_torch()

    def dequantized(W, kind):
        return torch.tensor(quantize_weight(W.numpy(), kind).dequantize()).to(W.dtype)

    def frozen(r, B, T, C): return [normal(r, B, T, C), normal(r, 7)], [normal(r, 7, C)]
    def without_bias(variables, others): return variables[:1], others
    def low_rank(r, B, T, C):
        return [normal(r, B, T, 7), normal(r, B, T, C), normal(r, 2, C), normal(r, 7, 2)], []
    def both(r, B, T, C):
        return [normal(r, B, T, C), normal(r, 2, C), normal(r, 7, 2), normal(r, 7)], [
            normal(r, 7, C)]
    return [
        Row("quantized_linear", lambda x, b, W: quantized_linear(x, quantize_weight(W, "nf4"), b),
            lambda x, b, W: F.linear(x, dequantized(W, "nf4"), b), frozen),
        Row("quantized_linear int8, without bias",
            lambda x, W: quantized_linear(x, quantize_weight(W, "int8")),
            lambda x, W: F.linear(x, dequantized(W, "int8")), lambda *a: without_bias(*frozen(*a))),
        Row("add_low_rank", lambda *inputs: add_low_rank(*inputs, scale=0.5),
            lambda y, x, A, B: y + 0.5 * x @ A.T @ B.T, low_rank),
        Row("quantized_lora", lambda x, A, B, b, W: quantized_lora(x, quantize_weight(W, "nf4"),
                                                                   A, B, b, scale=0.5),
            lambda x, A, B, b, W: F.linear(x, dequantized(W, "nf4"), b) + 0.5 * x @ A.T @ B.T,
            both),
    ]


def normal(rng, *shape): return rng.standard_normal(shape)
def one(rng, B, T, C): return [normal(rng, B, T, C)], []


def apart(rng, *shape):
    """Numbers of either sign, away from zero: there quotients grow, and relu has a corner."""
    x = rng.standard_normal(shape)
    return x + np.copysign(1, x)


def broadcast(rng, B, T, C):
    """Two arrays in either order; one has fewer axes, or axes of size 1."""
    shapes = [(B, T, C), (C,), (1,), (T, 1), (B, 1, C), (1, 1, 1), ()]
    pair = [apart(rng, B, T, C), apart(rng, *shapes[rng.integers(len(shapes))])]
    return pair[:: rng.choice([-1, 1])], []


def op_error(actual, expected):
    """`error` of the value and of every gradient.

    Inputs and dy have about the size of 1 and either sign, so n of them add up to about sqrt(n).
    The gradient of an input that was broadcast is such a sum.
    """
    def scale(e): return max(1.0, math.sqrt(expected[0].size / e.size))
    return [error(a, e, scale(e)) for a, e in zip(actual, expected, strict=True)]


def cast(dtype, *inputs):
    """The same lists of arrays with their floating-point numbers in `dtype`."""
    floating = "fV"  # V: bfloat16, which is not NumPy's own
    return [[x.astype(dtype) if x.dtype.kind in floating else x for x in part] for part in inputs]


def run_ours(fn, variables, others):
    """The value and the gradient of every variable, for the dy that `weights` gives."""
    xs = [Tensor(x, requires_grad=True) for x in variables]
    y = fn(*xs, *others)
    y.backward(weights(y, variables))
    return [y.data, *(x.grad for x in xs)]


def run_torch(fn, variables, others):
    """The same in PyTorch."""
    torch = import_torch()
    xs = [torch.tensor(x.copy(), requires_grad=True) for x in variables]
    y = fn(*xs, *(torch.tensor(x) for x in others))
    y.backward(torch.tensor(weights(y.detach().numpy(), variables)))
    return [y.detach().numpy(), *(x.grad.numpy() for x in xs)]


def weights(y, variables):
    """A dy for y, always the same. For a scalar it is so large that the gradients are about 1."""
    dy = np.random.default_rng(1).standard_normal(y.shape) if y.ndim else variables[0].size
    return np.asarray(dy, y.dtype)
