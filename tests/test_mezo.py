"""minilm.optim.mezo: z does not depend on chunks, theta comes back, a log replays a run bit for
bit, the estimate is the gradient on average and as long as the formula says, and nothing is kept.
"""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.backend import to_device
from minilm.graph import current_rng
from minilm.measure import Ledger
from minilm.optim import LossScaler, MeZO, mezo
from minilm.optim.mezo import RECORD, normal, splitmix64
from minilm.peft import add_bitfit, add_lora, trainable_parameters
from minilm.tensor import Tensor, no_grad
from minilm.train import Diverged, Trainer
from minilm.transformer import Config, Transformer

SHAPES = [(5, 7), (), (3,), (2, 3, 4), (1,), (40, 11)]
GPT2 = Config.gpt2(64, 32, layers=2, heads=2, width=32)
seeds = st.integers(0, 2**64 - 1)
dtypes = st.sampled_from(["float64", "float32", "float16", "bfloat16"])


def tensors(dtype="float32", shapes=SHAPES, seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    return [Tensor((size * rng.standard_normal(s)).astype(np.float32).astype(dtype))
            for s in shapes]


def bits(params):
    return [to_device(p.data, "cpu").tobytes() for p in params]


def together(params):
    return np.concatenate([p.data.astype(np.float64).reshape(-1) for p in params])


def bowl(params):
    """A scalar that is steep and bent."""
    return sum(float(np.cos(p.data.astype(np.float64) * (i + 1)).sum())
               for i, p in enumerate(params))


@given(seeds, st.integers(0, 10**12), st.integers(0, 300), st.data())
def test_z_does_not_depend_on_chunks(seed, start, n, data):
    whole = normal(seed, start, n)
    assert whole.shape == (n,) and whole.dtype == np.float32
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    parts = [normal(seed, start + a, b - a) for a, b in zip([0, *cuts], [*cuts, n])]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


@given(seeds, st.lists(st.integers(1, 60), min_size=2, max_size=2), dtypes)
def test_a_run_does_not_depend_on_chunks(seed, blocks, dtype):
    found = []
    for block in blocks:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mezo, "BLOCK", block)
            params = tensors(dtype)
            MeZO(params).move(seed, 0.3)
            found.append(bits(params))
    assert found[0] == found[1] != bits(tensors(dtype))


def test_z_is_normal_and_seeds_are_apart():
    z = normal(3, 0, 400_000).astype(np.float64)
    share = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in np.sort(z)[::40]])
    assert np.abs(share - np.arange(0, 400_000, 40) / 400_000).max() < 1.63 / math.sqrt(400_000)
    assert [abs((z**k).mean() - m) < 0.03 for k, m in enumerate((1, 0, 1, 0, 3))] == [True] * 5
    others = [z[::2], z[1::2], normal(4, 0, 200_000), normal(3, 1 << 40, 200_000)]
    correlations = np.corrcoef(others) - np.eye(4)
    assert np.abs(correlations).max() < 5 / math.sqrt(200_000)
    assert np.abs(np.corrcoef([x**2 for x in others]) - np.eye(4)).max() < 5 / math.sqrt(200_000)


