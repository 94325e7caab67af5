"""What the tests of ranks train, and a program: mpiexec -n 4 python tests/ranked.py OUT

Each rank writes what it found to OUT/RANK.json. The first 1, 2 and 4 ranks train in each stage.
Rank 0 also trains alone, so that both have the same BLAS.
"""

import hashlib
import json
import sys
import time
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

from minilm.optim import AdamW
from minilm.optim.flat import clip_grad_norm, clip_scale
from minilm.parallel.comm import connect
from minilm.parallel.mpi import Mpi
from minilm.parallel.zero import Zero
from minilm.peft import add_lora
from minilm.quantize import quantize_model
from minilm.train import LabelLoss
from minilm.transformer import Config, Transformer

STEPS, LR, LOSS = 3, 0.01, LabelLoss()


def make(tied=False, dtype="float32", every=0, lora=False, codes=False):
    """A model, small but with whatever a stage may stumble over."""
    c = Config.llama(vocab_size=23, context=8, layers=3, heads=2, width=16,
                     hidden=24, tied=tied)
    model = Transformer(c, seed=3).astype(np.dtype(dtype))
    model.checkpoint_every = every
    if codes:
        quantize_model(model)
    if lora:
        add_lora(model, r=2, alpha=4)
        for name, t in model.named_parameters():
            if name.endswith("B"):
                t.data[...] = 0.1
    return model


def undecayed(model):
    return [t for t in model.parameters() if t.ndim == 1]


@cache
def rows(count):
    """Micro-batches of each step: [[(tokens, targets), ...], ...]."""
    rng = np.random.default_rng(5)
    return [[tuple(rng.integers(0, 23, (2, 2, 8))) for _ in range(count)] for _ in range(STEPS)]


def parameters(model):
    return {name: t.data.copy() for name, t in model.named_tensors()}


@cache
def alone(count, clip=None, **kind):
    """(parameters, losses, norms) of one process with AdamW, the package's own."""
    model, losses, norms = make(**kind), [], []
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.1, undecayed=undecayed(model))
    for batch in rows(count):
        optimizer.zero_grad()
        loss = 0.0
        for part in batch:
            y = LOSS(model, *part, totals=(16 * count,))
            y.backward()
            loss += float(y.data)
        losses.append(loss)
        norms.append(clip_grad_norm(model.parameters(), clip or 1e9))
        optimizer.step()
    return parameters(model), losses, norms


def trained(comm, stage, count, clip=None, units=lambda model: model.blocks, **kind):
    """(parameters, losses, norms, Zero) of a rank; it has every n-th micro-batch."""
    model, losses, norms = make(**kind), [], []
    if comm.rank:  # rank 0's numbers count
        for t in model.parameters():
            t.data += 1
    zero = Zero(model, units(model), comm, stage, lr=LR, weight_decay=0.1,
                undecayed=undecayed(model))
    for batch in rows(count):
        mine, found = batch[comm.rank :: comm.size], []
        for i, part in enumerate(mine):
            with zero.micro_batch(last=i == len(mine) - 1):
                y = LOSS(model, *part, totals=(16 * count,))
                y.backward()
            found.append(float(y.data))
        losses.append(sum(comm.numbers(*found).T.reshape(-1).tolist(), 0.0))
        norms.append(zero.norm())
        zero.step(clip_scale(norms[-1], clip) if clip else 1.0)
    with zero.gathered():
        return parameters(model), losses, norms, zero


def digest(arrays) -> str:
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def collectives(comm):
    """The results of each call on small arrays, as lists; handles are waited for out of order."""
    r, n = comm.rank, comm.size
    x = np.random.default_rng(r).standard_normal(5).astype(np.float32)
    full = np.random.default_rng(r).standard_normal(3 * n).astype(np.float32)
    shard, root = np.empty(3, np.float32), np.arange(4) * (r + 1)
    gathered, bits = np.empty(2 * n), np.empty(2 * n, ml_dtypes.bfloat16)
    handles = [comm.all_reduce(x), comm.reduce_scatter(full, shard), comm.broadcast(root, n - 1),
               comm.all_gather(np.array([r, 0.5]), gathered),
               comm.all_gather(np.array([r, 0.5], ml_dtypes.bfloat16), bits)]
    for handle in reversed(handles):
        handle.wait()
    comm.reduce_scatter(full, shard, add=True).wait()
    counted = dict(comm.sent)
    inside = np.repeat(np.float64(r), 2 * n)
    comm.all_gather(inside[2 * r : 2 * r + 2], inside).wait()
    comm.barrier()
    return {"all_reduce": x.tolist(), "twice": shard.tolist(), "broadcast": root.tolist(),
            "all_gather": gathered.tolist(), "bfloat16": bits.astype(float).tolist(),
            "inside": inside.tolist(), "numbers": comm.numbers(r, -r).tolist(), "sent": counted}


def moved(comm) -> list[bool]:
    """Are large calls done, within five seconds, though this rank asks nothing?"""
    full, part = np.ones(comm.size * 200_000, np.float32), np.zeros(200_000, np.float32)
    gathered, mine = np.zeros_like(full), np.full(200_000, 1 + comm.rank, np.float32)
    large = np.full(comm.size * 200_000, 3e38, np.float32)  # their sum is no number, without a word
    parts = np.zeros(200_000, np.float32)
    handles = [comm.reduce_scatter(full, part), comm.all_gather(mine, gathered),
               comm.reduce_scatter(large, parts)]
    expected, until = np.repeat(np.arange(1, comm.size + 1), 200_000), time.monotonic() + 5

    def done():
        return [bool((part == comm.size).all()), bool((gathered == expected).all()),
                bool(np.isinf(parts).all())]
    while not all(done()) and time.monotonic() < until:
        time.sleep(0.01)
    found = done()
    for handle in handles:
        handle.wait()
    return found + [done()]


def main(out: Path):
    everyone, found = connect(), {}  # if one fails, all end
    rank = everyone.rank
    for n in (1, 2, 4):
        world = everyone.world.Split(rank < n)
        if rank >= n:
            continue
        for ordered in (False, True):
            found[f"collectives {n} {ordered}"] = collectives(Mpi(ordered, world))
            if n > 1:
                found[f"moved {n} {ordered}"] = moved(Mpi(ordered, world))
            for stage in range(4):
                comm = Mpi(ordered, world)
                after, losses, norms, zero = trained(comm, stage, 4 if ordered else n, clip=0.5)
                found[f"{n} {ordered} {stage}"] = {
                    "digest": digest(after), "losses": losses, "norms": norms,
                    "sent": dict(comm.sent), "held": dict(zero.held()),
                    "sizes": [sum(b.size for b in unit.buckets)
                              for unit in (*zero.units, zero.root)],
                    "embed": after["embed.weight"].tolist()}
    if rank == 0:
        for clip in (None, 0.5):
            after, losses, norms = alone(4, clip)
            found[f"alone {clip}"] = {"digest": digest(after), "losses": losses, "norms": norms,
                                      "embed": after["embed.weight"].tolist()}
    (out / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
