"""How long a training step takes in each stage of ZeRO: two streams simulated, and a closed form.

A rank has a stream that computes and one that sends. Each does one thing after another, and what is
ready later waits. The order is that of parallel/zero.py: a unit's gradients travel while the units
before it run backward; stage 3 gathers the next unit's parameters while a unit runs. In stages 1
and 2 all parameters are under way since the last update, and a unit waits for its own. The root
(embeddings and head) is gathered first and reduced last, and computes between forward and backward.
With L equal units, f seconds forward, b backward, g to be gathered and r to be reduced, the root's
c, G and R, and u for AdamW, the step takes

    stage 0         L f                       + c + max(L b + r, b + L r) + R + u               (1)
    stages 1, 2     G + max(g + L f, L g + f) + c + max(L b + r, b + L r) + R + u               (2)
    stage 3         G + max(g + L f, L g + f) + c + g + max(b, g) + (L-2) max(b, r+g)
                    + max(b, r) + r + R + u                                                     (3)

(3) is for two units or more. The simulation takes units that differ, too.

Sources: what travels when, Rajbhandari et al. 2020, arXiv:1910.02054, section 7, and Zhao et al.
2023, arXiv:2304.11277, section 3.3; operations, 2 P T forward and 4 P T backward for P parameters
and T tokens, Kaplan et al. 2020, arXiv:2001.08361, section 2.1.

Assumed: computing and sending do not slow each other down, unless `overlap` is off: then one stream
does both, as on CPUs, whose cores copy and add themselves. Attention's products, starting kernels,
reading data and ranks that are late are left out. It is a model, no measurement.
"""

from collections import deque
from typing import NamedTuple

from minilm.config import Config
from minilm.measure.cluster import Cluster
from minilm.measure.collectives import all_gather, all_reduce, reduce_scatter
from minilm.measure.step import parameters
from minilm.parallel.zero import IN_FLIGHT

MOVED = 28  # bytes that AdamW moves a parameter: reads g, master, m, v; writes three and 16 bits


class Unit(NamedTuple):
    """Seconds of a unit, or of the root."""

    forward: float
    backward: float
    gather: float
    reduce: float


class StepTime(NamedTuple):
    """Seconds of a step."""

    total: float
    computing: float  # AdamW's share is in it
    sending: float

    @property
    def hidden(self) -> float:
        """The share of what is sent that computing covers; 1 if nothing is sent."""
        return 1 - (self.total - self.computing) / self.sending if self.sending else 1.0


class Stream:
    """What does one thing after another."""

    def __init__(self):
        self.free = 0.0

    def run(self, ready: float, seconds: float) -> float:
        """When something is done that can begin when it is ready."""
        self.free = max(self.free, ready) + seconds
        return self.free


def simulate(stage: int, units: list[Unit], root: Unit, update: float, overlap: bool = True,
             prefetch: int = 1) -> StepTime:
    """A step of units in the order in which they run. update: AdamW's seconds.

    prefetch: how many units ahead stage 3 gathers.
    """
    computing = Stream()
    network = Stream() if overlap else computing
    flight, sent, now = deque(), [], 0.0

    def send(ready, seconds):
        sent.append(seconds)
        return network.run(ready, seconds)

    if stage:
        now = send(0.0, root.gather)
    early = [send(0.0, unit.gather) for unit in units] if stage in (1, 2) else [0.0] * len(units)
    for backward, order in ((False, units), (True, units[::-1])):
        gathered = []
        for k, unit in enumerate(order):
            now = max(now, computing.free, 0.0 if backward else early[k])
            if stage == 3:
                for ahead in order[len(gathered) : k + 1]:
                    gathered.append(send(now, ahead.gather))
                now = max(now, gathered[k])
                for ahead in order[len(gathered) : k + 1 + prefetch]:
                    gathered.append(send(now, ahead.gather))
            now = computing.run(now, unit.backward if backward else unit.forward)
            if backward:
                flight.append(send(now, unit.reduce))
            if len(flight) > IN_FLIGHT:
                now = max(now, flight.popleft())
        if not backward:
            now = computing.run(now, root.forward + root.backward)
    computing.run(send(computing.free, root.reduce), update)
    computed = sum(u.forward + u.backward for u in (*units, root)) + update
    return StepTime(max(computing.free, network.free), computed, sum(sent))


def closed_form(stage: int, L: int, unit: Unit, root: Unit, update: float) -> float:
    """Seconds of a step with L >= 2 equal units, by (1) to (3)."""
    f, b, g, r = unit
    ends = root.forward + root.backward + root.reduce + update  # c + R + u
    forward = root.gather + max(g + L * f, L * g + f) if stage else L * f
    if stage < 3:
        return forward + ends + max(L * b + r, b + L * r)  # eq. (1), (2)
    return forward + g + max(b, g) + (L - 2) * max(b, r + g) + max(b, r) + r + ends  # eq. (3)


class Job(NamedTuple):
    """What a rank does in a step."""

    P: float  # parameters of all units together
    root: float  # parameters of the root
    head: float  # those of them that tokens are multiplied with
    L: int  # units
    T: float  # tokens of a rank

    @classmethod
    def of(cls, config: Config, T: float):
        """A model whose units are its blocks, two or more."""
        N, L = parameters(config), config.layers
        P = (N - parameters(config.of_layers([0]))) * L // (L - 1)
        return cls(P, N - P, config.vocab_size * config.width, L, T)

    def parts(self, stage: int, n: int, cluster: Cluster, share: float,
              algorithm: str = "ring") -> tuple[Unit, Unit, float]:
        """(a unit, the root, AdamW's seconds) of one of n ranks.

        share: of the cards' peak that forward and backward reach. 16-bit numbers travel.
        """
        F, link = share * cluster.card.peak, cluster.link(n)

        def part(P, multiplied):
            forward, S = 2 * multiplied * self.T / F, 2 * P
            reduce = all_reduce if stage == 0 else reduce_scatter
            return Unit(forward, 2 * forward, all_gather(n, S, link, algorithm),
                        reduce(n, S, link, algorithm))

        update = MOVED * (self.P + self.root) / cluster.card.speed / (n if stage else 1)
        return part(self.P / self.L, self.P / self.L), part(self.root, self.head), update

    def step(self, stage: int, n: int, cluster: Cluster, share: float,
             algorithm: str = "ring") -> StepTime:
        """A step, simulated."""
        unit, root, update = self.parts(stage, n, cluster, share, algorithm)
        return simulate(stage, [unit] * self.L, root, update)

    def efficiency(self, *how) -> float:
        """The share of such a step in which forward and backward run."""
        unit, root, _ = self.parts(*how)
        useful = self.L * (unit.forward + unit.backward) + root.forward + root.backward
        return useful / self.step(*how).total
