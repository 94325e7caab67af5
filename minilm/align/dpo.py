"""DPO: a policy learns from comparisons themselves, without a reward model and without answers of
its own.

Rafailov et al. 2023, arXiv:2305.18290. The best policy for a reward r with the price beta of KL is

    pi(y | x) = pi_ref(y | x) exp(r(x, y) / beta) / Z(x)                            (4)

so the reward that a policy is the best for is, up to a function of x,

    r(x, y) = beta log(pi(y | x) / pi_ref(y | x))                                   (5)

and the loss of comparisons (reward.py) becomes one of the policy:

    L = -log sigma(beta log(pi(y_w)/pi_ref(y_w)) - beta log(pi(y_l)/pi_ref(y_l)))   (7)

    symbol       name
    x, y_w, y_l  prompt, preferred answer, the other
    pi, pi_ref   policy, reference
    log pi(y)    the sum over the answer's tokens alone

With K answers the loss is the mean over their pairs. At pi = pi_ref it is log 2. pi_ref does not
change, so its log-probabilities are computed once, before the training.

Shapes: B prompts, K answers, T tokens, N counted tokens.
"""

import numpy as np

from minilm.align.likelihood import answer_log_probs, looked_at, summed
from minilm.align.reward import ranking_loss
from minilm.align.rollouts import reference_of
from minilm.ranges import POSITIVE, check
from minilm.tensor import Tensor

ROWS = 64  # answers that are looked at together


def plain_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):  # (B,) each -> ()
    """Eq. (7) of sums of log-probabilities."""
    gap = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
    return np.log1p(np.exp(-gap)).mean()


class DPO:
    """The loss, for Trainer. A batch is tokens (B, K, T), the best answer first, counted
    (B, K, T - 1), and log pi_ref (B, K), see reference_sums. ValueError for a beta that is not
    positive."""

    def __init__(self, beta: float = 0.1):
        check({"beta": POSITIVE}, beta=beta)
        self.beta = beta

    def totals(self, tokens, counted, reference) -> tuple[int]:
        """The prompts."""
        return (len(tokens),)

    def rewards(self, model, tokens, counted, reference) -> Tensor:
        """Eq. (5): (B, K)."""
        B, K, T = tokens.shape
        tokens, counted = tokens.reshape(B * K, T), counted.reshape(B * K, T - 1)
        log_pi = summed(answer_log_probs(model, tokens, counted), counted).reshape(B, K)
        return (log_pi - Tensor(reference.astype(log_pi.dtype))) * self.beta

    def __call__(self, model, *batch, totals=(None,)) -> Tensor:
        return ranking_loss(self.rewards(model, *batch), total=totals[0])  # eq. (7)


def answer_sums(model, tokens, counted) -> np.ndarray:  # (B, K, T), (B, K, T - 1) -> (B, K)
    """log pi(y | x) of each answer, without a graph and without dropout."""
    shape, T = tokens.shape[:2], tokens.shape[2]
    tokens, counted = tokens.reshape(-1, T), counted.reshape(-1, T - 1)
    sums = [looked_at(model, tokens[i : i + ROWS], counted[i : i + ROWS])[0].sum(-1)
            for i in range(0, len(tokens), ROWS)]
    return np.concatenate(sums).reshape(shape)


def reference_sums(model, tokens, counted, frozen=None) -> np.ndarray:
    """answer_sums of pi_ref: the model with its adapters at rest, or `frozen`."""
    with reference_of(model, frozen) as reference:
        return answer_sums(reference, tokens, counted)
