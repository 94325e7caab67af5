"""minilm.peft.adalora and budget: eq. (3) and (4) written out, the schedule, the scores and the
masks of PEFT's RankAllocator from the same gradients, and a loss whose parts add up. The laws of
all methods are in test_methods.py, PEFT's files in test_interop_peft.py and test_peft_whole.py."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_methods import TARGETS, TOKENS, loss, make, stir

from minilm.nn import Linear
from minilm.optim import AdamW, PagedAdamW
from minilm.peft import Budget, Orthogonal, add_adalora, add_lora
from minilm.peft.adalora import AdaLoRA, acting, orthogonality
from minilm.peft.adapted import adapted_layers
from minilm.tensor import Tensor
from minilm.train import LabelLoss, Trainer


@given(I=st.integers(1, 5), O=st.integers(1, 5), r=st.integers(1, 3), first=st.integers(0, 5),
       lead=st.lists(st.integers(1, 3), max_size=3), seed=st.integers(0, 99))
def test_the_formula(I, O, r, first, lead, seed):
    """W0 + s P Lambda Q, beside and merged, for any shape."""
    rng = np.random.default_rng(seed)
    base = Linear(I, O, rng, std=1.0).astype("float64")
    P, lam, Q = (rng.standard_normal(s) for s in ((O, r), (r, 1), (r, I)))
    adapter, x = AdaLoRA(P, lam, Q, 3.0, ranknum=first), rng.standard_normal((*lead, I))
    W = base.weight.data + 3.0 / ((first or r) + 1e-5) * P @ np.diag(lam[:, 0]) @ Q
    size = max(1.0, np.abs(x @ W.T).max())
    assert np.abs(adapter(Tensor(x), base).data - x @ W.T).max() < 1e-12 * size
    assert np.abs(adapter.merged(base)(Tensor(x)).data - x @ W.T).max() < 1e-12 * size
    assert np.linalg.matrix_rank(adapter.update()) <= r and adapter.shape == (O, I)


def test_what_is_trained_and_its_first_numbers():
    model = add_adalora(make("llama"), 4, 8)
    for path, m in adapted_layers(model).items():
        a, (O, I) = m.adapters["default"], m.base.weight.shape
        assert (a.P.shape, a.lam.shape, a.Q.shape) == ((O, 4), (4, 1), (4, I)), path
        assert not a.lam.data.any() and a.scale == 8 / (4 + 1e-5)
    assert sum(p.size for p in model.parameters()) == 2 * 4 * sum(
        O + I + 1 for O, I in ((16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)))
    numbers = np.concatenate([t.data.ravel() for a in acting(model) for t in (a.P, a.Q)])
    assert numbers.std() == pytest.approx(0.02, rel=0.05) and abs(numbers.mean()) < 1e-3


def test_orthogonality():
    """Eq. (4), zero for orthogonal factors whatever Lambda is; and its gradient."""
    model = stir(add_adalora(make("gpt2", dtype="float64"), 3, 6))
    def distance(G): return np.linalg.norm(G - np.eye(len(G))) ** 2
    expected = sum(distance(a.P.data.T @ a.P.data) + distance(a.Q.data @ a.Q.data.T)
                   for a in acting(model))
    R = orthogonality(model)
    assert float(R.data) == pytest.approx(expected, rel=1e-12)
    R.backward()
    for a in acting(model):
        assert np.allclose(a.P.grad, 4 * a.P.data @ (a.P.data.T @ a.P.data - np.eye(3)), rtol=1e-9)
        assert np.allclose(a.Q.grad, 4 * (a.Q.data @ a.Q.data.T - np.eye(3)) @ a.Q.data, rtol=1e-9)
        a.P.data[...] = np.linalg.qr(a.P.data)[0]
        a.Q.data[...] = np.linalg.qr(a.Q.data.T)[0].T
    assert float(orthogonality(model).data) < 1e-24


@pytest.mark.parametrize("workers, accumulate", [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_the_parts_of_a_batch_add_up(workers, accumulate):
    """C + gamma R, however the batch is split, and its gradient."""
    tokens, targets = (np.concatenate([a, a[::-1]]) for a in (TOKENS, TARGETS))
    targets = np.where(np.arange(7) < np.arange(len(targets))[:, None], -100, targets)

    def step(loss, workers=1, accumulate=1):
        model = stir(add_adalora(make("gpt2", dtype="float64"), 3, 6))
        optimizer = AdamW(model.parameters(), lr=0.0)
        with Trainer(model, optimizer, workers, loss=loss) as trainer:
            done = trainer.step(0, (tokens, targets), accumulate=accumulate)
        return model, done.loss, optimizer.flat.grad
    model, plain, grad = step(LabelLoss())
    for p in model.parameters():
        p.on_grad = p.grad = None
    R = orthogonality(model)
    R.backward()
    added = np.concatenate([p.grad.ravel() for p in model.parameters() if p.grad is not None])
    _, total, whole = step(Orthogonal(LabelLoss(), 0.3), workers, accumulate)
    assert total == pytest.approx(plain + 0.3 * float(R.data), rel=1e-12)
    assert np.linalg.norm(whole - grad) == pytest.approx(0.3 * np.linalg.norm(added), rel=1e-9)


def budget(model=None, lr=0.01, make_optimizer=AdamW, **settings):
    """(a model, its optimizer, its budget)."""
    model = model or add_adalora(make("gpt2"), 3, 6, ("q", "up"))
    optimizer = make_optimizer(model.parameters(), lr)
    return model, optimizer, Budget(model, optimizer, **dict(last=2, steps=20) | settings)


def learn(model, optimizer):
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


@given(steps=st.integers(2, 60), data=st.data(), last=st.integers(1, 3))
def test_the_schedule(steps, data, last):
    """From b_0 down to b_T, never up; eq. (12) between."""
    warmup = data.draw(st.integers(0, steps - 1))
    final = data.draw(st.integers(0, steps - warmup - 1))
    _, _, b = budget(last=last, steps=steps, warmup=warmup, final=final)
    counts = [b.at(t) for t in range(1, steps + 2)]
    assert counts == sorted(counts, reverse=True) and {*counts[:warmup]} <= {12}
    assert {*counts[steps - final - 1 :]} == {4 * last} and min(counts) == 4 * last
    t = data.draw(st.integers(warmup + 1, steps - final))
    left = (steps - final - t) / (steps - final - warmup)
    assert abs(b.at(t) - (4 * last + (12 - 4 * last) * left**3)) < 1 + 1e-9


@pytest.mark.parametrize("make_optimizer", [AdamW, PagedAdamW])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_many_are_kept_as_the_budget_allows(dtype, make_optimizer):
    model = add_adalora(make("gpt2", dtype=dtype), 3, 6, ("q", "up"))
    model, optimizer, b = budget(model, warmup=3, final=5, every=2, make_optimizer=make_optimizer)
    for t in range(1, 21):
        before = np.concatenate(b.kept)
        learn(model, optimizer)
        if t == 5 or t > 15:  # masked in the step before: they begin at zero, masters too
            lams = np.concatenate([a.lam.data[:, 0] for a in acting(model)])
            assert np.abs(lams[~before]).max() < 0.03 < np.abs(lams[before]).max()
        kept = b.step(t)
        lams = [a.lam.data[:, 0] for a in acting(model)]
        if t > 3 and (t % 2 == 0 or t >= 15):
            expected = b.at(t) if t <= 15 else 8
            assert kept == expected == sum(int((lam != 0).sum()) for lam in lams)
            assert all(np.array_equal(lam != 0, k) for lam, k in zip(lams, b.kept))
            wide = [[t.data.astype("float64") for t in (a.P, a.lam, a.Q)] for a in acting(model)]
            assert sum(np.linalg.matrix_rank(P @ (lam * Q)) for P, lam, Q in wide) <= kept
        else:
            assert kept == before.sum()
        if t > 15:
            assert np.array_equal(np.concatenate(b.kept), before)  # frozen
    assert kept == 8


def test_what_was_dropped_may_come_back_until_the_end():
    model, optimizer, b = budget(last=1, steps=20, final=10)
    def scored(a, i):
        return [dict(zip(map(id, optimizer.flat.params), optimizer.flat.views(flat)))[id(a.lam)][i]
                for flat in (b.Ibar, b.Ubar)]
    for t in range(1, 21):
        learn(model, optimizer)
        if t in (8, 15):
            gone = [(a, np.flatnonzero(~kept)) for a, kept in zip(acting(model), b.kept)]
            a, (i, *_) = next((a, places) for a, places in gone if len(places))
            for place in scored(a, i):
                place[...] = 1e3
        b.step(t)
        if t in (8, 15):
            assert a.lam.data[i, 0] != 0 if t == 8 else a.lam.data[i, 0] == 0


@pytest.mark.parametrize("workers, processes", [(1, False), (2, False), (2, True)])
def test_a_training_loop(workers, processes):
    """Also if forked processes share the parameters, which the budget changes between steps."""
    model = add_adalora(make("gpt2"), 3, 6)
    _, optimizer, b = budget(model, lr=0.03, warmup=3, final=5)
    losses = []
    with Trainer(model, optimizer, workers, processes, loss=Orthogonal(LabelLoss())) as trainer:
        for t in range(20):
            done = trainer.step(t, (TOKENS, TARGETS))
            assert b.step(done.step) == (b.at(done.step) if done.step < 15 else 2 * 12)
            losses.append(trainer.evaluate(TOKENS, TARGETS)[0])
    assert losses[-1] < losses[0] - 0.2
    for a, kept in zip(acting(model), b.kept):
        assert np.array_equal(a.lam.data[:, 0] != 0, kept)
    assert 0 < orthogonality(model).data < orthogonality(add_adalora(make("gpt2"), 3, 6)).data


def test_equal_scores_are_ranked_by_place():
    model, optimizer, b = budget(steps=4, last=1)
    learn(model, optimizer)
    b.Ibar[...] = b.Ubar[...] = 0
    optimizer.zero_grad()
    optimizer.step()
    optimizer.flat.grad[...] = 0
    assert b.step(1) == b.at(1) == 7
    assert [k.tolist() for k in b.kept] == [[True] * 3, [True] * 3, [True, False, False],
                                            [False] * 3]


def test_it_goes_on_as_if_it_had_not_stopped():
    def run(stop):
        model, optimizer, b = budget(final=4)
        for t in range(1, 21):
            if t == stop:
                states = {name: a.copy() for name, a in b.states().items()}
                b = Budget(model, optimizer, last=2, steps=20, final=4)
                b.put_back(states)
            learn(model, optimizer)
            b.step(t)
        return [p.data.tobytes() for p in model.parameters()]
    assert run(None) == run(9) == run(18)


def test_layers_that_share_lambda_are_one_matrix():
    model, rng = add_adalora(make("gpt2"), 3, 6, ("q", "v")), np.random.default_rng(0)
    for block in model.blocks:
        q, v = (m.adapters["default"] for m in (block.attention.q, block.attention.v))
        v.lam, v.Q = q.lam, q.Q
    _, optimizer, b = budget(model, last=1, steps=5)
    assert (len(b.matrices), b.first, b.last) == (2, 6, 2)
    learn(model, optimizer)
    b.Ibar[...], b.Ubar[...] = rng.random(b.Ibar.shape), rng.random(b.Ibar.shape)
    s = dict(zip(map(id, optimizer.flat.params), optimizer.flat.views(b.Ibar * b.Ubar)))
    q, v = (m.adapters["default"] for m in adapted_layers(model.blocks[0]).values())
    P = np.concatenate([s[id(q.P)], s[id(v.P)]])
    expected = s[id(q.lam)][:, 0] + P.mean(0) + s[id(q.Q)].mean(1)
    assert np.allclose(b.scores()[0], expected, rtol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("every", [1, 3])
def test_masks_are_pefts(every):
    """The same tensors and gradients at each step: the same budget, scores and masks."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=5, deltaT=every, total_step=20, lora_alpha=8,
        target_modules=["q", "v"])
    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
    theirs = peft.get_peft_model(Theirs(), config).base_model
    model = add_adalora(make("gpt2"), 4, 8, ("blocks.0.attention.q", "blocks.0.attention.v"))
    model, optimizer, b = budget(model, lr=0.0, steps=20, warmup=2, final=5, every=every)
    rng, named = np.random.default_rng(1), dict(theirs.named_parameters())
    scores = theirs.rankallocator
    ours = {f"model.{end}.{part}.default": tensor for a, end in zip(acting(model), "qv")
            for tensor, part in ((a.P, "lora_B"), (a.lam, "lora_E"), (a.Q, "lora_A"))}
    for t in range(1, 21):
        for name, tensor in ours.items():
            tensor.data += 0.1 * rng.standard_normal(tensor.shape).astype(np.float32)
            tensor.grad, p = rng.standard_normal(tensor.shape).astype(np.float32), named[name]
            p.data, p.grad = (torch.tensor(x.copy()) for x in (tensor.data, tensor.grad))
        optimizer.step()
        theirs.update_and_allocate(t)
        b.step(t)
        for a, end in zip(acting(model), "qv"):
            E = named[f"model.{end}.lora_E.default"].detach().numpy()
            assert np.array_equal(E, a.lam.data), t
        if t < 15:
            assert scores.budget_schedule(t)[0] == b.at(t)
            for flat, means in (b.Ibar, scores.exp_avg_ipt), (b.Ubar, scores.exp_avg_unc):
                of = dict(zip(map(id, optimizer.flat.params), optimizer.flat.views(flat)))
                for name, tensor in ours.items():
                    expected = means[name.removeprefix("model.")].numpy()
                    assert np.allclose(of[id(tensor)], expected, 1e-5, 1e-7), (t, name)
    assert sum(map(sum, b.kept)) == 4


