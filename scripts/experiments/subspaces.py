"""In which directions does LoRA change a model, and does it amplify what is there already?

    python scripts/experiments/subspaces.py --model runs/pretrain-*/model
    python scripts/experiments/subspaces.py --quick          # seconds; the numbers mean nothing

Lecture 002 says: LoRA potentially amplifies features that were learned, but not emphasized, in
pretraining. Its source is section 7 of Hu et al. 2021, on W_q and W_v of GPT-3: adapters of rank 8
and 64 share their top direction (phi(1, 1) above .5) and little else; and the updates amplify
directions that W has little of, 21.5 times at rank 4 and twice at 64 (table 7, layer 48).

Here adapters of ranks 4, 8 and 64 on all layers learn four tasks. Each arm's adapter is compared
with a partner, which has rank 64 and other first numbers, records and batches. So the arm of rank
64 shows two seeds. The random arm has normal numbers in the place of a trained adapter: A for phi,
and an update as large as the partner's. Its loss is the partner's. The numbers are means over the
layers q, or v, of the model (factors: geometric means). phi compares A, as in the paper; beside it
stands the same of the updates B A. Rank 64 is the whole width of pretrain.py's model. So W is
looked at along the first 4 directions of each update, whatever its rank is.
minilm/measure/subspaces.py has the equations.

A partner is trained once for a seed, and serves all arms. A run that goes on trains it again. A
seed takes about 4 minutes of one core.
"""

import tempfile
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.subspaces import along, amplification, directions, overlap, phi, similarities
from minilm.measure.verdict import compared, single, verdict
from minilm.peft.adapted import adapted_layers
from minilm.run import RunDirectory
from minilm.trial import LOSS, Trial, base, learned, loss_of_answers, low_rank, program, records_of

QUESTION = "Does LoRA amplify directions that the model already has?"

SLIDE = {}  # the slide gives no numbers
ARMS = {
    "r = 4": low_rank(4),
    "r = 8": low_rank(8),
    "r = 64": low_rank(64),
    "random, r = 8": {"r": 8, "lr": 0.0},  # nothing is learned
}
PARTNER = ARMS["r = 64"]
OTHER = 10_000  # is added to a seed for the partner's
TOP = 4  # directions

FIRST, REST = "phi(1, 1)", f"phi of directions 2 to {TOP}"
UPDATES = "phi(1, 1) of B A"
THERE, OWN = f"W along {TOP} directions of B A, % of W", f"W along its own {TOP}, % of W"
FACTOR = "amplification, times"
GRID = "phi(i, j)"  # of up to 8 directions, for the picture
EACH = {FIRST: 3, REST: 3, UPDATES: 3, THERE: 1, OWN: 1, FACTOR: 2}
MEASURES = {f"{w}: {m}": decimals for w in "qv" for m, decimals in EACH.items()} | {LOSS: 3}


def of_arm(rows, arm: str, value) -> list[float]:
    """value(row) of an arm, by seed."""
    return [value(row) for row in sorted(rows, key=lambda row: row["seed"]) if row["arm"] == arm]


def claims(w: str) -> dict:
    """What is claimed of the layers q, or v."""
    first, rest, whole, there, factor = (
        f"{w}: {m}" for m in (FIRST, REST, UPDATES, THERE, FACTOR))
    return {
        f"{w}: ranks 8 and 64 share their top direction (phi above .5)":
            lambda rows: single(rows, first, "r = 8", at_least=0.5),
        f"{w}: they share more of it than random matrices":
            lambda rows: compared(rows, first, "r = 8", "random, r = 8", at_least=0),
        f"{w}: their updates B A share more of it than random ones":
            lambda rows: compared(rows, whole, "r = 8", "random, r = 8", at_least=0),
        f"{w}: two seeds of rank 64 share more of it than random matrices":
            lambda rows: compared(rows, first, "r = 64", "random, r = 8", at_least=0),
        f"{w}: ranks 8 and 64 share less of the next directions":
            lambda rows: verdict(of_arm(rows, "r = 8", lambda row: row[first] - row[rest]),
                                 f"r = 8: {first} - that of 2 to {TOP}", at_least=0),
        f"{w}: LoRA amplifies (r = 8, factor above 1)":
            lambda rows: single(rows, factor, "r = 8", at_least=1),
        f"{w}: rank 4 amplifies more than rank 64":
            lambda rows: compared(rows, factor, "r = 4", "r = 64", at_least=0),
        f"{w}: W has more of these directions than of random ones":
            lambda rows: compared(rows, there, "r = 8", "random, r = 8", at_least=0),
    }


CLAIMS = claims("q") | claims("v")


