"""MeZO: training by forward passes alone, in the memory of inference.

Malladi, Gao, Nichani, Damian, Lee, Chen & Arora 2023, "Fine-tuning language models with just
forward passes", arXiv:2305.17333. For parameters theta, all d of them together, and a scalar L:

    g_j = (L(theta + eps z_j) - L(theta - eps z_j)) / (2 eps)      (1) SPSA, definition 1
    z_j ~ N(0, I), drawn again from its seed s_j whenever it is needed (2) algorithm 1
    theta = theta - eta / n (g_1 z_1 + ... + g_n z_n)              (3) ZO-SGD, definition 2; n-SPSA

For n = 1 and small eps, g z = z z^T grad L: right on average, since E[z z^T] = I, but long,

    E ||g z||^2 = (d + 2) ||grad L||^2    and    E ||mean of g_j z_j||^2 = (d + n + 1) / n of it

(lemma 2 has d + n - 1, for z on a sphere). So eta must be smaller than SGD's, by up to d times;
section 4 of the paper says why it is by less where the loss is steep in few directions.

theta itself is moved: by +eps z, by -2 eps z, and by +eps z back to where it was. Nothing is kept
of z, of a graph or of a gradient. What a step needs beyond a forward pass are the z of one block,
while no activation is alive. L may be any number, such as a count of wrong answers, since nothing
is differentiated.

A run is its list of (s, g), 12 bytes each: `replay` makes the same moves from the same start, in
the same order, and ends in the same bits. It needs no data and no forward pass.

Rounding. In float32 theta comes back to within two units in the last place. With 16 bits it is
moved in float32 and rounded after each move, so it comes back to within two units of 16 bits:
2^-10 of a number in float16, 2^-7 in bfloat16. These errors add up like a random walk, and an
update below half a unit is lost. A float32 master would restore it, but takes twice the memory of
the weights, which is what MeZO saves; so there is none.

z comes from a counter. Number k of a stream is splitmix64 (Steele, Lea & Flood 2014, "Fast
splittable pseudorandom number generators") of the seed at place k, and two normal numbers are made
of its 64 bits (Box & Muller 1958). So z_j at any place can be drawn alone, and does not depend on
the blocks that it is drawn in. Left out: the weight decay of the authors' code.
"""

import math

import numpy as np

from minilm.arrays import wide
from minilm.backend import array_module
from minilm.optim.flat import leaves
from minilm.ranges import AT_LEAST_0, POSITIVE, check, whole
from minilm.tensor import Tensor, no_grad, randomness

RECORD = np.dtype([("seed", "<u8"), ("g", "<f4")])  # what the log keeps of a z: 12 bytes
BLOCK, BLOCK_GPU = 1 << 14, 1 << 22  # numbers of z that are drawn together; any would do


