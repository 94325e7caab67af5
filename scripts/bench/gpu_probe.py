"""The processes that check_gpu.py starts on the card; each command is one of them.

    python scripts/bench/gpu_probe.py env  # versions, the card, registers of our kernels
    python scripts/bench/gpu_probe.py ceilings FILE  # measure them and write them to a file
    python scripts/bench/gpu_probe.py rows FILE GROUP ROUNDS SECONDS  # rows of benchmark.py
    python scripts/bench/gpu_probe.py step SIDE LAYERS FOLDER KIND  # a QLoRA step, of a KIND below
    python scripts/bench/gpu_probe.py needs KIND FOLDER  # the memory that small steps need
    python scripts/bench/gpu_probe.py within KIND FOLDER  # small steps in a pool between two needs
    python scripts/bench/gpu_probe.py step_rows FILE FOLDER  # the table's rows of plain steps
    python scripts/bench/gpu_probe.py streaming_rows FILE FOLDER  # and of all others
    python scripts/bench/gpu_probe.py profiled  # a few launches, for Nsight Compute

Rows of the table begin with "| ". A line for the summary begins with RESULT.
"""

import cProfile
import json
import platform
import pstats
import statistics
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import gpu_kernels
import gpu_pages
import gpu_rows
import gpu_step
import numpy as np
from gpu_table import H200, Ceilings, Row, cells, heading, line, measured_line

from minilm import cuda, ops
from minilm.backend import cublas, cupy, peak_memory
from minilm.optim import AdamW

KERNELS = (  # (file, kernel, REAL, macros) whose registers are printed
    ("nf4_dequantize.cu", "nf4_dequantize", "bfloat16", {}),
    ("nf4_quantize.cu", "nf4_quantize", "float32", {}),
    ("nf4_matmul.cu", "nf4_matmul", "float32", {"TILES": 1}),
    ("nf4_matmul.cu", "nf4_matmul", "float32", {"TILES": 2}),
    ("lora_matmul.cu", "lora_matmul", "bfloat16", {}),
    ("adamw.cu", "adamw", "float32", {}),
    ("rotary.cu", "rotary", "bfloat16", {}),
    ("dropout.cu", "dropout", "bfloat16", {}),
    ("scatter_add.cu", "scatter_add", "bfloat16", {}),
    ("gather.cu", "gather", "bfloat16", {}),
    ("attention.cu", "attention_forward", "bfloat16", {"HEAD_WIDTH": 64}),
    ("attention_backward.cu", "attention_dq", "bfloat16", {"HEAD_WIDTH": 128}),
    ("attention_backward.cu", "attention_dk_dv", "bfloat16", {"HEAD_WIDTH": 128}),
)
KINDS = {  # of a step: (a checkpoint a block, optimizer)
    "plain": (False, AdamW),
    "checkpoint": (True, AdamW),
    "pages-32": (False, gpu_pages.paged(gpu_pages.PAGES[0])),
    "pages-8": (False, gpu_pages.paged(gpu_pages.PAGES[1])),
}
FACTS = ("name", "major", "minor", "multiProcessorCount", "l2CacheSize", "totalGlobalMem",
         "sharedMemPerBlockOptin", "regsPerMultiprocessor", "memoryBusWidth")


def env():
    """Versions and facts; a product by cuBLAS and one of our kernels, checked; registers."""
    start, cp = time.perf_counter(), cupy()
    print("python", platform.python_version(), "numpy", np.__version__, "cupy", cp.__version__)
    facts = cp.cuda.runtime.getDeviceProperties(0)
    print(*(f"{key} {facts.get(key)}" for key in FACTS), sep="\n")
    print("sum of 10", int(cp.arange(10).sum()), f"after {time.perf_counter() - start:.1f} s")
    x = cp.ones((8, 8), "bfloat16")
    product = float((x @ x).astype("float32").sum())
    blas, handle = cublas()
    print("cuBLAS", blas.getVersion(handle), "a product of ones", product, "should be 512")
    for file, name, real, macros in KERNELS:
        try:
            f = cuda.kernel(file, name, real, **macros).launch
            print(name, macros, f.num_regs, "registers", f.local_size_bytes, "local",
                  f.shared_size_bytes, "shared")
        except Exception as error:
            print("FAIL", name, macros, f"{type(error).__name__}: {str(error)[:2000]}")
    swiglu = float(cuda.swiglu(cp.ones(9, "bfloat16"), cp.ones(9, "bfloat16"))[0])
    print("RESULT swiglu of ones", swiglu, "should be 0.73")
    if product != 512 or abs(swiglu - 0.7311) > 5e-3:
        sys.exit("a plain product or kernel is wrong")


