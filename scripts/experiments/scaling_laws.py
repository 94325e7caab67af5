"""How large a model, and on how much text, for a given number of operations?

    python scripts/experiments/scaling_laws.py            # five minutes a seed on one core
    python scripts/experiments/scaling_laws.py --quick    # a second; the numbers mean nothing

Lecture 003 promises: "If you train a bigger model on more text, we have a lot of confidence that
next word prediction will improve." Lecture 004 has Hoffmann et al. 2022, arXiv:2203.15556: for C
operations there is a best size, it grows as fast as the text should (about C^0.5), and the text
should have about 20 tokens a parameter.

Here five Llamas of different sizes learn Python's source, byte by byte, until each has spent
C = 6 N D operations. This is done for four C. No run takes as many bytes as there are, 10 MB, and
each has a cosine schedule of its own length. The rate is 0.16 / width, 0.012 at most. N counts the
embedding, which is tied to the head: these are the numbers that a byte is multiplied with, but for
attention's products of q and k. At this size it matters what is counted, so N without the embedding
has a column of its own (Pearce & Song 2024, arXiv:2406.19146, explain by it why Kaplan et al. 2020
had a = 0.73).

The exponent a of N_opt ~ C^a is found in the three ways of minilm/measure/scaling.py. The loss is
that of held-out text for parabolas and the law, and that of training, the mean of the last tenth of
the steps so far, for the envelope. Its curves are in the middle of their schedules, which raises
them; that is a weakness of this way here. Intervals of one seed are by a bootstrap of residuals
(law.py); those of the verdicts are over seeds. If a parabola has its lowest place outside of the
five sizes, N_opt is the size at that end.

It needs scipy, which is in the extra `scaling`.
"""

from functools import cache
from itertools import pairwise

import numpy as np

from minilm import data
from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.measure import law
from minilm.measure.losses import loss_of
from minilm.measure.scaling import Curve, envelope, isoflop, power
from minilm.measure.step import parameters
from minilm.measure.verdict import by_seed, each_seed, single, verdict
from minilm.optim import AdamW, cosine_schedule
from minilm.picture import COLORS
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

QUESTION = "How large a model, and on how much text, for a given number of operations?"

SIZES = ((1, 8), (1, 12), (1, 20), (2, 20), (2, 28), (3, 32), (3, 40))  # (blocks, width)
ARMS = {  # C, and the sizes that spend it: so many that the best one lies among them
    "2e10": (2e10, SIZES[0:5]), "5e10": (5e10, SIZES[0:5]),
    "1.2e11": (1.2e11, SIZES[1:6]), "3e11": (3e11, SIZES[2:7]),
}
BATCH, LENGTH = 8, 64
BEST, BLOCKS, TOKENS = "best N", "without embeddings", "its D"
RATIO, LOW, INNER = "D / N", "its loss, nats a byte", "inner minimum"
MEASURES = {BEST: 0, BLOCKS: 0, TOKENS: 0, RATIO: 1, LOW: 3, INNER: 0}
SLIDE = {"lecture 004: D / N, about": dict.fromkeys(ARMS, 20)}
POINTS = "N, N without embeddings, D, loss"  # of each run, in the row
CURVES = "D and loss of training"


def of_seeds(rows, value) -> list[float]:
    """value(all rows of a seed) for each seed that has all arms; NaN if a row is not known."""
    found = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(row)
    return [value(some) if all(row[BEST] > 0 for row in some) else np.nan
            for some in found.values() if len(some) == len(ARMS)]


def budgets(rows) -> np.ndarray:
    """C of each row, as it was spent."""
    return np.array([np.mean([6 * N * D for N, _, D, _ in row[POINTS]]) for row in rows])


def by_parabolas(rows, losses=None, column: int = 0) -> float:
    """a by isoflop. losses (rows, runs): others than those measured. column 1: of N without
    embeddings."""
    best = [best_of(np.array(row[POINTS]), column, None if losses is None else losses[i])[0]
            for i, row in enumerate(rows)]
    return power(budgets(rows), best).a


def best_of(points, column: int = 0, losses=None):
    """(N_opt, the parabola) of runs with the same C."""
    N, L = points[:, column], points[:, 3] if losses is None else losses
    found = isoflop(N, L)
    if not found.bend > 0:
        return float(N[L.argmin()]), found
    return float(np.clip(found.best, N.min(), N.max())), found


