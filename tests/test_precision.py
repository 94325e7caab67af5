"""Training in 16 bits: float32 masters behind the parameters, loss scaling as in PyTorch, what
fails in plain float16 and what cures it, and 16-bit runs that are resumed bit for bit."""

import itertools
import json
import math
from dataclasses import asdict

import finetune
import ml_dtypes
import numpy as np
import pretrain
import pytest
import torch
from conftest import close
from hypothesis import example, given
from hypothesis import strategies as st

from minilm import checkpoint, data, joining, ops
from minilm.files import FormatError
from minilm.interop import huggingface
from minilm.nn import Module
from minilm.optim import SGD, AdamW, FlatParameters, LossScaler, adamw, clip_grad_norm
from minilm.peft import add_lora
from minilm.quantize import quantize_model
from minilm.run import RunDirectory
from minilm.tensor import Tensor
from minilm.train import Diverged, Trainer
from minilm.transformer import Config, Transformer

# Python 3.12 warns of every fork in a process that has threads, as BLAS does.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
F = torch.nn.functional

NARROW = ["bfloat16", "float16"]
WAYS = [(1, False), (2, False), (2, True)]  # workers, as processes
SHAPE = dict(vocab_size=13, context=6, layers=2, heads=2, width=8)
rng = np.random.default_rng(0)
TOKENS, TARGETS = rng.integers(0, 13, (2, 4, 6))


def leaves(dtype, shapes=((3,), (2, 5), (1,), (8,)), seed=0):
    rng = np.random.default_rng(seed)
    return [Tensor(rng.standard_normal(s).astype(dtype), requires_grad=True) for s in shapes]


def give(params, seed=0):
    """A random gradient for each, by way of `backward`."""
    rng = np.random.default_rng(seed)
    for p in params:
        ops.mul(p, rng.standard_normal(p.shape).astype(p.dtype)).backward(np.ones_like(p.data))


def make_model(dtype, family=Config.gpt2, **changes):
    """A small model with its weights moved so far that norms and biases matter."""
    model, rng = Transformer(family(**SHAPE | changes), seed=0), np.random.default_rng(1)
    for _, t in model.named_tensors():
        t.data += 0.2 * rng.standard_normal(t.shape, dtype=np.float32)
    return model.astype(dtype)


def equal(a, b):
    """Whether lists of arrays have the same bits."""
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def held(optimizer):
    """Copies of all that an update changes."""
    f = optimizer.flat
    return [a.copy() for a in (f.data, f.rounded, optimizer.m, optimizer.v)]


# Masters


@pytest.mark.parametrize("dtype", NARROW)
def test_16_bit_parameters_have_float32_masters(dtype):
    params = leaves(dtype)
    before = [p.data.copy() for p in params]
    optimizer = AdamW(params)
    flat = optimizer.flat
    give(params)
    buffers = flat.data, flat.grad, optimizer.m, optimizer.v
    assert {a.dtype for a in buffers} == {np.dtype(np.float32)}
    assert flat.rounded.dtype == dtype
    assert {a.size for a in (*buffers, flat.rounded)} == {flat.size}
    for p, old, master in zip(params, before, flat.views(flat.data), strict=True):
        assert equal([p.data, master], [old, old.astype(np.float32)])
        assert np.shares_memory(p.data, flat.rounded) and np.shares_memory(p.grad, flat.grad)
        for array in (p.data, p.grad, master):
            assert array.ctypes.data % 16 == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wider_parameters_are_their_own_masters(dtype):
    flat = FlatParameters(leaves(dtype))
    assert flat.rounded is flat.data and flat.data.dtype == flat.grad.dtype == dtype


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("cuts", [(), (1, 8, 20)])
@pytest.mark.parametrize("make", [AdamW, SGD])
def test_an_update_is_float32s_rounded(dtype, make, cuts):
    """The twin is made of the same numbers in float32 and gets the same gradients."""
    params = leaves(dtype)
    twins = [Tensor(p.data.astype(np.float32), requires_grad=True) for p in params]
    ours = make(params, lr=0.01, weight_decay=0.1)
    other = make(twins, lr=0.01, weight_decay=0.1)
    for step in range(1, 4):
        ours.zero_grad()
        give(params, step)
        masters = ours.flat.views(ours.flat.grad)
        for i, p in enumerate(twins):
            p.grad = other.flat.views(other.flat.grad)[i]
            p.grad[...] = masters[i]
        if cuts:
            ends = [0, *cuts, ours.flat.size]
            for start, stop in itertools.pairwise(ends):
                ours.update(slice(start, stop), step, 0.01)
        else:
            ours.step()
        other.step()
    assert equal(ours.flat.views(ours.flat.data), [p.data for p in twins])
    assert equal([p.data for p in params], [p.data.astype(dtype) for p in twins])
    assert not equal([p.data for p in params], [p.data for p in leaves(dtype)])


