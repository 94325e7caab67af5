"""The loss of a model on rows of text, and bits a byte, which make tokenizers comparable."""

import math
from collections.abc import Iterator

import numpy as np

from minilm import data, ops
from minilm.backend import to_device
from minilm.data.instructions import grouped
from minilm.graph import no_dropout
from minilm.losses import of_text
from minilm.ranges import check, whole
from minilm.seq2seq import EncoderDecoder
from minilm.tensor import no_grad


def loss_of(model, tokens, targets, *mask, batch: int = 32) -> float:
    """Mean loss over the targets (B, T) that count, without dropout.

    mask (B, T): 0 for padding, which the model must not see and which does not count. batch: rows
    at a time. ValueError if no target counts, if shapes differ, or if the model sees its answers.
    """
    check({"batch": whole(1)}, batch=batch)
    shapes = [getattr(a, "shape", type(a).__name__) for a in (tokens, targets, *mask)]
    if len({*shapes}) > 1 or not isinstance(shapes[0], tuple):
        raise ValueError(f"tokens, targets and mask must be arrays of one shape, got {shapes}")
    total, targets = 0.0, of_text(targets, *mask)
    counted = int((targets != data.IGNORED).sum())
    if not counted:
        raise ValueError(f"there is nothing to measure: every target is {data.IGNORED}")
    refuse_seen_answers(model, tokens, targets)
    with no_grad(), no_dropout():
        for rows, width in alike(model, targets, *mask, batch=batch):
            logits = model(tokens[rows, :width], *(m[rows] for m in mask))
            total += float(ops.cross_entropy(logits, targets[rows, :width], total=1).data)
    return total / counted


def alike(model, targets, *mask, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """(numbers of at most `batch` rows, how many of their columns count) until all rows came.

    In text for a causal model, what comes after a row's last target decides nothing. So long rows
    come apart from the others, and do not fill them up. With a mask, or for a masked model, and if
    no row is twice as long as most are, rows come in their order and whole. So they do if the
    targets are (B,), of whole texts.
    """
    refuse_two_texts(model)
    size, width = (*targets.shape, None)[:2]
    places = [(np.arange(size), width)]
    if width and not mask and getattr(getattr(model, "config", None), "causal", False):
        counted = to_device(targets, "cpu") != data.IGNORED
        taken = np.maximum(1, (counted * np.arange(1, width + 1)).max(1))
        groups, longest = grouped(taken)
        if len(longest) > 1:
            places = [(np.flatnonzero(groups == g), int(n)) for g, n in enumerate(longest) if n]
    for rows, n in places:
        yield from ((rows[i : i + batch], n) for i in range(0, len(rows), batch))


def refuse_two_texts(model):
    """TypeError for a model that reads one text and writes another."""
    if isinstance(model, EncoderDecoder):
        raise TypeError("an EncoderDecoder's targets are no tokens that it reads: its loss is "
                        "train.AnswerLoss")


def refuse_seen_answers(model, tokens, targets):
    """ValueError if a masked model is asked for the next tokens, all of which it sees, or a model
    without a head for anything.

    A masked model's task never looks like that: of eight neighbouring targets the corruption would
    have left each one in sight, and it leaves one in ten.
    """
    refuse_two_texts(model)
    config = getattr(model, "config", None)
    if config is not None and config.head == "none":
        raise ValueError("this model has no head: its hidden states are no logits of targets")
    if config is None or config.causal or config.labels:
        return
    counted = targets != data.IGNORED
    pairs = counted[:, :-1] & counted[:, 1:]
    if pairs.sum() >= 8 and (targets[:, :-1] == tokens[:, 1:])[pairs].all():
        raise ValueError("the targets are the next tokens, which a masked model sees: its loss on "
                         "them says nothing; give it masked tokens (data.corrupt)")


def bits_per_byte(loss: float, targets: int, size: int) -> float:
    """A loss in bits a byte of the text, so that it does not depend on the tokenizer.

    loss: nats a target. targets: how many the text has. size: its bytes in UTF-8.

    >>> bits_per_byte(math.log(256), targets=10, size=10)
    8.0
    """
    check({"targets": whole(1), "size": whole(1)}, targets=targets, size=size)
    return loss * targets / size / math.log(2)
