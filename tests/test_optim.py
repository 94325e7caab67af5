"""minilm.optim: AdamW and SGD beside PyTorch's, flat memory, gradient clipping, the schedule."""

import itertools
import math
from math import inf, nan

import numpy as np
import pytest
import torch
from conftest import close
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.optim import (
    SGD,
    AdamW,
    FlatParameters,
    PagedAdamW,
    adamw,
    clip_grad_norm,
    cosine_schedule,
)
from minilm.optim.paged import Float32
from minilm.peft import add_lora
from minilm.tensor import Tensor
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

SHAPES = [(5, 7), (7,), (2, 3, 4), (1,), (11, 2)]


def leaves(dtype="float64", shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return [Tensor(rng.standard_normal(s).astype(dtype), requires_grad=True) for s in shapes]


def give(params, seed, scale=1.0):
    """A random gradient for each, by way of `backward`."""
    rng = np.random.default_rng(seed)
    for p in params:
        ops.mul(p, (scale * rng.standard_normal(p.shape)).astype(p.dtype)).sum().backward()


def twins(params):
    return [torch.nn.Parameter(torch.tensor(p.data.copy())) for p in params]


def copy_grads(params, theirs):
    for p, t in zip(params, theirs, strict=True):
        t.grad = torch.tensor(p.grad.copy())


def largest_gap(params, theirs):
    gaps = [np.abs(p.data - t.detach().numpy()).max() for p, t in zip(params, theirs, strict=True)]
    return max(gaps)


@pytest.mark.parametrize("dtype, allowed", [("float64", 1e-12), ("float32", 5e-7)])
@pytest.mark.parametrize("undecayed", [[], [1, 3], [0, 1, 2, 3, 4]])
def test_adamw_is_pytorchs(dtype, allowed, undecayed):
    params = leaves(dtype)
    theirs = twins(params)
    decayed = [t for i, t in enumerate(theirs) if i not in undecayed]
    settings = dict(lr=1e-3, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.3)
    ours = AdamW(params, **settings, undecayed=[params[i] for i in undecayed])
    groups = [{"params": decayed}] if decayed else []
    groups += [{"params": [theirs[i] for i in undecayed], "weight_decay": 0.0}] if undecayed else []
    other = torch.optim.AdamW(groups, **settings)
    for step in range(20):
        ours.lr = 1e-3 / (1 + step % 3)
        for group in other.param_groups:
            group["lr"] = ours.lr
        ours.zero_grad()
        give(params, seed=step, scale=10.0 ** (step % 4 - 2))
        copy_grads(params, theirs)
        ours.step()
        other.step()
    assert ours.steps == 20
    assert largest_gap(params, theirs) <= allowed


@given(seed=st.integers(0, 2**32 - 1), t=st.integers(1, 1000), scale=st.sampled_from([1.0, 0.3]),
       weight_decay=st.sampled_from([0.0, 0.3]))
def test_adamw_is_algorithm_2(seed, t, scale, weight_decay):
    p, g, m, v = np.random.default_rng(seed).standard_normal((4, 9))
    settings = t, 1e-2, 0.8, 0.95, 1e-2, weight_decay
    expected = adamw.plain_adamw(p, scale * g, m, v * v, *settings)
    found = p.copy(), m.copy(), v * v
    adamw.adamw(found[0], g, *found[1:], *settings, scale)
    for a, b, before in zip(found, expected, (p, m, v * v)):
        close(a, b, "float64", scale=1)
        assert (a != before).all()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_sgd_is_pytorchs(dtype):
    params = leaves(dtype)
    theirs = twins(params)
    ours = SGD(params, lr=0.1, weight_decay=0.2)
    other = torch.optim.SGD(theirs, lr=0.1, weight_decay=0.2)
    for step in range(5):
        ours.zero_grad()
        give(params, seed=step)
        copy_grads(params, theirs)
        ours.step()
        other.step()
    for p, t in zip(params, theirs, strict=True):
        close(p.data, t.detach().numpy(), dtype)


def trained(make, block, borders=()):
    """All bits after three steps, each made in parts between these borders."""
    params = leaves("float32")
    optimizer = make(params)
    cuts = [0, *sorted(borders), optimizer.flat.data.size]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "BLOCK", block)
        for step in range(1, 4):
            optimizer.zero_grad()
            give(params, seed=step)
            if borders:
                for start, stop in itertools.pairwise(cuts):
                    optimizer.update(slice(start, stop), step, optimizer.lr)
            else:
                optimizer.step()
    return [optimizer.flat.data, *(getattr(optimizer, name, 0) for name in "mv")]


