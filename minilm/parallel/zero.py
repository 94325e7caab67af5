"""Data parallelism in four stages, as one class: DDP, ZeRO-1, ZeRO-2, and ZeRO-3, which is FSDP.

Li et al. 2020, arXiv:2006.15704 (DDP); Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO); Zhao et
al. 2023, arXiv:2304.11277 (FSDP). Each rank runs micro-batches of its own; the gradients are added
up over ranks; each rank makes the step. What a rank keeps and sends is in bucket.py.

The model is cut into units, usually its blocks. A unit is what travels at once:

    backward   when a unit's gradients are all there, they begin to travel, while the backward
               passes of the units before it run. In stages 2 and 3 a rank then keeps its part only.
    step       in stages 1 and 2 a unit's parameters begin to travel when a rank has updated its
               part, and are waited for when the unit runs again.
    forward    in stage 3 a unit's parameters are gathered before it runs, and given back after. The
               next unit's are under way meanwhile. Before its backward pass they come once more.

What no unit holds, and tensors that two units share (tied embeddings are such), form the root,
whose parameters stay for the whole micro-batch. Frozen tensors have no gradients that travel, and
neither m nor v; stage 3 spreads them over the ranks too. Codes of few bits stay on every rank.

AdamW changes each element by itself, so AdamW of a part is the part of AdamW. With an ordered Comm
the parameters have, for any n and in any stage, the bits of one process that accumulates the same
micro-batches: micro-batch j of rank r is its number j n + r. What an ordered Comm costs is traffic,
if a rank has several micro-batches a step: each is added up at once, as in stages 2 and 3 always.
"""

from collections import Counter, deque
from contextlib import contextmanager

import numpy as np

from minilm.backend import array_module
from minilm.graph import thread
from minilm.optim.adamw import STEP, AdamW
from minilm.optim.flat import leaves
from minilm.parallel.bucket import Bucket
from minilm.parallel.comm import Comm
from minilm.parallel.norm import exact_squares, norm_of
from minilm.parallel.units import Unit, owners_of, watched
from minilm.ranges import check, whole
from minilm.tensor import Tensor

STATES = "parameters", "m", "v"  # of a bucket
IN_FLIGHT = 2  # buckets whose whole gradients may be kept until they have travelled


def require_host(stage: int):
    """ValueError for a stage that a GPU cannot have."""
    if stage == 3:
        raise ValueError("stage 3 is for a CPU, whose memory can be given back while the graph has "
                         "views of it; a GPU's cannot: take stage 2")


