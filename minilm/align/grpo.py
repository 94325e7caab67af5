"""GRPO: PPO without a value head. What an answer is expected to be worth is its group's mean.

Shao et al. 2024, arXiv:2402.03300 (DeepSeekMath), section 4.1:

    J = 1/G sum_i 1/|o_i| sum_t (min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL_t)   (3)
    KL_t = pi_ref(o_t) / pi(o_t) - log(pi_ref(o_t) / pi(o_t)) - 1                         (4)
    A_{i,t} = (r_i - mean(r)) / sd(r), for each token of o_i

    symbol       name
    o_i          the answers of a group, G to one prompt; |o_i| the tokens of one
    r_i          its score
    rho          pi(o_t) / pi_old(o_t), as in ppo.py
    beta         price of KL, which is in the loss, not in the reward

KL_t is never negative, and its mean over answers of pi is the KL. Left out: rewards of single steps
of reasoning (4.1.3), and a reward model that is trained again (4.1.4).

Shapes: B answers, T tokens, N counted tokens.
"""

import numpy as np

from minilm.align.likelihood import answer_log_probs
from minilm.align.ppo import policy_loss, shares
from minilm.arrays import floating, one_shape, wide
from minilm.backend import array_module
from minilm.ranges import AT_LEAST_0, POSITIVE, check, whole
from minilm.tensor import op


def group_advantages(scores, group: int):  # (B,) -> (B,)
    """A of answers, `group` to each prompt one after another; 0 if all of a group score the same.

    >>> group_advantages(np.array([1.0, 3.0, 5.0, 5.0]), group=2).round(3).tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    r = np.asarray(scores, np.float64).reshape(-1, group)
    sd = r.std(-1, keepdims=True)
    return ((r - r.mean(-1, keepdims=True)) / (sd + 1e-8)).reshape(-1)


@op
def kl_penalty(log_probs, reference, weights=None, total=None):
    """Eq. (4), a sum over tokens (N,) divided by `total`, by default N: (), at least float32.

    reference (N,): a constant. weights (N,): of the tokens, by default 1.
    """
    floating("kl_penalty", log_probs=log_probs)
    one_shape("kl_penalty", log_probs=log_probs, reference=reference)
    xp, x = array_module(log_probs), wide(log_probs)
    gap, w = xp.asarray(reference, x.dtype) - x, shares(x, weights, total)
    def dlog_probs(dy): return -xp.expm1(gap) * (dy * w)
    return ((xp.expm1(gap) - gap) * w).sum(), dlog_probs


class GRPO:
    """The loss of a minibatch, for Trainer; `prepared` makes its arrays from a round's Rollouts.

    ValueError for settings out of range; a group has two answers at least.
    """

    RANGES = {"group": whole(2), "beta": AT_LEAST_0, "eps": POSITIVE}

    def __init__(self, group: int, beta: float = 0.04, eps: float = 0.2):
        check(self.RANGES, group=group, beta=beta, eps=eps)
        self.group, self.beta, self.eps = group, beta, eps

    def prepared(self, r) -> tuple:
        """tokens (B, T), and (B, T - 1) each: counted, log pi_old, A, log pi_ref."""
        A = group_advantages(r.scores, self.group)[:, None] * r.counted
        return r.tokens, r.counted, r.log_probs, A.astype(np.float32), r.reference

    def totals(self, tokens, *rest) -> tuple[int]:
        """The answers."""
        return (len(tokens),)

    def __call__(self, model, tokens, counted, old, advantages, reference, totals):
        log_probs = answer_log_probs(model, tokens, counted)
        weights, n = (counted / counted.sum(-1, keepdims=True))[counted], totals[0]  # 1 / |o_i|
        loss = policy_loss(log_probs, old[counted], advantages[counted], eps=self.eps,
                           weights=weights, total=n)
        if self.beta:
            loss = loss + self.beta * kl_penalty(log_probs, reference[counted], weights=weights,
                                                 total=n)  # eq. (3)
        return loss
