"""Training: steps and evaluation of one model, on one core or several.

A batch is (tokens, targets), integers (B, T); targets of -100 do not count. Next-token prediction
and masked-LM prediction differ in their batches only. The loss is divided by the number of targets
in the whole batch, so any split over micro-batches and workers gives the same step.
"""

import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from minilm import ops
from minilm.arrays import wide
from minilm.backend import array_module, to_device, tune_allocator
from minilm.data import IGNORED
from minilm.optim.flat import squares
from minilm.optim.paged import PagedAdamW
from minilm.optim.precision import LossScaler
from minilm.parallel.cores import Workers
from minilm.tensor import Tensor, no_grad, randomness


class Diverged(ArithmeticError):
    """A loss or a gradient that is not a finite number; the step left the parameters alone.

    With a scaler such steps are skipped, until its scale has shrunk to nothing.
    """


@dataclass(frozen=True)
class Step:
    """What a training step reports."""

    step: int  # steps done, this one included
    loss: float  # mean over the batch's targets, before the update
    norm: float  # of the gradient, before clipping
    lr: float
    targets: int  # that were counted
    seconds: float
    skipped: bool = False  # its gradient overflowed, and nothing was updated


class Trainer:
    """Steps of `optimizer` on `model`, on `workers` cores; use as a context manager.

    optimizer: AdamW or SGD over the model's parameters. processes: forked processes rather than
    threads as workers (Linux). seed: of dropout; with the same seed, workers and batches the same
    parameters come out, bit for bit, whether or not a run was stopped and resumed in between.
    scaler: of the loss, for float16; a step whose gradient overflows is then skipped.
    loss: what is minimised, a function like `label_loss`.
    """

    def __init__(self, model, optimizer, workers: int = 1, processes: bool = False, seed: int = 0,
                 scaler: LossScaler | None = None, loss=None):
        on_gpu = array_module(optimizer.flat.data) is not np
        if processes and (on_gpu or isinstance(optimizer, PagedAdamW)):
            raise ValueError("processes cannot share a GPU's memory, nor PagedAdamW's pages: "
                             "train there with threads")
        self.model, self.optimizer, self.seed, self.scaler = model, optimizer, seed, scaler
        self.loss = loss or label_loss
        self.workers = Workers(optimizer.flat, self._work, workers, processes)

    def __enter__(self):
        tune_allocator()
        self.workers.__enter__()
        return self

    def __exit__(self, *error):
        self.workers.__exit__(*error)

    def step(self, step: int, tokens, targets, lr: float | None = None, clip: float = math.inf,
             accumulate: int = 1) -> Step:
        """One update from one batch, run as `accumulate` micro-batches one after another.

        clip: the largest global gradient norm. Diverged when the loss or the norm is not finite,
        and no scaler can help it.
        """
        start, counted = time.perf_counter(), int((targets != IGNORED).sum())
        if counted == 0:
            raise ValueError(f"step {step}: every target is {IGNORED}; nothing to learn from")
        if not 1 <= accumulate <= len(tokens):
            raise ValueError(f"{accumulate} micro-batches cannot be made of {len(tokens)} rows")
        opt, scale = self.optimizer, self.scaler.scale if self.scaler else 1.0
        lr = opt.lr if lr is None else lr
        opt.zero_grad()
        loss, totals = 0.0, (tokens.size, counted)
        for i, rows in enumerate(np.array_split(np.arange(len(tokens)), accumulate)):
            # The 1 keeps dropout's stream apart from the batches' (seed, step).
            parts = [("gradients", (self.seed, step, 1, i, w), tokens[r], targets[r], totals,
                      scale) for w, r in enumerate(self._split(rows))]
            loss += sum(self.workers.run(parts))
        opt.flat.complete()
        norm = math.sqrt(sum(self._everywhere("squares"))) / scale
        good = self._is_good(step, loss, norm)
        if good:
            opt.lr, opt.steps, clipped = lr, opt.steps + 1, min(1.0, clip / norm) if norm else 1.0
            self._everywhere("update", opt.steps, lr, clipped / scale)
        return Step(step + 1, loss, norm, lr, counted, time.perf_counter() - start, not good)

    def evaluate(self, tokens, targets, batch: int = 32) -> tuple[float, float]:
        """(mean loss, share of targets predicted rightly) over all rows, without dropout."""
        totals = np.zeros(2)
        for i in range(0, len(tokens), batch):
            rows = np.arange(i, min(i + batch, len(tokens)))
            parts = [("evaluate", tokens[r], targets[r]) for r in self._split(rows)]
            totals += np.sum(self.workers.run(parts), axis=0)
        loss, right = totals / max(1, (targets != IGNORED).sum())
        return float(loss), float(right)

    def _is_good(self, step, loss, norm):
        """May the update be made? False where the step is to be skipped."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        if self.scaler:
            self.scaler.update(finite)
        if not finite and (self.scaler is None or self.scaler.exhausted):
            tried = f" at a loss scale down to {self.scaler.scale}" if self.scaler else ""
            raise Diverged(f"step {step}: loss {loss}, gradient norm {norm}{tried}; "
                           "nothing was updated")
        return finite

    def _split(self, rows):
        return [part for part in np.array_split(rows, self.workers.count) if len(part)]

    def _everywhere(self, job, *args):
        """A job on the whole flat buffers, each worker on a slice of its own."""
        size, n = self.optimizer.flat.data.size, self.workers.count
        ends = [size * w // n // 4 * 4 for w in range(n)] + [size]  # kernels take fours
        slices = [slice(*pair) for pair in itertools.pairwise(ends)]
        return self.workers.run([(job, part, *args) for part in slices])

    def _work(self, part):
        """What a worker is told: the job's name and its arguments."""
        job, *args = part
        return getattr(self, f"_{job}")(*args)

    def _gradients(self, seed, tokens, targets, totals, scale):
        self.model.train()
        overflow = "ignore" if self.scaler else None  # the scaler is there to meet it
        with np.errstate(over=overflow, invalid=overflow):
            with randomness(np.random.default_rng(seed)):
                loss = self.loss(self.model, tokens, targets, totals)
            (loss * scale if self.scaler else loss).backward()
        return float(loss.data)

    def _evaluate(self, tokens, targets):
        self.model.eval()
        with no_grad():
            logits = self.model(tokens)
            loss = ops.cross_entropy(logits, targets, total=1)
        guesses = to_device(wide(logits.data).argmax(-1), "cpu")
        return float(loss.data), int((guesses == targets).sum())

    def _squares(self, part):
        return squares(self.optimizer.flat.grad[part])

    def _update(self, part, *args):
        self.optimizer.update(part, *args)


def label_loss(model, tokens, targets, totals) -> Tensor:
    """Cross-entropy of the targets. totals: numbers of tokens and of targets in the whole batch."""
    return ops.cross_entropy(model(tokens), targets, total=totals[1])


def train(trainer: Trainer, batches, steps: int, schedule, start: int = 0, clip: float = 1.0,
          accumulate: int = 1) -> Iterator[Step]:
    """Steps start .. steps - 1, yielded when done; schedule(step) is a step's learning rate."""
    for step in range(start, steps):
        yield trainer.step(step, *batches[step], schedule(step), clip, accumulate)


def default_workers() -> tuple[int, bool]:
    """(workers, processes) that suit this machine: every core, processes where fork is safe."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores, sys.platform == "linux" and cores > 1


@contextmanager
def finish_on_interrupt():
    """A first Ctrl-C only makes the yielded function return True; a second one interrupts."""
    pressed = []

    def press(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
