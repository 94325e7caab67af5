"""The losses of preferences: what each is equal to, and the laws that their papers promise."""

import math
from itertools import combinations

import numpy as np
import pytest
from conftest import close
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minilm import ops
from minilm.align import (
    DPO,
    GRPO,
    PPO,
    RankingLoss,
    laid_out,
    ranking_loss,
    reward_model,
    value_head,
)
from minilm.align.dpo import answer_sums, plain_dpo_loss, reference_sums
from minilm.align.grpo import group_advantages, kl_penalty
from minilm.align.likelihood import (
    answer_log_probs,
    log_prob,
    looked_at,
    plain_log_prob,
    real,
    summed,
)
from minilm.align.ppo import (
    gae,
    plain_policy_loss,
    policy_loss,
    token_rewards,
    value_loss,
    whitened,
)
from minilm.align.reward import Reward, plain_ranking_loss, raw_rewards
from minilm.align.rollouts import Rollouts, draw_answers, rollouts
from minilm.peft import add_lora
from minilm.tensor import Tensor
from minilm.transformer import Config, Transformer

V, END = 11, 10
SIZES = dict(vocab_size=V, context=24, layers=2, heads=2, width=8)
seeds = st.integers(0, 2**32 - 1)
numbers = st.floats(-3, 3, allow_subnormal=False)


def model_of(seed=0, adapted=True):
    """A Llama in float64 with opinions, and an adapter with some of its own."""
    model = Transformer(Config.llama(**SIZES, hidden=12), seed).astype(np.float64)
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.data += 0.3 * rng.standard_normal(p.shape)
    if adapted:
        add_lora(model, r=2, alpha=4, targets="all-linear")
        for p in model.parameters():
            p.data += 0.3 * rng.standard_normal(p.shape)
    return model


def ragged(rng, B=4, most=5):
    """Prompts and answers of several lengths: tokens (B, T), counted (B, T - 1)."""
    def some(n): return rng.integers(0, V, rng.integers(1, n + 1))
    found = laid_out([some(4) for _ in range(B)], [[some(most), some(most)] for _ in range(B)], END)
    return found


def drawn(model, rng, B=4, head=None):
    """Rollouts of the model, with scores at random."""
    prompts = [rng.integers(0, V, n) for n in rng.integers(1, 5, B)]
    return rollouts(model, prompts, 5, END, seed=int(rng.integers(1 << 30)), head=head,
                    score=lambda tokens, counted: rng.standard_normal(len(tokens)))


def losses(rng):
    """Each loss with its model and a batch."""
    policy, head = model_of(), value_head(8).astype(np.float64)
    ranked = ragged(rng)
    text = rng.integers(0, V, (2, 4, 6))
    for loss in (PPO(head, ptx=0.5), GRPO(2)):
        r = drawn(policy, rng, head=head if type(loss) is PPO else None)
        batch = list(loss.prepared(r)) + [*text] * (type(loss) is PPO)
        batch[2] = batch[2] - 0.3 * r.counted * rng.standard_normal(r.counted.shape)  # rho != 1
        yield loss, policy, batch
    yield DPO(0.3), policy, [*ranked, reference_sums(policy, *ranked)]
    rewarding = reward_model(model_of(adapted=False))
    yield RankingLoss(), rewarding, [*ranked]


# Rewards to advantages


@st.composite
def episodes(draw):
    """rewards, values and counted (B, T), whose counted tokens lie next to each other."""
    rng, B, T = np.random.default_rng(draw(seeds)), draw(st.integers(1, 4)), draw(st.integers(1, 7))
    first = rng.integers(0, T, B)
    last = np.array([rng.integers(f, T) for f in first])
    place = np.arange(T)
    counted = (place >= first[:, None]) & (place <= last[:, None])
    return *(rng.standard_normal((2, B, T)) * counted), counted


