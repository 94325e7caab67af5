"""A text that a model goes on with, turn after turn: what it has read is not read again.

The keys and values of all tokens that were run are kept. The next turn's text mostly begins with
them, so only its new tokens are run. Where it differs, as a template may write an earlier answer
otherwise, what follows the difference is run again: the answer is the one without a cache.
"""

from collections.abc import Iterator

import numpy as np

from minilm.cache import Cache
from minilm.decode import caches, decodes
from minilm.generate import logits_after, sample, settled
from minilm.transformer import Transformer


class Dialogue:
    """What a model has read, and how the next token is drawn: settings as for generate.stream.

    `ran` counts the tokens that were run, in all turns. A model that cannot use a cache (see
    decode.caches) runs the whole text for each token.
    """

    def __init__(self, model: Transformer, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, seed: int = 0):
        self.model, self.settings = model, (temperature, top_k, top_p)
        self.rng = settled(model, np.zeros((1, 1), int), *self.settings, seed)
        self.cache, self.fast = Cache.empty(model) if caches(model) else None, decodes(model)
        self.tokens, self.ran = [], 0  # those whose keys and values are kept

    def answer(self, tokens) -> Iterator[int]:
        """Draw what follows tokens (T,), the whole text so far, until the context is full.

        It may be left at any time, also by Ctrl-C. ValueError for tokens that are not the model's
        or do not fit its context, and as generate.stream.
        """
        text = np.asarray(tokens)
        settled(self.model, text[None], *self.settings, seed=0)
        if len(text) > self.model.room:
            raise ValueError(f"the text takes {len(text)} tokens, but the model's context is "
                             f"{self.model.room}")
        return self._drawn(text.tolist())

    def _drawn(self, text):
        kept = min(agreement(self.tokens, text), len(text) - 1)  # one at least gives the logits
        front = self.model.front.length  # is in the cache too, as soon as there is text in it
        while len(text) <= self.model.room:
            if self.cache is None:
                kept = 0
            else:
                del self.tokens[kept:]  # before the run: it may be interrupted
                self.cache.keep(kept and front + kept)
            new = np.array([text[kept:]])
            logits = logits_after(self.model, new, self.cache, self.fast)
            self.ran += new.size
            self.tokens, kept = text[:], len(text)
            drawn = int(sample(logits, self.rng, *self.settings)[0])
            yield drawn
            text.append(drawn)


def agreement(first, second) -> int:
    """How many tokens two texts have in common, from their beginning.

    >>> agreement([5, 6, 7], [5, 6, 8, 9])
    2
    """
    pairs = enumerate(zip(first, second))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
