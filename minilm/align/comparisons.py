"""Comparisons as arrays: answers to each prompt, the best first, filled up at the right.

Shapes: M prompts, K answers of each, T tokens.
"""

from typing import NamedTuple

import numpy as np


class Ranked(NamedTuple):
    """K answers to each of M prompts, the best first."""

    tokens: np.ndarray  # (M, K, T) int64: a prompt and an answer, filled up at the right
    counted: np.ndarray  # (M, K, T - 1) bool: True at t if token t + 1 is of the answer

    def put_in_order(self, orders):
        """The answers in these orders (M, K), integers from 0 to K - 1 each."""
        return Ranked(*(np.take_along_axis(a, orders[..., None], axis=1) for a in self))

    def texts(self):
        """All answers one after another: tokens (M K, T), counted (M K, T - 1)."""
        return tuple(a.reshape(-1, a.shape[-1]) for a in self)


def laid_out(prompts, answers, fill: int = 0) -> Ranked:
    """Ranked of prompts, (P,) tokens each, and of K answers to each, (A,) tokens each.

    ValueError if there is none, if they differ in K, or if one is empty.

    >>> laid_out([[5]], [[[6, 7], [8]]]).tokens.tolist()
    [[[5, 6, 7], [5, 8, 0]]]
    """
    counts = {len(of_prompt) for of_prompt in answers}
    if len(counts) != 1 or len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts and {len(answers)} lists of answers must be as "
                         f"many, with as many answers each; there are {sorted(counts)}")
    sizes = np.array([[(len(x), len(y)) for y in ys] for x, ys in zip(prompts, answers)])
    if not sizes.size or not sizes.min():
        raise ValueError("a prompt or an answer is empty")
    tokens = np.full((*sizes.shape[:2], sizes.sum(-1).max()), fill, np.int64)
    for row, prompt, of_prompt in zip(tokens, prompts, answers):
        for text, answer in zip(row, of_prompt):
            text[: len(prompt)] = prompt
            text[len(prompt) : len(prompt) + len(answer)] = answer
    place, starts, ends = np.arange(1, tokens.shape[2]), sizes[..., :1], sizes.sum(-1)[..., None]
    return Ranked(tokens, (place >= starts) & (place < ends))
