"""Learning-rate schedules: functions of the step."""

import math

from minilm.ranges import AT_LEAST_0, check, whole

RANGES = {"step": whole(0), "steps": whole(0), "lr": AT_LEAST_0, "min_lr": AT_LEAST_0,
          "warmup": whole(0)}


def cosine_schedule(step: int, steps: int, lr: float, min_lr: float = 0.0,
                    warmup: int = 0) -> float:
    """Linear warmup to lr over `warmup` steps, then half a cosine down to min_lr at `steps`.

    step counts from 0. ValueError for settings out of range, and if min_lr is above lr.
    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts.

    >>> [cosine_schedule(step, steps=7, lr=1.0, warmup=3) for step in (0, 1, 2, 3, 5, 7)]
    [0.25, 0.5, 0.75, 1.0, 0.5, 0.0]
    """
    check(RANGES, step=step, steps=steps, lr=lr, min_lr=min_lr, warmup=warmup)
    if min_lr > lr:
        raise ValueError(f"min_lr must be at most lr, {lr}; got {min_lr}")
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))  # eq. (5)
