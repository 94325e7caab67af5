"""The loss of a model on rows of text, and a unit of it in which tokenizers can be compared."""

import math

from minilm import data, ops
from minilm.tensor import no_grad


def loss_of(model, tokens, targets, batch: int = 32) -> float:
    """Mean loss over the targets that count."""
    total = 0.0
    with no_grad():
        for i in range(0, len(tokens), batch):
            logits = model.eval()(tokens[i : i + batch])
            total += float(ops.cross_entropy(logits, targets[i : i + batch], total=1).data)
    return total / int((targets != data.IGNORED).sum())


def bits_per_byte(loss: float, targets: int, size: int) -> float:
    """The bits that a byte of a text costs, whatever its tokens are.

    loss: nats a target. targets: of the text. size: its bytes in UTF-8.

    >>> bits_per_byte(math.log(256), targets=10, size=10)
    8.0
    """
    return loss * targets / size / math.log(2)
