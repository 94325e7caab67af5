"""Answers that the policy draws, and what the policy and the reference think of them.

The policy pi is a model with adapters. The reference pi_ref is the same model with its adapters at
rest, `use_adapter(model, None)`, so it takes no memory of its own. A policy that trains all of its
weights has a frozen copy as its reference.

Prompts of several lengths go through the cache together: all rows begin with the tokens of the
shortest prompt, then one token a row is run at a time. A row whose prompt goes on takes its own
next token, another one the token that was drawn. So no row has padding in front, and the positions
are those of the text.

    symbol   name
    x, y     prompt, answer
    pi       policy       log_probs of Rollouts
    pi_ref   reference    reference of Rollouts
    R        scores of Rollouts: what an answer is worth

Shapes: B rows, T tokens, P of the longest prompt; T = P + the most tokens of an answer.
"""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from minilm.align.likelihood import looked_at
from minilm.cache import Cache
from minilm.decode import caches, decodes
from minilm.generate import logits_after, sample, settled
from minilm.peft.adapted import adapted_layers, use_adapter
from minilm.ranges import check, whole


class Rollouts(NamedTuple):
    """Prompts and answers. What is known of an answer's token t + 1 stands at t; elsewhere is 0."""

    tokens: np.ndarray  # (B, T) int64; what comes after an answer is filled up with its end
    counted: np.ndarray  # (B, T - 1) bool, the tokens of answers; an end token is one of them
    log_probs: np.ndarray  # (B, T - 1) float32, log pi
    reference: np.ndarray  # (B, T - 1) float32, log pi_ref
    entropy: np.ndarray  # (B, T - 1) float32, of pi, in nats
    values: np.ndarray  # (B, T - 1) float32, what a value head expects
    scores: np.ndarray  # (B,) float32

    @classmethod
    def empty(cls, B: int, T: int):
        """Arrays of zeros, with room for such rollouts."""
        per_token = [np.zeros((B, T - 1), np.float32) for _ in range(4)]
        return cls(np.zeros((B, T), np.int64), np.zeros((B, T - 1), bool), *per_token,
                   np.zeros(B, np.float32))

    def told(self) -> dict[str, float]:
        """Means over the answers: reward, KL to the reference, length; entropy of a token."""
        lengths = self.counted.sum(-1)
        kl = (self.log_probs - self.reference).sum(-1)
        return {"reward": float(self.scores.mean()), "kl": float(kl.mean()),
                "length": float(lengths.mean()),
                "entropy": float(self.entropy.sum() / lengths.sum())}


def draw_answers(model, prompts, most: int, end: int | None, seed=0, width: int | None = None):
    """(tokens (B, T), counted (B, T - 1)): an answer to each prompt, sampled at temperature 1.

    prompts: integers (P,) each, with a P of their own. most: tokens of an answer; it is shorter if
    it draws `end`, which then is its last. seed: whatever np.random.default_rng takes. width: P of
    T, by default that of the longest prompt. ValueError for prompts that are empty or too long, and
    as generate.stream.
    """
    check({"most": whole(1)}, most=most)
    starts = np.array([len(prompt) for prompt in prompts])
    if not len(prompts) or not starts.min():
        raise ValueError("there must be prompts, each of one token at least")
    T, past = (width or starts.max()) + most, starts.max() + most
    if past > model.room:
        raise ValueError(f"a prompt of {starts.max()} tokens and an answer of {most} do not fit "
                         f"the model's context of {model.room}")
    tokens = np.full((len(prompts), T), 0 if end is None else end, np.int64)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    first, written = starts.min(), np.zeros(tokens.shape, bool)
    new, rng = tokens[:, :first], settled(model, tokens[:, :past], 1.0, None, None, seed)
    cached = caches(model) and past + model.front.length <= model.config.steady
    cache, fast = Cache.empty(model) if cached else None, decodes(model)
    writes = np.ones(len(prompts), bool)  # rows that have not ended
    for t in range(first, past):
        logits = logits_after(model, new if cached else tokens[:, :t], cache, fast)
        drawn = sample(logits, rng, 1.0, None, None)
        written[:, t] = mine = writes & (t >= starts)
        tokens[mine, t] = drawn[mine]
        writes &= ~(mine & (drawn == end)) & (t + 1 < starts + most)
        if not writes.any():
            break
        new = tokens[:, t : t + 1]
    return tokens, written[:, 1:]


def rollouts(model, prompts, most: int, end: int | None, seed=0, *, score, head=None, frozen=None,
             width: int | None = None) -> Rollouts:
    """The policy's answers to prompts, see draw_answers, and what is known of them.

    score(tokens, counted) -> (B,). head: the value head. frozen: the reference, if it is not the
    model with its adapters at rest.
    """
    tokens, counted = draw_answers(model, prompts, most, end, seed, width)
    log_probs, entropy, values = looked_at(model, tokens, counted, head)
    with reference_of(model, frozen) as reference:
        theirs, *_ = looked_at(reference, tokens, counted)
    scores = np.asarray(score(tokens, counted), np.float32)
    if scores.shape != (len(tokens),) or not np.isfinite(scores).all():
        raise ValueError(f"the scores must be {len(tokens)} finite numbers, got {scores!r:.100}")
    return Rollouts(tokens, counted, log_probs, theirs, entropy, values, scores)


@contextmanager
def reference_of(model, frozen=None):
    """Inside, what is yielded is pi_ref: the model with its adapters at rest, or `frozen`."""
    if frozen is not None:
        yield frozen
        return
    acting = {layer.active for layer in adapted_layers(model).values()}
    if len(acting) != 1:
        raise ValueError("a policy without adapters needs a frozen copy as its reference")
    use_adapter(model, None)
    try:
        yield model
    finally:
        use_adapter(model, *acting)


def answers_of(tokens, counted) -> list[np.ndarray]:  # (B, T), (B, T - 1) -> B arrays
    """The tokens of each answer."""
    return [row[1:][mine] for row, mine in zip(tokens, counted)]