@pytest.mark.parametrize("settings, text", [
    (dict(last=4), "last must be at most the first rank, 3 on average, got 4"),
    (dict(last=0), "last must be at least 1"), (dict(betas=(0.9, 1.0)), "betas must be"),
    (dict(warmup=10, final=10), "warmup 10 and final 10 leave none of 20 steps"),
    (dict(betas=(0.9,)), "betas must be two numbers"),
    (dict(every=0), "every must be at least 1")])
def test_budgets_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        budget(**settings)


def test_what_is_refused():
    model = add_adalora(make("gpt2"), 3, 6)
    with pytest.raises(ValueError, match="the optimizer does not hold all adapters"):
        Budget(model, AdamW(model.parameters()[1:]), 2, 20)
    with pytest.raises(TypeError, match="optimizer must be AdamW, SGD or their like, got a None"):
        Budget(model, None, 2, 20)
    lora = add_lora(make("gpt2"), 2, 4)
    for broken in (orthogonality, lambda m: Budget(m, AdamW(m.parameters()), 2, 20)):
        with pytest.raises(ValueError, match="no AdaLoRA adapter acts"):
            broken(lora)
    with pytest.raises(ValueError, match="gamma must be finite and at least 0"):
        Orthogonal(LabelLoss(), -0.1)
    one = np.ones
    with pytest.raises(ValueError, match=r"P must be \(O, r\), lam \(r, 1\) and Q"):
        AdaLoRA(one((4, 2)), one(2), one((2, 3)), 1)
    for settings, text in ((dict(r=17), "r must be 1 to 16"), (dict(targets="w"), "match no layer"),
                           (dict(alpha=np.inf), "alpha must be positive and finite")):
        model = make("gpt2")
        with pytest.raises(ValueError, match=text):
            add_adalora(model, **dict(r=2, alpha=4) | settings)
        assert not adapted_layers(model)
