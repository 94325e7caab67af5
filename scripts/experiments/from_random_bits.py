"""Adapters on random weights: can they take the place of pre-training?

    python scripts/experiments/from_random_bits.py            # three minutes a seed
    python scripts/experiments/from_random_bits.py --quick    # seconds; the numbers mean nothing

Lecture 004 says that QLoRA is "only for fine-tuning, not for pre-training". Here models learn a
text from nothing for 400 steps, as pretrain.py does. Then they are asked for text that was held
out.

    full                 every weight is trained
    LoRA, 32 bits        the random weights stay as they are; adapters of rank 8 on all linear
                         layers are trained
    QLoRA, NF4           the same on random weights in NF4
    QLoRA, NF4, r = 64   as many ranks as the model's square layers have
    QLoRA, NF4, and all  rank 8; embedding, norms and head are trained, too
      but the codes

If the bits were the reason, LoRA on 32 bits would be much better than QLoRA. If it were what is
frozen outside of the linear layers, the last arm would be as good as full. A model that gives each
byte the chance that it has in the text needs what the column of the entropy says.

The rates are the best of four, a factor of two apart, on a seed that is not reported.
"""

from functools import cache

import numpy as np

from minilm import data
from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.measure.losses import bits_per_byte
from minilm.measure.verdict import by_arm, compared, verdict
from minilm.optim import AdamW, cosine_schedule
from minilm.peft import add_lora, trainable_parameters
from minilm.peft.adapted import adapted_layers
from minilm.picture import COLORS, bars
from minilm.quantize import quantize_model
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

QUESTION = "Can adapters on random weights take the place of pre-training?"

SLIDE = {}  # the lecture has no number for it
FULL, LORA, QLORA = "full", "LoRA, 32 bits", "QLoRA, NF4"
HIGH, ALL = "QLoRA, NF4, r = 64", "QLoRA, NF4, and all but the codes"
STEPS = 400
ARMS = {
    FULL: {"lr": 5e-3},
    LORA: {"lr": 1e-2, "r": 8},
    QLORA: {"lr": 1e-2, "r": 8, "kind": "nf4"},
    HIGH: {"lr": 5e-3, "r": 64, "kind": "nf4"},
    ALL: {"lr": 5e-3, "r": 8, "kind": "nf4", "rest": True},
}
TEXT, TRAINED = "held-out text, bits a byte", "trained parameters"
BYTES = "entropy of single bytes, bits"
MEASURES = {TEXT: 3, TRAINED: 0, BYTES: 3}

CLAIMS = {
    "QLoRA is not for pre-training: 0.3 bits a byte or more behind full training":
        lambda rows: compared(rows, TEXT, QLORA, FULL, at_least=0.3),
    "it is the frozen weights, not their bits: QLoRA is within 0.1 bits of LoRA":
        lambda rows: compared(rows, TEXT, QLORA, LORA, -0.1, 0.1),
    "not the rank alone: with r = 64 it is still behind full training":
        lambda rows: compared(rows, TEXT, HIGH, FULL, at_least=0),
    "not the embedding alone: with all trained but the codes it is still behind":
        lambda rows: compared(rows, TEXT, ALL, FULL, at_least=0),
    "adapters on random weights learn more than how frequent each byte is":
        lambda rows: verdict([row[TEXT] - row[BYTES] for row in rows if row["arm"] == QLORA],
                             f"{QLORA}: {TEXT} - {BYTES}", at_most=0),
}


@cache
def text(quick: bool):
    """(the stream to train on, held-out rows, their bytes, entropy of a byte in bits)."""
    tokenizer, parts = data.ByteTokenizer(), data.split(data.load_corpus("python-reference"))
    training, held = (part[:1] if quick else part for part in parts)
    size = sum(len(document.encode()) for document in held)
    stream = data.pack(training, tokenizer)
    p = np.bincount(stream) / len(stream)
    p = p[p > 0]
    rows = data.rows_of(held, tokenizer, 128)
    return stream, tuple(a[: 4 if quick else None] for a in rows), size, float(-p @ np.log2(p))


def untrained(seed: int, quick: bool, r: int | None = None, kind: str | None = None,
              rest: bool = False) -> Transformer:
    """A Llama of random weights, as an arm trains it."""
    layers, width = 1 if quick else 4, 64
    model = Transformer(Config.llama(258, 128, layers=layers, heads=4, width=width,
                                     hidden=8 * width // 3), seed)
    if kind:
        quantize_model(model, kind)
    if not r:
        return model
    others = [t for _, t in model.named_tensors() if t.requires_grad]
    add_lora(model, r, 2.0 * r, "all-linear", seed=seed)
    bases = {id(t) for layer in adapted_layers(model).values()
             for _, t in layer.base.named_tensors()}
    for t in others:
        if rest and id(t) not in bases:
            t.become(t.data, requires_grad=True)
    return model


def measured(arm: str, seed: int, quick: bool) -> dict:
    """The numbers of one arm."""
    how, steps = dict(ARMS[arm]), 3 if quick else STEPS
    lr = how.pop("lr")
    stream, held, size, entropy = text(quick)
    model = untrained(seed, quick, **how)
    batches = data.Batches([stream], [1], 8, 16 if quick else 128, seed)
    optimizer = AdamW(trainable_parameters(model), lr, (0.9, 0.95), weight_decay=0.0)
    trainer = Trainer(model, optimizer, seed=seed)
    for step in range(steps):
        now = cosine_schedule(step, steps, lr, lr / 20, warmup=steps // 20)
        trainer.step(step, batches[step], now, clip=1.0)
    loss, _ = trainer.evaluate(*held)
    counted = int((held[1] != data.IGNORED).sum())
    return {TEXT: bits_per_byte(loss, counted, counted if quick else size),
            TRAINED: sum(p.size for p in optimizer.flat.params), BYTES: entropy}


def draw(figure, rows):
    """Bits a byte of each arm, and the entropy of single bytes."""
    axes = figure.subplots()
    bars(axes, by_arm(rows, TEXT), lambda arm: COLORS[1 if arm == FULL else 0])
    axes.axvline(rows[0][BYTES], color=COLORS[5], linestyle="--", linewidth=1)
    axes.text(rows[0][BYTES], 1.01, "single bytes", color=COLORS[5], ha="center",
              transform=axes.get_xaxis_transform())
    axes.set(xlabel=TEXT)


EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
