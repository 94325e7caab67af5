"""Compare every op with PyTorch, then three families in training.

    python scripts/bench/compare_torch.py

It prints two Markdown tables of errors, and exits with status 1 if an error is above its tolerance.
The expected numbers are PyTorch's in float64, also for float32 inputs. The last column is the error
of PyTorch itself in float32, which shows what that dtype can give.
"""

import sys

import numpy as np
from op_table import TOLERANCE, cast, error, op_error, run_ours, run_torch, table
from tqdm import tqdm

from minilm import ops
from minilm.command import command
from minilm.optim import AdamW
from minilm.transformer import Config, Transformer

DTYPES = ("float64", "float32")
SIZES = dict(vocab_size=61, context=24, layers=2, heads=4, width=32)
FAMILIES = {
    "GPT-2": Config.gpt2(**SIZES),
    "Llama, grouped queries": Config.llama(**SIZES, hidden=48, kv_heads=2),
    "BERT, padded": Config.bert(**SIZES, hidden=64),
}
# eps is as large as a gradient, so that its place in the formula shows. It also keeps AdamW from
# taking whole steps along gradients that are only rounding, such as those of the keys' biases.
ADAMW = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.1)


def main(steps: int = 20):
    """Compare every op with PyTorch, then three families in training.

    Args:
        steps: how many steps of AdamW the families are trained for.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    rows = table()
    print("Errors of the value, then of each gradient.\n")
    passed = print_table("op", [op_errors(row) for row in progress(rows, "op")])
    print(f"\nErrors of the losses, the gradients and the weights over {steps} steps of AdamW.\n")
    families = [family_errors(name, config, steps)
                for name, config in progress(FAMILIES.items(), "family")]
    passed = print_table("family", families) and passed
    sys.exit(0 if passed else 1)


def progress(items, unit: str):
    """The items, with a progress bar that disappears at the end."""
    return tqdm(items, unit=unit, leave=False, disable=None)


def print_table(subject, results):
    """Print lines of (name, errors in float64, in float32, PyTorch's own); are all small enough?"""
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
    """Errors of all losses, of the worst step's gradients, of the final weights."""
    worst = max(error(a, e) for a, e in zip(actual[1], expected[1], strict=True))
    return [error(actual[0], expected[0]), worst, error(actual[2], expected[2])]


def start(config, dtype):
    """A model in `dtype`. Its weights are moved far enough for norms and biases to matter."""
    model, rng = Transformer(config, seed=0), np.random.default_rng(0)
    for _, t in model.named_tensors():
        t.data += 0.1 * rng.standard_normal(t.shape, dtype=np.float32)
    return model.astype(dtype)


def batches(config, steps):
    """(tokens, mask, targets). A causal model's targets are the next tokens, else some tokens."""
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
    """Train with minilm: (losses, a flat gradient for each step, flat final weights)."""
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
    from torch_families import F, forward, torch

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


if __name__ == "__main__":
    command(main)
