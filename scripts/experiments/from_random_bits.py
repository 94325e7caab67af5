"""Adapters on random weights: can they take the place of pre-training?

    python scripts/experiments/from_random_bits.py            # three minutes a seed
    python scripts/experiments/from_random_bits.py --quick    # seconds; the numbers mean nothing

Lecture 004 says that QLoRA is "only for fine-tuning, not for pre-training". Here models learn a
text from nothing for 400 steps, as pretrain.py does. Then they are asked for text that was held
out.

    full                       every weight is trained
    LoRA, 32 bits              the random weights stay; adapters of rank 8 on all linear layers of
                               the blocks are trained
    QLoRA, NF4                 the same on random weights in NF4
    QLoRA, all but the codes   embedding, norms and head are trained, too
    the same, r = 64           as many ranks as the model's square layers have

If the bits were the reason, LoRA on 32 bits would be much better than QLoRA. If it is what is
frozen outside of the blocks' linear layers, the last two arms come near full. A model that gives
each byte the chance that it has in the text needs what the column of the entropy says.

Adapters alone are held back by the head: the rows of W keep the size that they had when they were
drawn, and the last norm makes each x as long as sqrt(C), so the logits W x cannot be far apart. The
column "if the next byte were known" has what the best such x gives, the mean over the held-out text
(`least_bits`). A model whose head is frozen cannot come below it. The last two arms do not have
this bound: what is frozen there are only the random codes.

Rates were compared a factor of two apart, in 150 or 400 steps on a seed that is not reported.
Adapters alone learned little at any of them.
"""

from functools import cache

import numpy as np

from minilm import data
from minilm.command import command
from minilm.experiment import Experiment, program
from minilm.measure.losses import bits_per_byte
from minilm.measure.verdict import by_arm, by_seed, compared, verdict
from minilm.optim import AdamW, cosine_schedule
from minilm.peft import add_lora, trainable_parameters
from minilm.picture import COLORS, bars
from minilm.quantize import quantize_model
from minilm.train import Trainer
from minilm.transformer import Config, Transformer

QUESTION = "Can adapters on random weights take the place of pre-training?"

SLIDE = {}  # the lecture has no number for it
FULL, LORA, QLORA = "full", "LoRA, 32 bits", "QLoRA, NF4"
ALL, HIGH = "QLoRA, all but the codes", "the same, r = 64"
STEPS = 400
ARMS = {
    FULL: {"lr": 2.5e-3},
    LORA: {"lr": 2.5e-3, "r": 8},
    QLORA: {"lr": 2.5e-3, "r": 8, "kind": "nf4"},
    ALL: {"lr": 5e-3, "r": 8, "kind": "nf4", "rest": True},
    HIGH: {"lr": 1.25e-3, "r": 64, "kind": "nf4", "rest": True},
}
TEXT, TRAINED = "held-out text, bits a byte", "trained parameters"
BYTES, BOUND = "entropy of single bytes, bits", "if the next byte were known, bits"
MEASURES = {TEXT: 3, TRAINED: 0, BYTES: 3, BOUND: 3}

CLAIMS = {
    "QLoRA is not for pre-training: 0.3 bits a byte or more behind full training":
        lambda rows: compared(rows, TEXT, QLORA, FULL, at_least=0.3),
    "it is not for their bits: QLoRA is within 0.1 bits of LoRA":
        lambda rows: compared(rows, TEXT, QLORA, LORA, -0.1, 0.1),
    "the frozen head is reason enough: with it 0.3 bits or more behind, whatever is learned":
        lambda rows: verdict([bound - loss for (bound,), (loss,) in
                              zip(by_seed(rows, BOUND, [QLORA]), by_seed(rows, TEXT, [FULL]))],
                             f"{QLORA}: {BOUND} - {FULL}: {TEXT}", at_least=0.3),
    "adapters alone learn more than how frequent each byte is": lambda rows:
        verdict([row[TEXT] - row[BYTES] for row in rows if row["arm"] == QLORA],
                f"{QLORA}: {TEXT} - {BYTES}", at_most=0),
    "with all but the codes trained, r = 8 is still behind full training":
        lambda rows: compared(rows, TEXT, ALL, FULL, at_least=0),
    "with all but the codes trained, a higher rank is better":
        lambda rows: compared(rows, TEXT, HIGH, ALL, at_most=0),
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
    """A Llama of random weights, as an arm trains it; rest: with all that is not in codes."""
    layers, width = 1 if quick else 4, 64
    model = Transformer(Config.llama(258, 128, layers=layers, heads=4, width=width,
                                     hidden=8 * width // 3), seed)
    if kind:
        quantize_model(model, kind)
    if not r:
        return model
    others = [t for _, t in model.named_tensors() if t.requires_grad]
    add_lora(model, r, 2.0 * r, "all-linear", seed=seed)
    for t in others if rest else ():
        t.become(t.data, requires_grad=True)
    return model


def least_bits(W) -> np.ndarray:
    """What the bits of each token v cannot be below: -log2 softmax(W x)_v for any |x|^2 <= C; (V,).

    W (V, C). f(x) = log softmax(W x)_v is concave, so no y has more than f(x) + f'(x) (y - x). The
    best y of the ball gives f(x) + sqrt(C) |f'(x)| - f'(x) x, which is the maximum at the best x.
    Steps along f', each cut back to the ball, come near it.
    """
    longest = np.sqrt(W.shape[1])
    squares = (W**2).sum(1, keepdims=True)
    x, rate = longest * W / np.sqrt(squares), 1 / squares.max()
    for _ in range(200):
        x += rate * slope(W, x)
        x *= np.minimum(1, longest / np.linalg.norm(x, axis=1, keepdims=True))
    logits, df = x @ W.T, slope(W, x)
    f = logits.diagonal() - np.log(np.exp(logits).sum(1))
    return -(f + longest * np.linalg.norm(df, axis=1) - (df * x).sum(1)) / np.log(2)


def slope(W, x):
    """f' at a row of x for each token: (V, C)."""
    p = np.exp(x @ W.T)
    return W - p / p.sum(1, keepdims=True) @ W


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
    targets, head = held[1][held[1] != data.IGNORED], model.head.weight
    least = 0.0 if head.requires_grad else float(least_bits(head.data)[targets].mean())
    return {TEXT: bits_per_byte(loss, targets.size, targets.size if quick else size),
            TRAINED: sum(p.size for p in optimizer.flat.params), BYTES: entropy, BOUND: least}


def draw(figure, rows):
    """Bits a byte of each arm, and the entropy of single bytes."""
    axes = figure.subplots()
    bars(axes, by_arm(rows, TEXT), lambda arm: COLORS[1 if arm == FULL else 0])
    axes.axvline(rows[0][BYTES], color=COLORS[5], linestyle="--", linewidth=1)
    axes.text(rows[0][BYTES], 1.01, "single bytes", color=COLORS[5], ha="center",
              transform=axes.get_xaxis_transform())
    axes.set(xlabel=TEXT)


LIKELY = {"adapters alone learn more than how frequent each byte is":
          "the frozen head is random bits: with it a model that knew the next byte would still "
          "need 6.2 bits (the last column), and the entropy of single bytes is 4.7"}
EXPERIMENT = Experiment(__file__, QUESTION, SLIDE, ARMS, MEASURES, CLAIMS, draw, LIKELY)
main = program(EXPERIMENT, measured)

if __name__ == "__main__":
    command(main)
