"""The GPT-2 of contenders.py and its AdamW in JAX: a training step as one compiled function.

It starts from our weights, so that its losses are ours (tests/test_benchmark.py). It is written
for speed as torch_step of contenders.py is: one product for q, k and v, JAX's own attention, and
the old weights' memory for the new ones. Needs the extra `contenders`.
"""

import importlib.util

from contenders import our_config, timed

LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.95, 1e-8, 0.1


def why_not() -> str | None:
    """Why it cannot run here; None if it can."""
    from minilm.extras import install

    if importlib.util.find_spec("jax") is None:
        return f"JAX is not installed: {install('contenders')}"
    return None


def jax_step(shape, weights):
    """A function that makes a training step and returns its loss.

    weights: the state_dict of our GPT-2.
    """
    import jax
    import jax.numpy as jnp

    p = jax.tree.map(jnp.array, joined(shape, weights))
    m, v = (jax.tree.map(jnp.zeros_like, p) for _ in range(2))
    tokens, targets = map(jnp.asarray, shape.tokens())

    def step(p, m, v, t, tokens, targets):
        loss, g = jax.value_and_grad(loss_of)(p, shape, tokens, targets)
        m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, g)
        v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, v, g)
        return loss, t + 1, jax.tree.map(lambda *arrays: adamw(t + 1, *arrays), p, m, v), m, v

    step, t = jax.jit(step, donate_argnums=(0, 1, 2)), jnp.int32(0)

    def run():
        nonlocal p, m, v, t
        loss, t, p, m, v = step(p, m, v, t, tokens, targets)
        jax.block_until_ready(p)
        return float(loss)

    return run


def joined(shape, weights) -> dict:
    """Our weights by names without dots, q, k and v as one matrix."""
    import numpy as np

    def layer(path):
        return [weights[f"{path}.{kind}"] for kind in ("weight", "bias")]
    blocks = []
    for i in range(shape.layers):
        path = f"blocks.{i}"
        q, k, v = (layer(f"{path}.attention.{name}") for name in "qkv")
        qkv = [np.concatenate(parts) for parts in zip(q, k, v)]
        blocks.append({"norm1": layer(f"{path}.norm1"), "qkv": qkv,
                       "o": layer(f"{path}.attention.o"), "norm2": layer(f"{path}.norm2"),
                       "up": layer(f"{path}.mlp.up"), "down": layer(f"{path}.mlp.down")})
    return {"embed": weights["embed.weight"], "position": weights["position.weight"],
            "blocks": blocks, "norm": layer("norm")}


def loss_of(p, shape, tokens, targets):  # (B, T), (B, T) -> ()
    import jax
    import jax.numpy as jnp

    (B, T), H = tokens.shape, shape.heads
    def linear(layer, x): return x @ layer[0].T + layer[1]
    def norm(layer, x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * layer[0] + layer[1]
    x = p["embed"][tokens] + p["position"][:T]
    for block in p["blocks"]:
        qkv = linear(block["qkv"], norm(block["norm1"], x)).reshape(B, T, 3, H, -1)
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
        x = x + linear(block["o"], y.reshape(B, T, -1))
        up = jax.nn.gelu(linear(block["up"], norm(block["norm2"], x)), approximate=True)
        x = x + linear(block["down"], up)
    log_p = jax.nn.log_softmax(norm(p["norm"], x) @ p["embed"].T)
    return -jnp.take_along_axis(log_p, targets[..., None], -1).mean()


def adamw(t, p, m, v):
    """p after step t of AdamW, whose moments are m and v. Matrices alone have weight decay."""
    import jax.numpy as jnp

    p = p * (1 - LR * DECAY * (p.ndim > 1))
    return p - LR * m / (1 - BETA1**t) / (jnp.sqrt(v / (1 - BETA2**t)) + EPS)


def side(shape):
    """Seconds of a training step."""
    from minilm.transformer import Transformer

    yield from timed(jax_step(shape, Transformer(our_config(shape)).state_dict()))