def by_envelope(rows) -> float:
    """a by the envelope of the curves of training."""
    curves = [Curve(N, 6 * N * np.array(D), np.array(L)) for row in rows
              for (N, *_), (D, L) in zip(row[POINTS], row[CURVES])]
    C = np.geomspace(*budgets(rows)[[0, -1]], 16) * 0.99
    N = envelope(curves, C)
    known = np.isfinite(N)
    return power(C[known], N[known]).a


@cache
def fitted(points: tuple):
    """The law through all runs of a seed."""
    N, _, D, L = np.array(points).T
    return law.fit(N, D, L)


def law_of(rows):
    return fitted(tuple(tuple(point) for row in rows for point in row[POINTS]))


def interval(rows) -> str:
    """Bootstrap intervals of a, by parabolas, for each seed."""
    said = []
    for seed in sorted({row["seed"] for row in rows}):
        some = [row for row in rows if row["seed"] == seed and row[BEST] > 0]
        if len(some) == len(ARMS):
            points = np.array([row[POINTS] for row in some])  # (rows, runs, 4)
            before = [best_of(p)[1].fitted for p in points]
            estimates = law.bootstrap(
                np.ravel(before), np.log(points[..., 3]).ravel(),
                lambda w, some=some, shape=points.shape[:2]:
                    by_parabolas(some, np.exp(w).reshape(shape)), 3 * len(some))
            said.append("{:.2f} to {:.2f}".format(*law.percentiles(estimates)))
    return "; ".join(said)


def growth(rows, measure: str) -> float:
    """The least ratio of a measure from one C to the next."""
    return min(b / a for a, b in pairwise(row[measure] for row in rows))


def runs(rows) -> dict[float, list]:
    """N -> its (D, loss), D rising, of N that spent two C or more."""
    found = {}
    for row in rows:
        for N, _, D, L in row[POINTS]:
            found.setdefault(N, []).append((D, L))
    return {N: sorted(some) for N, some in sorted(found.items()) if len(some) > 1}


def gain_by_text(rows) -> float:
    """The least fall of the loss, in nats, from one D to the next of the same N."""
    return min(L - later for some in runs(rows).values() for (_, L), (_, later) in
               pairwise(some))


def gain_by_size(rows) -> float:
    """The least fall of the loss from one N to the next at the same D, by lines in ln D."""
    falls = []
    for (D, L), (other, lower) in pairwise(np.array(some).T for some in runs(rows).values()):
        at = np.log([max(D[0], other[0]), min(D[-1], other[-1])])
        if at[0] <= at[1]:
            falls += list(np.interp(at, np.log(D), L) - np.interp(at, np.log(other), lower))
    return min(falls)


CLAIMS = {
    "for each C there is a best size: the parabola is lowest between the sizes":
        lambda rows: verdict(each_seed(rows, lambda row: float(row[INNER]), min),
                             "least of the four C (1: inner)", at_least=0.5),
    "more operations: a larger best N": lambda rows: verdict(
        of_seeds(rows, lambda some: growth(some, BEST)), "least ratio to the C before", at_least=1),
    "more operations: more text for it": lambda rows: verdict(
        of_seeds(rows, lambda some: growth(some, TOKENS)), "least ratio to the C before",
        at_least=1),
    "a is 0.4 to 0.6 by parabolas": lambda rows: verdict(
        of_seeds(rows, by_parabolas), f"a (by bootstrap, a seed: {interval(rows)})", 0.4, 0.6),
    "a is 0.4 to 0.6 by the envelope": lambda rows: verdict(
        of_seeds(rows, by_envelope), "a", 0.4, 0.6),
    "a is 0.4 to 0.6 by the law": lambda rows: verdict(
        of_seeds(rows, lambda some: law_of(some).a), "a = beta / (alpha + beta)", 0.4, 0.6),
    "parabolas and law agree within 0.1": lambda rows: verdict(
        of_seeds(rows, lambda some: law_of(some).a - by_parabolas(some)), "a by law - by parabolas",
        -0.1, 0.1),
    "without embeddings a is larger by 0.05 or more": lambda rows: verdict(
        of_seeds(rows, lambda some: by_parabolas(some, column=1) - by_parabolas(some)),
        "a without - a with", at_least=0.05),
    "D is 10 to 40 times N at the largest C":
        lambda rows: single(rows, RATIO, [*ARMS][-1], 10, 40),
    "more text, the same N: prediction improves": lambda rows: verdict(
        of_seeds(rows, gain_by_text), "least fall of the loss, nats", at_least=0),
    "a bigger model, as much text: prediction improves": lambda rows: verdict(
        of_seeds(rows, gain_by_size), "least fall of the loss, nats", at_least=0),
}


