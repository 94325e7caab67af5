"""A subspace: all weights move, but only along d random directions.

Li et al. 2018, arXiv:1804.08838; Aghajanyan et al. 2020, arXiv:2012.13255. Of a model's D numbers
theta^D none is trained by itself. What is trained are d numbers theta^d, which start at zero:

    theta^D = theta^D_0 + P theta^d                                  (1)  DID
    theta^D_i = theta^D_0,i + lambda_i (P theta^(d-m))_i             (2)  SAID, of m layers i
    P = c H G Pi H B                                                 (3)  Fastfood

The least d with 90 % of the score of training all of theta^D is d90, the intrinsic dimension.

    symbol       name here            what it is
    P            Fastfood, Dense      (D, d), drawn from a seed and never stored; unit columns
    H            walsh_hadamard       (n, n) of +-1, n = 2^l >= D; H H = n I
    B, Pi, G     .B, .Pi, .G          signs, a permutation, normal numbers; G has c in it
    lambda       the last m of theta  one number a layer, at first 1

Fastfood (Le, Sarlos & Smola 2013, arXiv:1408.3060) takes O(n log n) operations and O(n) memory.
Its columns have length 1 on all n places, of which theta^D gets the first D. Dense draws each
column from the sphere, and keeps all D d numbers. A layer is a block, or what lies outside of the
blocks under one name.

The model keeps theta_0: it is the base, beside which each layer has tensors of its own, as in
retrained.py. So adapters may change places, and merging is exact. An optimizer over these tensors
alone would train all D numbers; optim/inside.py has the one that trains theta^d.

Left out: Li's sparse P; layers in codes, which cannot move by small steps.
"""

import math
import re

import numpy as np

from minilm.arrays import wide
from minilm.backend import array_module
from minilm.nn import Module
from minilm.peft.adapted import adapted_layers, insert_adapters, require_transformer, unadapted
from minilm.peft.retrained import Retrained, retrained, with_tensors
from minilm.quantize.linear import QuantizedLinear
from minilm.ranges import check, one_of, whole
from minilm.tensor import Tensor

LARGEST = 1 << 28  # numbers of a Dense: 1 GiB


def walsh_hadamard(x):
    """H x for x (2^l,), in l passes: H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]].

    Each pass adds and subtracts neighbours. That is one bit of the places, which then becomes the
    highest one, so that after l passes all is where it was. No BLAS: the bits depend on nothing.
    """
    xp, half = array_module(x), len(x) // 2
    if not len(x) or len(x) & (len(x) - 1):
        raise ValueError(f"the transform is of 2^l numbers, got {len(x)}")
    spare = xp.empty_like(x), xp.empty_like(x)
    for bit in range(len(x).bit_length() - 1):
        y = spare[bit % 2]
        xp.add(x[0::2], x[1::2], out=y[:half])
        xp.subtract(x[0::2], x[1::2], out=y[half:])
        x = y
    return x


def padded(x, n: int):
    """x with zeros behind it, n numbers in all."""
    y = array_module(x).zeros(n, x.dtype)
    y[: len(x)] = x
    return y


def power_of_2(n: int) -> int:
    """The least 2^l >= n."""
    return 1 << (n - 1).bit_length()


class Fastfood:
    """Eq. (3), cut to its first D rows and d columns.

    Behind the first k = 2^l >= d places B x is zero, and there H B x repeats every k places. So the
    right H is one of (k, k), and Pi says which of k numbers goes to each of n places.
    """

    def __init__(self, D: int, d: int, seed: int, like=None):
        xp, dtype = (np, np.float32) if like is None else (array_module(like), like.dtype)
        rng, n, k = np.random.default_rng([seed, 0]), power_of_2(D), power_of_2(d)
        self.D, self.d, self.n, self.k = D, d, n, k
        B = rng.choice([-1.0, 1.0], d)
        Pi, back = rng.permutation(n), np.empty(n, np.int32)
        back[Pi] = np.arange(n)
        G = rng.standard_normal(n)
        G /= math.sqrt(n * (G * G).sum())  # c: a column has |H G (+-1)| = sqrt(n sum G^2)
        self.B, self.G = xp.asarray(B.astype(dtype)), xp.asarray(G.astype(dtype))
        self.Pi = xp.asarray((Pi % k).astype(np.int32))  # of the k numbers that repeat
        self.back = xp.asarray(back)  # Pi^T

    def up(self, x):
        """P x: (d,) -> (D,)."""
        y = walsh_hadamard(padded(self.B * x, self.k))
        return walsh_hadamard(self.G * y[self.Pi])[: self.D]  # eq. (3)

    def down(self, y):
        """P^T y = c B H Pi^T G H y: (D,) -> (d,)."""
        z = (self.G * walsh_hadamard(padded(y, self.n)))[self.back]
        return self.B * walsh_hadamard(z.reshape(-1, self.k).sum(0))[: self.d]


