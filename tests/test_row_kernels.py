"""kernels/swiglu.cu, rms_norm.cu and rotary.cu, by their ops and by their launchers: values and
gradients against NumPy in float64, each element to what rounding it once allows (rotary: the bits
of NumPy), in every order of threads.

Also: arrays that are strided or misaligned, what is kept for the backward pass, dtypes that have no
kernel, and wrong input, refused before a launch.
"""

import emulator
import numpy as np
import pytest
from conftest import close, counted_launches
from hypothesis import example, given
from hypothesis import strategies as st

from minilm import cuda, ops
from minilm.backend import array_module, pointer
from minilm.tensor import Tensor

HALF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # rounding changes a number
FLOAT32 = 2.0**-21  # by this share of it at most, and a few roundings of float32 by this
DTYPES = list(HALF)
lengths = st.integers(1, 40) | st.sampled_from([511, 512, 513, 1023, 1024, 1025, 1032, 2048, 2057])
dtypes, rows, seeds = st.sampled_from(DTYPES), st.integers(1, 3), st.integers(0, 2**32 - 1)
orders = st.integers(0, 9)


def draw(seed, dtype, *shapes, size=1.0):
    rng = np.random.default_rng(seed)
    return [(size * rng.standard_normal(shape)).astype(dtype) for shape in shapes]


def run(cupy, op, variables, dy, order=0, change=lambda x: x):
    """The value and the gradient of every variable, on the card; change: the arrays given there."""
    xs = [Tensor(change(cupy.asarray(x)), requires_grad=True) for x in variables]
    with emulator.thread_order(order):
        y = op(*xs)
        y.backward(change(cupy.asarray(dy)))
    return [a.get() for a in (y.data, *(x.grad for x in xs))]


def spec(op, variables, dy):
    """The same in float64 on the CPU."""
    xs = [Tensor(x.astype(np.float64), requires_grad=True) for x in variables]
    y = op(*xs)
    y.backward(dy.astype(np.float64))
    return [y.data, *(x.grad for x in xs)]


def rounded_once(found, expected, off, dtype):
    """off: how far float32 may be off before that."""
    for actual, exact, more in zip(found, expected, off, strict=True):
        assert actual.dtype == dtype and actual.shape == exact.shape
        allowed = 1.01 * HALF[dtype] * abs(exact) + 1.01 * more
        allowed += 2.0**-25 if dtype == "float16" else 1e-35  # denormals
        assert (abs(actual - exact) <= allowed).all()


def swiglu_off(gate, up, dy):
    """exp(-gate) is the less exact the larger gate is."""
    gate, up, dy = (a.astype(np.float64) for a in (gate, up, dy))
    share, s = FLOAT32 * (1 + abs(gate)), 1 / (1 + np.exp(-gate))
    silu = abs(gate) * s
    slope = s + silu * (1 - s)
    return share * abs(up) * silu, share * abs(dy * up) * slope, share * abs(dy) * silu


def norm(x, g):
    return ops.rms_norm(x, g, eps=0.01)


def norm_off(x, g, dy):
    x, g, dy = (abs(a.astype(np.float64)) for a in (x, g, dy))
    rstd = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + 0.01)
    xhat, dyg = x * rstd, dy * g
    dx = rstd * (dyg + xhat * (dyg * xhat).mean(-1, keepdims=True))
    return [FLOAT32 * a for a in (xhat * g, dx, (dy * xhat).reshape(-1, len(g)).sum(0))]


@given(dtypes, rows, lengths, st.sampled_from([0.01, 1, 30]), seeds, orders)
@example("bfloat16", 1, 2048, 1, 0, 0)
@example("bfloat16", 1, 2049, 1, 0, 0)
@example("float32", 3, 2049, 30, 0, 1)
def test_swiglu(cupy, dtype, N, C, size, seed, order):
    gate, = draw(seed, dtype, (N, C), size=size)
    up, dy = draw(seed + 1, dtype, (N, C), (N, C))
    found = run(cupy, ops.swiglu, (gate, up), dy, order)
    rounded_once(found, spec(ops.swiglu, (gate, up), dy), swiglu_off(gate, up, dy), dtype)


@given(dtypes, rows, lengths, st.sampled_from([0.01, 1, 30]), seeds)
def test_swiglu_on_the_cpu_rounds_once_too(dtype, N, C, size, seed):
    gate, = draw(seed, dtype, (N, C), size=size)
    up, dy = draw(seed + 1, dtype, (N, C), (N, C))
    xs = [Tensor(x, requires_grad=True) for x in (gate, up)]
    with np.errstate(over="ignore"):  # of exp(-gate), in float32
        y = ops.swiglu(*xs)
        y.backward(dy)
    found = [y.data, *(x.grad for x in xs)]
    rounded_once(found, spec(ops.swiglu, (gate, up), dy), swiglu_off(gate, up, dy), dtype)