def test_the_bits_are_splitmix64s():
    """The algorithm in whole numbers of Python."""
    def plain(seed, k):
        x = (seed + (k + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31
    for seed, start in ((0, 0), (2**64 - 1, 2**40), (12345, 7)):
        assert splitmix64(seed, start, 9).tolist() == [plain(seed, start + i) for i in range(9)]


BACK = {"float64": 1e-14, "float32": 1e-6, "float16": 5e-3, "bfloat16": 2e-2}


@given(dtypes, seeds, st.floats(-5, -1), st.integers(0, 99), st.floats(-3, 2))
def test_theta_comes_back(dtype, seed, log_eps, start, log_size):
    """Each number to within BACK of itself or of the way that it went, eps |z|."""
    params = tensors(dtype, seed=start, size=10**log_size)
    before, eps = together(params), 10**log_eps
    optimizer = MeZO(params, eps=eps)
    seen = []
    optimizer.sides(seed, lambda: seen.append(together(params)) or 0.0)
    z = normal(seed, 0, before.size)
    scale = np.maximum(np.abs(before), eps * np.abs(z))
    scale += 2**-14 if dtype == "float16" else 0  # below, its steps are all the same
    assert (np.abs(together(params) - before) <= BACK[dtype] * scale).all()
    if dtype in ("float64", "float32") and log_size < 0:
        for moved, side in zip(seen, (1, -1), strict=True):
            assert np.abs(moved - before - side * eps * z).max() < 1e-6
    assert len(seen) == 2


@given(dtypes, st.integers(1, 3), st.integers(0, 99), st.integers(1, 6))
def test_a_log_replays_the_run_bit_for_bit(dtype, n, seed, cut):
    """And the run goes on from there as if it had not been stopped."""
    rates = [1e-3 / (1 + k) for k in range(8)]

    def run(optimizer, steps):
        for k in steps:
            optimizer.lr = rates[k]
            optimizer.step(partial(bowl, optimizer.params))

    first = MeZO(tensors(dtype), eps=0.01, n=n, seed=seed)
    run(first, range(cut))
    log, at_cut = first.log, bits(first.params)
    assert log.dtype.itemsize == 12 and log.shape == (cut * n,)
    again = MeZO(tensors(dtype), eps=0.01, n=n, seed=seed)
    again.replay(log, rates[:cut])
    assert bits(again.params) == at_cut and (again.log == log).all()
    assert at_cut != bits(tensors(dtype))
    for optimizer in (first, again):
        run(optimizer, range(cut, 8))
    assert bits(first.params) == bits(again.params) and first.steps == again.steps == 8


def test_seeds_differ_by_step_slope_and_seed():
    optimizer = MeZO(tensors(), n=3)
    drawn = [*optimizer.seeds(), *MeZO(tensors(), n=3, seed=1).seeds()]
    optimizer.step(lambda: 1.0)
    assert len({*drawn, *optimizer.seeds()}) == 9 and max(drawn) < 2**63


@pytest.mark.parametrize("n", [1, 3])
def test_the_update_is_minus_eta_grad_on_average_and_as_long_as_the_formula(n):
    """On a quadratic of d = 20: E[update] = -eta grad, E ||update||^2 = (d + n + 1) / n of it."""
    d, eta, count = 20, 0.5, 1000
    start = np.random.default_rng(0).standard_normal(d)
    theta = Tensor(start.copy())
    optimizer = MeZO([theta], lr=eta, n=n, seed=7)
    grad, updates = start - np.ones(d), []
    for _ in range(count):
        theta.data[...] = start
        optimizer.step(lambda: 0.5 * float(((theta.data - 1) ** 2).sum()))
        updates.append(theta.data - start)
    mean, spread = np.mean(updates, 0), np.std(updates, 0) / math.sqrt(count)
    assert (np.abs(mean + eta * grad) < 4.5 * spread).all()
    assert np.abs(mean).max() > 10 * spread.max()  # so that the line above says something
    lengths = np.sum(np.square(updates), 1) / (eta**2 * grad @ grad)
    assert lengths.mean() == pytest.approx((d + n + 1) / n, rel=0.15)


def network(seed, width=8, hidden=12):
    """(params of an MLP, the loss of a batch as a function of none, its gradient)."""
    rng = np.random.default_rng(seed)
    params = [Tensor(rng.standard_normal(s), requires_grad=True)
              for s in ((hidden, width), (hidden,), (3, hidden))]
    x, targets = rng.standard_normal((8, width)), rng.integers(0, 3, 8)

    def loss():
        h = ops.gelu(ops.linear(Tensor(x), params[0]) + params[1])
        return ops.cross_entropy(ops.linear(h, params[2]), targets)

    loss().backward()
    return params, loss, np.concatenate([p.grad.reshape(-1) for p in params])


@given(st.integers(0, 999), seeds)
def test_g_is_the_gradient_along_z(start, seed):
    params, loss, grad = network(start)
    optimizer = MeZO(params, eps=1e-4)
    plus, minus = optimizer.sides(seed, loss)
    z = normal(seed, 0, grad.size).astype(np.float64)
    assert abs((plus - minus) / 2e-4 - z @ grad) < 1e-4 * np.linalg.norm(grad)


def test_the_mean_over_z_points_along_the_gradient():
    """cosine > .9 with autograd's gradient, for d = 144; 1 / sqrt(1 + (d + 1) / n) is expected."""
    params, loss, grad = network(0)
    before = together(params)
    MeZO(params, lr=1.0, eps=1e-4, n=1500).step(loss)
    moved = before - together(params)
    cosine = moved @ grad / (np.linalg.norm(moved) * np.linalg.norm(grad))
    assert grad.size == 144 and 0.9 < cosine < 0.99


def language(model, seed=0):
    tokens, targets = np.random.default_rng(seed).integers(0, 64, (2, 2, 32))
    return ops.cross_entropy(model(tokens), targets)


@pytest.mark.parametrize("add", [lambda model: model, lambda model: add_lora(model, 4, 8),
                                 add_bitfit])
def test_a_step_takes_the_memory_of_inference(add):
    """No gradient, no state, and at the peak not even a z: within the model's largest tensor."""
    model = add(Transformer(GPT2))
    params = trainable_parameters(model)
    optimizer = MeZO(params, lr=1e-3)

    def infer():
        with no_grad():
            language(model)

    peaks = []
    for job, owner in ((infer, None), (lambda: optimizer.step(lambda: language(model)), optimizer)):
        for _ in range(2):
            with Ledger(model, owner) as ledger:
                job()
        peaks.append(ledger.peak)
    assert peaks[0]["gradients"] == peaks[1]["gradients"] == 0
    assert peaks[0]["optimizer"] == peaks[1]["optimizer"] == 0
    largest = max(t.data.nbytes for _, t in model.named_tensors())
    assert abs(sum(peaks[1].values()) - sum(peaks[0].values())) <= largest
    assert all(p.grad is None for p in params)


def test_it_learns_a_count_of_errors():
    """A loss with no gradient: the share of rows on the wrong side of a line."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 5))
    right = x @ rng.standard_normal(5) > 0
    w = Tensor(rng.standard_normal(5))

    def errors():
        return np.mean((x @ w.data > 0) != right)

    before = errors()
    optimizer = MeZO([w], lr=1.0, eps=0.1, n=4)
    for _ in range(100):
        optimizer.step(errors)
    assert errors() < 0.05 < before


def test_both_sides_drop_the_same():
    """A loss that is dropout of a constant has no slope."""
    theta = Tensor(np.ones(3))
    optimizer = MeZO([theta], n=3)
    losses = []

    def loss():
        losses.append(float(ops.dropout(Tensor(np.ones(100)), 0.5, current_rng()).sum().data))
        return losses[-1]

    optimizer.step(loss)
    assert (optimizer.log["g"] == 0).all() and len({*losses}) > 1
    assert losses[::2] == losses[1::2]


@pytest.mark.parametrize("values", [[math.nan, 1.0], [1.0, math.inf], [1e300, -1e300]])
def test_a_loss_that_is_not_finite_updates_nothing(values):
    params = tensors()
    before, given = together(params), iter(values)
    optimizer = MeZO(params)
    with pytest.raises(FloatingPointError, match="step 0: the losses are"):
        optimizer.step(lambda: next(given))
    assert np.abs(together(params) - before).max() < 1e-6
    assert (optimizer.steps, len(optimizer.log)) == (0, 0)


@pytest.mark.parametrize("call", [1, 2])
def test_after_an_error_theta_is_back(call):
    params, calls = tensors(), []

    def loss():
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return 1.0

    before = together(params)
    with pytest.raises(KeyboardInterrupt):
        MeZO(params, eps=0.1).step(loss)
    assert np.abs(together(params) - before).max() < 1e-6


def test_memory_that_is_not_flat_is_made_so():
    flat, turned = Tensor(np.ones((4, 6))), Tensor(np.ones((6, 4)).T)
    for p in (flat, turned):
        MeZO([p]).move(5, 1.0)
    assert (turned.data == flat.data).all() and not (flat.data == 1).any()


def test_what_makes_no_sense_is_refused():
    p = Tensor(np.ones(3))
    for wrong, said in [(dict(eps=0.0), "eps must be positive and finite, got 0.0"),
                        (dict(n=0), "n must be at least 1"), (dict(lr=-1.0), "lr must be finite"),
                        (dict(seed=-1), "seed must be at least 0")]:
        with pytest.raises(ValueError, match=said):
            MeZO([p], **wrong)
    with pytest.raises(ValueError, match="no parameters were given"):
        MeZO([])
    with pytest.raises(ValueError, match="given twice"):
        MeZO([p, p])
    with pytest.raises(TypeError, match="a list of Tensors"):
        MeZO(p)
    optimizer = MeZO([p], n=2)
    for log in (np.zeros(3, RECORD), np.zeros(2), [(1, 2.0)]):
        with pytest.raises(ValueError, match="2 for each step; got"):
            optimizer.replay(log, 1e-3)
    with pytest.raises(ValueError):
        optimizer.replay(np.zeros(4, RECORD), [1e-3] * 3)
    optimizer.lr = math.nan
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.step(lambda: 1.0)
    assert (p.data == 1).all() and optimizer.steps == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_a_card_z_and_the_run_are_the_cpus(cupy, dtype):
    """To rounding: logarithms and cosines may differ in their last bit. Blocks change no bit."""
    z = normal(11, 3, 1000, cupy)
    assert np.abs(to_device(z, "cpu") - normal(11, 3, 1000)).max() < 5e-6
    parts = [normal(11, 3, 333, cupy), normal(11, 336, 667, cupy)]
    assert cupy.concatenate(parts).get().tobytes() == z.get().tobytes()
    assert to_device(splitmix64(2**64 - 1, 5, 50, cupy), "cpu").tolist() == splitmix64(
        2**64 - 1, 5, 50).tolist()
    found = []
    for device in ("cpu", "cuda"):
        params = [Tensor(to_device(p.data, device)) for p in tensors(dtype)]
        optimizer = MeZO(params, lr=1e-3, eps=0.01)
        losses = [optimizer.step(lambda: sum(float((p.data.astype("float64") ** 2).sum())
                                             for p in params))
                  for _ in range(3)]
        again = MeZO([Tensor(to_device(p.data, device)) for p in tensors(dtype)], eps=0.01)
        again.replay(optimizer.log, 1e-3)
        assert bits(again.params) == bits(params)
        found.append((losses, [to_device(p.data, "cpu").astype(np.float64) for p in params]))
    allowed = 1e-4 if dtype == "float32" else 2e-2
    assert found[0][0] == pytest.approx(found[1][0], rel=allowed)
    for ours, theirs in zip(found[0][1], found[1][1]):
        assert np.abs(ours - theirs).max() < allowed * 3


def rows():
    return tuple(np.random.default_rng(0).integers(0, 64, (2, 2, 32)))


def test_a_trainers_step_is_mezos():
    """The loss is that of both sides, the norm |g|; the model is moved as by `step` alone."""
    models = [add_lora(Transformer(GPT2), 4, 8) for _ in range(2)]
    one, other = (MeZO(m.parameters(), lr=1e-3, eps=0.01) for m in models)
    with Trainer(models[0], one) as trainer:
        done = trainer.step(0, rows(), 1e-3)
        assert trainer.evaluate(*rows())[0] > 0
    loss = other.step(lambda: language(models[1]))
    assert (done.loss, done.norm, done.targets) == (loss, abs(other.log["g"][0]), 64)
    assert bits(one.params) == bits(other.params)
    assert all(p.grad is None for p in one.params)


def test_a_trainer_refuses_what_needs_a_gradient():
    model = Transformer(GPT2)
    optimizer = MeZO(model.parameters())
    for wrong in (dict(workers=2), dict(scaler=LossScaler())):
        with pytest.raises(ValueError, match="one worker and without a scaler"):
            Trainer(model, optimizer, **wrong)
    trainer = Trainer(model, optimizer)
    for wrong in (dict(clip=1.0), dict(accumulate=2)):
        with pytest.raises(ValueError, match="no gradient to accumulate or to clip"):
            trainer.step(0, rows(), **wrong)
    model.embed.weight.data[...] = math.nan
    with pytest.raises(Diverged, match=r"step 0: the losses are .*nothing was updated"):
        trainer.step(0, rows())
