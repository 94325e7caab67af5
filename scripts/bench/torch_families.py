"""The three families in plain PyTorch, as functions of weights with minilm's names.

`compare_torch.py` and the tests compare minilm with them. Importing this file needs PyTorch.
"""

import numpy as np
from op_table import import_torch

from minilm.rope import rotary_tables

torch = import_torch()
F = torch.nn.functional


def forward(c, p, tokens, seen=None):
    """Logits (B, T, V) of tokens (B, T) for the Config c and {name: weight} p; seen: a mask."""
    x = F.embedding(tokens, p["embed.weight"])
    cos, sin = None, None
    if c.positions == "rotary":
        tables = rotary_tables(c, np.arange(tokens.shape[1]), x.detach().numpy().dtype)
        cos, sin = (torch.tensor(t).repeat(1, 2) for t in tables)
    else:
        x = x + p["position.weight"][: tokens.shape[1]]
    if c.segments:
        x = x + p["segment.weight"][0]
    if not c.norm_first:
        x = norm(c, p, "embed_norm", x)
    for i in range(c.layers):
        b = f"blocks.{i}"
        if c.norm_first:
            x = x + attention(c, p, b, norm(c, p, f"{b}.norm1", x), seen, cos, sin)
            x = x + mlp(c, p, b, norm(c, p, f"{b}.norm2", x))
        else:
            x = norm(c, p, f"{b}.norm1", x + attention(c, p, b, x, seen, cos, sin))
            x = norm(c, p, f"{b}.norm2", x + mlp(c, p, b, x))
    if c.head == "masked":
        x = norm(c, p, "head.norm", F.gelu(linear(p, "head.transform", x)))
        return F.linear(x, p["embed.weight"], p["head.out.bias"])
    return F.linear(norm(c, p, "norm", x), p["embed.weight" if c.tied else "head.weight"])


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def norm(c, p, name, x):
    gain = p[f"{name}.weight"]
    if c.norm == "rms":
        return F.rms_norm(x, gain.shape, gain, c.norm_eps)
    return F.layer_norm(x, gain.shape, gain, p[f"{name}.bias"], c.norm_eps)


def attention(c, p, block, x, seen, cos, sin):
    name = f"{block}.attention"
    q, k, v = (linear(p, f"{name}.{n}", x).unflatten(-1, (-1, c.width // c.heads)).transpose(1, 2)
               for n in "qkv")
    if c.positions == "rotary":
        q, k = (y * cos + torch.cat([-y2, y1], -1) * sin
                for y in (q, k) for y1, y2 in [y.chunk(2, -1)])
    y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=c.causal, enable_gqa=True)
    return linear(p, f"{name}.o", y.transpose(1, 2).flatten(2))


def mlp(c, p, block, x):
    up = linear(p, f"{block}.mlp.up", x)
    if c.activation == "swiglu":
        hidden = F.silu(linear(p, f"{block}.mlp.gate", x)) * up
    else:
        hidden = F.gelu(up, approximate="tanh" if c.activation == "gelu_tanh" else "none")
    return linear(p, f"{block}.mlp.down", hidden)