def ceilings(file: Path):
    """Measure the card's ceilings; print their rows and the card."""
    found, texts = gpu_kernels.measured_ceilings(5)
    file.write_text(json.dumps([found.bytes, found.flops]))
    print(*texts, sep="\n")
    print(f"RESULT {found.bytes / 1e12:.2f} TB/s {found.flops / 1e12:.0f} TFLOP/s", flush=True)
    print(heading().splitlines()[0])


def kept_ceilings(file: Path) -> Ceilings:
    return Ceilings(*json.loads(file.read_text())) if file.exists() else H200


def rows(file: Path, group: str, rounds: int, seconds: float):
    """Measure a group's rows. A row that fails, or has no time left, is printed too.

    seconds: from now on. A row is started only if the longest so far would still fit.
    """
    begin, longest = time.perf_counter(), 0.0
    for row, ceiling in rows_of(group, rounds, kept_ceilings(file)):
        start = time.perf_counter()
        if start + longest > begin + seconds:
            print(said(row, "no time left"), flush=True)
            continue
        try:
            print(measured_line(row, ceiling, rounds), flush=True)
        except Exception as error:
            print(said(row, f"FAILED: {type(error).__name__}: {str(error)[:200]}"), flush=True)
            traceback.print_exc(limit=-3)
        longest = max(longest, time.perf_counter() - start)


def rows_of(group, rounds, ceiling):
    """(row, its ceilings) for a group. For pages the speed of the link is measured first."""
    if group != "pages":
        return [(row, ceiling) for row in (gpu_kernels.GROUPS | gpu_rows.GROUPS)[group]()]
    link, texts = gpu_pages.measured_link(rounds)
    print(*texts, sep="\n", flush=True)
    return zip(gpu_pages.copy_rows(), link)


def said(row: Row, text: str) -> str:
    return cells(row.title, "", text.replace("|", "/").replace("\n", " "), "", "", "", "")


def step(side: str, layers: int, folder: Path, kind: str):
    """Seven steps of a Llama as wide as gpu_step.py's."""
    config = replace(gpu_step.LLAMA, layers=layers)
    start = time.perf_counter()
    peak, times = (our_steps if side == "ours" else torch_steps)(config, *KINDS[kind])
    (folder / f"{kind}-{side}-{layers}.json").write_text(json.dumps([peak, *times]))
    note = ("; if done comes soon after update, the host is the bottleneck"
            if side == "ours" else "")
    print(f"RESULT {kind}, {side}, {layers} layers: median {1e3 * statistics.median(times):.2f} ms "
          f"({1e3 * min(times):.2f} - {1e3 * max(times):.2f}), {peak / 2**30:.2f} GiB, in "
          f"{time.perf_counter() - start:.0f} s{note}", flush=True)


def torch_steps(config, checkpoint, _):
    answers = gpu_step.torch_qlora(config, gpu_step.BATCH, checkpoint)
    return next(answers), [next(answers) for _ in range(7)]


def our_steps(config, checkpoint, optimizer):
    """(peak in bytes, seconds of each step). Also prints a profile of Python's time."""
    start, model = time.perf_counter(), gpu_step.our_model(config, gpu_step.RANK, "cuda")
    print(f"model made in {time.perf_counter() - start:.1f} s", flush=True)
    model.checkpoint_every = int(checkpoint)
    optimizer = optimizer(model.parameters(), gpu_step.LR)
    tokens, targets = gpu_step.random_batch(config, gpu_step.BATCH)
    batch = model, optimizer, tokens, targets  # on the host, as a data loader has them
    told_step(*batch)  # compiles the kernels
    with peak_memory() as peak:
        told_step(*batch)
    times = [told_step(*batch) for _ in range(7)]
    profile = cProfile.Profile()
    profile.runcall(told_step, *batch)
    pstats.Stats(profile).sort_stats("tottime").print_stats(22)
    return peak.bytes, times


def told_step(model, optimizer, tokens, targets) -> float:
    """Seconds of a step. Prints when each part of it had been queued."""
    marks, begin = [], time.perf_counter()

    def mark():
        marks.append(time.perf_counter() - begin)

    optimizer.zero_grad()
    loss = ops.cross_entropy(model(tokens), targets)
    mark()
    loss.backward()
    mark()
    optimizer.step()
    mark()
    value = float(loss.data)  # waits for the card
    mark()
    forward, backward, update, done = (f"{1e3 * t:.1f}" for t in marks)
    print(f"loss {value:.4f}; queued forward {forward}, backward {backward}, update {update}, done "
          f"{done} ms", flush=True)
    return marks[-1]


