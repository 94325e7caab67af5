"""AdaLoRA beside LoRA of the same budget: where does a rank go, if the training may choose?

    python scripts/experiments/adaptive_rank.py --model runs/pretrain-*/model
    python scripts/experiments/adaptive_rank.py --quick    # seconds; the numbers mean nothing

Lecture 002 shows that LoRA's rank hardly matters on two tasks, and then asks: "Adaptively adjust
rank r?" AdaLoRA (Zhang et al. 2023; the equations are in minilm/peft/budget.py) starts each matrix
with rank 6, and gives all of them together a budget of 4 a matrix. Training decides which singular
values stay. So its last update takes as many ranks as LoRA's with r = 4; LoRA with r = 8 has twice
as many.

The table has the ranks that are left, averaged over matrices of a kind and over halves of the
layers; LoRA's are what it was given. The picture has AdaLoRA's rank of every matrix. If no matrix
needed more than another, all ranks would be 4 up to chance, and no claim about them would hold.
"""

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import compared, verdict
from minilm.peft.adalora import AdaLoRA
from minilm.peft.adapted import adapted_layers
from minilm.trial import (
    KNOWN,
    LOSS,
    RIGHT,
    TASKS,
    TRAINED,
    base,
    learned,
    loss_of_answers,
    low_rank,
    old_text,
    program,
    records_of,
    right,
)

QUESTION = "Can the rank of each matrix be adjusted while it is trained?"

SLIDE = {"lecture 002: GPT-3, WikiSQL, rank on q, k, v and o, %":
         {"LoRA, r = 4": 74.0, "LoRA, r = 8": 74.0}}
ADA = "AdaLoRA, 6 to 4"
ARMS = {
    "LoRA, r = 4": low_rank(4),
    ADA: {"method": "adalora", "r": 6, "last": 4, "alpha": 12.0, "lr": 1e-2},
    "LoRA, r = 8": low_rank(8),
}
QK, VO, MLP = "rank of q and k", "rank of v and o", "rank of the MLP"
EARLY, LATE, LEFT = "rank in early layers", "rank in late layers", "rank of all"
KINDS = {"q": QK, "k": QK, "v": VO, "o": VO, "gate": MLP, "up": MLP, "down": MLP}
RANKS = (QK, VO, MLP, EARLY, LATE, LEFT)


def more(rows, a: str, b: str):
    """Is AdaLoRA's rank of a above that of b?"""
    d = [row[a] - row[b] for row in rows if row["arm"] == ADA]
    return verdict(d, f"{ADA}: {a} - {b}", at_least=0)


MOST = "the MLP gets more than q and k"
LIKELY = {
    MOST: "not known. The MLPs of the first and of the last two layers get 5 to 6 ranks a matrix, "
          "those of the second and third 0.3 to 1.3. What full fine-tuning learns on these tasks "
          "does not ask for that: there the MLP's updates take 20 to 23 directions, those of q and "
          "k 11 to 13 (k90 in spectra.py)",
}
CLAIMS = {
    "AdaLoRA gets more right than LoRA of the same budget":
        lambda rows: compared(rows, RIGHT, ADA, "LoRA, r = 4", at_least=0),
    "AdaLoRA has a lower loss than LoRA of the same budget":
        lambda rows: compared(rows, LOSS, ADA, "LoRA, r = 4", at_most=0),
    "AdaLoRA is within 2 points of LoRA with twice its budget":
        lambda rows: compared(rows, RIGHT, ADA, "LoRA, r = 8", at_least=-2, at_most=2),
    MOST: lambda rows: more(rows, MLP, QK),
    "v and o get more than q and k": lambda rows: more(rows, VO, QK),
    "late layers get more than early ones": lambda rows: more(rows, LATE, EARLY),
}


def measured(s, run, title: str) -> dict:
    """What the adapted model can do, and the ranks of its updates."""
    train, test = records_of(s)
    model, tokenizer = base(s.model)
    model, trained, _ = learned(model, tokenizer, train, s, run, title)
    return {**right(model, tokenizer, test), LOSS: loss_of_answers(model, tokenizer, test),
            KNOWN: old_text(model, tokenizer, s), TRAINED: trained, **ranks(model)}


def ranks(model) -> dict[str, float]:
    """Means of the ranks that are left, and that of each matrix as "rank, LAYER.KIND"."""
    found, groups, half = {}, {}, len(model.blocks) / 2
    for path, layer in adapted_layers(model).items():
        a = layer.adapters[layer.active]
        rank = int(np.count_nonzero(a.lam.data)) if type(a) is AdaLoRA else a.r
        number, kind = int(path.split(".")[1]), path.rpartition(".")[2]  # blocks.3.attention.q
        found[f"rank, {number}.{kind}"] = rank
        for group in (KINDS[kind], EARLY if number < half else LATE, LEFT):
            groups.setdefault(group, []).append(rank)
    return {**{group: float(np.mean(groups[group])) for group in RANKS}, **found}


def draw(figure, rows):
    """A square for each matrix, with the mean over the seeds of the rank that AdaLoRA left it."""
    rows = [row for row in rows if row["arm"] == ADA]
    if not rows:
        return
    mean = {name: np.mean([row[name] for row in rows]) for name in rows[0] if "rank, " in name}
    places = [name.removeprefix("rank, ").split(".") for name in mean]
    layers = sorted({int(layer) for layer, _ in places})
    kinds = [kind for kind in KINDS if any(kind == k for _, k in places)]
    grid = np.array([[mean[f"rank, {layer}.{kind}"] for kind in kinds] for layer in layers])
    axes = figure.subplots()
    squares = axes.pcolormesh(grid, cmap="viridis", vmin=0)  # shapes: a page takes no pixels
    squares.set_cmap(squares.cmap.resampled(20))
    for (y, x), rank in np.ndenumerate(grid):
        axes.text(x + 0.5, y + 0.5, f"{rank:.1f}", ha="center", va="center",
                  color="black" if rank > 0.6 * grid.max() else "white")
    axes.set(xticks=np.arange(len(kinds)) + 0.5, xticklabels=kinds, xlabel="matrix",
             yticks=np.array(layers) + 0.5, yticklabels=layers, ylabel="layer")
    axes.grid(False)
    figure.colorbar(squares, label="rank that AdaLoRA left")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS,
                        {RIGHT: 1, LOSS: 3, KNOWN: 2, TRAINED: 0} | dict.fromkeys(RANKS, 2)
                        | {f"{task}, %": 0 for task in TASKS}, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
