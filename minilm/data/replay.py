"""Replay: rows of what a model has learned before, among those that it learns now.

A model that learns something new overwrites what it knows, unless that comes again, which is called
rehearsal (Robins 1995, Catastrophic forgetting, rehearsal and pseudorehearsal). A share p of a
step's rows is old. If there are B rows in a step of the new,

    k = p B              are old, in the place of new ones: a step has fewer new rows            (1)
    k = p B / (1 - p)    are old, beside all of the new ones: a step has more rows               (2)

If k is no whole number, steps with one old row less and one more take turns, so that in s steps
floor(k s) rows are old.
"""

from collections.abc import Iterable
from math import ceil, floor

import numpy as np

from minilm.data.batches import Batches, pack
from minilm.data.instructions import RowBatches, filled
from minilm.data.tokenizers import Tokenizer


class Replay:
    """Training batches with old rows in them: batches[step] -> (tokens, targets), (B, T) int32.

    new, old: batches like that. The first rows of a step of `old` are taken; `most_old` says how
    many there must be. share: of the rows that are old. beside: eq. (2), not (1). Rows are filled
    up to the longest. A batch depends on (seed, step) alone if those of new and old do. ValueError
    for a share that is not from 0 to below 1, and if a step of `old` has too few rows.
    """

    def __init__(self, new, old, share: float, seed: int, beside: bool = False):
        if not 0 <= share < 1:
            raise ValueError(f"share must be at least 0 and below 1, got {share}")
        self.new, self.old, self.share, self.seed, self.beside = new, old, share, seed, beside

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        rows = [*zip(*self.new[step])]
        each = old_a_step(len(rows), self.share, self.beside)
        k = floor(each * (step + 1)) - floor(each * step)
        old = [*zip(*self.old[step])] if k else []
        if len(old) < k:
            raise ValueError(f"step {step} takes {k} old rows, but a batch of them has {len(old)}")
        if not self.beside:  # the 5 keeps this stream apart from others'
            order = np.random.default_rng([self.seed, step, 5]).permutation(len(rows))
            rows = [rows[i] for i in sorted(order[k:])]
        return filled(rows + old[:k])


def replay_text(new: RowBatches, texts: Iterable[str], tokenizer: Tokenizer, share: float,
                beside: bool = False) -> Replay:
    """Replay of texts, with the batch and the seed of `new`.

    An old row is as long as the longest row of `new` that takes at most twice the median, so that
    old rows and new ones hardly fill each other up. It starts anywhere in the texts. ValueError for
    texts without as many tokens.
    """
    length = int(new.widths[0])
    old = Batches([pack(texts, tokenizer)], [1], most_old(new.batch, share, beside), length,
                  new.seed)
    return Replay(new, old, share, new.seed, beside)


def old_a_step(batch: int, share: float, beside: bool = False) -> float:
    """How many rows of a step are old, on average: eq. (1) or (2).

    >>> old_a_step(8, 0.05), old_a_step(8, 0.5), old_a_step(8, 0.5, beside=True)
    (0.4, 4.0, 8.0)
    """
    return batch * share / (1 - share) if beside else batch * share  # eq. (2), (1)


def most_old(batch: int, share: float, beside: bool = False) -> int:
    """How many old rows a step takes at most, and at least 1.

    >>> most_old(8, 0.05), most_old(8, 0.5), most_old(8, 0.2, beside=True), most_old(8, 0.0)
    (1, 4, 2, 1)
    """
    return max(1, ceil(old_a_step(batch, share, beside)))
