"""The loss of a model on rows of text, and bits a byte, which make tokenizers comparable."""

import math

from minilm import data, ops
from minilm.graph import no_dropout
from minilm.tensor import no_grad


def loss_of(model, tokens, targets, batch: int = 32) -> float:
    """Mean loss over the targets that count, without dropout."""
    total = 0.0
    with no_grad(), no_dropout():
        for i in range(0, len(tokens), batch):
            logits = model(tokens[i : i + batch])
            total += float(ops.cross_entropy(logits, targets[i : i + batch], total=1).data)
    return total / int((targets != data.IGNORED).sum())


def bits_per_byte(loss: float, targets: int, size: int) -> float:
    """A loss in bits a byte of the text, so that it does not depend on the tokenizer.

    loss: nats a target. targets: how many the text has. size: its bytes in UTF-8.

    >>> bits_per_byte(math.log(256), targets=10, size=10)
    8.0
    """
    return loss * targets / size / math.log(2)