@cache
def text():
    """(the stream to train on, held-out rows)."""
    tokenizer = data.ByteTokenizer()
    training, held = data.split(data.load_corpus("python-source"))
    tokens, targets = data.rows_of(held, tokenizer, LENGTH)
    some = slice(None, None, len(tokens) // 500)  # 32,000 bytes of all documents
    return data.pack(training, tokenizer), (tokens[some], targets[some])


def shape(layers: int, width: int) -> Config:
    """A Llama whose embedding is tied to its head."""
    return Config.llama(257, LENGTH, layers, 2, width, hidden=8 * width // 3, tied=True)


def learned(config: Config, C: float, seed: int, quick: bool):
    """(D, held-out loss, D and loss of training on the way) of a model that spends C."""
    stream, held = text()
    step = BATCH * LENGTH
    steps = 4 if quick else max(1, round(C / 6 / parameters(config) / step))
    lr, model = min(0.012, 0.16 / config.width), Transformer(config, seed)
    batches = data.Batches([stream], [1], BATCH, LENGTH, seed)
    trainer = Trainer(model, AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.0))
    losses = [trainer.step(i, batches[i], cosine_schedule(i, steps, lr, lr / 10, steps // 20),
                           clip=1.0).loss for i in range(steps)]
    at = np.unique(np.geomspace(max(2, steps // 20), steps, 16).round().astype(int))
    smooth = [float(np.mean(losses[n - max(1, n // 10) : n])) for n in at]
    if quick:
        held = [a[:2] for a in held]
    return steps * step, loss_of(model, *held), [(at * step).tolist(), smooth]


def measured(arm: str, seed: int, quick: bool) -> dict:
    """The numbers of one C."""
    law.minimizer()  # if scipy is not there, say it before training
    C, sizes = ARMS[arm]
    points, curves = [], []
    for layers, width in sizes:
        config = shape(layers, width)
        D, L, curve = learned(config, C, seed, quick)
        N = parameters(config)
        points.append([N, N - config.vocab_size * width, D, float(L)])
        curves.append(curve)
    best, found = best_of(np.array(points))
    spent = float(np.mean([6 * N * D for N, _, D, _ in points]))
    return {BEST: best, BLOCKS: best_of(np.array(points), 1)[0], TOKENS: spent / 6 / best,
            RATIO: spent / 6 / best**2, INNER: int(found.inner),
            LOW: float(np.exp(found.low)) if found.inner else min(p[3] for p in points),
            POINTS: points, CURVES: curves}


def draw(figure, rows):
    """The losses of each C with their parabolas, and N_opt against C."""
    left, right = figure.subplots(1, 2)
    for color, arm in zip(COLORS, ARMS):
        some = [np.array(row[POINTS]) for row in rows if row["arm"] == arm]
        for points in some:
            left.plot(points[:, 0], points[:, 3], "o", color=color, markersize=3, alpha=0.6)
        if some:
            points = np.mean(some, axis=0)
            x = np.geomspace(points[:, 0].min(), points[:, 0].max(), 50)
            curve = np.polyfit(np.log(points[:, 0]), np.log(points[:, 3]), 2)
            left.plot(x, np.exp(np.polyval(curve, np.log(x))), color=color, label=f"C = {arm}")
            right.plot([row[TOKENS] * row[BEST] * 6 for row in rows if row["arm"] == arm],
                       [row[BEST] for row in rows if row["arm"] == arm], "o", color=color,
                       markersize=4)
    left.set(xscale="log", xlabel="N", ylabel="held-out loss, nats a byte")
    left.legend(fontsize=7)
    best, C = by_seed(rows, BEST, ARMS), np.array([C for C, _ in ARMS.values()])
    if best:
        line = power(C, np.exp(np.log(best).mean(0)))
        right.plot(C, line.at(C), color=COLORS[5], label=f"C^{line.a:.2f}")
        right.legend(fontsize=7)
    right.set(xscale="log", yscale="log", xlabel="C, operations", ylabel="best N")
    left.set_xticks([3e3, 1e4, 3e4], ["3k", "10k", "30k"])
    right.set_yticks([5e3, 1e4, 2e4, 4e4], ["5k", "10k", "20k", "40k"])
    right.set_xticks(C, [*ARMS])
    for axes in (left, right):
        axes.minorticks_off()


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
