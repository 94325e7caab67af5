"""What a model is given: tokens and segments, checked, and what follows from the ids.

Shapes: B batch, T tokens. NumPy's arrays stay on the CPU, where ops.embedding checks their ids.
"""

import numpy as np

from minilm.backend import array_module


def checked(tokens, start: int, context: int):
    """tokens as an array of integers (B, T). ValueError if they are anything else, or if they do
    not fit the context behind `start` others."""
    tokens = _array(tokens)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be integers (B, T), got {tokens.dtype} {tokens.shape}")
    T = start + tokens.shape[1]
    if tokens.shape[1] == 0 or T > context:
        rows = f", {start} of which are in front" if start else ""
        raise ValueError(f"T must be 1 to {context}, the model's context; got {T}{rows}")
    return tokens


def checked_segments(segments, tokens, count: int):
    """segments as integers (B, T) from 0 to count - 1, or None for none. ValueError for others."""
    if segments is None:
        return None
    segments = _array(segments)
    if not count:
        raise ValueError("this model knows no segments of a text: leave them out")
    if segments.shape != tokens.shape or segments.dtype.kind not in "iu":
        raise ValueError(f"segments must be integers {tokens.shape}, as the tokens; got "
                         f"{segments.dtype} {segments.shape}")
    if segments.size and not 0 <= segments.min() <= segments.max() < count:
        raise ValueError(f"segments must be 0 to {count - 1}, got {segments.min()} to "
                         f"{segments.max()}")
    return segments


def seen(mask, wanted, xp):  # (B, S) -> booleans (B, 1, 1, S)
    """The mask for attention. ValueError unless it has the shape `wanted`, and only 0 and 1."""
    mask = xp.asarray(mask)
    if mask.shape != wanted:
        raise ValueError(f"mask {mask.shape} must have the shape {wanted}, as the tokens")
    # Floats may be one that is to be added to the scores: it has 0 for what may be seen.
    if (xp is np or mask.dtype.kind == "f") and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must be 1 for a token that may be seen, 0 for padding")
    return (mask != 0)[:, None, None, :]


def counted(tokens, padding: int, start: int = 0):
    """RoBERTa's positions, which count only the tokens that are not padding: (B, T) -> (B, T).

    They begin behind `padding`, which is the padding's own position. What the mask says does not
    matter, as in transformers.

    >>> counted(np.array([[1, 1, 7, 8, 1, 9]]), padding=1)
    array([[1, 1, 2, 3, 1, 4]])
    """
    counts = tokens != padding
    return (counts.cumsum(-1) + start) * counts + padding


def last(x, tokens, mask, padding: int | None):
    """The row of each text's last token that is neither padding nor masked: (B, T, C) -> (B, C).
    Transformers looks for the padding's id alone.

    >>> from minilm.tensor import Tensor
    >>> x = Tensor(np.arange(6.0).reshape(2, 3, 1))
    >>> last(x, np.array([[7, 8, 0], [0, 7, 8]]), None, padding=0).data
    array([[1.],
           [5.]])
    """
    xp = array_module(x.data)
    tokens = xp.asarray(tokens)
    seen = xp.ones(tokens.shape, bool) if padding is None else tokens != padding
    if mask is not None:
        seen = seen & (xp.asarray(mask) != 0)
    return x[xp.arange(len(tokens)), (seen * xp.arange(tokens.shape[1])).argmax(-1)]


def _array(x):
    return x if hasattr(x, "dtype") else np.asarray(x)
