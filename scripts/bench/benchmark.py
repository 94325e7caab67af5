"""Measure this project against PyTorch eager, PEFT and bitsandbytes on the same machine.

    python scripts/bench/benchmark.py                 # everything, about half an hour
    python scripts/bench/benchmark.py --rows train --configs S M --rounds 30
    python scripts/bench/benchmark.py --device cuda   # kernels and a QLoRA step on an NVIDIA GPU

Each contender runs in a process of its own, and they take turns (turns.py). A ratio is the other's
median time over ours: above 1 we are faster. The lowest and the highest ratio of neighbouring turns
stand beside it. Both sides use two cores; in the row `codes` both use one.

The row `train` has torch.compile and JAX as well, and the floor: what the products of the step
would take at the rate of large products, measured in the same turns (floor.py). Its ratio is the
floor's time over ours. The row `llama` is generation and a LoRA step at a real size, see llama.py;
`methods` is a step of the methods that PEFT has beside LoRA, see methods.py; `growth` has larger
models and longer texts, see growth.py.

Four rows divide one time of ours by another:

    qlora     a step of LoRA / a step of QLoRA
    paged     a step of AdamW / one of PagedAdamW, on threads, if everything fits in memory
    bfloat16  a training step in float32 / one in bfloat16
    batch     a text that is written alone / one of eight that are written together

Needs the extra `test`, for JAX `contenders` and, for `lora`, `methods`, `codes` and `llama`, the
extra `peers`. gpu_table.py says how things are measured on a GPU; kernels/RESULTS.md has the
results. profile_step.py says where the time of our step goes.
"""

import importlib.util
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import growth
import jax_gpt
import torch_compiled
import which_kernels
from contenders import SHAPES, TEXTS, bitsandbytes_codes, our_codes, our_side, torch_side
from floor import floor_side, operations
from llama import JOBS, our_llama, their_llama
from methods import METHODS, our_step, their_step
from turns import WARM_UP, Contender, compare, in_turn, line, take_turns

from minilm.extras import install

OnCPU = Literal["train", "lora", "methods", "qlora", "paged", "bfloat16", "generate", "batch",
                "memory", "codes", "llama", "growth"]
OnGPU = Literal["dequantize", "quantize", "matmul", "lora", "reference", "attention", "swiglu",
                "rms_norm", "adamw", "step", "pages"]
OTHERS = {"torch": ("test", ("train", "lora", "methods", "generate", "memory", "growth", "codes",
                             "llama")),
          "peft": ("peers", ("lora", "methods", "llama")),
          "transformers": ("peers", ("methods", "llama")),
          "bitsandbytes": ("peers", ("codes",))}
COMPILERS = {"torch.compile": torch_compiled, "JAX": jax_gpt}  # further contenders of `train`
OURS = {  # rows that compare two jobs of ours: the title, and the job whose time is divided
    "qlora": ("QLoRA after LoRA", "lora"),
    "bfloat16": ("training step, bfloat16 after float32", "train"),
    "batch": (f"63 tokens of a text: alone, and among {TEXTS}", "generate")}


