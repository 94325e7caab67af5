"""The engine: what `backward` adds up and in which shape, what a graph keeps alive, `checkpoint`,
and threads that share parameters."""

import gc
import threading
import time
import tracemalloc
import weakref
from operator import add, matmul, mul, sub, truediv

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.graph import current_rng
from minilm.tensor import Tensor, after_backward, checkpoint, no_grad, op, randomness


def leaf(*shape, dtype=np.float64, seed=0):
    x = np.random.default_rng(seed).integers(-3, 4, shape)
    return Tensor(x.astype(dtype), requires_grad=True)


def test_a_tensor_used_three_times_adds_up():
    x = leaf(3)
    (x + x + x).backward(np.array([1.0, 10.0, 100.0]))
    assert x.grad.tolist() == [3, 30, 300]


def test_a_tensor_becomes_other_data_wherever_it_is_shared():
    x = shared = leaf(3)
    (x * x).sum().backward()
    x.become(x.data.astype(np.float32))
    assert shared.dtype == np.float32 and x.requires_grad and x.grad is None
    (shared * 2.0).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    frozen = Tensor(np.ones(2))
    frozen.become(np.zeros(3))
    assert not frozen.requires_grad and frozen.data.tolist() == [0, 0, 0]
    frozen.become(np.ones(1), requires_grad=True)
    assert frozen.requires_grad
    with pytest.raises(TypeError, match="int64"):
        frozen.become(np.arange(2))


def test_a_diamond_sends_its_gradient_on_once_it_is_whole():
    x = Tensor(np.array(3.0), requires_grad=True)
    y = x * x  # 9
    left, right = y * 2.0, y * y
    (left * right).backward()  # 2 x^6
    assert x.grad == 12 * 3.0**5


def test_a_graph_5000_ops_deep():
    x = h = Tensor(np.ones(2), requires_grad=True)
    for _ in range(5000):
        h = h + x
    h.backward(np.ones(2))
    assert x.grad.tolist() == [5001, 5001]


places = st.integers(0, 99)


@given(st.lists(st.tuples(st.sampled_from("+-*"), places, places), max_size=9))
def test_a_random_graph_of_polynomials(steps):
    """Dual numbers (value, slope) need no graph and give the same; integers are exact."""
    x = Tensor(np.array(2.0), requires_grad=True)
    values, duals = [x, Tensor(np.array(3.0))], [(2, 1), (3, 0)]
    for sign, i, j in steps:
        i, j = i % len(values), j % len(values)
        (a, da), (b, db) = duals[i], duals[j]
        match sign:
            case "+":
                values.append(values[i] + values[j])
                duals.append((a + b, da + db))
            case "-":
                values.append(values[i] - values[j])
                duals.append((a - b, da - db))
            case "*":
                values.append(values[i] * values[j])
                duals.append((a * b, da * b + a * db))
        if abs(duals[-1][0]) > 1000:
            break
    y, (value, slope) = values[-1], duals[-1]
    assert y.data == value
    if y.requires_grad:
        y.backward()
        assert x.grad == slope


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (1, 4), (1, 1, 1), (2, 1, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_gradient_of_a_broadcast_input_is_a_sum(shape, dtype):
    x, dy = leaf(*shape, dtype=dtype), np.arange(24.0).reshape(2, 3, 4).astype(dtype)
    (x + np.zeros((2, 3, 4), dtype)).backward(dy)
    axes = tuple(i - 3 for i in range(3) if i < 3 - len(shape) or shape[i - 3] == 1)
    expected = dy.astype(np.float64).sum(axes, keepdims=True).reshape(shape)
    assert x.grad.dtype == dtype and x.grad.shape == shape
    assert (x.grad == expected.astype(dtype)).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_sums_count_past_their_precision(dtype):
    """Adding 1 to 2048 (float16) or to 256 (bfloat16) changes nothing, so sums need float32."""
    ones = np.ones((4096, 1), dtype)
    assert Tensor(ones).sum().data == 4096
    for shape in ((), (1,), (1, 1)):
        x = Tensor(np.ones(shape, dtype), requires_grad=True)
        (ones * x).backward(ones)
        assert (x.grad == 4096).all()
    x = Tensor(np.ones((2, 1), dtype), requires_grad=True)
    x[np.zeros(4096, int)].backward(ones)
    assert x.grad.tolist() == [[4096], [0]]


def test_gradients_of_several_graphs_add_up():
    x = leaf(3)
    (x * 2.0).sum().backward()
    first = x.grad
    (x * 5.0).sum().backward()
    assert x.grad.tolist() == [7, 7, 7]
    assert first.tolist() == [2, 2, 2]


def test_the_gradient_is_not_the_array_that_was_passed_in():
    x, y, dy = leaf(3), leaf(3), np.ones(3)
    (x + y).backward(dy)
    x.grad[:] = 9
    assert dy.tolist() == y.grad.tolist() == [1, 1, 1]


def test_a_graph_runs_backward_once():
    y = (leaf(3) * 2.0).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="has used up this sum_; run it forward again"):
        y.backward()