class Zero:
    """AdamW on n ranks, each with a copy of the model. `lr` may be changed between steps.

    model: a Module, equal on all ranks; the parameters that train are taken from rank 0.
    units: modules of it, in the order in which they run, each giving one Tensor.
    undecayed: parameters that have no weight decay. Settings are AdamW's, and so are their errors.

        zero = Zero(model, model.blocks, connect(), stage=2, lr=1e-3)
        for rows in mine:
            with zero.micro_batch(last=rows is mine[-1]):
                loss(model, *rows).backward()
        zero.step(clip_scale(zero.norm(), 1.0))

    The first micro-batch after a step begins a new gradient. Whoever reads parameters other than by
    running the units does so inside gathered(): from stage 1 on they may still be under way.
    TypeError or ValueError for units that are none of the model's or overlap, and for stage 3 on a
    GPU, where memory that the graph has views of cannot be given back.

    >>> from minilm.parallel.comm import Local
    >>> from minilm.nn import Linear
    >>> model = Linear(2, 1, np.random.default_rng(0), bias=False)
    >>> zero = Zero(model, [], Local(), lr=0.5, weight_decay=0.0)
    >>> before = model.weight.data.copy()
    >>> with zero.micro_batch():
    ...     model(Tensor([[1.0, -1.0]])).sum().backward()
    >>> zero.step()
    >>> (model.weight.data - before).round(3).tolist()
    [[-0.5, 0.5]]
    """

    def __init__(self, model, units, comm: Comm, stage: int = 0, lr: float = 1e-3,
                 betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01, undecayed=()):
        check(AdamW.RANGES, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        check({"stage": whole(0)}, stage=stage)
        if stage > 3 or len(betas) != 2:
            raise ValueError(f"the stages are 0 to 3 and betas are two, got {stage}, {betas}")
        self.comm, self.stage, self.lr, self.betas = comm, stage, lr, tuple(betas)
        self.eps, self.weight_decay, self.steps = eps, weight_decay, 0
        self.each = stage >= 2 or comm.ordered  # is every micro-batch added up at once?
        self.last, self.under_way, self.completed = True, False, False
        self.kept = False  # do the units' parameters stay after forward?
        self.flight, self.peak = deque(), Counter()  # peak: bytes, as `held` has them
        tensors = [t for _, t in model.named_tensors() if t.size]
        if any(array_module(t.data) is not np for t in tensors):
            require_host(stage)
        without = {id(t) for t in leaves(undecayed, "undecayed")}
        if without - {id(t) for t in tensors if t.requires_grad}:
            raise ValueError("some of undecayed are none of the model's parameters")
        owners = owners_of(tensors, units)
        self.units = [Unit(u, module, self._buckets(tensors, owners, u, without))
                      for u, module in enumerate(units)]
        self.root = Unit(-1, None, self._buckets(tensors, owners, -1, without))
        self.trained = [b for unit in (*self.units, self.root) for b in unit.trained]
        if not self.trained:
            raise ValueError("nothing of the model trains; is all of it frozen?")
        for unit in self.units:
            self._watch(unit)
            unit.release()
        self.root.release()

    def _buckets(self, tensors, owners, number, without):
        """One for each dtype, trained and frozen apart. Frozen ones travel in stage 3 only."""
        groups = {}
        for t in tensors:
            if owners[id(t)] == number and (t.requires_grad or self.stage == 3):
                groups.setdefault((t.requires_grad, str(t.dtype)), []).append(t)
        return [Bucket(group, self.comm, self.stage, without, self._ready)
                for group in groups.values()]

    # Parameters come and go

    def _watch(self, unit):
        forward = unit.module.forward

        def watched_forward(*args, **settings):
            self._before_forward(unit)
            return self._after_forward(unit, forward(*args, **settings))
        unit.module.forward = watched_forward

    def _before_forward(self, unit):
        unit.gather()
        if unit.number + 1 < len(self.units):
            after = self.units[unit.number + 1]
            if not (thread.graph and unit.again) or after.again:  # or it runs again, and ends here
                after.fetch()

    def _after_forward(self, unit, y):
        if type(y) is not Tensor:
            raise TypeError(f"a unit must give one Tensor, got {type(y).__name__}")
        once_more = thread.graph and unit.again > 0  # its backward pass comes now
        if once_more:
            unit.again -= 1
        elif not thread.graph and thread.marks and y.node:
            unit.again += 1
        if not (once_more or self.kept):
            unit.release()
        unit.passed, unit.awaits = False, unit.awaits or bool(y.node)
        return watched(y, before=lambda: self._before_backward(unit)) if y.node else y

    def _before_backward(self, unit):
        for other in self.units:
            if other is not unit and other.passed and not any(b.missing for b in other.trained):
                other.release()
        unit.gather()
        unit.passed, unit.awaits = True, False
        if unit.number and self.units[unit.number - 1].awaits:
            self.units[unit.number - 1].fetch()
        self._note()

    # Gradients

    @contextmanager
    def micro_batch(self, last: bool = True):
        """Inside, run the loss of one micro-batch and its backward pass; all ranks do so together.

        last: is it the last of this step?
        """
        if self.completed:
            self.zero_grad()
        self.comm.begin(self.steps + 1)
        self.last, self.under_way = last, True
        for unit in (*self.units, self.root):
            unit.again, unit.awaits, unit.passed = 0, False, False
            for bucket in unit.trained:
                bucket.begin()
        self.root.gather()
        yield
        for unit in (*reversed(self.units), self.root):
            for bucket in unit.trained:
                self._reduce(bucket)
            unit.release()

    def _ready(self, bucket):
        if bucket not in self.root.buckets:  # several segments may bring gradients of the root
            self._reduce(bucket)

    def _reduce(self, bucket):
        self._note()
        if bucket.reduced or not (self.each or self.last):
            return
        bucket.reduce()
        self.flight.append(bucket)
        while len(self.flight) > IN_FLIGHT:
            self.flight.popleft().finish()

    def complete(self):
        """Wait until the gradients of all ranks are added up."""
        if self.completed:
            return
        if not self.under_way or not all(b.reduced for b in self.trained):
            raise RuntimeError("a step needs zero.micro_batch(last=True) before it")
        while self.flight:
            self.flight.popleft().finish()
        present = np.concatenate([b.present for b in self.trained])
        present = self.comm.numbers(*present).any(axis=0)
        for bucket in self.trained:
            bucket.complete()
            bucket.present, present = np.split(present, [len(bucket.tensors)])
        self.completed = True

    def norm(self) -> float:
        """The global L2 norm of the gradient: the same bits for any number of ranks."""
        self.complete()
        bins = sum(exact_squares(b.gradient) for b in self.trained)
        return norm_of(self.comm.numbers(*bins).sum(axis=0) if self.stage else bins)

    def zero_grad(self):
        """Forget the gradients."""
        for bucket in self.trained:
            bucket.zero_grad()
        self.flight.clear()
        self.under_way = self.completed = False

    # The step

    def step(self, scale: float = 1.0):
        """Update all parameters by their gradients times scale."""
        check(STEP, lr=self.lr, scale=scale)
        self.complete()
        self.steps += 1
        for unit in (self.root, *self.units):  # in the order in which they are waited for
            for bucket in unit.trained:
                bucket.update(self.steps, self.lr, scale, self.betas, self.eps, self.weight_decay)
                bucket.share()

    def states(self):
        """(name, flat array) of all that a run goes on from: parameters, m and v, bucket by bucket.

        They are whole on every rank, one after another, so that no rank must hold all. All ranks
        must take them together. They are the same for any number of ranks and in any stage.
        """
        for i, bucket in enumerate(self.trained):
            for name, array in bucket.states():
                yield f"{i}.{name}", array

    def put_back(self, states: dict, steps: int = 0):
        """Go on from what states() gave after so many steps, perhaps to other ranks.

        ValueError if they are not those of such a model and such units; some may have changed.
        """
        names = {f"{i}.{name}" for i in range(len(self.trained)) for name in STATES}
        if names != set(states):
            raise ValueError(f"the states of other units: missing {sorted(names - set(states))}, "
                             f"unexpected {sorted(set(states) - names)}")
        for i, bucket in enumerate(self.trained):
            bucket.put_back({name: states[f"{i}.{name}"] for name in STATES})
            bucket.share()
        self.steps = steps
        self.zero_grad()

    @contextmanager
    def gathered(self, units: bool = True):
        """Inside, all parameters are here, to be read: saved, or run without the units' forward.

        units=False: only the root's, which is enough to run the model.
        """
        before, self.kept = self.kept, self.kept or units
        chosen = [*(self.units if units else ()), self.root]
        for unit in chosen:
            unit.gather()
        try:
            yield
        finally:
            self.kept = before
            for unit in chosen if not before else ():
                unit.release()

    def settle(self):
        """Gather all parameters to stay: the training is over, and any rank may use its model."""
        self.kept = True
        for unit in (*self.units, self.root):
            unit.gather()

    def held(self) -> Counter:
        """Bytes of parameters, gradients and states that this rank keeps now."""
        return sum((Counter(b.held()) for unit in (*self.units, self.root) for b in unit.buckets),
                   Counter())

    def _note(self):
        self.peak |= self.held()  # the larger of both, for each
