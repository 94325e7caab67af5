"""The memory of a training step, by kind and by method, and what paging does if it runs short.

    python scripts/memory_report.py                 # on the CPU, about a minute
    python scripts/memory_report.py --device cuda   # the same on a GPU, with a limit on its pool

First comes a table of bytes by kind, measured, beside what plan_memory.py predicts. Then: what
checkpoints save, and their time. Then the spike: steps of QLoRA, one with rows four times as long,
and a limit under which AdamW runs out of memory at that batch. PagedAdamW sends pages to the host
and finishes with the losses of a run without limit. On a CPU a simulated device has the limit; a
pass takes from it what it was measured to take. Draws both pictures (extra `plots`).
"""

import contextlib
import gc
import math
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from minilm import ops
from minilm.backend import memory_limit, pool_bytes, tune_allocator
from minilm.command import command
from minilm.extras import told
from minilm.files import make_place
from minilm.measure import KINDS, Ledger, held
from minilm.measure.memory import make_model, measured
from minilm.measure.plan import plan
from minilm.measure.step import Step, parameters
from minilm.optim import AdamW, PagedAdamW
from minilm.optim.pages import SLOTS
from minilm.optim.streams import SimulatedDevice
from minilm.picture import save_png
from minilm.ranges import check, power_of_two, whole
from minilm.transformer import Config

LR, RANGES = 1e-3, {"steps": whole(2), "rounds": whole(1), "page_size": power_of_two(4)}
PASSING = ("activations", "workspace")


class Moment(NamedTuple):
    """What the spike's run takes at a moment."""

    kinds: dict[str, int]  # bytes on the device
    away: int  # bytes of states in the host's memory