def decaying(params):
    return AdamW(params, weight_decay=0.1, undecayed=params[1:4])


@given(st.sampled_from([decaying, SGD]), st.sampled_from([1, 3, 8, 1 << 16]),
       st.lists(st.integers(0, 89), max_size=4))
def test_parts_and_chunks_leave_the_bits_alone(make, block, borders):
    assert sum(math.prod(s) for s in SHAPES) == 89
    whole, parts = trained(make, 1 << 16), trained(make, block, borders)
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("make", [decaying, SGD])
@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_an_update_scales_the_gradient(make, scale):
    scaled, plain = (make(leaves()) for _ in "12")
    give(scaled.flat.params, seed=0, scale=2.0 / scale)
    give(plain.flat.params, seed=0, scale=2.0)
    scaled.update(slice(0, 89), 1, 0.1, scale)
    plain.update(slice(0, 89), 1, 0.1)
    assert np.array_equal(scaled.flat.data, plain.flat.data)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(1, 9))
def test_chunks_cover_a_part_once_and_never_mix_decayed_and_not(decayed, start, length, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "BLOCK", block)
        chunks = adamw.chunks(slice(start, start + length), decayed, np)
    covered = [i for c in chunks for i in range(c.start, c.stop)]
    assert covered == list(range(start, start + length))
    assert all(c.stop <= decayed or c.start >= decayed for c in chunks)
    assert all(c.stop - c.start <= block for c in chunks)


def test_parameters_and_gradients_are_views_of_flat_memory():
    params = leaves("float32")
    before = [p.data.copy() for p in params]
    give(params, seed=1)
    gradients = [p.grad.copy() for p in params]
    flat = FlatParameters(params)
    assert all(np.array_equal(p.grad, g) for p, g in zip(params, gradients))
    assert all(np.shares_memory(p.grad, flat.grad) for p in params)
    flat.zero_grad()
    assert all(p.grad is None for p in params)
    assert flat.data.size == flat.grad.size == flat.size
    give(params, seed=0)
    for p, value in zip(params, before, strict=True):
        assert np.array_equal(p.data, value)
        assert np.shares_memory(p.data, flat.data) and np.shares_memory(p.grad, flat.grad)
    flat.data[...] = 3
    flat.grad[...] = 4
    assert all((p.data == 3).all() and (p.grad == 4).all() for p in params)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_each_parameter_begins_at_a_multiple_of_16_bytes_and_zeros_stay_between(dtype):
    params = leaves(dtype, shapes=[(3,), (2, 5), (1,), (8,)])
    optimizer = AdamW(params, lr=0.1, undecayed=params[2:])
    flat = optimizer.flat
    assert all(place.start * params[0].dtype.itemsize % 16 == 0 for place in flat.places)
    assert optimizer.decayed == flat.places[2].start
    for seed in range(3):
        give(params, seed)
        optimizer.step()
    between = np.ones(flat.size, bool)
    for place in flat.places:
        between[place] = False
    assert between.any()
    assert not any(a[between].any() for a in (flat.data, flat.grad, optimizer.m, optimizer.v))


