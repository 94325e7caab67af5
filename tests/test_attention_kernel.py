"""kernels/attention.cu and attention_backward.cu by their launchers: values and gradients against
minilm.attention in float64, to what rounding P and dS to bfloat16 allows, element by element.

Also: the same bits in every order of threads, an error of PyTorch's size, tiles left out, and wrong
input refused before a launch.
"""

import emulator
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilm.attention import attention
from minilm.cuda import attention_backward, attention_forward
from minilm.tensor import Tensor

BF16 = 2.0**-8  # rounding to bfloat16 changes a number by this share of it, at most
FLOAT32 = 2.0**-21  # the same for a few roundings to float32
lengths = st.integers(1, 70) | st.sampled_from([1, 63, 64, 65, 127, 128, 129])
heads = st.sampled_from([(1, 1, 1), (1, 2, 1), (2, 2, 2), (2, 3, 1), (1, 4, 2)])  # B, H, K
widths = st.sampled_from([16, 16, 64, 128])
seeds = st.integers(0, 2**32 - 1)
# Standard deviations of q, and a number that q and k share: scores near 0, of thousands, near -256.
kinds = st.sampled_from([(1, 0), (300, 0), (1, 8), (1, -8)])


def draw(heads, T, S, D, seed, kind=(1, 0)):
    """q, k, v and dy in bfloat16."""
    (B, H, K), (size, shared), rng = heads, kind, np.random.default_rng(seed)
    q, k, v, dy = (rng.standard_normal(shape)
                   for shape in ((B, H, T, D), (B, K, S, D), (B, K, S, D), (B, H, T, D)))
    return [a.astype("bfloat16") for a in (size * q + shared, k + abs(shared), v, dy)]


def run(cupy, q, k, v, dy, causal, scale=None):
    """y, lse, dq, dk, dv of the kernels."""
    q, k, v, dy = (cupy.asarray(a) for a in (q, k, v, dy))
    y, lse = attention_forward(q, k, v, causal, scale)
    return [a.get() for a in (y, lse, *attention_backward(dy, q, k, v, y, lse, causal, scale))]


def spec(q, k, v, dy, causal):
    """y, lse, dq, dk, dv in float64, and how far from them the kernels may be, each element."""
    group, scale, inputs = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5, (q, k, v)
    q, k, v = variables = [Tensor(a.astype(np.float64), requires_grad=True) for a in inputs]
    y, dy = attention(q, k, v, causal=causal), dy.astype(np.float64)
    y.backward(dy)
    q, k, v = q.data, k.data.repeat(group, 1), v.data.repeat(group, 1)
    scores = scale * q @ turned(k)
    if causal:
        scores += np.triu(np.full(scores.shape[-2:], -np.inf), 1 + k.shape[2] - q.shape[2])
    top = scores.max(-1, keepdims=True)
    lse = top + np.log(np.exp(scores - top).sum(-1, keepdims=True))
    P = np.exp(scores - lse)
    dP = dy @ turned(v)
    dS = P * (dP - (dy * y.data).sum(-1, keepdims=True))

    q, k, v, dy = (abs(a) for a in (q, k, v, dy))  # errors do not cancel in a bound
    wobble = FLOAT32 * (1 + (scale * q @ turned(k)).max(-1, keepdims=True))  # P's, in float32
    off_y = (BF16 + 2 * wobble) * (P @ v) + BF16 * abs(y.data)
    off_dS = (BF16 + wobble) * abs(dS) + P * (
        (dy * off_y).sum(-1, keepdims=True) + FLOAT32 * (dy @ turned(v)))
    off = [scale * off_dS @ k, scale * turned(off_dS) @ q, turned((BF16 + wobble) * P) @ dy]
    off[1:] = [a.reshape(a.shape[0], -1, group, *a.shape[2:]).sum(2) for a in off[1:]]
    gradients = [a.grad for a in variables]
    off = [a + BF16 * abs(g) for a, g in zip(off, gradients)]
    off_lse = wobble + FLOAT32 * abs(lse)
    return (y.data, lse[..., 0], *gradients), (off_y, off_lse[..., 0], *off)


def turned(a):
    return a.swapaxes(-1, -2)


def bits(arrays):
    return [a.tobytes() for a in arrays]


@given(heads, lengths, lengths, widths, st.booleans(), kinds, seeds, st.integers(0, 9))
@example((1, 1, 1), 64, 65, 16, True, (1, 0), 0, 0)  # a tile of one key, of one query that sees it
@example((1, 1, 1), 65, 65, 16, True, (1, 0), 0, 0)
@example((1, 2, 1), 1, 70, 16, True, (1, -8), 0, 0)  # exp(-lse) overflows
def test_values_and_gradients(cupy, heads, T, S, D, causal, kind, seed, order):
    inputs = draw(heads, min(T, S) if causal else T, S, D, seed, kind)
    with emulator.thread_order(order):
        found = run(cupy, *inputs, causal)
    for name, actual, expected, off in zip("y lse dq dk dv".split(), found, *spec(*inputs, causal)):
        assert actual.dtype == ("float32" if name == "lse" else "bfloat16")
        assert actual.shape == expected.shape
        assert (abs(actual - expected) <= 1.01 * off + 1e-30).all(), name


@pytest.mark.parametrize("causal", [False, True])
def test_the_error_is_of_the_size_of_pytorchs(cupy, causal):
    torch = pytest.importorskip("torch")
    inputs = draw((1, 3, 3), 100, 100, 64, 0)
    q, k, v, dy = (torch.tensor(a.astype(np.float32)).bfloat16() for a in inputs)
    variables = [a.requires_grad_() for a in (q, k, v)]
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    y.backward(dy)
    theirs = [a.detach().double().numpy() for a in (y, *(a.grad for a in variables))]
    exact, _ = spec(*inputs, causal)
    found = run(cupy, *inputs, causal)
    for ours, twin, expected in zip([found[0], *found[2:]], theirs, [exact[0], *exact[2:]]):
        assert rms(ours - expected) < 1.2 * rms(twin - expected)


