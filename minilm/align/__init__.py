"""Alignment: losses that learn from what people prefer, and the answers that they are applied to.

The loop is loop.fit's: each method is a loss for Trainer, with batches.
"""

from minilm.align.comparisons import Ranked, laid_out
from minilm.align.dpo import DPO, reference_sums
from minilm.align.grpo import GRPO
from minilm.align.ppo import PPO, value_head
from minilm.align.reward import RankingLoss, Reward, ranking_loss, reward_model
from minilm.align.rollouts import Rollouts, answers_of, draw_answers, reference_of, rollouts
from minilm.align.rounds import Remembering, Rounds

__all__ = [
    "DPO", "GRPO", "PPO", "Ranked", "RankingLoss", "Remembering", "Reward", "Rollouts", "Rounds",
    "answers_of", "draw_answers", "laid_out", "ranking_loss", "reference_of", "reference_sums",
    "reward_model", "rollouts", "value_head",
]
