"""Measure this project against PyTorch eager on the same machine.

    python scripts/benchmark.py                     # everything, about ten minutes
    python scripts/benchmark.py --rows train --configs S M --rounds 30

Each contender runs in a process of its own; they are woken in turn, A B A B ..., so that a change
of the machine's speed meets both. A ratio is PyTorch's median time over ours (above 1: we are
faster), with the lowest and highest ratio of neighbouring turns. Both use two cores. PyTorch is
written well: fused AdamW, scaled_dot_product_attention. Needs the extra `test`.
"""

import ctypes
import math
import multiprocessing
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

CORES = 2


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and its batch."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    vocab: int
    checkpoint: bool = False  # every sqrt(layers)-th activation is kept, the rest run again

    @property
    def every(self) -> int:
        return round(math.sqrt(self.layers)) if self.checkpoint else 0

    def tokens(self):
        """Random (tokens, targets), (B, T) each."""
        rng = np.random.default_rng(0)
        drawn = rng.integers(0, self.vocab, (self.batch, self.context + 1))
        return drawn[:, :-1].copy(), drawn[:, 1:].copy()


SHAPES = {"S": Shape(4, 4, 128, 64, 12, 256), "M": Shape(6, 6, 384, 256, 8, 512),
          "L": Shape(12, 12, 768, 256, 2, 4096),
          "nanoGPT": Shape(4, 4, 128, 64, 12, 67)}  # its recipe for a CPU
GROWTH = Shape(6, 6, 384, 256, 8, 512), Shape(6, 6, 384, 1024, 2, 512)


def main(rows: tuple[Literal["train", "generate", "memory", "growth"], ...] =
         ("train", "generate", "memory", "growth"),
         configs: tuple[Literal["S", "M", "L", "nanoGPT"], ...] = ("S", "M", "L"), rounds: int = 15,
         threads: bool = False):
    """Print the table of ratios.

    Args:
        rows: what to measure.
        configs: sizes of the model.
        rounds: turns of each contender.
        threads: let our workers be threads rather than processes.
    """
    print("| what | PyTorch | minilm | ratio | lowest - highest |\n|---|---|---|---|---|")
    for name in configs:
        if "train" in rows:
            compare(f"training step, {name}", "train", SHAPES[name], rounds, threads)
    for name in configs:
        if "generate" in rows:
            compare(f"63 tokens, {name}", "generate", SHAPES[name], rounds, threads)
    for name in configs:
        if "memory" in rows:
            shape = SHAPES[name]
            compare_memory(f"memory of a step, {name}", shape, threads)
            compare_memory(f"with checkpoints, {name}", replace(shape, checkpoint=True), threads)
    if "growth" in rows:
        short, long = (compare(f"step at T = {s.context}", "train", s, rounds, threads)
                       for s in GROWTH)
        growth = [b / a for a, b in zip(short, long)]
        print(f"| growth of the step from T = 256 to 1024 | x{growth[0]:.3f} | x{growth[1]:.3f} | "
              f"{growth[1] / growth[0]:.3f} of PyTorch's | |")


def compare(title, job, shape, rounds, threads) -> tuple[float, float]:
    """Time PyTorch and us in turn; prints a row, returns the median seconds of both."""
    times = [], []
    with (Contender(torch_side, job, shape) as theirs,
          Contender(our_side, job, shape, threads) as ours):
        for turn in range(rounds + 2):
            pair = theirs.run(), ours.run()
            if turn >= 2:  # the first two turns warm up
                times[0].append(pair[0])
                times[1].append(pair[1])
    ratios = [a / b for a, b in zip(*times)]
    a, b = (statistics.median(t) for t in times)
    print(f"| {title} | {1e3 * a:.2f} ms ({1e3 * min(times[0]):.2f} - {1e3 * max(times[0]):.2f}) "
          f"| {1e3 * b:.2f} ms ({1e3 * min(times[1]):.2f} - {1e3 * max(times[1]):.2f}) "
          f"| {a / b:.2f} | {min(ratios):.2f} - {max(ratios):.2f} |", flush=True)
    return a, b


def compare_memory(title, shape, threads):
    """Peak memory of a step above weights and Adam's state, gradients included."""
    with (Contender(torch_side, "memory", shape) as theirs,
          Contender(our_side, "memory", shape, threads) as ours):
        a, b = theirs.run(), ours.run()
    print(f"| {title} | {a:.0f} MiB | {b:.0f} MiB | {b / a:.2f} of PyTorch's | |", flush=True)


class Contender:
    """A process that waits, runs a job once when told to, and answers with a number."""

    def __init__(self, side, *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, side, *args))
        self.process.start()
        theirs.close()

    def run(self) -> float:
        time.sleep(0.02)  # threads of the contender before may still be spinning
        self.pipe.send("go")
        return self.pipe.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pipe.send(None)
        self.process.join()


def serve(pipe, side, *args):
    """Life of a contender's process. `side` is a generator of answers."""
    answers = side(*args)
    while pipe.recv():
        pipe.send(next(answers))
    answers.close()


