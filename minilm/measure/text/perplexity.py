"""Perplexity: among how many tokens the model seems to choose, as it reads what is right.

Jelinek et al. 1977, Perplexity: a measure of the difficulty of speech recognition tasks. For the
tokens w_1 ... w_N of all outputs, each given its prompt and the tokens before it,

    perplexity = exp(-(1 / N) sum_i ln p(w_i | what is before))                               (1)

A model that gives each of V tokens the same chance has V. N counts the end of each output. The
tokenizer decides what a token is, so models with other tokenizers do not compare (bits a byte do,
see losses.bits_per_byte). Of several right outputs only the record's own is read.
"""

import math
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from minilm import data, ops
from minilm.data import Record, Tokenizer
from minilm.graph import no_dropout
from minilm.measure.losses import alike
from minilm.tensor import no_grad


def perplexity(model, records: Sequence[Record], tokenizer: Tokenizer) -> float:
    """Perplexity of the records' outputs, from 1 up. ValueError if there is no record, or for one
    that is longer than the model's context."""
    return of_sums(per_example(model, records, tokenizer).sum(0))


def per_example(model, records: Sequence[Record], tokenizer: Tokenizer,
                batch: int = 32) -> np.ndarray:
    """(nats, tokens) of each output: (R, 2)."""
    tokens, targets = data.encode(records, tokenizer, context=model.room)
    found = np.zeros((len(records), 2))
    with no_grad(), no_dropout():
        for rows, width in tqdm([*alike(model, targets, batch=batch)], "perplexity",
                                unit="batch", leave=False, disable=None):
            logits = model(tokens[rows, :width])
            for i, row in enumerate(rows):
                nats = ops.cross_entropy(logits[i], targets[row, :width], total=1).data
                found[row] = float(nats), (targets[row] != data.IGNORED).sum()
    return found


def of_sums(sums: np.ndarray) -> float:
    """Perplexity from the sums (2,); infinite if it is beyond what a float holds."""
    try:
        return math.exp(sums[0] / sums[1])  # eq. (1)
    except OverflowError:
        return math.inf