@given(episodes(), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_double_sum(episode, gamma, lam):
    rewards, values, counted = episode
    found = gae(rewards, values, counted, gamma, lam)
    for row, here in enumerate(counted):
        places = np.flatnonzero(here)
        V = [*values[row, places], 0.0]
        delta = [rewards[row, t] + gamma * V[i + 1] - V[i] for i, t in enumerate(places)]
        for i, t in enumerate(places):
            expected = sum((gamma * lam) ** l * d for l, d in enumerate(delta[i:]))
            assert found[row, t] == pytest.approx(expected, abs=1e-12)
    assert not found[~counted].any()


@given(episodes())
def test_with_lambda_1_advantage_and_value_are_the_rewards_to_come(episode):
    rewards, values, counted = episode
    to_come = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    returns = gae(rewards, values, counted, 1.0, 1.0) + values
    assert np.allclose(returns[counted], to_come[counted], atol=1e-12)


@given(episodes(), st.floats(0, 2))
def test_the_rewards_of_an_answers_tokens_add_up_to_zieglers(episode, beta):
    log_probs, reference, counted = episode
    scores = np.arange(1.0, 1 + len(counted))
    rewards = token_rewards(scores, log_probs, reference, counted, beta)
    whole = scores - beta * (log_probs - reference).sum(-1)
    assert np.allclose(rewards.sum(-1), whole) and not rewards[~counted].any()
    alone = token_rewards(scores, log_probs, log_probs, counted, beta)  # no KL: the score alone
    last = [np.flatnonzero(row)[-1] for row in counted]
    assert (alone[np.arange(len(scores)), last] == scores).all()
    assert np.count_nonzero(alone) == len(scores)


@given(episodes(), seeds)
def test_where_kl_is_very_dear_no_score_counts(episode, seed):
    """beta to infinity: the advantages, once white, are those of the penalty alone."""
    log_probs, reference, counted = episode
    scores = np.random.default_rng(seed).uniform(-9, 9, len(counted))
    found, alone = (
        whitened(gae(token_rewards(s, log_probs, reference, counted, 1e9), 0 * reference, counted,
                     1.0, 0.95), counted) for s in (scores, 0 * scores))
    assert np.allclose(found, alone, atol=1e-4)


@given(episodes())
def test_whitening_counts_answers_alone(episode):
    x, _, counted = episode
    white = whitened(x, counted)
    assert not white[~counted].any() and abs(white[counted].mean()) < 1e-9
    if counted.sum() > 1:
        assert white[counted].std() == pytest.approx(1, abs=1e-5)


@given(arrays(float, (3, 4), elements=numbers), numbers, st.floats(0.5, 2))
def test_a_groups_advantages_know_no_shift_and_no_scale(scores, shift, scale):
    A = group_advantages(scores.ravel(), 4).reshape(3, 4)
    assert np.allclose(A.mean(-1), 0, atol=1e-7)
    wide = scores.std(-1) > 1e-3
    assert np.allclose(A[wide].std(-1), 1, atol=1e-4)
    again = group_advantages((scale * scores + shift).ravel(), 4).reshape(3, 4)
    assert np.allclose(again[wide], A[wide], atol=1e-3)


# The policy's loss


@given(arrays(float, 6, elements=numbers), arrays(float, 6, elements=numbers), seeds)
def test_policy_loss_and_the_gradient_of_clipped_tokens(gaps, advantages, seed):
    old = np.random.default_rng(seed).standard_normal(6)
    log_probs = Tensor(old + gaps, requires_grad=True)
    loss = policy_loss(log_probs, old, advantages)
    close(loss.data, plain_policy_loss(log_probs.data, old, advantages), "float64", scale=1)
    loss.backward()
    rho = np.exp(log_probs.data - old)
    clipped = ((rho > 1.2 + 1e-9) & (advantages > 0)) | ((rho < 0.8 - 1e-9) & (advantages < 0))
    assert not log_probs.grad[clipped].any()
    free = ((rho > 1.2 + 1e-9) & (advantages < 0)) | ((rho < 0.8 - 1e-9) & (advantages > 0))
    assert np.allclose(log_probs.grad[free], -(rho * advantages)[free] / 6)


@given(seed=seeds)
def test_a_rounds_first_minibatch_is_where_the_policy_is(seed):
    """rho = 1: no clip acts, the loss is minus the mean advantage, and GRPO's KL is 0 at pi_ref."""
    rng = np.random.default_rng(seed)
    model = model_of(adapted=False)
    add_lora(model, r=2, alpha=4)  # B = 0: the policy is its reference
    r, head = drawn(model, rng), value_head(8).astype(np.float64)
    assert np.abs(r.log_probs - r.reference).max() == 0 and r.told()["kl"] == 0
    for loss in (PPO(head, value=0.0), PPO(head, eps=1e-4, value=0.0), GRPO(2, beta=0.0)):
        batch = loss.prepared(r)
        weights = r.counted / (r.counted.sum(-1, keepdims=True) * len(r.counted)
                               if type(loss) is GRPO else r.counted.sum())
        found = float(loss(model, *batch, totals=loss.totals(*batch)).data)
        assert found == pytest.approx(-(batch[3] * weights).sum(), abs=1e-6)
    with_kl, without = GRPO(2, beta=100.0), GRPO(2, beta=0.0)
    assert float(with_kl(model, *batch, totals=(4,)).data) == pytest.approx(
        float(without(model, *batch, totals=(4,)).data), abs=1e-6)


@given(seed=seeds, gap=st.floats(-3, 3), target=st.floats(-3, 3))
def test_value_loss_takes_the_larger_error(seed, gap, target):
    old = np.random.default_rng(seed).standard_normal(1)
    V, G = old + gap, old + target
    found = float(value_loss(V, old, G).data)
    near = old + np.clip(gap, -0.2, 0.2)
    assert found == pytest.approx(max((V - G)[0] ** 2, (near - G)[0] ** 2) / 2)


@given(seed=seeds)
def test_the_kl_penalty_is_never_negative_and_its_mean_is_the_kl(seed):
    z, ref = np.random.default_rng(seed).standard_normal((2, V))
    log_p, log_q = (ops.log_softmax(x).data for x in (z, ref))
    each = np.array([kl_penalty(log_p[i : i + 1], log_q[i : i + 1]).data for i in range(V)])
    assert (each >= 0).all()
    assert (np.exp(log_p) * each).sum() == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum())


