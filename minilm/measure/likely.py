"""How likely a model finds a text; and head, middle and tail of many texts.

CCNet (Wenzek et al. 2020, arXiv:1911.00359, section 3) cuts the texts of a language into three
parts of equal size by the perplexity that a model of good text gives them. The head is most like
what the model was trained on. That is not the best text for every purpose.
"""

from collections.abc import Sequence

import numpy as np

from minilm import data
from minilm.measure.losses import bits_per_byte, loss_of

BUCKETS = ("head", "middle", "tail")


def bits_of(model, tokenizer, text: str) -> float:
    """Bits a byte of a text, which stands after an end and ends with one. An empty text, which is
    this end alone, counts as a byte."""
    ids = tokenizer.encode(text)
    stream = np.concatenate([[tokenizer.end], ids, [tokenizer.end]])
    tokens, targets = data.cut(stream, min(model.room, data.LONGEST))
    counted = int((targets != data.IGNORED).sum())
    return bits_per_byte(loss_of(model, tokens, targets), counted, max(1, len(text.encode())))


def buckets(bits: Sequence[float]) -> list[str]:
    """For each of n texts the bucket: n / 3 texts each, those of fewest bits are the head."""
    rank = np.argsort(np.argsort(bits, kind="stable"), kind="stable")
    return [BUCKETS[3 * int(r) // len(rank)] for r in rank]