class Dense:
    """P itself, whose columns are drawn from the sphere. Sums without BLAS, whose bits depend on
    how many threads it has."""

    def __init__(self, D: int, d: int, seed: int, like=None):
        xp, dtype = (np, np.float32) if like is None else (array_module(like), like.dtype)
        P = np.random.default_rng([seed, 1]).standard_normal((D, d))
        self.P = xp.asarray((P / np.linalg.norm(P, axis=0)).astype(dtype))

    def up(self, x):
        """P x: (d,) -> (D,)."""
        return (self.P * x).sum(1)

    def down(self, y):
        """P^T y: (D,) -> (d,)."""
        return (self.P * y[:, None]).sum(0)


PROJECTIONS = {"fastfood": Fastfood, "dense": Dense}


class Subspace:
    """A model's place in its subspace, and the way between theta^d and theta^D.

    theta: (d,), or for SAID (d - m,) and then lambda (m,). moved, still: the tensors of theta^D and
    of theta^D_0, in one order. layers: name -> how many of the D numbers it has, in their order.
    """

    def __init__(self, pairs: dict, d: int, said: bool, projection: str, seed: int):
        self.moved, self.still = zip(*pairs.values())
        self.settled = {}  # id of a tensor that moves -> a frozen one, for merged layers
        self.d, self.said, self.projection, self.seed = d, said, projection, seed
        self.layers = {}
        for path, (t, _) in pairs.items():
            layer = re.match(r".*?\.\d+(?=\.)|[^.]+", path)[0]
            self.layers[layer] = self.layers.get(layer, 0) + t.size
        self.D, self.m = sum(self.layers.values()), len(self.layers) if said else 0
        if not self.m < d <= self.D:
            kind = f", of which {self.m} scale a layer each" if said else ""
            raise ValueError(f"d must be {self.m + 1} to {self.D:,}{kind}; got {d}")
        if projection == "dense" and self.D * d > LARGEST:
            raise ValueError(f"a dense P would have {self.D:,} x {d:,} numbers: take fastfood")
        like = self.still[0].data
        self.theta = array_module(like).zeros(d, np.promote_types(like.dtype, np.float32))
        self.x, self.scales = self.theta[: d - self.m], self.theta[d - self.m :]  # views
        self.scales[...] = 1
        self.P = PROJECTIONS[projection](self.D, d - self.m, seed, self.theta)

    @property
    def nbytes(self) -> int:
        """Bytes of theta and of what makes P."""
        return self.theta.nbytes + sum(getattr(a, "nbytes", 0) for a in vars(self.P).values())

    def scaled(self, y):
        """Each layer's part of y (D,) times its lambda."""
        sizes = [*self.layers.values()]
        return y * array_module(y).repeat(self.scales, sizes) if self.said else y

    def up(self):
        """What is added to theta^D_0: (D,)."""
        return self.scaled(self.P.up(self.x))  # eq. (1) or (2)

    def down(self, g):
        """The gradient of theta, from that of theta^D: (D,) -> (d,)."""
        dx = self.P.down(self.scaled(g))
        if not self.said:
            return dx
        parts, ends = g * self.P.up(self.x), np.cumsum([*self.layers.values()])
        dscales = [parts[i - n : i].sum() for i, n in zip(ends, self.layers.values())]
        xp = array_module(g)
        return xp.concatenate([dx, xp.stack(dscales)])

    def gradient(self):
        """The gradient of theta, from those of the tensors; without one it counts as zero."""
        xp = array_module(self.theta)
        return self.down(xp.concatenate([
            xp.zeros(t.size, self.theta.dtype) if t.grad is None else wide(t.grad).reshape(-1)
            for t in self.moved]))

    def place(self, targets=None):
        """Write theta^D into the tensors, or into arrays like them, such as their masters."""
        targets = [t.data for t in self.moved] if targets is None else targets
        added, end = self.up(), 0
        for target, t in zip(targets, self.still):
            part = added[end : end + t.size].reshape(t.shape)
            target[...] = wide(t.data) + part  # eq. (1), rounded if the target has 16 bits
            end += t.size

    def frozen(self, t: Tensor) -> Tensor:
        """A frozen tensor of the same numbers, one for each that moves."""
        if t.data is not getattr(self.settled.get(id(t)), "data", None):
            self.settled[id(t)] = Tensor(t.data)
        return self.settled[id(t)]