def needs(kind: str, folder: Path):
    """Write (losses, bytes of a pool) of small steps whose states are where `kind` says."""
    (answer,) = gpu_pages.relieved(gpu_pages.needs, gpu_step.LLAMA, gpu_step.BATCH, KINDS[kind][1])
    (folder / f"needs-{kind}.json").write_text(json.dumps(answer))
    print(f"RESULT {kind}: {gpu_pages.gib(answer[1])}")


def within(kind: str, folder: Path):
    """Write the losses of small steps in a pool that has half of what pages save."""
    limit = sum(kept(folder / f"needs-{k}.json")[1] for k in ("plain", "pages-8")) // 2
    (losses,) = gpu_pages.relieved(gpu_pages.within, gpu_step.LLAMA, gpu_step.BATCH,
                                   KINDS[kind][1], limit)
    (folder / f"within-{kind}.json").write_text(json.dumps([limit, losses]))
    print(f"RESULT {kind}: {len(losses)} steps in {gpu_pages.gib(limit)}")


def kept(file: Path):
    """What a process wrote, or nothing."""
    return json.loads(file.read_text()) if file.exists() else []


def step_rows(file: Path, folder: Path, kind="plain"):
    """Print the table's rows of the steps that have run."""
    for ours in sorted(folder.glob(f"{kind}-ours-*.json")):
        layers, checkpoint = int(ours.stem.split("-")[-1]), KINDS[kind][0]
        config, found = replace(gpu_step.LLAMA, layers=layers), kept_ceilings(file)
        theirs, (peak, *times) = kept(folder / f"{kind}-torch-{layers}.json"), kept(ours)
        if theirs:
            print(*gpu_step.step_lines(config, gpu_step.BATCH, checkpoint, found, theirs,
                                       [peak, *times]), sep="\n")
        else:
            row = gpu_step.step_row(config, gpu_step.BATCH, checkpoint)
            print(line(row._replace(beside="", speed=0.0), found, times))
            print(cells(f"{row.title}: peak memory", "", gpu_pages.gib(peak), "", "", "", ""))


def streaming_rows(file: Path, folder: Path):
    """Print the rows of checkpoints, of pages and of the limited pool, as far as they have run."""
    step_rows(file, folder, "checkpoint")
    resident = kept(folder / "plain-ours-22.json")
    for kind, page_size in zip(("pages-32", "pages-8"), gpu_pages.PAGES):
        streamed = kept(folder / f"{kind}-ours-22.json")
        if resident and streamed:
            print(*gpu_pages.streaming_lines(page_size, kept_ceilings(file), resident, streamed),
                  sep="\n")
    theirs, ours = (kept(folder / f"within-{kind}.json") for kind in ("plain", "pages-8"))
    if theirs and ours:
        expected, _ = kept(folder / "needs-plain.json")
        print(gpu_pages.limit_line(ours[0], expected, theirs[1], ours[1]))


def profiled():
    """Launch the kernels that are worth a profile, each twice: the first time compiles."""
    rng, W = np.random.default_rng(1), gpu_kernels.weights(gpu_kernels.LARGE, True)
    for M in 1, 16:
        x = gpu_kernels.normal(rng, M, gpu_kernels.LARGE[1])
        for w in W[:2]:
            cuda.nf4_matmul(x, w.on_card())
    for w in W[:2]:
        cuda.nf4_dequantize(w.on_card(), "bfloat16")
    q, k, v, dy = (gpu_kernels.normal(rng, 4, h, 1024, 64) for h in (32, 4, 4, 32))
    for _ in range(2):
        y, lse = cuda.attention_forward(q, k, v, True)
        cuda.attention_backward(dy, q, k, v, y, lse, True)


def main(name: str, *given: str):
    if name == "env":
        env()
    elif name == "ceilings":
        ceilings(Path(given[0]))
    elif name == "rows":
        rows(Path(given[0]), given[1], int(given[2]), float(given[3]))
    elif name == "step":
        step(given[0], int(given[1]), Path(given[2]), given[3])
    elif name in ("needs", "within"):
        {"needs": needs, "within": within}[name](given[0], Path(given[1]))
    elif name in ("step_rows", "streaming_rows"):
        {"step_rows": step_rows, "streaming_rows": streaming_rows}[name](*map(Path, given))
    elif name == "profiled":
        profiled()
    else:
        sys.exit(f"gpu_probe.py: there is no {name!r}; see its first lines")


if __name__ == "__main__":
    main(*sys.argv[1:])
