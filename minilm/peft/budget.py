"""AdaLoRA's budget: how many singular values all matrices may have together, and which.

Zhang et al. 2023, arXiv:2303.10512, section 3.2 and 3.3, for a parameter w and its gradient:

    I(w) = |w dL/dw|                                                          (8)
    Ibar = beta1 Ibar + (1 - beta1) I                                         (9)
    Ubar = beta2 Ubar + (1 - beta2) |I - Ibar|                                (10)
    s(w) = Ibar Ubar                                                          (11)
    S_i = s(lam_i) + mean_j s(P_ji) + mean_j s(Q_ij)                          (7)

    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3              (12)

for t_i < t <= T - t_f; before that it is b_0, and after that b_T. Every `every` steps the b(t)
largest S of all matrices keep their lam, and all others get zero. After T - t_f they stay zero.

A training loop makes a Budget after its optimizer, and calls it after each step:

    budget = Budget(model, optimizer, last=4, steps=1000, warmup=100, final=200)
    for trainer, done in fit(..., loss=Orthogonal(LabelLoss())):
        if done.targets and not done.skipped:
            budget.step(done.step)

So w is taken after the update, as in PEFT; the paper takes it before. Equal S are ranked by their
places. Layers that share lam (GPT-2's q, k and v from PEFT's files) count as one matrix.
"""

import numpy as np

from minilm.backend import array_module, to_device
from minilm.nn import Module
from minilm.peft.adalora import AdaLoRA, acting
from minilm.ranges import BELOW_1, check, each, whole


class Budget:
    """Which singular values the acting AdaLoRA adapters keep.

    optimizer: AdamW or another over their tensors. last: how many are left in the end, of a matrix
    on average. steps, warmup, final: T, t_i and t_f. kept: for each matrix, in the order of layers,
    which of its r singular values were kept last. ValueError for settings out of range, if warmup
    and final leave no step between them, and if the optimizer does not hold the adapters.
    """

    RANGES = {"last": whole(1), "steps": whole(1), "warmup": whole(0), "final": whole(0),
              "every": whole(1), "betas": each(BELOW_1)}

    def __init__(self, model: Module, optimizer, last: int, steps: int, warmup: int = 0,
                 final: int = 0, every: int = 1, betas=(0.85, 0.85)):
        check(self.RANGES, last=last, steps=steps, warmup=warmup, final=final, every=every,
              betas=betas)
        if not hasattr(optimizer, "flat"):
            raise TypeError("optimizer must be AdamW, SGD or their like, got a "
                            f"{type(optimizer).__name__}")
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas}")
        self.steps, self.warmup, self.final, self.every = steps, warmup, final, every
        self.betas, self.matrices, self.flat = betas, matrices(acting(model)), optimizer.flat
        ranks = [len(parts[0].lam) for parts in self.matrices]
        self.first, self.last = sum(ranks), last * len(ranks)
        if self.last > self.first:
            raise ValueError(f"last must be at most the first rank, {self.first / len(ranks):g} on "
                             f"average, got {last}")
        if warmup >= steps - final:
            raise ValueError(f"warmup {warmup} and final {final} leave none of {steps} steps")
        held = {id(p) for p in self.flat.params}
        if not all(id(t) in held for parts in self.matrices for a in parts
                   for t in (a.P, a.lam, a.Q)):
            raise ValueError("the optimizer does not hold all adapters: make it after add_adalora, "
                             "over model.parameters()")
        self.kept = [np.ones(r, bool) for r in ranks]
        self.Ibar, self.Ubar = self.flat.zeros(), self.flat.zeros()

    def at(self, t: int) -> int:
        """b(t): how many singular values may be left after step t."""
        if t <= self.warmup:
            return self.first
        if t > self.steps - self.final:
            return self.last
        left = 1 - (t - self.warmup) / (self.steps - self.final - self.warmup)
        return int(self.last + (self.first - self.last) * left**3)  # eq. (12)

    def step(self, t: int) -> int:
        """Take in the gradients of step t, the first of which is 1; returns how many are kept.

        Call it after the optimizer's step, while its gradients are there.
        """
        end = self.steps - self.final
        if t < end:
            self._listen()
        if t == end or (self.warmup < t < end and t % self.every == 0):
            self._choose(self.at(t))
        elif t > end:  # the optimizer has moved them
            self._mask()
        return int(sum(kept.sum() for kept in self.kept))

    def _listen(self):
        flat, (beta1, beta2) = self.flat, self.betas
        I = abs(flat.data * flat.grad)  # eq. (8)
        self.Ibar *= beta1
        self.Ibar += (1 - beta1) * I  # eq. (9)
        self.Ubar *= beta2
        self.Ubar += (1 - beta2) * abs(I - self.Ibar)  # eq. (10)

    def scores(self) -> list[np.ndarray]:
        """S of each singular value: for each matrix (r,)."""
        s = self._by_tensor(self.Ibar * self.Ubar)  # eq. (11)
        found = []
        for parts in self.matrices:
            P = sum(s[id(a.P)].sum(0) for a in parts) / sum(len(a.P) for a in parts)
            S = s[id(parts[0].lam)][:, 0] + P + s[id(parts[0].Q)].mean(1)  # eq. (7)
            found.append(to_device(S, "cpu"))
        return found

    def _choose(self, count: int):
        S = np.concatenate(self.scores())
        kept = np.zeros(len(S), bool)
        kept[np.argsort(-S, kind="stable")[:count]] = True
        self.kept = np.split(kept, np.cumsum([len(k) for k in self.kept])[:-1])
        self._mask()

    def _mask(self):
        """Set lam to zero where it is not kept; its master too, if it has 16 bits."""
        masters = self._by_tensor(self.flat.data)
        for parts, kept in zip(self.matrices, self.kept):
            lam = parts[0].lam
            gone = array_module(lam.data).asarray(np.flatnonzero(~kept))
            lam.data[gone] = 0
            masters[id(lam)][gone] = 0

    def _by_tensor(self, flat) -> dict:
        return dict(zip(map(id, self.flat.params), self.flat.views(flat)))

    def states(self) -> dict:
        """What it remembers, by name: two flat arrays as the optimizer's, and what was kept."""
        return {"Ibar": self.Ibar, "Ubar": self.Ubar, "kept": np.concatenate(self.kept)}

    def put_back(self, states: dict):
        """Go on from what states() gave."""
        self.Ibar[...], self.Ubar[...] = states["Ibar"], states["Ubar"]
        self.kept = np.split(states["kept"], np.cumsum([len(k) for k in self.kept])[:-1])


def matrices(adapters: list[AdaLoRA]) -> list[list[AdaLoRA]]:
    """The adapters in groups that share lam: each group is one matrix."""
    groups = {}
    for a in adapters:
        groups.setdefault(id(a.lam), []).append(a)
    return [*groups.values()]