class MeZO:
    """theta = theta - lr / n sum g_j z_j. `lr` may be changed between steps.

    params: Tensors, which stay where they are; they need not require a gradient. eps: how far theta
    is moved to see the slope. n: slopes of a step, for 2 n forward passes. seed: of all z.
    ValueError for settings out of range, for no parameter and for one that is given twice.

    >>> theta = Tensor(np.ones(3, np.float32))
    >>> optimizer = MeZO([theta], lr=0.1, n=3)
    >>> losses = [optimizer.step(lambda: (theta * theta).sum()) for _ in range(60)]
    >>> losses[0] > 2.9, losses[-1] < 0.01, optimizer.log.nbytes
    (True, True, 2160)
    """

    RANGES = {"lr": AT_LEAST_0, "eps": POSITIVE, "n": whole(1), "seed": whole(0)}

    def __init__(self, params, lr: float = 1e-4, eps: float = 1e-3, n: int = 1, seed: int = 0):
        check(self.RANGES, lr=lr, eps=eps, n=n, seed=seed)
        self.params = leaves(params)
        if not self.params:
            raise ValueError("no parameters were given; is the whole model frozen?")
        if len({id(p) for p in self.params}) < len(self.params):
            raise ValueError("a parameter was given twice")
        self.lr, self.eps, self.n, self.seed = lr, eps, n, seed
        self.steps, self.records = 0, []

    @property
    def log(self) -> np.ndarray:
        """The (seed, g) of all steps, n of each: (steps n,) of RECORD."""
        return np.array(self.records, RECORD)

    def step(self, loss) -> float:
        """An update; returns the mean of the 2 n losses.

        loss(): the loss of a batch at what theta is now, a number or a Tensor of one. It is called
        2 n times, without a graph, and must see the same rows each time. Dropout drops the same for
        both sides of a slope. If it raises an error, theta goes back to where it was.
        FloatingPointError, with theta back and nothing updated, if a loss is not finite.
        """
        check({"lr": AT_LEAST_0}, lr=self.lr)
        pairs = [self.sides(seed, loss) for seed in self.seeds()]
        with np.errstate(over="ignore", invalid="ignore"):
            slopes = [np.float32((plus - minus) / (2 * self.eps)) for plus, minus in pairs]  # (1)
        if not np.isfinite(slopes).all():
            raise FloatingPointError(f"step {self.steps}: the losses are {pairs}; theta is where "
                                     "it was")
        self.update(self.seeds(), slopes)
        return float(np.mean(pairs))

    def seeds(self) -> list[int]:
        """Those of the next step's z."""
        rng = np.random.default_rng([self.seed, self.steps])
        return [int(s) for s in rng.integers(2**63, size=self.n)]

    def sides(self, seed: int, loss) -> list[float]:
        """[L(theta + eps z), L(theta - eps z)]. Afterwards theta is back, up to rounding."""
        found, at = [], 0
        try:
            for side in (1, -1):
                self.move(seed, (side - at) * self.eps)  # by eps, then by -2 eps
                at = side
                with no_grad(), randomness(np.random.default_rng(seed)):
                    value = loss()
                found.append(float(value.data if isinstance(value, Tensor) else value))
        finally:
            self.move(seed, -at * self.eps)
        return found

    def update(self, seeds, slopes):
        """The step of these slopes, and its records."""
        for seed, g in zip(seeds, slopes):
            self.move(seed, -self.lr / self.n * float(g))  # eq. (3)
            self.records.append((seed, g))
        self.steps += 1

    def states(self) -> dict:
        """What the optimizer remembers of earlier steps, for a checkpoint: nothing."""
        return {}

    def put_back(self, states: dict):
        """Go on from what states() gave. How many steps were made decides the next seeds."""

    def move(self, seed: int, c: float):
        """theta = theta + c z, in place, tensor by tensor and block by block."""
        place = 0  # of a tensor's first number in z
        for p in self.params:
            xp = array_module(p.data)
            if not (isinstance(p.data, xp.ndarray) and p.data.flags.c_contiguous):
                p.data = xp.array(p.data, order="C")  # of a number or a transpose no view is flat
            flat, size = p.data.reshape(-1), BLOCK if xp is np else BLOCK_GPU
            for i in range(0, flat.size, size):
                block = flat[i : i + size]
                z = normal(seed, place + i, block.size, xp)  # eq. (2)
                z *= c
                block[...] = wide(block) + z
            place += flat.size

    def replay(self, log: np.ndarray, rates):
        """Make the steps of a log from where theta is: rates[k], or a number, is step k's lr.

        The optimizer must have the eps and n of the run that left the log, and theta be where the
        run began. It then has that run's bits, and goes on as the run would have. ValueError for a
        log that is no array of RECORD, or of no whole number of steps.
        """
        if getattr(log, "dtype", None) != RECORD or log.ndim != 1 or len(log) % self.n:
            raise ValueError(f"a log is a row of {RECORD}, {self.n} for each step; got "
                             f"{getattr(log, 'dtype', type(log).__name__)} "
                             f"{getattr(log, 'shape', '')}")
        steps = log.reshape(-1, self.n)
        for rate, step in zip(np.broadcast_to(rates, len(steps)), steps, strict=True):
            self.lr = float(rate)
            seeds = [int(s) for s in step["seed"]]
            for seed in seeds:
                self.sides(seed, lambda: 0.0)  # which moves theta, and so rounds it
            self.update(seeds, step["g"])


def normal(seed: int, start: int, n: int, xp=np):
    """Numbers start ... start + n - 1 of the seed's stream, N(0, 1): (n,) float32 of numpy or cupy.

    The same place has the same number, whatever is drawn beside it. None is above 7.5.
    """
    first = start // 2
    bits = splitmix64(seed, first, (start + n + 1) // 2 - first, xp)
    radius = (bits >> np.uint64(24)).astype(np.float32)  # 40 bits: (0, 1] below
    radius += 1
    radius *= 2.0**-40
    xp.log(radius, out=radius)
    radius *= -2
    xp.sqrt(radius, out=radius)
    bits &= np.uint64(2**24 - 1)
    angle = bits.astype(np.float32)
    angle *= 2 * math.pi / 2**24
    z = xp.empty((len(bits), 2), np.float32)
    xp.multiply(radius, xp.cos(angle), out=z[:, 0])
    xp.multiply(radius, xp.sin(angle), out=z[:, 1])
    return z.reshape(-1)[start % 2 :][:n]


def splitmix64(seed: int, start: int, n: int, xp=np):
    """Numbers start ... start + n - 1 of splitmix64's stream: (n,) uint64. seed: below 2^64.

    >>> [hex(x) for x in splitmix64(0, 0, 2).tolist()]
    ['0xe220a8397b1dcdaf', '0x6e789e6aa1b965f4']
    """
    x = xp.arange(start + 1, start + 1 + n, dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x
