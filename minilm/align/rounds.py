"""Rounds of answers as batches: rounds[step] is a minibatch, for loop.fit.

A round draws answers with the policy as it then is, and is learned from in `epochs` times `parts`
steps: each epoch goes through all answers once, in another order, in `parts` minibatches. What a
round draws depends on the policy, the seed and the round's number. Within a round a run can only go
on with the answers that were drawn: `Remembering` puts them into the checkpoint, beside AdamW's
moments.
"""

import numpy as np

from minilm.align.rollouts import Rollouts, rollouts
from minilm.optim import AdamW
from minilm.ranges import check, whole


class Rounds:
    """Batches of `loss` (PPO or GRPO), from answers to some of the prompts.

    batch: answers of a round, `group` of them to each prompt. most, end, score, head, frozen: as in
    rollouts. text: batches of old text, (tokens, targets), with as many rows as a minibatch.
    ValueError for settings out of range.
    """

    RANGES = {name: whole(1) for name in ("batch", "epochs", "parts", "group")}

    def __init__(self, model, prompts, loss, *, score, batch: int, most: int, end: int | None,
                 seed: int, epochs: int = 2, parts: int = 2, group: int = 1, head=None, frozen=None,
                 text=None):
        check(self.RANGES, batch=batch, epochs=epochs, parts=parts, group=group)
        if batch % group or batch < parts or batch // group > len(prompts):
            raise ValueError(f"a round of {batch} answers must be whole groups of {group}, make "
                             f"{parts} parts, and ask each of {len(prompts)} prompts at most once")
        self.model, self.prompts, self.loss, self.seed = model, prompts, loss, seed
        self.epochs, self.parts, self.group, self.text = epochs, parts, group, text
        width = max(len(prompt) for prompt in prompts)
        self.how = dict(most=most, end=end, score=score, head=head, frozen=frozen, width=width)
        self.drawn, self.number = Rollouts.empty(batch, width + most), np.array([-1])
        self.arrays = None  # what the loss makes of them

    def __len__(self):
        """The steps of a round."""
        return self.epochs * self.parts

    def __getitem__(self, step: int) -> tuple:
        number, place = divmod(step, len(self))
        if self.number[0] != number:
            self.draw(number)
        if self.arrays is None:
            self.arrays = self.loss.prepared(self.drawn)
        epoch, part = divmod(place, self.parts)
        size = len(self.drawn.tokens)
        # The 5 and the 6 keep these streams apart from others of (seed, step).
        order = np.random.default_rng([self.seed, number, epoch, 5]).permutation(size)
        rows = np.array_split(order, self.parts)[part]
        text = () if self.text is None else [a[: len(rows)] for a in self.text[step]]
        return *(a[rows] for a in self.arrays), *text

    def draw(self, number: int):
        """Draw a round's answers, and keep them in place of those of the round before."""
        rng = np.random.default_rng([self.seed, number, 6])
        asked = rng.choice(len(self.prompts), len(self.drawn.tokens) // self.group, replace=False)
        prompts = [self.prompts[i] for i in np.repeat(asked, self.group)]
        new = rollouts(self.model, prompts, seed=[self.seed, number, 7], **self.how)
        for kept, array in zip(self.drawn, new):
            kept[...] = array
        self.number[0], self.arrays = number, None

    def states(self) -> dict:
        """What a checkpoint must hold, by name: arrays that stay where they are."""
        named = {f"round.{name}": array for name, array in self.drawn._asdict().items()}
        return named | {"round.number": self.number}


class Remembering(AdamW):
    """AdamW whose states in a checkpoint include those of rounds."""

    def __init__(self, rounds: Rounds, params, lr: float):
        super().__init__(params, lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.rounds = rounds

    def states(self) -> dict:
        """Those of AdamW and of the rounds, by name."""
        return super().states() | self.rounds.states()

    def put_back(self, states: dict):
        """Go on from what states() gave."""
        super().put_back(states)
        self.rounds.arrays = None