def test_the_first_gradient_overwrites_and_later_ones_add():
    (x,) = leaves(shapes=[(3,)])
    flat = FlatParameters([x])
    flat.grad[...] = np.nan  # what an earlier step left
    ops.mul(x, np.array([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [1, 2, 3]
    ops.mul(x, np.array([10.0, 10.0, 10.0])).sum().backward()
    assert x.grad.tolist() == [11, 12, 13]
    flat.zero_grad()
    assert x.grad is None
    ops.mul(x, np.array([5.0, 5.0, 5.0])).sum().backward()
    assert x.grad.tolist() == flat.grad[:3].tolist() == [5, 5, 5]


@pytest.mark.parametrize("make, other", [(AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD),
                                         (PagedAdamW, torch.optim.AdamW)])
def test_a_parameter_without_a_gradient_stays_as_in_pytorch(make, other):
    """No decay, no step of its moments: one parameter after the other gets no gradient any more."""
    params = leaves("float32")
    theirs, settings = twins(params), dict(lr=0.1, weight_decay=0.1)
    ours, peer = make(params, **settings), other(theirs, **settings)
    for step in range(5):
        ours.zero_grad()
        peer.zero_grad()
        give(params[step:], seed=step)
        copy_grads(params[step:], theirs[step:])
        before = [p.data.copy() for p in params]
        ours.step()
        peer.step()
        for i, (p, old) in enumerate(zip(params, before)):
            assert np.array_equal(p.data, old) == (i < step)
        assert largest_gap(params, theirs) < 2e-6
    if make is not SGD:
        for place, p, t in zip(ours.flat.places, params, theirs):
            close(ours.m[place].reshape(p.shape), peer.state[t]["exp_avg"].numpy(), "float32")
            close(ours.v[place].reshape(p.shape), peer.state[t]["exp_avg_sq"].numpy(), "float32")


@given(present=st.lists(st.booleans(), min_size=5, max_size=5), cuts=st.sets(st.integers(1, 26)))
def test_parts_of_a_step_leave_out_the_same_parameters(present, cuts):
    whole, parts = (AdamW(leaves("float32"), weight_decay=0.1) for _ in range(2))
    ends = [0, *sorted(4 * cut for cut in cuts if 4 * cut < whole.flat.size), whole.flat.size]
    def everywhere(*step):
        for part in itertools.pairwise(ends):
            parts.update(slice(*part), *step)
    for optimizer in (whole, parts):
        give([p for p, here in zip(optimizer.flat.params, present) if here], seed=3)
    whole.step()
    parts.step(everywhere=everywhere)
    for name in ("m", "v"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))
    both = zip(whole.flat.params, parts.flat.params, strict=True)
    for (p, other), old, here in zip(both, leaves("float32"), present):
        assert np.array_equal(p.data, other.data)
        assert np.array_equal(p.data, old.data) != here


def rest(params):
    params[1].node = None


def other_memory(params):
    params[1].data = params[1].data.copy()


def another_optimizer(params):
    SGD(params[1:])


def become(params):
    params[1].become(params[1].data)


@pytest.mark.parametrize("make", [AdamW, PagedAdamW, SGD])
@pytest.mark.parametrize("change, said", [
    (rest, "is frozen, or its adapter rests: make the optimizer after add_lora"),
    (other_memory, "has been given other memory since"),
    (another_optimizer, "has been given other memory since"),
    (become, "has been given other memory since"),
])
def test_an_optimizer_of_what_no_longer_trains_says_so(make, change, said):
    optimizer = make(params := leaves("float32"))
    give(params, seed=0)
    change(params)
    before = [p.data.copy() for p in params]
    with pytest.raises(ValueError, match=rf"^parameter 1 of the optimizer, \(7,\), {said}"):
        optimizer.step()
    assert optimizer.steps == 0
    assert all(np.array_equal(p.data, old) for p, old in zip(params, before))


def test_an_optimizer_made_before_add_lora_says_so():
    model = Transformer(Config.gpt2(13, 6, layers=1, heads=2, width=8))
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    add_lora(model, 2, 4)
    before = {name: a.copy() for name, a in model.state_dict().items()}
    ops.cross_entropy(model(np.array([[1, 2]])), np.array([[2, 3]])).backward()
    for use in (optimizer.step, lambda: Trainer(model, optimizer).step(
            0, (np.array([[1, 2]]), np.array([[2, 3]])))):
        with pytest.raises(ValueError, match=r"parameter 0 .* make the optimizer after add_lora"):
            use()
    assert all(np.array_equal(a, before[name]) for name, a in model.state_dict().items())


@pytest.mark.parametrize("make", [AdamW, SGD])
def test_a_gradient_from_before_the_optimizer_counts(make):
    before, after = leaves(), make(others := leaves())
    give(before, seed=0)
    optimizer = make(before)
    give(others, seed=0)
    optimizer.step()
    after.step()
    assert np.array_equal(optimizer.flat.data, after.flat.data)
    assert all((p.data != q.data).all() for p, q in zip(others, leaves()))


@pytest.mark.parametrize("make", [AdamW, SGD])
def test_a_gradient_that_the_user_put_in_its_place_counts(make):
    one, other = make(leaves()), make(leaves())
    for optimizer in (one, other):
        give(optimizer.flat.params, seed=0)
    for p, q in zip(one.flat.params, other.flat.params):
        p.grad = p.grad / 4  # a new array
        q.grad /= 4
    one.step()
    other.step()
    assert np.array_equal(one.flat.data, other.flat.data)


@given(st.floats(0.1, 10), st.sampled_from(["float32", "float64"]))
def test_clipping_is_pytorchs(share, dtype):
    scale = 1e9  # beside which the 1e-6 that PyTorch adds to the norm is nothing
    params = leaves(dtype)
    give(params, seed=1, scale=scale)
    params.append(Tensor(np.ones(3, dtype), requires_grad=True))  # without gradient
    theirs = twins(params)
    copy_grads(params[:-1], theirs[:-1])
    limit = share * scale
    norm = clip_grad_norm(params, limit)
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit)
    close(norm, expected, dtype)
    for p, t in zip(params[:-1], theirs[:-1], strict=True):
        close(p.grad, t.grad, dtype)
    assert params[-1].grad is None
    close(clip_grad_norm(params, math.inf), min(norm, limit), dtype)


@pytest.mark.parametrize("limit", [math.inf, 1e9])
def test_a_gradient_below_the_limit_is_only_measured(limit):
    params = leaves("float32")
    give(params, seed=1)
    before = [p.grad.copy() for p in params]
    norm = clip_grad_norm(params, limit)
    assert norm == pytest.approx(math.sqrt(sum((g.astype(float) ** 2).sum() for g in before)))
    assert all(np.array_equal(p.grad, g) for p, g in zip(params, before, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_gradients_are_measured_in_float32(dtype, monkeypatch):
    monkeypatch.setattr("minilm.optim.flat.PIECE", 4)
    (p,) = leaves(dtype, shapes=[(10,)])
    p.grad = np.full(10, 300).astype(dtype)  # the square is beyond float16
    assert clip_grad_norm([p], math.inf) == pytest.approx(300 * math.sqrt(10))


def test_clipping_takes_no_gradients_and_zero_ones():
    params = leaves()
    assert clip_grad_norm(params, 1.0) == 0
    give(params, seed=0, scale=0.0)
    assert clip_grad_norm(params, 1e-300) == 0


@given(st.integers(0, 20), st.integers(1, 80), st.floats(1e-6, 1), st.floats(0, 1))
def test_the_schedule_rises_to_lr_and_falls_to_min_lr(warmup, more, lr, share):
    steps, least = warmup + more, share * lr
    rates = [cosine_schedule(s, steps, lr, least, warmup) for s in range(steps + 3)]
    assert rates[warmup] == pytest.approx(lr, rel=1e-12)
    assert rates[steps:] == [least] * 3
    assert rates[:warmup] == pytest.approx([lr * (s + 1) / (warmup + 1) for s in range(warmup)])
    assert all(a >= b - 1e-15 for a, b in zip(rates[warmup:], rates[warmup + 1 :]))
    half = cosine_schedule(warmup + more, warmup + 2 * more, lr, least, warmup)
    assert half == pytest.approx((lr + least) / 2)


def test_the_cosine_is_pytorchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=13, eta_min=0.02)
    for step in range(13):
        rate = theirs.get_last_lr()[0]
        assert cosine_schedule(step, 13, 0.3, min_lr=0.02) == pytest.approx(rate, rel=1e-12)
        optimizer.step()
        theirs.step()


def test_what_flat_memory_refuses():
    a, b = leaves(shapes=[(2,), (3,)])
    with pytest.raises(ValueError, match="no parameters"):
        FlatParameters([])
    with pytest.raises(ValueError, match="twice"):
        FlatParameters([a, b, a])
    with pytest.raises(ValueError, match="requires_grad"):
        FlatParameters([a, Tensor(np.ones(2))])
    with pytest.raises(ValueError, match="requires_grad"):
        FlatParameters([a, b * 2.0])
    with pytest.raises(ValueError, match=r"one dtype.*float32.*float64"):
        FlatParameters([a, *leaves("float32")])
    before = a.data
    with pytest.raises(ValueError):
        FlatParameters([a, a])
    assert a.data is before and a.on_grad is None


@pytest.mark.parametrize(
    "bad",
    [dict(lr=-1.0), dict(lr=nan), dict(lr=inf), dict(betas=(1.0, 0.9)), dict(betas=(0.9, -0.1)),
     dict(betas=(nan, 0.9)), dict(betas=(0.9,)), dict(eps=-1e-8), dict(eps=nan), dict(eps=inf),
     dict(weight_decay=-0.1), dict(weight_decay=nan), dict(weight_decay=inf)],
)
@pytest.mark.parametrize("make", [AdamW, PagedAdamW, SGD])
def test_bad_settings_are_refused_by_their_names(make, bad):
    (name,) = bad
    if make is SGD and name not in ("lr", "weight_decay"):
        return
    with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
        make(leaves("float32"), **bad)
    with pytest.raises(TypeError, match=f"^{name} must be a number, .*; got '1'$"):
        make(leaves("float32"), **{name: ("1", "1") if name == "betas" else "1"})


@pytest.mark.parametrize("make", [AdamW, PagedAdamW, SGD])
@pytest.mark.parametrize("lr", [-1.0, nan, inf])
def test_a_rate_that_was_changed_to_none_is_refused(make, lr):
    optimizer = make(leaves("float32"))
    give(optimizer.flat.params, seed=0)
    before, optimizer.lr = optimizer.flat.data.copy(), lr
    with pytest.raises(ValueError, match=f"^lr must be finite and at least 0, got {lr}$"):
        optimizer.step()
    assert np.array_equal(optimizer.flat.data, before) and optimizer.steps == 0


@pytest.mark.parametrize("bad", [0.0, -1.0, nan])
def test_a_norm_is_clipped_to_something_positive(bad):
    with pytest.raises(ValueError, match=f"^max_norm must be positive, got {bad}$"):
        clip_grad_norm(leaves(), bad)


@pytest.mark.parametrize("bad", [dict(step=-1), dict(steps=-3), dict(warmup=-5), dict(lr=nan),
                                 dict(lr=-1.0), dict(min_lr=-1.0), dict(min_lr=inf)])
def test_bad_schedules_are_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"^{name} must be .*at least 0, got "):
        cosine_schedule(**dict(step=0, steps=7, lr=1.0) | bad)
    with pytest.raises(TypeError, match=r"^steps must be a whole number, at least 0; got 2\.5$"):
        cosine_schedule(0, 2.5, 1.0)


def test_settings_may_be_zero():
    """Without moments and eps a step of AdamW is lr times the gradient's sign."""
    (p,) = leaves(shapes=[(8,)])
    before = p.data.copy()
    signs = AdamW([p], lr=0.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    give([p], seed=1)
    signs.step()
    assert np.array_equal(p.data, before)
    signs.lr = 0.5
    signs.step()
    close(p.data, before - 0.5 * np.sign(p.grad), "float64")
    still = SGD(leaves(), lr=0.0, weight_decay=0.0)
    give(still.flat.params, seed=1)
    still.step()
    assert all(np.array_equal(p.data, a.data) for p, a in zip(still.flat.params, leaves()))


MODEL = Transformer(Config.gpt2(9, 8, 1, 2, 8))


@pytest.mark.parametrize("given, said", [
    (None, "got NoneType"), (MODEL, "got Transformer"), (MODEL.parameters()[0], "got Tensor"),
    ([np.ones(2)], "got one with ndarray"), (dict(MODEL.named_parameters()), "got one with str"),
    (list(MODEL.named_parameters()), "got one with tuple"),
], ids=["None", "a model", "a Tensor", "an array", "a dict", "pairs"])
@pytest.mark.parametrize("take", [
    AdamW, SGD, PagedAdamW, lambda params: clip_grad_norm(params, 1.0),
    lambda params: AdamW(MODEL.parameters(), undecayed=params)])
def test_parameters_are_a_list_of_tensors(take, given, said):
    with pytest.raises(TypeError, match=f"must be a list of Tensors, such as .*{said}$"):
        take(given)


def test_undecayed_ones_are_among_the_parameters():
    first, *others = MODEL.parameters()
    with pytest.raises(ValueError, match=f"^{len(others)} of undecayed are none of the parameters"):
        AdamW([first], undecayed=others)


@pytest.mark.parametrize("setting", [dict(lr="1e-3"), dict(lr=(1e-3,)), dict(lr=[]),
                                     dict(betas=0.9), dict(betas=None), dict(weight_decay=[0.1])])
def test_a_setting_is_a_number_or_several(setting):
    with pytest.raises(TypeError, match=f"^{next(iter(setting))} must be "):
        AdamW(MODEL.parameters(), **setting)


@pytest.mark.parametrize("state", ["8bit", Float32, 0])
def test_states_are_a_format(state):
    with pytest.raises(TypeError, match=r"^state must be Float32\(\) or EightBit\(\), got "):
        PagedAdamW(MODEL.parameters(), state=state)


def test_the_lowest_rate_is_not_above_the_highest():
    with pytest.raises(ValueError, match=r"^min_lr must be at most lr, 0.001; got 0.1$"):
        cosine_schedule(3, 10, 1e-3, min_lr=0.1)
    assert cosine_schedule(3, 10, 1e-3, min_lr=1e-3) == 1e-3


@pytest.mark.parametrize("arguments, said", [
    (dict(optimizer=None), "^optimizer must be .* got NoneType$"),
    (dict(optimizer=MODEL.parameters()), "^optimizer must be .* got list$"),
    (dict(scaler=True), "^scaler must be a LossScaler or None, got True$")])
def test_a_trainer_needs_an_optimizer(arguments, said):
    made = AdamW(Transformer(MODEL.config).parameters())
    with pytest.raises(TypeError, match=said):
        Trainer(MODEL, **{"optimizer": made} | arguments)


def test_a_trainer_says_what_is_no_longer_in_its_model():
    model, tokens = Transformer(MODEL.config), np.array([[1, 2, 3]])
    trainer = Trainer(model, AdamW(model.parameters()))
    trainer.step(0, (tokens, tokens))
    model.replace("blocks.0.mlp", Transformer(MODEL.config).blocks[0].mlp)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"of the optimizer, .* is none of the model's and"):
        trainer.step(1, (tokens, tokens))
    assert all(np.array_equal(array, before[name]) for name, array in model.state_dict().items())
