"""Does a trained weight have rank to spare? Does the update of a fine-tuning?

    python scripts/experiments/rank_compression.py --model runs/pretrain-*/model
    python scripts/experiments/rank_compression.py --quick    # seconds; the numbers mean nothing

Lecture 002 asks about "model compression with rank decomposition", after the claim that LoRA rests
on: the update of a weight has a low rank. Here the whole model learns four tasks, W = W0 + dW in
each linear layer but the head. Then W or dW is replaced by the nearest matrix of rank r (Eckart &
Young 1936, in minilm/peft/truncate.py):

    W, r     W becomes W_r; in the first column this is done to W0, the model before the tuning
    dW, r    W becomes W0 + (W - W0)_r; W0 is at hand, so only the update is kept
    NF4      W becomes codes of four bits (QLoRA), to compare with a W_r of as many bytes

All that is kept has 16 bits, or is in NF4. The other tensors (embedding, norms, head) are those of
the fine-tuned model in all arms; "dW, r = 0" is what they do alone. A W_r of 64 x 64 takes as many
numbers as W from r = 32 on. Seeds that share a base have one number in the first column, so a
claim about it is judged by as many numbers as there are bases.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from minilm.command import command
from minilm.experiment import Experiment
from minilm.measure.verdict import compared, difference, verdict
from minilm.peft.adapted import chosen
from minilm.peft.truncate import truncate
from minilm.picture import COLORS
from minilm.quantize import quantize_4bit
from minilm.trial import (
    LOSS,
    RIGHT,
    Trial,
    base,
    learned,
    loss_of_answers,
    old_text,
    program,
    records_of,
    right,
)

QUESTION = "Can models be compressed by their rank, or only updates?"
SLIDE = {}  # the lecture asks, and gives no number


@dataclass(frozen=True)
class Compressed(Trial):
    """A fine-tuning, and what is kept of its weights. kind nf4: in NF4, not in 16 bits."""

    method: str = "full"
    lr: float = 1e-3
    of: Literal["W", "dW"] | None = None
    """what is truncated; None: nothing"""
    rank: int | None = None
    """what it is truncated to; None: what takes as many bytes as W does in NF4"""


ARMS = {
    "whole": {},
    "NF4": {"kind": "nf4"},
    "W, NF4's bytes": {"of": "W"},
    "W in NF4 factors": {"of": "W", "kind": "nf4"},
    **{f"W, r = {r}": {"of": "W", "rank": r} for r in (4, 16, 32, 48)},
    **{f"dW, r = {r}": {"of": "dW", "rank": r} for r in (0, 1, 4, 8, 16, 32)},
}
TEXT, KEPT, SQUARES = "base: bits a byte", "kept, kB", "kept of the squares, %"
MEASURES = {TEXT: 3, RIGHT: 1, LOSS: 3, KEPT: 1, SQUARES: 1}


def of_bases(a: str, b: str, at_least: float):
    """Is a's first column above b's? A base counts once: all of its seeds have the same number."""
    return lambda rows: verdict(sorted(set(difference(rows, TEXT, a, b))), f"{a} - {b}: {TEXT}",
                                at_least)


def near(r: int):
    """Does dW of rank r do what the whole does?"""
    return lambda rows: compared(rows, RIGHT, f"dW, r = {r}", "whole", at_least=-4, at_most=4)


CLAIMS = {
    "W of low rank is worse than NF4 of as many bytes": of_bases("W, NF4's bytes", "NF4", 0),
    "W in factors of NF4 is worse than NF4 of as many bytes":
        of_bases("W in NF4 factors", "NF4", 0),
    "W has no free rank: at r = 48 it loses 0.01 bits a byte or more":
        of_bases("W, r = 48", "whole", 0.01),
    **{f"dW of rank {r} is within 4 points of the whole": near(r) for r in (8, 16, 32)},
    "at r = 16 the update loses less than the weights":
        lambda rows: compared(rows, LOSS, "dW, r = 16", "W, r = 16", at_most=0),
}
TUNED = {}  # settings of the last fine-tuning -> its tensors; all arms of a seed share them


def measured(s: Compressed, run, title: str) -> dict:
    """The base's bits a byte, and what the tuned model can do, when both are compressed."""
    test = records_of(s)[1]
    after, (model, tokenizer) = tuned(s, run, title), base(s.model)
    W0 = {path: layer.weight.data.copy() for path, layer in chosen(model, "all-linear").items()}
    compress(model, W0, s)
    text = old_text(model, tokenizer, s)
    model.load_state_dict(after)
    size, squares = compress(model, W0, s)
    return {TEXT: text, **right(model, tokenizer, test),
            LOSS: loss_of_answers(model, tokenizer, test), KEPT: size / 1e3, SQUARES: squares}