@given(dtypes, rows, lengths, st.sampled_from([1e-3, 1, 300]), seeds, orders)
@example("bfloat16", 2, 1025, 1, 0, 0)
@example("float32", 2, 512, 1, 0, 0)
def test_rms_norm(cupy, dtype, N, C, size, seed, order):
    x, = draw(seed, dtype, (2, N, C), size=size)
    g, dy = draw(seed + 1, dtype, C, (2, N, C))
    found = run(cupy, norm, (x, g), dy, order)
    rounded_once(found, spec(norm, (x, g), dy), norm_off(x, g, dy), dtype)


def tables(seed, dtype, T, half):
    angles = np.random.default_rng(seed).uniform(0, 7, (T, half))
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def turned(tables, xp=np, heads_apart=False):
    """rotary as an op of x: heads that lie between tokens come as split_heads' view."""
    cos, sin = (xp.asarray(t) for t in tables)
    if heads_apart:
        return lambda x: ops.rotary(x, cos, sin)
    return lambda x: ops.rotary(ops.split_heads(x, x.shape[-1] // (2 * cos.shape[-1])), cos, sin)


@given(dtypes, st.integers(1, 3), st.integers(1, 9), st.integers(1, 3),
       st.sampled_from([2, 4, 6, 8, 16, 24, 64, 128]), st.booleans(), seeds, orders)
@example("bfloat16", 2, 40, 2, 64, False, 0, 0)
@example("float32", 1, 5, 1, 2, True, 0, 1)
def test_rotary(cupy, dtype, B, T, H, D, apart, seed, order):
    """The bits of NumPy, from the view of split_heads and back, by one launch each way; heads that
    lie apart will do too."""
    x, = draw(seed, dtype, (B, H, T, D) if apart else (B, T, H * D))
    dy, = draw(seed + 1, dtype, (B, H, T, D))
    given = tables(seed, dtype, T, D // 2)
    with counted_launches() as launched:
        found = run(cupy, turned(given, cupy, apart), (x,), dy, order)
    assert launched == {"rotary": 2}
    x = Tensor(x, requires_grad=True)
    y = turned(given, np, apart)(x)
    y.backward(dy)
    assert [a.tobytes() for a in (y.data, x.grad)] == [a.tobytes() for a in found]


def test_a_turned_head_lies_apart_and_its_gradient_between_tokens(cupy):
    """So attention copies neither q nor k, and the gradient is a row of all heads as it is."""
    x, dy, *given = draw(0, "float32", (2, 3, 8), (2, 2, 3, 4), (3, 2), (3, 2))
    x = Tensor(cupy.asarray(x), requires_grad=True)
    y = turned(given, cupy)(x)
    assert y.data.flags.c_contiguous
    split = Tensor(x.data.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3), requires_grad=True)
    kept, split.on_grad = [], lambda dx: kept.append(dx)
    ops.rotary(split, *map(cupy.asarray, given)).backward(cupy.asarray(dy))
    assert kept[0].transpose(0, 2, 1, 3).flags.c_contiguous


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_beyond_exps_range(cupy, dtype):
    """exp(-gate) overflows or vanishes; a gate that is no number says so."""
    gate = np.array([-300, -89, -88, 88, 89, 300, np.inf, np.nan], dtype)
    up, dy = np.full((2, 8), 2, dtype)
    y, dgate, dup = run(cupy, ops.swiglu, (gate, up), dy)
    expected = [0, 0, 0, *2 * gate[3:6].astype(float)]
    close(y[:6], expected, dtype)
    close(dup[:6], expected, dtype)
    close(dgate[:6], [0, 0, 0, 4, 4, 4], dtype)
    assert y[6] == np.inf and np.isnan(y[7].astype(float))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 4.0])
def test_rms_norm_knows_its_eps(cupy, dtype, eps):
    x, g, dy = draw(0, dtype, (3, 24), 24, (3, 24))
    x[1] = 0
    def op(x, g): return ops.rms_norm(x, g, eps=eps)
    for actual, expected in zip(run(cupy, op, (x, g), dy), spec(op, (x, g), dy)):
        close(actual, expected, dtype)


def misaligned(x):
    room = array_module(x).empty(x.size + 1, x.dtype)
    room[1:] = x.reshape(-1)
    assert pointer(room[1:]) % 16
    return room[1:].reshape(x.shape)


