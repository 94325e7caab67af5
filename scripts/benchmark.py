"""Measure this project against PyTorch eager, PEFT and bitsandbytes on the same machine.

    python scripts/benchmark.py                     # everything, about fifteen minutes
    python scripts/benchmark.py --rows train --configs S M --rounds 30

Each contender runs in a process of its own; they are woken in turn, A B A B ..., so that a change
of the machine's speed meets both. A ratio is the other's median time over ours (above 1: we are
faster), with the lowest and highest ratio of neighbouring turns. Both use two cores, but for the
rows of codes, where both use one. The row qlora compares our own steps: LoRA's time over QLoRA's.
Needs the extras `test` and, for lora and codes, `peers`.
"""

import multiprocessing
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import tyro
from contenders import SHAPES, Shape, bitsandbytes_codes, our_codes, our_side, torch_side

GROWTH = Shape(6, 6, 384, 256, 8, 512), Shape(6, 6, 384, 1024, 2, 512)
Rows = Literal["train", "lora", "qlora", "generate", "memory", "growth", "codes"]


def main(rows: tuple[Rows, ...] = get_args(Rows),
         configs: tuple[Literal["S", "M", "L", "nanoGPT"], ...] = ("S", "M", "L"), rounds: int = 15,
         threads: bool = False):
    """Print the table of ratios.

    Args:
        rows: what to measure.
        configs: sizes of the model.
        rounds: turns of each contender.
        threads: let our workers be threads rather than processes.
    """
    print("| what | the other | minilm | ratio | lowest - highest |\n|---|---|---|---|---|")
    turns = partial(compare, rounds=rounds)
    for row in [row for row in get_args(Rows) if row in rows]:
        for name in configs if row not in ("growth", "codes") else ():
            shape = SHAPES[name]
            theirs, ours = (torch_side, row, shape), (our_side, row, shape, threads)
            if row == "memory":
                compare_memory(f"memory of a step, {name}", shape, threads)
                compare_memory(f"with checkpoints, {name}", replace(shape, checkpoint=True),
                               threads)
            elif row == "qlora":
                turns(f"QLoRA after LoRA, {name}", (our_side, "lora", shape, threads), ours)
            else:
                title = {"train": "training step", "lora": "LoRA step", "generate": "63 tokens"}
                turns(f"{title[row]}, {name}", theirs, ours)
        if row == "growth":
            growth_with_context(turns, threads)
        if row == "codes":
            for job in ("quantize", "dequantize"):
                turns(f"{job} 4096 x 4096 to NF4", (bitsandbytes_codes, job, 4096),
                      (our_codes, job, 4096))


def growth_with_context(turns, threads):
    """How a step's time grows with T at the same number of tokens."""
    short, long = (turns(f"step at T = {s.context}", (torch_side, "train", s),
                         (our_side, "train", s, threads)) for s in GROWTH)
    growth = [b / a for a, b in zip(short, long)]
    print(f"| growth of the step from T = 256 to 1024 | x{growth[0]:.3f} | x{growth[1]:.3f} | "
          f"{growth[1] / growth[0]:.3f} of PyTorch's | |")


def compare(title, theirs, ours, rounds) -> tuple[float, float]:
    """Time both sides in turn; prints a row, returns the median seconds of both."""
    times = [], []
    with Contender(*theirs) as first, Contender(*ours) as second:
        for turn in range(rounds + 2):
            pair = first.run(), second.run()
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


if __name__ == "__main__":
    tyro.cli(main)