def main(rows: tuple[Literal[OnCPU, OnGPU], ...] = (),
         configs: tuple[Literal["S", "M", "L", "nanoGPT"], ...] = ("S", "M", "L"), rounds: int = 15,
         threads: bool = False, device: Literal["cpu", "cuda"] = "cpu",
         picture: Path = Path("runs/growth.svg")):
    """Print the table of ratios.

    Args:
        rows: what to measure; by default everything for this device.
        configs: sizes of the model, on the CPU.
        rounds: turns of each contender.
        threads: use threads as our workers, not processes.
        device: cuda measures the kernels, a step of QLoRA, and its optimizer's pages.
        picture: where `growth` draws its curves.
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
        on_cpu(rows, configs, rounds, threads, picture)


def on_cpu(rows, configs, rounds, threads, picture):
    """Print the rows beside PyTorch, PEFT and bitsandbytes."""
    for package, (extra, compared) in OTHERS.items():
        if {*rows} & {*compared} and importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed: {install(extra)}")
    further = beside(rows)
    print("| what | the other | minilm | ratio | lowest - highest |\n|---|---|---|---|---|",
          flush=True)
    turns = partial(compare, rounds=rounds)
    for row in rows:
        for name in configs if row not in ("growth", "codes", "llama") else ():
            shape = SHAPES[name]
            theirs, ours = (torch_side, row, shape), (our_side, row, shape, threads)
            if row == "memory":
                compare_memory(f"memory of a step, {name}", shape, threads)
                compare_memory(f"with checkpoints, {name}", replace(shape, checkpoint=True),
                               threads)
            elif row == "train":
                training(name, rounds, threads, further)
            elif row == "methods":
                for method in METHODS:
                    turns(f"{method} step, {name}", (their_step, method, shape),
                          (our_step, method, shape, threads))
            elif row in OURS:
                title, job = OURS[row]
                turns(f"{title}, {name}", (our_side, job, shape, threads), ours)
            elif row == "paged":  # on threads, whatever `threads` is
                turns(f"PagedAdamW after AdamW, {name}", (our_side, "train", shape, True),
                      (our_side, "paged", shape, True))
            else:
                title = {"lora": "LoRA step", "generate": "63 tokens"}
                turns(f"{title[row]}, {name}", theirs, ours)
        if row == "codes":
            for job in ("quantize", "dequantize"):
                turns(f"{job} 4096 x 4096 to NF4", (bitsandbytes_codes, job, 4096),
                      (our_codes, job, 4096))
        if row == "llama":
            at_a_real_size(turns)
        if row == "growth":  # the last, since it has a table of its own
            growth.measure(rounds, threads, picture)


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


def beside(rows) -> dict:
    """The compilers that the row `train` has as well, if they are here; says which kernels all
    sides have, and who is not here."""
    if "train" not in rows:
        return {}
    absent = {name: why for name, side in COMPILERS.items() if (why := side.why_not())}
    sides = ["ours", "torch", *["jax"] * ("JAX" not in absent)]
    for text in [*which_kernels.lines(sides),
                 *(f"left out: {name}, {why}" for name, why in absent.items())]:
        print(f"* {text}")
    print()
    return {name: side for name, side in COMPILERS.items() if name not in absent}


def training(name, rounds, threads, further):
    """Print our training step beside PyTorch's, the compilers' and the floor."""
    shape = SHAPES[name]
    others = {"": (torch_side, "train", shape)}
    others |= {f", {other}": (module.side, shape) for other, module in further.items()}
    sides = (our_side, "train", shape, threads), (floor_side, shape, threads), *others.values()
    ours, floor, *theirs = (times[WARM_UP:] for times in in_turn(sides, rounds + WARM_UP))
    for other, times in zip(others, theirs):
        print(line(f"training step, {name}{other}", times, ours), flush=True)
    work = operations(shape)
    rate = work / statistics.median(floor)
    print(line(f"the floor, {name}: {work / 1e9:.1f} GFLOP at {rate / 1e9:.0f} GFLOP/s", floor,
               ours), flush=True)


def at_a_real_size(turns):
    """Print the jobs of llama.py, and how much longer generation takes on a busy machine."""
    times = {job: turns(title, (their_llama, job), (our_llama, job))
             for job, (title, *_) in JOBS.items()}
    theirs, ours = (busy / alone for busy, alone in zip(times["busy"], times["float32"]))
    print(f"| the busy machine's time, of the quiet one's | x{theirs:.2f} | x{ours:.2f} | | |")


def compare_memory(title, shape, threads):
    """Print a step's peak memory: gradients included, weights and Adam's states not."""
    with (Contender(torch_side, "memory", shape) as theirs,
          Contender(our_side, "parts", shape, threads) as ours):
        a, parts = theirs.run(), ours.run()
    b, (gradients, others, activations) = sum(parts), parts
    print(f"| {title} | {a:.0f} MiB | {b:.0f} MiB: gradients {gradients:.0f}, other processes at "
          f"rest {others:.0f}, activations {activations:.0f} | {b / a:.2f} of PyTorch's | |",
          flush=True)


if __name__ == "__main__":
    from minilm.command import command  # here, so that the others' processes do not load it

    command(main)
