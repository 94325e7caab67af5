"""Train, adapt and generate with a small model through the real CuPy, and print JSON about it.

    cd tests; python -m pretended PATH  # one of PATHS, in a process with pretended.environment()

It prints an object with these fields:

    launches      of one step, by kernel
    kernels       the names of all that ran
    not_compared  launches that nothing here could compute, by name
    milliseconds  that the host takes for a step
    functions     of this project and CuPy that take most of this time
    losses        [here, on the CPU] for each step
    error         the largest of the gradients, relative to their largest number
    texts         [here, on the CPU]
    faults        exceptions of products
"""

import cProfile
import json
import pstats
import statistics
import sys
import time
from functools import partial

import numpy as np

from minilm import ops
from minilm.backend import cupy
from minilm.generate import generate
from minilm.optim import AdamW, PagedAdamW
from minilm.peft import add_lora
from minilm.quantize import quantize_model
from minilm.transformer import Config, Transformer
from pretended.card import installed

CONFIGS = {"llama": Config.llama(97, 16, layers=2, heads=2, kv_heads=1, width=64, hidden=64),
           "gpt2": Config.gpt2(97, 64, 2, 2, 16)}
PATHS = {  # family, dtype, codebook, optimizer
    "training": ("llama", "float32", None, AdamW),
    "gpt2": ("gpt2", "bfloat16", None, AdamW),
    "qlora": ("llama", "bfloat16", "nf4", AdamW),
    "paged": ("llama", "float32", "nf4", partial(PagedAdamW, page_size=1024,
                                                 device_budget=3 * 8 * 1024)),
    "codes": ("llama", "float32", "nf3", AdamW),
    "int8": ("llama", "bfloat16", "int8", AdamW),
}
STEPS, TIMED = 3, 9


def make(family, dtype, codebook, optimizer, device):
    """(a model on the device, a function that trains it for a step and returns the loss)."""
    model = Transformer(CONFIGS[family], seed=1).astype(dtype)
    if codebook:
        quantize_model(model, codebook)
        add_lora(model, 4, 8, "all-linear")
        for name, p in model.named_parameters():  # with B = 0 A would have no gradient
            if name.endswith("B"):
                p.data[...] = np.random.default_rng(2).normal(0, 0.02, p.shape).astype(p.dtype)
    model.to(device)
    trained = optimizer(model.parameters(), 1e-2)
    tokens, targets = np.random.default_rng(0).integers(0, 97, (2, 2, 16))

    def step():
        trained.zero_grad()
        loss = ops.cross_entropy(model(tokens), targets)
        loss.backward()
        trained.step()
        return loss
    return model, step


def gradients(model):
    found = [p.grad if isinstance(p.grad, np.ndarray) else p.grad.get()
             for p in model.parameters()]
    return np.concatenate([g.reshape(-1).astype(np.float64) for g in found])


def host_times(card, step):
    """(milliseconds that Python takes for a step, the functions that take most of this time)."""
    times = []
    for _ in range(TIMED):
        start, inside = time.perf_counter(), card.seconds
        step()
        times.append(1e3 * (time.perf_counter() - start - (card.seconds - inside)))
    profile = cProfile.Profile()
    profile.runcall(step)
    found = [(f"{file.rpartition('minilm/')[2]}:{name}", calls, 1e3 * own)
             for (file, _, name), (calls, _, own, _, _) in pstats.Stats(profile).stats.items()
             if "/minilm/" in file or "cupy" in name]
    return statistics.median(times), sorted(found, key=lambda row: -row[2])[:20]


def main(path):
    card = installed()
    cupy()
    (ours, step), (theirs, expected) = (make(*PATHS[path], device) for device in ("cuda", "cpu"))
    losses, kernels = [], set()
    for _ in range(STEPS):
        kernels |= card.launches.keys()
        card.launches.clear()
        losses.append([float(loss.data) for loss in (step(), expected())])
    launches, actual, grads = dict(card.launches), gradients(ours), gradients(theirs)
    tokens = np.arange(5)[None]
    texts = [generate(model, tokens, 4, temperature=0) for model in (ours, theirs)]
    kernels |= card.launches.keys()
    milliseconds, functions = host_times(card, step)
    print(json.dumps({
        "launches": launches, "kernels": sorted(kernels), "milliseconds": milliseconds,
        "not_compared": dict(card.not_compared), "functions": functions, "losses": losses,
        "error": float(np.abs(actual - grads).max() / np.abs(grads).max()),
        "texts": [np.asarray(text).tolist() for text in texts],
        "faults": [repr(fault) for fault in card.faults]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
