"""Measure this project against PyTorch eager, PEFT and bitsandbytes on the same machine.

    python scripts/bench/benchmark.py                 # everything, about twenty minutes
    python scripts/bench/benchmark.py --rows train --configs S M --rounds 30
    python scripts/bench/benchmark.py --device cuda   # kernels and a QLoRA step on an NVIDIA GPU

Each contender runs in a process of its own. They take turns, A B A B ..., so that a change of the
machine's speed affects both. A ratio is the other's median time over ours: above 1 we are faster.
The lowest and the highest ratio of neighbouring turns stand beside it. Both sides use two cores; in
the row `codes` both use one. The rows `qlora` and `paged` compare our own steps: LoRA's time over
QLoRA's, and AdamW's over PagedAdamW's on threads, when everything fits in memory. The row `llama`
is generation and a LoRA step at a real size, see llama.py; `methods` is a step of the methods that
PEFT has beside LoRA, see methods.py.

Needs the extra `test` and, for `lora`, `methods`, `codes` and `llama`, the extra `peers`.
gpu_table.py says how things are measured on a GPU; kernels/RESULTS.md has the results.
"""

import importlib.util
import multiprocessing
import signal
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from typing import Literal, get_args

from contenders import SHAPES, Shape, bitsandbytes_codes, our_codes, our_side, torch_side
from llama import JOBS, our_llama, their_llama
from methods import METHODS, our_step, their_step
from tqdm import tqdm

from minilm.extras import install

GROWTH = Shape(6, 6, 384, 256, 8, 512), Shape(6, 6, 384, 1024, 2, 512)
OnCPU = Literal["train", "lora", "methods", "qlora", "paged", "generate", "memory", "growth",
                "codes", "llama"]
OnGPU = Literal["dequantize", "quantize", "matmul", "lora", "reference", "attention", "swiglu",
                "rms_norm", "adamw", "step", "pages"]
OTHERS = {"torch": ("test", ("train", "lora", "methods", "generate", "memory", "growth", "codes",
                             "llama")),
          "peft": ("peers", ("lora", "methods", "llama")),
          "transformers": ("peers", ("methods", "llama")),
          "bitsandbytes": ("peers", ("codes",))}


def main(rows: tuple[Literal[OnCPU, OnGPU], ...] = (),
         configs: tuple[Literal["S", "M", "L", "nanoGPT"], ...] = ("S", "M", "L"), rounds: int = 15,
         threads: bool = False, device: Literal["cpu", "cuda"] = "cpu"):
    """Print the table of ratios.

    Args:
        rows: what to measure; by default everything for this device.
        configs: sizes of the model, on the CPU.
        rounds: turns of each contender.
        threads: use threads as our workers, not processes.
        device: cuda measures the kernels, a step of QLoRA, and its optimizer's pages.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    known = get_args(OnCPU if device == "cpu" else OnGPU)
    if unknown := sorted(set(rows) - set(known)):
        sys.exit(f"benchmark.py: there are no rows {unknown} on {device}, only {known}")
    rows = [row for row in known if row in (rows or known)]
    if device == "cuda":
        on_gpu(rows, rounds)
    else:
        on_cpu(rows, configs, rounds, threads)


def on_cpu(rows, configs, rounds, threads):
    """Print the rows beside PyTorch, PEFT and bitsandbytes."""
    for package, (extra, compared) in OTHERS.items():
        if {*rows} & {*compared} and importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed: {install(extra)}")
    print("| what | the other | minilm | ratio | lowest - highest |\n|---|---|---|---|---|")
    turns = partial(compare, rounds=rounds)
    for row in rows:
        for name in configs if row not in ("growth", "codes", "llama") else ():
            shape = SHAPES[name]
            theirs, ours = (torch_side, row, shape), (our_side, row, shape, threads)
            if row == "memory":
                compare_memory(f"memory of a step, {name}", shape, threads)
                compare_memory(f"with checkpoints, {name}", replace(shape, checkpoint=True),
                               threads)
            elif row == "methods":
                for method in METHODS:
                    turns(f"{method} step, {name}", (their_step, method, shape),
                          (our_step, method, shape, threads))
            elif row == "qlora":
                turns(f"QLoRA after LoRA, {name}", (our_side, "lora", shape, threads), ours)
            elif row == "paged":
                turns(f"PagedAdamW after AdamW, {name}", (our_side, "train", shape, True),
                      (our_side, "paged", shape, True))
            else:
                title = {"train": "training step", "lora": "LoRA step", "generate": "63 tokens"}
                turns(f"{title[row]}, {name}", theirs, ours)
        if row == "growth":
            growth_with_context(turns, threads)
        if row == "codes":
            for job in ("quantize", "dequantize"):
                turns(f"{job} 4096 x 4096 to NF4", (bitsandbytes_codes, job, 4096),
                      (our_codes, job, 4096))
        if row == "llama":
            at_a_real_size(turns)


def on_gpu(rows, rounds):
    """Print the card's ceilings, the kernels, the step, and the pages of its optimizer."""
    import gpu_pages
    import gpu_rows
    from gpu_kernels import GROUPS, measured_ceilings
    from gpu_step import BATCH, LLAMA, our_qlora, step_lines, torch_qlora
    from gpu_table import HEAD, heading, measured_line

    from minilm.backend import cupy

    cupy()
    print(f"{heading()}\n{HEAD}", flush=True)
    ceilings, lines = measured_ceilings(rounds)
    print(*lines, sep="\n", flush=True)
    groups = GROUPS | gpu_rows.GROUPS
    for name in rows:
        for row in groups[name]() if name in groups else ():
            print(measured_line(row, ceilings, rounds), flush=True)
    for checkpoint in (False, True) if "step" in rows else ():
        shape = LLAMA, BATCH, checkpoint
        # The first answer is bytes; a second extra turn warms up.
        theirs, ours = ([side[0], *side[2:]] for side in take_turns(
            (torch_qlora, *shape), (our_qlora, *shape), rounds + 2))
        print(*step_lines(*shape, ceilings, theirs, ours), sep="\n", flush=True)
    for text in gpu_pages.lines(ceilings, rounds, take_turns) if "pages" in rows else ():
        print(text, flush=True)


