"""What a model guesses at a place in a text."""

import numpy as np

from minilm import ops
from minilm.graph import no_dropout
from minilm.tensor import no_grad


def likeliest(model, tokenizer, prompt: str, temperatures=(1,), count: int = 8):
    """(names of the likeliest tokens after a prompt, their probabilities at each temperature).

    A masked model fills in a mask after the prompt. If the prompt is longer than the context, the
    model sees its end.
    """
    ids = tokenizer.encode(prompt)[-model.room + 1 :]
    ids = ids if model.config.causal else np.append(ids, tokenizer.mask)
    with no_grad(), no_dropout():
        logits = model(ids[None]).data[0, -1]
    first = np.argsort(-logits[: tokenizer.vocab_size])[:count]  # later logits are unused
    def name(id): return "end" if id == tokenizer.end else repr(tokenizer.decode([id]))[1:-1]
    p = {T: ops.softmax(logits / T).data[first] for T in temperatures}
    return [name(id).replace(" ", "\u2423") for id in first], p
