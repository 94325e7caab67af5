"""Training on ranks: the trainer that `fit` takes for a Zero, and the run's folder beside it.

All ranks run the same program on the same data. Micro-batch i of a step is that of rank i mod n;
`Zero` adds the gradients up and makes the step. Everything goes in the order of the micro-batches:
the sums of gradients (an ordered Comm), the loss, the evaluation. So any number of ranks, in any
stage, gives the bits of one rank, and a run may go on with other ranks in another stage.

One process without ranks has the same gradients, but a norm that is rounded otherwise. So its run
has other bits from the first step on whose gradient is clipped.
"""

from contextlib import contextmanager, nullcontext

import numpy as np

from minilm.backend import tune_allocator
from minilm.optim import LossScaler
from minilm.parallel.comm import Comm
from minilm.parallel.cores import OneThread
from minilm.parallel.zero import Zero
from minilm.ranges import check, whole
from minilm.run import RunDirectory
from minilm.train import Diverged, LabelLoss, Trainer, cut


class RankTrainer(Trainer):
    """Trainer on the ranks of a Zero, each with one worker, whose BLAS has one thread.

    All ranks make the same calls. `accumulate` must be a multiple of their number, or it is a
    ValueError. Afterwards, when it is left without an error, all of the model is on every rank.
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

    def step(self, step: int, *batch, **settings):
        """As Trainer.step. An error says in which step it came, and on which rank."""
        try:
            return super().step(step, *batch, **settings)
        except Diverged:  # as on all others
            raise
        except Exception as error:
            error.add_note(f"on rank {self.comm.rank} of {self.comm.size}, in step {step + 1}")
            raise

    def whole(self):
        return self.optimizer.gathered()

    def agreed(self, said):
        return bool(self.comm.numbers(said).any())

    def _gradient(self, step, batch, micro, totals, scale):
        require_even(len(micro), self.comm)
        mine, found = range(self.comm.rank, len(micro), self.comm.size), []
        overflow = "ignore" if self.scaler else None
        with np.errstate(over=overflow, invalid=overflow):  # also in sums over ranks
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
    """The folder of a run on ranks. Rank 0 writes it; the others read it, so all must see it."""

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
                pass  # rank 0 asks for this one's part

    def _cut(self, state):
        """RuntimeError if the ranks have not found the same checkpoint."""
        if len(found := {*self.comm.numbers(state["step"])[:, 0]}) > 1:
            raise RuntimeError(f"{self.path}: the ranks found checkpoints of the steps "
                               f"{sorted(map(int, found))}: it must be one folder for all of them")
        if self.writes:
            super()._cut(state)
        self.comm.barrier()  # what the others read from now on is what is left


def require_even(accumulate: int, comm: Comm):
    """ValueError if the ranks cannot have equally many micro-batches."""
    if accumulate % comm.size:
        raise ValueError(f"{accumulate} micro-batches a step cannot be shared evenly by "
                         f"{comm.size} ranks: accumulate must be a multiple of {comm.size}")
