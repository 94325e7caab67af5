"""The ops of minilm/align and minilm/parallel beside PyTorch's: rows of `op_table.py`'s table."""

import numpy as np
from op_table import Row, import_torch, normal

from minilm.align.grpo import kl_penalty
from minilm.align.likelihood import log_prob, summed
from minilm.align.ppo import policy_loss, value_loss
from minilm.align.reward import ranking_loss
from minilm.parallel.units import watched


def preference_rows(F) -> list[Row]:
    torch = import_torch()

    def drawn(r, B, T, C): return [normal(r, B, T, C)], [r.integers(0, C, (B, T))]
    def answers(r, B, T, C):
        counted = r.random((B, T)) < 0.7
        counted[-1, -1] = True
        return [normal(r, counted.sum())], [counted]
    def sums(x, counted): return torch.stack([a.sum() for a in x.split(counted.sum(-1).tolist())])

    def steps(r, B, T, C): return [normal(r, B * T) / 2], [normal(r, B * T) / 2, normal(r, B * T)]
    def clipped(log_p, old, A):
        rho = (log_p - old).exp()
        return -torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A).mean()
    def values(V, old, G):
        near = old + (V - old).clamp(-0.2, 0.2)
        near = near.detach() + (V - V.detach()) * ((V - old).abs() < 0.2)
        return torch.maximum((V - G) ** 2, (near - G) ** 2).mean() / 2
    def ranks(r, B, T, C): return [normal(r, B, T + 1)], []
    def pairs(r):
        K = r.shape[1]
        gaps = [r[:, w] - r[:, l] for w in range(K) for l in range(w + 1, K)]
        return -F.logsigmoid(torch.stack(gaps)).mean()
    def reference(r, B, T, C): return steps(r, B, T, C)[0], [normal(r, B * T) / 2]
    def k3(log_p, ref): return ((ref - log_p).exp() - (ref - log_p) - 1).mean()

    return [
        Row("log_prob", log_prob,
            lambda z, t: F.log_softmax(z, -1).gather(-1, t[..., None])[..., 0], drawn),
        Row("summed", summed, sums, answers),
        Row("policy_loss", policy_loss, clipped, steps),
        Row("policy_loss weighted",
            lambda x, old, A, w: policy_loss(x, old, A, weights=np.abs(w), total=len(w)),
            lambda x, old, A, w: -(w.abs() * torch.minimum(
                (x - old).exp() * A, (x - old).exp().clamp(0.8, 1.2) * A)).mean(),
            lambda r, *sizes: (steps(r, *sizes)[0], steps(r, *sizes)[1] + steps(r, *sizes)[0])),
        Row("value_loss", value_loss, values, steps),
        Row("ranking_loss", ranking_loss, pairs, ranks),
        Row("kl_penalty", kl_penalty, k3, reference),
        Row("watched", lambda x: watched(x, before=int), lambda x: x.clone(),
            lambda r, B, T, C: ([normal(r, B, T, C)], [])),
    ]
