"""Rounds of answers: what is asked, what a step learns from, and what the losses make of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import ops
from minilm.align import GRPO, PPO, Remembering, Rounds, value_head
from minilm.align.grpo import group_advantages
from minilm.align.ppo import gae, plain_policy_loss, token_rewards, value_loss, whitened
from minilm.peft import add_lora
from minilm.transformer import Config, Transformer

V, END, MOST = 11, 10, 4
PROMPTS = [[i, i] for i in range(8)]


def policy(seed=0, opinions=1.0):
    """A small Llama in float64, whose adapter has opinions of its own."""
    model = Transformer(Config.llama(V, 16, 1, 2, 8, hidden=12), seed).astype(np.float64)
    add_lora(model, r=2, alpha=4, targets="all-linear")
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.data += opinions * rng.standard_normal(p.shape)
    return model.eval()


def score(tokens, counted):
    """Something that differs from answer to answer."""
    return np.sin((tokens[:, 1:] * counted * np.arange(1, tokens.shape[1])).sum(-1))


def rounds_of(loss, seed=0, head=None, **more):
    return Rounds(policy(), PROMPTS, loss, score=score, batch=8, most=MOST, end=END, seed=seed,
                  head=head, **more)


@given(seed=st.integers(0, 99), parts=st.integers(1, 3), group=st.sampled_from([1, 2, 4]))
def test_each_epoch_learns_from_each_answer_once_in_another_order(seed, parts, group):
    rounds = rounds_of(GRPO(2), seed, epochs=3, parts=parts, group=group)
    epochs = [np.concatenate([rounds[e * parts + part][0] for part in range(parts)])
              for e in range(3)]
    drawn = rounds.drawn.tokens
    for rows in epochs:
        assert sorted(map(tuple, rows)) == sorted(map(tuple, drawn))
    asked = drawn[:, 0].reshape(-1, group)
    assert (asked == asked[:, :1]).all() and len({*asked[:, 0]}) == len(asked)  # none asked twice
    assert len({rows.tobytes() for rows in epochs}) > 1 or len({*map(tuple, drawn)}) < 8


def test_the_next_round_asks_others_and_draws_others():
    rounds = rounds_of(GRPO(2), group=4)  # 2 of 8 prompts
    rounds[0]
    first = rounds.drawn.tokens.copy()
    asked = {tuple({*first[:, 0]})}
    for number in range(1, 6):
        before = rounds.arrays
        batch = rounds[number * len(rounds)]
        assert rounds.arrays is not before and rounds.number[0] == number
        assert {*map(tuple, batch[0])} <= {*map(tuple, rounds.drawn.tokens)}
        asked.add(tuple({*rounds.drawn.tokens[:, 0]}))
    assert len(asked) > 2 and len(rounds) == 4
    same = Rounds(policy(), PROMPTS[:1], GRPO(2), score=score, batch=8, group=8, most=MOST, end=END,
                  seed=0)
    same[0]
    first = same.drawn.tokens.copy()
    same[4]
    assert (same.drawn.tokens != first).any()  # the same prompt, other answers


def test_a_round_that_was_put_back_is_not_drawn_again(monkeypatch):
    rounds, other = rounds_of(GRPO(2), group=2), rounds_of(GRPO(2), seed=1, group=2)
    other.seed = 0
    rounds[1], other[1]
    states = Remembering(rounds, rounds.model.parameters(), 1e-3).states()
    into = Remembering(other, other.model.parameters(), 1e-3)
    for name, array in into.states().items():
        array[...] = states[name]
    into.put_back(into.states() | {"m": into.m + 1})
    assert (into.m == states["m"] + 1).all()
    monkeypatch.setattr(Rounds, "draw", lambda *_: pytest.fail("drawn again"))
    for mine, theirs in zip(rounds[2], other[2], strict=True):
        assert np.array_equal(mine, theirs)


def test_old_text_is_of_the_step():
    text = [(np.full((4, 3), i), np.full((4, 3), -i)) for i in range(4)]
    head = value_head(8).astype(np.float64)
    rounds = rounds_of(PPO(head, ptx=0.5), head=head, text=text)
    for step in (0, 3):
        *_, asked, targets = rounds[step]
        assert (asked == step).all() and (targets == -step).all() and len(asked) == 4


@given(seed=st.integers(0, 99))
def test_what_the_losses_make_of_a_round(seed):
    head = value_head(8, seed)
    head.weight.data *= 500
    head = head.astype(np.float64)
    ppo, grpo = PPO(head, beta=0.3, gamma=0.8, lam=0.9), GRPO(2)
    rounds = rounds_of(ppo, seed, head=head, group=2)
    rounds[0]
    r = rounds.drawn
    tokens, counted, old, A, G, values = ppo.prepared(r)
    rewards = token_rewards(r.scores, r.log_probs, r.reference, r.counted, 0.3)
    plain = gae(rewards, r.values, r.counted, 0.8, 0.9)
    assert np.allclose(A, whitened(plain, r.counted), atol=1e-6) and np.ptp(r.values)
    assert np.allclose(G, plain + r.values, atol=1e-6)
    assert tokens is r.tokens and counted is r.counted and old is r.log_probs
    assert values is r.values
    _, _, old, A, reference = grpo.prepared(r)
    assert np.allclose(A, group_advantages(r.scores, 2)[:, None] * r.counted)
    assert old is r.log_probs and reference is r.reference


@given(seed=st.integers(0, 99))
def test_the_losses_are_the_sums_of_their_parts(seed):
    rng, head = np.random.default_rng(seed), value_head(8, seed).astype(np.float64)
    ppo, grpo = PPO(head, eps=0.1, value=0.7, ptx=0.3), GRPO(2, beta=0.5, eps=0.1)
    rounds = rounds_of(ppo, seed, head=head, group=2)
    rounds[0]
    model, c = rounds.model, rounds.drawn.counted
    x, y = model.hidden(rounds.drawn.tokens[:, :-1]), rounds.drawn.tokens[:, 1:]
    log_p = np.take_along_axis(ops.log_softmax(model.logits(x)).data, y[..., None], -1)[..., 0]
    old = log_p + 0.2 * c * rng.standard_normal(c.shape)
    A, G, before, ref = rng.standard_normal((4, *c.shape)) * c
    text = rng.integers(0, V, (2, 8, 3))
    text[1, :5] = -100
    found = ppo(model, rounds.drawn.tokens, c, old, A, G, before, *text,
                totals=ppo.totals(rounds.drawn.tokens, c, old, A, G, before, *text))
    V_now = head(x).data[..., 0][c]
    told = ops.cross_entropy(model(text[0]), text[1])
    assert float(found.data) == pytest.approx(
        plain_policy_loss(log_p[c], old[c], A[c], 0.1)
        + 0.7 * float(value_loss(V_now, before[c], G[c], eps=0.1).data)
        + 0.3 * float(told.data))
    found = grpo(model, rounds.drawn.tokens, c, old, A, ref, totals=(8,))
    gap = ref - log_p
    kl = [(np.exp(gap[i]) - gap[i] - 1)[c[i]].mean() for i in range(8)]
    gain = [plain_policy_loss(log_p[i][c[i]], old[i][c[i]], A[i][c[i]], 0.1) for i in range(8)]
    assert float(found.data) == pytest.approx(np.mean(gain) + 0.5 * np.mean(kl))


def test_an_untrained_critic_expects_nothing():
    model, head = policy(), value_head(8).astype(np.float64)
    x = model.hidden(np.arange(10)[None])
    assert np.abs(head(x).data).max() < 0.05 < np.abs(x.data).max() and head(x).data.any()


@pytest.mark.parametrize("more", [dict(batch=9, group=2), dict(batch=2, parts=3), dict(batch=9)])
def test_rounds_that_do_not_come_out_even_are_refused(more):
    with pytest.raises(ValueError, match=r"a round of \d answers must be whole groups of"):
        Rounds(None, PROMPTS, None, score=score, most=1, end=None, seed=0, **more)