def test_backward_says_what_it_needs():
    with pytest.raises(ValueError, match=r"scalar, got \(3,\)"):
        (leaf(3) * 2.0).backward()
    with pytest.raises(ValueError, match=r"\(1, 3\), the tensor float64 \(3,\)"):
        (leaf(3) * 2.0).backward(np.ones((1, 3)))
    with pytest.raises(ValueError, match="requires_grad"):
        (Tensor(np.ones(3)) * 2.0).sum().backward()
    with pytest.raises(TypeError, match="int64"):
        Tensor(np.arange(3), requires_grad=True)


def test_no_grad_builds_no_graph():
    x = leaf(3)
    with no_grad():
        assert not (x * 2.0).requires_grad
        with no_grad():
            pass
        assert not (x * 2.0).requires_grad
    assert (x * 2.0).requires_grad
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert (x * 2.0).requires_grad


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_python_scalars_keep_the_dtype(dtype):
    x = leaf(2, 3, dtype=dtype)
    scalar = 1 - (2.5 / (0.5 + x * x) - 3) * -0.5 / 7
    assert scalar.dtype == (-x).dtype == x.mean().dtype == dtype
    scalar.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("f", [add, sub, mul, truediv, matmul], ids=lambda f: f.__name__)
def test_an_operand_may_be_an_array_or_a_number(f):
    x, a = np.array([[3.0, 2.0], [1.0, 4.0]]), np.array([[2.0, 5.0], [3.0, 7.0]])
    for other in (a,) if f is matmul else (a, np.float64(3), 3.0, 3):
        t = Tensor(x, requires_grad=True)
        for y, expected in ((f(t, other), f(x, other)), (f(other, t), f(other, x))):
            assert type(y) is Tensor and y.requires_grad
            assert (y.data == expected).all()


def test_numbers_become_float32():
    assert Tensor([1.0, 2.0]).dtype == np.float32
    assert Tensor(np.ones(2)).dtype == np.float64
    assert Tensor([1, 2]).dtype.kind == "i"


def test_on_grad_takes_the_gradient():
    x, y, taken = leaf(3), leaf(3), []
    x.on_grad = taken.append
    (x * 2.0 + x * 3.0 + y).sum().backward()
    assert [g.tolist() for g in taken] == [[5, 5, 5]]  # once, when it is final
    assert x.grad is None and y.grad.tolist() == [1, 1, 1]


def test_what_a_hook_asks_for_is_done_once_when_the_walk_is_done():
    x, y, seen = leaf(3), leaf(3), []
    def finish(): seen.append("finish")
    for name, t in (("x", x), ("y", y)):
        t.on_grad = lambda dy, name=name: (seen.append(name), after_backward(finish))
    (x * 2.0 + y).sum().backward()
    assert sorted(seen[:2]) == ["x", "y"] and seen[2:] == ["finish"]
    z = leaf(3)
    (z * z).sum().backward()
    assert len(seen) == 3


def test_a_walk_that_fails_leaves_nothing_to_the_next_one():
    x, y, z, seen = leaf(3), leaf(3), leaf(3), []

    @op
    def broken(x):
        def dx(dy): raise MemoryError("no room")
        return x.copy(), dx

    def fail(dy): raise MemoryError("no room")
    x.on_grad = lambda dy: after_backward(lambda: seen.append("finish"))
    y.on_grad = fail
    for failing in x + broken(y), broken(y) + x, x + y, y + x:
        with pytest.raises(MemoryError):
            failing.sum().backward()
        (z * z).sum().backward()
    assert not seen