def growth_with_context(turns, threads):
    """Print how a step's time grows with T at the same number of tokens."""
    short, long = (turns(f"step at T = {s.context}", (torch_side, "train", s),
                         (our_side, "train", s, threads)) for s in GROWTH)
    growth = [b / a for a, b in zip(short, long)]
    print(f"| growth of the step from T = 256 to 1024 | x{growth[0]:.3f} | x{growth[1]:.3f} | "
          f"{growth[1] / growth[0]:.3f} of PyTorch's | |")


def at_a_real_size(turns):
    """Print the jobs of llama.py, and how much longer generation takes on a busy machine."""
    times = {job: turns(title, (their_llama, job), (our_llama, job))
             for job, (title, *_) in JOBS.items()}
    theirs, ours = (busy / alone for busy, alone in zip(times["busy"], times["float32"]))
    print(f"| the busy machine's time, of the quiet one's | x{theirs:.2f} | x{ours:.2f} | | |")


def compare(title, theirs, ours, rounds) -> tuple[float, float]:
    """Time both sides in turn and print a row; returns the median seconds of both."""
    times = [side[2:] for side in take_turns(theirs, ours, rounds + 2)]  # the first two warm up
    ratios = [a / b for a, b in zip(*times)]
    a, b = (statistics.median(t) for t in times)
    print(f"| {title} | {1e3 * a:.2f} ms ({1e3 * min(times[0]):.2f} - {1e3 * max(times[0]):.2f}) "
          f"| {1e3 * b:.2f} ms ({1e3 * min(times[1]):.2f} - {1e3 * max(times[1]):.2f}) "
          f"| {a / b:.2f} | {min(ratios):.2f} - {max(ratios):.2f} |", flush=True)
    return a, b


def take_turns(theirs, ours, rounds) -> list:
    """(their answers, our answers), asked for in turn."""
    with Contender(*theirs) as first, Contender(*ours) as second:
        turns = tqdm(range(rounds), unit="turn", leave=False, disable=None)
        return list(zip(*[(first.run(), second.run()) for _ in turns]))


def compare_memory(title, shape, threads):
    """Print a step's peak memory: gradients included, weights and Adam's states not."""
    with (Contender(torch_side, "memory", shape) as theirs,
          Contender(our_side, "memory", shape, threads) as ours):
        a, b = theirs.run(), ours.run()
    print(f"| {title} | {a:.0f} MiB | {b:.0f} MiB | {b / a:.2f} of PyTorch's | |", flush=True)


class Contender:
    """A process that waits, runs a job once when asked to, and answers with a number."""

    def __init__(self, side, *args):
        from minilm.loop import finish_on_interrupt

        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, side, *args))
        resource_tracker.ensure_running()  # if it started below, it would unblock the signal
        with finish_on_interrupt() as interrupted:
            # Only this process handles Ctrl-C: the child inherits the blocked signal.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            self.process.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        if interrupted():
            self.process.terminate()
            raise KeyboardInterrupt

    def run(self) -> float:
        time.sleep(0.02)  # threads of the previous contender may still be spinning
        try:
            self.pipe.send("go")
            return self.pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError("a contender died; its output is above") from None

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error:
            self.process.terminate()
        else:
            self.pipe.send(None)
        self.process.join()


def serve(pipe, side, *args):
    """What a contender's process does. `side` is a generator of answers."""
    answers = side(*args)
    while pipe.recv():
        pipe.send(next(answers))
    answers.close()


if __name__ == "__main__":
    from minilm.command import command  # here, so that the others' processes do not load it

    command(main)
