"""Prompt tuning: rows of an embedding in front of the text, which no token has.

Lester et al. 2021, arXiv:2104.08691, section 2; the LoRA paper calls it PrefixEmbed. For rows P_e
(p, C) and the rows X_e (T, C) of a text's tokens, both without positions:

    logits = model([P_e; X_e])[p:]

P_e alone is trained: p C numbers. It adapts `model.front`, since rows change the length of what all
blocks see, which no layer can; the model has that one place for it, and needs no subclass.

P_e gets all that the tokens' rows get: positions 0 .. p - 1 if they are learned, as PEFT has it,
and BERT's segment and norm. So rows of real tokens act as these tokens. Gemma multiplies its
table's rows; P_e is what comes after that.

Left out: the LoRA paper's rows inside the text (l_i = 0 here), and its ensembling of prompts.
"""

import numpy as np

from minilm import ops
from minilm.arrays import wide
from minilm.backend import array_module, to_device
from minilm.cache import for_rows
from minilm.peft.adapted import Adapter, placed
from minilm.peft.front import length_and_ids, put_in_front, seen
from minilm.tensor import Tensor, no_grad
from minilm.transformer import Transformer

SAMPLE = 256  # tokens whose rows say how large random ones are


class Prompt(Adapter):
    """P (p, C), the paper's P_e."""

    tokenwise = anywhere = True
    length = property(lambda self: len(self.P))

    def __init__(self, P):
        if P.ndim != 2 or not len(P):
            raise ValueError(f"P must be (p, C), got {P.shape}")
        self.P = Tensor(P, requires_grad=True)

    def forward(self, model, tokens, mask, cache, segments, base):  # (B, T) -> (B, T, C)
        p, mask = self.length, seen(mask, self.length, tokens, cache)
        if cache and cache.length:
            return base(model, tokens, mask, cache, segments)
        return model.run(self.joined(model, tokens, segments), mask, cache=cache)[:, p:]

    def joined(self, model, tokens, segments):  # (B, T) -> (B, p + T, C)
        """The rows and the text's. Of both apart nothing is left while the blocks run."""
        text = model.embedded(tokens, self.length, segments)
        P, xp = for_rows(self.P[None], len(text)), array_module(text.data)  # (B, p, C)
        return ops.concat(model.placed(P, xp.arange(self.length)), text, axis=1)


def add_prompt(model: Transformer, length: int | None = None, ids=None, name: str = "default",
               seed: int = 0) -> Transformer:
    """Freeze the model, and put trained rows in front of each text; returns the model.

    length: p. ids (n,): tokens whose rows they start as, such as those of a text that describes the
    task; repeated or cut to p, which is n by default. Without ids they are random, of the size of
    tokens' rows. The rows act together with the layers' adapters of the same name. ValueError
    if p rows leave no room for a text, for ids that are not the model's, if the name is taken, and
    while an adapter is merged; the model is then as it was.

    >>> from minilm.transformer import Config
    >>> model = Transformer(Config.gpt2(vocab_size=50, context=16, layers=2, heads=2, width=8))
    >>> model = add_prompt(model, ids=[17, 4, 29])
    >>> [(path, p.shape) for path, p in model.named_parameters()], model.room
    ([('front.adapters.default.P', (3, 8))], 13)
    >>> model(np.array([[1, 2]])).shape
    (1, 2, 50)
    """
    p, ids = length_and_ids(model, length, ids)
    rng = np.random.default_rng(seed)
    with no_grad():
        given = rng.integers(model.config.vocab_size, size=SAMPLE) if ids is None else ids
        P = model.looked_up(given).data
    if ids is None:
        size = wide(to_device(P, "cpu")).std()
        P = rng.standard_normal((p, model.config.width)) * size
    return put_in_front(model, name, Prompt(placed(model, P)))
