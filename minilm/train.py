"""Training: a step of any batch and any loss, and evaluation, on one core or several.

A batch is a tuple of arrays that share their first axis. A loss has two methods:

    loss.totals(*batch)                 what it counts in a whole batch: a tuple of numbers
    loss(model, *rows, totals=totals)   a scalar: what these rows of it add to the batch's loss

Each part of a batch is divided by the whole batch's totals, so any split over micro-batches and
workers gives the same step. Padding is never counted. `LabelLoss` serves next-token prediction and
masked-token prediction, which differ only in their batches, `AnswerLoss` an encoder and a decoder.
`Distillation` is another loss.
"""

import itertools
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from minilm import ops
from minilm.arrays import wide
from minilm.backend import array_module, to_device, tune_allocator
from minilm.data import IGNORED
from minilm.graph import no_dropout
from minilm.losses import of_text
from minilm.measure.losses import alike, refuse_seen_answers
from minilm.optim.flat import clip_scale, squares
from minilm.optim.mezo import MeZO
from minilm.optim.paged import PagedAdamW
from minilm.optim.precision import LossScaler
from minilm.parallel.cores import Workers
from minilm.ranges import AT_LEAST_0, LIMIT, check, whole
from minilm.tensor import Tensor, no_grad, randomness


class Diverged(ArithmeticError):
    """A loss or a gradient is not a finite number. The step has not changed the parameters.

    With a scaler such steps are skipped, until its scale has shrunk to nothing.
    """


@dataclass(frozen=True)
class Step:
    """What a training step reports."""

    step: int  # steps done, this one included
    loss: float  # mean over the batch's targets, before the update
    norm: float  # of the gradient, before clipping; MeZO's slope |g|
    lr: float
    targets: int  # the targets that were counted: the last of the loss's totals
    seconds: float
    skipped: bool = False  # the gradient overflowed, so nothing was updated


class LabelLoss:
    """Cross-entropy of targets (B, T) under the model's logits for tokens (B, T). If it classifies
    whole texts, the targets are (B,).

    Targets of -100 do not count. A third array may be a mask (B, T), 0 for padding, whose targets
    do not count either. ValueError if a masked model is to predict tokens that it sees.
    """

    def totals(self, tokens, targets, *mask) -> tuple[int]:
        """The targets that count."""
        return (int((of_text(targets, *mask) != IGNORED).sum()),)

    def __call__(self, model, tokens, targets, *mask, totals=(None,)) -> Tensor:
        refuse_seen_answers(model, tokens, targets)
        return ops.cross_entropy(model(tokens, *mask), of_text(targets, *mask), total=totals[-1])


class AnswerLoss:
    """Cross-entropy of the targets (B, T) of an EncoderDecoder that reads tokens (B, S).

    Targets of -100 do not count. A third array may be a mask (B, S), 0 for padding of the tokens.
    """

    def totals(self, tokens, targets, *mask) -> tuple[int]:
        """The targets that count."""
        return (int((targets != IGNORED).sum()),)

    def __call__(self, model, tokens, targets, *mask, totals=(None,)) -> Tensor:
        logits = model(tokens, model.shifted(targets), *mask)
        return ops.cross_entropy(logits, targets, total=totals[-1])


