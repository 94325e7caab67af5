"""What rank is enough: errors of the best adapters by rank, and gradient descent beside them.

    python scripts/experiments/expressive_power.py            # about a minute
    python scripts/experiments/expressive_power.py --quick    # seconds; the numbers mean nothing

Lecture 000 shows Zeng & Lee 2023: LoRA can adapt a model f to a smaller target if its rank is at
least width(f) depth(target) / depth(f). Lecture 001 says that any W is B A. Lectures 003 and 004
say that the rank is the number of independent columns.

The paper proves its bound for linear and for ReLU nets, with random weights, biases that are
trained too, and bounded inputs; here its adapters are built, and their errors measured. Gradient
descent trains adapters of the linear net from B = 0. It minimises Frobenius' norm, in which the
paper's adapters are the best, too. The paper's transformers have square heads, no residual
branches and no norms. In them attention sees Wk^T Wq, a product of two layers, so half the width is
enough. That says nothing about the models of this package, which have all three.

An arm is a frozen net of D x L (width and depth) with adapters of rank R. If a block counts as a
layer, 64 x 8 is the shape of pretrain.py's model, and 128 x 4 that of --width 128 --layers 4.
minilm/measure/expressive.py has the equations.
"""

from typing import NamedTuple

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.measure.expressive import (
    adapted,
    closed_form,
    closed_form_of_nets,
    independent_columns,
    least_rank,
    product,
    relu_net,
)
from minilm.measure.verdict import each_seed, verdict
from minilm.optim import AdamW, cosine_schedule
from minilm.picture import COLORS
from minilm.tensor import Tensor

QUESTION = "What rank is enough to turn one model into another?"

SLIDE = {}  # the slides give formulas, no numbers


class Case(NamedTuple):
    """A frozen net, and the rank of its adapters."""

    D: int  # width
    L: int  # depth
    R: int


SHAPES = {(16, 4): (1, 2, 3, 4, 8, 16), (64, 8): (7, 8, 16, 32), (128, 4): (31, 32, 64)}
ARMS = {f"{D} x {L}, R = {R}": Case(D, L, R) for (D, L), ranks in SHAPES.items() for R in ranks}

ERROR, SIGMA = "linear net: error in the 2-norm", "singular value R L + 1 of E"
LEFT, DESCENT = "its error in Frobenius' norm, % of E", "gradient descent's, % of E"
ONE, TWO = "ReLU, target of 1 layer: error, %", "ReLU, target of 2 layers: error, %"
HEAD, ALONE = "Wk^T Wq: error, %", "W as B A alone: error, %"
COLUMNS, VALUES = "independent columns of B A", "its singular values that are not 0"
ENOUGH = {1: "rank for 1 layer", 2: "rank for 2 layers"}  # by the slide
OWN, HALF = "rank for its own depth", "rank in the paper's transformers"
MEASURES = {ERROR: 4, SIGMA: 4, LEFT: 2, DESCENT: 2, ONE: 2, TWO: 2, HEAD: 2, ALONE: 2, COLUMNS: 0,
            VALUES: 0, ENOUGH[1]: 0, ENOUGH[2]: 0, OWN: 0, HALF: 0}
NOTHING = 1e-4  # per cent


def of_seeds(rows, value, which, pick=max) -> list[float]:
    """For each seed the largest value(row), or what pick takes, of the arms with which(case)."""
    return each_seed([row for row in rows if which(ARMS[row["arm"]])], value, pick)


def enough(c: Case) -> bool: return c.R * c.L >= c.D
def one_less(c: Case) -> bool: return least_rank(c.D, c.L, 1) == c.R + 1
def always(c: Case) -> bool: return True


BELOW = "Any W is B A of a rank below its own, to 1 %"
LIKELY = {
    BELOW: "the slide names no rank. B A of rank R leaves the singular values of W beyond R, and a "
           "random W has many that are not small: at half of its rank 32 to 34 % of it are left, "
           "at every width here",
}
CLAIMS = {
    "The best adapters of a linear net leave the singular value R L + 1 of E":
        lambda rows: verdict(of_seeds(rows, lambda r: abs(r[ERROR] - r[SIGMA]), always),
                             "largest difference", at_most=1e-6),
    "A linear net becomes any W from R = D / L on":
        lambda rows: verdict(of_seeds(rows, lambda r: r[ERROR], enough), "largest error",
                             at_most=1e-6),
    "With one rank less it does not":
        lambda rows: verdict(of_seeds(rows, lambda r: np.log10(r[ERROR]), one_less, min),
                             "smallest error, as a power of 10", at_least=-3),
    "Gradient descent from B = 0 comes within 1 % of E of the best adapters":
        lambda rows: verdict(of_seeds(rows, lambda r: r[DESCENT] - r[LEFT], always),
                             "largest difference, % of E", at_most=1),
    "A ReLU net becomes any layer at the slide's rank, D / L":
        lambda rows: verdict(of_seeds(rows, lambda r: r[ONE], enough), f"largest: {ONE}",
                             at_most=NOTHING),
    "It becomes any net of two layers at the slide's rank, 2 D / L":
        lambda rows: verdict(of_seeds(rows, lambda r: r[TWO],
                                      lambda c: c.R >= least_rank(c.D, c.L, 2)),
                             f"largest: {TWO}", at_most=NOTHING),
    "In the paper's transformers half the width is enough for Wk^T Wq":
        lambda rows: verdict(of_seeds(rows, lambda r: r[HEAD], lambda c: 2 * c.R >= c.D),
                             f"largest: {HEAD}", at_most=NOTHING),
    "By the formula a rank of a quarter of the width is enough for a target of one layer":
        lambda rows: verdict(of_seeds(rows, lambda r: r[ENOUGH[1]] / ARMS[r["arm"]].D, always),
                             "largest rank / width", at_most=0.26),
    "By the formula a target as deep as the model takes a rank as large as the width":
        lambda rows: verdict(of_seeds(rows, lambda r: r[OWN] / ARMS[r["arm"]].D, always, min),
                             "smallest rank / width", at_least=0.99),
    BELOW:
        lambda rows: verdict(of_seeds(rows, lambda r: r[ALONE], lambda c: c.R < c.D, min),
                             f"smallest: {ALONE}", at_most=1),
    "Any W is B A from its own rank on":
        lambda rows: verdict(of_seeds(rows, lambda r: r[ALONE], lambda c: c.R >= c.D),
                             f"largest: {ALONE}", at_most=NOTHING),
    "The rank of B A, as many singular values as are not 0, is its number of independent columns":
        lambda rows: verdict(of_seeds(rows, lambda r: abs(r[COLUMNS] - r[VALUES]), always),
                             "largest difference", at_most=0.5),
}


