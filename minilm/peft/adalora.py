"""AdaLoRA: updates in the form of singular values, whose number follows what each matrix needs.

Zhang et al. 2023, arXiv:2303.10512, for W0 (O, I), P (O, r), Lambda a diagonal of r, Q (r, I):

    W = W0 + s P Lambda Q                                                     (3)
    R(P, Q) = ||P^T P - I||_F^2 + ||Q Q^T - I||_F^2                           (4)

P and Q are drawn from N(0, 0.02^2) and Lambda starts as zeros, so training starts from the model as
it is. R is added to the loss, so that P and Q become orthogonal. (PEFT adds the mean of the norms,
not the sum of their squares.) budget.py has the rest: which singular values are kept. One that is
set to zero may grow again, since its row of Q and its column of P stay.

    P, Q, lam    P, Q and Lambda as a column (r, 1); in PEFT lora_B, lora_A and lora_E
    s            alpha / (r + 1e-5), as PEFT and the paper's program have it, for the first r
"""

import numpy as np

from minilm.backend import array_module
from minilm.blas import matmul as product
from minilm.nn import Dropout, Linear, Module
from minilm.peft.adapted import Adapter, adapted_layers, chosen, insert_adapters, placed
from minilm.peft.lora import check_rank, low_rank_beside
from minilm.ranges import AT_LEAST_0, BELOW_1, POSITIVE, check
from minilm.tensor import Tensor


class AdaLoRA(Adapter):
    """One layer's P (O, r), lam (r, 1) and Q (r, I). ranknum: the r in s, if it is another."""

    tokenwise = True

    def __init__(self, P, lam, Q, alpha: float, dropout: float = 0.0, ranknum: int | None = None):
        if Q.ndim != 2 or P.ndim != 2 or lam.shape != (len(Q), 1) or P.shape[1] != len(Q):
            raise ValueError(f"P must be (O, r), lam (r, 1) and Q (r, I), got {P.shape}, "
                             f"{lam.shape} and {Q.shape}")
        check({"alpha": POSITIVE, "dropout": BELOW_1}, alpha=alpha, dropout=dropout)
        self.P, self.lam, self.Q = (Tensor(a, requires_grad=True) for a in (P, lam, Q))
        self.r, self.alpha, self.ranknum = len(Q), float(alpha), ranknum or len(Q)
        self.scale, self.drop = alpha / (self.ranknum + 1e-5), Dropout(float(dropout))
        self.shape = len(P), Q.shape[1]

    def forward(self, x, base):
        return low_rank_beside(base, x, self.Q * self.lam, self.P, self.scale, self.drop)  # eq. (3)

    def merged(self, base):
        plain, update = base.plain(), self.update()
        return Linear.of(Tensor((plain.weight.data + update).astype(update.dtype)), plain.bias)

    def update(self):
        """s P Lambda Q: (O, I)."""
        return product(self.P.data, self.lam.data * self.Q.data) * self.P.dtype.type(self.scale)


def add_adalora(model: Module, r: int, alpha: float, targets="all-linear", dropout: float = 0.0,
                name: str = "default", seed: int = 0) -> Module:
    """Freeze the model, and put an adapter of rank r on each target; returns the model.

    r: the first rank, which a Budget lowers; the paper takes 1.5 times the last. alpha: positive,
    see s above. The other settings are those of add_lora, and so are the errors.

    >>> from minilm.transformer import Config, Transformer
    >>> model = Transformer(Config.gpt2(vocab_size=50, context=16, layers=2, heads=2, width=8))
    >>> model = add_adalora(model, r=3, alpha=3, targets="q")
    >>> sum(p.size for p in model.parameters())  # 2 blocks x r (I + 1 + O)
    102
    """
    bases, rng, adapters = chosen(model, targets), np.random.default_rng(seed), {}
    check_rank(bases, r)
    for path, base in bases.items():
        O, I = base.weight.shape
        P, Q = (0.02 * rng.standard_normal(s, dtype=np.float32) for s in ((O, r), (r, I)))
        adapters[path] = AdaLoRA(*(placed(model, a) for a in (P, np.zeros((r, 1)), Q)), alpha,
                                 dropout)
    return insert_adapters(model, name, adapters)


def acting(model: Module) -> list[AdaLoRA]:
    """The adapters that act beside their layers. ValueError if there is none."""
    found = [m.adapters[m.active] for m in adapted_layers(model).values()
             if m.active in m.adapters and not m.merged]
    found = [a for a in found if type(a) is AdaLoRA]
    if not found:
        raise ValueError("no AdaLoRA adapter acts on this model: add_adalora puts them on, and "
                         "unmerge_lora takes merged ones out")
    return found


def orthogonality(model: Module) -> Tensor:
    """The sum of R(P, Q) over all acting adapters: a scalar, for the loss."""
    total = 0.0
    for a in acting(model):
        total = total + _distance(a.P.transpose() @ a.P) + _distance(a.Q @ a.Q.transpose())
    return total


def _distance(G: Tensor):
    """||G - I||_F^2."""
    D = G - array_module(G.data).eye(len(G), dtype=G.dtype)
    return (D * D).sum()  # eq. (4)


class Orthogonal:
    """A loss plus gamma times `orthogonality`, for Trainer and fit: eq. (5) of the paper."""

    def __init__(self, loss, gamma: float = 0.1):
        check({"gamma": AT_LEAST_0}, gamma=gamma)
        self.loss, self.gamma = loss, gamma

    def totals(self, *batch) -> tuple:
        """What the loss counts."""
        return self.loss.totals(*batch)

    def __call__(self, model, *rows, totals) -> Tensor:
        share = self.loss.totals(*rows)[-1] / totals[-1]  # of the batch, so that the parts add up
        return self.loss(model, *rows, totals=totals) + orthogonality(model) * (self.gamma * share)