def tuned(s: Compressed, run, title: str) -> dict:
    """The tensors of the fine-tuned model."""
    s = replace(s, of=None, rank=None, kind=None)
    if s not in TUNED:
        model, tokenizer = base(s.model)
        records = records_of(s)[0]
        TUNED.clear()
        TUNED[s] = learned(model, tokenizer, records, s, run, title)[0].state_dict()
    return TUNED[s]


def compress(model, W0, s: Compressed) -> tuple[int, float]:
    """Compress the linear layers; (bytes, per cent of the sum of squares of W or dW that is kept).
    """
    size, lost, whole = 0, 0.0, 0.0
    for path, layer in chosen(model, "all-linear").items():
        start = W0[path] if s.of == "dW" else 0.0
        X = layer.weight.data - start
        new, taken = kept(X, s)
        layer.weight.data[...] = start + new
        size, lost, whole = size + taken, lost + ((X - new)**2).sum(), whole + (X**2).sum()
    return size, 100 * (1 - float(lost / whole)) if whole else 100.0


def kept(X, s: Compressed):
    """(what an arm keeps of a matrix, bytes)."""
    if not s.of:
        return stored(X, s.kind)
    r = s.rank
    if r is None:
        O, I = X.shape
        r = int(stored(X, "nf4")[1] / (stored(X, s.kind)[1] / X.size) / (O + I))
    (B, b), (A, a) = (stored(factor, s.kind) for factor in truncate(X, r))
    return B @ A, b + a


def stored(X, kind: str | None):
    """(a matrix as it comes back from NF4 or float16, bytes)."""
    if kind == "nf4":
        codes = quantize_4bit(X)
        return codes.dequantize(), codes.nbytes
    half = X.astype(np.float16)
    return half.astype(np.float32), half.nbytes


def draw(figure, rows):
    """Left the base's loss by bytes, right the answers of the tuned model by rank."""
    mean = {arm: {m: np.mean([row[m] for row in rows if row["arm"] == arm]) for m in MEASURES}
            for arm in dict.fromkeys(row["arm"] for row in rows)}
    ranks = {of: {own["rank"]: mean[arm] for arm, own in ARMS.items()
                  if arm in mean and own.get("of") == of and "rank" in own} for of in ("W", "dW")}
    left, right = figure.subplots(1, 2)
    cut = ranks["W"].values()
    left.plot([m[KEPT] for m in cut], [m[TEXT] for m in cut], "o-", color=COLORS[0], markersize=4,
              label="W of rank r")
    for arm, marker, color in zip(("NF4", "W in NF4 factors", "whole"), "s^D", COLORS[2:]):
        if arm in mean:
            left.plot(mean[arm][KEPT], mean[arm][TEXT], marker, color=color, label=arm)
    for (of, found), color in zip(ranks.items(), COLORS):
        right.plot(found.keys(), [m[RIGHT] for m in found.values()], "o-", color=color,
                   markersize=4, label=of)
    if "whole" in mean:
        right.axhline(mean["whole"][RIGHT], color=COLORS[4], linestyle="--", label="whole")
    left.set(xlabel="linear layers, kB", ylabel=f"{TEXT} of old text",
             ylim=(0, 1.4 * left.get_ylim()[1]))
    right.set(xlabel="rank", ylabel=RIGHT)
    left.legend(frameon=False, fontsize=7, loc="upper right")
    right.legend(frameon=False, fontsize=7, loc="lower right")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured, Compressed)

if __name__ == "__main__":
    command(main)
