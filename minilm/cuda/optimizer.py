"""Launcher of AdamW's step."""

import math

from minilm.cuda.raw import kernel


def adamw(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay, scale=1.0):
    """minilm.optim.adamw on float32 arrays with gradients g scale, in one pass, the same bits."""
    sizes = [a.size for a in (p, g, m, v)]
    if len(set(sizes)) > 1:
        raise ValueError(f"adamw: p, g, m and v must be of one size, got {sizes}")
    correction = math.sqrt(1 - beta2**t)
    if p.size:
        kernel("adamw.cu", "adamw")(
            (p.size // 1024 + 1,), (256,), p, g, m, v, p.size, scale, 1 - beta1, 1 - beta2,
            1 - lr * weight_decay, eps * correction, lr * correction / (1 - beta1**t))
