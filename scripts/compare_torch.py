"""Compare every op with PyTorch, then three families in training.

    python scripts/compare_torch.py

prints two Markdown tables of errors and ends with exit status 1 where one is above its tolerance.
The expected numbers are PyTorch's in float64, for float32 inputs too. The last column is the error
of PyTorch itself in float32: what can be asked of that dtype.
"""

import sys

import numpy as np
import tyro
from op_table import TOLERANCE, cast, error, import_torch, op_error, run_ours, run_torch, table

from minilm import ops
from minilm.optim import AdamW
from minilm.transformer import Config, Transformer, rotary_tables

torch = import_torch()
F = torch.nn.functional

DTYPES = ("float64", "float32")
SIZES = dict(vocab_size=61, context=24, layers=2, heads=4, width=32)
FAMILIES = {
    "GPT-2": Config.gpt2(**SIZES),
    "Llama, grouped queries": Config.llama(**SIZES, hidden=48, kv_heads=2),
    "BERT, padded": Config.bert(**SIZES, hidden=64),
}
# eps has the size of a gradient, so that its place in the formula shows, and so that AdamW does not
# make whole steps of gradients that are nothing but rounding, such as those of the keys' biases.
ADAMW = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.1)


def main(steps: int = 20):
    """Print both tables. steps: how many of AdamW."""
    print("Errors of the value, then of each gradient.\n")
    passed = print_table("op", (op_errors(row) for row in table()))
    print(f"\nErrors of the losses, the gradients and the weights over {steps} steps of AdamW.\n")
    families = (family_errors(name, config, steps) for name, config in FAMILIES.items())
    passed = print_table("family", families) and passed
    sys.exit(0 if passed else 1)


def print_table(subject, results):
    """Print (name, errors in float64, in float32, PyTorch's own) in lines; say if all are small."""
    limits = [f"{dtype}, at most {TOLERANCE[dtype]:.0e}" for dtype in DTYPES]
    lines, passed = [[subject, *limits, "PyTorch float32", ""]], True
    for name, *errors in results:
        ok = all(max(e) <= TOLERANCE[dtype] for e, dtype in zip(errors, DTYPES))
        numbers = [" ".join(f"{x:.0e}" if x else "0" for x in e) for e in errors]
        lines.append([name, *numbers, "ok" if ok else "FAIL"])
        passed &= ok
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
    return passed


def op_errors(row):
    single = cast("float32", *row.draw(np.random.default_rng(0), 3, 65, 48))
    double = cast("float64", *single)
    exact = run_torch(row.twin, *double)
    ours = run_ours(row.ours, *double), run_ours(row.ours, *single)
    return row.name, *(op_error(run, exact) for run in (*ours, run_torch(row.twin, *single)))


def family_errors(name, config, steps):
    exact = train_torch(config, "float64", steps)
    ours = [train_ours(config, dtype, steps) for dtype in DTYPES]
    return name, *(training_error(r, exact) for r in (*ours, train_torch(config, "float32", steps)))


def training_error(actual, expected):
    """Errors of all losses, of the gradients at the worst step, of the final weights."""
    worst = max(error(a, e) for a, e in zip(actual[1], expected[1], strict=True))
    return [error(actual[0], expected[0]), worst, error(actual[2], expected[2])]


def start(config, dtype):
    """A model in `dtype`, its weights moved so far that norms and biases matter."""
    model, rng = Transformer(config, seed=0), np.random.default_rng(0)
    for _, t in model.named_tensors():
        t.data += 0.1 * rng.standard_normal(t.shape, dtype=np.float32)
    return model.astype(dtype)


def batches(config, steps):
    """(tokens, mask, targets): the next tokens, or some of the tokens where attention sees all."""
    rng = np.random.default_rng(2)
    for _ in range(steps):
        text = rng.integers(0, config.vocab_size, (3, config.context + 1))
        tokens, following = text[:, :-1], text[:, 1:]
        if config.causal:
            yield tokens, None, following
        else:
            mask = np.arange(config.context) < np.array([[24], [17], [9]])
            yield tokens, mask, np.where(mask & (rng.random(mask.shape) < 0.4), tokens, -100)


def train_ours(config, dtype, steps):
    """(losses, a flat gradient a step, flat final weights) of training with minilm."""
    model = start(config, dtype)
    optimizer, losses, grads = AdamW(model.parameters(), **ADAMW), [], []
    for tokens, mask, targets in batches(config, steps):
        optimizer.zero_grad()
        loss = ops.cross_entropy(model(tokens, mask), targets)
        loss.backward()
        losses.append(loss.data)
        grads.append(flat(p.grad for p in model.parameters()))
        optimizer.step()
    return losses, grads, flat(model.state_dict().values())


def train_torch(config, dtype, steps):
    """The same with PyTorch."""
    weights = start(config, dtype).state_dict()
    params = {name: torch.tensor(w, requires_grad=True) for name, w in weights.items()}
    optimizer, losses, grads = torch.optim.AdamW(params.values(), **ADAMW), [], []
    for tokens, mask, targets in batches(config, steps):
        optimizer.zero_grad()
        seen = None if mask is None else torch.tensor(mask)[:, None, None]
        logits = forward(config, params, torch.tensor(tokens), seen)
        loss = F.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
        loss.backward()
        losses.append(loss.item())
        grads.append(flat(p.grad.numpy() for p in params.values()))
        optimizer.step()
    return losses, grads, flat(p.detach().numpy() for p in params.values())


def flat(arrays):
    return np.concatenate([a.ravel() for a in arrays])


def forward(c, p, tokens, seen=None):
    """Logits (B, T, V) of the families in plain PyTorch; the weights p have minilm's names."""
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


if __name__ == "__main__":
    tyro.cli(main)