# On a busy machine BLAS's threads wait for each other.
@threadpool_limits.wrap(limits=1, user_api="blas")
def main(layers: int = 16, width: int = 128, context: int = 256, batch: int = 2, rank: int = 16,
         page_size: int = 1 << 14, steps: int = 12, rounds: int = 15,
         device: Literal["cpu", "cuda"] = "cpu", out: Path = Path("runs/memory.png")):
    """Memory by kind and method, and a spike.

    Args:
        layers: blocks of a Llama; checkpoints are every sqrt(layers) of them.
        width: of the model; heads are 32 wide.
        context: tokens in a row; in the spike's run, in its longest rows.
        batch: rows in a step.
        rank: of the adapters on all linear layers.
        page_size: of the paged optimizer, in parameters.
        steps: of the spike's run.
        rounds: how often each step is timed.
        device: where everything runs.
        out: file for the picture.
    """
    check(RANGES, steps=steps, rounds=rounds, page_size=page_size)
    tune_allocator()
    config = Config.llama(1024, context, layers, width // 32, width, 8 * width // 3)
    full = Step(config, "full", batch, context, rank, "all-linear", device=device)
    make_place(out)
    print(f"a Llama of {parameters(config):,} parameters, {batch} x {context} tokens, float32 on "
          f"{device}, adapters of rank {rank}\n")
    table = print_table(*methods(full, page_size))
    print_checkpoints(full, table, rounds)
    moments, budget, failed = print_spike(replace(
        full, method="qlora", checkpoint_every=math.isqrt(layers)), steps, page_size)
    print("\n" + told("both as a picture", draw(table, moments, budget, failed, out)))


def methods(full: Step, page_size: int):
    """({name: step}, {name: its optimizer, if it is not AdamW})."""
    lora, qlora = (replace(full, method=method) for method in ("lora", "qlora"))
    checkpointed = replace(qlora, checkpoint_every=math.isqrt(full.config.layers))
    paged = partial(PagedAdamW, page_size=page_size, device_budget=SLOTS * 8 * page_size)
    return {"full": full, "LoRA": lora, "QLoRA": qlora, "+ checkpoints": checkpointed,
            "+ paging": checkpointed}, {"+ paging": paged}  # each plus adds to the line above


def print_table(steps, optimizers) -> dict[str, dict[str, int]]:
    """Print a line a method, a column a kind; returns the bytes by method and kind."""
    table = {name: measured(step, optimizers.get(name, AdamW))
             for name, step in tqdm(steps.items(), unit="method", leave=False, disable=None)}
    print(f"{'MB':14}" + "".join(f"{kind:>12}" for kind in (*KINDS, "total", "planned")))
    for name, step in steps.items():
        found, planned = table[name], plan(step)
        planned = planned.total - planned.optimizer + found["optimizer"]
        cells = [*found.values(), sum(found.values()), planned]
        print(f"{name:14}" + "".join(f"{n / 1e6:12.2f}" for n in cells))
    away = table["+ checkpoints"]["optimizer"]
    print(f"With paging, states of {away / 1e6:.2f} MB wait in the host's memory.")
    return table


def print_checkpoints(full: Step, table, rounds: int):
    """What checkpoints every sqrt(n) blocks save of n blocks' activations, and what they cost.

    The goal for time is for full training, whose backward pass takes twice as long as the forward
    pass. A frozen base has no dW, so there one more forward pass is a larger share of the step.
    """
    n, every = full.config.layers, math.isqrt(full.config.layers)
    after = {"full": measured(replace(full, checkpoint_every=every)),
             "QLoRA": table["+ checkpoints"]}
    print(f"\na checkpoint every {every} of n = {n} blocks: activations and workspace, at most 2 "
          "sqrt(n) / n of\nthe plain step's and a block more, and the time of a step on one core")
    for name, peak in after.items():
        plain, found = (p["activations"] + p["workspace"] for p in (table[name], peak))
        bound = 2 * math.sqrt(n) / n * plain + plain / n
        times = in_turn([replace(full, method=name.lower(), checkpoint_every=k)
                         for k in (0, every)], rounds)
        ratios = [b / a for a, b in times]
        middle = statistics.median(ratios)
        goal = f", at most 1.4: {verdict(middle <= 1.4)}" if name == "full" else ""
        print(f"{name:6}{plain / 1e6:8.2f} MB -> {found / 1e6:.2f} MB, at most {bound / 1e6:.2f} "
              f"MB: {verdict(found <= bound)}; time x {middle:.2f} ({min(ratios):.2f} - "
              f"{max(ratios):.2f}){goal}")


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def in_turn(steps: list[Step], rounds: int) -> list[list[float]]:
    """Seconds of a step of each, in turn, for each round; a first round only warms up.

    On a CPU it is the processor's time, so other programs on the machine do not count.
    """
    clock = time.process_time if steps[0].device == "cpu" else time.perf_counter
    jobs = [(model := make_model(step), AdamW(model.parameters()), *random_batch(step, step.T))
            for step in steps]
    times = []
    for _ in tqdm(range(rounds + 1), unit="turn", leave=False, disable=None):
        times.append([])
        for model, optimizer, *batch in jobs:
            start = clock()
            loss = passes(model, optimizer, None, *batch)
            optimizer.step()
            float(loss + optimizer.flat.data[0])  # waits for a GPU
            times[-1].append(clock() - start)
    return times[1:]


def passes(model, optimizer, ledger, tokens, targets):
    """Run both passes, which leaves the gradient in the optimizer; returns the loss, an array."""
    optimizer.zero_grad()
    loss = ops.cross_entropy(model(tokens), targets)
    if ledger:
        ledger.forward_done()
    loss.backward()
    return loss.data


def random_batch(step: Step, length: int, seed: int = 0):
    """Tokens and targets, (B, length) each."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, step.config.vocab_size, (2, step.batch, length))


def print_spike(step: Step, steps: int, page_size: int):
    """Print the runs with a spike: (moments of the paged run, the limit, AdamW's steps)."""
    spike = steps // 2
    batches = [random_batch(step, step.T if i == spike else max(1, step.T // 4), i)
               for i in range(steps)]
    losses, peaks = unlimited(step, batches)
    quarters = 3 if step.device == "cpu" else 2  # of the states; a card's pool cannot use all
    budget = sum(peaks[spike].values()) - peaks[spike]["optimizer"] * quarters // 4
    calm = max(sum(peak.values()) for peak in peaks[:spike] + peaks[spike + 1 :])
    if calm > budget:
        raise ValueError(f"steps of {calm:,} bytes do not fit into the {budget:,} that the spike "
                         "has: give a larger context or batch, or a smaller rank")
    print(f"\n{steps} steps of QLoRA with checkpoints, {batches[0].shape[-1]} tokens a row, but "
          f"{step.T} in step {spike + 1}\nwanted: {calm / 1e6:.2f} MB, in the spike "
          f"{sum(peaks[spike].values()) / 1e6:.2f} MB; allowed: {budget / 1e6:.2f} MB")
    done, _, error = limited(step, batches, peaks, budget)
    print(f"AdamW:      {f'step {len(done) + 1}: {error}' if error else 'finished'}")
    found, moments, error = limited(step, batches, peaks, budget, page_size)
    same = "the same losses as" if found == losses else "OTHER LOSSES THAN"
    most = max((moment.away for moment in moments), default=0)
    print("PagedAdamW: " + (f"step {len(found) + 1}: {error}" if error else
          f"finished with {same} AdamW without a limit, bit for bit; {most / 1e6:.2f} MB of the "
          "states were in the host's memory"))
    return moments, budget, len(done)


def unlimited(step: Step, batches):
    """(losses, bytes by kind of each step) of a run of AdamW."""
    model = make_model(step)
    optimizer, losses, peaks = AdamW(model.parameters(), LR), [], []
    for batch in tqdm(batches, unit="step", leave=False, disable=None):
        with Ledger(model, optimizer) as ledger:
            loss = passes(model, optimizer, ledger, *batch)
            optimizer.step()
        losses.append(float(loss))
        peaks.append(ledger.peak)
    return losses, peaks


def limited(step: Step, batches, peaks, budget: int, page_size: int | None = None):
    """(losses, two moments of each step, what went wrong) of a run in `budget` bytes.

    With a page_size its optimizer is paged. peaks: what each step takes by kind without a limit.
    """
    gc.collect()  # the parameters of an earlier run, which are in a cycle with their receivers
    others = 0 if step.device == "cpu" else pool_bytes()  # that are not this run's
    model, losses, moments = make_model(step), [], []
    simulated = SimulatedDevice(budget) if step.device == "cpu" else None
    def note(**passing):
        pages = optimizer.table.pages if page_size else ()
        away = sum(page.nbytes for page in pages if page.frame is None)
        moments.append(Moment(held(model, optimizer) | passing, away))
    try:
        with contextlib.nullcontext() if simulated else memory_limit(budget + others):
            optimizer = placed(model, page_size, simulated)
            for batch, peak in zip(tqdm(batches, unit="step", leave=False, disable=None), peaks):
                passing = {kind: peak[kind] for kind in PASSING}
                with taken(simulated, sum(passing.values())):
                    loss = passes(model, optimizer, None, *batch)
                    note(**passing)
                optimizer.step()
                losses.append(float(loss))
                note(**dict.fromkeys(PASSING, 0))
    except MemoryError as error:
        return losses, moments, str(error)  # the error itself would keep the arrays alive
    return losses, moments, ""


def placed(model, page_size, simulated):
    """The optimizer of a model; both take their bytes from a simulated device, if there is one."""
    if page_size:
        optimizer = PagedAdamW(model.parameters(), LR, page_size=page_size, device=simulated)
    else:
        optimizer = AdamW(model.parameters(), LR)
    if simulated:
        by_kind = held(model, optimizer)
        simulated.allocate(sum(by_kind.values()) - (by_kind["optimizer"] if page_size else 0))
    return optimizer


@contextlib.contextmanager
def taken(simulated, nbytes: int):
    """Inside, the passes' bytes are taken from the simulated device; a GPU's pool counts its own.
    """
    if simulated:
        simulated.allocate(nbytes)
    yield
    if simulated:
        simulated.release(nbytes)


COLORS = dict(zip(KINDS, ("#4c566a", "#5e81ac", "#88c0d0", "#d08770", "#a3be8c", "#d8e3c8")))


def draw(table, moments, budget, failed, path: Path) -> Path | None:
    """Draw bytes by kind and method, and the spike step by step; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_methods(left, table)
    draw_spike(right, moments, budget, failed)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS),
                  frameon=False)
    return save_png(figure, path)


def draw_methods(axis, table):
    """A bar for each method, its kinds end to end."""
    names, start = list(table)[::-1], np.zeros(len(table))
    for kind in KINDS:
        sizes = np.array([table[name][kind] / 1e6 for name in names])
        axis.barh(names, sizes, left=start, color=COLORS[kind], label=kind)
        start += sizes
    for i, total in enumerate(start):
        axis.text(total, i, f" {total:.3g}", va="center")
    axis.set(xlabel="MB", title="a training step, by method", xlim=(0, 1.12 * start.max()))


def draw_spike(axis, moments, budget, failed):
    """What is on the device in the passes and the update of each step; below it, what is not."""
    x = 0.5 + np.arange(len(moments) + 1) / 2
    def line(values): return np.append(values, values[-1:]) / 1e6
    kinds = [line([moment.kinds[kind] for moment in moments]) for kind in KINDS]
    away = line([moment.away for moment in moments])
    axis.stackplot(x, *kinds, step="post", colors=COLORS.values())
    axis.fill_between(x, -away, 0, step="post", facecolor="none", edgecolor=COLORS["optimizer"],
                      hatch="////", linewidth=0)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axhline(budget / 1e6, color="black", linestyle="--", linewidth=1)
    axis.text(x[0], budget / 1e6, "limit", va="bottom")
    spike = int(np.argmax(away))
    axis.annotate(f"paged out: {away[spike]:.3g} MB", (x[spike], -away[spike] / 2), (-6, 0),
                  va="center", ha="right", textcoords="offset points")
    wanted = max(sum(moment.kinds.values()) + moment.away for moment in moments) / 1e6
    axis.plot(failed + 0.75, wanted, "x", color="#bf616a", markersize=9, markeredgewidth=2.5)
    axis.annotate("AdamW: out of memory", (failed + 0.75, wanted), (9, 0), va="center",
                  textcoords="offset points", color="#bf616a")
    axis.set(xlabel="step", ylabel="MB", ylim=(-2 * away.max(), 1.1 * wanted),
             title="PagedAdamW, and one batch of long rows")


if __name__ == "__main__":
    command(main)