class Moved(Retrained):
    """A layer whose tensors are at a subspace's point; all layers have the same `subspace`."""

    tokenwise = anywhere = True  # as in Retrained
    subspace = None

    def merged(self, base):
        """A frozen layer. Layers that share a tensor, as a tied head does, still share it."""
        return with_tensors(self.layer, **{name: self.subspace.frozen(t) for name, t
                                           in vars(self.layer).items() if isinstance(t, Tensor)})


def add_subspace(model: Module, d: int, said: bool = False, projection: str = "fastfood",
                 seed: int = 0, name: str = "default") -> Module:
    """Freeze a Transformer, and give it tensors that move in a subspace of d; returns the model.

    said: give each layer a scale, eq. (2). projection: fastfood or dense. seed: of P. The model
    starts as it is. Its Subspace is `subspace_of(model)`. ValueError if d is none of 1 to D, or for
    SAID of m + 1 to D, if a layer is quantized, if the name is taken, and while another adapter is
    merged; the model is then as it was.

    >>> from minilm.transformer import Config, Transformer
    >>> model = Transformer(Config.gpt2(vocab_size=50, context=16, layers=2, heads=2, width=8))
    >>> subspace = subspace_of(add_subspace(model, d=10))
    >>> subspace.D == sum(p.size for p in model.parameters()), subspace.theta.size
    (True, 10)
    """
    return insert_adapters(model, name, moved(model, d, said, projection, seed)[0])


def moved(model: Module, d: int, said: bool, projection: str, seed: int) -> tuple[dict, Subspace]:
    """(path -> adapter for each layer that has tensors, their Subspace); see add_subspace."""
    require_transformer(model)
    check({"d": whole(1), "seed": whole(0), "projection": one_of(*PROJECTIONS)},
          d=d, seed=seed, projection=projection)
    bases = unadapted(model)
    if codes := [path for path, m in bases.items() if type(m) is QuantizedLinear]:
        raise ValueError(f"{codes[0]} is quantized, and a subspace moves every weight by small "
                         "steps, which codes cannot take: use LoRA, which leaves them as they are")
    adapters, pairs, first = {}, {}, {}
    for path, base in bases.items():
        layer = retrained(base).layer
        for name, t in vars(base).items():
            if not isinstance(t, Tensor):
                continue
            if id(t) in first:  # a tied head
                vars(layer)[name] = first[id(t)]
            else:
                first[id(t)] = vars(layer)[name]
                pairs[f"{path}.{name}"] = vars(layer)[name], t
            adapters[path] = Moved(layer)
    subspace = Subspace(pairs, d, said, projection, seed)
    for adapter in adapters.values():
        adapter.subspace = subspace
    return adapters, subspace


def subspace_of(model: Module, name: str | None = None) -> Subspace | None:
    """The model's Subspace of this name, by default the one that acts; None if there is none."""
    for m in adapted_layers(model).values():
        if isinstance(a := m.adapters.get(m.active if name is None else name), Moved):
            return a.subspace
    return None


def degrees_of_freedom(model: Module) -> int:
    """How many numbers are trained: those of model.parameters(), but d of a subspace's."""
    subspace = subspace_of(model)
    trained = sum(p.size for p in model.parameters())
    return trained - subspace.D + subspace.d if subspace else trained
