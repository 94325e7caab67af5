"""PPO: a policy goes where answers are worth more than expected, and stays near the reference.

Schulman et al. 2016, arXiv:1506.02438 (GAE); Schulman et al. 2017, arXiv:1707.06347 (PPO); of
language models: Ziegler et al. 2019, arXiv:1909.08593, and Ouyang et al. 2022, arXiv:2203.02155:

    R(x, y) = r(x, y) - beta log pi(y | x) / pi_ref(y | x)              (Ziegler 2)
    r_t = -beta (log pi(y_t) - log pi_ref(y_t)), and + r(x, y) at the answer's last token
    delta_t = r_t + gamma V_{t+1} - V_t                                 (2017, 12)
    A_t = delta_t + gamma lambda A_{t+1}                                (2017, 11; 2016, 16)
    L_clip = mean of -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) (2017, 7)
    L_V = mean of max((V_t - G_t)^2, (clip(V_t, V_old - eps, V_old + eps) - G_t)^2) / 2
    L = L_clip + c L_V + gamma_ptx L_text                               (2017, 9; Ouyang 2)

    symbol        name
    pi, pi_ref    policy, reference          r(x, y)     the answer's score
    rho_t         pi(y_t) / pi_old(y_t), of the policy that drew the answer, `old`
    V_t           the value head, on the hidden state that y_t is predicted from
    A_t           advantages, whitened over all answers of a round: mean 0, variance 1
    G_t           returns, A_t + V_old before whitening
    L_text        the loss of pretraining, on old text: PPO-ptx; c, gamma_ptx: value, ptx

A token's state ends with the answer, so V after the last token is 0. The papers have no equation of
the clipped L_V and of whitening; their code does it. Left out: a bonus for entropy, and a beta that
adapts itself.

Shapes: B answers, T tokens, N counted tokens, C width.
"""

import numpy as np

from minilm import ops
from minilm.align.likelihood import log_prob, states
from minilm.arrays import floating, one_shape, wide
from minilm.backend import array_module
from minilm.nn import Linear
from minilm.ranges import AT_LEAST_0, POSITIVE, Range, check
from minilm.tensor import op

SHARE = Range("from 0 to 1", lambda x: 0 <= x <= 1)


def token_rewards(scores, log_probs, reference, counted, beta: float):  # (B,) ... -> (B, T - 1)
    """r_t: the penalty of each counted token, and the score at the last one of each row."""
    rewards = np.where(counted, -beta * (log_probs - reference), 0.0)
    last = counted.shape[1] - 1 - counted[:, ::-1].argmax(-1)
    rewards[np.arange(len(scores)), last] += scores  # Ziegler, eq. (2)
    return rewards


def gae(rewards, values, counted, gamma: float, lam: float):  # (B, T - 1) each
    """Advantages A_t of the counted tokens, which lie next to each other in each row; 0 elsewhere.

    >>> gae(np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]]), np.array([[True, True]]), 1.0, 1.0)
    array([[0.5, 0.5]])
    """
    advantages, after = np.zeros(rewards.shape), np.zeros(len(rewards))
    value_after = np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * value_after - values[:, t]  # eq. (12)
        after = np.where(counted[:, t], delta + gamma * lam * after, 0.0)  # eq. (11)
        value_after = np.where(counted[:, t], values[:, t], 0.0)
        advantages[:, t] = after
    return advantages


def whitened(x, counted):  # (B, T - 1) twice
    """x with mean 0 and variance 1 over what is counted; 0 elsewhere."""
    some = x[counted]
    return np.where(counted, (x - some.mean()) / (some.std() + 1e-8), 0.0)


def plain_policy_loss(log_probs, old, advantages, eps=0.2):  # (N,) each -> ()
    """Eq. (7): the formula of `policy_loss`."""
    rho = np.exp(log_probs - old)
    return -np.minimum(rho * advantages, np.clip(rho, 1 - eps, 1 + eps) * advantages).mean()