class Update(NamedTuple):
    """What a layer learned."""

    A: np.ndarray  # (r, I)
    dW: np.ndarray  # (O, I), with the scale alpha / r
    W: np.ndarray  # (O, I), frozen


@cache
def trained(s: Trial) -> tuple[dict[str, Update], float]:
    """(path -> update, loss of the answers) of a trial, which is run once."""
    records, test = records_of(s)
    model, tokenizer = base(s.model)
    with tempfile.TemporaryDirectory() as folder:
        model = learned(model, tokenizer, records, s, RunDirectory(folder),
                        f"r = {s.r}, seed {s.seed}")[0]
    found = {}
    for path, layer in adapted_layers(model).items():
        lora = layer.adapters["default"]
        found[path] = Update(*(np.asarray(x, np.float64) for x in (
            lora.A.data, lora.update(), layer.base.plain().weight.data)))
    return found, loss_of_answers(model, tokenizer, test)


def random_updates(s: Trial, like: dict[str, Update]) -> dict[str, Update]:
    """Random matrices in the place of a trained adapter, each update as large as that of `like`."""
    rng, found = np.random.default_rng(s.seed), {}
    for path, (_, dW, W) in like.items():
        O, I = W.shape
        A, B = rng.standard_normal((s.r, I)), rng.standard_normal((O, s.r))
        found[path] = Update(A, B @ A * (np.linalg.norm(dW) / np.linalg.norm(B @ A)), W)
    return found


def measured(s: Trial, run, title: str) -> dict:
    """The numbers of one arm, and the grids of the picture."""
    others, loss = trained(replace(s, **PARTNER, seed=s.seed + OTHER))
    if s.lr:
        updates, loss = trained(s)
    else:
        updates = random_updates(s, others)
    row = {LOSS: loss}
    for w in "qv":
        of_layers = [of_layer(updates[path], others[path]) for path in updates
                     if path.endswith(f".{w}")]
        row |= {f"{w}: {m}": float(np.mean([x[m] for x in of_layers])) for m in EACH}
        row[f"{w}: {FACTOR}"] = float(np.exp(np.mean([np.log(x[FACTOR]) for x in of_layers])))
        row[f"{w}: {GRID}"] = np.mean([x[GRID] for x in of_layers], axis=0).tolist()
    return row


def of_layer(update: Update, other: Update) -> dict:
    """The numbers of EACH, and the grid, for one layer."""
    A, dW, W = update
    size, n = np.linalg.norm(W) / 100, min(8, *A.shape, len(other.A))
    return {
        FIRST: phi(A, other.A, 1, 1),
        REST: overlap(directions(A, TOP)[:, 1:], directions(other.A, TOP)[:, 1:]),
        UPDATES: phi(dW, other.dW, 1, 1),
        THERE: along(W, dW, TOP) / size, OWN: along(W, W, TOP) / size,
        FACTOR: amplification(dW, W, TOP), GRID: similarities(A, other.A, n)}


MANY = ("the tasks need many directions at once: the first one of full fine-tuning's update has a "
        "fifth of its squares (rank_compression.py), and r = 1 is not enough here (ranks.py)")
LIKELY = {f"{layer}: ranks 8 and 64 share their top direction (phi above .5)": MANY
          for layer in ("q", "v")}


def draw(figure, rows):
    """phi(i, j) as heat maps: a row for q and one for v, a column for each pair."""
    pairs = {"r = 8": "8 and 64", "r = 64": "two of 64", "random, r = 8": "random and 64"}
    pairs = {arm: label for arm, label in pairs.items() if any(row["arm"] == arm for row in rows)}
    if not pairs:
        return
    grid = figure.subplots(2, len(pairs), sharex=True, sharey=True, squeeze=False)
    for (w, line) in zip("qv", grid):
        for (arm, label), axes in zip(pairs.items(), line):
            phis = np.mean(of_arm(rows, arm, lambda row: row[f"{w}: {GRID}"]), axis=0)
            edges = np.arange(len(phis) + 1) + 0.5
            squares = axes.pcolormesh(edges, edges, phis, vmin=0, vmax=1, cmap="viridis")
            squares.set_cmap(squares.cmap.resampled(20))  # a picture of few shapes
            axes.grid(False)
            axes.set(xticks=(1, 4, 8), yticks=(1, 4, 8), aspect="equal")
            if w == "q":
                axes.set_title(label, fontsize=9)
        line[0].set_ylabel(f"{w}: i")
    for axes in grid[-1]:
        axes.set_xlabel("j")
    figure.colorbar(squares, ax=grid, label="phi(i, j), mean of the layers", shrink=0.8)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw,
                        LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