LAYOUTS = {
    "columns": lambda x: x.T.copy().T,
    "strided": lambda x: x.repeat(2, -1)[..., ::2],
    "reversed": lambda x: x[..., ::-1].copy()[..., ::-1],
    "misaligned": misaligned,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_will_do(cupy, dtype, layout):
    gate, up, x, g, dy = draw(1, dtype, *[(3, 5)] * 3, 5, (3, 5))
    for op, variables in ((ops.swiglu, (gate, up)), (norm, (x, g))):
        expected = run(cupy, op, variables, dy)
        found = run(cupy, op, variables, dy, change=LAYOUTS[layout])
        assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op, shapes", [(ops.swiglu, [(2, 1100)] * 2), (norm, [(3, 2100), 2100])])
def test_every_order_of_threads_gives_the_same_bits(cupy, op, shapes, dtype):
    *variables, dy = draw(2, dtype, *shapes, shapes[0])
    found = {b"".join(a.tobytes() for a in run(cupy, op, variables, dy, order))
             for order in range(4)}
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_inputs_and_rstd_are_kept(cupy, dtype):
    pool = cupy.get_default_memory_pool()
    gate, up, x, g = (Tensor(cupy.asarray(a), requires_grad=True)
                      for a in draw(3, dtype, *[(16, 128)] * 3, 128))
    before = pool.used_bytes()
    y = ops.swiglu(gate, up)
    assert pool.used_bytes() - before == y.data.nbytes
    before = pool.used_bytes()
    z = norm(x, g)
    assert pool.used_bytes() - before == z.data.nbytes + 512  # the least that a block takes


def test_what_has_no_kernel_is_left_to_the_formulas(cupy):
    """float64, and an RMSNorm whose gain has another dtype than x."""
    before = emulator.launches.copy()
    gate, up, dy, x = draw(4, "float64", *[(3, 5)] * 4)
    g, = draw(5, "float32", 5)
    for op, variables in ((ops.swiglu, (gate, up)), (norm, (x, g.astype("float64"))),
                          (norm, (x.astype("bfloat16"), g))):
        dy = dy.astype(variables[0].dtype)
        for actual, expected in zip(run(cupy, op, variables, dy), spec(op, variables, dy)):
            close(actual, expected, dy.dtype)
    assert emulator.launches == before


def test_nothing_is_no_launch(cupy):
    before = emulator.launches.copy()
    for shape in ((0, 5), (3, 0)):
        x = cupy.zeros(shape, "float32")
        assert cuda.swiglu(x, x).shape == shape
        y, rstd = cuda.rms_norm(x, cupy.zeros(shape[1:], "float32"), 1e-6)
        assert y.shape == shape and rstd.shape == shape[:1]
    none = cupy.zeros((3, 2), "float32")
    assert cuda.rotary(cupy.zeros((2, 3, 0, 4), "float32"), none, none).shape == (2, 0, 3, 4)
    assert emulator.launches == before


LAUNCHERS = {
    cuda.swiglu: {"gate": (4, 16), "up": (4, 16)},
    cuda.swiglu_backward: {"dy": (4, 16), "gate": (4, 16), "up": (4, 16)},
    cuda.rms_norm: {"x": (4, 16), "g": (16,)},
    cuda.rms_norm_backward: {"dy": (4, 16), "x": (4, 16), "g": (16,), "rstd": (4,)},
    cuda.rotary: {"x": (2, 8, 2, 16), "cos": (8, 8), "sin": (8, 8)},
}
WRONG = [
    (TypeError, "GPU|ndarray", lambda a: a.get()),
    (TypeError, "must be (float32|float16),", lambda a: a.astype("float16")),
    (ValueError, "one shape|needs (g|tables)", lambda a: a[..., :-1].copy()),
    (ValueError, "one shape|needs (g|tables)", lambda a: a.reshape(*a.shape, 1)),
    (ValueError, "contiguous", LAYOUTS["strided"]),
    (ValueError, "multiple of 16", misaligned),
]


@pytest.mark.parametrize("launcher, name", [
    (launcher, name) for launcher, shapes in LAUNCHERS.items() for name in shapes])
@pytest.mark.parametrize("error, message, change", WRONG)
def test_wrong_arrays(cupy, launcher, name, error, message, change):
    given = {key: cupy.ones(shape, "float32") for key, shape in LAUNCHERS[launcher].items()}
    given[name], before = change(given[name]), emulator.launches.copy()
    settings = {"eps": 1e-6} if launcher is cuda.rms_norm else {}
    with pytest.raises(error, match=message):
        launcher(**given, **settings)
    assert emulator.launches == before


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.__name__)
def test_dtypes_that_no_kernel_has(cupy, launcher):
    given = {key: cupy.ones(shape, "float64") for key, shape in LAUNCHERS[launcher].items()}
    settings = {"eps": 1e-6} if launcher is cuda.rms_norm else {}
    with pytest.raises(TypeError, match="computes in float32, float16, bfloat16, got float64"):
        launcher(**given, **settings)


def test_the_dtypes_are_those_of_kernels():
    assert set(DTYPES) == set(cuda.REAL)
