"""What goes wrong in half precision, by hand, and what mends it.

    python scripts/experiments/half_precision.py            # five minutes a seed
    python scripts/experiments/half_precision.py --quick    # seconds; the numbers mean nothing

Lecture 004 asks "why not just use half-precision?", and answers: weight updates are imprecise
(unstable loss), gradients can underflow (very small numbers replaced by 0), gradients can overflow
(very large numbers replaced by nan/inf). Mixed precision, with an update in full precision, has "no
loss in task-specific accuracy". minilm/optim/precision.py has the cures, which training programs
always take. Here a small Llama learns a text from nothing for 250 steps, with and without them:

    masters    the rule changes float32 copies of the weights. Without them the rule's result is
               rounded to 16 bits after each step, and the next step begins with what is left
    scaler     the loss is multiplied, by 2^16 at first, and the gradients are divided
    / 4096     the loss is divided by 2^12, and the gradients are multiplied. So are those of a step
               here, 512 tokens, if they are a part of a batch of 2 million tokens, as large models
               have: each part's loss is divided by the tokens of the whole batch

AdamW's states are float32 in every arm. Shares are defined in minilm/measure/rounding.py:

    gradients that are 0     of those that are not 0 in float32 with the same weights and batch;
                             the mean of ten steps
    no effect                updates after which the number that the rule changes is what it was,
                             the mean of all steps that were made
    at loss x 2^28           the gradients of the last state, if the loss is multiplied by 2^28

The picture has these gradients for other scales, too. Held-out text is read in float32. The arms
without a scaler take longest: NumPy is slow with numbers below float16's smallest normal one.
"""

from functools import cache
from statistics import fmean

import numpy as np

from minilm import data
from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.measure.losses import bits_per_byte, loss_of
from minilm.measure.rounding import not_finite, unmoved, vanished
from minilm.measure.verdict import by_arm, compared, single
from minilm.optim import AdamW, LossScaler, cosine_schedule
from minilm.picture import COLORS
from minilm.train import LabelLoss, Trainer
from minilm.transformer import Config, Transformer

QUESTION = "What goes wrong in half precision, and do masters and a loss scale mend it?"

F32, PLAIN, MIXED = "float32", "float16, plain", "float16, masters, scaler"
SCALER, LARGE = "float16, scaler", "float16, masters, / 4096"
BF16, BF16_PLAIN = "bfloat16, masters", "bfloat16, plain"
ARMS = {  # (dtype, masters, what the loss is multiplied by, whether that is adjusted)
    F32: ("float32", True, 1.0, False),
    PLAIN: ("float16", False, 1.0, False),
    SCALER: ("float16", False, 2.0**16, True),
    LARGE: ("float16", True, 2.0**-12, False),
    MIXED: ("float16", True, 2.0**16, True),
    BF16_PLAIN: ("bfloat16", False, 1.0, False),
    BF16: ("bfloat16", True, 1.0, False),
}
SLIDE = {"lecture 004: largest number": {
    arm: 340_282e33 if arm == F32 else 65_504 for arm in ARMS if not arm.startswith("b")}}
TEXT, ZERO, STILL = "held-out text, bits a byte", "gradients that are 0, %", "no effect, %"
SKIPPED, INF = "steps skipped", "inf or nan at loss x 2^28, %"
MEASURES = {TEXT: 3, ZERO: 2, STILL: 2, SKIPPED: 0, INF: 1}
SCALES = range(-16, 33, 4)  # powers of 2
NEAR = 0.03  # bits a byte


def at(k: int, share: str) -> str:
    """The name of a share at a loss times 2^k."""
    return INF if (k, share) == (28, "inf or nan") else f"{share} at loss x 2^{k}, %"


SMALL = "gradients underflow: in float16 1 % or more in a small batch"
LIKELY = {
    SMALL: "they do, but only .05 to .44 % of them: the gradients of a mean over 512 tokens are "
           "large enough. In the model that is learned 1.4 % are 0 if the loss is a 16th of that, "
           "and 12 % if it is a 256th",
}
CLAIMS = {
    "updates are imprecise: in float16 1 % or more have no effect":
        lambda rows: single(rows, STILL, SCALER, at_least=1),
    "with masters 1 % at most have no effect":
        lambda rows: single(rows, STILL, MIXED, at_most=1),
    "bfloat16 loses more updates than float16":
        lambda rows: compared(rows, STILL, BF16_PLAIN, SCALER, at_least=0),
    SMALL:
        lambda rows: single(rows, ZERO, PLAIN, at_least=1),
    "gradients underflow: in float16 1 % or more in a part of a large batch":
        lambda rows: single(rows, ZERO, LARGE, at_least=1),
    "with a scaler 0.1 % at most": lambda rows: single(rows, ZERO, MIXED, at_most=0.1),
    "in bfloat16 0.1 % at most": lambda rows: single(rows, ZERO, BF16, at_most=0.1),
    "gradients overflow: in float16 with the loss x 2^28, half of them or more":
        lambda rows: single(rows, INF, MIXED, at_least=50),
    "imprecise updates cost loss: float16, without and with masters":
        lambda rows: compared(rows, TEXT, SCALER, MIXED, at_least=0),
    "imprecise updates cost loss: bfloat16, without and with masters":
        lambda rows: compared(rows, TEXT, BF16_PLAIN, BF16, at_least=0),
    "underflow costs loss: float16 with masters in parts of a large batch, without a scaler":
        lambda rows: compared(rows, TEXT, LARGE, MIXED, at_least=0),
    f"no loss in accuracy: float16 with both is within {NEAR} bits of float32":
        lambda rows: compared(rows, TEXT, MIXED, F32, -NEAR, NEAR),
    f"no loss in accuracy: bfloat16 with masters is within {NEAR} bits of float32":
        lambda rows: compared(rows, TEXT, BF16, F32, -NEAR, NEAR),
}