def draw(tokens):
    """The first 63 tokens of a stream."""
    for _ in zip(range(63), tokens):
        pass


def timed(step, at_least=0.25):
    """Mean seconds of a call, over and over; each time over calls that fill `at_least` seconds."""
    start, count = time.perf_counter(), 0
    while True:
        step()
        count += 1
        if (seconds := time.perf_counter() - start) >= at_least:
            yield seconds / count
            start, count = time.perf_counter(), 0


def our_side(job, shape, threads):
    """Answers of this project."""
    from minilm.backend import tune_allocator
    from minilm.generate import stream
    from minilm.optim import AdamW
    from minilm.train import Trainer
    from minilm.transformer import Config, Transformer

    s = shape
    model = Transformer(Config.gpt2(s.vocab, s.context, s.layers, s.heads, s.width))
    if job == "generate":
        tune_allocator()
        yield from timed(lambda: draw(stream(model.eval(), [[0]], temperature=0)))
    model.checkpoint_every = shape.every
    params = model.parameters()
    optimizer = AdamW(params, 1e-3, (0.9, 0.95), weight_decay=0.1,
                      undecayed=[p for p in params if p.ndim < 2])
    trainer = Trainer(model, optimizer, CORES, processes=not threads)
    work = trainer.workers.work
    trainer.workers.work = lambda part: trim() if part == "trim" else work(part)
    with trainer:
        def step(): return trainer.step(0, *shape.tokens())
        if job == "train":
            yield from timed(step)
        step()
        step()
        trainer.workers.run(["trim"] * CORES)
        children = [child.pid for child in trainer.workers.children]
        gradients = optimizer.flat.grad.nbytes / 2**20  # ours stay in memory between steps
        # What a worker process costs by being there, without its share of Adam's m and v.
        extra = sum(unshared(pid) - 2 * gradients / CORES for pid in children)
        yield gradients + extra + growth_of_memory(["self", *children], step)


def torch_side(job, shape):
    """Answers of PyTorch."""
    import torch

    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    model = torch_gpt(shape)
    if job == "generate":
        model.eval()
        with torch.inference_mode():
            yield from timed(lambda: draw(torch_stream(model, shape)))
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens, targets = map(torch.from_numpy, shape.tokens())

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    if job == "train":
        yield from timed(step)
    step()
    step()
    optimizer.zero_grad(set_to_none=True)
    trim()
    yield growth_of_memory(["self"], step)


def torch_gpt(shape):
    """GPT-2 in PyTorch, with our initialisation's scale."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    C, H = shape.width, shape.heads

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.o = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

        def forward(self, x, cache=None, past=0):
            B, T, _ = x.shape
            q, k, v = (t.view(B, T, H, C // H).transpose(1, 2)
                       for t in self.qkv(self.norm1(x)).split(C, dim=2))
            if cache is not None:
                cache[0][:, :, past : past + T], cache[1][:, :, past : past + T] = k, v
                k, v = (t[:, :, : past + T] for t in cache)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
            x = x + self.o(y.transpose(1, 2).reshape(B, T, C))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.position = nn.Embedding(shape.vocab, C), nn.Embedding(shape.context, C)
            self.blocks = nn.ModuleList(Block() for _ in range(shape.layers))
            self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, shape.vocab, bias=False)
            self.head.weight = self.embed.weight
            for p in self.parameters():
                if p.dim() == 2:
                    nn.init.normal_(p, 0, 0.02)

        def forward(self, tokens, caches=None, past=0):
            x = self.embed(tokens) + self.position.weight[past : past + tokens.shape[1]]
            if shape.every:
                for i in range(0, shape.layers, shape.every):
                    part = nn.Sequential(*self.blocks[i : i + shape.every])
                    x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
            else:
                for i, block in enumerate(self.blocks):
                    x = block(x, caches and caches[i], past)
            return self.head(self.norm(x))

    return GPT()


def torch_stream(model, shape):
    """Greedy tokens one after another, with a cache of keys and values."""
    import torch

    cached = (1, shape.heads, shape.context, shape.width // shape.heads)
    caches = [(torch.zeros(cached), torch.zeros(cached)) for _ in range(shape.layers)]
    token = torch.zeros((1, 1), dtype=torch.int64)
    for past in range(shape.context):
        token = model(token, caches, past)[:, -1].argmax(-1, keepdim=True)
        yield token


def trim():
    """Give freed memory back to the system (glibc)."""
    ctypes.CDLL(None).malloc_trim(0)


def growth_of_memory(pids, step) -> float:
    """MiB by which the processes together grow at their largest during a step."""
    before = [memory(pid, "VmRSS") for pid in pids]
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the high-water mark starts anew
    step()
    return sum(memory(pid, "VmHWM") for pid in pids) - sum(before)


def memory(pid, field) -> float:
    """A field of the process's status, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) / 1024


def unshared(pid) -> float:
    """MiB that only this process holds."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


if __name__ == "__main__":
    tyro.cli(main)
