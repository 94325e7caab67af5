"""kernels/dropout.cu, scatter_add.cu, gather.cu: what is random or added up has the same bits.

Philox against the numbers that its authors publish, the kernel against its NumPy twin, sums against
a loop over the rows, all in every order of threads; and wrong input, refused before a launch.
"""

import threading

import emulated_cupy
import emulator
import numpy as np
import pytest
from conftest import counted_launches
from hypothesis import example, given
from hypothesis import strategies as st

from minilm import cuda, ops
from minilm.backend import to_device
from minilm.graph import randomness
from minilm.nn import Dropout, Embedding
from minilm.optim import AdamW
from minilm.tensor import Tensor, checkpoint

DTYPES = list(cuda.REAL)
dtypes, seeds, orders = st.sampled_from(DTYPES), st.integers(0, 2**63 - 1), st.integers(0, 9)

KNOWN = [  # counter, key, numbers: Random123's kat_vectors, philox4x32 of 10 rounds
    ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822,
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


@pytest.mark.parametrize("counter, key, numbers", KNOWN)
def test_philox_gives_the_numbers_of_its_authors(counter, key, numbers):
    assert cuda.philox(np.array(counter, np.uint64), key).tolist() == numbers


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@given(dtypes, st.integers(0, 300) | st.sampled_from([1023, 1024, 4101]),
       st.sampled_from([0.1, 0.5, 0.999]), seeds, orders)
def test_dropout_is_its_twin(cupy, dtype, n, p, seed, order):
    x = normal(seed % 97, n).astype(dtype)
    with emulator.thread_order(order):
        y = cuda.dropout(cupy.asarray(x), p, seed).get()
    scaled = x.astype(np.float32) * np.float32(1 / (1 - p))
    expected = np.where(cuda.kept(x.shape, p, seed), scaled, 0).astype(dtype)
    assert y.dtype == dtype and y.tobytes() == expected.tobytes()


@given(st.sampled_from([0.1, 0.5, 0.9]), seeds)
def test_a_share_p_is_dropped_and_seeds_differ(p, seed):
    kept = cuda.kept((100, 100), p, seed)
    assert abs(kept.mean() - (1 - p)) < 0.03
    other = cuda.kept((100, 100), p, seed ^ 1 << 40)  # also where only the high half differs
    assert abs((kept == other).mean() - (p * p + (1 - p) ** 2)) < 0.05


def test_the_op_draws_one_seed_and_its_gradient_drops_the_same(cupy):
    x = Tensor(cupy.asarray(normal(0, 3, 70)), requires_grad=True)
    rng, seed = np.random.default_rng(4), int(np.random.default_rng(4).integers(2**63))
    y = ops.dropout(x, 0.4, rng)
    y.backward(cupy.ones((3, 70), "float32"))
    kept = cuda.kept((3, 70), 0.4, seed)
    assert ((y.data.get() != 0) == kept).all()
    assert (x.grad.get() == kept * np.float32(1 / 0.6)).all()
    after = np.random.default_rng(4)
    after.integers(2**63)
    assert rng.bit_generator.state == after.bit_generator.state


def test_a_checkpoint_drops_the_same_again(cupy):
    grads, layer = [], Dropout(0.5)
    for run in (lambda f, x: f(x), checkpoint):
        x = Tensor(cupy.asarray(normal(1, 40)), requires_grad=True)
        with randomness(np.random.default_rng(7)):
            run(lambda x: layer(x) * layer(x), x).backward(cupy.ones(40, "float32"))
        grads.append(x.grad.get().tobytes())
    assert grads[0] == grads[1]


def in_order(ids, dy, n):
    total = np.zeros((n, dy.shape[1]), np.float32)
    for i, row in zip(ids, dy.astype(np.float32)):
        total[i] += row
    return total


@given(dtypes, st.integers(0, 80), st.sampled_from([1, 3, 127, 128, 129, 260]), st.integers(1, 9),
       st.booleans(), seeds, orders)
@example("float32", 70, 130, 1, True, 0, 1)
def test_rows_are_added_in_their_order(cupy, dtype, N, C, n, on_card, seed, order):
    ids, dy = np.random.default_rng(seed).integers(0, n, N), normal(seed, N, C).astype(dtype)
    with emulator.thread_order(order):
        total = cuda.scatter_add(cupy.asarray(ids) if on_card else ids, cupy.asarray(dy), n).get()
    assert total.tobytes() == in_order(ids, dy, n).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embeddings_gradient(cupy, dtype):
    """With ids on either side, and nothing waits for the card where they are NumPy's."""
    ids, dy = np.random.default_rng(0).integers(0, 5, (4, 30)), normal(0, 4, 30, 6).astype(dtype)
    found = []
    for places in (ids, cupy.asarray(ids)):
        table = Embedding(5, 6, np.random.default_rng(1)).astype(dtype).to("cuda")
        emulated_cupy.reset()
        table(places).backward(cupy.asarray(dy))
        assert places is not ids or not emulated_cupy.to_host
        found.append(table.weight.grad.get())
    expected = in_order(ids.ravel(), dy.reshape(-1, 6), 5).astype(dtype)
    assert found[0].tobytes() == found[1].tobytes() == expected.tobytes()


@pytest.mark.parametrize("index", [
    (slice(None), -1), (slice(1, 3), None, 0), 1, ..., ([0, 2, 0, 0],), ([1, 1], slice(0, 2))])
def test_an_items_gradient(cupy, index):
    """An array as an index may name an element twice; slices may not."""
    x = normal(2, 3, 4)
    grads = []
    for xp in (np, cupy):
        parts = index if isinstance(index, tuple) else (index,)
        place = tuple(xp.asarray(p) if isinstance(p, list) else p for p in parts)
        leaf = Tensor(xp.asarray(x), requires_grad=True)
        y = leaf[place]
        y.backward(xp.asarray(normal(3, *y.shape)))
        grads.append(leaf.grad if xp is np else leaf.grad.get())
    np.testing.assert_allclose(*grads, rtol=1e-6)


@given(st.sampled_from(["float16", "bfloat16"]), st.lists(st.integers(0, 9000), max_size=5), orders)
def test_pieces_come_to_their_places(cupy, dtype, sizes, order):
    """And nothing else is written."""
    pieces = [normal(i, n).astype(dtype) for i, n in enumerate(sizes)]
    places = np.cumsum([3, *(n + 1 for n in sizes)])[:-1].tolist()
    flat = np.full(sum(sizes) + 9, 7, np.float32)
    found = cupy.asarray(flat)
    with emulator.thread_order(order):
        cuda.gather([cupy.asarray(x) for x in pieces], places, found)
    for x, place in zip(pieces, places):
        flat[place : place + x.size] = x
    assert found.get().tobytes() == flat.tobytes()


def doubled(params, times):
    """Backward of sum of p * p, some times."""
    for _ in range(times):
        sum(((p * p).sum() for p in params), start=0.0).backward()


@pytest.mark.parametrize("times", [1, 2])
def test_small_gradients_wait_and_come_in_one_launch(cupy, times):
    """Each is there when `backward` ends; a second walk adds to the first."""
    values, grads = [normal(i, 5, 3).astype("bfloat16") for i in range(4)], []
    for xp in (np, cupy):
        params = [Tensor(xp.asarray(x), requires_grad=True) for x in values]
        opt = AdamW(params)
        with counted_launches() as launched:
            doubled(params, times)
        assert launched["gather"] == (xp is cupy)
        grads.append([to_device(p.grad, "cpu").tobytes() for p in params])
        assert params[0].grad.dtype == "float32" and not opt.flat.waiting
    assert grads[0] == grads[1]


def test_a_gradient_that_comes_while_others_are_gathered_is_not_lost(cupy, monkeypatch):
    a, b = (Tensor(cupy.zeros(8, "bfloat16"), requires_grad=True) for _ in range(2))
    flat, launch, others = AdamW([a, b]).flat, cuda.gather, []

    def slow(*args):  # a thread brings the other gradient in the middle of it
        if not others:
            others.append(threading.Thread(target=b.on_grad, args=[cupy.ones(8, "bfloat16")]))
            others[0].start()
            others[0].join(0.1)
        launch(*args)

    monkeypatch.setattr(cuda, "gather", slow)
    a.on_grad(cupy.ones(8, "bfloat16"))
    flat.gather()
    others[0].join()
    flat.gather()
    assert flat.grad.get().tolist() == [1] * 16


def test_gradients_that_waited_in_vain_are_forgotten(cupy):
    """A walk that ends in an error, and a hook that hands gradients over to another thread."""
    a, b = (Tensor(cupy.asarray(normal(i, 6).astype("bfloat16")), requires_grad=True)
            for i in range(2))
    opt = AdamW([a, b])
    a.on_grad(cupy.ones(6, "bfloat16"))
    opt.zero_grad()
    assert not opt.flat.waiting
    doubled([b], 1)
    opt.flat.complete()
    assert opt.flat.grad.get()[:6].tolist() == [0] * 6
    opt.zero_grad()
    b.on_grad(cupy.full(6, 2, "bfloat16"))  # waits until it is asked for, or a second one comes
    b.on_grad(cupy.full(6, 3, "bfloat16"))
    assert b.grad.get().tolist() == [5] * 6
    opt.zero_grad()
    b.on_grad(cupy.ones(6, "bfloat16"))
    opt.flat.complete()
    assert b.grad.get().tolist() == [1] * 6


def test_wrong_input_is_refused_before_a_launch(cupy):
    before, x = emulator.launches.copy(), cupy.ones((4, 6), "float32")
    for error, message, call in [
        (ValueError, "do not go with rows", lambda: cuda.scatter_add(np.zeros(3, int), x, 2)),
        (ValueError, "do not go with rows", lambda: cuda.scatter_add(np.zeros(4, int), x[0], 2)),
        (ValueError, "contiguous", lambda: cuda.scatter_add(np.zeros(6, int), x.T, 2)),
        (ValueError, "of 24 numbers, .* fit 24 numbers from 1", lambda: cuda.gather(
            [x.astype("float16")], [1], x.reshape(-1))),
        (ValueError, "does not fit", lambda: cuda.gather([x.astype("float16").T], [0], x)),
        (TypeError, "one dtype", lambda: cuda.gather([x, x.astype("float16")], [0, 0], x)),
        (TypeError, "flat must be float32", lambda: cuda.gather([x], [0], x.astype("float16"))),
        (TypeError, "on the GPU", lambda: cuda.dropout(x.get(), 0.5, 1)),
        (ValueError, "multiple of 16", lambda: cuda.dropout(x.reshape(-1)[1:], 0.5, 1)),
        (OverflowError, "seed = 9223372036854775808", lambda: cuda.dropout(x, 0.5, 2**63)),
        (TypeError, "computes in", lambda: cuda.dropout(x.astype("float64"), 0.5, 1)),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert emulator.launches == before
