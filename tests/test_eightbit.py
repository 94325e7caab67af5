"""minilm.optim.eightbit: codes are the nearest, the laws of quantization in blocks of 256, a step
is AdamW's between the two maps, parts and CuPy change no bit, training goes as in float32, and
(marked peers) bitsandbytes has the same maps, constants, numbers and steps.
"""

import itertools
import logging
import os
from fractions import Fraction

import emulated_cupy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.backend import peak_memory
from minilm.optim import FlatParameters, eightbit
from minilm.optim.adamw import adamw
from minilm.optim.eightbit import EightBit, dequantize, quantize
from minilm.quantize.codebooks import dynamic_map
from minilm.tensor import Tensor

SETTINGS = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(0, 70) | st.sampled_from([255, 256, 257, 511, 512, 513, 1000, 1024, 2049])
signs = st.booleans()
each_sign = pytest.mark.parametrize("signed", [True, False])
BOUND = {True: 0.00704, False: 0.00352}  # of absmax: half of the widest gap, 0.9 / 64 and 0.9 / 128
SMALLEST = {True: 5.5e-7, False: 3.25e-7}  # of the values above zero


def varied(n, seed, signed=True):
    """Numbers of many magnitudes in blocks of others; a fifth of them zeros."""
    rng = np.random.default_rng(seed)
    size = np.repeat(10 ** rng.uniform(-9, 9, n // 256 + 1), 256)[:n]
    x = rng.standard_normal(n) * size * 10 ** rng.uniform(-7, 0, n)
    x[rng.random(n) < 0.2] = 0
    return (x if signed else np.abs(x)).astype(np.float32)


def round_trip(x, signed):
    return dequantize(*quantize(x, signed), signed)


def constants(x):
    """Of each number the largest magnitude of its block."""
    blocks = [x[i : i + 256] for i in range(0, x.size, 256)]
    return np.concatenate([np.full(b.size, np.abs(b).max(), np.float32) for b in blocks])


def bits(*arrays):
    return [a.tobytes() for a in arrays]


def test_the_unsigned_map_has_a_zero_a_one_and_254_floats():
    values = dynamic_map(signed=False)
    assert len(values) == 256 and (np.diff(values) > 0).all() and values[[0, -1]].tolist() == [0, 1]
    for i in range(7):  # i + 1 bits of fraction between 10^(i-7) and 10^(i-6)
        inside = values[(values > 10.0 ** (i - 7)) & (values < 10.0 ** (i - 6))]
        assert len(inside) == 2 ** (i + 1)
        assert np.allclose(np.diff(inside), 0.9 / 2 ** (i + 1) * 10.0 ** (i - 6), rtol=1e-4)


@each_sign
def test_codes_are_the_nearest_beside_every_middle(signed):
    """In exact arithmetic, for the floats around each: at a tie the lower. A quarter or so of the
    middles themselves are floats; where they are rounded, some are rounded up."""
    values, ties = dynamic_map(signed), 0
    for i in range(255):
        low, high = Fraction(float(values[i])), Fraction(float(values[i + 1]))
        s = np.float32(float(low + high) / 2)
        around = [np.nextafter(s, np.float32(-2)), s, np.nextafter(s, np.float32(2))]
        wanted = [i + (2 * Fraction(float(a)) > low + high) for a in around]
        assert eightbit._nearest(np.array(around), signed).tolist() == wanted
        ties += 2 * Fraction(float(s)) == low + high
    assert 0 < ties < 255
    assert (eightbit._nearest(values, signed) == np.arange(256)).all()


@each_sign
def test_codes_are_the_nearest_at_both_ends_of_all_equal_upper_bits(signed):
    """With the test above: between these ends and the middles codes cannot change."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    s = np.concatenate([upper, upper | 0xFFFF]).view(np.float32)
    s = s[np.abs(s) <= 1]
    values = dynamic_map(signed).astype(np.float64)
    wanted = np.searchsorted((values[1:] + values[:-1]) / 2, s.astype(np.float64))
    assert len(s) > 2 * 32000 and (eightbit._nearest(s, signed) == wanted).all()


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=300), signs)
def test_codes_are_the_nearest_of_256(numbers, signed):
    x = np.float32([1, *numbers])[:256]  # a block that is divided by 1
    x = x if signed else np.abs(x)
    codes, absmax = quantize(x, signed)
    distances = np.abs(dynamic_map(signed)[:, None].astype(np.float64) - x)
    assert absmax == 1 and (codes == distances.argmin(0)).all()


@given(seeds, st.integers(-90, 90), signs)
def test_a_number_is_divided_by_its_constant_and_rounded_once(seed, k, signed):
    """A product with the reciprocal would be rounded twice, and take some to the other code."""
    largest = np.ldexp(np.random.default_rng(seed).uniform(1, 2), k).astype(np.float32)
    values = dynamic_map(signed).astype(np.float64)
    middles = (values[1:] + values[:-1]) / 2
    x = (middles * largest).astype(np.float32)
    codes, _ = quantize(np.append(largest, x), signed)
    assert (codes[1:] == np.searchsorted(middles, (x / largest).astype(np.float64))).all()


@given(sizes, seeds, signs)
def test_round_trip(n, seed, signed):
    """The constants are exact, one a block; no number is off by more than half a gap."""
    x = varied(n, seed, signed)
    codes, absmax = quantize(x, signed)
    assert (codes.dtype, absmax.dtype) == (np.uint8, np.float32)
    assert codes.shape == x.shape and absmax.shape == (-(-n // 256),)
    if n:
        assert (np.repeat(absmax, 256)[:n] == constants(x)).all()
        y = dequantize(codes, absmax, signed)
        assert y.dtype == np.float32 and y.shape == x.shape
        error = np.abs(x - y) / np.maximum(constants(x), 1e-30)
        assert error.max() <= BOUND[signed]
        small = np.abs(x) < 0.1 * constants(x)
        assert (error[small] <= BOUND[signed] / 5 * 1.001).all(), "half of them, a tenth the size"


@given(sizes, seeds, signs)
def test_quantizing_again_changes_no_bit(n, seed, signed):
    """Where the largest of a block is positive; -1 becomes -0.993 and is then the largest."""
    x = varied(n, seed, signed)
    x[::256] = constants(x)[::256] if n else 0
    once = quantize(x, signed)
    assert bits(*quantize(dequantize(*once, signed), signed)) == bits(*once)


def test_a_negative_largest_number_loses_seven_thousandths():
    x = np.float32([-2, 1, 0.5])
    y = round_trip(x, signed=True)
    assert y[0] == 2 * dynamic_map()[0] and abs(y[0] / x[0] - 0.99297) < 1e-5


@given(sizes, seeds, signs)
def test_codes_rise_with_the_numbers(n, seed, signed):
    x = varied(n, seed, signed)
    codes, _ = quantize(x, signed)
    for i in range(0, n, 256):
        order = np.argsort(x[i : i + 256], kind="stable")
        assert (np.diff(codes[i : i + 256][order].astype(int)) >= 0).all()


@given(sizes, seeds, signs, st.integers(-40, 40))
def test_a_power_of_two_scales_the_constants_alone(n, seed, signed, k):
    x = varied(n, seed, signed)
    (codes, absmax), (same, scaled) = quantize(x, signed), quantize(np.ldexp(x, k), signed)
    assert bits(same, scaled) == bits(codes, np.ldexp(absmax, k))


@given(sizes, seeds)
def test_the_sign_turns_the_codes_around(n, seed):
    """All but the largest, as the map has no -1; the zero has the code 127."""
    x = varied(n, seed)
    (codes, absmax), (turned, same) = quantize(x, True), quantize(-x, True)
    inner = np.abs(x) < 0.99 * constants(x) if n else codes > 0
    assert bits(absmax) == bits(same)
    assert (turned[inner] == 254 - codes[inner]).all() and (codes[x == 0] == 127).all()


@given(st.integers(0, 3), signs, st.sampled_from([0.0, 1e-39, 1.1e-38]))
def test_a_block_of_zeros_or_less_than_the_card_can_divide_by(block, signed, tiny):
    x = varied(4 * 256 - 9, seed=1, signed=signed)
    part = slice(256 * block, 256 * block + 256)
    rest, _ = quantize(x, signed)
    x[part] = tiny
    codes, absmax = quantize(x, signed)
    assert absmax[block] == 0 and (codes[part] == (127 if signed else 0)).all()
    y = dequantize(codes, absmax, signed)
    assert (y[part] == 0).all() and not np.signbit(y[part]).any()
    outside = np.arange(x.size) // 256 != block
    assert (codes[outside] == rest[outside]).all()


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-100, 2.0**100, 3e38])
@each_sign
def test_blocks_of_extreme_numbers(signed, scale):
    x = np.float32(scale) * np.float32([1, 0.5, 0.3, 0.1, 0.07])
    error = np.abs(round_trip(x, signed).astype(np.float64) - x)
    assert (error <= 0.00704 * scale).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_vanish(bad):
    x = varied(3 * 256, seed=0)
    good = round_trip(x, True)
    x[300] = bad
    with np.errstate(invalid="ignore"):
        y = round_trip(x, True)
    assert not np.isfinite(y[300]), "and nothing outside of its block changes"
    assert bits(y[:256], y[512:]) == bits(good[:256], good[512:])


def start(n, seed, steps=2):
    """(p, arrays) after some steps with gradients of many magnitudes."""
    p = np.random.default_rng(seed).standard_normal(n, dtype=np.float32)
    arrays = EightBit().zeros(n)
    for t in range(1, steps + 1):
        EightBit().update(p, varied(n, seed + t), arrays, t, **SETTINGS)
    return p, arrays


def moments(arrays):
    m_codes, v_codes, m_absmax, v_absmax = arrays
    return dequantize(m_codes, m_absmax, signed=True), dequantize(v_codes, v_absmax, signed=False)


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 5000])
def test_the_state_of_n_parameters(n):
    arrays, blocks = EightBit().zeros(n), -(-n // 256)
    assert [a.dtype.name for a in arrays] == ["uint8", "uint8", "float32", "float32"]
    assert [a.shape for a in arrays] == [(n,), (n,), (blocks,), (blocks,)]
    assert not any(a.any() for a in arrays) and not any(m.any() for m in moments(arrays))
    assert sum(a.nbytes for a in arrays) == 2 * n + 8 * blocks
    assert len(arrays) == len(EightBit.names)


@given(sizes, seeds, st.integers(0, 3), st.sampled_from([1.0, 0.25, 3.0]),
       st.sampled_from([0.0, 0.3]))
def test_a_step_is_adamw_between_the_maps(n, seed, steps, scale, weight_decay):
    """Parameters to the bit; the new states are the nearest codes of the new m and v."""
    p, arrays = start(n, seed % 1000, steps)
    g, settings = varied(n, seed), SETTINGS | {"weight_decay": weight_decay}
    before = g.copy()
    expected, (m, v) = p.copy(), (moment.copy() for moment in moments(arrays))
    adamw(expected, g, m, v, steps + 1, **settings, scale=scale)
    EightBit().update(p, g, arrays, steps + 1, **settings, scale=scale)
    assert bits(p, g) == bits(expected, before)
    (m_codes, m_absmax), (v_codes, v_absmax) = quantize(m, True), quantize(v, False)
    assert bits(*arrays) == bits(m_codes, v_codes, m_absmax, v_absmax)


@given(sizes, seeds)
def test_the_first_step_is_adamws_to_the_bit(n, seed):
    p, g = varied(n, seed), varied(n, seed + 1)
    expected = p.copy()
    adamw(expected, g, np.zeros_like(p), np.zeros_like(p), 1, **SETTINGS)
    EightBit().update(p, g, EightBit().zeros(n), 1, **SETTINGS)
    assert bits(p) == bits(expected)


@given(st.integers(1, 2100), st.lists(st.integers(0, 8), max_size=4), st.integers(1, 5), seeds)
def test_parts_and_chunks_leave_the_bits_alone(n, borders, chunk, seed):
    """Parts are pages, which begin with a block; chunks are what the cache holds."""
    borders = [0, *sorted({256 * b for b in borders if 0 < 256 * b < n}), n]
    g, (p, arrays) = varied(n, seed), start(n, seed=1)
    parts, split = p.copy(), [a.copy() for a in arrays]
    EightBit().update(p, g, arrays, 3, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eightbit, "BLOCK", 256 * chunk)
        for begin, end in itertools.pairwise(borders):
            blocks = slice(begin // 256, -(-end // 256))
            page = [a[blocks if a.dtype == np.float32 else slice(begin, end)] for a in split]
            EightBit().update(parts[begin:end], g[begin:end], page, 3, **SETTINGS)
    assert bits(parts, *split) == bits(p, *arrays)


def test_chunks_are_whole_blocks():
    assert EightBit.block == 256
    assert eightbit.BLOCK % EightBit.block == eightbit.CARD_BLOCK % EightBit.block == 0


@pytest.mark.kernels
def test_a_step_on_cupy_takes_little_memory_beside_the_states(cupy, monkeypatch):
    """About 20 bytes for each number of a chunk."""
    monkeypatch.setattr(eightbit, "CARD_BLOCK", 1 << 12)
    p, g, arrays = *cupy.zeros((2, 1 << 14), "float32"), EightBit().zeros(1 << 14, cupy)
    EightBit().update(p, g, arrays, 1, **SETTINGS)  # makes the tables
    before = cupy.get_default_memory_pool().used_bytes()
    with peak_memory() as peak:
        EightBit().update(p, g, arrays, 2, **SETTINGS)
    assert 0 < peak.bytes - before <= 21 * (1 << 12)


@pytest.mark.kernels
@pytest.mark.parametrize("n", [1, 300, 4096, 5001, 1 << 14])
def test_an_update_takes_no_more_besides_than_it_says(cupy, monkeypatch, n):
    """The first one too, which makes the tables."""
    monkeypatch.setattr(eightbit, "CARD_BLOCK", 1 << 12)
    eightbit._tables.cache_clear()
    p, g, arrays = *(cupy.zeros(n, "float32") for _ in "pg"), EightBit().zeros(n, cupy)
    before = cupy.get_default_memory_pool().used_bytes()
    with peak_memory() as peak:
        EightBit().update(p, g, arrays, 1, **SETTINGS)
    assert 0 < peak.bytes - before <= EightBit().spare(n)


@pytest.mark.kernels
@pytest.mark.parametrize("n", [0, 1, 256, 300, 4096, 5001])
@pytest.mark.parametrize("chunk", [1024, eightbit.CARD_BLOCK])
def test_steps_on_cupy_are_numpys_bit_for_bit(cupy, monkeypatch, n, chunk):
    """And no number comes to the host on the way."""
    monkeypatch.setattr(eightbit, "CARD_BLOCK", chunk)
    p, arrays = start(n, seed=0, steps=0)
    on_card, states = cupy.asarray(p), EightBit().zeros(n, cupy)
    for t in range(1, 4):
        g = varied(n, seed=t)
        EightBit().update(p, g, arrays, t, **SETTINGS, scale=0.5)
        given = cupy.asarray(g)
        emulated_cupy.to_host.clear()
        EightBit().update(on_card, given, states, t, **SETTINGS, scale=0.5)
        assert not emulated_cupy.to_host
    assert bits(on_card.get(), *(a.get() for a in states)) == bits(p, *arrays)


def test_a_v_too_small_for_its_block_becomes_zero():
    """What the module warns of: m is then divided by eps if the gradient stops."""
    p, arrays = np.zeros(256, np.float32), EightBit().zeros(256)
    g = np.full(256, 1, np.float32)
    g[:2] = 3e-4, 6e-4  # their squares: 0.9e-7, 3.6e-7; half of the smallest value is 1.6e-7
    EightBit().update(p, g, arrays, 1, **SETTINGS)
    m, v = moments(arrays)
    assert m[0] > 0 and v[0] == 0 and v[1] > 0
    EightBit().update(p, 0 * g, arrays, 2, **SETTINGS)
    assert abs(p[0]) > 100 * SETTINGS["lr"] and np.abs(p[1:]).max() < 3 * SETTINGS["lr"]


def trained(update, steps=300):
    """The loss of a network with one hidden layer of 64, taught by another, after each step."""
    rng = np.random.default_rng(0)
    def normal(*shape): return rng.standard_normal(shape, dtype=np.float32)
    x, teacher = normal(256, 16), [normal(32, 16) / 4, normal(4, 32) / 6]
    y = np.tanh(x @ teacher[0].T) @ teacher[1].T
    params = [Tensor(w, requires_grad=True) for w in
              (normal(64, 16) / 4, np.zeros(64, np.float32), normal(4, 64) / 8)]
    flat, losses = FlatParameters(params), []
    state, settings = update(flat.size), SETTINGS | {"lr": 5e-3, "beta2": 0.99}
    for t in range(1, steps + 1):
        flat.zero_grad()
        loss = ops.mse(ops.linear(ops.gelu(ops.linear(Tensor(x), *params[:2])), params[2]), y)
        loss.backward()
        state(flat.data, flat.grad, t, **settings)
        losses.append(float(loss.data))
    return losses


def in_eight_bits(n):
    arrays = EightBit().zeros(n)
    return lambda p, g, *args, **settings: EightBit().update(p, g, arrays, *args, **settings)


def in_float32(n):
    m, v = np.zeros((2, n), np.float32)
    return lambda p, g, *args, **settings: adamw(p, g, m, v, *args, **settings)


def test_training_goes_as_in_float32():
    ours, full = np.array(trained(in_eight_bits)), np.array(trained(in_float32))
    assert full[-1] < full[0] / 100
    assert np.abs(ours / full - 1).max() < 0.05 and abs(ours[-1] / full[-1] - 1) < 0.04


# bitsandbytes' code for CPUs does not look for the nearest value: it first rounds T_i / N to the
# nearest of 65536 steps from -1 to 1. That, and no more, is the difference allowed below.
HALF_STEP = 1 / 65535 + 3e-7  # and the rounding of float32 on the way there
nearest, LR = eightbit._nearest, SETTINGS["lr"]


def on_its_grid(s, signed):
    step = ((s + 1) * np.float32(0.5)).astype(np.float64) * 65535 + 0.5
    return nearest((np.trunc(step.astype(np.float32)) * (2 / 65535) - 1).astype(np.float32), signed)


@pytest.fixture(scope="module")
def peer():
    """bitsandbytes; it warns of a missing GPU library by logging."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    yield pytest.importorskip("bitsandbytes")
    logging.disable(logging.NOTSET)


@pytest.mark.peers
@each_sign
def test_the_maps_are_bitsandbytes(peer, signed):
    theirs = peer.functional.create_dynamic_map(signed=signed).numpy()
    assert dynamic_map(signed).dtype == theirs.dtype and bits(dynamic_map(signed)) == bits(theirs)


def its_codes(peer, x, signed):
    import torch

    code = peer.functional.create_dynamic_map(signed=signed)
    codes, state = peer.functional.quantize_blockwise(torch.tensor(x), code=code, blocksize=256)
    return codes, state, codes.numpy(), state.absmax.numpy()


@pytest.mark.peers
@given(sizes.filter(bool), seeds, signs)
def test_blocks_are_bitsandbytes(peer, n, seed, signed):
    """Constants and numbers to the bit; codes are its codes but where the grid is between."""
    x = varied(n, seed, signed)
    x[::256] = constants(x)[::256] + 1e-9  # it has another code for a block of zeros
    state_codes, state, theirs, their_absmax = its_codes(peer, x, signed)
    codes, absmax = quantize(x, signed)
    assert bits(absmax) == bits(their_absmax)
    numbers = peer.functional.dequantize_blockwise(state_codes, state).numpy()
    assert bits(numbers) == bits(dequantize(theirs, their_absmax, signed))

    s, values = x / constants(x), dynamic_map(signed)
    middles = (values[1:] + values[:-1]) / 2
    free = np.abs(s[:, None] - middles).min(1) > HALF_STEP
    assert (codes[free] == theirs[free]).all()
    further = np.abs(values[theirs] - s) - np.abs(values[codes] - s)
    assert further.min() >= -1e-7 and further.max() <= 2 * HALF_STEP


@pytest.mark.peers
@each_sign
def test_codes_of_normal_numbers_are_mostly_bitsandbytes(peer, signed):
    x = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    x = x if signed else np.abs(x)
    _, _, theirs, absmax = its_codes(peer, x, signed)
    assert (quantize(x, signed)[0] != theirs).mean() < 0.005
    snapped = on_its_grid((x.reshape(-1, 256) * (1 / absmax)[:, None]).reshape(-1), signed)
    assert (snapped == theirs).all()


@pytest.fixture
def both(peer):
    """step(t, g) -> (our p, its p, our arrays, its arrays), from the same 5001 parameters.

    They are the memory of both optimizers. There are 20 blocks, the last one short.
    """
    import torch

    p = np.random.default_rng(0).standard_normal(5001, dtype=np.float32)
    other, arrays = torch.nn.Parameter(torch.tensor(p)), EightBit().zeros(5001)
    adam = peer.optim.AdamW8bit([other], lr=LR, weight_decay=SETTINGS["weight_decay"])

    def step(t, g):
        other.grad = torch.tensor(g)
        adam.step()
        EightBit().update(p, g, arrays, t, **SETTINGS)
        state = (adam.state[other][key] for key in ("state1", "state2", "absmax1", "absmax2"))
        return p, other.detach().numpy(), arrays, [a.numpy() for a in state]
    return step


def gradients(steps):
    """1 <= |g| <= 2, so that v is in the highest decade of the map, where the grid is fine."""
    rng, shape = np.random.default_rng(1), (steps, 5001)
    return (rng.choice([-1, 1], shape) * rng.uniform(1, 2, shape)).astype(np.float32)


@pytest.mark.peers
def test_on_its_grid_steps_are_bitsandbytes(both, monkeypatch):
    """But for rounding, which may turn a code now and then."""
    monkeypatch.setattr(eightbit, "_nearest", on_its_grid)
    for t, g in enumerate(gradients(5), 1):
        p, its_p, arrays, its_arrays = both(t, g)
        for ours, theirs in zip(arrays[:2], its_arrays[:2]):
            assert (ours != theirs).mean() < 1e-3
        for ours, theirs in zip(arrays[2:], its_arrays[2:]):
            assert np.allclose(ours, theirs, rtol=1e-6, atol=0)
        assert (np.abs(p - its_p) > 1e-3 * LR).mean() < 1e-3


@pytest.mark.peers
def test_steps_stay_close_to_bitsandbytes(both):
    """A step parts the states by one code at most: 0.0141 of absmax in m, 0.0071 in v. Without
    their bias m <= 2 and 1 <= v <= 4, so that is 0.0282 in each, and 0.0565 lr in the next step;
    after five steps 0.0565 (1 + 2 + 3 + 4) lr at the most, and for most parameters next to none.
    """
    for t, g in enumerate(gradients(5), 1):
        p, its_p, _, _ = both(t, g)
        assert np.abs(p - its_p).max() <= max(0.0565 * t * (t - 1) / 2, 1e-3) * LR
    assert np.median(np.abs(p - its_p)) < 1e-3 * LR


@pytest.mark.peers
@pytest.mark.parametrize("ours_to_theirs", [True, False])
def test_states_can_be_exchanged_with_bitsandbytes(both, ours_to_theirs):
    """From one state, ours or its own, both make the same step."""
    for t in (1, 2, 3):
        p, its_p, arrays, its_arrays = both(t, varied(5001, seed=t))
    assert all((a != b).any() for a, b in zip(arrays[:2], its_arrays[:2]))
    its_p[...] = p
    for ours, theirs in zip(arrays, its_arrays):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        source, target = (ours, theirs) if ours_to_theirs else (theirs, ours)
        target[...] = source
    before = p.copy()
    both(4, varied(5001, seed=4))
    moved = np.abs(p - before)
    assert np.median(moved) > 0.1 * LR
    assert (np.abs(p - its_p) <= 1e-5 * moved + 5e-7).all()