@cache
def text(quick: bool):
    """(the stream to train on, held-out rows, their bytes)."""
    tokenizer, parts = data.ByteTokenizer(), data.split(data.load_corpus("python-reference"))
    training, held = (part[:1] if quick else part for part in parts)
    tokens, targets = (a[: 4 if quick else None] for a in data.rows_of(held, tokenizer, 64))
    size = (sum(len(document.encode()) for document in held) if not quick
            else int((targets != data.IGNORED).sum()))
    return data.pack(training, tokenizer), (tokens, targets), size


def untrained(seed: int, quick: bool) -> Transformer:
    """A Llama of random weights."""
    layers, width = (1, 16) if quick else (4, 64)
    return Transformer(Config.llama(258, 64, layers=layers, heads=4, width=width,
                                    hidden=8 * width // 3), seed)


def measured(arm: str, seed: int, quick: bool) -> dict:
    """The numbers of one arm."""
    stream, held, size = text(quick)
    batches = data.Batches([stream], [1], 4 if quick else 8, 16 if quick else 64, seed)
    model, twin = (untrained(seed, quick) for _ in range(2))
    row = trained(model, twin, batches, *ARMS[arm], steps=4 if quick else 250)
    for k in SCALES:
        right, found = (gradient(m, batches[0], 2.0**k) for m in (twin, model))
        row |= {at(k, "0"): 100 * vanished(right, found),
                at(k, "inf or nan"): 100 * not_finite(found)}
    return row | {TEXT: bits_per_byte(loss_of(twin, *held), int((held[1] >= 0).sum()), size)}


def trained(model, twin, batches, dtype: str, masters: bool, scale: float, adjusted: bool,
            steps: int, lr: float = 5e-3) -> dict:
    """Train the model in a dtype; the twin ends with its weights in float32. Returns shares."""
    optimizer = AdamW(model.astype(dtype).parameters(), lr, (0.9, 0.95), weight_decay=0.0)
    flat, scaler = optimizer.flat, None
    if scale != 1:
        scaler = LossScaler(scale, interval=2000 if adjusted else steps + 1)
    trainer, zero, still = Trainer(model, optimizer, scaler=scaler), [], []
    for step in range(steps):
        before, batch = flat.data.copy(), batches[step]
        if look := step % max(1, steps // 10) == 0:
            twin.load_state_dict(model.state_dict())
        now = cosine_schedule(step, steps, lr, lr / 20, warmup=steps // 20)
        done = trainer.step(step, batch, now, clip=1.0)
        if look:
            zero.append(vanished(gradient(twin, batch), gradients(model)))
        if not masters:
            flat.data[...] = flat.rounded
        if not done.skipped:
            still.append(unmoved(before, flat.data, optimizer.m))  # m = 0: there was no update
    twin.load_state_dict(model.state_dict())
    return {ZERO: 100 * fmean(zero), STILL: 100 * fmean(still or [0.0]),
            SKIPPED: scaler.skipped if scaler else 0}


def gradient(model, batch, scale: float = 1.0) -> np.ndarray:
    """The gradient of the loss times a scale, over all parameters."""
    for p in model.parameters():
        p.node.grad = None
    loss = LabelLoss()
    with np.errstate(over="ignore", invalid="ignore"):
        (loss(model, *batch, totals=loss.totals(*batch)) * scale).backward()
        return gradients(model)


def gradients(model) -> np.ndarray:
    """The gradients that the parameters have, end to end."""
    return np.concatenate([p.grad.ravel() for p in model.parameters()])


def draw(figure, rows):
    """Left the shares that a scale loses at either end, right the held-out text."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for arm, color in ((MIXED, COLORS[1]), (BF16, COLORS[0])):
        for share, line in (("0", "-"), ("inf or nan", "--")):
            found = [by_arm(rows, at(k, share)).get(arm, []) for k in SCALES]
            if all(found):
                left.plot(SCALES, [np.mean(x) for x in found], line, color=color,
                          label=f"{arm.split(',')[0]}: {share}")
    left.set(xlabel="loss times 2 to the", ylabel="gradients, %", ylim=(-3, 103))
    left.legend(frameon=False, fontsize=7, loc="upper center")
    found = by_arm(rows, TEXT)
    for y, arm in enumerate(arms := [*found][::-1]):
        color = COLORS[1 if arm.startswith("float16") else 0]
        right.plot(found[arm], [y] * len(found[arm]), "o", color=color, markersize=4, alpha=0.7,
                   markeredgewidth=0)
    right.set_yticks(range(len(arms)), arms, fontsize=7)
    right.set(xlabel="bits a byte")


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