@op
def policy_loss(log_probs, old, advantages, eps=0.2, weights=None, total=None):
    """Eq. (7), a sum over tokens (N,) divided by `total`, by default N: (), at least float32.

    old, advantages (N,): constants. weights (N,): of the tokens, by default 1. Where the smaller
    term is the clipped one, the gradient is 0.
    """
    floating("policy_loss", log_probs=log_probs)
    one_shape("policy_loss", log_probs=log_probs, old=old, advantages=advantages)
    xp, x = array_module(log_probs), wide(log_probs)
    A, w = xp.asarray(advantages, x.dtype), shares(x, weights, total)
    rho = xp.exp(x - xp.asarray(old, x.dtype))
    free, clipped = rho * A, xp.clip(rho, 1 - eps, 1 + eps) * A

    def dlog_probs(dy): return xp.where(free <= clipped, -A * rho, 0) * (dy * w)
    return -(xp.minimum(free, clipped) * w).sum(), dlog_probs  # eq. (7)


@op
def value_loss(values, old, returns, eps=0.2, total=None):
    """L_V, a sum over tokens (N,) divided by `total`, by default N: (), at least float32."""
    floating("value_loss", values=values)
    one_shape("value_loss", values=values, old=old, returns=returns)
    xp, V = array_module(values), wide(values)
    old, G, w = xp.asarray(old, V.dtype), xp.asarray(returns, V.dtype), shares(V, None, total)
    near = xp.clip(V, old - eps, old + eps)
    free, clipped = (V - G) ** 2, (near - G) ** 2

    def dvalues(dy): return xp.where(free >= clipped, V - G, 0) * (dy * w)  # near is a constant
    return 0.5 * (xp.maximum(free, clipped) * w).sum(), dvalues


def shares(x, weights=None, total=None):  # (N,) -> (N,)
    """What each token of x counts: its weight, by default 1, over the total, by default N."""
    xp = array_module(x)
    w = xp.ones_like(x) if weights is None else xp.asarray(weights, x.dtype)
    return w / (x.size if total is None else total)


def value_head(width: int, seed: int = 0) -> Linear:
    """V: a scalar of a hidden state, near 0 at first."""
    return Linear(width, 1, np.random.default_rng(seed), std=0.001)


class PPO:
    """The loss of a minibatch, for Trainer; `prepared` makes its arrays from a round's Rollouts.

    head: value_head(width). With ptx > 0 a batch ends with tokens and targets of old text, (B, S)
    each. ValueError for settings out of range.
    """

    RANGES = {"beta": AT_LEAST_0, "eps": POSITIVE, "gamma": SHARE, "lam": SHARE,
              "value": AT_LEAST_0, "ptx": AT_LEAST_0}

    def __init__(self, head, beta: float = 0.02, eps: float = 0.2, gamma: float = 1.0,
                 lam: float = 0.95, value: float = 0.1, ptx: float = 0.0):
        check(self.RANGES, beta=beta, eps=eps, gamma=gamma, lam=lam, value=value, ptx=ptx)
        self.head, self.beta, self.eps, self.gamma, self.lam = head, beta, eps, gamma, lam
        self.value, self.ptx = value, ptx

    def prepared(self, r) -> tuple:
        """tokens (B, T), and (B, T - 1) each: counted, log pi_old, A_t, G_t, V_old."""
        rewards = token_rewards(r.scores, r.log_probs, r.reference, r.counted, self.beta)
        advantages = gae(rewards, r.values, r.counted, self.gamma, self.lam)
        returns, white = advantages + r.values, whitened(advantages, r.counted)
        return (r.tokens, r.counted, r.log_probs, white.astype(np.float32),
                returns.astype(np.float32), r.values)

    def totals(self, tokens, counted, *rest) -> tuple[int, ...]:
        """The targets of old text, if there are some, and the tokens of answers."""
        text = [int((rest[-1] != -100).sum())] if self.ptx else []
        return *text, int(counted.sum())

    def __call__(self, model, tokens, counted, old, advantages, returns, values, *text, totals):
        x, n = states(model, tokens, counted), totals[-1]
        log_probs = log_prob(model.logits(x), tokens[:, 1:][counted])
        loss = policy_loss(log_probs, old[counted], advantages[counted], eps=self.eps, total=n)
        if self.value:
            V = self.head(x).reshape(-1)
            loss = loss + self.value * value_loss(V, values[counted], returns[counted],
                                                  eps=self.eps, total=n)
        if self.ptx:
            asked, targets = text
            loss = loss + self.ptx * ops.cross_entropy(model(asked), targets, total=totals[0])
        return loss