def test_an_update_of_a_part_leaves_the_rest_alone():
    optimizer = SGD(params := leaves("float16", shapes=[(8,), (8,)]), lr=1.0)
    give(params)
    before = params[0].data.copy()
    optimizer.flat.data[:8] += 1  # masters of which this part must not be rounded yet
    optimizer.update(slice(8, 16), 1, 1.0)
    assert equal([params[0].data], [before])
    assert not equal([params[1].data], [before])


@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_are_added_and_measured_in_float32(dtype):
    (x,) = leaves(dtype, shapes=[(1000,)])
    flat = FlatParameters([x])
    for size in (1.0, *[2.0**-12] * 64):  # in 16 bits 1 + 2^-12 is 1
        (x * size).sum().backward()
    assert x.grad is not None and (flat.grad == 1 + 2.0**-6).all()
    flat.grad *= 1e4  # the sum of squares is beyond float16
    assert clip_grad_norm([x], 1.0) == pytest.approx(1e4 * (1 + 2**-6) * math.sqrt(1000), rel=1e-6)
    assert clip_grad_norm([x], 1.0) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("dtype", NARROW)
def test_losses_are_float32(dtype):
    """And so is the precision of their sums: the loss is float32's of the same logits."""
    logits = np.random.default_rng(0).normal(0, 3, (50, 13)).astype(dtype)
    targets = np.arange(50) % 13
    loss = ops.cross_entropy(Tensor(logits), targets)
    assert loss.dtype == np.float32
    assert loss.data == ops.cross_entropy(Tensor(logits.astype(np.float32)), targets).data
    assert ops.mse(Tensor(logits), Tensor(-logits)).dtype == np.float32
    assert ops.kl_divergence(Tensor(logits), Tensor(-logits)).dtype == np.float32


