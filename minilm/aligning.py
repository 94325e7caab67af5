"""What align.py does for its methods: their settings, prompts, rewards, and what they draw.

    method   learns from                               is kept as
    reward   comparisons                               a model with one class, its scale beside it
    dpo      comparisons                               PEFT's folder
    ppo      its own answers, worth a reward each      PEFT's folder
    grpo     the same, in groups with one prompt       PEFT's folder
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from minilm import data
from minilm.align.rollouts import answers_of
from minilm.data.preferences import SCORES
from minilm.loop import Training
from minilm.ranges import AT_LEAST_0, POSITIVE, one_of, optional, whole

METHODS = ("reward", "ppo", "dpo", "grpo")


@dataclass(frozen=True)
class Aligning(Training):
    """What decides a run of align.py."""

    method: Literal[METHODS] = "ppo"
    """reward: a reward model, from comparisons. ppo, grpo: a policy, from a reward of its own
    answers. dpo: a policy, from comparisons"""
    model: str = ""
    """Hugging Face folder with a tokenizer.json; by default the newest runs/pretrain-*/model"""
    data: str = "python-reference"
    """a corpus, whose pieces are the prompts; or a JSONL file of prompt, chosen, rejected"""
    prompt: int = 16
    """tokens of a prompt that is a piece of a corpus"""
    tokens: int = 24
    """most tokens of an answer"""
    reward: str = "vowels"
    """what an answer is worth: vowels, peak, upper, or the folder of a reward model"""
    beta: float | None = None
    """price of a nat of KL to the reference; by default 0.02 for ppo"""
    epochs: int = 2
    """how often ppo and grpo learn from a round's answers"""
    parts: int = 2
    """steps of an epoch"""
    eps: float = 0.2
    """how far a step may change a token's probability, as a share, before its gradient ends"""
    lam: float = 0.95
    """of ppo's advantages: 0 believes the value head, 1 the rewards alone"""
    value: float = 0.1
    """weight of the value head's loss"""
    ptx: float = 0.0
    """weight of the loss on old text: PPO-ptx"""
    r: int = 8
    """rank of LoRA"""
    alpha: float = 16.0
    """the update is scaled by alpha / r"""
    targets: tuple[str, ...] = ("all-linear",)
    """layers that get an adapter, among q k v o gate up down"""
    test: int = 128
    """held-out prompts"""
    batch: int = 64
    """answers of a round, or prompts of a step with comparisons"""
    steps: int = 240
    """updates in the whole run; a round of ppo has epochs x parts"""
    lr: float = 1e-3
    """learning rate after the warmup"""
    warmup: int = 0
    """steps of linear warmup"""
    eval_every: int = 40
    """steps between answers to held-out prompts"""
    save_every: int = 40
    """steps between checkpoints"""

    RANGES: ClassVar = Training.RANGES | {
        "method": one_of(*METHODS), "prompt": whole(1), "tokens": whole(1), "r": whole(1),
        "beta": optional(AT_LEAST_0), "epochs": whole(1), "parts": whole(1), "eps": POSITIVE,
        "lam": AT_LEAST_0, "value": AT_LEAST_0, "ptx": AT_LEAST_0, "alpha": POSITIVE,
        "test": whole(1), "steps": whole(1)}


class TextReward:
    """A rule on texts as a reward of answers."""

    def __init__(self, name: str, tokenizer):
        self.rule, self.tokenizer = SCORES[name], tokenizer

    def __call__(self, tokens, counted) -> np.ndarray:  # (B, T), (B, T - 1) -> (B,)
        texts = [text_of(answer, self.tokenizer) for answer in answers_of(tokens, counted)]
        return np.array([self.rule(text) for text in texts])


def text_of(answer, tokenizer) -> str:
    """An answer without its end."""
    return tokenizer.decode(answer[:-1] if answer[-1] == tokenizer.end else answer)


def pieces(texts, tokenizer, length: int, count: int | None, seed: int) -> list[np.ndarray]:
    """Pieces of `length` tokens of texts: as many as `count` at random, or all that lie in a row.
    """
    stream = data.pack(texts, tokenizer)
    if len(stream) < length:
        raise ValueError(f"the text has {len(stream)} tokens, too few for a prompt of {length}")
    if count is None:
        starts = np.arange(0, len(stream) - length + 1, length)
    else:
        starts = np.random.default_rng([seed, 8]).integers(0, len(stream) - length + 1, count)
    return [stream[start : start + length] for start in starts]
