"""How likely a model finds the tokens of an answer: what every method of preferences is made of.

    log pi(y | x) = sum_t log pi(y_t | x, y_<t)

    symbol   name
    x        the prompt: the first tokens of a row
    y        the answer, with the end token if it has one
    pi       the model

A batch has tokens (B, T), filled up at the right, and `counted` (B, T - 1): True at t if token
t + 1 is of the answer. Only these N tokens go through the head. What is said of them is (N,), in
the order of the rows.

Shapes: B batch, T tokens, C width, V vocabulary, N counted tokens.
"""

import numpy as np

from minilm import ops
from minilm.arrays import by_rows, described, floating, rows, wide
from minilm.backend import array_module, to_device
from minilm.graph import no_dropout
from minilm.losses import surprise
from minilm.tensor import Tensor, no_grad, op


def plain_log_prob(logits, tokens):  # (N, V), (N,) -> (N,)
    """log softmax(logits)[token]: the formula of `log_prob`."""
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.log(p[np.arange(len(tokens)), tokens])


@op
def log_prob(logits, tokens):
    """log softmax(logits)[token]: (..., V), integers (...) -> (...), at least float32.

    It is cross_entropy without the mean. TypeError for tokens that are no integers, ValueError if
    one is out of range.

    >>> log_prob(np.zeros((1, 4)), np.array([2])).data.round(4)  # -log 4
    array([-1.3863])
    """
    floating("log_prob", logits=logits)
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"log_prob: tokens must be integers, got {described(tokens)}")
    if logits.ndim == 0 or logits.shape[:-1] != tokens.shape:
        raise ValueError(f"log_prob: logits {logits.shape} do not go with {tokens.shape}")
    V, z, t = logits.shape[-1], rows(logits), tokens.reshape(-1)
    if t.size and (t.min() < 0 or t.max() >= V):
        raise ValueError(f"log_prob: tokens from {t.min()} to {t.max()}, but V is {V}")
    xp = array_module(z)
    t = xp.asarray(t)

    p, y = by_rows(surprise, z, t[:, None])

    def dlogits(dy):  # (onehot(token) - p) dy
        p[xp.arange(len(t)), t] -= 1
        p[...] *= -dy.reshape(-1, 1).astype(p.dtype)
        return p.reshape(logits.shape)
    return -y.reshape(tokens.shape), dlogits


def states(model, tokens, counted) -> Tensor:  # (B, T), (B, T - 1) -> (N, C)
    """The hidden states from which the counted tokens are predicted."""
    hidden = model.hidden(tokens[:, :-1])
    places = np.flatnonzero(to_device(counted, "cpu"))
    return ops.embedding(places, hidden.reshape(-1, hidden.shape[-1]))


def answer_log_probs(model, tokens, counted) -> Tensor:  # (B, T), (B, T - 1) -> (N,)
    """log pi of each counted token."""
    return log_prob(model.logits(states(model, tokens, counted)), tokens[:, 1:][counted])


@op
def summed(x, counted):  # (N,), (B, T - 1) -> (B,)
    """The sums of x over the counted tokens of each row: log pi(y | x), if x is log pi of tokens.
    """
    floating("summed", x=x)
    xp, lengths = array_module(x), counted.sum(-1)
    if x.shape != (int(lengths.sum()),):
        raise ValueError(f"summed: x {x.shape} does not go with {lengths.sum()} counted tokens")
    def dx(dy): return dy[xp.asarray(np.repeat(np.arange(len(lengths)), lengths))]
    return spread(wide(x), counted).sum(-1), dx


def spread(x, counted):  # (N,), (B, T - 1) -> (B, T - 1)
    """Numbers of the counted tokens at their places in an array, with 0 elsewhere."""
    xp = array_module(x)
    whole = xp.zeros(counted.shape, x.dtype)
    whole[xp.asarray(counted)] = x
    return whole


def real(counted):  # (B, T - 1) -> (B, T)
    """1 for the tokens of a prompt and an answer, 0 for what comes after the answer.

    >>> real(np.array([[False, True, False]])).tolist()
    [[1, 1, 1, 0]]
    """
    later = np.logical_or.accumulate(counted[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([np.ones((len(counted), 1), bool), later], axis=1).astype(np.int32)


def looked_at(model, tokens, counted, head=None):  # -> three arrays (B, T - 1)
    """log pi, the entropy of pi, and what a value head says, at the counted tokens; 0 elsewhere.

    No graph, no dropout. head: a module (N, C) -> (N, 1); without one the values are 0.
    """
    with no_grad(), no_dropout():
        x = states(model, tokens, counted)
        log_p = ops.log_softmax(Tensor(wide(model.logits(x).data))).data
        values = wide(head(x).data[:, 0]) if head else log_p[:, 0] * 0
    log_p, values = to_device(log_p, "cpu"), to_device(values, "cpu")
    chosen = np.take_along_axis(log_p, tokens[:, 1:][counted][:, None], -1)[:, 0]
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    return tuple(spread(x.astype(np.float32), counted) for x in (chosen, entropy, values))