def test_a_weights_gradient_is_ready_before_the_walk_goes_on_to_the_layer_below():
    x, weights, ready = leaf(2, 3), [leaf(3, 3, seed=s) for s in range(3)], []
    for i, W in enumerate(weights):
        W.on_grad = lambda dy, i=i: ready.append(f"layer {i}")

    @op
    def watch(x, i):
        def dx(dy):
            ready.append(f"below layer {i}")
            return dy

        return x.copy(), dx

    for i, W in enumerate(weights):
        x = ops.linear(watch(x, i), W)
    x.sum().backward()
    assert ready == [f"{place} {i}" for i in (2, 1, 0) for place in ("layer", "below layer")]


def test_an_op_with_a_vjp_for_each_input():
    @op
    def product(x, y):
        return x * y, lambda dz: dz * y, lambda dz: dz * x

    x, y = leaf(3), leaf(3, seed=1)
    product(x, y).backward(np.ones(3))
    assert (x.grad == y.data).all() and (y.grad == x.data).all()


@pytest.mark.parametrize("trainable", [True, False])
def test_a_frozen_weight_keeps_no_input_alive(trainable):
    x, W = np.ones((4, 3)), Tensor(np.ones((2, 3)), requires_grad=trainable)
    b, alive = Tensor(np.ones(2), requires_grad=True), weakref.ref(x)
    y = ops.linear(x, W, b)
    del x
    assert y.requires_grad
    assert (alive() is not None) == trainable


def test_backward_lets_go_as_it_passes():
    """When the first op's vjp runs, what the later op saved is gone, though y is still held."""
    seen = []

    @op
    def watch(x):
        def dx(dy):
            seen.append(alive() is not None)
            return dy

        return x.copy(), dx

    factor = np.full(3, 2.0)
    alive = weakref.ref(factor)
    y = watch(leaf(3)) * factor
    del factor
    assert alive() is not None
    y.backward(np.ones(3))
    assert seen == [False]


def mlp(x, W, V):
    return ops.linear(ops.dropout(ops.gelu(ops.linear(x, W)), 0.3, current_rng()), V)


def gradients(run, nested=False):
    """Loss and gradients of two MLPs with dropout, each under `run`; the next random number."""
    rng = np.random.default_rng(7)
    x, *Ws = (Tensor(np.random.default_rng(i).standard_normal(s, np.float32), requires_grad=True)
              for i, s in enumerate([(5, 4), (8, 4), (4, 8), (8, 4), (4, 8)]))

    def both(x):
        h = run(lambda x: mlp(x, *Ws[:2]), x)
        return run(lambda h, x: mlp(h, *Ws[2:]) + x * h, h, x)

    with randomness(rng):
        y = run(both, x) if nested else both(x)
        loss = (y * y).sum()
        loss.backward()
    return [loss.data, x.grad, *(W.grad for W in Ws), rng.random()]


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoint_is_the_plain_run_bit_for_bit(nested):
    plain = gradients(lambda segment, *xs: segment(*xs))
    for a, b in zip(gradients(checkpoint, nested), plain, strict=True):
        assert a.tobytes() == b.tobytes() if isinstance(a, np.ndarray) else a == b


def test_checkpoint_reaches_parameters_behind_inputs_that_need_no_gradient():
    x, W = np.arange(6.0).reshape(2, 3), leaf(4, 3)
    for frozen in (x, Tensor(x)):
        W.grad = None
        checkpoint(lambda x: ops.linear(x, W), frozen).backward(np.ones((2, 4)))
        assert (W.grad == x.sum(0)).all()


def test_checkpoint_takes_arrays_beside_tensors():
    x, y, a = leaf(3), leaf(3, seed=1), np.array([1.0, 2.0, 3.0])
    checkpoint(lambda x, a, y: x * a + y * y, x, a, y).backward(np.ones(3))
    assert (x.grad == a).all() and (y.grad == 2 * y.data).all()