# Comparisons


@given(arrays(float, (2, 4), elements=numbers), numbers)
def test_the_ranking_loss_is_the_mean_over_pairs_and_knows_no_shift(rewards, c):
    pairs = [ranking_loss(rewards[:, [w, l]]).data for w, l in combinations(range(4), 2)]
    found = float(ranking_loss(rewards).data)
    assert found == pytest.approx(np.mean(pairs)) == pytest.approx(plain_ranking_loss(rewards))
    assert float(ranking_loss(rewards + c).data) == pytest.approx(found)
    x = Tensor(rewards, requires_grad=True)
    ranking_loss(x).backward()
    assert np.allclose(x.grad.sum(-1), 0, atol=1e-12)


def test_a_gap_that_exp_cannot_hold():
    x = Tensor(np.array([[-1e4, 1e4]]), requires_grad=True)
    loss = ranking_loss(x)
    loss.backward()
    assert float(loss.data) == 2e4 and x.grad.tolist() == [[-1, 1]]


@given(seed=seeds, beta=st.floats(0.01, 2))
def test_dpo_is_rafailovs_and_log_2_at_the_reference(seed, beta):
    rng, model, loss = np.random.default_rng(seed), model_of(), DPO(beta)
    ranked = ragged(rng)
    theirs = reference_sums(model, *ranked)
    found = float(loss(model, *ranked, theirs).data)
    pi = answer_sums(model, *ranked)
    assert found == pytest.approx(plain_dpo_loss(*pi.T, *theirs.T, beta), abs=1e-6)
    assert float(loss(model, *ranked, pi).data) == pytest.approx(math.log(2), abs=1e-6)
    assert np.abs(pi - theirs).max() > 1e-3  # the adapter did rest


def test_a_reward_is_of_the_last_real_token_and_is_shifted(seed=0):
    model, rng = reward_model(model_of(adapted=False)), np.random.default_rng(seed)
    ranked = ragged(rng, B=6)
    tokens, counted = ranked.texts()
    found = raw_rewards(model, tokens, counted)
    for row, here, reward in zip(tokens, counted, found):
        length = np.flatnonzero(here)[-1] + 2
        alone = model.head(model.hidden(row[None, :length])[:, -1]).data
        assert reward == pytest.approx(alone.item())
    shifted = Reward.of_reference(model, tokens, counted)(tokens, counted)
    assert shifted.mean() == pytest.approx(0, abs=1e-9) and shifted.std() == pytest.approx(1)
    assert Reward.of_reference(model, tokens[:1], counted[:1]).sd == 1  # one text has no variance
    with pytest.raises(ValueError, match="no reward model: its classes are"):
        raw_rewards(model_of(), tokens, counted)


FLOATS = {
    "log_prob": lambda x: log_prob(x, np.zeros(2, int)),
    "summed": lambda x: summed(x[0], np.ones((1, 3), bool)),
    "ranking_loss": ranking_loss,
    "policy_loss": lambda x: policy_loss(x, x, x),
    "value_loss": lambda x: value_loss(x, x, x),
    "kl_penalty": lambda x: kl_penalty(x, x),
}


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_that_would_be_rounded_are_refused(name):
    with pytest.raises(TypeError, match=f"{name} needs floating-point numbers, got .*int64"):
        FLOATS[name](np.zeros((2, 3), int))


def test_many_texts_are_looked_at_in_parts(monkeypatch):
    policy, rewarding = model_of(), reward_model(model_of(adapted=False))
    ranked = ragged(np.random.default_rng(0))
    sums, rewards = answer_sums(policy, *ranked), raw_rewards(rewarding, *ranked.texts())
    monkeypatch.setattr("minilm.align.dpo.ROWS", 3)
    monkeypatch.setattr("minilm.align.reward.ROWS", 3)
    close(answer_sums(policy, *ranked), sums, "float32")
    close(raw_rewards(rewarding, *ranked.texts()), rewards, "float64")


