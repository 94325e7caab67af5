"""Alignment: losses that learn from what people prefer, and the answers that they are applied to.

The loop is loop.fit's: each method is a loss for Trainer, with batches.
"""

from minilm.align.ppo import PPO, value_head
from minilm.align.rollouts import Rollouts, draw_answers, reference_of, rollouts
from minilm.align.rounds import Remembering, Rounds

__all__ = [
    "PPO", "Remembering", "Rollouts", "Rounds", "draw_answers", "reference_of", "rollouts",
    "value_head",
]