def test_a_scale_is_that_of_scaled_queries(cupy):
    """16^-0.5 (2 q) k^T has the numbers of 0.5 q k^T; powers of two round nothing."""
    q, k, v, dy = draw((1, 2, 1), 67, 70, 16, 3)
    y, lse, dq, dk, dv = run(cupy, q, k, v, dy, True, scale=0.5)
    found = y, lse, (dq / 2).astype("bfloat16"), dk, dv
    assert bits(found) == bits(run(cupy, (2 * q).astype("bfloat16"), k, v, dy, True))


def rms(a):
    return float(np.sqrt(np.square(a, dtype=np.float64).mean()))


@pytest.mark.parametrize("D", [16, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_every_order_of_threads_gives_the_same_bits(cupy, D, causal):
    inputs = draw((1, 2, 1), 67, 70, D, 1)
    expected = bits(run(cupy, *inputs, causal))
    for seed in range(3):
        with emulator.thread_order(seed):
            assert bits(run(cupy, *inputs, causal)) == expected


def test_tiles_that_nobody_sees_are_not_read(cupy):
    """NaN would spread from them: nan times zero is nan."""
    q, k, v, dy = draw((1, 2, 1), 150, 200, 16, 2)  # query i sees the keys up to 50 + i
    late_keys, early_queries = (a.copy() for a in (k, q))
    late_keys[:, :, 128:] = early_queries[:, :, :64] = np.nan
    y, lse, dq, *_ = run(cupy, q, late_keys, late_keys, dy, causal=True)
    for a in (y, lse, dq):
        assert np.isfinite(a[:, :, :64]).all() and np.isnan(a[:, :, 128:]).any()
    *_, dk, dv = run(cupy, early_queries, k, v, dy, causal=True)
    for a in (dk, dv):
        assert np.isfinite(a[:, :, 128:]).all() and np.isnan(a[:, :, :128]).any()


def arrays(cupy, dtype="bfloat16", **shapes):
    """dy, q, k, v, y, lse of ones."""
    usual = dict.fromkeys(("dy", "q", "y"), (1, 4, 3, 16)) | dict.fromkeys("kv", (1, 2, 5, 16))
    usual |= {"lse": (1, 4, 3)} | shapes
    return {name: cupy.ones(usual[name], "float32" if name == "lse" else dtype)
            for name in ("dy", "q", "k", "v", "y", "lse")}


WRONG_SHAPES = {
    "of three axes": dict(q=(4, 3, 16)),
    "another batch": dict(k=(2, 2, 5, 16), v=(2, 2, 5, 16)),
    "no multiple of the heads": dict(k=(1, 3, 5, 16), v=(1, 3, 5, 16)),
    "k is not v": dict(v=(1, 2, 6, 16)),
    "another width": dict(k=(1, 2, 5, 32), v=(1, 2, 5, 32)),
    "more queries than keys": dict(q=(1, 4, 6, 16)),
    "no keys": dict(k=(1, 2, 0, 16), v=(1, 2, 0, 16)),
    "no heads": dict(k=(1, 0, 5, 16), v=(1, 0, 5, 16)),
    "width 24": dict(q=(1, 4, 3, 24), k=(1, 2, 5, 24), v=(1, 2, 5, 24)),
    "width 144": dict(q=(1, 4, 3, 144), k=(1, 2, 5, 144), v=(1, 2, 5, 144)),
}


@pytest.mark.parametrize("shapes", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_wrong_shapes(cupy, shapes):
    given, before = arrays(cupy, **shapes), emulator.launches.copy()
    with pytest.raises(ValueError, match=r"attention_forward: .* does not go with|width"):
        attention_forward(given["q"], given["k"], given["v"], causal=True)
    with pytest.raises(ValueError, match=r"attention_backward: .* does not go with|width"):
        attention_backward(**given, causal=True)
    assert emulator.launches == before


@pytest.mark.parametrize("name, shape", [
    ("dy", (1, 4, 2, 16)), ("y", (1, 2, 3, 16)), ("lse", (1, 4, 3, 1))])
def test_wrong_shapes_of_what_the_forward_pass_saved(cupy, name, shape):
    before = emulator.launches.copy()
    with pytest.raises(ValueError, match=f"attention_backward: {name} .* does not go with q"):
        attention_backward(**arrays(cupy, **{name: shape}), causal=False)
    assert emulator.launches == before


@pytest.mark.parametrize("name", ["dy", "q", "k", "v", "y", "lse"])
def test_wrong_arrays(cupy, name):
    """Another dtype, not contiguous, not on the GPU: for each argument of both launchers."""
    right, before = arrays(cupy), emulator.launches.copy()
    turned = right[name].swapaxes(-1, -2).copy().swapaxes(-1, -2)
    for wrong, error, message in [(right[name].astype("float16"), TypeError, f"{name} must be"),
                                  (turned, ValueError, f"{name} must be contiguous"),
                                  (right[name].get(), TypeError, "GPU|ndarray")]:
        given = right | {name: wrong}
        with pytest.raises(error, match=message):
            attention_backward(**given, causal=False)
        if name in "qkv":
            with pytest.raises(error, match=message):
                attention_forward(given["q"], given["k"], given["v"], causal=False)
    assert emulator.launches == before
