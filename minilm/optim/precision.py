"""Training in 16 bits: what goes wrong with plain float16, and what cures it.

Micikevicius et al. 2017, arXiv:1710.03740, sections 3.1 to 3.3. Weights, activations and their
gradients are 16-bit numbers; float16 has 11 bits of precision and reaches from 6e-8 to 65504,
bfloat16 has 8 bits and float32's reach.

    failure                                       cure
    1 a weight update is imprecise: p + u is p    masters: the update rule changes float32 copies of
      where |u| < |p| / 4096 (bfloat16: / 512)    the weights, which are then rounded (flat.py)
    2 a small gradient underflows: it becomes 0   LossScaler: a loss times 2^16 has gradients times
                                                  2^16, which float16 holds; the update divides
    3 a large gradient overflows: it becomes inf  LossScaler: that step is skipped, the scale halved

Sums, norms, exponentials and losses are computed in float32 in any case (arrays.wide). Failures 2
and 3 do not happen in bfloat16: it needs masters and no scaler. Training programs always take the
cures; scripts/experiments/half_precision.py shows what happens without them.
"""

import numpy as np

from minilm.ranges import POSITIVE, Range, check, whole


class LossScaler:
    """Dynamic loss scaling, step for step that of PyTorch's GradScaler.

        (loss * scaler.scale).backward()
        for p in params:
            p.grad /= scaler.scale  # before clipping
        if scaler.update(math.isfinite(clip_grad_norm(params, math.inf))):
            clip_grad_norm(params, 1.0)
            optimizer.step()

    Trainer does this if it is given a scaler. The scale is multiplied by `backoff` after a gradient
    that is not finite, and by `growth` after `interval` good steps in a row. It is a float32
    number, as the loss is, and does not grow beyond float32's largest. ValueError for settings
    with which it could not grow, could not shrink, or would not be a number.

    >>> scaler = LossScaler(scale=1024.0, interval=2)
    >>> [(scaler.update(finite), scaler.scale) for finite in (True, True, False)]
    [(True, 1024.0), (True, 2048.0), (False, 1024.0)]
    """

    RANGES = {"scale": POSITIVE, "interval": whole(1),
              "growth": Range("finite and above 1", lambda x: 1 < x < np.inf),
              "backoff": Range("above 0 and below 1", lambda x: 0 < x < 1)}
    SMALLEST = 2.0**-24  # float16's smallest number; a smaller scale would help nothing

    def __init__(self, scale: float = 2.0**16, growth: float = 2.0, backoff: float = 0.5,
                 interval: int = 2000):
        check(self.RANGES, scale=scale, growth=growth, backoff=backoff, interval=interval)
        self.scale, self.growth, self.backoff, self.interval = scale, growth, backoff, interval
        self.good = self.skipped = 0  # steps since the scale last changed; steps not made

    def update(self, finite: bool) -> bool:
        """Set the scale of the next step. Returns `finite`: whether to make this step."""
        if not finite:
            self.scale, self.good = float(np.float32(self.scale * self.backoff)), 0
            self.skipped += 1
            return False
        self.good += 1
        if self.good == self.interval:
            self.good, grown = 0, self.scale * self.growth
            if grown <= float(np.finfo(np.float32).max):
                self.scale = float(np.float32(grown))
        return True

    @property
    def exhausted(self) -> bool:
        """Has the scale shrunk to nothing? Then no scale helps: the run itself overflows."""
        return self.scale < self.SMALLEST

    def state(self) -> dict:
        """What a resumed run must know; it can be stored as JSON."""
        return {"scale": self.scale, "good": self.good, "skipped": self.skipped}

    def restore(self, state: dict):
        """Go on from a `state()`."""
        self.scale, self.good, self.skipped = (state[key] for key in ("scale", "good", "skipped"))