# All of them


@given(seed=seeds)
def test_the_gradient_is_the_losss_slope(seed):
    rng, step = np.random.default_rng(seed), 1e-6
    for loss, model, batch in losses(rng):
        params = model.parameters() + (loss.head.parameters() if type(loss) is PPO else [])
        totals = loss.totals(*batch)
        for p in params:
            p.grad = None
        loss(model, *batch, totals=totals).backward()
        v = [rng.standard_normal(p.shape) for p in params]
        slope = sum((p.grad * d).sum() for p, d in zip(params, v))

        def L(t):
            for p, d in zip(params, v):
                p.data += t * d
            value = float(loss(model, *batch, totals=totals).data)
            for p, d in zip(params, v):
                p.data -= t * d
            return value
        assert (L(step) - L(-step)) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-6)


@given(seed=seeds, more=st.integers(1, 3), cut=st.integers(1, 3))
def test_padding_and_parts_change_nothing(seed, more, cut):
    rng = np.random.default_rng(seed)
    for loss, model, batch in losses(rng):
        totals = loss.totals(*batch)
        whole = float(loss(model, *batch, totals=totals).data)
        parts = [[a[:cut] for a in batch], [a[cut:] for a in batch]]
        assert sum(float(loss(model, *part, totals=totals).data) for part in parts
                   ) == pytest.approx(whole, abs=1e-9)
        def longer(a): return np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
        own = len(batch) - 2 * (type(loss) is PPO)  # the last two are old text
        padded = [longer(a) if a.ndim == batch[1].ndim else a for a in batch[:own]] + batch[own:]
        assert float(loss(model, *padded, totals=totals).data) == pytest.approx(whole, abs=1e-9)


def test_what_is_said_of_tokens_is_of_the_answers():
    model, rng = model_of(), np.random.default_rng(0)
    tokens, counted = ragged(rng).texts()
    log_probs = answer_log_probs(model, tokens, counted)
    logits = model(tokens[:, :-1]).data
    close(log_probs.data, plain_log_prob(logits[counted], tokens[:, 1:][counted]), "float64")
    chosen, entropy, values = looked_at(model, tokens, counted, value_head(8).astype(np.float64))
    close(chosen[counted], log_probs.data, "float32")
    p = ops.softmax(logits[counted]).data
    close(entropy[counted], -(p * np.log(p)).sum(-1), "float32")
    assert not any(x[~counted].any() for x in (chosen, entropy, values)) and values.any()
    close(summed(log_probs, counted).data, [row.sum() for row in chosen], "float32")
    assert (real(counted).sum(-1) == [np.flatnonzero(row)[-1] + 2 for row in counted]).all()


def test_means_over_rollouts():
    r = Rollouts.empty(2, 4)
    r.counted[0, 1:3] = r.counted[1, 1] = True
    r.log_probs[r.counted], r.reference[r.counted] = [-1, -2, -3], [-2, -4, -3.5]
    r.entropy[r.counted], r.scores[...] = 1, [1, 4]
    assert r.told() == {"reward": 2.5, "kl": 1.75, "length": 1.5, "entropy": 1.0}


@pytest.mark.parametrize("call, said", [
    (lambda: DPO(0.0), "beta must be positive"), (lambda: GRPO(1), "group must be at least 2"),
    (lambda: PPO(None, lam=1.5), "lam must be from 0 to 1"),
    (lambda: Reward(None, math.inf), "mean must be finite"),
    (lambda: Reward(None, sd=0.0), "sd must be positive"),
    (lambda: draw_answers(None, [], 1, None), "there must be prompts"),
    (lambda: draw_answers(None, [[1], []], 1, None), "there must be prompts, each of one token"),
    (lambda: draw_answers(None, [[1]], 0, None), "most must be at least 1"),
    (lambda: ranking_loss(np.zeros((2, 1))), r"must be \(B, K >= 2\), got \(2, 1\)"),
    (lambda: laid_out([[1]], [[[2], []]]), "is empty"),
    (lambda: laid_out([[1], [1]], [[[2], [3]], [[2]]]), r"there are \[1, 2\]"),
    (lambda: summed(np.zeros(2), np.ones((1, 3), bool)), "does not go with 3"),
    (lambda: policy_loss(np.zeros(2), np.zeros(3), np.zeros(2)), "needs one shape"),
    (lambda: policy_loss(np.zeros(3), np.zeros(2), np.zeros(2)), "needs one shape")])
def test_bad_settings_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