def test_checkpoint_of_an_input_that_the_segment_does_not_use():
    x, y = leaf(3), leaf(3)
    checkpoint(lambda x, y: x * 2.0, x, y).backward(np.ones(3))
    assert x.grad.tolist() == [2, 2, 2] and y.grad.tolist() == [0, 0, 0]


def test_checkpoint_without_a_graph():
    with no_grad():
        assert not checkpoint(lambda x: x * 2.0, leaf(3)).requires_grad


def test_checkpoint_of_a_segment_that_needs_no_gradient_runs_it_once():
    x, W, V, runs = Tensor(np.ones((2, 3))), Tensor(np.ones((4, 3))), leaf(4, 4), []

    def segment(x, W):
        runs.append(W)
        return ops.linear(x, W)

    frozen = checkpoint(lambda x: checkpoint(segment, x, W), x)
    assert not frozen.requires_grad and len(runs) == 1
    checkpoint(segment, frozen, V).backward(np.ones((2, 4)))
    assert (V.grad == 6).all() and [W is V for W in runs[1:]] == [True, False]
    with no_grad():
        assert not checkpoint(segment, frozen, V).requires_grad
    assert checkpoint(lambda x: x, V).requires_grad


def test_checkpoint_of_a_segment_that_looks_ahead_without_a_graph():
    x = leaf(3)

    def segment(x):
        with no_grad():
            factor = (x * 2.0).data
        return x * factor

    checkpoint(segment, x).backward(np.ones(3))
    assert (x.grad == 2 * x.data).all()


def test_checkpoint_keeps_only_the_inputs():
    x, W = Tensor(np.ones((64, 256)), requires_grad=True), leaf(256, 256)

    def memory(run):
        def segment(h):
            for _ in range(8):
                h = ops.relu(ops.linear(h, W))
            return h

        gc.collect()
        tracemalloc.start()
        y = run(segment, run(segment, x))
        gc.collect()
        size, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert y.requires_grad
        return size / x.data.nbytes, peak / x.data.nbytes

    size, _ = memory(lambda segment, h: segment(h))
    assert size > 16  # each layer's output
    size, peak = memory(checkpoint)
    assert size < 2.1 and peak < 6  # the second input and the output; a few more on the way


def in_threads(*work):
    """Run the functions at the same time; an exception in one of them is raised here."""
    failures, start = [], threading.Barrier(len(work))

    def guarded(fn):
        try:
            start.wait()
            fn()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=[fn]) for fn in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_add_their_gradients_to_the_same_parameters():
    """Small integers add up exactly in any order; a lost update would show."""

    class Slow(np.ndarray):
        def __add__(self, other):
            total = super().__add__(other)
            time.sleep(1e-3)  # long enough for the other thread to add to the old sum
            return total

    W, rounds = leaf(4, 3), 20
    W.grad = np.zeros((4, 3)).view(Slow)

    def work(factor):
        for i in range(rounds):
            ops.linear(np.full((1, 3), float(factor + i)), W).sum().backward()

    in_threads(lambda: work(1), lambda: work(100))
    assert (W.grad == sum(101 + 2 * i for i in range(rounds))).all()


def test_no_grad_and_randomness_stay_in_their_thread():
    x, inside, done = leaf(3), threading.Event(), threading.Event()

    def without():
        with no_grad(), randomness(np.random.default_rng(0)):
            inside.set()
            assert done.wait(10)
            assert not (x * 2.0).requires_grad

    def beside():
        assert inside.wait(10)
        try:
            assert (x * 2.0).requires_grad
            with pytest.raises(ValueError, match="dropout needs a generator"):
                current_rng()
        finally:
            done.set()

    in_threads(without, beside)


@pytest.mark.parametrize("data", ["text", None, [1], [True], 1j, {}])
def test_only_floating_point_tensors_have_gradients(data):
    """A tensor of text or of nothing was made without a word."""
    with pytest.raises(TypeError, match="only floating-point tensors have gradients, got dtype"):
        Tensor(data, requires_grad=True)


def test_a_gradient_that_is_no_array_is_refused():
    with pytest.raises(ValueError, match=r"the gradient is list, the tensor float64 \(3,\)"):
        (leaf(3) * 2.0).backward([1.0, 2.0, 3.0])
