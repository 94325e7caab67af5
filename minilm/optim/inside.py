"""AdamW inside a subspace: all weights move, but only d numbers are trained.

Li et al. 2018, arXiv:1804.08838, section 2; peft/subspace.py has P. After the backward pass

    g^d = P^T g^D,    theta^d = AdamW(theta^d, g^d),    theta^D = theta^D_0 + P theta^d

The engine knows nothing of it: theta^D and g^D are flat buffers, as in full training.
"""

from minilm.backend import array_module
from minilm.optim.adamw import AdamW, adamw


class Inside(AdamW):
    """AdamW on the theta^d of a Subspace, from the gradients of the tensors that it moves.

    params: these tensors, and nothing else. Weight decay would be that of theta^d, so there is
    none. A trainer clips the gradient of theta^D. Checkpoints hold theta^d beside its m and v, so a
    run goes on bit for bit. ValueError for other params, for tensors on another device than P, and
    as AdamW says.
    """

    def __init__(self, subspace, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8):
        self.subspace, params = subspace, list(params)
        if {id(p) for p in params} != {id(t) for t in subspace.moved}:
            raise ValueError("params must be the tensors that the subspace moves: beside them "
                             "nothing else is trained")
        if array_module(params[0].data) is not array_module(subspace.theta):
            raise ValueError("the model is on another device than its subspace: move the model "
                             "before add_subspace")
        super().__init__(params, lr, betas, eps, weight_decay=0.0)
        masters = dict(zip(map(id, self.flat.params), self.flat.views(self.flat.data)))
        self.masters = [masters[id(t)] for t in subspace.moved]

    def _make_states(self):
        self.m, self.v = (self.subspace.theta * 0 for _ in "mv")

    def step(self, scale: float = 1.0, everywhere=None):
        """An update of theta^d, which is too small to be shared among workers."""
        super().step(scale)

    def update(self, part: slice, t: int, lr: float, scale: float = 1.0):
        """Step t, with gradients multiplied by scale. `part` is everything."""
        adamw(self.subspace.theta, self.subspace.gradient(), self.m, self.v, t, lr, *self.betas,
              self.eps, 0.0, scale)
        self.subspace.place(self.masters)
        self.flat.round(part)

    def states(self) -> dict:
        """Those of AdamW, and theta^d."""
        return super().states() | {"theta": self.subspace.theta}

    def put_back(self, states: dict):
        """Go on from what states() gave."""
        super().put_back(states)
        self.subspace.theta[...] = states["theta"]