class Trainer:
    """Steps of `optimizer` on `model`, on `workers` cores.

    Use it as a context manager, which starts and ends the workers. With one worker this is not
    needed. optimizer: AdamW or SGD over the model's parameters, or MeZO, which goes forward only,
    on one worker. processes: workers are forked processes (Linux) instead of threads. seed: of
    dropout. The same seed, workers and batches give the same parameters, bit for bit, also if the
    run is stopped and resumed. scaler: of the loss, for float16; with it, a step whose gradient
    overflows is skipped. loss: what is minimised, see the top of the file; by default LabelLoss().
    """

    RANGES = {"workers": whole(1), "seed": whole(0)}
    STEP = {"step": whole(0), "lr": AT_LEAST_0, "clip": LIMIT, "accumulate": whole(1)}

    def __init__(self, model, optimizer, workers: int = 1, processes: bool = False, seed: int = 0,
                 scaler: LossScaler | None = None, loss=None):
        check(self.RANGES, workers=workers, seed=seed)
        forward = isinstance(optimizer, MeZO)
        if not (forward or hasattr(optimizer, "flat")):
            raise TypeError("optimizer must be AdamW, SGD or their like over the model's "
                            f"parameters, got {type(optimizer).__name__}")
        if not isinstance(scaler, LossScaler | None):
            raise TypeError(f"scaler must be a LossScaler or None, got {scaler!r}")
        if forward and (workers > 1 or scaler):
            raise ValueError("MeZO goes forward on one worker and without a scaler, got "
                             f"{workers} workers and {scaler}")
        flat = optimizer if forward else optimizer.flat
        on_gpu = array_module(flat.params[0].data) is not np
        if processes and (on_gpu or isinstance(optimizer, PagedAdamW)):
            raise ValueError("processes cannot share a GPU's memory, nor PagedAdamW's pages: "
                             "train there with threads")
        self.model, self.optimizer, self.seed, self.scaler = model, optimizer, seed, scaler
        self.loss = loss or LabelLoss()
        self.workers = Workers(flat, self, workers, processes)

    def __enter__(self):
        tune_allocator()
        self.workers.__enter__()
        return self

    def __exit__(self, *error):
        self.workers.__exit__(*error)

    def step(self, step: int, batch: tuple, lr: float | None = None, clip: float = math.inf,
             accumulate: int = 1) -> Step:
        """One update from one batch, run as `accumulate` micro-batches one after another.

        step: its number from 0; dropout depends on it. lr: by default the optimizer's. clip: the
        largest global gradient norm. ValueError if the loss counts nothing in the batch, and if
        the optimizer holds what no longer trains (see FlatParameters.check) or none of what the
        loss depends on. Diverged if the loss or the norm is not finite and no scaler can help.
        """
        start, opt = time.perf_counter(), self.optimizer
        lr = opt.lr if lr is None else lr
        check(self.STEP, step=step, lr=lr, clip=clip, accumulate=accumulate)
        size, totals = _length(batch), self.loss.totals(*batch)
        if not all(totals):
            raise ValueError(f"step {step}: the loss counts nothing in this batch; is every "
                             f"target {IGNORED}?")
        if not 1 <= accumulate <= size:
            raise ValueError(f"{accumulate} micro-batches cannot be made of {size} rows")
        if isinstance(opt, MeZO):
            return self._forward_only(step, batch, totals, lr, clip, accumulate)
        scale = self.scaler.scale if self.scaler else 1.0
        micro = np.array_split(np.arange(size), accumulate)
        loss, norm = self._gradient(step, batch, micro, totals, scale)
        good = self._is_good(step, loss, norm)
        if good:
            opt.lr = lr
            self._change(clip_scale(norm, clip) / scale)
        seconds = time.perf_counter() - start
        return Step(step + 1, loss, norm, lr, totals[-1], seconds, not good)

    def evaluate(self, tokens, targets, *mask, batch: int = 32) -> tuple[float, float]:
        """(mean loss, share of targets predicted rightly) over all rows, without dropout.

        mask (B, T): 0 for padding, which the model must not see and which does not count. batch:
        rows at a time. Targets (B,) are of whole texts. ValueError if no target counts.
        """
        _length((tokens, targets, *mask))
        check({"batch": whole(1)}, batch=batch)
        targets = of_text(targets, *mask)
        totals, arrays, counted = np.zeros(2), (tokens, targets, *mask), (targets != IGNORED).sum()
        if not counted:
            raise ValueError(f"there is nothing to evaluate: every target is {IGNORED}")
        pieces = alike(self.model, targets, *mask, batch=batch)
        for found in self._evaluated(arrays, pieces):
            totals += found
        loss, right = totals / counted
        return float(loss), float(right)

    def whole(self):
        """A context in which all of the model is here, to be read."""
        return nullcontext()

    def agreed(self, said: bool) -> bool:
        """Whether this process says so, or one that trains with it."""
        return said

    def _gradient(self, step, batch, micro, totals, scale) -> tuple[float, float]:
        """(loss, norm) of the batch, whose rows come in these micro-batches."""
        self.optimizer.flat.check()
        self.optimizer.zero_grad()
        loss = 0.0
        for i, rows in enumerate(micro):
            # The 1 keeps dropout's stream apart from the batches' (seed, step).
            parts = [([a[r] for a in batch], totals, scale, (self.seed, step, 1, i, w))
                     for w, r in enumerate(self._split(rows))]
            loss += sum(self.workers.run(Trainer._backward, parts))
        self.optimizer.flat.complete()
        self._require_its_own(step)
        return loss, math.sqrt(sum(self._everywhere(Trainer._squares))) / scale

    def _change(self, scale):
        """The update, by the gradient times scale."""
        self.optimizer.step(scale, lambda *args: self._everywhere(Trainer._update, *args))

    def _evaluated(self, arrays, pieces):
        """What `_evaluate` gives of each piece: some rows, and how much of their width."""
        for rows, width in pieces:
            parts = [cut(arrays, r, width) for r in self._split(rows)]
            yield np.sum(self.workers.run(Trainer._evaluate, parts), axis=0)

    def _require_its_own(self, step):
        """ValueError if the optimizer holds what is none of the model's."""
        flat = self.optimizer.flat
        if not flat.present.any():
            raise ValueError(f"step {step}: no parameter of the optimizer has a gradient; is it "
                             "the optimizer of another model?")
        if flat.present.all():
            return
        own = {id(t) for _, t in self.model.named_tensors()}
        for i, (p, here) in enumerate(zip(flat.params, flat.present)):
            if not here and id(p) not in own:  # a loss may have some of its own, with gradients
                raise ValueError(f"step {step}: parameter {i} of the optimizer, {p.shape}, is none "
                                 "of the model's and has no gradient: make the optimizer after a "
                                 "module is replaced")

    def _forward_only(self, step, batch, totals, lr, clip, accumulate) -> Step:
        if accumulate > 1 or clip < math.inf:
            raise ValueError("MeZO has no gradient to accumulate or to clip, got "
                             f"{accumulate} micro-batches and a norm of at most {clip}")
        start, opt = time.perf_counter(), self.optimizer
        self.model.train()
        opt.lr = lr
        try:
            loss = opt.step(lambda: self.loss(self.model, *batch, totals=totals))
        except FloatingPointError as error:
            raise Diverged(f"{error}; nothing was updated") from None
        slope = abs(float(opt.records[-1][1]))
        return Step(step + 1, loss, slope, lr, totals[-1], time.perf_counter() - start)

    def _is_good(self, step, loss, norm):
        """May the update be made? False if the step must be skipped."""
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

    def _everywhere(self, method, *args):
        """Call a method on all of the flat buffers: each worker takes a slice of its own."""
        size, n = self.optimizer.flat.data.size, self.workers.count
        ends = [size * w // n // 4 * 4 for w in range(n)] + [size]  # kernels take fours
        slices = [slice(*pair) for pair in itertools.pairwise(ends)]
        return self.workers.run(method, [(part, *args) for part in slices])

    # What a worker does.

    def _backward(self, rows, totals, scale, seed) -> float:
        """Add the gradient of some rows; returns what they add to the loss."""
        self.model.train()
        overflow = "ignore" if self.scaler else None  # the scaler deals with it
        with np.errstate(over=overflow, invalid=overflow):
            with randomness(np.random.default_rng(seed)):
                loss = self.loss(self.model, *rows, totals=totals)
            (loss * scale if self.scaler else loss).backward()
        return float(loss.data)

    def _squares(self, part: slice) -> float:
        return squares(self.optimizer.flat.grad[part])

    def _update(self, part: slice, t: int, lr: float, scale: float):
        self.optimizer.update(part, t, lr, scale)

    def _evaluate(self, tokens, targets, *mask) -> tuple[float, int]:
        refuse_seen_answers(self.model, tokens, targets)
        with no_grad(), no_dropout():
            logits = self.model(tokens, *mask)
            loss = ops.cross_entropy(logits, targets, total=1)
        guesses = to_device(wide(logits.data).argmax(-1), "cpu")
        return float(loss.data), int((guesses == targets).sum())


def cut(arrays, rows, width) -> tuple:
    """These rows of the arrays, those of more axes than one at a width of so many columns."""
    return tuple(a[rows, :width] if a.ndim > 1 else a[rows] for a in arrays)


def _length(batch) -> int:
    """How many rows a batch has. TypeError or ValueError if it is no tuple of equally long arrays.
    """
    if not isinstance(batch, (tuple, list)):
        raise TypeError(f"a batch is a tuple of arrays, got {type(batch).__name__}")
    if others := [type(a).__name__ for a in batch if not hasattr(a, "shape")]:
        raise TypeError(f"a batch is a tuple of arrays, got one with {', '.join(others)}")
    lengths = {len(a) for a in batch}
    if len(lengths) != 1:
        raise ValueError("the arrays of a batch must share their first axis, got "
                         f"{[a.shape for a in batch]}")
    return lengths.pop()
