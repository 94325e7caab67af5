"""Training on ranks: what the training programs do otherwise if mpiexec starts n of them.

    mpiexec -n 4 python scripts/pretrain.py --stage 2

All ranks run the same program on the same data. Micro-batch i of a step is that of rank i mod n;
`Zero` adds the gradients up and makes the step. Everything goes in the order of the micro-batches:
the sums of gradients (an ordered Comm), the loss, the evaluation. So any number of ranks, in any
stage, gives the bits of one rank, and a run may go on with other ranks in another stage.

Rank 0 writes the run's folder. The others read it, so it must lie where all can.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import tyro

from minilm.backend import tune_allocator
from minilm.optim import AdamW, LossScaler
from minilm.parallel.comm import Comm, connect
from minilm.parallel.cores import OneThread
from minilm.parallel.zero import Zero
from minilm.ranges import check, optional, whole
from minilm.run import RunDirectory
from minilm.train import LabelLoss, Trainer, cut

Ranks = tyro.conf.Suppress[Comm | None]  # the type of a program's parameter `comm`
STAGE = {"stage": optional(whole(0, 3))}


class RankTrainer(Trainer):
    """Trainer on the ranks of a Zero, each with one worker, whose BLAS has one thread.

    All ranks make the same calls. `accumulate` must be a multiple of their number. A part of a
    batch has the bits that it has in one process that accumulates as many micro-batches.
    """

    def __init__(self, model, optimizer: Zero, seed: int = 0, scaler: LossScaler | None = None,
                 loss=None):
        check({"seed": whole(0)}, seed=seed)
        self.model, self.optimizer, self.seed, self.scaler = model, optimizer, seed, scaler
        self.loss, self.comm = loss or LabelLoss(), optimizer.comm

    def __enter__(self):
        tune_allocator()
        OneThread.begin()
        return self

    def __exit__(self, error, *_):
        OneThread.end()
        if error is None:
            self.optimizer.settle()

    def whole(self):
        return self.optimizer.gathered()

    def agreed(self, said):
        return bool(self.comm.numbers(said).any())

    def _gradient(self, step, batch, micro, totals, scale):
        require_even(len(micro), self.comm)
        mine, found = range(self.comm.rank, len(micro), self.comm.size), []
        overflow = "ignore" if self.scaler else None
        with np.errstate(over=overflow, invalid=overflow):  # also of sums over ranks
            for i in mine:
                with self.optimizer.micro_batch(last=i == mine[-1]):
                    rows = [a[micro[i]] for a in batch]
                    found.append(self._backward(rows, totals, scale, (self.seed, step, 1, i, 0)))
            norm = self.optimizer.norm() / scale
        return sum(self._in_order(found)), norm

    def _change(self, scale):
        self.optimizer.step(scale)

    def _evaluated(self, arrays, pieces):
        """Each rank takes every n-th piece. All make equally many passes, as stage 3 needs it."""
        pieces, n, found = list(pieces), self.comm.size, []
        with self.optimizer.gathered(units=False):
            for i in range(self.comm.rank, -(-len(pieces) // n) * n, n):
                found.append(self._evaluate(*cut(arrays, *pieces[min(i, len(pieces) - 1)])))
        losses, right = (self._in_order(column)[: len(pieces)] for column in zip(*found))
        return np.array([losses, right]).T

    def _in_order(self, found) -> list[float]:
        """The numbers of all ranks, each of which has every n-th."""
        return self.comm.numbers(*found).T.reshape(-1).tolist()


class RankRun(RunDirectory):
    """The folder of a run on ranks. Rank 0 writes it."""

    def __init__(self, path, comm: Comm):
        super().__init__(path)
        self.comm, self.writes = comm, comm.rank == 0

    @contextmanager
    def alone(self):
        with super().alone() if self.writes else nullcontext():
            yield

    def log(self, **record):
        if self.writes:
            super().log(**record)

    def write_sample(self, step, text):
        if self.writes:
            super().write_sample(step, text)

    def save(self, step, model, optimizer, scaler=None):
        if self.writes:
            super().save(step, model, optimizer, scaler)
        else:
            for _ in optimizer.states():
                pass  # rank 0 wants this rank's part

    def _cut(self, state):
        """RuntimeError if the ranks do not see the same checkpoint."""
        if len(seen := {*self.comm.numbers(state["step"])[:, 0]}) > 1:
            raise RuntimeError(f"the ranks see checkpoints of {self.path} after the steps "
                               f"{sorted(map(int, seen))}: all must see the same folder")
        if self.writes:
            super()._cut(state)
        self.comm.barrier()  # what the others read from now on is what is left


def joined(stage: int | None, comm: Comm | None = None) -> Comm | None:
    """The ranks that this process is one of; None without a stage."""
    check(STAGE, stage=stage)
    return None if stage is None else comm or connect(ordered=True)


def require_even(accumulate: int, comm: Comm):
    """ValueError if the ranks cannot have equally many micro-batches."""
    if accumulate % comm.size:
        raise ValueError(f"accumulate must be a multiple of the {comm.size} ranks, each of which "
                         f"takes as many of a step's micro-batches; got {accumulate}")


def on_ranks(run, s, comm: Comm | None, given):
    """(run, settings) for these ranks."""
    if comm is None:
        return run, s
    if not run:
        s = replace(s, workers=1, accumulate=comm.size if s.accumulate == 1 else s.accumulate)
    require_even(s.accumulate, comm)
    return run and RankRun(run.path, comm), s


def new_run(comm: Comm | None, *described) -> RunDirectory:
    """RunDirectory.create, once for all ranks."""
    if comm is None:
        return RunDirectory.create(*described)
    path = RunDirectory.create(*described).path if comm.rank == 0 else ""
    return RankRun(told(comm, str(path)), comm)


def told(comm: Comm, text: str) -> str:
    """What rank 0 says."""
    said = text.encode("utf-8", "surrogateescape")
    said, size = np.frombuffer(said, np.uint8), int(comm.numbers(len(said))[0, 0])
    heard = said.copy() if comm.rank == 0 else np.zeros(size, np.uint8)
    comm.broadcast(heard).wait()
    return heard.tobytes().decode("utf-8", "surrogateescape")


def adamw_of(model, comm: Comm | None, stage: int | None) -> Callable:
    """AdamW, or on ranks what makes a Zero of its arguments."""
    if comm is None:
        return AdamW
    return lambda params, *settings, **named: Zero(model, model.blocks, comm, stage, *settings,
                                                   **named)
