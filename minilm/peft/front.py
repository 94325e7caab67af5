"""What prompt and prefix tuning share: p rows in front of each text, which every token sees.

Both adapt `model.front`, the module that takes a model from tokens to hidden states. So neither the
model nor its attention knows them, and names, switching and unloading are the slot's.

The text begins at position p, as in PEFT, and may have context - p tokens: `model.room`. Logits and
masks are those of the text alone; a mask never hides the rows.
"""

import numpy as np

from minilm.backend import array_module
from minilm.peft.adapted import FRONT, Adapter, insert_adapters, require_transformer
from minilm.transformer import Transformer


def put_in_front(model: Transformer, name: str, adapter: Adapter) -> Transformer:
    """Freeze the model, and let the adapter put its rows in front of each text; returns the model.

    It acts together with the layers' adapters of the same name. ValueError if the name is taken in
    front, and while another adapter is merged; the model is then as it was.
    """
    return insert_adapters(model, name, {FRONT: adapter})


def check_length(model: Transformer, length: int):
    """ValueError if so many rows leave no room for a text."""
    context = model.config.context
    whole = isinstance(length, int | np.integer) and type(length) is not bool
    if not whole or not 1 <= length < context:
        raise ValueError(f"the rows in front must be 1 to {context - 1}, as the model's context is "
                         f"{context}; got {length!r}")


def length_and_ids(model: Transformer, length, ids):
    """(how many rows, the ids that they start as: int64 (p,), or None).

    ids are repeated or cut, as PEFT does it. ValueError if length does not fit, or for bad ids.
    """
    require_transformer(model)
    if ids is not None:
        ids = np.asarray(ids)
        if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
            raise ValueError(f"ids must be integers (p,), got {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() >= model.config.vocab_size:
            raise ValueError(f"ids from {ids.min()} to {ids.max()}, but the table has "
                             f"{model.config.vocab_size} rows")
        length = len(ids) if length is None else length
    check_length(model, length)
    return length, None if ids is None else np.resize(ids, length)


def seen(mask, p: int, tokens, cache=None):  # (B, S) -> (B, p + S)
    """The text's mask with ones for the rows in front. ValueError if it is not the text's."""
    if mask is None or np.ndim(tokens) != 2:  # tokens that model.embedded() refuses
        return mask
    past = cache.length - p if cache and cache.length else 0
    (B, T), mask = np.shape(tokens), mask if hasattr(mask, "dtype") else np.asarray(mask)
    if mask.shape != (B, past + T):
        raise ValueError(f"mask {mask.shape} must have the shape {(B, past + T)}, as the tokens")
    xp = array_module(mask)
    return xp.concatenate([xp.ones((B, p), mask.dtype), mask], axis=1)