def arrays_below(fn, seen):
    """Every array that a function holds on to, through the functions it holds on to."""
    for cell in fn.__closure__ or ():
        stack = [cell.cell_contents]
        while stack:
            x = stack.pop()
            if id(x) in seen:
                continue
            seen[id(x)] = x
            if isinstance(x, (tuple, list)):
                stack.extend(x)
            elif callable(x) and hasattr(x, "__closure__"):
                arrays_below(x, seen)
    return [x for x in seen.values() if isinstance(x, np.ndarray)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_attention_keeps_heads_once_in_their_own_dtype(dtype):
    q, k, v = (Tensor(np.random.default_rng(i).normal(size=(2, h, 24, 16)).astype(dtype), True)
               for i, h in enumerate((4, 2, 2)))
    y = ops.attention(q, k, v, causal=True)
    kept = [a for vjp in y.node.vjps for a in arrays_below(vjp, {}) if a.shape[-1] == 16]
    assert {str(a.dtype) for a in kept} == {dtype}
    assert len({a.ctypes.data for a in kept}) == 4, "q, k, v and y"
    wider = [Tensor(x.data.astype(np.float32), True) for x in (q, k, v)]
    exact = ops.attention(*wider, causal=True)
    close(y.data, exact.data, dtype)
    dy = np.random.default_rng(9).normal(size=y.shape)
    y.backward(dy.astype(dtype))
    exact.backward(dy.astype(np.float32))
    for x, w in zip((q, k, v), wider, strict=True):
        assert x.grad.dtype == dtype
        close(x.grad, w.grad, dtype)


# Loss scaling


@given(st.lists(st.booleans(), max_size=25), st.integers(-20, 127),
       st.sampled_from([2.0, 2.0**40]) | st.floats(1.01, 9), st.floats(0.01, 0.99),
       st.integers(1, 5))
@example([True, False, True, True, False], 0, 2.0, 0.5, 2)
def test_the_scale_is_pytorchs(finite, exponent, growth, backoff, interval):
    scale = 2.0**exponent
    ours = LossScaler(scale, growth, backoff, interval)
    theirs = torch.amp.GradScaler("cpu", scale, growth, backoff, interval)
    parameter, made = torch.nn.Parameter(torch.zeros(1)), []

    class Optimizer(torch.optim.SGD):
        def step(self):
            made.append(True)

    optimizer = Optimizer([parameter])
    theirs.scale(torch.zeros(1))  # makes its tensors
    for i, good in enumerate(finite):
        parameter.grad = torch.tensor([1.0 if good else math.inf])
        theirs.step(optimizer)
        theirs.update()
        assert ours.update(good) == good
        assert len(made) == finite[: i + 1].count(True) == i + 1 - ours.skipped
        assert ours.scale == theirs.get_scale()


def test_the_scalers_defaults_are_pytorchs():
    ours, theirs = LossScaler(), torch.amp.GradScaler("cpu")
    assert (ours.scale, ours.growth, ours.backoff, ours.interval) == (
        theirs.get_scale(), theirs.get_growth_factor(), theirs.get_backoff_factor(),
        theirs.get_growth_interval())


class Bigram(Module):
    """logits = W E[token]: small enough to be written out in PyTorch."""

    def __init__(self, dtype):
        self.E, self.W = leaves(dtype, [(13, 8), (13, 8)])

    def forward(self, tokens):
        return ops.linear(ops.embedding(tokens, self.E), self.W)


@pytest.mark.parametrize("make", ["SGD", "AdamW"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_takes_the_steps_of_pytorchs_grad_scaler(make, accumulate):
    """float32 masters, float16 arithmetic, and a scale that overflows, shrinks and grows again."""
    settings = dict(lr=0.005, weight_decay=0.1) | (dict(eps=1e-4) if make == "AdamW" else {})
    model, scaling = Bigram("float16"), dict(growth=2.0, backoff=0.5, interval=4)
    ours = {"SGD": SGD, "AdamW": AdamW}[make](model.parameters(), **settings)
    E, W = (torch.nn.Parameter(torch.tensor(p.data).float()) for p in model.parameters())
    theirs = getattr(torch.optim, make)([E, W], **settings)
    scaler = LossScaler(2.0**26, **scaling)
    other = torch.amp.GradScaler("cpu", 2.0**26, 2.0, 0.5, 4)
    x, t = torch.tensor(TOKENS), torch.tensor(TARGETS)
    scales, skipped = [], []
    with Trainer(model, ours, scaler=scaler) as trainer:
        for step in range(24):
            done = trainer.step(step, (TOKENS, TARGETS), clip=0.3, accumulate=accumulate)
            theirs.zero_grad()
            for rows in torch.arange(4).chunk(accumulate):
                logits = F.linear(F.embedding(x[rows], E.half()), W.half())
                loss = F.cross_entropy(logits.float().flatten(0, 1), t[rows].flatten(),
                                       reduction="sum") / t.numel()
                other.scale(loss).backward()
            other.unscale_(theirs)
            norm = torch.nn.utils.clip_grad_norm_([E, W], 0.3)
            before = W.detach().clone()
            other.step(theirs)
            other.update()
            scales.append(scaler.scale)
            skipped.append(done.skipped)
            assert scaler.scale == other.get_scale()
            assert done.skipped == torch.equal(W, before)
            if not done.skipped:
                assert done.norm == pytest.approx(norm.item(), rel=5e-3)
    masters = ours.flat.views(ours.flat.data)
    for master, parameter in zip(masters, (E, W), strict=True):
        gap = np.abs(master - parameter.detach().numpy()).max()
        assert gap < 2e-3, gap  # float16's eps, and the weights are of size 1
    assert skipped[:3] == [True] * 3 and 5 <= sum(skipped) <= 12 and scaler.skipped == sum(skipped)
    assert ours.steps == 24 - sum(skipped)
    assert any(b > a for a, b in itertools.pairwise(scales))


def test_the_loop_in_the_docstring():
    """The same bits as Trainer's, a skipped step included."""
    def start():
        model = make_model("float16")
        params = model.parameters()
        return model, params, AdamW(params, 0.01), LossScaler(2.0**23, interval=3)

    model, params, optimizer, scaler = start()
    with Trainer(model, optimizer, scaler=scaler) as trainer:
        done = [trainer.step(i, (TOKENS, TARGETS), clip=1.0) for i in range(12)]
    assert 0 < sum(s.skipped for s in done) < 9
    twin, params, other, scale = start()
    for _ in range(12):
        other.zero_grad()
        with np.errstate(over="ignore", invalid="ignore"):
            (ops.cross_entropy(twin(TOKENS), TARGETS) * scale.scale).backward()
            for p in params:
                p.grad /= scale.scale
        if scale.update(math.isfinite(clip_grad_norm(params, math.inf))):
            clip_grad_norm(params, 1.0)
            other.step()
    assert scale.state() == scaler.state() and other.steps == optimizer.steps
    np.testing.assert_allclose(other.flat.data, optimizer.flat.data, atol=2e-4)


@pytest.mark.parametrize("bad", [dict(scale=0.0), dict(scale=math.inf), dict(growth=1.0),
                                 dict(backoff=1.0), dict(backoff=0.0), dict(interval=0)])
def test_a_scaler_refuses_bad_settings(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {bad[name]}$"):
        LossScaler(**bad)


# The three failures of plain float16


def test_failure_1_updates_are_imprecise_and_masters_cure_it():
    """1000 updates of 1e-4, each less than half of float16's eps of 1."""
    plain = np.ones(8, np.float16)
    for _ in range(1000):
        plain -= np.float16(1e-4) * np.ones(8, np.float16)
    assert (plain == 1).all()
    p = Tensor(np.ones(8, np.float16), requires_grad=True)
    optimizer = SGD([p], lr=1e-4)
    for _ in range(1000):
        optimizer.zero_grad()
        p.sum().backward()
        optimizer.step()
    assert p.dtype == np.float16 and p.data == pytest.approx(0.9, abs=1e-3)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero)")
def test_failure_1_adamws_eps_is_no_float16_number_and_masters_cure_it():
    def four_arrays(dtype):
        return np.ones(8, dtype), *(np.zeros(8, dtype) for _ in range(3))

    plain = four_arrays("float16")
    adamw.adamw(*plain, 1, 0.01, 0.9, 0.999, 1e-8, 0.0)
    assert np.isnan(plain[0]).all()
    p = Tensor(np.ones(8, np.float16), requires_grad=True)
    optimizer = AdamW([p], lr=0.01)
    (p * 0.0).sum().backward()
    optimizer.step()
    assert p.data == pytest.approx(1, abs=1e-3)


LARGE_BATCH = 2**21  # targets, each of which weighs little


def gradient_of_a_part(dtype, scale):
    """The gradient of a few rows of a large batch, computed at a scale and unscaled."""
    model = make_model("float16").astype(dtype)
    flat = FlatParameters(model.parameters())
    tokens, targets = np.random.default_rng(2).integers(0, 13, (2, 4, 6))
    (ops.cross_entropy(model(tokens), targets, total=LARGE_BATCH) * scale).backward()
    flat.complete()
    return flat.grad / scale


def test_failure_2_gradients_underflow_and_scaling_cures_it():
    exact = gradient_of_a_part("float32", 1.0)
    used = abs(exact) > 1e-6 * abs(exact).max()  # those of k's bias cancel to nothing
    plain = gradient_of_a_part("float16", 1.0)
    scaled = gradient_of_a_part("float16", LossScaler().scale)

    def lost(g): return (g[used] == 0).mean()
    def error(g): return np.linalg.norm(g - exact) / np.linalg.norm(exact)
    assert lost(plain) > 0.1 and lost(scaled) == 0
    assert error(plain) > 0.05 and error(scaled) < 0.005


def test_failure_3_gradients_overflow_and_the_scaler_cures_it():
    """Scaled too far, which is what a scale that only grew would come to."""
    model = make_model("float16")
    params = model.parameters()
    with np.errstate(over="ignore", invalid="ignore"):
        (ops.cross_entropy(model(TOKENS), TARGETS) * 2.0**24).backward()
        plain = [p.data - np.float16(0.1) * p.grad / np.float16(2.0**15) for p in params]
    assert not all(np.isfinite(p).all() for p in plain), "weights are lost for good"
    model = make_model("float16")
    optimizer, scaler = AdamW(model.parameters(), 0.01), LossScaler(2.0**24)
    before = held(optimizer)
    with Trainer(model, optimizer, scaler=scaler) as trainer:
        done = [trainer.step(0, (TOKENS, TARGETS), lr=0.5, clip=1.0)]
        assert done[0].skipped and not math.isfinite(done[0].norm)
        assert equal(before, held(optimizer)) and (optimizer.steps, optimizer.lr) == (0, 0.01)
        assert (scaler.scale, scaler.skipped) == (2.0**23, 1)
        done += [trainer.step(i, (TOKENS, TARGETS), lr=0.01, clip=1.0) for i in range(1, 30)]
    good = [s for s in done if not s.skipped]
    assert not done[-1].skipped and good[-1].loss < 0.8 * done[0].loss
    assert scaler.skipped == 30 - len(good) == 30 - optimizer.steps
    assert all(np.isfinite(p.data).all() for p in model.parameters())


# Trainer


@pytest.mark.parametrize("workers, processes", WAYS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_is_unscaled_before_it_is_clipped(workers, processes, accumulate):
    """So a power of two as the scale changes nothing but what float16 would lose; in float32,
    nothing at all. A gradient that overflows in one worker stops all."""
    def run(scaler, dtype):
        model = make_model(dtype, dropout=0.1)
        optimizer = AdamW(model.parameters(), 0.01)
        with Trainer(model, optimizer, workers, processes, scaler=scaler) as trainer:
            done = [trainer.step(i, (TOKENS, TARGETS), clip=0.1, accumulate=accumulate)
                    for i in range(6)]
        return held(optimizer), [s.norm for s in done], [s.skipped for s in done]

    (plain, norms, _), (scaled, same, skipped) = run(None, "float32"), run(LossScaler(), "float32")
    assert equal(plain, scaled) and norms == same and min(norms) > 0.1 and not any(skipped)
    (plain, norms, _), (scaled, again, skipped) = run(None, "float16"), run(LossScaler(), "float16")
    assert again == pytest.approx(norms, rel=0.02) and not any(skipped)
    *_, skipped = run(LossScaler(2.0**20), "float16")
    assert skipped[0] and not skipped[-1]


@pytest.mark.parametrize("dtype", NARROW)
def test_threads_and_processes_give_the_same_bits(dtype):
    """Rounded weights reach every process."""
    def run(workers, processes):
        model = make_model(dtype)
        optimizer, scaler = AdamW(model.parameters(), 0.01), LossScaler(2.0**22, interval=3)
        with Trainer(model, optimizer, workers, processes, scaler=scaler) as trainer:
            done = [trainer.step(i, (TOKENS, TARGETS), accumulate=2) for i in range(8)]
            losses = trainer.evaluate(TOKENS, TARGETS)
        return held(optimizer), [(s.loss, s.skipped) for s in done], losses, scaler.state()

    threads, processes = run(2, False), run(2, True)
    assert equal(threads[0], processes[0]) and threads[1:] == processes[1:]
    assert threads[1][-1][0] < threads[1][0][0]
    assert threads[2][0] == pytest.approx(run(1, False)[2][0], rel=0.1)  # skips other steps


class Overflowing(Module):
    """A model that overflows where it is told, whatever the scale."""

    def __init__(self):
        self.inner, self.factor = make_model("float16"), 1.0

    def forward(self, tokens):
        return self.inner(tokens) * self.factor


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_no_scale_helps_diverges(workers):
    model = Overflowing()
    optimizer, scaler = AdamW(model.parameters()), LossScaler(2.0**-20)
    with Trainer(model, optimizer, workers, scaler=scaler) as trainer:
        trainer.step(0, (TOKENS, TARGETS))
        before = held(optimizer)
        model.factor = math.inf
        done = [trainer.step(i, (TOKENS, TARGETS)) for i in range(1, 5)]
        assert all(s.skipped and math.isnan(s.loss) for s in done)
        said = r"step 5: loss nan.* loss scale down to 2\.98.*e-08; nothing was updated"
        with pytest.raises(Diverged, match=said):
            trainer.step(5, (TOKENS, TARGETS))
        assert equal(before, held(optimizer)) and optimizer.steps == 1
    with Trainer(model, optimizer, workers) as trainer, pytest.raises(Diverged, match="loss nan"):
        trainer.step(5, (TOKENS, TARGETS))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_adapters_train_in_16_bits(dtype, base):
    model = make_model(dtype, Config.llama, hidden=16)
    if base == "nf4":
        quantize_model(model)
    add_lora(model, 2, 4, "all-linear")
    optimizer = AdamW(model.parameters(), 0.02)
    assert {p.dtype for p in model.parameters()} == {np.dtype(dtype)}
    scaler = LossScaler() if dtype == "float16" else None
    with Trainer(model, optimizer, scaler=scaler) as trainer:
        losses = [trainer.step(i, (TOKENS, TARGETS)).loss for i in range(25)]
    assert losses[-1] < 0.6 * losses[0]


# Runs


def go_on(run, steps, dtype, scaler, processes=False):
    """Train to so many steps from where the run is; it is saved after every second."""
    model = make_model(dtype, dropout=0.1)
    optimizer = AdamW(model.parameters(), 0.01)
    start = run.restore(model, optimizer, scaler)
    with Trainer(model, optimizer, 2, processes, scaler=scaler) as trainer:
        for i in range(start, steps):
            rng = np.random.default_rng(i)
            done = trainer.step(i, tuple(rng.integers(0, 13, (2, 4, 6))), clip=1.0)
            run.log(**{k: v for k, v in asdict(done).items() if k != "seconds"})
            if done.step % 2 == 0:
                run.save(done.step, model, optimizer, scaler)
    return held(optimizer), optimizer.steps, run.records(), scaler and scaler.state()


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("dtype, make_scaler", [
    ("bfloat16", lambda: None), ("float16", lambda: LossScaler(2.0**20, interval=5))])
def test_a_run_is_resumed_bit_for_bit(tmp_path, dtype, make_scaler, processes):
    straight = go_on(RunDirectory(tmp_path / "a"), 9, dtype, make_scaler(), processes)
    for steps in (3, 7, 9):  # the third and the seventh are lost and made again
        again = go_on(RunDirectory(tmp_path / "b"), steps, dtype, make_scaler(), processes)
    assert equal(straight[0], again[0]) and straight[1:] == again[1:]
    if dtype == "float16":
        skipped = [r["skipped"] for r in straight[2]]
        assert skipped[0] and not all(skipped) and straight[1] == 9 - sum(skipped)


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()


def test_a_checkpoint_holds_the_masters_in_float32(tmp_path):
    model, run = make_model("bfloat16"), RunDirectory(tmp_path)
    optimizer = AdamW(model.parameters(), 1e-4)
    with Trainer(model, optimizer) as trainer:
        trainer.step(0, (TOKENS, TARGETS))
    run.save(1, model, optimizer)
    tensors, state = checkpoint.load(tmp_path / "checkpoints")
    assert state == {"step": 1} and {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    saved = tensors["model.embed.weight"]
    assert equal([saved.astype(ml_dtypes.bfloat16)], [model.embed.weight.data])
    assert (saved != model.embed.weight.data.astype(np.float32)).any()


def test_a_float32_checkpoint_is_what_it_was(tmp_path):
    """The parameters themselves, in the model's order, then the moments; and the step."""
    model, run = make_model("float32"), RunDirectory(tmp_path)
    optimizer = AdamW(model.parameters(), undecayed=[p for p in model.parameters() if p.ndim < 2])
    run.save(3, model, optimizer)
    tensors, state = checkpoint.load(tmp_path / "checkpoints")
    assert state == {"step": 3}
    names = [name for name, _ in model.named_parameters()]
    assert set(tensors) == {f"{kind}.{name}" for kind in ("model", "m", "v") for name in names}
    assert equal([tensors[f"model.{n}"] for n in names], [p.data for p in model.parameters()])


@pytest.mark.parametrize("saved, wanted, said", [(None, LossScaler(), "without"),
                                                 (LossScaler(), None, "with")])
def test_a_checkpoint_has_a_loss_scale_where_one_is_wanted(tmp_path, saved, wanted, said):
    model, run = make_model("float16"), RunDirectory(tmp_path)
    optimizer = AdamW(model.parameters())
    run.save(3, model, optimizer, saved)
    before = held(optimizer)
    with pytest.raises(FormatError, match=f"run {said} a loss scaler"):
        run.restore(model, optimizer, wanted)
    assert equal(before, held(optimizer)) and optimizer.steps == 0


def test_what_is_not_finite_is_null_in_the_metrics(tmp_path):
    run = RunDirectory(tmp_path)
    run.log(step=1, loss=math.nan, norm=math.inf, skipped=True)
    run.log(step=2, loss=2.0, norm=1.0, skipped=False)
    text = (tmp_path / "metrics.jsonl").read_text()
    def no_constant(name): raise AssertionError(name)
    first, second = (json.loads(t, parse_constant=no_constant) for t in text.splitlines())
    assert first == {"step": 1, "loss": None, "norm": None, "skipped": True}
    assert second["loss"] == 2.0
    assert run.plot().exists()


# Scripts


TEXT = "A cat sat on a mat. The dog ate the cat. " * 30
TINY = dict(layers=1, heads=2, width=16, context=16, batch=4, steps=6, warmup=1, eval_every=3,
            save_every=3, sample=4, workers=1)


def pretrained(folder, dtype, **changes):
    file = folder.parent / "text.txt"
    file.write_text(TEXT)
    pretrain.main(pretrain.Settings(corpus=(str(file),), dtype=dtype, **TINY | changes), folder)
    return folder / "pretrain-1"


@pytest.mark.parametrize("dtype", NARROW)
def test_pretrain(tmp_path, dtype):
    run = pretrained(tmp_path / "a", dtype)
    twin = pretrained(tmp_path / "b", "float32")
    found, exact = ([r["validation_loss"] for r in RunDirectory(p).records()
                     if "validation_loss" in r] for p in (run, twin))
    assert found == pytest.approx(exact, rel=0.01) and found != exact
    assert huggingface.load_model(run / "model", dtype=dtype).embed.weight.dtype == dtype
    _, state = checkpoint.load(run / "checkpoints")
    assert ("scaler" in state) == (dtype == "float16")


@pytest.mark.parametrize("method, dtype", [
    ("full", "bfloat16"), ("lora", "float16"), ("qlora", "bfloat16")])
def test_finetune(tmp_path, dtype, method, monkeypatch):
    """Stopped and resumed, in 16 bits."""
    base = tmp_path / "base"
    huggingface.save_model(Transformer(Config.gpt2(258, 40, layers=2, heads=2, width=16), 1), base)
    data.ByteTokenizer().save(base / "tokenizer.json")
    (tmp_path / "text.txt").write_text(TEXT)
    s = finetune.Settings(
        method=method, model=str(base), known=(str(tmp_path / "text.txt"),), train=20, test=3,
        r=2, alpha=4.0, batch=8, steps=6, warmup=2, eval_every=4, save_every=4, workers=1,
        dtype=dtype)
    optimizers = []

    class Spy(AdamW):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            optimizers.append(self)

    monkeypatch.setattr(joining, "AdamW", Spy)
    finetune.main(s, tmp_path / "a")
    run = tmp_path / "a" / f"finetune-{method}-1"
    before = held(optimizers[0])
    for folder in (run / "checkpoints").glob("step-00000006*"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    finetune.main(resume=run)
    assert equal(before, held(optimizers[1]))
    assert optimizers[0].flat.rounded.dtype == dtype and len(optimizers) == 2
    assert ("scaler" in checkpoint.load(run / "checkpoints")[1]) == (dtype == "float16")
