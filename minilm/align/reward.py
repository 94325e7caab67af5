"""A reward model: a scalar of a prompt and an answer, learned from which answers people prefer.

Christiano et al. 2017, arXiv:1706.03741; Ziegler et al. 2019, arXiv:1909.08593; Ouyang et al. 2022,
arXiv:2203.02155, section 3.5, after Bradley & Terry 1952:

    P(y_w > y_l | x) = exp r(x, y_w) / (exp r(x, y_w) + exp r(x, y_l))       (Christiano 1)
    L = -1 / (K choose 2) sum of pairs' log sigma(r(x, y_w) - r(x, y_l))     (Ouyang 1)

    symbol       name
    x            prompt
    y_w, y_l     of two answers the preferred one and the other
    r            the reward: one class of the text's last token
    K            answers of a prompt, all in one batch, where each is run once for all its pairs

The loss is the same for r + c, so people choose c: the mean reward of the reference's answers is 0
(Ouyang), and their variance 1 (Ziegler, section 2.2). Left out: labels that call two answers equal.

Shapes: B prompts, K answers, T tokens.
"""

import numpy as np

from minilm.align.likelihood import real
from minilm.arrays import floating, wide
from minilm.backend import array_module, to_device
from minilm.graph import no_dropout
from minilm.ranges import FINITE, POSITIVE, check
from minilm.tensor import Tensor, no_grad, op
from minilm.transformer import Transformer, with_classes

ROWS = 64  # that are scored together


def plain_ranking_loss(rewards):  # (B, K) -> ()
    """Ouyang's eq. (1): the formula of `ranking_loss`."""
    losses = [np.log1p(np.exp(row[worse] - row[w])) for row in rewards
              for w in range(len(row)) for worse in range(w + 1, len(row))]
    return np.mean(losses)


@op
def ranking_loss(rewards, total=None):
    """Ouyang's eq. (1) of rewards (B, K), the best answer first: (), at least float32.

    It is a sum over the prompts divided by `total`, by default B. ValueError if K is below 2.

    >>> float(ranking_loss(np.zeros((1, 3))).data.round(4))  # log 2
    0.6931
    """
    floating("ranking_loss", rewards=rewards)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"ranking_loss: rewards must be (B, K >= 2), got {rewards.shape}")
    xp, r, (B, K) = array_module(rewards), wide(rewards), rewards.shape
    share = xp.triu(xp.ones((K, K), r.dtype), 1) / (K * (K - 1) / 2 * (total or B))
    gap = r[:, :, None] - r[:, None, :]  # r_w - r_l at (w, l), which counts if w < l

    def drewards(dy):
        s = share * (0.5 - 0.5 * xp.tanh(gap / 2))  # sigma(-gap), without overflow
        return (s.sum(1) - s.sum(2)) * dy
    return (share * xp.logaddexp(0, -gap)).sum(), drewards


class RankingLoss:
    """The loss of a reward model, for Trainer. A batch is tokens (B, K, T), the best answer first,
    and counted (B, K, T - 1), see likelihood.py."""

    def totals(self, tokens, counted) -> tuple[int]:
        """The prompts."""
        return (len(tokens),)

    def __call__(self, model, tokens, counted, totals=(None,)) -> Tensor:
        B, K, T = tokens.shape
        texts = tokens.reshape(B * K, T)
        rewards = model(texts, real(counted.reshape(B * K, T - 1)))
        return ranking_loss(rewards.reshape(B, K), total=totals[0])


def reward_model(model: Transformer, seed: int = 0) -> Transformer:
    """A reward model that begins with the body of this language model, and a new head."""
    return with_classes(model, ("reward",), seed)


def raw_rewards(model, tokens, counted) -> np.ndarray:  # (B, T), (B, T - 1) -> (B,)
    """r of each text, as the reward model gives it."""
    if model.config.labels != ("reward",):
        raise ValueError(f"the model is no reward model: its classes are {model.config.labels}")
    found, mask = [], real(counted)
    for i in range(0, len(tokens), ROWS):
        with no_grad(), no_dropout():
            found.append(model(tokens[i : i + ROWS], mask[i : i + ROWS]).data[:, 0])
    return np.concatenate([to_device(wide(r), "cpu") for r in found])


class Reward:
    """(r - mean) / sd: what PPO maximises. Called with tokens (B, T), counted (B, T - 1): (B,).

    ValueError unless mean is finite and sd positive.
    """

    def __init__(self, model: Transformer, mean: float = 0.0, sd: float = 1.0):
        check({"mean": FINITE, "sd": POSITIVE}, mean=mean, sd=sd)
        self.model, self.mean, self.sd = model, mean, sd

    @classmethod
    def of_reference(cls, model: Transformer, tokens, counted):
        """The one whose mean is 0 and variance 1 on these answers, which the reference has drawn.
        """
        raw = raw_rewards(model, tokens, counted).astype(np.float64)
        return cls(model, float(raw.mean()), float(raw.std()) or 1.0)

    def __call__(self, tokens, counted) -> np.ndarray:
        return (raw_rewards(self.model, tokens, counted) - self.mean) / self.sd