def measured(arm: str, seed: int, quick: bool) -> dict:
    """The errors of one arm. The seed gives a shape the same weights at every rank."""
    (D, L, R), rng = ARMS[arm], np.random.default_rng(seed)
    Ws = [np.linalg.qr(rng.standard_normal((D, D)))[0] for _ in range(L)]  # rotations
    W = rng.standard_normal((D, D)) / np.sqrt(D)
    E = W - product(Ws)
    left = W - product(adapted(Ws, closed_form(Ws, W, R)))
    S = np.append(np.linalg.svd(E, compute_uv=False), 0)
    B, A = closed_form([np.zeros((D, D))], W, R)[0]  # B A alone, the best approximation of W
    values = np.linalg.svd(B @ A, compute_uv=False)
    descent = descended(Ws, W, min(R, D), 10 if quick else 1000, rng)
    def share(left, whole): return float(100 * np.linalg.norm(left) / np.linalg.norm(whole))
    head = product(adapted(Ws[:2], closed_form(Ws[:2], W, R)))
    return {
        ERROR: float(np.linalg.norm(left, 2)), SIGMA: float(S[min(R * L, D)]),
        LEFT: share(left, E), DESCENT: share(descent, E),
        ONE: error_of_net(Ws, 1, R, rng), TWO: error_of_net(Ws, 2, R, rng),
        HEAD: share(head - W, W), ALONE: share(B @ A - W, W),
        COLUMNS: float(len(independent_columns(B @ A))),
        VALUES: float((values > 1e-9 * values[0]).sum()),
        ENOUGH[1]: float(least_rank(D, L, 1)), ENOUGH[2]: float(least_rank(D, L, 2)),
        OWN: float(least_rank(D, L, L)), HALF: float(-(-D // 2))}


def descended(Ws, W, R: int, steps: int, rng) -> np.ndarray:
    """W less the adapted product, after AdamW has made its squares small: (D, D)."""
    D = len(W)
    As = [Tensor(rng.standard_normal((R, D)) / np.sqrt(D), requires_grad=True) for _ in Ws]
    Bs = [Tensor(np.zeros((D, R)), requires_grad=True) for _ in Ws]
    optimizer = AdamW([*As, *Bs], weight_decay=0.0)
    for step in range(steps + 1):
        P = Tensor(np.eye(D))
        for w, B, A in zip(Ws, Bs, As):
            P = (Tensor(w) + B @ A) @ P
        error = Tensor(W) - P
        if step == steps:
            return error.data
        optimizer.zero_grad()
        (error * error).sum().backward()
        optimizer.lr = cosine_schedule(step, steps, 3e-2, warmup=steps // 5)
        optimizer.step()


def error_of_net(Ws, depth: int, R: int, rng) -> float:
    """How far the paper's adapted ReLU net is from a random one of this depth, %, by its outputs
    for inputs of length sqrt(D) or less."""
    D = len(Ws[0])
    targets = [(rng.standard_normal((D, D)) * np.sqrt(2 / D), rng.standard_normal(D) / 2)
               for _ in range(depth)]
    x = rng.standard_normal((D, 256))
    x *= np.sqrt(D) * rng.uniform(0, 1, 256) / np.linalg.norm(x, axis=0)
    adapters, biases = closed_form_of_nets(Ws, targets, R, radius=np.sqrt(D))
    y, wanted = relu_net(adapted(Ws, adapters), biases, x), relu_net(*zip(*targets), x)
    return float(100 * np.linalg.norm(y - wanted) / np.linalg.norm(wanted))


def draw(figure, rows):
    """The errors of the narrowest net by rank: best adapters as lines, gradient descent as dots."""
    axes = figure.subplots()
    rows = [row for row in rows if row["arm"].startswith("16 x 4")]
    ranks = sorted({ARMS[row["arm"]].R for row in rows})
    kinds = {LEFT: ("4 layers, best adapters", "-"), DESCENT: ("gradient descent", "o"),
             ALONE: ("W as B A, 1 layer", "-")}
    for (measure, (label, style)), color in zip(kinds.items(), COLORS):
        means = [np.mean([r[measure] for r in rows if ARMS[r["arm"]].R == R]) for R in ranks]
        axes.plot(ranks, means, style, color=color, label=label)
    axes.set(xlabel="rank R of each adapter (width 16)", ylabel="error, % of what is to be learned",
             xticks=ranks)
    axes.legend(frameon=False)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
